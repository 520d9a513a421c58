"""Calls that are cancelled: before the first effect, at any await, while they undo, and a second
time.
"""

from __future__ import annotations

import asyncio

import pytest

import qmpvcpu
from tests.support.fake_guest import FakeGuest
from tests.support.fake_qemu import FakeQemu, error
from tests.support.waiting import until


async def end_of(task):
    """Its outcome, or None where it was cancelled."""
    try:
        return await task
    except asyncio.CancelledError:
        return None


async def cancelled_after(coroutine, steps):
    """A task that is cancelled after so many turns of the event loop."""
    task = asyncio.create_task(coroutine)
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    return await end_of(task)


async def test_before_the_first_effect_nothing_is_sent(running):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        assert await cancelled_after(domain.enable(1), 0) is None
    assert not qemu.changes


async def test_a_plug_is_undone_before_the_cancellation_goes_on(running):
    qemu = FakeQemu()
    held = []
    sent = asyncio.Event()
    qemu.hook = lambda connection, command: bool(
        command["execute"] == "device_add"
        and command["arguments"]["socket-id"] == 2
        and (held.append((connection, command)) or sent.set() or True)
    )
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.enable([1, 2]))
        await sent.wait()
        task.cancel()
        assert 1 in qemu.paths
        error(*held[0], "no")
        assert await end_of(task) is None
        assert set(qemu.paths) == {0}
        assert [vcpu.enabled for vcpu in await domain.vcpus()][1:] == [False] * 3


async def test_a_plug_that_was_not_answered_is_named(running):
    qemu = FakeQemu()
    sent = asyncio.Event()
    qemu.hook = lambda connection, command: (
        command["execute"] == "device_add" and (sent.set() or True)
    )
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.enable([1, 2]))
        await sent.wait()
        while not task.done():
            # The second one stops the wait for what is to be undone.
            task.cancel()
            await asyncio.wait([task], timeout=0.01)
        assert await end_of(task) is None
        assert domain.interrupted == qmpvcpu.Interrupted(unsure_ids=(1, 2))


async def test_an_undo_is_waited_for(running):  # failed on Python 3.11.0 to 3.11.2 only
    qemu = FakeQemu()
    qemu.add_errors = {2: "no"}
    qemu.on_delete = {1: "silence"}
    undoing = qemu.when_sent("device_del")
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.enable([1, 2]))
        await undoing.wait()
        task.cancel()
        looked = qemu.when_sent("query-cpus-fast", len(qemu.sent("query-cpus-fast")) + 2)
        await looked.wait()
        assert not task.done()
        qemu.let_go(1)
        assert await end_of(task) is None


async def test_a_second_cancel_stops_waiting_for_the_undo_and_it_stays_pending(running):
    qemu = FakeQemu()
    qemu.add_errors = {2: "no"}
    qemu.on_delete = {1: "silence"}
    undoing = qemu.when_sent("device_del")
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.enable([1, 2]))
        await undoing.wait()
        task.cancel()
        looked = qemu.when_sent("query-cpus-fast", len(qemu.sent("query-cpus-fast")) + 1)
        await looked.wait()
        task.cancel()
        assert await end_of(task) is None
        assert domain.pending_ids == (1,)
        assert (await domain.vcpus())[1].enabled


async def test_a_call_ends_in_cancelled_error_even_if_qemu_hangs(running):
    qemu = FakeQemu()
    qemu.hook = lambda connection, command: command["execute"] == "device_add"
    async with running(qemu, command_timeout=0.5) as domain:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await domain.enable([1])


async def test_an_unplug_stays_pending_and_the_domain_usable(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    asked = qemu.when_sent("query-cpus-fast", 3)
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.disable(1))
        await asked.wait()
        task.cancel()
        assert await end_of(task) is None
        assert domain.pending_ids == (1,)
        assert (await domain.enable(2)).outcome == "applied"


@pytest.mark.parametrize("steps", range(60))
async def test_at_any_await_a_plug_is_undone_or_done_and_never_forgotten(running, steps):
    qemu = FakeQemu(plugged=(1,))
    async with running(qemu) as domain:
        outcome = await cancelled_after(domain.enable([2, 3]), steps)
        assert set(qemu.paths) == ({0, 1} if outcome is None else {0, 1, 2, 3})
        assert domain.pending_ids == ()
        # And the domain is as good as new.
        assert (await domain.enable([2, 3])).outcome == "applied"


@pytest.mark.parametrize("steps", range(0, 60, 3))
async def test_at_any_await_an_unplug_that_was_asked_stays_pending(running, steps):
    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {1: "silence", 2: "gone"}
    async with running(qemu) as domain:
        assert await cancelled_after(domain.disable([1, 2]), steps) is None
        asked = bool(qemu.sent("device_del"))
        assert (1 in domain.pending_ids) == asked
        assert len(qemu.sent("device_del")) in (0, 2)
        if asked:
            await until(lambda: domain.pending_ids == (1,), "the other one has gone")
            assert [vcpu.enabled for vcpu in await domain.vcpus()] == [True, True, False, False]


@pytest.mark.parametrize("steps", range(0, 80, 8))
async def test_in_the_guest_the_domain_stays_usable(with_guest, steps):
    async with with_guest(FakeGuest(FakeQemu(plugged=(1,)))) as domain:
        await cancelled_after(domain.enable(2), steps)
        assert (await domain.enable(2)).outcome == "applied"
        assert (await domain.vcpu(2)).vcpu.online is True


@pytest.mark.parametrize("steps", range(1, 121, 6))
async def test_at_any_await_what_the_agent_switched_is_told(with_guest, steps):
    guest = FakeGuest(FakeQemu(plugged=(1,)))
    async with with_guest(guest) as domain:
        task = asyncio.create_task(
            domain.vcpu(1, qmpvcpu.VcpuFlag.GUEST | qmpvcpu.VcpuFlag.DISABLE)
        )
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        if await end_of(task) is None:
            assert domain.interrupted.changed_ids == (() if guest.online[1] else (1,))
            assert domain.interrupted.unsure_ids == ()


async def test_what_an_agent_that_fell_silent_was_told_is_unsure(with_guest):
    guest = FakeGuest(FakeQemu(plugged=(1,)))
    async with with_guest(guest) as domain:
        await domain.guest_vcpus()
        guest.silent = {"guest-set-vcpus"}
        task = asyncio.create_task(
            domain.vcpu(1, qmpvcpu.VcpuFlag.GUEST | qmpvcpu.VcpuFlag.DISABLE)
        )
        await until(
            lambda: "guest-set-vcpus" in [name for name, _ in guest.commands], "the agent was told"
        )
        guest.silent |= {"guest-get-vcpus", "guest-sync-delimited"}
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        assert await end_of(task) is None
        assert domain.interrupted == qmpvcpu.Interrupted(unsure_ids=(1,))
