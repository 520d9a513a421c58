"""The agent of real Linux guests of four architectures; new CPUs stay offline until somebody takes
them online.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

import qmpvcpu
from tests.support.commands import cli
from tests.support.guests import Kind
from tests.support.qemus import group
from tests.support.waiting import until, within

pytestmark = pytest.mark.guest

#: New CPUs stay offline.
STAY_OFFLINE = "qmpvcpu.selfonline=0"
KINDS = {
    "x86_64": Kind("2,sockets=2,cores=12,threads=2,maxcpus=48", "768", "x86_64", 40, STAY_OFFLINE),
    "ppc64": Kind("2,sockets=1,cores=20,threads=2,maxcpus=40", "768", "ppc64le", 30, STAY_OFFLINE),
    "s390x": Kind("2,maxcpus=8", "768", "s390x", 6, STAY_OFFLINE),
    "aarch64": Kind("4", "768", "arm64", 0, STAY_OFFLINE),
}
#: What is switched.
IDS = {"x86_64": [5], "ppc64": [6, 7], "s390x": [5], "aarch64": [3]}


def on(*arches):
    """One cell each, in the xdist group of its architecture."""
    return pytest.mark.parametrize(
        "arch", [pytest.param(arch, marks=group(arch, "10.0")) for arch in arches]
    )


EVERY = on(*KINDS)


@pytest.fixture
async def guest(pool, arch):
    """A guest as it booted; what a test leaves as it found it serves the next one too."""
    return (
        await pool.get(arch, "10.0", plugs=5 if arch == "x86_64" else 0, kind=KINDS[arch])
    ).guest


async def run(guest, *words, agent=True):
    found = await cli(
        "--json", *(("--agent", guest.agent) if agent else ()), words[0], guest.qemu.qmp, *words[1:]
    )
    return found.code, found.json


def csv(ids):
    return ",".join(map(str, ids))


async def online_in(guest):
    text = await guest.online()
    return qmpvcpu.parse_ids(text)


@on("s390x", "aarch64")
async def test_without_fallback_it_is_refused_and_nothing_is_done(arch, guest):
    code, found = await run(guest, "setvcpu", "1", "--disable", "--no-fallback")
    assert (code, found["outcome"]) == (3, "refused")
    code, dry = await run(guest, "setvcpu", "1", "--disable", "--dry-run")
    assert (code, dry["plan"]) == (0, [{"step": "guest-set-vcpus", "vcpus": [1], "online": False}])
    assert 1 in await online_in(guest)
    for total in (1, 2, len(await online_in(guest))):
        code, _ = await run(guest, "setvcpus", str(total), "--guest")
        assert (code, len(await online_in(guest))) == (0, total)
        _, count = await run(guest, "vcpucount", "--guest")
        assert count["count"] == total
    if arch == "s390x":
        code, never = await run(guest, "setvcpu", "5", "--enable", "--guest")
        assert (code, "not plugged" in never["error"]["message"]) == (3, True)


@on("s390x")
async def test_the_agent_of_a_guest_that_is_watched_answers_others_too(arch, pool):
    """Its socket takes one client at a time; who listens lets it go between two looks."""
    booted = await pool.get(arch, "10.0", plugs=0, kind=KINDS[arch])
    guest = booted.guest
    async with (
        qmpvcpu.connect(booted.third, agent=guest.agent) as watcher,
        watcher.events() as events,
    ):
        await watcher.state()
        for online in (0, 1):
            await guest.shell(f"echo {online} > /sys/devices/system/cpu/cpu1/online")
            event = await within(anext(events), "the watcher has looked into the guest")
            assert (event.event.value, event.vcpus) == (
                "vcpu-online" if online else "vcpu-offline",
                (1,),
            )
            code, info = await run(guest, "vcpuinfo")
            assert (code, info["vcpus"][1]["online"]) == (0, bool(online))


@EVERY
async def test_enable_ends_with_the_guest_running_on_it_and_guest_switches_it(arch, guest):
    ids, boot_ids = IDS[arch], await online_in(guest)
    code, found = await run(guest, "setvcpu", csv(ids), "--enable")
    assert (code, found["outcome"]) == (0, "applied")
    running_on = {*boot_ids, *ids}
    assert len(await online_in(guest)) == len(running_on)
    _, rows = await run(guest, "setvcpu", csv(ids))
    assert [row["online"] for row in rows["vcpus"]] == [True] * len(ids)

    code, off = await run(guest, "setvcpu", csv(ids), "--disable", "--guest")
    assert (code, off["mechanism"], off["changed_ids"]) == (0, "agent", ids)
    assert len(await online_in(guest)) == len(running_on) - len(ids)
    code, info = await run(guest, "vcpuinfo")
    assert [(r["state"], r["online"]) for r in info["vcpus"] if r["id"] in ids] == [
        ("enabled", False)
    ] * len(ids)

    # Plugged but offline is not enabled: it is taken online, without a plug.
    code, back = await run(guest, "setvcpu", csv(ids), "--enable")
    assert (code, back["mechanism"], back["changed_ids"]) == (0, "agent", ids)
    code, same = await run(guest, "setvcpu", csv(ids), "--enable")
    assert (code, same["changed"]) == (0, False)
    assert len(await online_in(guest)) == len(running_on)

    code, gone = await run(guest, "setvcpu", csv(ids), "--disable")
    hotplug = arch in ("x86_64", "ppc64")
    assert (code, gone["mechanism"], gone["changed_ids"]) == (
        0,
        "hotplug" if hotplug else "agent",
        ids,
    )
    assert any("still plugged" in message for message in gone["messages"]) is not hotplug
    assert len(await online_in(guest)) == len(running_on) - len(ids)

    code, view = await run(guest, "guestvcpus")
    assert sorted(cpu["vcpu"] for cpu in view["cpus"] if cpu["online"]) == sorted(
        running_on - set(ids)
    )
    if arch == "aarch64":
        await run(guest, "setvcpu", csv(ids), "--enable")


@on("x86_64")
async def test_ids_stay_right_though_the_guests_own_move(guest):

    async def named():
        _, view = await run(guest, "guestvcpus")
        assert not view["assumed"]
        return {cpu["vcpu"] for cpu in view["cpus"] if cpu["online"]}

    for words, vcpus in (
        (("5", "--enable"), {0, 1, 5}),
        (("3", "--enable"), {0, 1, 3, 5}),
        (("5", "--disable"), {0, 1, 3}),
        (("7", "--enable"), {0, 1, 3, 7}),
    ):
        code, _ = await run(guest, "setvcpu", *words)
        assert (code, await named()) == (0, vcpus)
    # The guest's own id of vCPU 7 is not 7; switched by the one, the other is told.
    _, view = await run(guest, "guestvcpus")
    own = next(cpu["logical_id"] for cpu in view["cpus"] if cpu["vcpu"] == 7)
    assert own != 7
    code, _ = await run(guest, "guestvcpus", "--cpulist", str(own), "--disable")
    _, rows = await run(guest, "setvcpu", "7")
    assert (code, [row["online"] for row in rows["vcpus"]]) == (0, [False])
    code, _ = await run(guest, "setvcpu", "3,7", "--disable")
    assert code == 0


@on("x86_64")
async def test_a_guest_that_refuses_to_eject_takes_it_offline_instead(guest):
    await run(guest, "setvcpu", "5", "--enable")
    await guest.shell("echo 0 > /sys/firmware/acpi/hotplug/processor/enabled")
    code, rejected = await run(guest, "setvcpu", "5", "--disable", "--no-fallback")
    assert (code, rejected["outcome"]) == (4, "rejected")
    code, found = await run(guest, "setvcpu", "5", "--disable")
    assert (code, found["outcome"], found["mechanism"]) == (0, "applied", "agent")
    assert any("eject disabled" in message for message in found["messages"])
    assert await guest.online() == "0-1"
    code, first = await run(guest, "setvcpu", "0", "--disable")
    assert (code, "cannot take vCPU 0 offline" in first["error"]["message"]) == (3, True)
    await guest.shell("echo 1 > /sys/firmware/acpi/hotplug/processor/enabled")
    code, _ = await run(guest, "setvcpu", "5", "--disable")
    assert code == 0


@on("x86_64")
async def test_an_agent_killed_between_two_calls_and_one_that_is_not_there(guest):
    # What an earlier client left half said.
    _, writer = await asyncio.open_unix_connection(guest.agent)
    writer.write(b'{"execute": "guest-get-v')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with qmpvcpu.connect(guest.qemu.qmp, agent=guest.agent) as domain:
        assert [vcpu.online for vcpu in await domain.vcpus()][:2] == [True, True]
        await guest.shell("killall qemu-ga")

        async def answers():
            return (await domain.vcpu(1)).vcpu.online is not None

        await until(answers, "the agent that was started again answers", every=0.1)
        assert domain.agent_trouble is None
    await guest.shell("killall -STOP qemu-ga")
    code, info = await run(guest, "vcpuinfo")
    assert (code, info["vcpus"][1]["online"]) == (0, None)
    code, found = await run(guest, "setvcpu", "1", "--disable", "--guest")
    assert (code, found["outcome"]) == (7, "connection")
    code, plugged = await run(guest, "setvcpu", "5", "--enable")
    assert (code, plugged["outcome"]) == (0, "applied")
    assert any("not known" in message for message in plugged["messages"])
    await guest.shell("killall -CONT qemu-ga")


@on("x86_64")
async def test_doctor_names_an_agent_that_may_not_switch_cpus(guest):
    conf = "/etc/qemu/qemu-ga.conf"
    lines = "echo '[general]'; echo block-rpcs=guest-set-vcpus"
    await guest.shell(f"mkdir -p /etc/qemu; ({lines}) > {conf}; killall qemu-ga")
    try:

        async def named():
            _, found = await run(guest, "doctor")
            # Between two agents none answers, which is named as well.
            texts = [
                text for text in found["cannot"] if text.startswith("switch vCPUs in the guest: ")
            ]
            return any("guest-set-vcpus" in text for text in texts)

        await until(named, "doctor names it")
    finally:
        await guest.shell(f"rm {conf}; killall qemu-ga")


@on("aarch64")
async def test_one_cpu_that_refuses_puts_the_others_back(arch, pool):
    kind = replace(KINDS[arch], append="qmpvcpu.refuse=2")
    guest = (await pool.get(arch, "10.0", plugs=0, kind=kind)).guest
    # The knob arms the kernel's own failure injection, which takes a moment after boot.
    await guest.shell(
        "until read -r n </sys/devices/system/cpu/cpu2/hotplug/fail && [ $n != -1 ]; do :; done"
    )
    code, found = await run(guest, "setvcpu", "1-3", "--disable", "--guest")
    assert (code, found["outcome"], found["undone"], found["changed_ids"]) == (
        4,
        "rejected",
        [1],
        [],
    )
    assert set(found["error"]["reasons"]) == {"2", "3"}
    assert "temporarily unavailable" in found["error"]["reasons"]["2"]
    assert await online_in(guest) == (0, 1, 2, 3)
    code, found = await run(guest, "setvcpu", "3", "--disable", "--guest")
    assert (code, found["changed_ids"]) == (0, [3])
