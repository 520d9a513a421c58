"""Threads of real vCPUs where the XML says: pinned, scheduled, verified, and no other process's
ever.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from tests.qemu.test_cgroup_real import inside
from tests.support import hosts, moments
from tests.support.commands import Run, cli
from tests.support.hosts import why_no_kvm
from tests.support.qemus import qemu_binary, running

pytestmark = pytest.mark.qemu

ACCELS = ["tcg,thread=multi", *(["kvm"] if why_no_kvm() is None else [])]
#: Without CAP_SYS_NICE, and else as we are.
PLAIN = ("setpriv", "--bounding-set", "-sys_nice", "--")
LAST = max(hosts.host_cpus())
EVERY = hosts.cpu_list(hosts.host_cpus())


def xml(cputune="", vcpu="<vcpu current='1'>8</vcpu>"):
    os_type = "<os><type arch='x86_64' machine='q35'>hvm</type></os>"
    return f"<domain type='qemu'><name>d</name>{vcpu}<cputune>{cputune}</cputune>{os_type}</domain>"


TUNE = (
    f"<vcpupin vcpu='1' cpuset='{LAST}'/><vcpupin vcpu='2' cpuset='0-{LAST},^0'/>"
    "<vcpusched vcpus='2' scheduler='fifo' priority='10'/><vcpusched vcpus='3' scheduler='batch'/>"
    "<vcpusched vcpus='4' scheduler='idle'/><vcpusched vcpus='5' scheduler='rr' priority='1'/>"
)


@asynccontextmanager
async def machine(accel="tcg,thread=multi", prefix=(), binary=None):
    """A paused QEMU; `prefix` is a command that starts it."""
    arguments = ["-S", "-nodefaults", "-display", "none", "-machine", "q35", "-cpu", "qemu64"]
    arguments += ["-accel", accel, "-smp", "1,maxcpus=8", "-m", "64"]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "qemu"
        binary = binary or qemu_binary("10.0", "x86_64")
        script.write_text(f'#!/bin/sh\nexec {" ".join(prefix)} {binary} "$@"\n')
        script.chmod(0o755)
        Path(folder).chmod(0o755)
        async with running(str(script), arguments) as qemu:
            yield qemu


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "s"))
    path = tmp_path / "d.xml"
    path.write_text(xml(TUNE))
    return path


def status(thread_id):
    """What the kernel itself says of a thread."""
    lines = Path(f"/proc/{thread_id}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)["Cpus_allowed_list"]


@pytest.mark.parametrize("accel", ACCELS)
async def test_enabled_is_where_the_xml_says(accel, file):
    async with machine(accel) as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        outcome = await domain.enable([1, 2, 3, 4, 5, 6])
        rows = {row.id: row for row in outcome.rows}
        threads = {number: row.thread_id for number, row in rows.items()}
        assert status(threads[1]) == str(LAST)
        assert os.sched_getscheduler(threads[2]) == os.SCHED_FIFO
        assert os.sched_getparam(threads[2]).sched_priority == 10
        assert os.sched_getaffinity(threads[2]) == set(range(1, LAST + 1))
        assert [os.sched_getscheduler(threads[n]) for n in (3, 4, 5, 6)] == [
            os.SCHED_BATCH,
            os.SCHED_IDLE,
            os.SCHED_RR,
            os.SCHED_OTHER,
        ]
        assert os.sched_getaffinity(threads[6]) == os.sched_getaffinity(qemu.pid)
        assert (rows[1].pin, rows[2].scheduler, rows[5].scheduler) == (str(LAST), "fifo:10", "rr:1")
        # The state, too, tells what is, not what was wanted.
        os.sched_setaffinity(threads[1], {0})
        state = await domain.state()
        assert (state.vcpus[1].pin, state.vcpus[2].scheduler, state.vcpus[0].scheduler) == (
            "0",
            "fifo:10",
            "other",
        )
        assert state.vcpus[1].cpu in hosts.host_cpus() and state.vcpus[7].pin is None
        dumped = await domain.dump_xml(dialect="rfc")
        assert b"<vcpu id='1' state='enabled' pin='0' scheduler='other'/>" in dumped
        assert b"scheduler='fifo:10'/>" in dumped


async def test_cpuset_is_for_those_without_a_pin(file):
    file.write_text(
        xml(f"<vcpupin vcpu='1' cpuset='{LAST}'/>", "<vcpu current='1' cpuset='0'>8</vcpu>")
    )
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        outcome = await domain.set_vcpus(3)
        assert {row.id: row.pin for row in outcome.rows if row.id} == {1: str(LAST), 2: "0"}


async def test_no_place_and_the_plan(file):
    async with machine() as qemu:
        assert (await cli("define", "d", "--qmp", qemu.qmp, "--xml", str(file))).code == 0
        run = await cli("setvcpu", "d", "1", "--enable", "--no-place")
        assert run.code == 0
        run = await cli("vcpuinfo", "d", "--json")
        pins = {row["id"]: (row["pin"], row["scheduler"], row["cpu"]) for row in run.json["vcpus"]}
        everywhere = hosts.cpu_list(os.sched_getaffinity(0))
        assert (
            pins[1][:2] == (everywhere, "other")
            and pins[1][2] in hosts.host_cpus()
            and pins[5] == (None, None, None)
        )


def without_rights(*arguments) -> Run:
    """The command line without CAP_SYS_NICE."""
    run = subprocess.run(
        [*PLAIN, sys.executable, "-m", "qmpvcpu", *arguments], capture_output=True, text=True
    )
    return Run(run.returncode, run.stdout, run.stderr)


async def enabled(qmp):
    async with qmpvcpu.connect(qmp=qmp) as domain:
        return (await domain.state()).enabled_ids


async def test_without_rights_pinning_works_and_fifo_is_refused(file):
    async with machine(prefix=PLAIN) as qemu:
        assert (await cli("define", "d", "--qmp", qemu.qmp, "--xml", str(file))).code == 0
        run = await asyncio.to_thread(without_rights, "setvcpu", "d", "1-2", "--enable", "--json")
        assert run.code == 3, run.stdout
        assert "vCPU 2 cannot be fifo:10: CAP_SYS_NICE is missing" in run.json["error"]["message"]
        assert "RLIMIT_RTPRIO (it is 0)" in run.json["error"]["hint"]
        assert await enabled(qemu.qmp) == (0,)
        run = await asyncio.to_thread(
            without_rights, "setvcpu", "d", "1-2", "--enable", "--dry-run", "--json"
        )
        assert run.code == 3 and "CAP_SYS_NICE" in run.json["refusals"][0]
        run = await asyncio.to_thread(without_rights, "setvcpu", "d", "1,3,4", "--enable", "--json")
        assert run.code == 0, run.stdout
        async with qmpvcpu.connect(qmp=qemu.qmp) as domain:
            vcpus = (await domain.state()).vcpus
        assert (vcpus[1].pin, vcpus[3].scheduler, vcpus[4].scheduler) == (
            str(LAST),
            "batch",
            "idle",
        )


async def test_another_users_qemu_is_not_touched_without_the_right(file, tmp_path):
    prefix = ("setpriv", "--reuid", "65534", "--clear-groups", "--")
    async with machine(prefix=prefix, binary="/usr/bin/qemu-system-x86_64") as qemu:
        assert (await cli("define", "d", "--qmp", qemu.qmp, "--xml", str(file))).code == 0
        run = await asyncio.to_thread(without_rights, "setvcpu", "d", "1", "--enable", "--json")
        assert run.code == 3 and "QEMU belongs to another user" in run.stdout
        assert await enabled(qemu.qmp) == (0,)


async def test_what_this_host_does_not_have_is_refused(file):
    file.write_text(xml("<vcpupin vcpu='1' cpuset='4090'/>"))
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match="pinned to host CPU 4090") as caught:
            await domain.enable(1)
        assert "--no-place" in caught.value.hint
        assert (await domain.enable(2)).changed and (await domain.enable(1, place=False)).changed
        file.write_text("<domain>")
        with pytest.raises(qmpvcpu.VcpuRefused) as caught:
            await domain.enable(3)
        assert "--no-place" in caught.value.hint
        assert (await domain.enable(3, place=False)).changed


async def test_one_thread_for_all_has_no_place(file):
    async with (
        machine("tcg,thread=single") as qemu,
        qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain,
    ):
        outcome = await domain.enable([1, 2])
        assert any("nothing to place" in text for text in outcome.messages)
        assert (await domain.state()).threads_shared
        with pytest.raises(qmpvcpu.VcpuRefused, match="no thread of its own"):
            await domain.pin(1, [0], VcpuFlag.LIVE)


@pytest.fixture
def other():
    """A process that is not QEMU; its pid."""
    process = subprocess.Popen(["sleep", "infinity"])
    yield process.pid
    process.kill()
    process.wait()


def placed(pid):
    return os.sched_getaffinity(pid), os.sched_getscheduler(pid)


async def test_a_thread_id_of_another_process_is_never_touched(other):
    """The kernel hands thread ids out again: a real process has what was a vCPU's."""
    async with machine() as qemu:
        before = placed(other)
        with pytest.raises(OSError, match="is not QEMU's"):
            hosts.place(qemu.pid, other, (0,), "batch", since=hosts.start_of(qemu.pid))
        assert placed(other) == before


async def test_a_thread_id_of_another_process_is_not_seen(other):
    async with machine() as qemu:
        assert not hosts.is_seen(qemu.pid, other)


async def test_a_pid_that_is_a_qemus_again_is_never_touched():
    async with machine() as first, machine() as second:
        before = placed(second.pid)
        with pytest.raises(OSError, match="has ended"):
            hosts.place(second.pid, second.pid, (0,), since=hosts.start_of(first.pid) - 1)
        assert placed(second.pid) == before


async def test_vcpupin(file):
    async with machine() as qemu:
        assert (await cli("define", "d", "--qmp", qemu.qmp, "--xml", str(file))).code == 0
        everywhere = hosts.cpu_list(os.sched_getaffinity(0))
        run = await cli("vcpupin", "d", "--json")
        assert run.json["pins"][0]["cpus"] == everywhere and run.json["pins"][1]["cpus"] is None
        assert (await cli("vcpupin", "d", "--config", "--vcpu", "1")).stdout.split()[-1] == str(
            LAST
        )
        run = await cli(
            "vcpupin", "d", "--vcpu", "0", "--cpulist", str(LAST), "--live", "--config", "--json"
        )
        assert run.code == 0 and run.json["live_changed_ids"] == run.json["config_changed_ids"] == [
            0
        ]
        assert (await cli("vcpupin", "d", "0")).stdout.split()[-1] == str(LAST)
        assert (
            f"<vcpupin vcpu='0' cpuset='{LAST}'/>"
            in (await cli("dumpxml", "d", "--inactive")).stdout
        )
        again = await cli("vcpupin", "d", "0", str(LAST), "--live", "--config", "--json")
        assert again.code == 0 and again.json["changed"] is False
        run = await cli("vcpupin", "d", "0", "r", "--live", "--config", "--json")
        assert run.code == 0 and run.json["changed_ids"] == [0]
        assert "vcpupin vcpu='0'" not in (await cli("dumpxml", "d", "--inactive")).stdout
        assert (await cli("vcpupin", "d", "0")).stdout.split()[-1] == hosts.cpu_list(
            hosts.host_cpus()
        )
        for words, code, text in (
            (("0", "4090"), 3, "host CPU 4090"),
            (("5", "0"), 3, "is not enabled"),
            (("99", "0"), 3, "99"),
            (("99",), 3, "ids are 0 to 7"),
            (("0", "x"), 2, "is no"),
            (("--cpulist", "0"), 2, "no vCPU is given"),
            (("0", "0", "--vcpu", "1"), 2, "unrecognized"),
            (("0", "x"), 2, "'x' is not a host CPU"),
            (("x", "0"), 2, "'x' is not a number"),
            (("0", "0", "--live", "--current"), 2, "exclude each other"),
            (("--live", "--config"), 3, "exclude each other"),
        ):
            run = await cli("vcpupin", "d", *words, "--json")
            assert run.code == code and text in run.stdout, (words, run.stdout)
        # In whatever order.
        for words in (
            ("--live", "0", "0"),
            ("0", "--live", "0"),
            ("--vcpu", "0", "0"),
            ("--json", "0", "0"),
        ):
            assert (await cli("vcpupin", "d", *words)).code == 0, words
        # For when it is plugged.
        assert (await cli("vcpupin", "d", "6", "0", "--config")).code == 0
        assert (await cli("setvcpu", "d", "6", "--enable")).code == 0
        assert (await cli("vcpupin", "d", "6")).stdout.split()[-1] == "0"


async def test_what_was_never_placed_is_placed_when_asked_again(file):
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        assert (await domain.enable([1, 2], place=False)).changed
        outcome = await domain.enable([1, 2])
        assert outcome.changed_ids == (1, 2) and "placed now" in outcome.messages[0]
        assert [(row.pin, row.scheduler) for row in outcome.rows] == [
            (str(LAST), "other"),
            (hosts.cpu_list(range(1, LAST + 1)), "fifo:10"),
        ]
        assert not (await domain.enable([1, 2])).changed
        # What somebody has done since is his.
        await domain.pin(1, [0], VcpuFlag.LIVE)
        assert not (await domain.enable(1)).changed
        assert (await domain.state()).vcpus[1].pin == "0"


async def test_a_qemu_that_dies_before_its_thread_is_placed_is_gone(file):
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:

        def kill():
            qemu.kill()
            os.waitid(os.P_PID, qemu.pid, os.WEXITED | os.WNOWAIT)

        with moments.before("a thread is placed", kill):
            with pytest.raises(
                qmpvcpu.VcpuConnectionError, match="QEMU has ended after vCPU 1-2 was plugged"
            ):
                await domain.enable([1, 2])


async def test_threads_of_another_qemu_are_not_taken_for_its_own():
    """A QEMU that a guest has taken over may name the threads of its neighbour."""
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp) as domain, machine() as other:
        mine = [vcpu.thread_id for vcpu in (await domain.enable([1, 2])).rows]
        found = [
            hosts.qemu_of(mine, qemu.qmp),
            hosts.qemu_of(mine, other.qmp),
            hosts.qemu_of([qemu.pid, *mine]),
        ]
    assert found == [qemu.pid, None, None]


@pytest.mark.parametrize("cores", [(1,), (0, 1)])
async def test_unpinned_is_what_its_cpuset_lets_it_have(file, cores):
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        await domain.enable([1])
        with inside(qemu, f"qmpvcpu-test-{qemu.pid}", controllers=("cpuset",)) as made:
            (made["cpuset"] / "cpuset.cpus").write_text(",".join(map(str, cores)))
            assert (await domain.pin(1, None, VcpuFlag.LIVE)).outcome == "applied"
            assert (await domain.state()).vcpus[1].pin == hosts.cpu_list(cores)


async def test_pin_refuses_what_makes_no_sense(file):
    async with machine() as qemu, qmpvcpu.connect(qmp=qemu.qmp, xml=str(file)) as domain:
        for vcpu, cpus, flags in (
            (0, [0], VcpuFlag.GUEST),
            ([0, 1], [0], 0),
            (0, [], 0),
            (0, [-1], 0),
            (True, [0], 0),
        ):
            with pytest.raises(qmpvcpu.VcpuUsageError):
                await domain.pin(vcpu, cpus, VcpuFlag(flags))
