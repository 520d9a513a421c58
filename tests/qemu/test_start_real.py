"""boot-args and start on real QEMUs: the vCPUs are those of the XML, or there is no QEMU and a
reason.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import stat
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import qmpvcpu
from tests.support import machines
from tests.support import xml as domain_xml
from tests.support.commands import cli, start_cli
from tests.support.processes import send
from tests.support.qemus import VERSIONS, qemu_binary, running
from tests.support.started import folder_of, leave_pid, pid_of
from tests.support.waiting import until

pytestmark = pytest.mark.qemu

#: -smp's levels, vCPUs of one entity, bytes of one node (0: no NUMA), machine.
SHAPES = {
    "x86_64": ((2, 4, 1), 1, 16 << 20, "q35"),
    "ppc64": ((2, 2, 4), 4, 256 << 20, "pseries"),
    "s390x": ((1, 8, 1), 1, 0, "s390-ccw-virtio"),
    "loongarch64": ((2, 4, 1), 1, 512 << 20, "virt"),
}


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "s"))


def xml(arch, version, rows, name="d", more="", devices=""):
    """`rows`: by entity, None (disabled), or its order (0: it is there from the start)."""
    (sockets, cores, threads), size, memory, machine = SHAPES[arch]
    maximum = sockets * cores * threads
    vcpus = []
    for entity, order in enumerate(rows):
        for number in range(entity * size, entity * size + size):
            on = "no" if order is None else "yes"
            ranked = f" order='{order}'" if order else ""
            pluggable = "no" if order == 0 else "yes"
            vcpus.append(f"<vcpu id='{number}' enabled='{on}' hotpluggable='{pluggable}'{ranked}/>")
    half = maximum // 2
    numa = "".join(
        f"<cell id='{node}' cpus='{first}-{first + half - 1}' memory='{memory}' unit='b'/>"
        for node, first in (((0, 0), (1, half)) if memory else ())
    )
    count = sum(order is not None for order in rows) * size
    return (
        "<domain type='qemu'"
        f" xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>{name}</name>"
        f"<uuid>8c4a1f6e-0000-4000-8000-000000000001</uuid>"
        "<memory unit='MiB'>512</memory><vcpu"
        f" current='{count}'>{maximum}</vcpu><vcpus>{''.join(vcpus)}</vcpus>"
        f"<os><type arch='{arch}' machine='{machine}'>hvm</type></os>"
        f"<cpu><topology sockets='{sockets}' cores='{cores}' threads='{threads}'/>"
        + (f"<numa>{numa}</numa>" if numa else "")
        + f"</cpu><devices><emulator>{qemu_binary(version, arch)}</emulator>{devices}</devices>{more}</domain>"
    )


@st.composite
def enabled(draw, entities):
    run = draw(st.integers(1, 3))
    rows = [0] * run + [None] * (entities - run)
    behind = draw(st.lists(st.integers(run, entities - 1), unique=True, max_size=4))
    for rank, entity in enumerate(behind, draw(st.integers(run, 9))):
        rows[entity] = rank + 1
    return rows


CELLS = [(arch, version) for arch in SHAPES for version in VERSIONS]


@pytest.mark.parametrize(
    ("arch", "version"), [c for c in CELLS if c not in (("loongarch64", "7.2"), ("ppc64", "7.2"))]
)
def test_a_command_line_gives_what_the_xml_says(arch, version):
    size = SHAPES[arch][1]

    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        enabled(8 if size == 1 else 4),
        st.sampled_from(["device", "qmp"]),
        st.sampled_from([None, "defer"]),
    )
    def check(rows, style, incoming):
        asyncio.run(compare(xml(arch, version, rows), rows, style, incoming))

    async def compare(text, rows, style, incoming):
        probe, line = await machines.boot_with(text, style=style, incoming=incoming)
        # Without a kernel, s390x ends by itself.
        arguments = [
            *line.arguments,
            "-nodefaults",
            "-display",
            "none",
            *(() if incoming else ("-S",)),
        ]
        async with running(probe.emulator, arguments) as qemu:
            for step in line.commands:
                if step["execute"] != "cont":
                    await qemu.execute(step["execute"], step["arguments"])
            if incoming:
                assert (await qemu.execute("query-status"))["status"] == "inmigrate"
            async with qmpvcpu.connect(qmp=qemu.qmp) as domain:
                state = await domain.state()
        wanted = domain_xml.read(text.encode()).enabled_ids
        assert state.enabled_ids == wanted
        behind = sorted((order, entity * size) for entity, order in enumerate(rows) if order)
        ranks = sorted({(state.vcpus[n].order, state.vcpus[n].entity[0]) for n in wanted})
        assert [first for _, first in ranks][-len(behind) or len(ranks) :] == [
            first for _, first in behind
        ]
        assert [state.vcpus[n].node for n in wanted] == [probe.vcpus[n].node for n in wanted]
        assert [dict(state.vcpus[n].props) for n in wanted] == [
            dict(probe.vcpus[n].props) for n in wanted
        ]
        assert [state.vcpus[n].order for n in wanted] == [probe.vcpus[n].order for n in wanted]

    check()


async def test_the_text_is_for_a_shell_and_the_list_for_a_program(tmp_path):
    file = tmp_path / "d.xml"
    file.write_text(xml("x86_64", "10.0", [0, None, None, 1, None, None, None, None]))
    text = await cli("boot-args", str(file))
    found = (await cli("boot-args", str(file), "--json")).json
    assert shlex.split(text.stdout) == found and "-device" in found
    text = await cli("boot-args", str(file), "--style", "qmp", "--incoming")
    found = (await cli("boot-args", str(file), "--style", "qmp", "--incoming", "--json")).json
    first, *steps = text.stdout.splitlines()
    assert [*shlex.split(first), *map(json.loads, steps)] == found
    assert found[-1]["execute"] == "device_add" and found[-2] == "defer"
    run = await cli("boot-args", str(tmp_path / "none.xml"), "--json")
    assert run.code == 3 and "there is no file" in run.json["error"]["message"]
    run = await cli("boot-args", str(file), "--probe", "never", "--emulator", "/nope")
    assert run.code == 3 and "there is no QEMU program '/nope'" in run.stderr


async def define(tmp_path, text):
    file = tmp_path / "file.xml"
    file.write_text(text)
    run = await cli("define", str(file), "--json")
    assert run.code == 0, run.stdout


@pytest.fixture
def started():
    """Names whose QEMU ends with the test."""
    names = ["d"]
    yield names
    for name in names:
        pid = pid_of(name)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


SPARSE = [0, 0, None, 4, None, 3, None, None]


@pytest.mark.parametrize("version", VERSIONS)
async def test_start_and_destroy(version, tmp_path, started):
    await define(tmp_path, xml("x86_64", version, SPARSE))
    run = await cli("start", "d", "--json")
    assert run.code == 0, run.stdout
    assert run.json["vcpus"] == [0, 1, 3, 5]
    folder = Path(run.json["qmp"][0]).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.iterdir()} >= {"qmp", "qmp2", "agent", "pid"}
    # Both sockets, at once; the name stands for them, and for the agent.
    async with qmpvcpu.connect("d") as one, qmpvcpu.connect("d") as two:
        assert (await one.state()).enabled_ids == (await two.state()).enabled_ids == (0, 1, 3, 5)
        assert one.name == "d"
        outcome = await one.enable(6, live=True, config=True)
        assert outcome.live_changed_ids == outcome.config_changed_ids == (6,)
    listed = (await cli("list", "--json")).json["domains"][0]
    assert (listed["state"], listed["pid"], listed["qmp"]) == (
        "running",
        run.json["pid"],
        run.json["qmp"],
    )
    command = Path(f"/proc/{run.json['pid']}/cmdline").read_bytes().split(b"\0")
    assert (
        b"8c4a1f6e-0000-4000-8000-000000000001" in command
        and b"guest=d,debug-threads=on" in command
    )
    # It is nobody's child, and holds nothing of ours.
    assert os.path.realpath(f"/proc/{run.json['pid']}/fd/2") == run.json["log"]
    for word, text in (("start", "already running"), ("undefine", "destroy it first")):
        again = await cli(word, "d", "--json")
        assert again.code == 3 and text in again.stdout
    done = await cli("destroy", "d", "--json")
    assert done.code == 0 and done.json == {
        "outcome": "applied",
        "changed": True,
        "domain": "d",
        "pid": run.json["pid"],
        "killed": False,
    }
    assert not folder.exists()
    assert (await cli("list", "--json")).json["domains"][0]["state"] == "shut off"
    # What was enabled with --config is there the next time.
    assert (await cli("start", "d", "--json")).json["vcpus"] == [0, 1, 3, 5, 6]
    assert (await cli("destroy", "d")).code == 0
    again = await cli("destroy", "d", "--json")
    assert again.code == 3 and "is not running" in again.stdout
    log = Path(run.json["log"])
    assert "terminating on signal 15" in log.read_text()
    assert "terminating on signal 15" in log.with_name("d.log.1").read_text()


def with_wrapper(tmp_path, instead):
    """A domain whose QEMU does something else when it is to go into the background."""
    wrapper, real = tmp_path / "qemu", qemu_binary("10.0", "x86_64")
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *-daemonize*) {instead};; esac\nexec {real} "$@"\n'
    )
    wrapper.chmod(0o755)
    return xml("x86_64", "10.0", SPARSE).replace(real, str(wrapper))


async def test_a_qemu_that_exits_gives_its_words_and_its_code(tmp_path):
    arg = "<qemu:commandline><qemu:arg value='-nonsense'/></qemu:commandline>"
    await define(tmp_path, xml("x86_64", "10.0", SPARSE, more=arg))
    run = await cli("start", "d", "--json")
    assert run.code == 8 and run.json["error"]["exit_code"] == 1
    assert (
        "exited with code 1" in run.json["error"]["message"]
        and "-nonsense: invalid option" in run.stdout
    )
    await define(
        tmp_path, xml("x86_64", "10.0", SPARSE, devices="<disk><source file='/no/disk'/></disk>")
    )
    run = await cli("start", "d", "--json")
    assert run.code == 8 and "Could not open '/no/disk'" in run.stdout
    # A crash is told by its signal.
    wrapper = tmp_path / "qemu"
    wrapper.write_text(
        '#!/bin/sh\ncase "$*" in *-daemonize*) kill -SEGV $$;; esac\nexec'
        f' {qemu_binary("10.0", "x86_64")} "$@"\n'
    )
    wrapper.chmod(0o755)
    text = xml("x86_64", "10.0", SPARSE).replace(qemu_binary("10.0", "x86_64"), str(wrapper))
    await define(tmp_path, text)
    run = await cli("start", "d", "--json")
    assert run.code == 8 and run.json["error"]["exit_code"] == -11
    assert (await cli("list", "--json")).json["domains"][0]["state"] == "shut off"


async def test_what_cannot_be_started_is_refused_before_anything(tmp_path):
    run = await cli("start", "nobody", "--json")
    assert run.code == 3 and run.json["error"]["libvirt"] == "VIR_ERR_NO_DOMAIN"
    await define(
        tmp_path, xml("x86_64", "10.0", SPARSE, devices="<disk type='network'><source/></disk>")
    )
    run = await cli("start", "d", "--json")
    assert run.code == 3 and "line 1: a <disk> needs" in run.stdout
    await define(
        tmp_path, xml("x86_64", "10.0", SPARSE).replace(qemu_binary("10.0", "x86_64"), "/no/qemu")
    )
    run = await cli("start", "d", "--json")
    assert run.code == 3 and "'/no/qemu' is not on this host" in run.stdout
    aarch64 = xml("x86_64", "10.0", SPARSE).replace(
        "arch='x86_64' machine='q35'", "arch='aarch64' machine='virt'"
    )
    await define(tmp_path, aarch64.replace("qemu-system-x86_64", "qemu-system-aarch64"))
    run = await cli("start", "d", "--json")
    assert run.code == 3 and "has no CPU hotplug" in run.stdout
    assert not (tmp_path / "s" / "run" / "d").exists()


async def test_what_protects_the_guest_is_not_left_out(tmp_path):
    sev = "<launchSecurity type='sev'><policy>1</policy></launchSecurity>"
    await define(tmp_path, xml("x86_64", "10.0", SPARSE, more=sev))
    run = await cli("start", "d", "--json")
    assert (run.code, "launchSecurity" in run.json["error"]["message"]) == (3, True)


async def test_what_the_guest_would_notice_is_named(tmp_path):
    more = "<iothreads>2</iothreads><features><hyperv><relaxed state='on'/></hyperv></features>"
    text = xml("x86_64", "10.0", SPARSE, more=more).replace("<os>", "<os firmware='efi'>")
    await define(tmp_path, text.replace("<cpu>", "<cpu><maxphysaddr mode='emulate' bits='39'/>"))
    run = await cli("start", "d", "--json")
    await cli("destroy", "d")
    named = " ".join(run.json["messages"])
    assert run.code == 0
    assert [
        word
        for word in ("iothreads", "hyperv", "maxphysaddr", "firmware='efi'")
        if word not in named
    ] == []


async def test_somebody_elses_qemu_is_left_alone(tmp_path):
    async with running(
        qemu_binary("10.0", "x86_64"), ["-S", "-nodefaults", "-display", "none"]
    ) as qemu:
        file = tmp_path / "file.xml"
        file.write_text(xml("x86_64", "10.0", SPARSE))
        assert (await cli("define", "d", "--xml", str(file), "--qmp", qemu.qmp)).code == 0
        run = await cli("start", "d", "--json")
        assert run.code == 3 and "its QMP socket answers" in run.stdout
        run = await cli("destroy", "d", "--json")
        assert run.code == 3 and "qmpvcpu did not start it" in run.stdout
        assert not qemu.has_exited


async def test_a_pid_that_came_again_is_not_ours(tmp_path):
    leave_pid("d", os.getpid())
    assert pid_of("d") is None
    run = await cli("destroy", "d", "--json")
    assert run.code == 3 and "is not running" in run.stdout


async def test_a_name_with_everything_in_it(tmp_path, started):
    name = "a name, with 'ünïcode' & <signs>"
    started.append(name)
    text = xml("x86_64", "10.0", SPARSE, name="a name, with 'ünïcode' &amp; &lt;signs>")
    await define(tmp_path, text)
    run = await cli("start", name, "--json")
    assert run.code == 0, run.stdout
    assert Path(run.json["console"]).exists() and Path(run.json["log"]).exists()
    early = await cli("vcpuinfo", name, "--json")
    assert early.code == 0 and "nothing in the guest has opened its port" in early.stderr
    assert (await cli("destroy", name)).code == 0


async def test_one_of_many_at_once_starts_it(tmp_path, started):
    await define(tmp_path, xml("x86_64", "10.0", SPARSE))
    runs = await asyncio.gather(*(cli("start", "d", "--json") for _ in range(4)))
    assert sorted(run.code for run in runs) == [0, 3, 3, 3]
    runs = await asyncio.gather(*(cli("destroy", "d", "--json") for _ in range(4)))
    assert sorted(run.code for run in runs) == [0, 3, 3, 3]


async def test_a_qemu_that_will_not_end_is_killed(tmp_path, started):
    await define(tmp_path, xml("x86_64", "10.0", SPARSE))
    pid = (await cli("start", "d", "--json")).json["pid"]
    os.kill(pid, signal.SIGSTOP)
    done = await cli("destroy", "d", "--json")
    assert done.code == 0 and done.json["killed"] is True
    assert pid_of("d") is None


async def test_other_sockets_are_not_given_to_a_guest_that_was_started(tmp_path, started):
    await define(tmp_path, xml("x86_64", "10.0", SPARSE))
    assert (await cli("start", "d")).code == 0
    for words in (
        ("d",),
        (str(tmp_path / "file.xml"),),
        ("d", "--xml", str(tmp_path / "file.xml")),
    ):
        run = await cli("define", *words, "--qmp", str(tmp_path / "other"))
        assert (run.code, "that QEMU has other sockets" in run.stderr) == (3, True), run
    assert (await cli("destroy", "d")).code == 0


async def test_undefining_takes_away_what_a_killed_qemu_has_left_elsewhere(tmp_path, started):
    name = "n" * 150
    started.append(name)
    await define(tmp_path, xml("x86_64", "10.0", SPARSE, name=name))
    run = (await cli("start", name, "--json")).json
    folder = folder_of(name)
    assert stat.S_IMODE((folder / "command").stat().st_mode) == 0o600
    os.kill(run["pid"], signal.SIGKILL)
    await until(lambda: pid_of(name) is None, "QEMU has ended")
    assert folder.is_dir()
    assert (await cli("undefine", name)).code == 0
    assert not folder.exists()


async def test_the_log_of_a_qemu_that_dies_is_named_where_we_started_it(tmp_path, started):
    await define(tmp_path, xml("x86_64", "10.0", SPARSE))
    run = (await cli("start", "d", "--json")).json
    watching = await start_cli("watch", "d")
    await watching.stdout.readline()
    os.kill(run["pid"], signal.SIGABRT)
    _, stderr = await watching.communicate()
    assert (watching.returncode, f"look at {run['log']}" in stderr.decode()) == (7, True), stderr


async def test_a_machine_that_does_not_come_to_stand(tmp_path, started):
    wrapper = tmp_path / "qemu"
    wrapper.write_text(
        '#!/bin/sh\ncase "$*" in *-daemonize*) exec sleep infinity;; esac\n'
        f'exec {qemu_binary("10.0", "x86_64")} "$@"\n'
    )
    wrapper.chmod(0o755)
    await define(
        tmp_path, xml("x86_64", "10.0", SPARSE).replace(qemu_binary("10.0", "x86_64"), str(wrapper))
    )
    run = await cli("start", "d", "--json", "--timeout", "0.5")
    assert run.code == 7 and "did not set up its machine within 0.5 s" in run.stdout


async def test_a_long_path_is_no_hindrance(tmp_path, monkeypatch, started):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / ("long" * 20)))
    await define(tmp_path, xml("x86_64", "10.0", SPARSE))
    run = await cli("start", "d", "--json")
    assert run.code == 0, run.stdout
    folder = Path(run.json["qmp"][0]).parent
    assert len(str(folder)) < 90 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (await cli("vcpucount", "d", "--active", "--live")).stdout == "4\n"
    assert (await cli("destroy", "d")).code == 0
    assert not folder.exists()


async def test_what_a_qemu_that_was_killed_has_left_goes_with_the_next_start_or_end(
    tmp_path, started
):
    await define(tmp_path, xml("x86_64", "10.0", SPARSE))
    await define(tmp_path, xml("x86_64", "10.0", SPARSE).replace("<name>d<", "<name>other<"))
    started.append("other")
    for end in ("destroy", "start"):
        assert (await cli("start", "d")).code == 0
        folder = folder_of("d")
        os.kill(pid_of("d"), signal.SIGKILL)
        await until(lambda: pid_of("d") is None, "it has ended")
        assert folder.exists()
        # A guest that runs keeps its folder.
        run = await cli(end, {"destroy": "d", "start": "other"}[end])
        assert run.code == {"destroy": 3, "start": 0}[end], run
        assert not folder.exists()
    assert pid_of("other") is not None
    assert (await cli("vcpuinfo", "other")).code == 0
    assert (await cli("destroy", "d")).code == 3
    assert (await cli("destroy", "other")).code == 0


async def test_killed_or_interrupted_in_the_middle(tmp_path, started):
    """No QEMU that nobody knows: none, or one that `list` shows and `destroy` ends."""
    await define(tmp_path, xml("x86_64", "10.0", SPARSE))
    command = tmp_path / "s" / "run" / "d" / "command"
    kept = 0
    for attempt in range(12):
        interrupt = attempt % 3 == 2
        before = identity(command)
        process = await start_cli("start", "d")
        await until(
            lambda: process.returncode is not None or identity(command) not in (None, before),  # noqa: B023
            "QEMU is started",
            every=0.002,
        )
        await asyncio.sleep(0.01 * attempt)
        if process.returncode is None:
            send(process, signal.SIGINT if interrupt else signal.SIGKILL)
        await process.communicate()
        # A QEMU that was killed with us may need a moment; one that has begun stays.
        await until(
            lambda: len(mentioning(tmp_path / "s")) <= (pid_of("d") is not None),
            "it is known or gone",
        )
        pid = pid_of("d")
        state = (await cli("list", "--json")).json["domains"][0]
        if process.returncode == 130:
            assert pid is None
        if pid is not None:
            kept += 1
            assert state["pid"] == pid
            assert (await cli("destroy", "d")).code == 0
            assert pid_of("d") is None
    assert kept
    await until(lambda: not mentioning(tmp_path / "s"), "no QEMU is left")


def identity(path):
    try:
        return path.stat().st_ino, path.stat().st_mtime_ns
    except OSError:
        return None


def mentioning(word):
    """Processes with this in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if os.fsencode(word) in path.read_bytes():
                found.append(path.parent.name)
    return found


async def test_started_from_python_too(tmp_path, started):
    await define(tmp_path, xml("loongarch64", "10.0", [0, None, None, 1, None, None, None, None]))
    done = await qmpvcpu.start("d")
    assert done.state.enabled_ids == (0, 3) and done.state.arch == "loongarch64"
    task = asyncio.create_task(qmpvcpu.destroy("d"))
    assert (await task).pid == done.pid


def has_pending(pid, number):
    """Whether a process was sent that signal, and has not taken it yet."""
    rows = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return bool(int(rows["ShdPnd"], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("cancels", [1, 2, 10])
async def test_cancelled_again_while_its_qemu_ends_it_leaves_neither_qemu_nor_folder(
    cancels, tmp_path, started
):
    await define(tmp_path, xml("x86_64", "10.0", SPARSE))
    task = asyncio.create_task(qmpvcpu.start("d"))
    async with asyncio.timeout(60):
        while (pid := pid_of("d")) is None:
            await asyncio.sleep(0)
        os.kill(pid, signal.SIGSTOP)
        task.cancel()
        while not has_pending(pid, signal.SIGTERM):
            await asyncio.sleep(0)
        for _ in range(cancels):
            task.cancel()
            # In so many turns what does not wait for its QEMU has ended.
            for _ in range(10):
                await asyncio.sleep(0)
        is_waited_for = not task.done()
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(asyncio.CancelledError):
            await task
    assert is_waited_for
    assert pid_of("d") is None
    assert not folder_of("d").exists()
    # And nobody holds the lock.
    assert (await cli("start", "d")).code == 0
    assert (await cli("destroy", "d")).code == 0


@pytest.mark.parametrize("name", ["100%", "x%dy"])
async def test_a_percent_sign_in_a_name_is_not_qemus(name, tmp_path, started):
    started.append(name)
    await define(tmp_path, xml("x86_64", "10.0", SPARSE, name=name))
    run = await cli("start", "--json", name)
    assert run.code == 0, run.stderr
    await cli("destroy", name)
    assert "terminating on signal 15" in Path(run.json["log"]).read_text()
