"""What is kept of an unplug that has not ended: for this process, and for the next."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu.core.pending import PendingUnplug, is_open, mark, unplug_of
from qmpvcpu.domain import link
from qmpvcpu.domain.ledger import Ledger
from qmpvcpu.host.files import state_folder
from qmpvcpu.host.pending import PendingFolder
from qmpvcpu.host.process import Process, boot_id, find_process, is_alive
from tests.support.fake_qemu import FakeQemu
from tests.support.fake_qmp import serve
from tests.support.states import ppc64, x86
from tests.support.waiting import until

GONE = Process(2**22 + 1, 1, "no-boot")
HERE = Process(4711, 1, "boot")


def folder(root, process=HERE):
    return PendingFolder(process, root)


def unplug(first, **fields):
    return PendingUnplug(first, f"/machine/peripheral/vcpu{first}", 100 + first, 5.5, **fields)


def test_what_one_process_asked_the_next_one_knows(tmp_path):
    one, other = folder(tmp_path), folder(tmp_path)
    assert other.load() == {}
    one.add([unplug(3), unplug(5)])
    assert other.load() == {3: unplug(3), 5: unplug(5)}
    other.discard([3])
    assert one.load() == {5: unplug(5)}
    one.tidy()
    assert other.load() == {5: unplug(5)}
    one.discard([5, 6])
    assert other.load() == {}
    one.tidy()
    assert list((tmp_path / "pending").iterdir()) == []
    # As if another process had made it, and this one tidied it away.
    other.add([unplug(3)])
    assert one.load() == {3: unplug(3)}


def test_what_is_gone_unseen_is_known_to_the_next_and_tidied_when_it_is_back(tmp_path):
    one, other = folder(tmp_path), folder(tmp_path)
    assert one.gone() == frozenset()
    one.note_gone([7, 3])
    assert other.gone() == {3, 7} and other.load() == {}
    other.tidy()
    assert one.gone() == {3, 7}
    other.note_gone([])
    one.tidy()
    assert one.gone() == frozenset() and list((tmp_path / "pending").iterdir()) == []


def test_changes_within_one_tick_of_the_clock_are_seen(tmp_path):
    one, other = folder(tmp_path), folder(tmp_path)
    for first in range(50):
        one.add([unplug(first)])
        assert first in other.load()


def test_nobody_else_may_read_it(tmp_path):
    folder(tmp_path).add([unplug(3)])
    found = list((tmp_path / "pending").rglob("*"))
    assert [path.stat().st_mode & 0o77 for path in found] == [0, 0]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"5", b'{"qom_path": 5}', b"\xff" * 9000, b'[["x", 1, 2, 3]]', b"[[1]]"]
)
def test_a_file_that_is_not_ours_is_left_alone(tmp_path, content):
    one = folder(tmp_path)
    one.add([unplug(3)])
    strange = tmp_path / "pending" / HERE.key / "strange"
    strange.write_bytes(content)
    assert one.load() == {3: unplug(3)}
    one.discard([3])
    assert (one.load(), strange.read_bytes()) == ({}, content)


def test_the_later_of_two_askings_counts_and_both_are_forgotten(tmp_path):
    one, other = folder(tmp_path), folder(tmp_path)
    one.add([unplug(3), unplug(4)])
    other.add([replace(unplug(3), asked=9.5)])
    assert one.load()[3].asked == 9.5
    one.discard([3])
    assert other.load() == {4: unplug(4)}


def test_a_lock_that_another_process_never_gives_back_stops_nobody(tmp_path):
    one = folder(tmp_path)
    one.add([unplug(3)])
    with folder(tmp_path)._locked():
        one.discard([3])
    assert one.load() == {}


def test_qemus_that_are_gone_are_forgotten(tmp_path):
    folder(tmp_path, GONE).add([unplug(1)])
    (tmp_path / "pending" / "rubbish").mkdir()
    folder(tmp_path).add([unplug(3)])
    assert [path.name for path in (tmp_path / "pending").iterdir()] == [HERE.key]


def test_two_qemus_know_nothing_of_each_other(tmp_path):
    folder(tmp_path).add([unplug(3)])
    assert folder(tmp_path, replace(HERE, start=2)).load() == {}


def test_where_state_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("QMPVCPU_STATE", "/x/y")
    assert str(state_folder()) == "/x/y"
    monkeypatch.delenv("QMPVCPU_STATE")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert str(state_folder()) == "/var/lib/qmpvcpu"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    assert str(state_folder()) == "/s/qmpvcpu"


def test_a_process_is_itself_and_nobody_else():
    assert find_process([os.getpid()]) is None  # no QEMU
    assert find_process([]) is None
    assert find_process([2**22 + 7]) is None
    start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    assert is_alive(Process(os.getpid(), start, boot_id()).key)
    for key in (f"{boot_id()}-{os.getpid()}-{start + 1}", f"other-{os.getpid()}-{start}", "", "a-b-c", "x-1"):
        assert not is_alive(key)


def test_open_as_long_as_the_slot_holds_the_same_object_and_thread():
    state = x86((0, 1))
    asked = unplug_of(state.by_id[1], state, 1.0)
    assert asked == PendingUnplug(1, "/machine/peripheral/vcpu1", 101, 1.0)
    assert is_open(asked, state)
    assert not is_open(asked, x86((0,)))
    assert not is_open(replace(asked, thread_id=999), state)
    assert not is_open(replace(asked, qom_path="/machine/unattached/device[3]"), state)
    assert is_open(PendingUnplug(1, None, None, None), state)
    assert not is_open(PendingUnplug(99, None, None, None), state)
    assert not is_open(PendingUnplug(1, None, None, None), ppc64((0, 1)))  # 1 is inside core 0


def test_marked_are_all_vcpus_of_an_entity_and_no_empty_slot():
    state = ppc64((0, 1))
    assert [v.id for v in mark(state, {4, 8}).vcpus if v.pending] == [4, 5, 6, 7]
    assert mark(mark(state, {4}), frozenset()) == state
    assert mark(state, frozenset()) is state


class Broken:
    def load(self):
        return {}

    def add(self, unplugs):
        raise OSError(30, "Read-only file system")

    def discard(self, firsts):
        raise AssertionError("nothing was stored")


def test_a_state_folder_that_cannot_be_written_is_told_and_stops_nothing():
    state = x86((0, 1))
    ledger = Ledger(Broken())
    ledger.ask([state.by_id[1]], state, 1.0)
    assert "Read-only" in ledger.trouble
    assert ledger.refresh(state) == ([], [])
    assert ledger.firsts == {1}
    ledger.end([1])
    assert ledger.firsts == frozenset()


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """Two clients of one scripted QEMU that both know its process, as two processes of ours do."""
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(link, "find_process", lambda threads, peer: HERE)
    monkeypatch.setattr("qmpvcpu.host.pending.is_alive", lambda key: True)
    return tmp_path


async def test_the_next_process_sees_it_pending_and_settles_what_has_ended(shared):
    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {1: "silence", 2: "silence"}
    async with serve(shared, qemu.script) as path:
        async with qmpvcpu.connect(path) as domain:
            assert (await domain.disable([1, 2], timeout=0)).outcome == "pending"
        qemu.let_go(2)
        async with qmpvcpu.connect(path) as domain:
            assert domain.pending_ids == (1,)
            assert [(e.event, e.vcpus) for e in domain.settled] == [("vcpu-removed", (2,))]
            assert [row.pending for row in await domain.vcpus()] == [False, True, False, False]
            later = await domain.enable(1, timeout=0)
            assert (later.outcome, later.changed) == ("pending", False)
            assert any("only asking again settles it" in message for message in later.messages)
            qemu.let_go(1)
            await until(lambda: domain.pending_ids == (), "nothing is pending")
    assert list((shared / "state" / "pending").iterdir()) == []


async def test_what_is_gone_is_crossed_out_behind_the_answer_and_what_was_refused_before_it(shared):
    def stored():
        return sorted(path.name for path in (shared / "state" / "pending").glob("*/*"))

    qemu = FakeQemu(plugged=(1, 2))
    qemu.on_delete = {2: "refused"}
    async with serve(shared, qemu.script) as path, qmpvcpu.connect(path) as domain:
        assert (await domain.disable(1)).outcome == "applied"
        assert len(stored()) == 1 and domain.pending_ids == ()
        await asyncio.sleep(0)
        assert stored() == []
        # Of that the next process could not see that it is over.
        with pytest.raises(qmpvcpu.VcpuRejected):
            await domain.disable(2)
        assert stored() == []
        qemu.fill(1)
        await domain.disable(1)
    assert stored() == []


async def test_asked_behind_a_held_connection_enabling_does_not_claim_unchanged(shared):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with serve(shared, qemu.script) as path, qmpvcpu.connect(path) as held:
        async with held.events(steps=True) as events, qmpvcpu.connect(path) as other:
            assert (await other.disable(1, timeout=0)).outcome == "pending"
            assert (await held.enable(1, timeout=0)).outcome == "pending"
            assert (await anext(events)).event == "unplug-requested"
            qemu.refuse(1)
            assert (await anext(events)).event == "vcpu-removal-failed"
            await until(lambda: other.pending_ids == held.pending_ids == (), "nothing is pending")
            assert (await held.enable(1)).changed is False


async def test_killed_between_asking_and_the_reply_nothing_is_forgotten(shared):
    qemu = FakeQemu(plugged=(1,))
    reached = asyncio.Event()

    def swallow(connection, command):
        if command["execute"] == "device_del":
            reached.set()
            return True
        return None

    qemu.hook = swallow
    async with serve(shared, qemu.script) as path:
        async with qmpvcpu.connect(path) as domain:
            task = asyncio.create_task(domain.disable(1))
            await reached.wait()
            # Whatever kills us now, this is on the disk.
            assert list(folder(shared / "state").load()) == [1]
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        qemu.hook = lambda connection, command: None
        async with qmpvcpu.connect(path) as domain:
            assert domain.pending_ids == (1,)


async def test_another_qemu_at_the_same_address_has_nothing_pending(shared, monkeypatch):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with serve(shared, qemu.script) as path, qmpvcpu.connect(path) as domain:
        assert (await domain.disable(1, timeout=0)).outcome == "pending"
        monkeypatch.setattr(link, "find_process", lambda threads, peer: replace(HERE, start=99))
        await domain.reconnect()
        assert domain.pending_ids == ()


async def test_the_same_qemu_after_a_lost_connection_is_remembered(shared):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with serve(shared, qemu.script) as path, qmpvcpu.connect(path) as domain:
        assert (await domain.disable(1, timeout=0)).outcome == "pending"
        qemu.connections[0].close()
        await until(lambda: not qemu.connections, "the connection is lost")
        await domain.reconnect()
        assert domain.pending_ids == (1,)
