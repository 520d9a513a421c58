"""The throwaway QEMU, and everything that spares it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from qmpvcpu import (
    MachineSpec,
    ProbeMode,
    VcpuConnectionError,
    VcpuFailed,
    VcpuRefused,
    connect,
    find_layout,
    parse_numa,
    parse_smp,
)
from tests.support import machines, probes, qemus
from tests.support.commands import cli, start_cli
from tests.support.processes import send
from tests.support.qemus import VERSIONS, matrix, qemu_binary
from tests.support.waiting import until, within

pytestmark = pytest.mark.qemu

ALWAYS, AUTO, NEVER = ProbeMode.ALWAYS, ProbeMode.AUTO, ProbeMode.NEVER


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "probes"


def counting(tmp_path, binary, name="counted", more=""):
    """The same QEMU, and how often it was started."""
    path, log = tmp_path / name, tmp_path / f"{name}.log"
    path.write_text(f'#!/bin/sh\necho $$ >> {log}\n{more}\nexec {binary} "$@"\n')
    path.chmod(0o755)
    return str(path), lambda: len(log.read_text().splitlines()) if log.exists() else 0


def spec(machine="q35", smp="2,maxcpus=4", numa=(), **more):
    return MachineSpec(machine, parse_smp(smp), numa=parse_numa(numa), **more)


MACHINES = {
    "x86_64": [("q35", None), ("pc", None), ("q35", "max"), ("pc-q35-6.1", "EPYC")],
    "ppc64": [("pseries", None), ("pseries", "POWER9"), ("pseries-6.2", None)],
    "s390x": [("s390-ccw-virtio", None), ("s390-ccw-virtio", "max")],
    "loongarch64": [("virt", None)],
    "aarch64": [("virt", None)],
    "riscv64": [("virt", None)],
}


@matrix(*((arch, version) for arch in MACHINES for version in VERSIONS))
async def test_names_and_drivers_are_predicted_too(arch, version):
    """Slots are test_smp_real's; here what only the program tells."""
    for machine, cpu in MACHINES[arch]:
        asked = spec(machine, "2,sockets=2,maxcpus=4", cpu=cpu)
        found = machines.answered(await probes.ask(qemu_binary(version, arch), asked))
        assert f"{found.version.major}.{found.version.minor}" == version
        assert found.can_plug is (
            arch in ("x86_64", "ppc64", "s390x") or (arch, version > "7") == ("loongarch64", False)
        )
        assert found.can_unplug is (found.can_plug and arch != "s390x")
        predicted = machines.predicted(asked, arch, machines.learned(asked, found))
        if found.can_plug:
            assert predicted.to_json() == found.to_json() | {"source": "predicted"}
        else:
            assert predicted is None


@pytest.mark.parametrize("version", VERSIONS)
async def test_it_runs_in_a_sandbox_with_nothing_to_touch(version):
    with probes.watched() as watched:
        await probes.ask(qemu_binary(version, "x86_64"), spec())
    (seen,) = watched
    assert (seen["Seccomp"], stat.S_IMODE(seen["mode"])) == ("2", 0o700)
    assert (seen["folder"].exists(), Path(f"/proc/{seen['pid']}").exists()) == (False, False)


async def test_without_seccomp_it_is_asked_all_the_same(tmp_path):
    error = "qemu: -sandbox support is not enabled in this QEMU"
    more = f'case " $* " in *" -sandbox "*) echo "{error}" >&2; exit 1;; esac'
    binary, starts = counting(tmp_path, qemu_binary("10.0", "x86_64"), more=more)
    assert machines.answered(await probes.ask(binary, spec())).maxcpus == 4
    assert starts() == 2


async def test_auto_predicts_then_remembers_then_asks(tmp_path):
    binary, starts = counting(tmp_path, qemu_binary("10.0", "x86_64"))
    found = await find_layout(spec(), emulator=binary)
    assert found.layout.source == "predicted" and found.layout.version is None and starts() == 0
    # What arithmetic leaves open.
    odd = spec("q35", "2,maxcpus=288")
    for source in ("probed", "cached", "cached"):
        found = await find_layout(odd, emulator=binary)
        assert found.layout.source == source and found.layout.maxcpus == 288 and starts() == 1
    # By now the program is known.
    found = await find_layout(spec(), emulator=binary)
    assert (found.layout.source, found.layout.machine, str(found.layout.version)[:4]) == (
        "predicted",
        "pc-q35-10.0",
        "10.0",
    )
    first = await find_layout(spec(), emulator=binary, mode=ALWAYS)
    again = await find_layout(spec(), emulator=binary, mode=ALWAYS)
    assert (first.layout.source, again.layout.source, starts()) == ("probed", "cached", 2)
    assert first.layout.slots == again.layout.slots == found.layout.slots
    await find_layout(spec(), emulator=binary, refresh=True)
    assert starts() == 3
    # A model is known once it was seen.
    for source in ("probed", "predicted"):
        found = await find_layout(
            spec(smp="1,maxcpus=2" if source == "probed" else "2", cpu="EPYC"), emulator=binary
        )
        assert (found.layout.source, found.layout.cpu_type) == (source, "EPYC-x86_64-cpu")


async def test_never_starts_none(tmp_path):
    binary, starts = counting(tmp_path, qemu_binary("10.0", "x86_64"))
    assert (await find_layout(spec(), emulator=binary, mode=NEVER)).layout.source == "predicted"
    with pytest.raises(VcpuRefused, match="cannot be known without starting") as caught:
        await find_layout(spec("microvm"), emulator=binary, mode=NEVER)
    assert "--probe auto" in caught.value.hint and starts() == 0
    await find_layout(spec("microvm"), emulator=binary)
    assert (
        await find_layout(spec("microvm"), emulator=binary, mode=NEVER)
    ).layout.source == "cached"


async def test_another_program_is_asked_anew(tmp_path, own_cache):
    binary, starts = counting(tmp_path, qemu_binary("10.0", "s390x"))
    asked = spec("s390-ccw-virtio")
    assert (await find_layout(asked, emulator=binary)).layout.source == "probed"
    assert (await find_layout(asked, emulator=binary)).layout.source == "predicted"
    os.utime(binary, (1, 1))
    assert (await find_layout(asked, emulator=binary)).layout.source == "probed"
    assert starts() == 2
    assert probes.forget() == 4 and not [path for path in own_cache.iterdir() if path.is_file()]


async def test_a_script_that_starts_another_one(tmp_path):
    """The file is the same, the program is not."""
    real = tmp_path / "real"
    real.write_text(qemu_binary("10.0", "x86_64"))
    binary, starts = counting(tmp_path, f"$(cat {real})")
    assert str((await find_layout(spec(), emulator=binary, mode=ALWAYS)).layout.version).startswith(
        "10.0"
    )
    real.write_text(qemu_binary("7.2", "x86_64"))
    found = await find_layout(spec(), emulator=binary, refresh=True)
    assert str(found.layout.version).startswith("7.2") and starts() == 2
    found = await find_layout(spec(), emulator=binary)
    assert found.layout.source == "predicted" and str(found.layout.version).startswith("7.2")


async def test_a_torn_entry_is_asked_anew(tmp_path, own_cache):
    binary, starts = counting(tmp_path, qemu_binary("10.0", "x86_64"))
    await find_layout(spec(), emulator=binary, mode=ALWAYS)
    entries = [path for path in own_cache.iterdir() if path.is_file()]
    assert len(entries) == 2
    for path in entries:
        whole = path.read_bytes()
        for torn in (b"", whole[: len(whole) // 2], b"\0" * len(whole), whole.replace(b"1", b"2")):
            assert torn != whole
            path.write_bytes(torn)
            before = starts()
            assert (
                await find_layout(spec(), emulator=binary, mode=ALWAYS)
            ).layout.source == "probed"
            assert starts() == before + 1


async def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QMPVCPU_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        found = await find_layout(spec(), emulator=qemu_binary("10.0", "x86_64"), mode=ALWAYS)
        assert found.layout.source == "probed"


ASK = """
import asyncio, sys
from qmpvcpu import MachineSpec, ProbeMode, find_layout, parse_smp
async def main():
    asked = [MachineSpec("q35", parse_smp(f"1,maxcpus={n % 5 + 2}")) for n in range(10)]
    found = await asyncio.gather(*(find_layout(s, emulator=sys.argv[1], mode=ProbeMode.ALWAYS) for s in asked))
    assert [f.layout.maxcpus for f in found] == [n % 5 + 2 for n in range(10)]
    print(*(f.layout.source for f in found))
asyncio.run(main())
"""


async def test_fifty_at_once_start_five(tmp_path):
    binary, starts = counting(tmp_path, qemu_binary("10.0", "x86_64"))

    async def one():
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            ASK,
            binary,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        stdout, stderr = await process.communicate()
        assert process.returncode == 0, stderr.decode()
        return stdout.decode().split()

    sources = [word for words in await asyncio.gather(*(one() for _ in range(5))) for word in words]
    assert starts() == 5
    assert sources.count("probed") == 5 and sources.count("cached") == 45


async def test_killed_in_the_middle(tmp_path, own_cache):
    """At many moments of a probe: no QEMU stays, no lock stays, no entry is broken."""
    binary, starts = counting(tmp_path, qemu_binary("10.0", "x86_64"))
    pids = tmp_path / "counted.log"
    arguments = (
        "--json",
        "probe",
        "--machine",
        "q35",
        "--smp",
        "2",
        "--probe",
        "always",
        "--emulator",
        binary,
    )
    for attempt in range(16):
        process = await start_cli(*arguments, "--refresh")
        seen = starts()
        # From the moment QEMU is started on, a little later each time.
        await until(
            lambda: process.returncode is not None or starts() != seen,  # noqa: B023
            "QEMU is started",
            every=0.002,
        )
        await asyncio.sleep(0.008 * attempt)
        if process.returncode is None:
            send(process, signal.SIGKILL)
        await process.communicate()
        await until(
            lambda: not [pid for pid in pids.read_text().split() if is_running(pid, binary)],
            "no QEMU is left",
        )
    found = await within(cli(*arguments), "nothing holds the lock")
    assert found.code == 0 and found.json["maxcpus"] == 2
    assert not [path.name for path in own_cache.iterdir() if path.name.startswith(".")]


def is_running(pid, binary):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (spec("q35", "3,cores=2"), "hierarchy must match maxcpus"),
        (spec("nope"), "unsupported machine type"),
        (spec(cpu="nope"), "unable to find CPU model 'nope'"),
        (spec(numa=["node", "cpu,node-id=0,socket-id=9"]), "no match found"),
        (spec("microvm", "2,maxcpus=1"), "maxcpus"),
    ],
)
async def test_what_qemu_refuses_is_refused_in_its_words(asked, words):
    with pytest.raises(VcpuRefused, match=words) as caught:
        await find_layout(asked, emulator=qemu_binary("10.0", "x86_64"), mode=ALWAYS)
    assert "qemu-system-x86_64" in caught.value.hint


async def test_programs_that_are_no_qemu(tmp_path):
    def program(name, text):
        path = tmp_path / name
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(0o755)
        return str(path)

    with pytest.raises(VcpuConnectionError, match=r"did not answer within 0\.5 s"):
        await find_layout(
            spec(), emulator=program("sleeper", "exec sleep infinity"), mode=ALWAYS, timeout=0.5
        )
    with pytest.raises(VcpuFailed, match="exited with code 7: ouch") as caught:
        await find_layout(spec(), emulator=program("dies", "echo ouch >&2; exit 7"), mode=ALWAYS)
    assert caught.value.exit_code == 7
    with pytest.raises(VcpuFailed, match="code -11") as caught:
        await find_layout(spec(), emulator=program("crashes", "kill -SEGV $$"), mode=ALWAYS)
    with pytest.raises(VcpuRefused, match="there is no QEMU program '/nope/qemu-system-x86_64'"):
        await find_layout(spec(), emulator="/nope/qemu-system-x86_64", mode="never")
    with pytest.raises(VcpuRefused, match="is a QEMU for s390x"):
        await find_layout(
            spec("none", "1"), arch="x86_64", emulator=qemu_binary("7.2", "s390x"), mode=ALWAYS
        )


BOTH = ("--machine", "q35")
CELL = ("--numa", "node,memdev=m0")


@pytest.mark.parametrize(
    ("words", "counts"),
    [
        (BOTH, (1, 1)),
        ((*BOTH, "--smp", "010,maxcpus=020"), (8, 16)),
        ((*BOTH, "--smp", "0x8"), (8, 8)),
        ((*BOTH, "--smp", "2", "--smp", "maxcpus=4"), (2, 4)),
        (("--smp", "2", "--machine", "pc", *BOTH, "--machine", "smp.maxcpus=4,smm=off"), (2, 4)),
        (("--machine", "smm=off", "--arch", "x86_64", "--smp", "2"), (2, 2)),
        (("--machine", "q35,accel=tcg,usb=off", "--smp", "2"), (2, 2)),
        ((*BOTH, "--smp", "4", *CELL, "--numa", "node,cpus=2-03"), (4, 4)),
    ],
)
async def test_words_mean_what_they_mean_to_qemu(words, counts):
    """In each mode, and of each QEMU: test_smp_real's."""
    run = await cli("probe", *words, "--emulator", qemu_binary("10.0", "x86_64"), "--json")
    assert (run.json["cpus"], run.json["maxcpus"]) == counts


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((*BOTH, "--smp", "08"), 2),
        ((*BOTH, "--numa", "cpu,node-id=0,core-id=0", *CELL), 3),
        ((*BOTH, "--numa", "node,cpus=0-"), 2),
        ((*BOTH, *CELL, "--numa", "node,nodeid=0"), 3),
        (("--machine", "pc-q35-9.9"), 3),
        (("--machine", "pc-q35-10.1"), 3),
        (("--machine", "q35,accel=tcg", "--accel", "tcg"), 2),
        (("--machine", "pseries"), 3),
    ],
)
async def test_words_that_qemu_refuses_are_refused(words, code):
    run = await cli("probe", *words, "--emulator", qemu_binary("10.0", "x86_64"), "--json")
    assert (run.code, bool(run.json["error"]["hint"])) == (code, True)


async def test_a_machine_type_that_the_qemu_has_not_is_refused_without_a_start_once_it_is_known(
    tmp_path,
):
    binary, starts = counting(tmp_path, qemu_binary("7.2", "x86_64"))
    with pytest.raises(
        VcpuRefused, match=r"QEMU 7\.2\..*no machine type 'pc-q35-8\.0' \(unsupported"
    ) as caught:
        await find_layout(spec("pc-q35-8.0"), emulator=binary)
    assert "pc-q35-7.2" in caught.value.hint
    await find_layout(spec(), emulator=binary, mode=ALWAYS)
    known = starts()
    with pytest.raises(
        VcpuRefused, match=r"QEMU 7\.2\.\d+ for x86_64 has no machine type 'pc-q35-8\.0'"
    ) as caught:
        await find_layout(spec("pc-q35-8.0"), emulator=binary)
    assert ("pc-q35-7.2" in caught.value.hint, starts()) == (True, known)


async def test_the_command_line(tmp_path, own_cache):
    binary, starts = counting(tmp_path, qemu_binary("10.0", "ppc64"))
    words = (
        "--machine",
        "pseries",
        "--smp",
        "8,cores=2,threads=8,maxcpus=16",
        "--emulator",
        binary,
    )
    run = await cli("probe", *words)
    assert run.code == 0 and "asked of a throwaway QEMU" in run.stdout and "8-15" in run.stdout
    run = await cli("probe", *words, "--json")
    assert run.json["source"] == "predicted" and starts() == 1
    assert [row["entity"] for row in run.json["vcpus"]] == [list(range(8))] * 8 + [
        list(range(8, 16))
    ] * 8
    run = await cli("probe", *words, "--probe", "always", "--json")
    assert run.json["source"] == "cached" and run.json["emulator"] == binary
    run = await cli("probe", "--refresh")
    assert run.code == 0 and run.stdout == "2 cached answers removed\n"
    xml = tmp_path / "d.xml"
    xml.write_text(
        "<domain type='qemu'><name>d</name><vcpu current='2'>4</vcpu><os><type arch='x86_64'"
        " machine='q35'/></os>"
        f"<devices><emulator>{qemu_binary('10.0', 'x86_64')}</emulator></devices></domain>"
    )
    run = await cli("probe", str(xml), "--json")
    assert [row["state"] for row in run.json["vcpus"]] == [
        "enabled",
        "enabled",
        "disabled",
        "disabled",
    ]
    for bad, code in (
        ((), 2),
        (("--smp", "2"), 2),
        (("--machine", "q35,smm"), 2),
        ((str(xml), "--machine", "q35"), 2),
        (("--machine", "q35", "--smp", "x"), 2),
        (("--machine", "q35", "--smp", "2", "--numa", "x"), 2),
        (("--machine", "q35", "--smp", "2", "--refresh", "--probe", "never"), 2),
        (("--machine", "q35", "--smp", "3,cores=2"), 3),
        ((str(tmp_path / "no.xml"),), 3),
    ):
        run = await cli("probe", *bad, "--json")
        assert run.code == code, (bad, run.stdout)
        assert json.loads(run.stdout)["error"]["hint"]


@pytest.mark.parametrize("ours", [True, False])
async def test_an_error_of_a_qemu_that_ended_says_how(ours):
    """A crash of QEMU while something is asked of it is told with its exit code and its last words."""
    with pytest.raises(VcpuConnectionError) as caught:
        async with qemus.paused("x86_64", "10.0", "2") as qemu, connect(qemu.qmp) as domain:
            qemu.kill()
            await (domain.state() if ours else qemu.execute("query-status"))
    assert [note.partition(": ")[0] for note in caught.value.__notes__] == [
        f"{qemu_binary('10.0', 'x86_64')} exited with code -9"
    ]
