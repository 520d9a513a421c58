"""Real, sparse Linux guests go from QEMU to QEMU: what they count never goes back, what they see
stays so.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import qmpvcpu
from tests.guest.test_start_guest import TWO_CORES, xml
from tests.support.commands import cli, start_cli
from tests.support.guests import KINDS as POOLED
from tests.support.guests import Guest, attached, boot, booted, image_of, incoming
from tests.support.processes import send
from tests.support.qemus import matrix, qemu_binary
from tests.support.soaking import count
from tests.support.waiting import DEADLINE, until

pytestmark = pytest.mark.guest

#: -smp, -m, image, plugged in this order, and one more later on.
KINDS = {
    "x86_64": ("2,sockets=2,cores=32,threads=1,maxcpus=64", "256", "x86_64", ([40], [5]), [9]),
    "ppc64": (
        "2,sockets=1,cores=40,threads=2,maxcpus=80",
        "1024",
        "ppc64le",
        ([20, 21], [6, 7]),
        [12, 13],
    ),
    "s390x": ("1,maxcpus=32", "256", "s390x", ([7], [3]), [5]),
}
#: Not ppc64 7.2: its Linux hangs after a migration, with one vCPU too (docs/qemu-facts.md).
CELLS = [("x86_64", "11.1"), ("ppc64", "11.1"), ("s390x", "10.0")]
MORE = [("x86_64", "10.0"), ("s390x", "7.2")]
#: Where only its first CPU gets over a migration (docs/qemu-facts.md), and the agents see to that.
ONE_CPU = ("ppc64", "10.0")
#: Ten, and `MORE`: `scripts/soak trips`.
ROUND_TRIPS = 1
COUNTER = (
    "(n=0; while :; do n=$((n+1)); echo $n > /run/counter; usleep 20000; done) > /dev/null 2>&1 &"
)


async def counted(guest: Guest) -> int:
    """Between its truncation and what is written to it, the file is empty. `cat`: the shell's own
    `read` takes one character at a time, of two numbers if need be.
    """
    command = 'n=; until [ -n "$n" ]; do n=$(cat /run/counter); done; echo $n'
    return int(await guest.shell(command, timeout=DEADLINE))


@matrix(*CELLS, ONE_CPU, more=MORE)
async def test_round_trips(arch, version, tmp_path, monkeypatch):
    """From QEMU to QEMU and, where its CPUs all get over it without an agent, into a file and out
    of it.
    """
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    smp, memory, image, plugs, more = KINDS[arch]
    found = image_of(image)
    arguments = ["-accel", "tcg,thread=multi", "-smp", smp, "-m", memory]
    is_one_cpu = (arch, version) == ONE_CPU
    async with AsyncExitStack() as stack:
        guest = await stack.enter_async_context(boot(found, qemu_binary(version, arch), arguments))
        async with qmpvcpu.connect(qmp=guest.qemu.qmp, agent=guest.agent) as domain:
            for ids in plugs:
                assert (await domain.enable(ids, timeout=DEADLINE)).outcome == "applied"
        await guest.shell(COUNTER)
        online, vcpus, before = await guest.online(), await seen(guest), await counted(guest)

        async def arrived(target):
            """What the guest is at the end of a trip: as it was, and its counter has not gone back."""
            nonlocal before
            guest = await stack.enter_async_context(attached(target))
            await each_works(guest)
            was, before = before, await counted(guest)
            assert before >= was, f"it went back from {was} to {before}"
            assert (await guest.online(), await seen(guest)) == (online, vcpus)
            return guest

        for _ in range(count(ROUND_TRIPS)):
            target = await stack.enter_async_context(
                incoming(found, qemu_binary(version, arch), arguments)
            )
            words = ["migrate", guest.qemu.qmp, target.qmp, "--timeout", str(DEADLINE), "--json"]
            if is_one_cpu:
                words += ["--agent", guest.agent, "--dest-agent", str(target.folder / "agent")]
            run = await cli(*words)
            assert run.code == 0, run.stdout + run.stderr
            assert not is_one_cpu or [text[: len(REST)] for text in run.json["messages"]] == [REST]
            guest = await arrived(target)
        if not is_one_cpu:
            run = await cli("save", guest.qemu.qmp, str(tmp_path / "saved"), "--json")
            assert run.code == 0, run.stdout + run.stderr
            target = await stack.enter_async_context(
                incoming(found, qemu_binary(version, arch), arguments)
            )
            run = await cli("restore", str(tmp_path / "saved"), target.qmp, "--json")
            assert run.code == 0, run.stdout + run.stderr
            guest = await arrived(target)
        await goes_on(guest, before)
        async with qmpvcpu.connect(qmp=guest.qemu.qmp, agent=guest.agent) as domain:
            assert (await domain.guest_vcpus()).cpus
            assert (await domain.enable(more, timeout=DEADLINE)).outcome == "applied"
            if arch != "s390x":
                assert (
                    await domain.disable([*more, *plugs[0]], timeout=DEADLINE)
                ).outcome == "applied"
                assert (await domain.enable(plugs[0], timeout=DEADLINE)).outcome == "applied"


#: All but the first CPU's, of ppc64's `KINDS`: what is said of them.
REST = "vCPU 1,6-7,20-21: offline in the guest on the way"


async def each_works(guest: Guest) -> None:
    """Every CPU that is online gets its timer's interrupts."""
    await guest.shell(
        "for c in $(seq 0 127); do [ -d /sys/devices/system/cpu/cpu$c/topology ] || continue;"
        " taskset -c $c usleep 10000 || exit 1; done",
        timeout=DEADLINE,
    )


async def seen(guest: Guest) -> str:
    """The guest's own CPUs: which are there, and where the hardware says each one is."""
    return await guest.shell(
        "cd /sys/devices/system/cpu; for c in cpu[0-9]*; do words=$c;"
        " for f in online topology/physical_package_id topology/core_id physical_id address; do"
        ' word=-; [ -e $c/$f ] && read -r word < $c/$f; words="$words $word"; done; echo $words;'
        " done",
        timeout=DEADLINE,
    )


async def goes_on(guest: Guest, before: int) -> None:

    async def has_counted():
        return await counted(guest) > before

    await until(has_counted, f"its counter is over {before}")


@matrix(ONE_CPU)
async def test_a_linux_that_would_hang_is_not_taken_away(arch, version, pool):
    box = await pool.get(arch, version, plugs=0, untouched=True)
    agents = ["--agent", box.guest.agent, "--dest-agent", "/nowhere/agent"]
    for words in (
        ["migrate", box.qmp, "/nowhere/qmp"],
        ["migrate", box.qmp, "/nowhere/qmp", *agents[:2]],
        ["migrate", box.qmp, "/nowhere/qmp", *agents[2:]],
        ["migrate-begin", box.qmp, *agents[:2]],
        ["migrate-perform", box.qmp, "unix:/nowhere/m", *agents[:2]],
        ["save", box.qmp, "/nowhere/file", *agents[:2]],
    ):
        run = await cli(*words, "--json")
        assert (
            run.code == 3
            and "no interrupt reaches any vCPU but the first" in run.json["error"]["message"]
        )
        assert (
            "--dest-agent" in run.json["error"]["hint"] and "--force" in run.json["error"]["hint"]
        )
    assert await box.guest.online() == "0-1"


@pytest.fixture
async def waiting(pool):
    """A QEMU that waits for a guest of the pool's ppc64."""
    arguments = [
        "-accel",
        "tcg,thread=multi",
        "-smp",
        POOLED["ppc64"].smp,
        "-m",
        POOLED["ppc64"].memory,
    ]
    async with incoming(image_of("ppc64le"), qemu_binary("10.0", "ppc64"), arguments) as target:
        yield target


@matrix(ONE_CPU)
async def test_an_agent_that_cannot_do_it_is_a_reason_and_all_is_online_again(
    arch, version, pool, waiting
):
    box = await pool.get(arch, version, plugs=0, untouched=True)
    there = str(waiting.folder / "agent")

    async def refused(source: str, target: str) -> str:
        run = await cli(
            "migrate", box.qmp, waiting.qmp, "--agent", source, "--dest-agent", target, "--json"
        )
        assert run.code == 3 and await box.guest.online() == "0-1", run.stdout
        return run.json["error"]["message"]

    assert "there is no agent socket '/nowhere/agent'" in await refused("/nowhere/agent", there)
    assert "there is no agent socket '/nowhere/agent'" in await refused(
        box.guest.agent, "/nowhere/agent"
    )
    await box.guest.shell(
        "echo $(sed -n 's/: sched:active//p' /sys/devices/system/cpu/hotplug/states)"
        " > /sys/devices/system/cpu/cpu1/hotplug/fail"
    )
    assert "taken offline: vCPU 1: " in await refused(box.guest.agent, there)
    await each_works(box.guest)


@matrix(ONE_CPU)
@pytest.mark.parametrize("how", ["destination killed", "cancelled", "uri"])
async def test_what_goes_on_at_the_source_has_its_cpus_again(arch, version, how, pool, waiting):
    box = await pool.get(arch, version, plugs=0, untouched=True)
    words = ["migrate", box.qmp, waiting.qmp, "--agent", box.guest.agent]
    words += ["--dest-agent", str(waiting.folder / "agent"), "--json"]
    if how == "uri":
        run = await cli(*words, "--uri", f"unix:{waiting.folder}/nowhere/m")
        assert run.code == 8, run.stdout
    else:
        process = await start_cli(*words, "--bandwidth", "1")

        async def moves():
            return (await box.guest.qemu.execute("query-migrate")).get("status") == "active"

        await until(moves, "its memory moves")
        assert await box.guest.online() == "0"
        if how == "cancelled":
            send(process, signal.SIGINT)
        else:
            waiting.kill()
        stdout, stderr = await process.communicate()
        assert process.returncode == (130 if how == "cancelled" else 8), stdout + stderr
    assert await box.guest.online() == "0-1"
    await each_works(box.guest)


@matrix(ONE_CPU)
async def test_a_destination_by_name_has_an_agent_of_its_own(arch, version, tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "s"))
    file = tmp_path / "sparse.xml"
    file.write_text(xml(arch, version, tmp_path / "shell"))
    assert (await cli("define", str(file))).code == 0
    run = await cli("start", "sparse", "--json")
    try:
        assert run.code == 0, run.stdout
        await booted(Path(run.json["console"]))
        run = await cli(
            "migrate", "sparse", "sparse2", "--persistent", "--undefine-source", "--json"
        )
        assert run.code == 0, run.stdout
        assert any("and online again" in text for text in run.json["messages"]), run.stdout
        rows = (await cli("vcpuinfo", "sparse2", "--json")).json["vcpus"]
        assert (
            [row["id"] for row in rows if row["online"]] == run.json["vcpus"] == sorted(TWO_CORES)
        )
        # Every CPU has to stop for it.
        for word in ("--disable", "--enable"):
            run = await cli("guestvcpus", "sparse2", "--cpulist", "1-3", word, "--json")
            assert run.code == 0, run.stdout
    finally:
        for name in ("sparse", "sparse2"):
            await cli("destroy", name)


@matrix(ONE_CPU)
async def test_what_stays_offline_at_the_destination_is_named(arch, version, tmp_path, monkeypatch):
    """By an agent's socket that is another one's: the guest runs there, and can be helped."""
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path))
    arguments = [
        "-accel",
        "tcg,thread=multi",
        "-smp",
        POOLED["ppc64"].smp,
        "-m",
        POOLED["ppc64"].memory,
    ]
    found = image_of("ppc64le")
    silent = await asyncio.start_unix_server(lambda reader, writer: None, tmp_path / "silent")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(silent)
        guest = await stack.enter_async_context(boot(found, qemu_binary(version, arch), arguments))
        target = await stack.enter_async_context(
            incoming(found, qemu_binary(version, arch), arguments)
        )
        agents = ["--agent", guest.agent, "--dest-agent", str(tmp_path / "silent")]
        run = await cli("migrate", guest.qemu.qmp, target.qmp, *agents, "--json")
        assert run.code == 0, run.stdout
        (message,) = run.json["messages"]
        assert (
            message.startswith("vCPU 1: offline in the guest since then")
            and "--cpulist 1 --enable" in message
        )
        guest = await stack.enter_async_context(attached(target))
        assert await guest.online() == "0"
        run = await cli(
            "guestvcpus", target.qmp, "--agent", guest.agent, "--cpulist", "1", "--enable"
        )
        assert run.code == 0 and await guest.online() == "0-1"
        await each_works(guest)
