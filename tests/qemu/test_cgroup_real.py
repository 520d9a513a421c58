"""A cgroup for each vCPU of a real QEMU, on the host's own hierarchies: v1 cpuset and cpu, v2
threaded moves.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from tests.support import cgroups, hosts, moments
from tests.support.commands import Run, cli
from tests.support.qemus import Qemu, paused
from tests.support.store import in_child
from tests.support.waiting import until, until_blocking

pytestmark = pytest.mark.qemu

TUNE = (
    "<cputune><vcpupin vcpu='1' cpuset='1'/><vcpupin vcpu='2' cpuset='0'/><shares>512</shares>"
    "<period>50000</period><quota>25000</quota></cputune>"
    "<numatune><memnode cellid='0' mode='strict' nodeset='0'/></numatune>"
)
PIN = "<cputune><vcpupin vcpu='1' cpuset='1'/></cputune>"
NUMA = ["-object", "memory-backend-ram,id=m,size=256M", "-numa", "node,cpus=0-7,memdev=m"]


def xml(tune: str) -> str:
    return (
        f"<domain type='qemu'><name>d</name><vcpu current='1'>8</vcpu>{tune}"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os>"
        "<cpu><numa><cell id='0' cpus='0-7' memory='256' unit='MiB'/></numa></cpu></domain>"
    )


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "s"))
    path = tmp_path / "d.xml"
    path.write_text(xml(TUNE))
    return path


def machine(arch="x86_64"):
    """ppc64: a core that no guest has configured is unplugged at once, paused as it is."""
    if arch == "x86_64":
        return paused(arch, "10.0", "1,maxcpus=8", ["-m", "256", *NUMA], accel="tcg,thread=multi")
    return paused(
        arch,
        "10.0",
        "2,sockets=1,cores=4,threads=2,maxcpus=8",
        ["-m", "256"],
        accel="tcg,thread=multi",
    )


def of_thread(qemu: Qemu, thread_id: int) -> dict[str, str]:
    """The groups of a thread, by controller, as the kernel tells them; "" is v2."""
    return cgroups.of_thread(qemu.pid, thread_id)


def folder_of_qemu(qemu: Qemu, controller: str) -> Path:
    """Where QEMU itself is in the hierarchy of one controller ("": v2)."""
    folder = cgroups.folder_of(qemu.pid, controller)
    if folder is None:
        pytest.skip(f"this host mounts no cgroup hierarchy for {controller or 'v2'}")
    return folder


@contextmanager
def inside(qemu: Qemu, *names: str, controllers=("cpuset", "cpu", "")) -> Iterator[dict[str, Path]]:
    """Move QEMU into new groups of these names, one in the other, in each of these hierarchies."""
    made: dict[str, Path] = {}
    every = []
    for controller in controllers:
        folder = folder_of_qemu(qemu, controller)
        for name in names:
            folder = folder / name
            folder.mkdir()
            every.append(folder)
            if controller == "cpuset":
                for what in ("cpus", "mems"):
                    (folder / f"cpuset.{what}").write_text(
                        (folder.parent / f"cpuset.{what}").read_text()
                    )
        made[controller] = folder
    try:
        for folder in made.values():
            (folder / "cgroup.procs").write_text(str(qemu.pid))
        yield made
    finally:
        qemu.kill()
        for folder in reversed(every):
            remove_when_empty([*folder.glob("*/"), folder])


def remove_when_empty(folders) -> None:
    """A group stays until the kernel has taken its last thread out."""

    def is_removed(folder) -> bool:
        with suppress(OSError):
            folder.rmdir()
        return not folder.exists()

    for folder in folders:
        until_blocking(lambda folder=folder: is_removed(folder), f"{folder} is empty")


def ours() -> list[Path]:
    """Groups that qmpvcpu has made among others' processes, anywhere."""
    return [path for mount in cgroups.mounts() for path in mount.glob("**/qemu-*.qmpvcpu")]


async def test_numatune_and_quota_get_a_group_in_each_hierarchy_that_has_the_controller(file):
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        name = f"qemu-{qemu.pid}-{hosts.start_of(qemu.pid)}.qmpvcpu"
        cpuset, cpu = folder_of_qemu(qemu, "cpuset"), folder_of_qemu(qemu, "cpu")
        own = of_thread(qemu, qemu.pid)
        outcome = await domain.enable([1, 2, 5])
        threads = {row.id: row.thread_id for row in outcome.rows}
        for number, cpus in ((1, "1"), (2, "0"), (5, (cpuset / "cpuset.cpus").read_text().strip())):
            groups = of_thread(qemu, threads[number])
            assert groups["cpuset"] == f"{own['cpuset'].rstrip('/')}/{name}/vcpu{number}"
            assert groups["cpu"] == f"{own['cpu'].rstrip('/')}/{name}/vcpu{number}"
            folder = cpuset / name / f"vcpu{number}"
            assert (folder / "cpuset.cpus").read_text().strip() == cpus
            assert (folder / "cpuset.mems").read_text().strip() == "0"
            folder = cpu / name / f"vcpu{number}"
            assert (folder / "cpu.shares").read_text().strip() == "512"
            assert (folder / "cpu.cfs_period_us").read_text().strip() == "50000"
            assert (folder / "cpu.cfs_quota_us").read_text().strip() == "25000"
        # Nothing else of QEMU was moved.
        assert of_thread(qemu, qemu.pid)["cpuset"] == own["cpuset"]
        # Pinned anew, its group follows.
        await domain.pin(1, [0], VcpuFlag.LIVE)
        assert (cpuset / name / "vcpu1" / "cpuset.cpus").read_text().strip() == "0"
        assert os.sched_getaffinity(threads[1]) == {0}
    # QEMU is gone: the next one in the same group sweeps, at its next plug. (Linux 6.18 takes a
    # thread out of its group a moment after the process could be waited for.)
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        files = [
            file for path in ours() if path.name == name for file in path.glob("**/cgroup.procs")
        ]
        await until(lambda: not any(file.read_text() for file in files), "its groups are empty")
        await domain.enable(1)
        assert not [path for path in ours() if path.name == name]
        qemu.kill()
    for one in ours():
        remove_when_empty([*one.glob("vcpu*/"), one])


async def test_no_group_is_left_after_disable(file):
    # No <vcpupin> here: each thread of the core is one vCPU.
    async with machine("ppc64") as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        outcome = await domain.enable([4, 5])
        groups = [of_thread(qemu, row.thread_id)["cpuset"] for row in outcome.rows]
        assert [name.rpartition("/")[2] for name in groups] == ["vcpu4", "vcpu5"]
        assert [path for path in ours() if f"qemu-{qemu.pid}-" in path.name]
        await domain.enable([6, 7])
        await domain.disable([4, 5])
        mine = [path for path in ours() if f"qemu-{qemu.pid}-" in path.name]
        assert mine and all(
            {p.name for p in path.glob("vcpu*/")} == {"vcpu6", "vcpu7"} for path in mine
        )
        await domain.disable([6, 7])
        assert not [path for path in ours() if f"qemu-{qemu.pid}-" in path.name]


async def test_a_qemu_alone_in_its_groups_has_its_vcpus_in_there(file):
    file.write_text(xml(PIN))
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        with inside(qemu, f"qmpvcpu-test-{qemu.pid}") as made:
            outcome = await domain.enable([1, 3])
            threads = {row.id: row.thread_id for row in outcome.rows}
            groups = of_thread(qemu, threads[1])
            for controller, folder in made.items():
                assert groups[controller].endswith(f"/{folder.name}/vcpu1")
                # Nothing is said of vCPU 3, nor of the other threads.
                assert of_thread(qemu, threads[3])[controller].endswith(f"/{folder.name}")
                assert of_thread(qemu, qemu.pid)[controller].endswith(f"/{folder.name}")
            assert (made["cpuset"] / "vcpu1" / "cpuset.cpus").read_text().strip() == "1"
            assert (made[""] / "vcpu1" / "cgroup.type").read_text().strip() == "threaded"
            assert outcome.rows[0].pin == "1"


async def test_beside_an_emulator_every_vcpu_has_its_group_as_libvirt_lays_it_out(file):
    file.write_text(xml(PIN))
    async with machine("ppc64") as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        top = f"qmpvcpu-test-{qemu.pid}"
        with (
            inside(qemu, top, "emulator", controllers=("cpuset", "cpu")) as made,
            v2_layout(qemu, top) as v2,
        ):
            outcome = await domain.enable([4, 5])
            for row in outcome.rows:
                groups = of_thread(qemu, row.thread_id)
                for controller, folder in {**made, "": v2}.items():
                    assert groups[controller].endswith(f"/{top}/vcpu{row.id}"), (controller, groups)
                    assert (folder.parent / f"vcpu{row.id}").is_dir()
                assert (
                    v2.parent / f"vcpu{row.id}" / "cgroup.type"
                ).read_text().strip() == "threaded"
            await domain.disable([4, 5])
            for folder in (*made.values(), v2):
                assert not list(folder.parent.glob("vcpu*"))


@contextmanager
def v2_layout(qemu: Qemu, top: str) -> Iterator[Path]:
    """As libvirt does on v2: a domain for the process, and in it threaded groups."""
    root = folder_of_qemu(qemu, "") / top
    emulator = root / "emulator"
    emulator.mkdir(parents=True)
    try:
        (emulator / "cgroup.type").write_text("threaded")
        (root / "cgroup.procs").write_text(str(qemu.pid))
        for name in os.listdir(f"/proc/{qemu.pid}/task"):
            (emulator / "cgroup.threads").write_text(name)
        yield emulator
    finally:
        qemu.kill()
        remove_when_empty([*root.glob("vcpu*/"), emulator, root])


async def test_an_emulator_of_whole_processes_on_v2_takes_its_vcpus_itself(file):
    """Beside a populated domain no threaded group can be made."""
    file.write_text(xml(PIN))
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        with inside(qemu, f"qmpvcpu-test-{qemu.pid}", "emulator", controllers=("",)) as made:
            outcome = await domain.enable(1)
            assert of_thread(qemu, outcome.vcpu.thread_id)[""].endswith("/emulator/vcpu1")
            assert (made[""] / "vcpu1").is_dir()


#: Root as it is in a container: not above the rights of files.
WITHOUT = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner", "--")


async def without(*arguments: str, command=WITHOUT) -> Run:
    words = [*command, sys.executable, "-m", "qmpvcpu", *arguments, "--json"]
    run = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True)
    return Run(run.returncode, run.stdout, run.stderr)


async def test_a_group_that_may_not_be_written_is_refused_before_the_plug(file):
    async with machine() as qemu:
        assert (await cli("define", "d", "--qmp", qemu.qmp, "--xml", str(file))).code == 0
        with inside(qemu, f"qmpvcpu-test-{qemu.pid}", controllers=("cpuset", "cpu")) as made:
            for folder in made.values():
                for path in (folder, *folder.iterdir()):
                    os.chown(path, 65534, 65534)
            run = await without("setvcpu", "d", "1", "--enable")
            assert run.code == 3, run.stdout + run.stderr
            for words in ("<numatune>", "<period>, <quota> or <shares>"):
                assert (
                    f"needs a cgroup for {words}: the right to write to the cgroup"
                    in run.json["error"]["message"]
                )
            assert run.json["error"]["libvirt"] == "VIR_ERR_OPERATION_DENIED"
            run = await without("setvcpu", "d", "1", "--enable", "--dry-run")
            assert run.code == 3 and len(run.json["refusals"]) == 2
            assert (await cli("vcpucount", "d", "--live", "--active")).stdout.strip() == "1"
            # What needs no group is done all the same.
            file.write_text(xml(PIN))
            assert (await cli("define", "d", "--qmp", qemu.qmp, "--xml", str(file))).code == 0
            run = await without("setvcpu", "d", "1", "--enable")
            assert run.code == 0 and not list(made["cpuset"].glob("vcpu*"))


async def test_hierarchies_mounted_read_only_are_named(file):
    async with machine() as qemu:
        assert (await cli("define", "d", "--qmp", qemu.qmp, "--xml", str(file))).code == 0
        mounts = cgroups.mounts("cpuset", "cpu")
        remount = "".join(f"mount -o remount,bind,ro {mount} && " for mount in mounts)
        shell = ("unshare", "--mount", "sh", "-c", f'{remount}exec "$0" "$@"')
        run = await without("setvcpu", "d", "1", "--enable", command=shell)
        assert run.code == 3, run.stdout + run.stderr
        assert "is mounted read-only" in run.json["error"]["message"]
        async with qmpvcpu.connect(qmp=qemu.qmp) as domain:
            assert (await domain.state()).enabled_ids == (0,)


async def test_a_cpuset_without_the_cpu_is_refused(file):
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        with inside(qemu, f"qmpvcpu-test-{qemu.pid}", controllers=("cpuset",)) as made:
            (made["cpuset"] / "cpuset.cpus").write_text("0")
            with pytest.raises(
                qmpvcpu.VcpuRefused, match="vCPU 1 is pinned to host CPU 1: the cpuset of"
            ) as caught:
                await domain.enable([1, 2])
            assert "--no-place" in caught.value.hint and not list(made["cpuset"].glob("vcpu*"))
            file.write_text(xml(TUNE.replace("nodeset='0'", "nodeset='7'")))
            with pytest.raises(
                qmpvcpu.VcpuRefused, match="vCPU 2 is bound to host NUMA node 7: the cpuset of"
            ):
                await domain.enable(2)
            assert (await domain.state()).enabled_ids == (0,)


async def test_a_group_that_somebody_takes_away_meanwhile_is_made_again(file):
    """Another process may sweep what it takes for left over, between our making it and the thread's
    move.
    """
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:

        def sweep():
            for one in ours():
                if f"qemu-{qemu.pid}-" in one.name:
                    (one / "vcpu1").rmdir()

        with moments.before("QEMU plugs", sweep):
            outcome = await domain.enable([1, 2])
        assert outcome.outcome == "applied"
        for row in outcome.rows:
            assert of_thread(qemu, row.thread_id)["cpuset"].endswith(f"/vcpu{row.id}")
        qemu.kill()
    for one in ours():
        remove_when_empty([*one.glob("vcpu*/"), one])


async def test_what_the_kernel_declines_after_the_plug_is_partial_and_the_vcpu_stays(file):
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        with inside(qemu, f"qmpvcpu-test-{qemu.pid}", controllers=("cpuset", "cpu")) as made:

            def shrink():
                # Whoever owns the group takes its CPU away between our check and the move.
                (made["cpuset"] / "vcpu1" / "cpuset.cpus").write_text("0")
                (made["cpuset"] / "cpuset.cpus").write_text("0")

            with (
                moments.before("QEMU plugs", shrink),
                pytest.raises(
                    qmpvcpu.VcpuPartial, match="vCPU 1 could not be given CPU 1"
                ) as caught,
            ):
                await domain.enable([1, 2])
            assert (caught.value.remaining, caught.value.changed_ids) == ((1,), (1, 2))
            assert (await domain.state()).enabled_ids == (0, 1, 2)


async def test_one_thread_for_all_leaves_no_group(file):
    """With one vCPU nobody can tell yet that there is but one thread."""
    async with (
        paused(
            "x86_64", "10.0", "1,maxcpus=8", ["-m", "256", *NUMA], accel="tcg,thread=single"
        ) as qemu,
        qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain,
    ):
        for number in (1, 2):
            outcome = await domain.enable(number)
            assert any("nothing to place" in text for text in outcome.messages)
            assert not [one for one in ours() if f"qemu-{qemu.pid}-" in one.name]


async def test_killed_between_making_a_group_and_the_plug_leaves_nothing_that_stays(file):
    async with machine() as qemu:
        assert (await cli("define", "d", "--qmp", qemu.qmp, "--xml", str(file))).code == 0
        code = (
            "from tests.support import moments; from qmpvcpu.cli import main\n"
            "moments.die('there is room for the groups')\n"
            "main()"
        )
        assert in_child(code, "setvcpu", "d", "1", "--enable") == 9
        mine = [one for one in ours() if f"qemu-{qemu.pid}-" in one.name]
        assert mine and all((one / "vcpu1").is_dir() for one in mine)
        # The next change of this guest takes them for its own, or away.
        assert (await cli("setvcpu", "d", "2", "--enable")).code == 0
        assert (await cli("setvcpu", "d", "1", "--enable")).code == 0
        async with qmpvcpu.connect(qmp=qemu.qmp) as domain:
            state = await domain.state()
        assert of_thread(qemu, state.vcpus[1].thread_id)["cpuset"].endswith("/vcpu1")
        qemu.kill()
    for one in ours():
        remove_when_empty([*one.glob("vcpu*/"), one])


async def test_start_lays_a_guest_out_and_destroy_leaves_no_group(file):
    tune = TUNE.replace("<cputune>", "<cputune><emulatorpin cpuset='0'/>")
    file.write_text(xml(tune).replace("current='1'", "current='3'"))
    assert (await cli("define", str(file))).code == 0
    run = await cli("start", "d", "--json")
    assert run.code == 0, run.stdout
    pid = run.json["pid"]
    try:
        mine = [one for one in ours() if f"qemu-{pid}-" in one.name]
        assert len(mine) == 2
        for one in mine:
            assert {path.name for path in one.glob("*/")} == {"emulator", "vcpu0", "vcpu1", "vcpu2"}
            own = (one / "emulator" / "tasks").read_text().split()
            vcpus = [(one / f"vcpu{n}" / "tasks").read_text().split() for n in range(3)]
            assert str(pid) in own and all(len(tasks) == 1 for tasks in vcpus)
        assert os.sched_getaffinity(pid) == {0}
        run = await cli("setvcpu", "d", "4", "--enable", "--live")
        assert run.code == 0, run.stderr
        assert all(len((one / "vcpu4" / "tasks").read_text().split()) == 1 for one in mine)
    finally:
        assert (await cli("destroy", "d")).code == 0
    assert not [one for one in ours() if f"qemu-{pid}-" in one.name]


async def test_in_libvirts_layout_a_vcpu_that_was_never_laid_out_gets_its_group_when_it_is_pinned(
    file,
):
    file.write_text(xml(PIN))
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        with inside(qemu, f"qmpvcpu-test-{qemu.pid}", "emulator", controllers=("cpuset",)) as made:
            (made["cpuset"] / "cpuset.cpus").write_text("0")
            outcome = await domain.pin(0, [1], VcpuFlag.LIVE)
            assert outcome.vcpu.pin == "1"
            assert of_thread(qemu, outcome.vcpu.thread_id)["cpuset"].endswith("/vcpu0")
            assert (made["cpuset"].parent / "vcpu0" / "cpuset.cpus").read_text().strip() == "1"


async def test_a_start_that_cannot_be_placed_starts_nothing(file):
    tune = TUNE.replace("cpuset='1'", "cpuset='77'").replace(
        "<cputune>", "<cputune><emulatorpin cpuset='66'/>"
    )
    file.write_text(xml(tune))
    assert (await cli("define", str(file))).code == 0
    run = await cli("start", "d", "--json")
    assert run.code == 3 and "CPU 77" not in run.stdout and "66" in run.stdout
    file.write_text(xml(tune).replace("current='1'", "current='2'"))
    assert (await cli("define", str(file))).code == 0
    run = await cli("start", "d", "--json")
    assert (
        run.code == 3
        and "CPU 77" in run.stdout
        and "the emulator is pinned to host CPU 66" in run.stdout
    )
    assert not list((file.parent / "s").glob("log/*"))
    run = await cli("start", "d", "--no-place", "--json")
    assert run.code == 0 and (await cli("destroy", "d")).code == 0


async def test_the_groups_of_a_guest_that_crashed_go_with_destroy(file):
    file.write_text(xml(TUNE).replace("current='1'", "current='2'"))
    assert (await cli("define", str(file))).code == 0
    pid = (await cli("start", "d", "--json")).json["pid"]
    assert [one for one in ours() if f"qemu-{pid}-" in one.name]
    os.kill(pid, signal.SIGKILL)

    async def destroyed():
        run = await cli("destroy", "d")
        return run.code != 0 and not [one for one in ours() if f"qemu-{pid}-" in one.name]

    await until(destroyed, "its groups are gone")
