"""`Domain.interrupted`: what a cancelled call has left, and until when that is told."""

from __future__ import annotations

import asyncio
import pickle
import threading
from contextlib import asynccontextmanager, suppress
from dataclasses import FrozenInstanceError

import pytest

import qmpvcpu
from qmpvcpu import Interrupted
from qmpvcpu.domain.locate import Place
from qmpvcpu.qemu.monitor import connect_monitor
from tests.support.fake_qemu import FakeQemu, error
from tests.support.fake_qmp import serve

XML = b"""<domain type='kvm'>
  <name>d</name>
  <vcpu current='1'>4</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
</domain>
"""

FULL = Interrupted((1, 2), (3,), (4,), True)


class Store:
    """A definition on a disk that hangs: `stage` or `commit` waits for `gate`, in its thread."""

    place = "d.xml"

    def __init__(self, hangs):
        self.hangs = hangs
        self.begun, self.gate, self.discarded = threading.Event(), threading.Event(), threading.Event()

    def read(self):
        return XML

    def stage(self, data):
        self._do("stage")
        return self

    def commit(self, before, again, given_up):
        self._do("commit")

    def discard(self):
        self.discarded.set()

    def _do(self, what):
        if what == self.hangs:
            self.begun.set()
            self.gate.wait()


@pytest.fixture
def running(tmp_path):
    @asynccontextmanager
    async def start(qemu, store=None):
        async with serve(tmp_path, qemu.script) as path:
            async with qmpvcpu.Domain(Place("d", (path,), definition=store), connect_monitor) as domain:
                yield domain

    return start


async def cancelled(task):
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    return caught.value


async def in_thread(event):
    assert await asyncio.to_thread(event.wait, 20)


async def hung_in_the_guest(qemu, domain):
    """A disable that the guest does not answer, cancelled."""
    asked = qemu.when_sent("device_del")
    task = asyncio.create_task(domain.disable(1))
    await asked.wait()
    task.cancel()
    await cancelled(task)


# -- the value ---------------------------------------------------------------------------------------


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError):
        FULL.pending = ()


def test_it_compares_and_pickles():
    assert pickle.loads(pickle.dumps(FULL)) == FULL != Interrupted()


def test_its_repr_says_what_is_what():
    text = "Interrupted(changed_ids=(1, 2), pending=(3,), unsure_ids=(4,), definition_unsure=True)"
    assert repr(FULL) == text


def test_its_json_has_the_keys_of_an_interrupted_command():
    assert FULL.to_json() == {"changed_ids": [1, 2], "pending": [3], "unsure": [4], "definition_unsure": True}


# -- when it is told ---------------------------------------------------------------------------------


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
        assert domain.pending_ids == (1,)


async def test_a_call_cancelled_while_it_waits_for_its_turn_leaves_it_alone(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    asked = qemu.when_sent("device_del")
    async with running(qemu) as domain:
        first, second = (asyncio.create_task(domain.disable(1)) for _ in range(2))
        await asked.wait()
        second.cancel()
        await cancelled(second)
        assert domain.interrupted is None
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


# -- what is told ------------------------------------------------------------------------------------


async def test_before_the_first_effect_nothing_is_left(running):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        asked = qemu.when_sent("query-cpus-fast", len(qemu.sent("query-cpus-fast")) + 1)
        task = asyncio.create_task(domain.state())
        await asked.wait()
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


async def test_cancelled_live_while_the_definition_is_staged_nothing_is_touched(running):
    store, qemu = Store("stage"), FakeQemu()
    async with running(qemu, store) as domain:
        task = asyncio.create_task(domain.enable(1, live=True, config=True))
        await in_thread(store.begun)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        await cancelled(task)
        assert domain.interrupted == Interrupted()
        assert not qemu.sent("device_add")
        # What is staged once the disk answers, nobody waits for: it is taken away.
        assert not store.discarded.is_set()
        store.gate.set()
        await in_thread(store.discarded)


async def test_live_changed_and_the_definition_hung_both_are_told(running):
    store = Store("commit")
    async with running(FakeQemu(), store) as domain:
        task = asyncio.create_task(domain.enable(1, live=True, config=True))
        await in_thread(store.begun)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        await cancelled(task)
        store.gate.set()
        assert domain.interrupted == Interrupted(changed_ids=(1,), definition_unsure=True)


async def test_a_definition_that_is_written_in_time_is_not_unsure(running):
    store = Store("commit")
    async with running(FakeQemu(), store) as domain:
        task = asyncio.create_task(domain.enable(1, config=True))
        await in_thread(store.begun)
        task.cancel()
        await asyncio.sleep(0)
        store.gate.set()
        await cancelled(task)
        assert domain.interrupted == Interrupted()


async def test_what_the_caller_said_of_its_cancel_is_kept(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    asked = qemu.when_sent("device_del")
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.disable(1))
        await asked.wait()
        task.cancel("no time")
        caught = await cancelled(task)
        assert type(caught) is asyncio.CancelledError
        assert caught.args[0] == "no time"


async def test_a_call_that_is_made_while_another_is_cancelled_tells_its_own(running):
    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        with suppress(asyncio.CancelledError):
            await hung_in_the_guest(qemu, domain)
        await domain.disable(2)
        assert domain.interrupted is None
