"""`events()`: subscribed on entry, bounded, whoever did it; a lost connection and an overflow
raise.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager

import pytest

import qmpvcpu
from qmpvcpu import Event
from qmpvcpu.cli import render
from tests.support.fake_qemu import FakeQemu
from tests.support.fake_qmp import serve
from tests.support.slots import Slot, changed
from tests.support.waiting import deadline, until


@pytest.fixture
def running(tmp_path):
    @asynccontextmanager
    async def start(qemu):
        async with serve(tmp_path, qemu.script) as path, qmpvcpu.connect(path) as domain:
            yield domain

    return start


def told(events):
    return [(str(event.event), event.vcpus) for event in events]


async def take(events, count):
    async with deadline(f"{count} events"):
        return [await anext(events) for _ in range(count)]


def x86(*plugged):
    return [
        Slot((n,), *((f"/machine/peripheral/vcpu{n}", 100 + n) if n in plugged else ()))
        for n in range(3)
    ]


def ppc64(*plugged):
    """Cores of four threads."""
    firsts = (0, 4, 8)
    return [
        Slot((n, n + 1, n + 2, n + 3), *((f"/c{n}", 100 + n) if n in plugged else ()))
        for n in firsts
    ]


@pytest.mark.parametrize(
    ("before", "after", "events"),
    [
        (x86(0, 1), x86(0, 2), [("vcpu-removed", (1,)), ("vcpu-added", (2,))]),
        (ppc64(0, 4), ppc64(0), [("vcpu-removed", (n,)) for n in (4, 5, 6, 7)]),
        (x86(0, 1), x86(0, 1), []),
    ],
    ids=["one goes, one comes", "a core goes", "nothing"],
)
def test_changes_between_two_states_one_event_a_vcpu(before, after, events):
    assert changed(before, after) == events


def test_an_event_as_json():
    event = Event(1.5, qmpvcpu.EventKind.REMOVED, (5,), "why")
    assert event.to_json() == {"time": 1.5, "event": "vcpu-removed", "vcpus": [5], "detail": "why"}


async def test_what_we_do_ourselves_is_told(running):
    qemu = FakeQemu(plugged=(1,))
    async with running(qemu) as domain, domain.events(steps=True) as events:
        await domain.enable([2, 3])
        await domain.disable(1)
        assert told(await take(events, 4)) == [
            ("vcpu-added", (2,)),
            ("vcpu-added", (3,)),
            ("unplug-requested", (1,)),
            ("vcpu-removed", (1,)),
        ]


async def test_what_others_plug_is_told_though_qemu_has_no_event_for_it(running):
    qemu = FakeQemu()
    async with running(qemu) as domain, domain.events() as events:
        qemu.fill(2)
        assert told(await take(events, 1)) == [("vcpu-added", (2,))]


async def test_what_others_plug_is_told_with_its_time(running):
    qemu = FakeQemu()
    async with running(qemu) as domain, domain.events() as events:
        before = time.time()
        qemu.fill(2)
        (event,) = await take(events, 1)
        assert before <= event.time <= time.time()


async def test_what_others_unplug_is_told(running):
    qemu = FakeQemu(plugged=(2,))
    async with running(qemu) as domain, domain.events() as events:
        qemu.let_go(2)
        assert told(await take(events, 1)) == [("vcpu-removed", (2,))]


async def test_a_refusal_is_told_with_its_reason_whoever_asked(running):
    qemu = FakeQemu(plugged=(1,))
    async with running(qemu) as domain, domain.events() as events:
        qemu.refuse(1)
        (event,) = await take(events, 1)
        assert (told([event]), "eject disabled" in event.detail) == (
            [("vcpu-removal-failed", (1,))],
            True,
        )


@pytest.fixture
async def after_reset(running):
    """A domain whose pending unplug a reset has dropped, and the event that says so."""
    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain, domain.events() as events:
        await domain.disable(1, timeout=0)
        qemu.reset()
        (event,) = await take(events, 1)
        yield domain, event


async def test_a_reset_fails_what_was_pending_and_says_so(after_reset):
    _, event = after_reset
    assert (told([event]), "reset" in event.detail) == ([("vcpu-removal-failed", (1,))], True)


async def test_after_a_reset_nothing_is_pending(after_reset):
    domain, _ = after_reset
    assert domain.pending_ids == ()


@asynccontextmanager
async def cut_off(running):
    """A domain whose connection was lost after vCPU 1 was plugged, and its events."""
    qemu = FakeQemu()
    async with running(qemu) as domain, domain.events() as events, domain.events() as others:
        await domain.enable(1)
        qemu.connections[0].close()
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            # By then the domain has noticed.
            await take(others, 2)
        yield domain, events


async def test_what_came_before_a_lost_connection_is_told(running):
    async with cut_off(running) as (_, events):
        assert told(await take(events, 1)) == [("vcpu-added", (1,))]


@pytest.mark.parametrize("times", [1, 2])
async def test_a_lost_connection_raises_after_what_came_before(running, times):
    async with cut_off(running) as (_, events):
        await take(events, 1)
        for _ in range(times):
            with pytest.raises(qmpvcpu.VcpuConnectionError):
                await take(events, 1)


async def test_after_a_lost_connection_there_are_no_events(running):
    async with cut_off(running) as (domain, _):
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            await domain.events().__aenter__()


async def test_reconnected_there_are_events(running):
    async with cut_off(running) as (domain, _):
        await domain.reconnect()
        async with domain.events() as events:
            await domain.enable(2)
            assert told(await take(events, 1)) == [("vcpu-added", (2,))]


@pytest.fixture
async def crowd(running):
    """Two subscriptions after eight events: one with room for three, and one with room for all."""
    async with running(FakeQemu(slots=9)) as domain:
        async with domain.events(limit=3) as slow, domain.events() as quick:
            await domain.enable(range(1, 9))
            yield slow, quick


async def test_who_does_not_read_gets_what_fits(crowd):
    slow, _ = crowd
    assert len(await take(slow, 3)) == 3


async def test_who_does_not_read_gets_an_overflow_after_what_fits(crowd):
    slow, _ = crowd
    await take(slow, 3)
    with pytest.raises(qmpvcpu.VcpuOverflow) as caught:
        await take(slow, 1)
    assert caught.value.hint


async def test_who_has_room_gets_all_while_another_overflows(crowd):
    _, quick = crowd
    assert len(await take(quick, 8)) == 8


async def test_leaving_the_domain_ends_the_iteration(running):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        events = await domain.events().__aenter__()
        task = asyncio.create_task(anext(events, None))
        await asyncio.sleep(0)
    assert await task is None


async def test_nobody_looks_when_nobody_listens(running):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        tasks = asyncio.all_tasks()
        async with domain.events() as events:
            qemu.fill(2)
            await take(events, 1)
        await until(lambda: asyncio.all_tasks() == tasks, "what looked has ended")


def test_events_of_no_size_make_no_sense(tmp_path):
    with pytest.raises(qmpvcpu.VcpuUsageError):
        qmpvcpu.connect(str(tmp_path / "none")).events(limit=0)


# -- what comes and goes between two queries -------------------------------------------------------


@asynccontextmanager
async def watching(running, qemu):
    async with running(qemu) as domain, domain.events() as events:
        await domain.state()
        yield qemu.connections[0], events


def deleted(connection, path, device=None):
    connection.event("DEVICE_DELETED", path=path, **({} if device is None else {"device": device}))


def ost(connection, slot, source, status, device=None):
    info = {"slot-type": "CPU", "slot": str(slot), "source": source, "status": status}
    connection.event("ACPI_DEVICE_OST", info=info | ({} if device is None else {"device": device}))


#: What is said, and the vCPU that it means: by our id, by the parts that only a CPU has, by its
#: ACPI slot.
UNSEEN = {
    "by its alias in libvirt": (lambda c: c.event("DEVICE_DELETED", device="vcpu2"), (2,)),
    "by the id of its lapic": (lambda c: deleted(c, "/machine/peripheral/vcpu2/lapic"), (2,)),
    "by an id beside another": (lambda c: deleted(c, "/machine/peripheral/vcpu2-1/lapic"), (2,)),
    "a lapic of nobody known": (lambda c: deleted(c, "/machine/peripheral/mine/lapic"), ()),
    "our id on a CPU in another slot": (
        lambda c: deleted(c, "/machine/peripheral/vcpu0/lapic"),
        (),
    ),
    "a thread of a core": (lambda c: deleted(c, "/machine/peripheral/mine/thread[0]"), ()),
    "what serves its interrupts": (
        lambda c: deleted(c, "/machine/peripheral/mine/thread[0]/icp"),
        (),
    ),
    "a slot that was named with it": (
        lambda c: (ost(c, 3, 1, 0, "mine"), deleted(c, "/machine/peripheral/mine", "mine")),
        (3,),
    ),
    "the slot that is empty now": (
        lambda c: (deleted(c, "/machine/peripheral/mine/lapic"), ost(c, 3, 3, 0)),
        (3,),
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
async def test_what_no_query_has_seen_is_told_once_it_goes(running, name):
    tell, ids = UNSEEN[name]
    async with watching(running, FakeQemu()) as (connection, events):
        tell(connection)
        wanted = [("vcpu-added", ids), ("vcpu-removed", ids)] if ids else [("vcpu-removed", ())]
        assert told(await take(events, len(wanted))) == wanted


async def test_the_slot_of_a_cpu_that_has_gone_is_not_that_of_the_next_device_with_its_id(running):
    qemu = FakeQemu()
    async with watching(running, qemu) as (connection, events):
        ost(connection, 3, 3, 0x84, "mine")
        for _ in range(2):
            deleted(connection, "/machine/peripheral/mine", "mine")
        qemu.fill(1)
        wanted = [("vcpu-added", (3,)), ("vcpu-removed", (3,)), ("vcpu-added", (1,))]
        assert told(await take(events, 3)) == wanted


def test_a_line_of_watch_without_an_id():
    line = render.event(Event(1.5, qmpvcpu.EventKind.REMOVED, (), "device 'mine'"))
    assert line.partition("  ")[2] == "a vCPU: removed (device 'mine')"


async def test_what_tells_nothing_else_tells_the_device(running):
    async with watching(running, FakeQemu()) as (connection, events):
        deleted(connection, "/machine/peripheral/mine/lapic")
        (event,) = await take(events, 1)
        assert "'mine'" in event.detail


async def test_what_goes_and_comes_and_goes_between_two_queries_is_told_twice(running):
    qemu = FakeQemu(plugged=(2,))
    async with watching(running, qemu) as (connection, events):
        for _ in range(2):
            deleted(connection, "/machine/peripheral/vcpu2/lapic")
            deleted(connection, "/machine/peripheral/vcpu2", "vcpu2")
        qemu.let_go(2, tell=False)
        assert told(await take(events, 3)) == [
            ("vcpu-removed", (2,)),
            ("vcpu-added", (2,)),
            ("vcpu-removed", (2,)),
        ]


async def test_all_parts_of_a_core_are_one_removal(running):
    qemu = FakeQemu()
    async with watching(running, qemu) as (connection, events):
        for part in ("/thread[0]/icp", "/thread[0]/xive-tctx", "/thread[0]", "/thread[1]", ""):
            deleted(connection, f"/machine/peripheral/mine{part}", None if part else "mine")
        qemu.fill(1)
        assert told(await take(events, 2)) == [("vcpu-removed", ()), ("vcpu-added", (1,))]


async def test_a_removal_that_a_query_shows_is_told_once(running):
    qemu = FakeQemu(plugged=(2,))
    async with watching(running, qemu) as (connection, events):
        deleted(connection, "/machine/peripheral/vcpu2/lapic")
        qemu.let_go(2)
        qemu.fill(3)
        assert told(await take(events, 2)) == [("vcpu-removed", (2,)), ("vcpu-added", (3,))]


async def test_a_removal_that_a_query_shows_before_its_events_come_is_told_once(running):
    qemu = FakeQemu(plugged=(2,))
    async with running(qemu) as domain, domain.events() as events:
        for _ in range(2):
            qemu.let_go(2, tell=False)
            await domain.state()
            deleted(qemu.connections[0], "/machine/peripheral/vcpu2/lapic")
            await domain.state()
            qemu.fill(2)
            await domain.state()
        assert told(await take(events, 4)) == [("vcpu-removed", (2,)), ("vcpu-added", (2,))] * 2


async def test_a_late_event_of_a_cpu_itself_under_tcg_is_not_another_removal(running):
    """11.1 sends it with the next plug, to whoever listens then."""
    async with watching(running, FakeQemu(kvm=False)) as (connection, events):
        deleted(connection, "/machine/peripheral/vcpu2", "vcpu2")
        deleted(connection, "/machine/peripheral/vcpu3/lapic")
        deleted(connection, "/machine/peripheral/vcpu3", "vcpu3")
        assert told(await take(events, 2)) == [("vcpu-added", (3,)), ("vcpu-removed", (3,))]


@pytest.mark.parametrize(
    "parts",
    [
        [("/machine/peripheral/disk0", "disk0")],
        [
            ("/machine/peripheral/disk0/virtio-backend", None),
            ("/machine/peripheral/disk0", "disk0"),
        ],
        [
            ("/machine/peripheral/vcpu2/virtio-backend", None),
            ("/machine/peripheral/vcpu2", "vcpu2"),
        ],
        [("/machine/peripheral/vcpu99", "vcpu99")],
        [("/machine/peripheral/vcpu2", "vcpu2")],
        [("/machine/peripheral/vcpu0", "vcpu0")],
    ],
    ids=[
        *(
            "a disk",
            "a disk and its part",
            "another device with the id of a CPU",
            "an id that no CPU has",
        ),
        *("no more than the id of a CPU", "the id of a CPU that is there"),
    ],
)
async def test_of_what_is_no_cpu_nothing_is_told(running, parts):
    qemu = FakeQemu()
    async with watching(running, qemu) as (connection, events):
        for part in parts:
            deleted(connection, *part)
        qemu.fill(1)
        assert told(await take(events, 1)) == [("vcpu-added", (1,))]
