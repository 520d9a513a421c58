"""Unplugs that end while a call waits, or after it: by an event, by looking, or by another client."""

from __future__ import annotations

import asyncio

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from tests.support.fake_qemu import FakeQemu
from tests.support.waiting import until


async def pending(domain, number=1):
    """Have the unplug of this vCPU pending."""
    assert (await domain.disable(number, wait=False)).pending == (number,)


async def test_an_unplug_is_found_out_by_looking_when_its_event_was_lost(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    looked = qemu.when_sent("query-cpus-fast", 4)
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.disable(1))
        await looked.wait()
        qemu.let_go(1, tell=False)
        assert (await task).outcome == "applied"


async def test_without_an_event_both_queries_say_that_the_slot_is_empty(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "gone-silently"}
    async with running(qemu) as domain:
        await domain.disable(1)
    names = [command for command, _ in qemu.commands]
    assert names[-4:] == [
        "device_del",
        "query-cpus-fast",
        "query-hotpluggable-cpus",
        "query-cpus-fast",
    ]


async def test_a_pending_unplug_that_ends_is_over_at_the_next_look(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        await pending(domain)
        assert [vcpu.pending for vcpu in await domain.vcpus()] == [False, True, False, False]
        qemu.let_go(1)
        assert not (await domain.vcpus())[1].pending
        assert domain.pending_ids == ()


async def test_a_vcpu_that_has_gone_is_neither_enabled_nor_pending(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        await domain.disable(1, timeout=0)
        await domain.vcpus()
        qemu.let_go(1)
        vcpu = (await domain.vcpus())[1]
    assert (vcpu.enabled, vcpu.pending) == (False, False)


async def test_a_reset_drops_a_pending_unplug_of_a_pc(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        await pending(domain)
        qemu.reset()
        assert not (await domain.vcpus())[1].pending
        assert domain.pending_ids == ()


@pytest.mark.parametrize("end", ["let_go", "refuse"])
async def test_a_late_end_settles_the_pending_one_by_itself(running, end):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        await pending(domain)
        getattr(qemu, end)(1)
        await until(lambda: domain.pending_ids == (), "nothing is pending")
        assert domain.last_state.vcpus[1].enabled is (end == "refuse")


async def test_enabling_a_vcpu_that_is_leaving_waits_for_its_end_and_plugs_it_again(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        await pending(domain)
        looked = qemu.when_sent("query-cpus-fast", len(qemu.sent("query-cpus-fast")) + 2)
        task = asyncio.create_task(domain.enable(1))
        await looked.wait()
        assert not qemu.sent("device_add")
        qemu.let_go(1)
        outcome = await task
        assert (outcome.outcome, outcome.changed_ids, domain.pending_ids) == ("applied", (1,), ())
    assert len(qemu.sent("device_add")) == 1


async def test_enabling_a_vcpu_that_then_stays_is_applied_and_says_so(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        await pending(domain)
        looked = qemu.when_sent("query-cpus-fast", len(qemu.sent("query-cpus-fast")) + 2)
        task = asyncio.create_task(domain.enable(1))
        await looked.wait()
        qemu.refuse(1)
        outcome = await task
        assert (outcome.outcome, outcome.changed, domain.pending_ids) == ("applied", False, ())
    assert "did not happen" in outcome.messages[-1]


async def test_an_answer_to_an_earlier_unplug_is_not_taken_for_the_answer_to_this_one(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}

    def refuse_the_one_before(connection, command):
        if command["execute"] == "device_del" and len(qemu.sent("device_del")) == 2:
            qemu.refuse(1)

    async with running(qemu) as domain:
        await domain.disable(1, timeout=0)
        qemu.hook = refuse_the_one_before
        task = asyncio.create_task(domain.disable(1))
        # It is asked once more, to be sure; then it is looked at again and again.
        await until(lambda: len(qemu.sent("device_del")) == 3, "the third device_del")
        looks = len(qemu.sent("query-cpus-fast"))
        await until(lambda: len(qemu.sent("query-cpus-fast")) > looks + 1, "two more looks")
        assert (task.done(), domain.pending_ids) == (False, (1,))
        qemu.let_go(1)
        assert (await task).outcome == "applied"


async def test_a_refusal_in_one_packet_with_the_reply_is_the_answer_every_time(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "refused"}
    async with running(qemu) as domain:
        for _ in range(20):
            with pytest.raises(qmpvcpu.VcpuRejected, match="eject disabled"):
                await domain.disable(1)


async def test_removed_and_plugged_again_by_another_client_is_not_a_success(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.disable(1))
        await until(lambda: qemu.sent("device_del"), "device_del")
        qemu.let_go(1, tell=False)
        qemu.fill(1)
        with pytest.raises(qmpvcpu.VcpuFailed, match="another client plugged it again"):
            await task
        assert domain.pending_ids == ()


async def test_an_answer_while_it_is_asked_whether_the_guest_runs_ends_an_unplug(running):
    qemu = FakeQemu(8, plugged=(1, 2))
    qemu.on_delete = {2: "silence"}
    async with running(qemu) as domain:
        await domain.vcpus()
        qemu.hook = lambda connection, command: (
            command["execute"] == "query-status" and qemu.refuse(2)
        )
        assert (await domain.disable(2, wait=False)).outcome == "requested"
        await until(lambda: domain.pending_ids == (), "nothing is pending")


async def test_under_kvm_an_unplug_rests_on_the_cached_state_and_its_end_is_seen(running):
    qemu = FakeQemu(8, plugged=(1, 2, 3, 4))
    async with running(qemu) as domain:
        for call, count in ((domain.disable([3, 4]), 2), (domain.set_vcpus(2), 1)):
            await domain.vcpus()
            qemu.commands.clear()
            assert len((await call).changed_ids) == count
            # Whether the guest has left legacy mode is asked once.
            sent = [name for name, _ in qemu.commands if name != "qom-get"]
            assert sent == ["device_del"] * count + ["query-cpus-fast"]
    assert set(qemu.paths) == {0, 1}


@pytest.mark.parametrize(
    ("kvm", "call"),
    [
        (False, lambda d: d.disable(2)),
        (True, lambda d: d.set_vcpus(5)),
        (True, lambda d: d.set_vcpus(2, atomic=True)),
        (True, lambda d: d.numa_node(0, VcpuFlag.DISABLE)),
    ],
    ids=["tcg", "up", "atomic", "node"],
)
async def test_else_the_state_is_read_before_anything_is_done(running, kvm, call):
    qemu = FakeQemu(8, plugged=(1, 2), kvm=kvm)
    async with running(qemu) as domain:
        await domain.vcpus()
        qemu.commands.clear()
        try:
            await call(domain)
        except qmpvcpu.VcpuRefused as refused:
            assert "NUMA" in refused.message
    assert qemu.commands[0][0] == "query-cpus-fast"


@pytest.mark.parametrize("word", ["running", "paused"])
@pytest.mark.parametrize("call", ["enable", "disable", "up", "down"])
async def test_what_was_migrated_stays_refused_whatever_was_read_of_it_meanwhile(
    running, call, word
):
    """A guest that runs is stopped before it leaves, and an event tells; one that is paused leaves
    unheard.
    """
    qemu = FakeQemu(8, plugged=(1, 2))
    qemu.status = word
    async with running(qemu) as domain:
        await domain.vcpus()
        qemu.status = "postmigrate"
        for connection in qemu.connections if word == "running" else ():
            connection.event("STOP")
        # What it answers next stands behind the event.
        await domain.vcpus()
        calls = {
            "enable": lambda: domain.enable(3),
            "disable": lambda: domain.disable(2),
            "up": lambda: domain.set_vcpus(4),
            "down": lambda: domain.set_vcpus(2),
        }
        for _ in range(2):
            with pytest.raises(qmpvcpu.VcpuRefused, match="has migrated"):
                await calls[call]()
    assert not qemu.changes


async def test_between_two_retries_the_guest_has_time(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "refused"}
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuRejected):
            await domain.disable(1, retry=1000, timeout=1)
    # A guest that is asked without a pause refuses thousands of times a second.
    assert 1 < len(qemu.sent("device_del")) < 10
