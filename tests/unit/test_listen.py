"""`events()`: subscribed on entry, bounded, whoever did it; a lost connection and an overflow raise."""

from __future__ import annotations

import asyncio
import time

import pytest

import qmpvcpu
from qmpvcpu.core.events import changes
from qmpvcpu.core.model import Event
from tests.support.fake_qemu import FakeQemu
from tests.support.states import ppc64, x86
from tests.support.waiting import deadline, until


def told(events):
    return [(str(event.event), event.vcpus) for event in events]


async def take(events, count):
    async with deadline(f"{count} events"):
        return [await anext(events) for _ in range(count)]


def test_changes_between_two_states_one_event_a_vcpu():
    assert told(changes(x86((0, 1)), x86((0, 2)), 1.0)) == [("vcpu-removed", (1,)), ("vcpu-added", (2,))]
    assert told(changes(ppc64((0, 1)), ppc64((0,)), 1.0)) == [("vcpu-removed", (n,)) for n in (4, 5, 6, 7)]
    assert changes(x86(), x86(), 1.0) == []


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


async def test_what_others_do_is_told_though_qemu_has_no_event_for_a_plug(running):
    qemu = FakeQemu()
    async with running(qemu) as domain, domain.events() as events:
        before = time.time()
        qemu.fill(2)
        (event,) = await take(events, 1)
        assert (told([event]), before <= event.time <= time.time()) == ([("vcpu-added", (2,))], True)
        qemu.let_go(2)
        assert told(await take(events, 1)) == [("vcpu-removed", (2,))]


async def test_a_refusal_is_told_with_its_reason_whoever_asked(running):
    qemu = FakeQemu(plugged=(1,))
    async with running(qemu) as domain, domain.events() as events:
        qemu.refuse(1)
        (event,) = await take(events, 1)
        assert told([event]) == [("vcpu-removal-failed", (1,))]
        assert "eject disabled" in event.detail


async def test_a_reset_fails_what_was_pending_and_says_so(running):
    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain, domain.events() as events:
        await domain.disable(1, timeout=0)
        qemu.reset()
        (event,) = await take(events, 1)
        assert (told([event]), domain.pending_ids) == ([("vcpu-removal-failed", (1,))], ())
        assert "reset" in event.detail


async def test_a_lost_connection_raises_after_what_came_before(running):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        async with domain.events() as events:
            await domain.enable(1)
            qemu.connections[0].close()
            await until(lambda: not qemu.connections, "the connection is lost")
            assert told(await take(events, 1)) == [("vcpu-added", (1,))]
            for _ in range(2):
                with pytest.raises(qmpvcpu.VcpuConnectionError):
                    await take(events, 1)
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            await domain.events().__aenter__()
        await domain.reconnect()
        async with domain.events() as events:
            await domain.enable(2)
            assert told(await take(events, 1)) == [("vcpu-added", (2,))]


async def test_who_does_not_read_gets_what_fits_and_then_an_overflow(running):
    qemu = FakeQemu(slots=9)
    async with running(qemu) as domain, domain.events(limit=3) as slow, domain.events() as quick:
        await domain.enable(range(1, 9))
        assert len(await take(slow, 3)) == 3
        with pytest.raises(qmpvcpu.VcpuOverflow) as caught:
            await take(slow, 1)
        assert caught.value.hint
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
            assert asyncio.all_tasks() > tasks
        await until(lambda: asyncio.all_tasks() == tasks, "what looked has ended")


async def test_events_outside_or_of_no_size_make_no_sense(tmp_path):
    domain = qmpvcpu.connect(str(tmp_path / "none"))
    with pytest.raises(qmpvcpu.VcpuConnectionError):
        await domain.events().__aenter__()
    with pytest.raises(qmpvcpu.VcpuUsageError):
        domain.events(limit=0)
