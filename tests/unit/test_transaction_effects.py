"""What an engine may send, whatever the order: nothing twice, only its own undone, every id told."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engine import Engine, Report, undo

#: Every entity is two vCPUs.
IDS = {n: (n, n + 100) for n in range(1, 4)}


def ids_of(*firsts):
    return {number for first in firsts for number in IDS[first]}


class Run:
    """A QEMU that answers in order, and a guest that ends unplugs as told; `moves` choose what
    happens next.
    """

    def __init__(self, engine, slots, refuses, asked=()):
        self.engine, self.slots, self.refuses = engine, set(slots), refuses
        self.sent, self.queue, self.asked = [], [], set(asked)
        #: What was in the slots when a plug was sent.
        self.slots_at_plugs = []
        self.take(engine.start())

    def take(self, effects):
        self.slots_at_plugs += [set(self.slots) for effect in effects if effect[0] == "device_add"]
        self.sent += effects
        self.queue += effects

    def answer(self, fails):
        what, *about = self.queue.pop(0)
        if what == "query":
            return self.take(self.engine.seen(*self.slots))
        first = about[0]
        if fails:
            return self.take(self.engine.failed(first, "no"))
        if what == "device_add":
            self.slots.add(first)
        else:
            self.asked.add(first)
        return self.take(self.engine.replied(first))

    def guest(self):
        first = min(self.asked)
        self.asked.discard(first)
        if self.refuses:
            self.take(self.engine.refused(first, "busy"))
        else:
            self.slots.discard(first)

    def play(self, moves):
        for move in moves:
            if self.engine.ended:
                break
            match move:
                case "ok" | "error" if self.queue:
                    self.answer(move == "error")
                case "guest" if self.asked:
                    self.guest()
                case "poll":
                    self.take(self.engine.poll())
                case "cancel":
                    self.take(self.engine.cancelled())
        for _ in range(100):
            if self.engine.ended:
                return self.engine.end()
            if self.queue:
                self.answer(False)
            else:
                self.take(self.engine.expired())
        raise AssertionError(self.engine.so_far())

    def times(self, what):
        """How often it was sent, by first vCPU id."""
        return Counter(effect[1] for effect in self.sent if effect[0] == what)


MOVES = st.lists(st.sampled_from(["ok", "ok", "error", "guest", "poll", "cancel"]), max_size=25)
MINE = st.sampled_from([[1], [1, 2], [1, 2, 3]])
FORBIDDEN = st.sampled_from([None, "kills"])
whatever_happens = settings(max_examples=60, deadline=None)


def plugging(mine, moves, refuses, forbidden=None):
    run = Run(Engine(mine, ids=IDS, undo_forbidden=forbidden), {0, 9}, refuses)
    return run, run.play(moves)


@whatever_happens
@given(MINE, MOVES, st.booleans(), FORBIDDEN)
def test_every_plug_is_sent_once(mine, moves, refuses, forbidden):
    run, _ = plugging(mine, moves, refuses, forbidden)
    assert run.times("device_add") == Counter(mine)


@whatever_happens
@given(MINE, MOVES, st.booleans())
def test_no_undo_is_sent_twice(mine, moves, refuses):
    run, _ = plugging(mine, moves, refuses)
    assert all(times == 1 for times in run.times("device_del").values())


@whatever_happens
@given(MINE, MOVES, st.booleans())
def test_an_undo_that_is_forbidden_is_never_sent(mine, moves, refuses):
    run, _ = plugging(mine, moves, refuses, "kills")
    assert not run.times("device_del")


@whatever_happens
@given(MINE, MOVES, st.booleans(), FORBIDDEN)
def test_only_its_own_plugs_are_undone(mine, moves, refuses, forbidden):
    run, _ = plugging(mine, moves, refuses, forbidden)
    assert run.slots >= {0, 9}


@whatever_happens
@given(MINE, MOVES, st.booleans(), FORBIDDEN)
def test_every_plug_that_is_there_is_told(mine, moves, refuses, forbidden):
    run, end = plugging(mine, moves, refuses, forbidden)
    there = ids_of(*(run.slots & set(mine)))
    assert set(end.plugged) >= there
    if end.outcome == "partial":
        assert set(end.remaining) >= there


@whatever_happens
@given(MINE, MOVES.filter(lambda moves: "cancel" not in moves), st.booleans(), FORBIDDEN)
def test_applied_plugs_are_all_there(mine, moves, refuses, forbidden):
    run, end = plugging(mine, moves, refuses, forbidden)
    assert end.outcome != "applied" or run.slots >= set(mine)


@whatever_happens
@given(MINE, MOVES, st.booleans(), FORBIDDEN)
def test_of_failed_plugs_none_is_there(mine, moves, refuses, forbidden):
    run, end = plugging(mine, moves, refuses, forbidden)
    if end.outcome == "failed":
        assert (run.slots & set(mine), end.remaining) == (set(), ())


@whatever_happens
@given(MINE, MOVES, st.booleans(), FORBIDDEN)
def test_what_is_undone_is_not_plugged(mine, moves, refuses, forbidden):
    _, end = plugging(mine, moves, refuses, forbidden)
    assert set(end.undone).isdisjoint(end.plugged)


def unplugging(mine, moves, refuses, wait):
    run = Run(Engine(unplug=mine, ids=IDS, wait=wait), {0, *mine}, refuses)
    return run, run.play(moves)


@whatever_happens
@given(MINE, MOVES, st.booleans(), st.booleans())
def test_every_unplug_is_asked_once(mine, moves, refuses, wait):
    run, _ = unplugging(mine, moves, refuses, wait)
    assert run.times("device_del") == Counter(mine)


@whatever_happens
@given(MINE, MOVES, st.booleans(), st.booleans())
def test_an_unplug_is_never_put_back(mine, moves, refuses, wait):
    run, _ = unplugging(mine, moves, refuses, wait)
    assert not run.times("device_add")


@whatever_happens
@given(MINE, MOVES, st.booleans(), st.booleans())
def test_every_id_of_an_unplug_is_accounted_for(mine, moves, refuses, wait):
    _, end = unplugging(mine, moves, refuses, wait)
    told = {*end.removed, *end.pending}.union(*end.failures, *end.rejections)
    assert told == ids_of(*mine)


@whatever_happens
@given(MINE, MOVES, st.booleans(), st.booleans())
def test_what_is_removed_is_gone(mine, moves, refuses, wait):
    run, end = unplugging(mine, moves, refuses, wait)
    assert run.slots.isdisjoint(end.removed)


@whatever_happens
@given(MINE, MOVES, st.booleans(), st.booleans())
def test_an_unplug_that_has_not_ended_is_pending(mine, moves, refuses, wait):
    run, end = unplugging(mine, moves, refuses, wait)
    assert run.asked <= set(end.pending)


@whatever_happens
@given(MINE, MOVES, st.booleans(), st.booleans())
def test_applied_unplugs_are_all_gone(mine, moves, refuses, wait):
    run, end = unplugging(mine, moves, refuses, wait)
    assert end.outcome != "applied" or run.slots == {0}


@whatever_happens
@given(MINE, MOVES, st.booleans())
def test_only_a_call_that_does_not_wait_is_requested(mine, moves, refuses):
    _, end = unplugging(mine, moves, refuses, wait=True)
    assert end.outcome != "requested"


@whatever_happens
@given(MOVES.filter(lambda moves: "cancel" not in moves), st.booleans())
def test_a_plug_after_a_pending_unplug_is_sent_only_once_the_slot_is_empty(moves, refuses):
    run = Run(Engine(awaited=[1], ids=IDS), {0, 1}, refuses, asked=[1])
    end = run.play(moves)
    assert run.slots_at_plugs in ([], [{0}])
    assert 1 in run.slots or end.outcome != "applied"


def test_nothing_to_do_sends_nothing():
    assert Engine().start() == []


def test_nothing_to_do_is_done_at_once():
    engine = Engine()
    engine.start()
    assert engine.end() == Report("applied")


@pytest.mark.parametrize(
    "late",
    [
        lambda engine: engine.replied(1),
        Engine.poll,
        lambda engine: engine.gone(1),
        lambda engine: engine.refused(1),
    ],
    ids=["reply", "poll", "event", "refusal"],
)
def test_what_comes_after_the_end_changes_nothing(late):
    engine = Engine([1], ids=IDS)
    engine.start()
    engine.replied(1)
    engine.seen(0, 1)
    assert late(engine) == []
    assert engine.end().plugged == (1, 101)


def test_a_call_that_is_cancelled_after_its_end_takes_its_plug_back():
    engine = Engine([1], ids=IDS)
    engine.start()
    engine.replied(1)
    engine.seen(0, 1)
    assert engine.cancelled() == [undo(1)]
    engine.replied(1)
    engine.gone(1)
    engine.seen(0)
    assert engine.end().undone == (1, 101)
