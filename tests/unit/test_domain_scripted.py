"""Whole calls on a scripted QEMU: what the caller gets, what QEMU was sent, and what the slots are afterwards."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from qmpvcpu.domain.locate import Place
from tests.unit.fake_qemu import BOOT_PATH, FakeQemu, error
from tests.unit.fake_qmp import answering, serve


@pytest.fixture
def running(tmp_path):
    @asynccontextmanager
    async def start(qemu, **options):
        async with serve(tmp_path, qemu.script) as path, qmpvcpu.connect(path, **options) as domain:
            yield domain

    return start


def when_sent(qemu, name, count=1):
    """An Event that is set once QEMU has read that many commands of this name."""
    reached = asyncio.Event()
    before = qemu.hook

    def hook(connection, command):
        if len(qemu.sent(name)) >= count:
            reached.set()
        return before(connection, command)

    qemu.hook = hook
    return reached


async def test_plugs_go_out_with_the_slots_props_and_our_device_id(running):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        outcome = await domain.enable([3, 1])
    assert (outcome.outcome, outcome.changed_ids, outcome.mechanism) == ("applied", (1, 3), "hotplug")
    assert [row.enabled for row in outcome.rows] == [True, True]
    assert qemu.sent("device_add") == [
        {"driver": "t-cpu", "id": f"vcpu{n}", "socket-id": n, "core-id": 0, "thread-id": 0} for n in (1, 3)
    ]


async def test_what_is_so_already_is_applied_and_unchanged(running):
    qemu = FakeQemu(plugged=(1,))
    async with running(qemu) as domain:
        for outcome in (await domain.enable([0, 1]), await domain.disable(2)):
            assert (outcome.outcome, outcome.changed, outcome.mechanism) == ("applied", False, None)
    assert not qemu.sent("device_add") + qemu.sent("device_del")


async def test_a_refused_call_sends_nothing_and_gives_every_reason(running):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused) as caught:
            await domain.disable([0, 9])
    assert [refusal.code for refusal in caught.value.refusals] == ["range", "boot-cpu"]
    assert not qemu.sent("device_del")


@pytest.mark.parametrize("flag", [VcpuFlag.CONFIG, VcpuFlag.GUEST])
async def test_what_this_connection_cannot_serve_is_refused_for_queries_and_changes(running, flag):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        for wanted in (flag, flag | VcpuFlag.ENABLE):
            with pytest.raises(qmpvcpu.VcpuRefused):
                await domain.vcpu(1, wanted)
    assert not qemu.sent("device_add")


async def test_a_failing_plug_undoes_the_others_by_path_and_looks_again(running):
    qemu = FakeQemu()
    qemu.add_errors = {2: "Duplicate device ID 'vcpu2'"}
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuFailed) as caught:
            await domain.enable([1, 2, 3])
        assert set(qemu.paths) == {0}
        assert [vcpu.enabled for vcpu in await domain.vcpus()] == [True, False, False, False]
    failure = caught.value
    assert (failure.undone, failure.changed_ids, failure.qmp_class) == ((1, 3), (), "GenericError")
    assert failure.qmp_text == "Duplicate device ID 'vcpu2'"
    assert failure.hint
    assert [a["id"] for a in qemu.sent("device_del")] == ["/machine/peripheral/vcpu1", "/machine/peripheral/vcpu3"]


@pytest.mark.parametrize("how", ["refused", "error"])
async def test_an_undo_that_does_not_succeed_is_partial_and_names_what_stays(running, how):
    qemu = FakeQemu()
    qemu.add_errors = {2: "no"}
    qemu.on_delete = {1: how}
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuPartial) as caught:
            await domain.enable([1, 2])
    assert (caught.value.remaining, caught.value.changed_ids, caught.value.undone) == ((1,), (1,), ())
    assert 1 in qemu.paths


async def test_an_undo_is_not_tried_where_it_is_known_to_kill_qemu(running):
    qemu = FakeQemu(plugged=(3,), kvm=False)
    qemu.one_thread = True
    qemu.add_errors = {2: "no"}
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuPartial, match="qemu_thread_join") as caught:
            await domain.enable([1, 2])
    assert caught.value.remaining == (1,)
    assert not qemu.sent("device_del")


@pytest.mark.parametrize("how", ["gone", "gone-silently"])
async def test_an_unplug_is_done_when_the_slot_is_empty_with_an_event_or_without(running, how):
    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {1: how, 2: how}
    async with running(qemu) as domain:
        outcome = await domain.disable([1, 2])
        assert domain.pending_ids == ()
    assert (outcome.outcome, outcome.changed_ids) == ("applied", (1, 2))
    assert [a["id"] for a in qemu.sent("device_del")] == ["vcpu1", "vcpu2"]


async def test_an_unplug_is_found_out_by_looking_when_its_event_was_lost(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    looked = when_sent(qemu, "query-cpus-fast", 4)
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.disable(1))
        await looked.wait()
        qemu.let_go(1, tell=False)
        assert (await task).outcome == "applied"


async def test_a_guest_that_refuses_is_rejected_with_its_reason_and_nothing_stays_pending(running):
    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {1: "refused"}
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuRejected) as caught:
            await domain.disable([1, 2])
        assert domain.pending_ids == ()
    assert "eject disabled" in caught.value.reasons[1]
    assert caught.value.changed_ids == (2,)


@pytest.mark.parametrize("timeout", [0, 0.1])
async def test_an_unplug_that_has_not_ended_at_the_deadline_is_pending(running, timeout):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    qemu.status = "paused"
    async with running(qemu) as domain:
        outcome = await domain.disable(1, timeout=timeout)
        assert (outcome.outcome, outcome.pending, outcome.changed) == ("pending", (1,), False)
        assert "paused" in outcome.messages[-1]
        assert domain.pending_ids == (1,)
        assert [vcpu.pending for vcpu in await domain.vcpus()] == [False, True, False, False]
        qemu.let_go(1)
        assert not (await domain.vcpus())[1].pending
        assert domain.pending_ids == ()


async def test_without_waiting_an_unplug_is_requested(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        outcome = await domain.disable(1, wait=False)
        assert (outcome.outcome, outcome.pending, domain.pending_ids) == ("requested", (1,), (1,))


async def test_a_reset_drops_a_pending_unplug_of_a_pc(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        await domain.disable(1, wait=False)
        qemu.connections[0].event("RESET", guest=False)
        assert not (await domain.vcpus())[1].pending
        assert domain.pending_ids == ()


async def test_enabling_a_vcpu_that_is_leaving_waits_for_its_end_and_plugs_it_again(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        await domain.disable(1, wait=False)
        looked = when_sent(qemu, "query-cpus-fast", len(qemu.sent("query-cpus-fast")) + 2)
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
        await domain.disable(1, wait=False)
        looked = when_sent(qemu, "query-cpus-fast", len(qemu.sent("query-cpus-fast")) + 2)
        task = asyncio.create_task(domain.enable(1))
        await looked.wait()
        qemu.refuse(1)
        outcome = await task
        assert (outcome.outcome, outcome.changed, domain.pending_ids) == ("applied", False, ())
    assert "did not happen" in outcome.messages[-1]


async def test_enabling_a_vcpu_that_does_not_leave_in_time_is_pending(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        await domain.disable(1, wait=False)
        outcome = await domain.enable(1, timeout=0.05)
        assert (outcome.outcome, domain.pending_ids) == ("pending", (1,))
    assert not qemu.sent("device_add")


async def test_an_error_of_device_del_is_failed_and_leaves_nothing_pending(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "error"}
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuFailed, match="not supported device type") as caught:
            await domain.disable(1)
        assert domain.pending_ids == ()
    assert "kernel has booted" in caught.value.hint


async def test_a_connection_lost_in_the_middle_says_how_far_it_came(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "close"}
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="vCPU 1: device_del sent") as caught:
            await domain.disable(1)
        assert caught.value.reason == "closed"
        assert domain.pending_ids == (1,)
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            await domain.vcpus()
        qemu.paths.pop(1)
        await domain.reconnect()
        assert not (await domain.vcpus())[1].enabled
        assert domain.pending_ids == ()


async def test_a_cancelled_plug_is_undone_before_the_cancellation_goes_on(running):
    qemu = FakeQemu()
    held = []
    qemu.hook = lambda connection, command: bool(
        command["execute"] == "device_add"
        and command["arguments"]["socket-id"] == 2
        and (held.append((connection, command)) or sent.set() or True)
    )
    sent = asyncio.Event()
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.enable([1, 2]))
        await sent.wait()
        task.cancel()
        assert 1 in qemu.paths
        error(*held[0], "no")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert set(qemu.paths) == {0}
        assert [vcpu.enabled for vcpu in await domain.vcpus()][1:] == [False] * 3


async def test_a_plug_that_was_not_answered_when_it_was_cancelled_is_named(running):
    qemu = FakeQemu()
    qemu.hook = lambda connection, command: command["execute"] == "device_add" and (sent.set() or True)
    sent = asyncio.Event()
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.enable([1, 2]))
        await sent.wait()
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.05)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert domain.interrupted == qmpvcpu.Interrupted(unsure_ids=(1, 2)) and domain.pending_ids == ()


async def test_a_second_cancel_stops_waiting_for_the_undo_and_it_stays_pending(running):
    qemu = FakeQemu()
    qemu.add_errors = {2: "no"}
    qemu.on_delete = {1: "silence"}
    undoing = when_sent(qemu, "device_del")
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.enable([1, 2]))
        await undoing.wait()
        task.cancel()
        looks = len(qemu.sent("query-cpus-fast"))
        looked = when_sent(qemu, "query-cpus-fast", looks + 1)
        await looked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert domain.pending_ids == (1,)
        assert (await domain.vcpus())[1].enabled


async def test_a_cancelled_unplug_stays_pending_and_the_domain_usable(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    asked = when_sent(qemu, "query-cpus-fast", 3)
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.disable(1))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert domain.pending_ids == (1,)
        assert (await domain.enable(2)).outcome == "applied"


async def test_cancelled_before_the_first_effect_nothing_is_sent(running):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.enable(1))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not qemu.sent("device_add")


async def test_operations_on_one_domain_queue(running):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        first, second, third = await asyncio.gather(domain.enable(1), domain.disable(1), domain.enable(1))
    assert [outcome.changed for outcome in (first, second, third)] == [True, True, True]
    changes = [name for name, _ in qemu.commands if name.startswith("device_")]
    assert changes == ["device_add", "device_del", "device_add"]


async def test_a_cpu_that_another_client_removes_between_two_queries_is_asked_for_again(running):
    qemu = FakeQemu(plugged=(1,))

    def hook(connection, command):
        # Gone between the answer to the first query and the second.
        if command["execute"] == "query-cpus-fast":
            qemu.paths.pop(1, None)

    async with running(qemu) as domain:
        qemu.hook = hook
        assert [vcpu.enabled for vcpu in await domain.vcpus()] == [True, False, False, False]


async def test_replies_that_never_agree_end_in_an_error_and_not_in_a_loop(running):
    qemu = FakeQemu(plugged=(1,))
    async with running(qemu) as domain:
        qemu.hook = lambda connection, command: (
            command["execute"] == "query-cpus-fast" and connection.reply(command, []) is None
        )
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="do not agree") as caught:
            await domain.vcpus()
    assert caught.value.hint


async def test_of_several_addresses_the_first_that_answers_is_taken(tmp_path):
    async with serve(tmp_path, FakeQemu().script) as path:
        async with qmpvcpu.connect(qmp=[str(tmp_path / "nowhere"), path]) as domain:
            assert len(await domain.vcpus()) == 4
    with pytest.raises(qmpvcpu.VcpuConnectionError, match="no QMP address answers"):
        async with qmpvcpu.connect(qmp=[str(tmp_path / "nowhere"), str(tmp_path / "neither")]):
            pass


async def test_a_domain_is_entered_once_and_useless_outside(running):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        assert "connected" in repr(domain)
        with pytest.raises(qmpvcpu.VcpuUsageError):
            await domain.__aenter__()
    assert "closed" in repr(domain)
    for call in (domain.vcpus(), domain.enable(1), domain.vcpu(1)):
        with pytest.raises(qmpvcpu.VcpuConnectionError) as caught:
            await call
        assert caught.value.reason == "closed"


async def test_a_server_that_knows_no_command_is_no_domain(tmp_path):
    script = answering(lambda connection, command: error(connection, command, "what?", "CommandNotFound"))
    async with serve(tmp_path, script) as path:
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="query-target") as caught:
            async with qmpvcpu.connect(path):
                pass
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
async def test_a_timeout_that_makes_no_sense_is_usage(running, timeout):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuUsageError):
            await domain.enable(1, timeout=timeout)


@pytest.mark.parametrize("ids", [[], ["1"], [True], [1.0], "1"])
async def test_ids_that_are_no_integers_are_usage(running, ids):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuUsageError):
            await domain.enable(ids)


async def until(condition, seconds=5.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def test_an_answer_to_an_earlier_unplug_is_not_taken_for_the_answer_to_this_one(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}

    def refuse_the_one_before(connection, command):
        if command["execute"] == "device_del" and len(qemu.sent("device_del")) == 2:
            qemu.refuse(1)

    async with running(qemu) as domain:
        assert (await domain.disable(1, timeout=0)).outcome == "pending"
        qemu.hook = refuse_the_one_before
        task = asyncio.create_task(domain.disable(1))
        await until(lambda: len(qemu.sent("device_del")) == 3)  # asked once more, to be sure
        await asyncio.sleep(0.05)
        assert (task.done(), domain.pending_ids) == (False, (1,))
        qemu.let_go(1)
        assert (await task).outcome == "applied"


async def test_a_refusal_in_one_packet_with_the_reply_is_the_answer(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "refused"}
    async with running(qemu) as domain:
        for _ in range(20):
            with pytest.raises(qmpvcpu.VcpuRejected, match="eject disabled"):
                await domain.disable(1)


async def test_retry_asks_again_until_the_guest_lets_go(running):
    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {1: "refused"}

    def give_in(connection, command):
        if len(qemu.sent("device_del")) == 4:
            qemu.on_delete = {}

    qemu.hook = give_in
    async with running(qemu) as domain:
        outcome = await domain.disable([1, 2], retry=5)
    assert (outcome.outcome, outcome.changed_ids) == ("applied", (1, 2))
    assert [a["id"] for a in qemu.sent("device_del")] == ["vcpu1", "vcpu2", "vcpu1", "vcpu1"]


async def test_retries_end_with_the_deadline_as_the_rejection_they_were(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "refused"}
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuRejected):
            await domain.disable(1, retry=1000, timeout=0.6)
        assert domain.pending_ids == ()
    assert len(qemu.sent("device_del")) in (2, 3)


@pytest.mark.parametrize("atomic", [False, True])
async def test_atomic_brings_back_what_was_removed_when_the_guest_keeps_one(running, atomic):
    qemu = FakeQemu(plugged=(1, 2, 3))
    qemu.on_delete = {2: "refused"}
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuRejected) as caught:
            await domain.disable([1, 2, 3], atomic=atomic)
        enabled = [vcpu.id for vcpu in await domain.vcpus() if vcpu.enabled]
    assert enabled == ([0, 1, 2, 3] if atomic else [0, 2])
    assert caught.value.undone == ((1, 3) if atomic else ())
    assert caught.value.changed_ids == (() if atomic else (1, 3))


async def test_atomic_that_cannot_bring_back_is_partial_and_names_it(running):
    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {2: "refused"}
    qemu.add_errors = {1: "no more"}
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuPartial, match="1 is removed and stays so") as caught:
            await domain.disable([1, 2], atomic=True)
    assert (caught.value.remaining, caught.value.changed_ids) == ((1,), (1,))


async def test_atomic_and_async_exclude_each_other(running):
    qemu = FakeQemu(plugged=(1,))
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match="exclude"):
            await domain.disable(1, atomic=True, wait=False)
    assert not qemu.sent("device_del")


async def test_removed_and_plugged_again_by_another_client_is_no_success(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.disable(1))
        await until(lambda: qemu.sent("device_del"))
        qemu.let_go(1, tell=False)
        qemu.fill(1)
        with pytest.raises(qmpvcpu.VcpuFailed, match="another client plugged it again"):
            await task
        assert domain.pending_ids == ()


async def test_a_late_removal_settles_the_pending_one_by_itself(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        assert (await domain.disable(1, timeout=0)).outcome == "pending"
        qemu.let_go(1)
        await until(lambda: domain.pending_ids == ())
        assert not domain.last_state.vcpus[1].enabled


async def test_a_late_refusal_settles_the_pending_one_by_itself(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        assert (await domain.disable(1, timeout=0)).outcome == "pending"
        qemu.refuse(1)
        await until(lambda: domain.pending_ids == ())
        assert (await domain.enable(1)).changed is False


def test_the_same_call_by_flags_and_by_name_is_the_same_request():
    made = []

    class Recorder(qmpvcpu.Domain):
        async def request(self, request):
            made.append(request)

    async def both():
        domain = Recorder(Place("d", ("d",)), None)
        flags = VcpuFlag.ENABLE | VcpuFlag.LIVE | VcpuFlag.CORE
        await domain.vcpu(5, flags, timeout=3, atomic=True)
        await domain.enable(5, live=True, core=True, timeout=3, atomic=True)
        await domain.vcpu(1, VcpuFlag.DISABLE | VcpuFlag.NUMA_NODE, count=2)
        await domain.numa_node(1, VcpuFlag.DISABLE, count=2)
        with pytest.raises(TypeError, match="unexpected keyword argument 'sooner'"):
            await domain.enable(5, sooner=True)

    asyncio.run(both())
    assert (made[0], made[2]) == (made[1], made[3])


@pytest.mark.parametrize("steps", range(60))
async def test_cancelled_at_any_await_a_plug_is_undone_or_done_and_never_forgotten(running, steps):
    qemu = FakeQemu(plugged=(1,))
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.enable([2, 3]))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        try:
            outcome = await task
        except asyncio.CancelledError:
            assert set(qemu.paths) == {0, 1}
        else:
            assert (outcome.outcome, set(qemu.paths)) == ("applied", {0, 1, 2, 3})
        assert domain.pending_ids == ()
        # And the domain is as good as new.
        assert (await domain.enable([2, 3])).outcome == "applied"


@pytest.mark.parametrize("steps", range(0, 60, 3))
async def test_cancelled_at_any_await_an_unplug_that_was_asked_stays_pending(running, steps):
    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {1: "silence", 2: "gone"}
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.disable([1, 2]))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        asked = bool(qemu.sent("device_del"))
        assert (1 in domain.pending_ids) == asked
        assert len(qemu.sent("device_del")) in (0, 2)
        if asked:
            await until(lambda: domain.pending_ids == (1,))
            assert [vcpu.enabled for vcpu in await domain.vcpus()] == [True, True, False, False]


async def test_a_plan_touches_nothing_and_says_what_would_be_sent(running):
    qemu = FakeQemu(plugged=(1,))
    async with running(qemu) as domain:
        plan = await domain.plan_enable([1, 2])
        assert [step["arguments"]["id"] for step in plan.steps] == ["vcpu2"]
        assert (plan.unchanged, (await domain.plan_disable(0)).refusals[0].code) == ((1,), "boot-cpu")
    assert set(qemu.paths) == {0, 1}
    assert qemu.paths[0] == BOOT_PATH


def names_of(qemu):
    return [command for command, _ in qemu.commands]


async def test_under_kvm_an_unplug_of_ids_or_down_to_a_count_rests_on_what_is_held(running):
    qemu = FakeQemu(8, plugged=(1, 2, 3, 4))
    async with running(qemu) as domain:
        for call, asked in ((domain.disable([3, 4]), 2), (domain.set_vcpus(2), 1)):
            await domain.vcpus()
            qemu.commands.clear()
            outcome = await call
            assert len(outcome.changed_ids) == asked
            # And what became of it is always seen.
            assert names_of(qemu) == ["device_del"] * asked + ["query-cpus-fast"]
    assert set(qemu.paths) == {0, 1}


@pytest.mark.parametrize("work", ["tcg", "up", "atomic", "node"])
async def test_else_it_is_looked_at_before_anything_is_done(running, work):
    qemu = FakeQemu(8, plugged=(1, 2), kvm=work != "tcg")
    async with running(qemu) as domain:
        await domain.vcpus()
        qemu.commands.clear()
        match work:
            case "tcg":
                await domain.disable(2)
            case "up":
                await domain.set_vcpus(5)
            case "atomic":
                await domain.set_vcpus(2, atomic=True)
            case _:
                with pytest.raises(qmpvcpu.VcpuRefused):
                    await domain.numa_node(0, VcpuFlag.DISABLE)
    assert names_of(qemu)[0] == "query-cpus-fast"


async def test_a_count_goes_on_where_another_client_has_plugged_unheard(running):
    qemu = FakeQemu(8, plugged=(1, 2, 3))
    async with running(qemu) as domain:
        await domain.vcpus()
        qemu.fill(6)
        qemu.fill(5)
        outcome = await domain.set_vcpus(2)
        assert sum(row.enabled for row in await domain.vcpus()) == 2
    assert (outcome.outcome, outcome.changed_ids, outcome.ids) == ("applied", (2, 3, 5, 6), (2, 3, 5, 6))
    assert [(row.id, row.enabled) for row in outcome.rows] == [(n, False) for n in (2, 3, 5, 6)]
    assert set(qemu.paths) == {0, 1}


async def test_and_what_it_had_done_before_that_failed_is_told(running):
    qemu = FakeQemu(8, plugged=(1, 2, 3))
    qemu.on_delete = {6: "refused"}
    async with running(qemu) as domain:
        await domain.vcpus()
        qemu.fill(6)
        with pytest.raises(qmpvcpu.VcpuRejected) as caught:
            await domain.set_vcpus(2)
    assert (caught.value.ids, caught.value.changed_ids) == ((2, 3, 6), (2, 3))


async def test_and_where_the_rest_is_refused_it_is_partial(running):
    qemu = FakeQemu(8, plugged=(1, 2, 3))

    def leave(connection, command):
        if command["execute"] == "device_del":
            qemu.status = "postmigrate"

    async with running(qemu) as domain:
        await domain.vcpus()
        qemu.fill(6)
        qemu.hook = leave
        with pytest.raises(qmpvcpu.VcpuPartial, match="migrated away; vCPU 2-3 stays changed") as caught:
            await domain.set_vcpus(2)
    assert (caught.value.remaining, caught.value.changed_ids, caught.value.ids) == ((2, 3), (2, 3), (2, 3, 6))


async def test_a_guest_that_was_migrated_away_is_refused_time_and_again(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.status = "postmigrate"
    async with running(qemu) as domain:
        for call in (domain.enable, domain.disable, domain.enable, domain.disable):
            with pytest.raises(qmpvcpu.VcpuRefused, match="migrated away"):
                await call(1 if call == domain.disable else 2)
    assert not qemu.sent("device_add") + qemu.sent("device_del")


async def test_an_unplug_whose_event_is_lost_is_seen_before_long(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "gone-silently"}
    async with running(qemu) as domain:
        outcome = await domain.disable(1)
    assert outcome.outcome == "applied"
    # With no DEVICE_DELETED both are asked: the slot must be empty.
    assert names_of(qemu)[-4:] == ["device_del", "query-cpus-fast", "query-hotpluggable-cpus", "query-cpus-fast"]


@pytest.mark.parametrize("word", ["running", "paused"])
@pytest.mark.parametrize("call", ["enable", "disable", "up", "down"])
async def test_what_has_left_stays_refused_whatever_was_read_of_it_meanwhile(running, call, word):
    """A guest that runs is stopped before it leaves; one that is paused leaves unheard."""
    qemu = FakeQemu(8, plugged=(1, 2))
    qemu.status = word
    async with running(qemu) as domain:
        await domain.vcpus()
        qemu.status = "postmigrate"
        for connection in qemu.connections if word == "running" else ():
            connection.event("STOP")
        await asyncio.sleep(0.02)
        await domain.vcpus()
        calls = {
            "enable": lambda: domain.enable(3),
            "disable": lambda: domain.disable(2),
            "up": lambda: domain.set_vcpus(4),
            "down": lambda: domain.set_vcpus(2),
        }
        with pytest.raises(qmpvcpu.VcpuRefused, match="migrated away"):
            await calls[call]()
    assert not qemu.sent("device_add") + qemu.sent("device_del")


@pytest.mark.parametrize("call", ["ids", "count"])
async def test_what_goes_while_we_connect_is_heard(running, call):
    qemu = FakeQemu(8, plugged=(1, 2, 3))

    def hook(connection, command):
        if command["execute"] == "query-status" and 1 in qemu.paths:
            qemu.let_go(1)

    qemu.hook = hook
    async with running(qemu) as domain:
        outcome = await (domain.disable(1) if call == "ids" else domain.set_vcpus(3))
    assert (outcome.changed, set(qemu.paths)) == (False, {0, 2, 3})


async def test_a_count_that_fails_after_it_went_on_is_partial(running):
    qemu = FakeQemu(8, plugged=(1, 2, 3))
    qemu.on_delete = {6: "error"}
    async with running(qemu) as domain:
        await domain.vcpus()
        qemu.fill(6)
        with pytest.raises(qmpvcpu.VcpuPartial) as caught:
            await domain.set_vcpus(2)
    assert (caught.value.changed_ids, caught.value.remaining) == ((2, 3), (2, 3))


async def test_of_a_count_that_went_on_what_has_gone_meanwhile_is_not_pending(running):
    qemu = FakeQemu(8, plugged=(1, 2, 3))
    qemu.on_delete = dict.fromkeys((2, 3, 6), "silence")

    def hook(connection, command):
        if command["execute"] == "query-status" and len(qemu.sent("device_del")) == 2:
            for slot in {2, 3}.intersection(qemu.paths):
                qemu.let_go(slot)

    async with running(qemu) as domain:
        await domain.vcpus()
        qemu.fill(6)
        qemu.hook = hook
        outcome = await domain.set_vcpus(2, wait=False)
        assert domain.pending_ids == outcome.pending == (6,)
    assert (outcome.outcome, outcome.changed_ids, outcome.ids) == ("requested", (2, 3), (2, 3, 6))
    assert [row.enabled for row in outcome.rows] == [False, False, True]


async def test_an_answer_while_it_is_asked_whether_the_guest_runs_ends_an_unplug(running):
    qemu = FakeQemu(8, plugged=(1, 2))
    qemu.on_delete = {2: "silence"}
    async with running(qemu) as domain:
        await domain.vcpus()
        qemu.hook = lambda connection, command: command["execute"] == "query-status" and qemu.refuse(2)
        assert (await domain.disable(2, wait=False)).outcome == "requested"
        async with asyncio.timeout(0.5):
            while domain.pending_ids:
                await asyncio.sleep(0.005)
