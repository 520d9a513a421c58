"""Migration between real QEMUs whose firmware runs: what is refused before the first byte, who runs
it then.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import VcpuConnectionError
from tests.support import moments, saving
from tests.support.commands import cli, start_cli
from tests.support.monitor import connected
from tests.support.processes import send
from tests.support.qemus import MACHINES, VERSIONS, Qemu, group, qemu_binary, running
from tests.support.started import folder_of
from tests.support.store import ROOT
from tests.support.waiting import until, within

pytestmark = pytest.mark.qemu

FULL = 64 << 20
NODES = [
    "-object",
    "memory-backend-ram,id=m0,size=64M",
    "-object",
    f"memory-backend-memfd,id=m1,size={FULL}",
]
NODES += ["-numa", "node,cpus=0-3,memdev=m0", "-numa", "node,cpus=4-7,memdev=m1"]


@asynccontextmanager
async def machine(
    version="10.0",
    smp="2,sockets=1,cores=8,threads=1,maxcpus=8",
    extra=NODES,
    arch="x86_64",
):
    """It runs: its firmware finds nothing to boot."""
    arguments = ["-nodefaults", "-display", "none", "-no-user-config", "-accel", "tcg,thread=multi"]
    arguments += ["-smp", smp, "-m", "128" if arch == "x86_64" else "256", *MACHINES[arch], *extra]
    async with running(qemu_binary(version, arch), arguments, monitors=("qmp", "qmp2")) as qemu:
        yield qemu


def waiting(**given):
    given["extra"] = [*given.get("extra", NODES), "-incoming", "defer"]
    return machine(**given)


async def runs(qemu: Qemu) -> bool:
    return (await qemu.execute("query-status"))["running"]


async def plugged(qemu: Qemu) -> tuple[int, ...]:
    async with qmpvcpu.connect(qmp=str(qemu.folder / "qmp2")) as domain:
        return (await domain.state()).enabled_ids


async def ended(qemu: Qemu) -> bool:
    await within(qemu.wait(), "QEMU has ended")
    return True


CELLS = [pytest.param(version, marks=group("x86_64", version), id=version) for version in VERSIONS]


@pytest.mark.parametrize("version", CELLS)
async def test_a_sparse_set_goes_to_a_qemu_that_waits_and_its_vcpus_are_plugged_there(version):
    async with machine(version) as source, waiting(version=version) as target:
        async with qmpvcpu.connect(qmp=source.qmp) as domain:
            for number in (6, 3):
                await domain.enable(number)
        run = await cli("migrate", source.qmp, target.qmp, "--json")
        assert run.code == 0, run.stdout + run.stderr
        assert (
            run.json["vcpus"] == [0, 1, 3, 6]
            and run.json["downtime"] >= 0
            and run.json["transferred"] > 0
        )
        assert await runs(target) and await plugged(target) == (0, 1, 3, 6)
        # In the order of the source, and the source's QEMU is gone.
        async with qmpvcpu.connect(qmp=target.qmp) as domain:
            vcpus = (await domain.state()).vcpus
            assert vcpus[6].order < vcpus[3].order
            assert (await domain.enable(7)).changed
        assert await ended(source)


@pytest.mark.parametrize(
    ("version", "smp"),
    [
        pytest.param("7.2", "2,sockets=1,cores=4,threads=1,maxcpus=4", marks=group("ppc64", "7.2")),
        pytest.param(
            "10.0", "4,sockets=1,cores=4,threads=2,maxcpus=8", marks=group("ppc64", "10.0")
        ),
        pytest.param(
            "11.1", "4,sockets=1,cores=4,threads=2,maxcpus=8", marks=group("ppc64", "11.1")
        ),
    ],
)
async def test_cores_of_ppc64_and_back_again(version, smp):
    given = {"version": version, "smp": smp, "extra": [], "arch": "ppc64"}
    async with machine(**given) as source, waiting(**given) as target, waiting(**given) as third:
        async with qmpvcpu.connect(qmp=source.qmp) as domain:
            core = (await domain.state()).entities[-1].ids
            assert (await domain.enable(core)).outcome == "applied"
        wanted = await plugged(source)
        if version != "11.1":
            run = await cli("migrate", source.qmp, target.qmp, "--json")
            assert run.code == 3, run.stdout
            words = (
                "does not migrate the decrementer"
                if version == "7.2"
                else "no interrupt reaches any vCPU but"
            )
            assert words in run.json["error"]["message"] and "--force" in run.json["error"]["hint"]
            assert (await source.execute("query-migrate")).get("status") is None
        for one, other in ((source, target), (target, third)):
            run = await cli("migrate", one.qmp, other.qmp, "--force", "--json")
            assert run.code == 0, run.stdout
            assert await plugged(other) == wanted and await runs(other)


#: What the destination is, beside what it should be: and what is said.
WRONG = {
    "one too many": (
        {"smp": "3,sockets=1,cores=8,threads=1,maxcpus=8"},
        "vCPU 2 is plugged at the destination",
    ),
    "other maxcpus": (
        {"smp": "2,sockets=1,cores=4,threads=1,maxcpus=4", "extra": []},
        "maximum of vCPUs: 8",
    ),
    "other slot": ({"smp": "2,sockets=2,cores=4,threads=1,maxcpus=8"}, "has another slot"),
    "other node": (
        {"extra": [w.replace("0-3", "0-4").replace("4-7", "5-7") for w in NODES]},
        "NUMA node of vCPU 4: 1",
    ),
    "other model": (
        {"extra": [*NODES, "-cpu", "max"]},
        ": qemu64-x86_64-cpu at the source, max-x86_64-cpu",
    ),
    "other machine": ({"extra": [*NODES, "-machine", "pc-q35-7.2"]}, "machine type: pc-q35-10.0"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_cannot_take_it_is_refused_before_the_first_byte(name):
    given, words = WRONG[name]
    async with machine() as source, waiting(**given) as target:
        async with qmpvcpu.connect(qmp=source.qmp) as domain:
            await domain.enable(5)
        run = await cli("migrate", source.qmp, target.qmp, "--json")
        assert run.code == 3, run.stdout
        assert words in run.json["error"]["message"]
        assert await runs(source) and await plugged(source) == (0, 1, 5)
        assert (await source.execute("query-migrate")).get("status") is None
        assert (await target.execute("query-status"))["status"] == "inmigrate"
        if name == "other maxcpus":
            assert "vCPU 4-7: the destination has no such slot" in run.json["error"]["message"]


async def test_one_missing_is_refused_where_nobody_plugs_it():
    """The phases: what `migrate-prepare` did not see, `migrate` and `migrate-finish` do."""
    async with machine() as source, waiting() as target:
        async with qmpvcpu.connect(qmp=source.qmp) as s, qmpvcpu.connect(qmp=target.qmp) as t:
            cookie = await s.migrate_begin()
            await t.migrate_prepare(cookie)
            # Somebody plugs one at the source in between.
            await s.enable(5)
            with pytest.raises(
                qmpvcpu.VcpuRefused, match="vCPU 5 is plugged at the destination, but not"
            ):
                await s.migrate(t, cookie)
            assert (
                await runs(source) and (await source.execute("query-migrate")).get("status") is None
            )


async def test_a_reader_that_does_not_know_the_feature_refuses(tmp_path):
    async with machine() as source, waiting() as target:
        assert (await cli("setvcpu", source.qmp, "5", "--enable")).code == 0
        run = await cli("migrate-begin", source.qmp)
        assert run.code == 0 and "<feature name='cpu-hotplug'/>" in run.stdout
        cookie = tmp_path / "cookie"
        cookie.write_text(run.stdout.replace("name='cpu-hotplug'", "name='cpu-teleport'"))
        run = await cli("migrate-prepare", str(cookie), target.qmp, "--json")
        assert run.code == 3 and "cpu-teleport" in run.json["error"]["message"]
        assert await plugged(target) == (0, 1) and await runs(source)


async def test_the_phases_by_hand(tmp_path):
    async with machine() as source, waiting() as target:
        assert (await cli("setvcpu", source.qmp, "5", "--enable")).code == 0
        cookie = tmp_path / "cookie"
        cookie.write_text((await cli("migrate-begin", source.qmp)).stdout)
        run = await cli("migrate-prepare", str(cookie), target.qmp)
        assert run.code == 0, run.stderr
        uri = run.stdout.strip()
        assert await plugged(target) == (0, 1, 5)
        run = await cli("migrate-perform", source.qmp, uri, "--cookie", str(cookie), "--json")
        assert run.code == 0, run.stdout
        # Handed over, and running nowhere until it is said.
        assert not await runs(source) and not await runs(target)
        run = await cli("setvcpu", source.qmp, "6", "--enable", "--json")
        assert run.code == 3 and "has migrated" in run.json["error"]["message"]
        run = await cli("migrate-finish", target.qmp, str(cookie), "--json")
        assert run.code == 0 and run.json["vcpus"] == [0, 1, 5]
        assert await runs(target)
        assert not list(target.folder.glob("*.migrate"))


async def test_cancel_after_the_handing_over_lets_the_source_go_on(tmp_path):
    async with machine() as source, waiting() as target:
        cookie = tmp_path / "cookie"
        cookie.write_text((await cli("migrate-begin", source.qmp)).stdout)
        uri = (await cli("migrate-prepare", str(cookie), target.qmp)).stdout.strip()
        assert (await cli("migrate-perform", source.qmp, uri)).code == 0
        assert (await cli("migrate-cancel", source.qmp)).code == 0
        assert await runs(source)
        run = await cli("migrate-cancel", source.qmp)
        assert run.code == 3 and "no migration is under way" in run.stderr
    async with waiting() as target:
        assert (await cli("migrate-cancel", target.qmp)).code == 0
        assert await ended(target)


async def test_over_tcp_between_two_that_know_only_addresses():
    async with machine() as source, waiting() as target:
        assert (await cli("setvcpu", source.qmp, "5", "--enable")).code == 0
        run = await cli("migrate", source.qmp, target.qmp, "--uri", "tcp:127.0.0.1:0", "--json")
        assert run.code == 0, run.stdout
        assert await runs(target) and await plugged(target) == (0, 1, 5)


async def test_one_that_listens_already_and_one_whose_qmp_is_tcp():
    async with machine() as source:
        async with machine(
            extra=[
                *NODES,
                "-incoming",
                "tcp:127.0.0.1:0",
                "-qmp",
                "tcp:127.0.0.1:0,server=on,wait=off",
            ]
        ) as target:
            rows = await target.execute("query-chardev")
            name = next(row["filename"] for row in rows if "tcp" in row["filename"])
            address = name.partition("tcp:")[2].partition(",")[0]
            run = await cli("migrate", source.qmp, address, "--json")
            assert run.code == 0, run.stdout
            assert await runs(target)


async def test_a_guest_that_does_not_wait_is_no_destination():
    async with machine() as source, machine() as target:
        run = await cli("migrate", source.qmp, target.qmp, "--json")
        assert run.code == 3 and "does not wait for a migration" in run.json["error"]["message"]
        assert await runs(source) and await runs(target)
        run = await cli("migrate", source.qmp, "nowhere", "--json")
        assert run.code == 3 and "-incoming defer" in run.json["error"]["hint"]
        run = await cli("migrate", source.qmp, target.qmp, "--persistent", "--json")
        assert run.code == 2


async def test_a_paused_guest_arrives_paused():
    async with machine() as source, waiting() as target:
        await source.execute("stop")
        assert (await cli("migrate", source.qmp, target.qmp)).code == 0
        assert (await target.execute("query-status"))["status"] == "paused"


@asynccontextmanager
async def slowly(source: Qemu):
    """So slow that it is under way until this ends: no page of its second node is a page of zeros.

    QEMU sends 32 KiB ten times a second however low the limit is: a memory of zeros would be gone
    in a second.
    """
    files = Path(f"/proc/{source.pid}/fd").iterdir()
    (memory,) = [file for file in files if "memfd:memory-backend" in os.readlink(file)]
    with memory.open("r+b") as file:
        file.write(b"\1" * FULL)
    await source.execute("migrate-set-parameters", {"max-bandwidth": 4096})
    yield


async def until_active(source: Qemu):
    async def status():
        return (await source.execute("query-migrate")).get("status") == "active"

    await until(status, "its memory moves")


async def test_vcpus_are_not_switched_while_it_is_on_its_way():
    async with machine() as source, waiting() as target, slowly(source):
        async with qmpvcpu.connect(qmp=str(source.folder / "qmp2")) as domain:
            await domain.enable(4)
            process = await start_cli("migrate", source.qmp, target.qmp)
            await until_active(source)
            for call in (domain.enable(5), domain.disable(4), domain.set_vcpus(8)):
                with pytest.raises(qmpvcpu.VcpuRefused, match="is being migrated"):
                    await call
            assert "is being migrated" in (await domain.plan_enable(5)).refusals[0].message
            send(process, signal.SIGINT)
            assert await process.wait() == 130
            assert await runs(source)
            assert (await source.execute("query-migrate"))["status"] == "cancelled"
            assert await ended(target)
            assert (await domain.enable(5)).changed


@pytest.mark.parametrize("victim", ["target", "source", "us"])
async def test_killed_while_memory_moves(victim):
    async with machine() as source, waiting() as target, slowly(source):
        process = await start_cli("migrate", source.qmp, target.qmp, "--json")
        await until_active(source)
        {"target": target, "source": source, "us": process}[victim].kill()
        stdout, _ = await process.communicate()
        if victim == "target":
            assert process.returncode == 8 and b"goes on at the source" in stdout
            assert await runs(source)
        elif victim == "source":
            assert process.returncode == 7, stdout
            assert await ended(target)
        else:
            # QEMU goes on with it by itself; nobody else starts the destination.
            assert await runs(source) and not await runs(target)
            run = await cli("migrate-cancel", source.qmp)
            assert run.code == 0 and await runs(source)


async def moved(source, target, moment, act):
    """Migrate, and do something before a moment of the handing over."""
    with moments.before(moment, act):
        async with qmpvcpu.connect(qmp=source.qmp) as s, qmpvcpu.connect(qmp=target.qmp) as t:
            cookie = await s.migrate_begin()
            await t.migrate_prepare(cookie)
            return await s.migrate(t, cookie)


def dead(qemu: Qemu):
    os.kill(qemu.pid, signal.SIGKILL)
    os.waitid(os.P_PID, qemu.pid, os.WEXITED | os.WNOWAIT)


async def test_the_destination_dies_when_all_has_been_handed_over(monkeypatch):
    async with machine() as source, waiting() as target:

        async def act():
            dead(target)

        with pytest.raises(qmpvcpu.VcpuFailed, match="goes on at the source"):
            await moved(source, target, "the destination has all", act)
        assert await runs(source)


async def test_the_destination_dies_before_it_is_told_to_run(monkeypatch):
    async with machine() as source, waiting() as target:

        async def act():
            dead(target)

        with pytest.raises(qmpvcpu.VcpuFailed, match="goes on at the source"):
            await moved(source, target, "the destination runs", act)
        assert await runs(source)


async def test_the_source_dies_when_all_has_been_handed_over(monkeypatch):
    async with machine() as source, waiting() as target:

        async def act():
            dead(source)

        done = await moved(source, target, "the destination has all", act)
        assert done.vcpus == (0, 1)
        assert await runs(target)


async def test_a_vcpu_that_comes_at_the_destination_on_the_way_is_seen_before_it_runs(monkeypatch):
    async with machine() as source, waiting() as target:

        async def act():
            async with qmpvcpu.connect(qmp=str(target.folder / "qmp2")) as domain:
                await domain.enable(7)

        with pytest.raises(
            qmpvcpu.VcpuFailed, match="vCPU 7 is plugged at the destination, but not at the source"
        ):
            await moved(source, target, "the destination has all", act)
        assert await runs(source) and await ended(target)


async def test_cancelled_at_the_last_moment_it_is_brought_to_an_end(monkeypatch):
    """Whoever gives up then gets the guest running, on one side."""
    async with machine() as source, waiting() as target:
        task = asyncio.current_task()

        async def act():
            task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await moved(source, target, "the destination runs", act)
        task.uncancel()
        assert await runs(target) and await ended(source)


async def test_a_connection_that_is_cut_is_a_failure_and_the_source_goes_on(tmp_path):
    """By way of a relay: QEMU itself learns that nobody is there any more."""
    async with machine() as source, waiting() as target, slowly(source):
        behind = tmp_path / "behind"
        front = tmp_path / "front"
        writers = []

        async def relay(reader, writer):
            other_reader, other_writer = await asyncio.open_unix_connection(behind)
            writers.extend((writer, other_writer))

            async def copy(one, two):
                while data := await one.read(65536):
                    two.write(data)

            await asyncio.gather(
                copy(reader, other_writer), copy(other_reader, writer), return_exceptions=True
            )

        server = await asyncio.start_unix_server(relay, front)
        async with server:
            cookie = tmp_path / "cookie"
            cookie.write_text((await cli("migrate-begin", source.qmp)).stdout)
            assert (
                await cli("migrate-prepare", str(cookie), target.qmp, "--uri", f"unix:{behind}")
            ).code == 0
            process = await start_cli("migrate-perform", source.qmp, f"unix:{front}", "--json")
            await until_active(source)
            for writer in writers:
                writer.transport.abort()
            stdout, _ = await process.communicate()
        assert process.returncode == 8 and b"goes on at the source" in stdout, stdout
        assert await runs(source)


#: Where a vCPU that ejects at once can be unplugged, and the guest be migrated after that: 10.0
#: cannot under TCG.
EJECTING = {"version": "11.1"}


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))


@pytest.fixture
def firmware(tmp_path, state):
    image = tmp_path / "eject.bin"
    options = [
        "-m16",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,-Ttext=0,--build-id=none,--oformat=binary",
    ]
    subprocess.run(["gcc", *options, "-o", str(image), "scripts/guest/eject.S"], check=True)
    return ["-bios", str(image)]


async def test_a_pending_unplug_stops_it_unless_it_is_waited_for(firmware):
    async with (
        machine(extra=firmware, **EJECTING) as source,
        waiting(extra=firmware, **EJECTING) as target,
    ):
        async with qmpvcpu.connect(qmp=source.qmp) as domain:
            await domain.enable([4, 5])
            await source.execute("stop")
            assert (await domain.disable(5, timeout=0)).pending == (5,)
        run = await cli("migrate", source.qmp, target.qmp, "--json")
        assert run.code == 3 and "vCPU 5: its unplug is pending" in run.json["error"]["message"]
        process = await start_cli("migrate", source.qmp, target.qmp, "--wait", "20", "--json")
        await source.execute("cont")
        stdout, stderr = await process.communicate()
        assert process.returncode == 0, stdout + stderr
        assert await plugged(target) == (0, 1, 4)


async def test_what_is_known_to_hang_is_refused_and_what_hangs_is_cancelled(firmware):
    """10.0, TCG: after an unplug QEMU never gets past 'setup'."""
    async with machine(extra=firmware) as source, waiting(extra=firmware) as target:
        async with qmpvcpu.connect(qmp=source.qmp) as s, qmpvcpu.connect(qmp=target.qmp) as t:
            await s.enable([4, 5])
            await s.disable(5)
            with pytest.raises(qmpvcpu.VcpuRefused, match="never gets past 'setup'"):
                await s.migrate_begin()
            cookie = await s.migrate_begin(force=True)
            await t.migrate_prepare(cookie)
            with pytest.raises(qmpvcpu.VcpuFailed, match="no progress for 10 s"):
                await s.migrate(t, cookie, force=True)
        assert await runs(source) and await ended(target)


async def test_qemu_without_the_right_uri_does_not_begin():
    async with machine() as source:
        run = await cli("migrate-perform", source.qmp, "unix:/nowhere/at/all", "--json")
        assert run.code == 8 and await runs(source)
        for uri in ("warp:9", "exec:touch /nowhere", "file:/nowhere"):
            run = await cli("migrate-perform", source.qmp, uri, "--json")
            assert (
                run.code == 3
                and "is not an address for a migration" in run.json["error"]["message"]
            )
        with pytest.raises(VcpuConnectionError):
            async with qmpvcpu.connect(qmp="/nowhere"):
                pass


SPARSE = """<domain type='qemu'><name>one</name><uuid>7a1d3b9c-0c3f-4b7e-9a38-0d1b7e7d5f10</uuid>
<memory unit='MiB'>128</memory><vcpu current='3'>8</vcpu><vcpus>
<vcpu id='0' enabled='yes' hotpluggable='no'/><vcpu id='1' enabled='yes' hotpluggable='no'/>
<vcpu id='5' enabled='yes' hotpluggable='yes' order='3'/></vcpus>
<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"""


@pytest.fixture
async def started(tmp_path, monkeypatch):
    """A defined, sparse domain that runs; whatever runs at the end is ended."""
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "s"))
    file = tmp_path / "one.xml"
    file.write_text(SPARSE)
    assert (await cli("define", str(file))).code == 0
    assert (await cli("start", "one")).code == 0
    yield
    for row in (await cli("list", "--json")).json["domains"]:
        if row["active"]:
            await cli("destroy", row["name"])


async def names():
    return {row["name"]: row["active"] for row in (await cli("list", "--json")).json["domains"]}


async def test_by_name_the_destination_is_started_and_defined(started):
    assert (await cli("setvcpu", "one", "6", "--enable", "--live")).code == 0
    run = await cli("migrate", "one", "two", "--persistent", "--undefine-source", "--json")
    assert run.code == 0, run.stdout + run.stderr
    assert run.json["vcpus"] == [0, 1, 5, 6] and await names() == {"two": True}
    # Live as it came, and its definition as it was.
    assert (await cli("vcpucount", "two", "--active", "--live")).stdout.strip() == "4"
    inactive = (await cli("dumpxml", "two", "--inactive")).stdout
    assert "<name>two</name>" in inactive and "id='6'" not in inactive
    info = (await cli("vcpuinfo", "two", "--json")).json
    assert info["machine"].startswith("pc-q35-")
    # And back, to a name that is defined as it runs.
    run = await cli("migrate", "two", "one", "--json")
    assert run.code == 0 and "is now defined as the guest runs" in run.json["messages"][-1]
    assert await names() == {"one": True, "two": False}
    assert "id='6' enabled='yes'" in (await cli("dumpxml", "one", "--inactive")).stdout


async def test_by_name_the_phases(started, tmp_path):
    cookie = tmp_path / "cookie"
    cookie.write_text((await cli("migrate-begin", "one", "--persistent")).stdout)
    # The source's own name is taken here.
    run = await cli("migrate-prepare", str(cookie), "--json")
    assert run.code == 3, run.stdout
    run = await cli("migrate-prepare", str(cookie), "two", "--json")
    assert run.code == 0 and run.json["vcpus"] == [0, 1, 5], run.stdout + run.stderr
    assert await names() == {"one": True, "two": True}
    assert (await cli("migrate-perform", "one", run.json["uri"], "--cookie", str(cookie))).code == 0
    assert (await cli("migrate-finish", "two", str(cookie))).code == 0
    assert (await cli("destroy", "one")).code == 0
    assert await names() == {"one": False, "two": True}


async def test_where_the_destination_fails_all_the_same_its_own_words_are_told(started):
    async def plug():
        async with qmpvcpu.connect(qmp=str(folder_of("one") / "qmp2")) as other:
            await other.enable(6)

    async with qmpvcpu.connect("one") as domain:
        with (
            moments.before("the guest goes to the destination", plug),
            pytest.raises(
                qmpvcpu.VcpuFailed,
                match=r"the destination's QEMU reported: .*Unknown savevm .* 'cpu",
            ),
        ):
            await saving.move(domain, "two")
    assert await names() == {"one": True}


async def test_prepare_compares_the_cookie_with_the_destination(tmp_path):
    rng = ["-device", "virtio-rng-pci,addr=0x9"]
    async with machine() as source, waiting(extra=[*NODES, *rng]) as target:
        cookie = tmp_path / "cookie"
        cookie.write_text((await cli("migrate-begin", source.qmp)).stdout)
        run = await cli("migrate-prepare", str(cookie), target.qmp, "--json")
        assert run.code == 3, run.stdout
        texts = [one["message"] for one in run.json["error"]["refusals"]]
        assert "device virtio-rng-pci: none at the source, 1 at the destination" in texts
        # One of before says less, and is taken.
        cookie.write_text(re.sub("<picture>.*</picture>", "", cookie.read_text()))
        run = await cli("migrate-prepare", str(cookie), target.qmp, "--json")
        assert run.code == 0, run.stdout


async def test_a_destination_that_was_started_is_gone_when_it_cannot_take_it(started):
    def refuses():
        raise qmpvcpu.VcpuRefused([qmpvcpu.Refusal("x", "the test says no")])

    async with qmpvcpu.connect("one") as domain:
        with (
            moments.before("the destination is prepared", refuses),
            pytest.raises(qmpvcpu.VcpuRefused, match="the test says no"),
        ):
            await saving.move(domain, "two")
    assert await names() == {"one": True}
    assert (await cli("destroy", "two", "--json")).json["error"][
        "message"
    ] == "'two' is not running"


async def test_interrupted_at_the_last_moment_by_name_the_guest_is_at_the_destination(
    started, monkeypatch
):
    """Also when it was started for this: it must not be ended any more."""
    async with qmpvcpu.connect("one") as domain:
        task = asyncio.current_task()

        async def cancel_twice():
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()

        with moments.before("the source ends", cancel_twice), pytest.raises(asyncio.CancelledError):
            await saving.move(domain, "two", persistent=True)
        while task.cancelling():
            task.uncancel()
    assert await names() == {"one": False, "two": True}
    assert (await cli("vcpucount", "two", "--active", "--live")).stdout.strip() == "3"


async def test_a_destination_that_may_run_is_left_alone(started):
    async with qmpvcpu.connect("one") as domain:
        with (
            moments.destination_cannot_be_told(),
            pytest.raises(qmpvcpu.VcpuPartial, match="which side runs the guest cannot be told"),
        ):
            await saving.move(domain, "two")
    async with connected(str(folder_of("one") / "qmp2")) as source:
        assert (await source.command("query-status"))["status"] == "postmigrate"
    assert (await names())["two"] is True


async def test_a_name_that_stands_for_another_domain_is_not_for_this_one(started, tmp_path):
    other = tmp_path / "db1.xml"
    other.write_text(SPARSE.replace("one<", "db1<").replace("7a1d3b9c", "11111111"))
    assert (await cli("define", str(other))).code == 0
    before = (await cli("dumpxml", "db1", "--inactive")).stdout
    cookie = tmp_path / "cookie"
    cookie.write_text((await cli("migrate-begin", "one", "--persistent")).stdout)
    for words in (
        ("migrate", "one", "db1", "--persistent"),
        ("migrate-prepare", str(cookie), "db1"),
    ):
        run = await cli(*words, "--json")
        assert run.code == 3 and "is another domain" in run.json["error"]["message"], run.stdout
    assert (await cli("dumpxml", "db1", "--inactive")).stdout == before


async def test_a_source_or_a_paused_guest_is_no_destination_to_finish(tmp_path):
    async with machine() as source, waiting() as target, machine() as other:
        cookie = tmp_path / "cookie"
        cookie.write_text((await cli("migrate-begin", source.qmp)).stdout)
        uri = (await cli("migrate-prepare", str(cookie), target.qmp)).stdout.strip()
        assert (await cli("migrate-perform", source.qmp, uri)).code == 0
        await other.execute("stop")
        for qemu in (source, other):
            run = await cli("migrate-finish", qemu.qmp, str(cookie), "--json")
            assert run.code == 8 and "no guest has migrated" in run.json["error"]["message"], (
                run.stdout
            )
            assert not await runs(qemu)
        assert (await cli("migrate-finish", target.qmp, str(cookie))).code == 0
        assert await runs(target) and not await runs(source)


async def test_a_second_migration_leaves_the_first_alone():
    async with machine() as source, waiting() as target, waiting() as third, slowly(source):
        first = await start_cli("migrate", source.qmp, target.qmp, "--json")
        await until_active(source)
        run = await cli("migrate", str(source.folder / "qmp2"), third.qmp, "--json")
        assert run.code == 3 and "a migration is under way" in run.json["error"]["message"]
        assert (await source.execute("query-migrate"))["status"] == "active"
        await source.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
        stdout, _ = await first.communicate()
        assert first.returncode == 0, stdout
        assert await runs(target)


async def test_paused_between_begin_and_perform_it_arrives_paused():
    async with machine() as source, waiting() as target:
        async with qmpvcpu.connect(qmp=source.qmp) as s, qmpvcpu.connect(qmp=target.qmp) as t:
            cookie = await s.migrate_begin()
            await t.migrate_prepare(cookie)
            await source.execute("stop")
            await s.migrate(t, cookie)
        assert not await runs(target)


async def test_the_rate_is_what_it_was_after_a_failure():
    async with machine() as source:
        before = (await source.execute("query-migrate-parameters"))["max-bandwidth"]
        assert (
            await cli("migrate-perform", source.qmp, "unix:/nowhere", "--bandwidth", "1")
        ).code == 8
        assert (await source.execute("query-migrate-parameters"))["max-bandwidth"] == before


async def test_another_guests_uuid(tmp_path):
    extra = [*NODES, "-uuid", "aaaaaaaa-0000-4000-8000-000000000001"]
    other = [*NODES, "-uuid", "aaaaaaaa-0000-4000-8000-000000000002"]
    async with machine(extra=extra) as source, waiting(extra=other) as target:
        run = await cli("migrate", source.qmp, target.qmp, "--json")
        assert run.code == 3 and "uuid" in run.json["error"]["message"] and await runs(source)


async def handed_over(source, target, tmp_path):
    """As far as a user who runs the phases gets before the last one."""
    cookie = tmp_path / "cookie"
    cookie.write_text((await cli("migrate-begin", source.qmp)).stdout)
    uri = (await cli("migrate-prepare", str(cookie), target.qmp)).stdout.strip()
    run = await cli("migrate-perform", source.qmp, uri, "--json")
    assert run.code == 0, run.stdout
    return str(cookie)


async def test_taken_back_at_the_source_it_does_not_run_at_the_destination(tmp_path, state):
    async with machine() as source, waiting() as target:
        cookie = await handed_over(source, target, tmp_path)
        assert (await cli("migrate-cancel", source.qmp)).code == 0 and await runs(source)
        for words in ((cookie,), ()):
            run = await cli("migrate-finish", target.qmp, *words, "--json")
            assert run.code == 3 and "would run twice" in run.json["error"]["message"], run.stdout
        assert not await runs(target)
        # What has arrived, and is nobody's, can be ended.
        assert (await cli("migrate-cancel", target.qmp)).code == 0
        assert await ended(target) and await runs(source)


async def test_let_run_at_the_destination_it_is_not_taken_back(tmp_path, state):
    async with machine() as source, waiting() as target:
        await handed_over(source, target, tmp_path)
        # Without its cookie: it is known here.
        assert (await cli("migrate-finish", target.qmp)).code == 0 and await runs(target)
        run = await cli("migrate-cancel", source.qmp, "--json")
        assert run.code == 3 and "would run twice" in run.json["error"]["message"], run.stdout
        assert not await runs(source)
        run = await cli("migrate-cancel", target.qmp, "--json")
        assert run.code == 3 and await runs(target)
        target.kill()
        assert await ended(target)
        assert (await cli("migrate-cancel", source.qmp, "--force")).code == 0 and await runs(source)


async def test_the_only_copy_is_not_ended(tmp_path, state):
    async with machine() as source, waiting() as target:
        await handed_over(source, target, tmp_path)
        source.kill()
        assert await ended(source)
        run = await cli("migrate-cancel", target.qmp, "--json")
        assert run.code == 3 and "whether the source still has it" in run.json["error"]["message"]
        assert (await cli("migrate-finish", target.qmp)).code == 0 and await runs(target)


async def test_where_nothing_is_known_of_it_the_phases_trust_their_user(
    tmp_path, state, monkeypatch
):
    """Another host, or another user: the one thing that is said is what to look after."""
    async with machine() as source, waiting() as target:
        await handed_over(source, target, tmp_path)
        monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "other"))
        run = await cli("migrate-finish", target.qmp, "--json")
        assert run.code == 3 and "is not known" in run.json["error"]["message"]
        run = await cli("migrate-cancel", source.qmp, "--json")
        assert (
            run.code == 0
            and "make sure that the destination does not run it" in run.json["message"]
        )


async def test_paused_when_it_began_it_is_not_let_run_by_cancelling(tmp_path, state):
    async with machine() as source, waiting() as target:
        await source.execute("stop")
        await handed_over(source, target, tmp_path)
        run = await cli("migrate-cancel", source.qmp, "--json")
        assert (
            run.code == 0 and "paused as it was" in run.json["message"] and not await runs(source)
        )


async def test_what_has_not_arrived_whole_can_be_ended(tmp_path, state):
    async with machine() as source, waiting() as target:
        cookie = await handed_over(source, target, tmp_path)
        async with qmpvcpu.connect(qmp=str(target.folder / "qmp2")) as domain:
            await domain.enable(7)
        run = await cli("migrate-finish", target.qmp, cookie, "--json")
        assert run.code == 8 and "vCPU 7" in run.json["error"]["message"]
        assert (await cli("migrate-cancel", target.qmp)).code == 0 and await ended(target)
        assert (await cli("migrate-cancel", source.qmp)).code == 0 and await runs(source)


DIES = """
import asyncio, sys
import qmpvcpu
from tests.support import moments

async def main():
    moments.die(sys.argv[3], after=sys.argv[4] == "True")
    async with qmpvcpu.connect(qmp=sys.argv[1]) as s, qmpvcpu.connect(qmp=sys.argv[2]) as t:
        cookie = await s.migrate_begin()
        await t.migrate_prepare(cookie)
        await s.migrate(t, cookie)

asyncio.run(main())
"""
ARRIVED, RUNS = "the destination has all", "the destination runs"


@pytest.mark.parametrize(
    ("step", "after"), [(ARRIVED, False), (ARRIVED, True), (RUNS, False), (RUNS, True)]
)
async def test_killed_between_the_handing_over_and_the_end(tmp_path, state, step, after):
    """Whatever is typed then, it runs on one side."""
    async with machine() as source, waiting() as target:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DIES, source.qmp, target.qmp, step, str(after), cwd=ROOT
        )
        assert await process.wait() == 9
        assert not await runs(source) and await runs(target) is (step == RUNS and after)
        is_taken = step == RUNS
        run = await cli("migrate-cancel", source.qmp, "--json")
        assert run.code == (3 if is_taken else 0), run.stdout
        run = await cli("migrate-finish", target.qmp, "--json")
        assert run.code == (0 if is_taken else 3), run.stdout
        assert (await runs(source), await runs(target)) == (not is_taken, is_taken)


async def test_one_that_listens_everywhere_is_named_by_its_hosts_name(tmp_path, state):
    async with machine() as source, waiting() as target:
        cookie = tmp_path / "cookie"
        cookie.write_text((await cli("migrate-begin", source.qmp)).stdout)
        run = await cli("migrate-prepare", str(cookie), target.qmp, "--uri", "tcp:0.0.0.0:0")
        assert run.code == 0 and run.stdout.startswith(f"tcp:{socket.gethostname()}:"), run.stdout


async def test_a_cookie_is_for_one_handing_over(tmp_path, state):
    """What has arrived of a migration that failed, or was taken back, is not let run by a later
    one.
    """
    async with machine() as source, waiting() as target, waiting() as third:
        cookie = await handed_over(source, target, tmp_path)
        assert (await cli("migrate-cancel", source.qmp)).code == 0
        uri = (await cli("migrate-prepare", cookie, third.qmp)).stdout.strip()
        run = await cli("migrate-perform", source.qmp, uri, "--cookie", cookie, "--json")
        assert run.code == 3 and "has been used" in run.json["error"]["message"], run.stdout
        assert await runs(source)
        # Begun again, all goes well; and what is at the first destination stays what it is.
        again = tmp_path / "again"
        again.write_text((await cli("migrate-begin", source.qmp)).stdout)
        assert (await cli("migrate-prepare", str(again), third.qmp)).code == 0
        assert (await cli("migrate-perform", source.qmp, uri)).code == 0
        run = await cli("migrate-finish", target.qmp, "--json")
        assert run.code == 3, run.stdout
        assert (await cli("migrate-finish", third.qmp)).code == 0
        assert not await runs(target) and not await runs(source) and await runs(third)


async def test_begun_twice_it_is_one(tmp_path, state):
    async with machine() as source, waiting() as target:
        cookie = tmp_path / "cookie"
        cookie.write_text((await cli("migrate-begin", source.qmp)).stdout)
        uri = (await cli("migrate-prepare", str(cookie), target.qmp)).stdout.strip()
        assert (await cli("migrate-begin", source.qmp)).code == 0
        assert (await cli("migrate-perform", source.qmp, uri)).code == 0
        assert (await cli("migrate-cancel", source.qmp)).code == 0 and await runs(source)
        run = await cli("migrate-finish", target.qmp, "--json")
        assert run.code == 3 and not await runs(target), run.stdout


async def test_forced_at_one_side_the_other_is_refused(tmp_path, state):
    async with machine() as source, waiting() as target:
        cookie = await handed_over(source, target, tmp_path)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "import asyncio, sys\nimport qmpvcpu\nfrom tests.support import moments\n"
            "async def main():\n"
            f"    moments.die({RUNS!r})\n"
            "    async with qmpvcpu.connect(qmp=sys.argv[1]) as t:\n"
            "        await t.migrate_finish(await t.migrate_cookie())\n"
            "asyncio.run(main())",
            target.qmp,
            cwd=ROOT,
        )
        assert await process.wait() == 9
        assert (await cli("migrate-cancel", source.qmp)).code == 3
        assert (await cli("migrate-cancel", source.qmp, "--force")).code == 0 and await runs(source)
        assert (await cli("migrate-finish", target.qmp, cookie)).code == 3 and not await runs(
            target
        )
        source.kill()
        assert await ended(source)
        # The only copy now.
        assert (await cli("migrate-finish", target.qmp, "--force")).code == 0 and await runs(target)


async def test_what_has_arrived_and_was_never_let_run_is_not_taken_further(tmp_path, state):
    async with machine() as source, waiting() as target:
        await handed_over(source, target, tmp_path)
        for words in (("migrate-begin", target.qmp), ("save", target.qmp, str(tmp_path / "file"))):
            run = await cli(*words, "--json")
            assert run.code == 3 and "has never run" in run.json["error"]["message"], run.stdout
        assert (await cli("migrate-finish", target.qmp)).code == 0 and await runs(target)


async def test_the_return_path_is_cut_at_the_very_end(tmp_path, state):
    """All has arrived, and the source does not learn it: it goes on, and the destination is not let
    run.
    """
    async with machine() as source, waiting() as target:
        behind, front = tmp_path / "behind", tmp_path / "front"
        over = asyncio.Event()

        async def relay(reader, writer):
            other_reader, other_writer = await asyncio.open_unix_connection(behind)
            with suppress(ConnectionError):
                while data := await reader.read(65536):
                    other_writer.write(data)
                    # All is there: what the destination says of it is lost.
                    if (await target.execute("query-status"))["status"] != "inmigrate":
                        break
            writer.transport.abort()
            await over.wait()
            other_writer.close()

        async with await asyncio.start_unix_server(relay, front):
            cookie = tmp_path / "cookie"
            cookie.write_text((await cli("migrate-begin", source.qmp)).stdout)
            assert (
                await cli("migrate-prepare", str(cookie), target.qmp, "--uri", f"unix:{behind}")
            ).code == 0
            process = await start_cli("migrate-perform", source.qmp, f"unix:{front}", "--json")
            stdout, _ = await within(process.communicate(), "the source has lost the destination")
            over.set()
        assert process.returncode == 8, stdout
        assert await runs(source)
        run = await cli("migrate-finish", target.qmp, "--json")
        assert run.code in (3, 7, 8) and await runs(source), run.stdout
        assert target.has_exited or not await runs(target)


@pytest.mark.parametrize("version", ["7.2", "10.0", "11.1"])
async def test_ppc64_that_would_abort_is_refused_also_by_another_process(version, tmp_path, state):
    """Once a core was unplugged, 7.2 and 10.0 do not outlive the beginning of a migration."""
    given = {
        "version": version,
        "smp": "1,sockets=1,cores=8,threads=1,maxcpus=8",
        "extra": ["-S"],
        "arch": "ppc64",
    }
    async with machine(**given) as source, waiting(**given) as target:
        assert (await cli("setvcpu", source.qmp, "5", "--enable")).code == 0
        assert (await cli("setvcpu", source.qmp, "5", "--disable", "--force")).code == 0
        run = await cli("migrate", source.qmp, target.qmp, "--json")
        if version == "11.1":
            assert run.code == 0, run.stdout
        else:
            assert run.code == 3 and "once a core was unplugged" in run.json["error"]["message"], (
                run.stdout
            )
            assert (await source.execute("query-status"))["status"] == "prelaunch"


async def test_after_a_failure_it_is_migrated_all_the_same_and_on_from_there(state):
    async with machine() as source, waiting() as target, waiting() as third, waiting() as fourth:
        async with slowly(source):
            process = await start_cli("migrate", source.qmp, target.qmp, "--json")
            await until_active(source)
            target.kill()
            await process.communicate()
            assert process.returncode == 8 and await runs(source)
        await source.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
        for one, other in ((source, third), (third, fourth)):
            run = await cli("migrate", one.qmp, other.qmp, "--json")
            assert run.code == 0 and await runs(other), run.stdout
            assert await ended(one)
        # The next trip needs no cookie of the last one.
        run = await cli("migrate-finish", fourth.qmp, "--json")
        assert run.code == 3 and "is not known" in run.json["error"]["message"]
