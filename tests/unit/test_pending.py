"""What is kept of an unplug that has not ended: for this process, and for the next."""

from __future__ import annotations

import asyncio
import os

import pytest

import qmpvcpu
from tests.support import hosts
from tests.support.fake_qemu import FakeQemu
from tests.support.fake_qmp import serve
from tests.support.pending import (
    Store,
    Unplug,
    contexts_used,
    marked,
    may_still_happen,
    qemu_runs_here,
)
from tests.support.slots import Slot
from tests.support.store import where_state_is
from tests.support.waiting import until

#: No process has such a number: more than PID_MAX_LIMIT.
NOBODY = 1 << 23


def unplug(first, asked=5.5):
    return Unplug(first, f"/machine/peripheral/vcpu{first}", 100 + first, asked)


@pytest.fixture
def one(tmp_path):
    """What one process keeps."""
    return Store(tmp_path)


@pytest.fixture
def other(tmp_path):
    """What another keeps of the same QEMU."""
    return Store(tmp_path)


def left(store):
    """What is left of all QEMUs."""
    return sorted(path.name for path in store.root.iterdir())


# -- what unplugs under TCG have used up -----------------------------------------------------------


def test_what_two_processes_saw_is_counted_once(one, other):
    one.note_contexts((3, 103), (4, 104))
    other.note_contexts((4, 104), (3, 203), reported=True)
    assert one.contexts() == ({(3, 103), (4, 104), (3, 203)}, True)


def test_the_next_qemu_begins_from_zero(one, tmp_path):
    one.note_contexts((3, 103), reported=True)
    assert Store(tmp_path, start=2).contexts() == (set(), False)


def test_a_vcpu_whose_thread_others_have_took_no_context_of_its_own():
    assert contexts_used({(1, 100), (2, 102), (3, 0)}, {100}) == 1


# -- two processes ---------------------------------------------------------------------------------


def test_of_what_was_asked_later_than_it_was_seen_ended_nothing_is_forgotten(one, other):
    one.ask(unplug(3, asked=5.5))
    one.end(3, until=5.0)
    assert other.known() == {3: unplug(3, asked=5.5)}


@pytest.fixture
async def other_asks(tmp_path):
    """A domain that has last seen vCPU 3 unplugged; meanwhile another process plugs it and asks for
    its unplug.
    """
    qemu = FakeQemu()
    qemu.on_delete = {3: "silence"}
    with qemu_runs_here():
        async with serve(tmp_path, qemu.script) as path, qmpvcpu.connect(path) as domain:
            async with qmpvcpu.connect(path) as second:
                await second.enable(3)
                await second.disable(3, timeout=0)
            yield qemu, domain


async def test_an_unplug_that_another_process_asked_for_since_the_last_look_is_pending(other_asks):
    _, domain = other_asks
    await domain.enable(2)
    await domain.state()
    assert domain.pending_ids == (3,)


async def test_what_another_process_is_unplugging_is_awaited_and_plugged_again(other_asks):
    qemu, domain = other_asks
    task = asyncio.create_task(domain.enable(3))
    await until(lambda: domain.pending_ids == (3,), "the other's unplug is known")
    qemu.let_go(3)
    assert (await task).changed_ids == (3,)


# -- on disk ---------------------------------------------------------------------------------------


def test_at_first_nothing_is_known(one):
    assert one.known() == {}


def test_what_one_process_asked_the_next_one_knows(one, other):
    one.ask(unplug(3), unplug(5))
    assert other.known() == {3: unplug(3), 5: unplug(5)}


def test_what_one_process_saw_ended_the_other_forgets(one, other):
    one.ask(unplug(3), unplug(5))
    one.known()
    other.end(3)
    assert one.known() == {5: unplug(5)}


def test_to_tidy_takes_nothing_that_is_known(one, other):
    one.ask(unplug(5))
    one.tidy()
    assert other.known() == {5: unplug(5)}


def test_what_was_never_asked_is_ended_without_harm(one, other):
    one.ask(unplug(5))
    one.end(5, 6)
    assert other.known() == {}


def test_tidied_when_all_has_ended_nothing_is_left(one):
    one.ask(unplug(5))
    one.end(5)
    one.tidy()
    assert left(one) == []


def test_what_a_process_was_writing_when_it_was_killed_is_tidied_away(one):
    one.ask(unplug(5))
    (one.folder / f".1795855112764353621-{NOBODY}-{NOBODY}").write_text("[[5, ")
    ours = one.folder / f".1795855112764353622-{os.getpid()}-{os.getpid()}"
    ours.write_text("[[6, ")
    one.tidy()
    assert set(one.known()) == {5}
    assert [path.name for path in one.folder.glob(".*")] == [ours.name]


def test_what_another_process_tidied_away_is_made_again(one, other):
    one.ask(unplug(5))
    one.end(5)
    other.tidy()
    one.ask(unplug(3))
    assert other.known() == {3: unplug(3)}


def test_changes_within_one_tick_of_the_clock_are_seen(one, other):
    seen = []
    for first in range(50):
        one.ask(unplug(first))
        seen.append(first in other.known())
    assert all(seen)


def test_nobody_else_may_read_it(one):
    one.ask(unplug(3))
    assert [path.stat().st_mode & 0o77 for path in one.root.rglob("*")] == [0, 0]


STRANGE = [
    b"",
    b"{",
    b"5",
    b'{"qom_path": 5}',
    b"\xff" * 9000,
    b'[["x", 1, 2, 3]]',
    b"[[1]]",
    b"[" * 200000,
]


@pytest.fixture(params=STRANGE, ids=range(len(STRANGE)))
def strange(one, request):
    """A file that is not ours, among those that are."""
    one.ask(unplug(3))
    path = one.folder / "strange"
    path.write_bytes(request.param)
    return path


def test_a_file_that_is_not_ours_says_nothing(one, strange):
    assert one.known() == {3: unplug(3)}


def test_a_file_that_is_not_ours_is_left_alone(one, strange):
    before = strange.read_bytes()
    one.end(3)
    assert strange.read_bytes() == before


def test_the_later_of_two_askings_counts(one, other):
    one.ask(unplug(3), unplug(4))
    other.ask(unplug(3, asked=9.5))
    assert one.known()[3].asked == 9.5


def test_of_two_askings_both_are_forgotten(one, other):
    one.ask(unplug(3), unplug(4))
    other.ask(unplug(3, asked=9.5))
    one.end(3)
    assert other.known() == {4: unplug(4)}


def test_a_lock_that_another_process_never_gives_back_stops_nobody(one, other):
    one.ask(unplug(3))
    with other.locked():
        one.end(3)
    assert one.known() == {}


def test_qemus_that_are_gone_are_forgotten(tmp_path, one):
    Store(tmp_path, start=2).ask(unplug(1))
    one.ask(unplug(3))
    assert left(one) == [one.folder.name]


def test_folders_that_are_not_ours_are_removed(one):
    (one.root / "rubbish").mkdir(parents=True)
    one.ask(unplug(3))
    assert left(one) == [one.folder.name]


def test_two_qemus_know_nothing_of_each_other(tmp_path, one):
    one.ask(unplug(3))
    assert Store(tmp_path, start=2).known() == {}


# -- files that are not ours -----------------------------------------------------------------------

#: The three kinds of files: what each says, and what it says where it is not ours.
KINDS = {
    "unplugs": (lambda store: store.known(), {3: unplug(3)}, {}),
    "gone": (lambda store: store.gone(), {3}, set()),
    "contexts": (lambda store: store.contexts(), ({(3, 103)}, True), (set(), False)),
}


@pytest.fixture(params=KINDS)
def kept(one, request):
    """Its path, and what a process that reads it for the first time knows from it."""
    read, whole, nothing = KINDS[request.param]
    if request.param == "unplugs":
        one.ask(unplug(3))
    elif request.param == "gone":
        one.note_gone(3)
    else:
        one.note_contexts((3, 103), reported=True)
    (path,) = one.folder.iterdir()

    def known():
        found = read(Store(one.root.parent))
        assert found in (whole, nothing)
        return found == whole

    return path, known


def test_a_file_of_ours_is_believed(kept):
    _, known = kept
    assert known()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"5", b"[" * 200000, b"[-1]"),
        *(b'{"gone": 5, "reported": true}', b'{"gone": [[1, "x"]], "reported": true}'),
    ],
    ids=range(7),
)
def test_a_file_that_cannot_be_read_says_nothing(kept, content):
    path, known = kept
    path.write_bytes(content)
    assert not known()


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o777])
def test_a_file_that_others_may_write_says_nothing(kept, mode):
    path, known = kept
    path.chmod(mode)
    assert not known()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_says_nothing(kept):
    path, known = kept
    os.chown(path, 12345, 12345)
    assert not known()


def test_a_file_that_is_a_link_says_nothing(kept, tmp_path):
    path, known = kept
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert not known()


def test_a_file_that_is_a_pipe_says_nothing(kept):
    path, known = kept
    path.unlink()
    os.mkfifo(path)
    assert not known()


def test_nobody_else_may_write_a_file_of_ours_whatever_the_umask(one):
    before = os.umask(0)
    try:
        one.ask(unplug(3))
        one.note_gone(3)
        one.note_contexts((3, 103))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o77 for path in one.folder.iterdir()} == {0}


# -- what is gone and nobody was told --------------------------------------------------------------


def test_at_first_nothing_is_gone(one):
    assert one.gone() == set()


@pytest.fixture
def unseen(one):
    one.note_gone(7, 3)
    return one


def test_what_is_gone_unseen_is_known_to_the_next(unseen, other):
    assert other.gone() == {3, 7}


def test_what_is_gone_is_not_pending(unseen, other):
    assert other.known() == {}


def test_to_tidy_takes_nothing_of_what_is_gone(unseen, other):
    other.tidy()
    assert unseen.gone() == {3, 7}


def test_what_is_back_is_no_longer_gone(unseen, other):
    other.note_gone()
    assert unseen.gone() == set()


def test_tidied_when_all_is_back_nothing_is_left(unseen, other):
    other.note_gone()
    unseen.tidy()
    assert left(unseen) == []


# -- where, and of which process -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "user_id", "where"),
    [
        ({"QMPVCPU_STATE": "/x/y", "XDG_STATE_HOME": "/s"}, 0, "/x/y"),
        ({"XDG_STATE_HOME": "/s"}, 0, "/var/lib/qmpvcpu"),
        ({"XDG_STATE_HOME": "/s"}, 1000, "/s/qmpvcpu"),
        ({"HOME": "/h"}, 1000, "/h/.local/state/qmpvcpu"),
    ],
)
def test_where_state_is_kept(variables, user_id, where):
    assert where_state_is(variables, user_id) == where


@pytest.mark.parametrize(
    "pids", [[os.getpid()], [], [2**22 + 7]], ids=["not QEMU", "none", "not running"]
)
def test_what_is_not_a_qemu_is_not_found(pids):
    assert hosts.qemu_of(pids) is None


def test_a_process_that_runs_is_alive():
    assert hosts.is_running(hosts.name_of())


@pytest.mark.parametrize(
    "other", [{"start": 1}, {"boot": "other"}], ids=["another start", "another boot"]
)
def test_a_process_with_the_same_pid_is_not_it(other):
    assert not hosts.is_running(hosts.name_of(**other))


@pytest.mark.parametrize("name", ["", "a-b-c", "x-1"])
def test_what_is_not_a_name_of_a_process_does_not_run(name):
    assert not hosts.is_running(name)


# -- whether it may still happen -------------------------------------------------------------------

X86 = (
    Slot((0,), "/machine/peripheral/vcpu0", 100),
    Slot((1,), "/machine/peripheral/vcpu1", 101),
    Slot((2,)),
)
PPC64 = (Slot((0, 1, 2, 3), "/c0", 100), Slot((4, 5, 6, 7), "/c1", 104), Slot((8, 9, 10, 11)))


@pytest.mark.parametrize(
    ("asked", "slots", "is_open"),
    [
        (unplug(1), X86, True),
        (unplug(2), X86, False),
        (unplug(1)._replace(thread_id=999), X86, False),
        (unplug(1)._replace(qom_path="/machine/unattached/device[3]"), X86, False),
        (Unplug(1), X86, True),
        (Unplug(99), X86, False),
        (Unplug(1), PPC64, False),
    ],
    ids=[
        "same",
        "empty slot",
        "other thread",
        "other object",
        "nothing known",
        "no such slot",
        "inside a core",
    ],
)
def test_open_as_long_as_the_slot_holds_the_same_object_and_thread(asked, slots, is_open):
    assert may_still_happen(asked, slots) is is_open


def test_marked_are_all_vcpus_of_an_entity_and_no_empty_slot():
    assert marked(PPC64, {4, 8}) == [4, 5, 6, 7]


def test_what_is_no_longer_pending_is_no_longer_marked():
    assert marked(PPC64, {4}, set()) == []


# -- from one process to the next ------------------------------------------------------------------


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """Clients of one scripted QEMU that know its process, as processes of ours on one host do."""
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    with qemu_runs_here():
        yield tmp_path


@pytest.fixture
def store(shared):
    """What is on the disk then."""
    return Store(shared / "state")


def silent(*slots):
    """A QEMU whose guest does not answer when these are to go."""
    qemu = FakeQemu(plugged=slots)
    qemu.on_delete = dict.fromkeys(slots, "silence")
    return qemu


async def test_what_is_asked_is_kept_with_its_object_and_thread(shared, store):
    qemu = silent(1)
    async with serve(shared, qemu.script) as path, qmpvcpu.connect(path) as domain:
        thread = (await domain.vcpus())[1].thread_id
        await domain.disable(1, timeout=0)
    assert store.known()[1][:3] == (1, "/machine/peripheral/vcpu1", thread)


@pytest.fixture
async def unwritable(shared):
    """A domain with a pending unplug where the state folder is a file; and the outcome of that."""
    (shared / "state").write_text("")
    async with serve(shared, silent(1).script) as path, qmpvcpu.connect(path) as domain:
        yield domain, await domain.disable(1, timeout=0)


async def test_a_state_folder_that_cannot_be_written_is_told(unwritable):
    _, outcome = unwritable
    assert any("Not a directory" in message for message in outcome.messages)


async def test_a_state_folder_that_cannot_be_written_stops_nothing(unwritable):
    domain, _ = unwritable
    assert domain.pending_ids == (1,)


@pytest.fixture
async def second(shared):
    """The second client, after one that asked to unplug 1 and 2; 2 has gone between them."""
    qemu = silent(1, 2)
    async with serve(shared, qemu.script) as path:
        async with qmpvcpu.connect(path) as domain:
            assert (await domain.disable([1, 2], timeout=0)).outcome == "pending"
        qemu.let_go(2)
        async with qmpvcpu.connect(path) as domain:
            yield qemu, domain


async def test_the_next_process_sees_it_pending(second):
    _, domain = second
    assert domain.pending_ids == (1,)


async def test_the_next_process_settles_what_has_ended(second):
    _, domain = second
    assert [(event.event, event.vcpus) for event in domain.settled] == [("vcpu-removed", (2,))]


async def test_the_next_process_shows_which_rows_are_pending(second):
    _, domain = second
    assert [row.pending for row in await domain.vcpus()] == [False, True, False, False]


async def test_the_next_process_cannot_enable_what_is_pending_at_once(second):
    _, domain = second
    later = await domain.enable(1, timeout=0)
    assert (later.outcome, later.changed) == ("pending", False)


async def test_the_next_process_says_what_would_settle_it(second):
    _, domain = second
    later = await domain.enable(1, timeout=0)
    assert any("request it again (--disable)" in message for message in later.messages)


async def test_the_next_process_hears_its_end(second):
    qemu, domain = second
    qemu.let_go(1)
    await until(lambda: domain.pending_ids == (), "nothing is pending")


async def test_once_nothing_is_pending_nothing_is_left_on_the_disk(shared, store):
    qemu = silent(1)
    async with serve(shared, qemu.script) as path, qmpvcpu.connect(path) as domain:
        await domain.disable(1, timeout=0)
        qemu.let_go(1)
        await until(lambda: domain.pending_ids == (), "nothing is pending")
    assert left(store) == []


async def test_what_is_gone_is_crossed_out_behind_the_answer(shared, store):
    async with (
        serve(shared, FakeQemu(plugged=(1,)).script) as path,
        qmpvcpu.connect(path) as domain,
    ):
        await domain.disable(1)
        at_once = len(store.files()), domain.pending_ids
        await until(lambda: store.files() == [], "it is crossed out")
    assert at_once == (1, ())


async def test_what_was_refused_is_crossed_out_before_the_answer(shared, store):
    qemu = FakeQemu(plugged=(2,))
    qemu.on_delete = {2: "refused"}
    async with serve(shared, qemu.script) as path, qmpvcpu.connect(path) as domain:
        # Of that the next process could not see that it is over.
        with pytest.raises(qmpvcpu.VcpuRejected):
            await domain.disable(2)
        assert store.files() == []


async def test_what_is_gone_is_crossed_out_when_the_domain_is_left(shared, store):
    async with (
        serve(shared, FakeQemu(plugged=(1,)).script) as path,
        qmpvcpu.connect(path) as domain,
    ):
        await domain.disable(1)
    assert store.files() == []


async def test_asked_behind_a_held_connection_enabling_does_not_claim_unchanged(shared):
    qemu = silent(1)
    async with serve(shared, qemu.script) as path, qmpvcpu.connect(path) as held:
        async with held.events(steps=True) as events, qmpvcpu.connect(path) as other:
            assert (await other.disable(1, timeout=0)).outcome == "pending"
            assert (await held.enable(1, timeout=0)).outcome == "pending"
            assert (await anext(events)).event == "unplug-requested"
            qemu.refuse(1)
            assert (await anext(events)).event == "vcpu-removal-failed"
            await until(lambda: other.pending_ids == held.pending_ids == (), "nothing is pending")
            assert (await held.enable(1)).changed is False


async def test_killed_between_asking_and_the_reply_nothing_is_forgotten(shared, store):
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
            assert list(store.known()) == [1]
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        qemu.hook = lambda connection, command: None
        async with qmpvcpu.connect(path) as domain:
            assert domain.pending_ids == (1,)


async def test_another_qemu_at_the_same_address_has_nothing_pending(shared):
    qemu = silent(1)
    async with serve(shared, qemu.script) as path, qmpvcpu.connect(path) as domain:
        assert (await domain.disable(1, timeout=0)).outcome == "pending"
        with qemu_runs_here(start=99):
            await domain.reconnect()
        assert domain.pending_ids == ()


async def test_the_same_qemu_after_a_lost_connection_is_remembered(shared):
    qemu = silent(1)
    async with serve(shared, qemu.script) as path, qmpvcpu.connect(path) as domain:
        assert (await domain.disable(1, timeout=0)).outcome == "pending"
        qemu.connections[0].close()
        await until(lambda: not qemu.connections, "the connection is lost")
        await domain.reconnect()
        assert domain.pending_ids == (1,)
