"""`Domain.interrupted`: what a cancelled call has left, and until when that is told."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import FrozenInstanceError

import pytest

import qmpvcpu
from qmpvcpu import Interrupted
from qmpvcpu.cli import main
from tests.support.disk import hung_disk
from tests.support.fake_qemu import FakeQemu, error
from tests.support.fake_qmp import serve
from tests.support.seams import interrupt_vcpuinfo
from tests.support.waiting import until

XML = b"""<domain type='kvm'>
  <name>d</name>
  <vcpu current='1'>4</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
</domain>
"""

FULL = Interrupted((1, 2), (3,), (4,), True)


@pytest.fixture
def running(tmp_path):
    @asynccontextmanager
    async def start(qemu, definition=None):
        async with serve(tmp_path, qemu.script) as path:
            async with qmpvcpu.connect(qmp=path, xml=definition) as domain:
                yield domain

    return start


@pytest.fixture
def definition(tmp_path):
    """Its path, in a folder of its own."""
    path = tmp_path / "definition" / "d.xml"
    path.parent.mkdir()
    path.write_bytes(XML)
    return path


async def cancelled(task):
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    return caught.value


async def hangs(disk):
    await until(disk.begun.is_set, "the disk hangs")


async def was_sent(qemu, name, count=1):
    await until(lambda: len(qemu.sent(name)) >= count, f"QEMU has read {count} {name}")


async def hung_in_the_guest(qemu, domain):
    """A disable that the guest does not answer, cancelled."""
    task = asyncio.create_task(domain.disable(1))
    await was_sent(qemu, "device_del")
    task.cancel()
    await cancelled(task)


# -- the value -------------------------------------------------------------------------------------


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError):
        FULL.pending = ()


def test_it_compares_and_pickles():
    assert pickle.loads(pickle.dumps(FULL)) == FULL != Interrupted()


def test_its_repr_says_what_is_what():
    text = (
        "Interrupted(changed_ids=(1, 2), pending=(3,), unsure_ids=(4,), definition_unsure=True,"
        " definition_written=False)"
    )
    assert repr(FULL) == text


def test_its_json_has_the_keys_of_an_interrupted_command():
    assert FULL.to_json() == {
        "changed_ids": [1, 2],
        "pending": [3],
        "unsure": [4],
        "definition_unsure": True,
        "definition_written": False,
    }


@pytest.mark.parametrize(
    ("left", "outcome"),
    [
        (Interrupted(), "failed"),
        (Interrupted(pending=(3,)), "pending"),
        (Interrupted(unsure_ids=(4,)), "pending"),
        (Interrupted(definition_unsure=True), "pending"),
        (Interrupted(definition_written=True), "partial"),
        (Interrupted(changed_ids=(1,), unsure_ids=(4,)), "partial"),
    ],
)
def test_an_interrupted_command_has_failed_only_where_nothing_may_still_change(
    left, outcome, monkeypatch, capsys
):
    interrupt_vcpuinfo(monkeypatch, left)
    monkeypatch.setattr(sys, "argv", ["qmpvcpu", "--json", "vcpuinfo", "d"])
    assert main() == 130
    assert json.loads(capsys.readouterr().out)["outcome"] == outcome


# -- when it is told -------------------------------------------------------------------------------


async def test_before_any_call_there_is_none(running):
    async with running(FakeQemu()) as domain:
        assert domain.interrupted is None


async def test_a_call_that_comes_to_its_end_leaves_none(running):
    async with running(FakeQemu()) as domain:
        await domain.enable(1)
        assert domain.interrupted is None


async def test_a_call_that_fails_leaves_none(running):
    qemu = FakeQemu()
    qemu.add_errors = {1: "no"}
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuFailed):
            await domain.enable(1)
        assert domain.interrupted is None


async def test_the_next_call_takes_it_back(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        await hung_in_the_guest(qemu, domain)
        await domain.state()
        assert domain.interrupted is None


async def test_what_is_pending_stays_so_after_the_next_call(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        await hung_in_the_guest(qemu, domain)
        await domain.state()
        assert domain.pending_ids == (1,)


@asynccontextmanager
async def two_calls(running):
    """The first of two waits for the guest, the second for its turn, and is cancelled there."""
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        first, second = (asyncio.create_task(domain.disable(1)) for _ in range(2))
        await was_sent(qemu, "device_del")
        second.cancel()
        await cancelled(second)
        yield domain, first
        first.cancel()
        await asyncio.wait([first])


async def test_a_call_cancelled_while_it_waits_for_its_turn_leaves_nothing(running):
    async with two_calls(running) as (domain, _):
        assert domain.interrupted is None


async def test_a_call_cancelled_while_another_waits_for_its_turn_tells_what_it_left(running):
    async with two_calls(running) as (domain, first):
        first.cancel()
        await cancelled(first)
        assert domain.interrupted == Interrupted(pending=(1,))


async def test_it_is_told_after_the_domain_was_left(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        await hung_in_the_guest(qemu, domain)
    assert domain.interrupted == Interrupted(pending=(1,))


async def test_a_timeout_is_a_timeout_and_it_is_told_what_is_left(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await domain.disable(1)
        assert domain.interrupted == Interrupted(pending=(1,))


# -- what is told ----------------------------------------------------------------------------------


async def test_before_the_first_effect_nothing_is_left(running):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        before = len(qemu.sent("query-cpus-fast"))
        qemu.hook = lambda connection, command: (
            command["execute"] == "query-cpus-fast"
        )  # not answered
        task = asyncio.create_task(domain.state())
        await was_sent(qemu, "query-cpus-fast", before + 1)
        task.cancel()
        await cancelled(task)
        assert domain.interrupted == Interrupted()


async def test_a_plug_that_could_not_be_undone_is_changed(running):
    qemu = FakeQemu()
    qemu.on_delete = {1: "error"}
    held, sent = [], asyncio.Event()

    def hook(connection, command):
        if command["execute"] != "device_add" or command["arguments"]["socket-id"] != 2:
            return False
        held.append((connection, command))
        sent.set()
        return True

    qemu.hook = hook
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.enable([1, 2]))
        await sent.wait()
        task.cancel()
        await asyncio.sleep(0)
        error(*held[0], "no")
        await cancelled(task)
        assert domain.interrupted == Interrupted(changed_ids=(1,))


async def test_what_has_gone_is_changed_and_the_rest_is_pending(running):
    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.disable([1, 2]))
        await until(lambda: not domain.last_state.vcpus[2].enabled, "the second one is seen gone")
        task.cancel()
        await cancelled(task)
        assert domain.interrupted == Interrupted(changed_ids=(2,), pending=(1,))


@asynccontextmanager
async def one_refused_of_two(running):
    """Two unplugs are pending, a call waits to plug both again, and then the guest refuses to let
    the first go.
    """
    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {1: "silence", 2: "silence"}
    async with running(qemu) as domain:
        await domain.disable([1, 2], timeout=0)
        task = asyncio.create_task(domain.enable([1, 2]))
        await was_sent(qemu, "query-cpus-fast", len(qemu.sent("query-cpus-fast")) + 2)
        qemu.refuse(1)
        # The reply to the first of two more comes behind the event.
        await was_sent(qemu, "query-cpus-fast", len(qemu.sent("query-cpus-fast")) + 2)
        yield qemu, domain, task


async def test_an_unplug_that_the_guest_has_refused_is_not_pending_after_a_cancel(running):
    async with one_refused_of_two(running) as (_, domain, task):
        task.cancel()
        await cancelled(task)
        assert domain.interrupted == Interrupted(pending=(2,))
        assert domain.pending_ids == (2,)
        assert (await domain.enable(1)).outcome == "applied"


async def test_an_unplug_that_the_guest_has_refused_is_not_pending_after_the_failure_of_a_plug(
    running,
):
    async with one_refused_of_two(running) as (qemu, domain, task):
        qemu.add_errors = {2: "no"}
        qemu.let_go(2)
        with pytest.raises(qmpvcpu.VcpuFailed):
            await task
        assert domain.pending_ids == ()


@asynccontextmanager
async def gone_unseen(running, request, *plugged, slots=4):
    """A request that unplugs, cancelled after vCPU 1 has gone and before anybody has looked."""
    qemu = FakeQemu(slots, plugged=plugged)
    qemu.on_delete = dict.fromkeys(plugged, "silence")
    async with running(qemu) as domain:
        task = asyncio.create_task(request(domain))
        await was_sent(qemu, "device_del")
        await until(lambda: domain.pending_ids, "QEMU was asked")
        qemu.let_go(1, tell=False)
        task.cancel()
        await cancelled(task)
        yield domain


REQUESTS = {
    "one id": lambda domain: domain.disable(1),
    "several ids": lambda domain: domain.disable([1, 2]),
    "a count": lambda domain: domain.set_vcpus(1),
    "atomic": lambda domain: domain.disable([1, 2], atomic=True),
    "a list": lambda domain: domain.apply(b"<vcpus><vcpu id='0' state='enabled'/></vcpus>"),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_what_went_right_before_the_cancel_is_changed(running, name):
    async with gone_unseen(running, REQUESTS[name], 1, 2) as domain:
        pending = () if name == "one id" else (2,)
        assert domain.interrupted == Interrupted(changed_ids=(1,), pending=pending)


async def test_where_qemu_does_not_answer_any_more_what_was_asked_is_pending(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.disable(1))
        await was_sent(qemu, "device_del")
        await until(lambda: domain.pending_ids, "QEMU was asked")
        qemu.hook = lambda connection, command: True
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        await cancelled(task)
        assert domain.interrupted == Interrupted(pending=(1,))


@pytest.mark.parametrize("turns", range(1, 61, 3))
async def test_at_any_await_what_is_left_is_what_qemu_has(running, definition, turns):
    qemu = FakeQemu(plugged=(1,))
    before = set(qemu.paths)
    async with running(qemu, definition) as domain:
        task = asyncio.create_task(domain.disable(1, live=True, config=True))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
            return
        left = domain.interrupted
        assert set(left.changed_ids) | set(left.pending) >= before - set(qemu.paths)
        assert set(left.changed_ids) <= before - set(qemu.paths)
        assert not left.definition_written


async def cancelled_twice(task):
    """The first cancel waits for the disk for a moment, the second does not."""
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    await cancelled(task)


@pytest.fixture
async def staging(running, definition):
    """A change of guest and definition, cancelled while the disk hangs with the next version of the
    latter.
    """
    qemu = FakeQemu()
    with hung_disk(definition.parent, "write") as disk:
        async with running(qemu, definition) as domain:
            task = asyncio.create_task(domain.enable(1, live=True, config=True))
            await hangs(disk)
            await cancelled_twice(task)
            yield qemu, domain, disk


async def test_cancelled_while_the_definition_is_staged_nothing_is_left(staging):
    _, domain, _ = staging
    assert domain.interrupted == Interrupted()


async def test_cancelled_while_the_definition_is_staged_the_guest_is_not_touched(staging):
    qemu, _, _ = staging
    assert not qemu.sent("device_add")


async def test_what_is_staged_once_the_disk_answers_is_taken_away(staging, definition):
    _, _, disk = staging
    disk.answers.set()
    await until(
        lambda: disk.removed and os.listdir(definition.parent) == ["d.xml"],
        "the staged version is gone",
    )


async def test_live_changed_and_the_definition_hung_both_are_told(running, definition):
    with hung_disk(definition.parent, "rename") as disk:
        async with running(FakeQemu(), definition) as domain:
            task = asyncio.create_task(domain.enable(1, live=True, config=True))
            await hangs(disk)
            await cancelled_twice(task)
            disk.answers.set()
            assert domain.interrupted == Interrupted(changed_ids=(1,), definition_unsure=True)


async def test_a_definition_that_is_written_in_time_is_written_and_not_unsure(running, definition):
    with hung_disk(definition.parent, "rename") as disk:
        async with running(FakeQemu(), definition) as domain:
            task = asyncio.create_task(domain.enable(1, config=True))
            await hangs(disk)
            task.cancel()
            await asyncio.sleep(0)
            disk.answers.set()
            await cancelled(task)
            assert domain.interrupted == Interrupted(definition_written=True)


async def test_what_the_caller_said_of_its_cancel_is_kept(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.disable(1))
        await was_sent(qemu, "device_del")
        task.cancel("no time")
        caught = await cancelled(task)
        assert (type(caught), caught.args[0]) == (asyncio.CancelledError, "no time")


async def test_a_call_that_is_made_while_another_is_cancelled_tells_its_own(running):
    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        with suppress(asyncio.CancelledError):
            await hung_in_the_guest(qemu, domain)
        await domain.disable(2)
        assert domain.interrupted is None
