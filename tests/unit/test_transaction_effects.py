"""What a transaction may send, whatever the order: nothing twice, only its own undone, every id told."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from qmpvcpu.core.events import Signal, SignalKind
from qmpvcpu.core.model import Entity, Props
from qmpvcpu.core.transaction import (
    Add,
    Cancelled,
    Delete,
    Expired,
    Phase,
    Poll,
    Query,
    Replied,
    Snapshot,
    Transaction,
)


def entity(first, plugged=False):
    path = f"/machine/peripheral/vcpu{first}" if plugged else None
    return Entity((first, first + 100), "t", Props({"core-id": first}), path, None, True)


class Run:
    """A QEMU that answers in order, and a guest that ends unplugs as told; `moves` choose what happens next."""

    def __init__(self, transaction, slots, refuses):
        self.t, self.slots, self.refuses = transaction, set(slots), refuses
        self.sent, self.queue, self.asked = [], [], set()
        self.take(transaction.start())

    def take(self, effects):
        self.sent += effects
        self.queue += effects

    def feed(self, happened):
        if self.t.phase is not Phase.DONE:
            self.take(self.t.feed(happened))

    def answer(self, fails):
        if not self.queue:
            return None
        effect = self.queue.pop(0)
        if isinstance(effect, Query):
            return self.feed(Snapshot(frozenset(self.slots)))
        first = effect.entity.first
        if isinstance(effect, Add) and not fails:
            self.slots.add(first)
        elif isinstance(effect, Delete) and not fails:
            self.asked.add(first)
        return self.feed(Replied(first, "GenericError", "no") if fails else Replied(first))

    def guest(self):
        if not self.asked:
            return
        first = min(self.asked)
        self.asked.discard(first)
        if self.refuses:
            self.feed(Signal(SignalKind.GUEST_REFUSED, first, "busy"))
        else:
            self.slots.discard(first)

    def play(self, moves):
        for move in moves:
            match move:
                case "ok" | "error":
                    self.answer(move == "error")
                case "guest":
                    self.guest()
                case "poll":
                    self.feed(Poll())
                case "cancel":
                    self.feed(Cancelled())
        for _ in range(100):
            if self.t.phase is Phase.DONE:
                return self.t.result()
            if self.queue:
                self.answer(False)
            else:
                self.feed(Expired())
        raise AssertionError(self.t.states)


MOVES = st.lists(st.sampled_from(["ok", "ok", "error", "guest", "poll", "cancel"]), max_size=25)
FEW = st.sampled_from([1, 2, 3])


@settings(max_examples=80, deadline=None)
@given(FEW, MOVES, st.booleans(), st.booleans())
def test_plugs_end_all_there_or_all_accounted_for(count, moves, refuses, forbidden):
    mine = range(1, count + 1)
    transaction = Transaction([entity(n) for n in mine], undo_forbidden="kills" if forbidden else None)
    run = Run(transaction, {0, 9}, refuses)
    result = run.play(moves)
    added = Counter(effect.entity.first for effect in run.sent if isinstance(effect, Add))
    undone = Counter(effect.entity.first for effect in run.sent if isinstance(effect, Delete))
    assert added == Counter(mine)
    assert all(times == 1 for times in undone.values())
    assert not (forbidden and undone)
    assert {0, 9} <= run.slots
    there = {number for n in mine if n in run.slots for number in (n, n + 100)}
    assert set(result.plugged) >= there
    if result.outcome == "applied" and "cancel" not in moves:
        assert there == {number for n in mine for number in (n, n + 100)}
    if result.outcome == "failed":
        assert not there
        assert result.remaining == ()
    if result.outcome == "partial":
        assert set(result.remaining) >= there
    assert set(result.undone).isdisjoint(result.plugged)


@settings(max_examples=80, deadline=None)
@given(FEW, MOVES, st.booleans(), st.booleans())
def test_unplugs_are_asked_once_never_put_back_and_every_id_is_accounted_for(count, moves, refuses, wait):
    mine = range(1, count + 1)
    run = Run(Transaction([], [entity(n, True) for n in mine], wait=wait), {0, *mine}, refuses)
    result = run.play(moves)
    assert Counter(effect.entity.first for effect in run.sent if isinstance(effect, Delete)) == Counter(mine)
    assert not [effect for effect in run.sent if isinstance(effect, Add)]
    failed = {number for failure in (*result.failures, *result.rejections) for number in failure.entity.ids}
    assert set(result.removed) | set(result.pending) | failed == {k for n in mine for k in (n, n + 100)}
    assert {n for n in mine if n in result.removed}.isdisjoint(run.slots)
    assert run.asked <= set(result.pending)
    if result.outcome == "applied":
        assert run.slots == {0}
    assert not (wait and result.outcome == "requested")


@settings(max_examples=60, deadline=None)
@given(MOVES.filter(lambda moves: "cancel" not in moves), st.booleans())
def test_a_plug_after_a_pending_unplug_is_sent_only_once_the_slot_is_empty(moves, refuses):
    transaction = Transaction([], [], [entity(1, True)])
    run = Run(transaction, {0, 1}, refuses)
    run.asked.add(1)
    empty_when_sent = []
    take = run.take

    def watch(effects):
        empty_when_sent.extend(1 not in run.slots for effect in effects if isinstance(effect, Add))
        take(effects)

    run.take = watch
    result = run.play(moves)
    assert len(empty_when_sent) <= 1
    assert all(empty_when_sent)
    assert (1 in run.slots) or result.outcome != "applied"


def test_nothing_to_do_is_done_at_once():
    transaction = Transaction([])
    assert transaction.start() == []
    assert (transaction.phase, transaction.result().outcome) == (Phase.DONE, "applied")


def test_what_comes_after_the_end_changes_nothing():
    transaction = Transaction([entity(1)])
    transaction.start()
    transaction.feed(Replied(1))
    transaction.feed(Snapshot(frozenset({0, 1})))
    before = transaction.result()
    for late in (
        Replied(1),
        Poll(),
        Signal(SignalKind.DELETED, 1),
        Signal(SignalKind.GUEST_REFUSED, 1),
        Cancelled(),
    ):
        assert not any(isinstance(effect, Add | Delete) for effect in transaction.feed(late)), late
        assert transaction.phase is Phase.DONE
    assert (transaction.result().plugged, before.outcome) == ((1, 101), "applied")
