"""The table of transitions: each path by hand, then every order of replies, events, losses and cancels."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qmpvcpu.core.events import Names, Signal, SignalKind, interpret
from qmpvcpu.core.model import Entity, Props
from qmpvcpu.core.transaction import (
    Add,
    Again,
    Cancelled,
    Delete,
    Expired,
    ItemState,
    Phase,
    Poll,
    Query,
    Replied,
    Snapshot,
    Transaction,
    Unsent,
)


def entity(first, plugged=False, size=1):
    path = f"/machine/peripheral/vcpu{first}" if plugged else None
    return Entity(tuple(range(first, first + size)), "t", Props({"core-id": first}), path, None, True)


def kinds(effects):
    return [type(effect).__name__ for effect in effects]


def snap(*firsts):
    return Snapshot(frozenset(firsts))


def refused(first, reason="no"):
    return Signal(SignalKind.GUEST_REFUSED, first, reason)


def end(transaction):
    assert transaction.phase is Phase.DONE
    return transaction.result()


def test_plugs_go_out_together_with_one_query_behind_them():
    t = Transaction([entity(1), entity(2), entity(3)])
    assert kinds(t.start()) == ["Add", "Add", "Add", "Query"]
    for first in (1, 2, 3):
        assert t.feed(Replied(first)) == []
    assert t.phase is Phase.RUN
    assert t.feed(snap(0, 1, 2, 3)) == []
    assert (end(t).outcome, end(t).plugged) == ("applied", (1, 2, 3))


def test_what_happened_before_a_query_goes_out_asks_for_no_other():
    t = Transaction([], [entity(1, True), entity(2, True)])
    t.start()
    t.feed(Replied(1))
    t.feed(Replied(2))
    assert not t.seems_over
    assert kinds(t.feed(Poll())) == ["Query"]
    assert t.feed(Signal(SignalKind.DELETED, 1)) == []
    assert not t.seems_over
    assert t.feed(Signal(SignalKind.DELETED, 2)) == []
    assert t.seems_over
    t.asked()
    assert t.feed(snap(0)) == []
    assert (end(t).outcome, end(t).removed) == ("applied", (1, 2))


def test_what_happens_while_a_query_is_under_way_asks_once_more():
    t = Transaction([], [entity(1, True)])
    t.start()
    t.feed(Replied(1))
    t.feed(Poll())
    t.asked()
    t.feed(Signal(SignalKind.DELETED, 1))
    assert kinds(t.feed(snap(0, 1))) == ["Query"]
    t.feed(snap(0))
    assert end(t).outcome == "applied"


def test_what_was_not_sent_is_not_done_and_nothing_is_claimed_of_it():
    t = Transaction([entity(1), entity(2)], [])
    t.start()
    t.feed(Replied(1))
    t.feed(Unsent(2))
    assert t.feed(Cancelled()) == []
    assert kinds(t.feed(snap(0, 1))) == ["Delete"]
    assert t.feed(Unsent(1)) == [] or t.feed(snap(0, 1)) == []
    t.feed(snap(0, 1))
    result = end(t)
    # Plugged, its undo was not sent either; the other never began.
    assert (result.remaining, result.pending, result.plugged) == ((1,), (), (1,))


def test_unplugs_that_were_not_sent_leave_those_that_were():
    t = Transaction([], [entity(1, True), entity(2, True)])
    t.start()
    t.feed(Replied(1))
    t.feed(Unsent(2))
    t.asked()
    t.feed(Expired())
    t.feed(snap(0, 1, 2))
    for _ in range(2):
        t.feed(snap(0, 1, 2))
    assert (end(t).pending, end(t).removed, end(t).failures) == ((1,), (), ())
    assert (end(t).unasked, end(t).outcome) == ((2,), "pending")


def test_one_that_goes_after_others_were_brought_back_for_it_makes_no_success():
    t = Transaction([], [entity(7, True), entity(8, True)], atomic=True, doubted=frozenset({7, 8}))
    t.start()
    t.feed(Replied(7))
    t.feed(Replied(8, "GenericError", "in the process of unplug"))
    effects = t.feed(snap(0, 8))
    assert [(type(e).__name__, e.entity.first) for e in effects if type(e) is Add] == [("Add", 7)]
    t.feed(Replied(7))
    # Only now the earlier unplug of 8 ends.
    t.feed(snap(0, 7))
    for _ in range(3):
        t.feed(snap(0, 7))
    result = end(t)
    assert (result.outcome, result.undone, result.removed) == ("partial", (7,), (8,))


def test_a_repeated_unplug_that_fails_leaves_the_first_open():
    t = Transaction([], [entity(5, True)], doubted=frozenset({5}))
    t.start()
    # It may answer the earlier one: asked once more, which QEMU declines.
    t.feed(refused(5))
    assert kinds(t.feed(Replied(5))) == ["Delete"]
    t.feed(Replied(5, "GenericError", "in the process of unplug"))
    for _ in range(2):
        t.feed(snap(0, 5))
    assert end(t).pending == (5,)


def test_what_is_asked_before_or_refused_before_stays_so_where_it_is_not_asked_again():
    t = Transaction([], [entity(5, True), entity(6, True)], retries=1, doubted=frozenset({6}))
    t.start()
    t.feed(Replied(5))
    t.feed(refused(5, "busy"))
    assert kinds(t.feed(Again())) == ["Delete"]
    t.feed(Unsent(5))
    t.feed(Unsent(6))
    t.feed(Expired())
    for _ in range(2):
        t.feed(snap(0, 5, 6))
    result = end(t)
    assert [failure.text for failure in result.rejections] == ["busy"] and result.pending == (6,)
    assert result.unasked == ()


def test_an_error_before_others_are_answered_is_looked_at_when_they_are():
    t = Transaction([], [entity(5, True), entity(6, True)])
    t.start()
    t.feed(Replied(5, "DeviceNotFound", "Device 'vcpu5' not found"))
    assert kinds(t.feed(Unsent(6))) == ["Query"]
    t.feed(snap(0, 6))
    result = end(t)
    assert (result.removed, result.unasked, result.outcome) == ((5,), (6,), "partial")


def test_an_id_that_is_still_taken_is_tried_again():
    text = "Duplicate device ID 'vcpu8'"
    t = Transaction([], [], [entity(8, True, 8)], doubted=frozenset({8}))
    t.start()
    t.feed(Signal(SignalKind.LOOK_AGAIN))
    assert kinds(t.feed(snap(0))) == ["Add"]
    # Its slot is empty, and its device not quite gone.
    assert kinds(t.feed(Replied(8, "GenericError", text))) == ["Query"]
    assert t.feed(snap(0)) == [] and t.to_retry
    assert kinds(t.feed(Again())) == ["Add"]
    t.feed(Replied(8))
    t.feed(snap(0, 8))
    assert (end(t).outcome, end(t).plugged) == ("applied", tuple(range(8, 16)))


@pytest.mark.parametrize("how", ["taken for good", "plugged by another client", "deadline"])
def test_an_id_that_stays_taken_is_a_failure(how):
    t = Transaction([entity(1)])
    t.start()
    t.feed(snap(0))
    for _ in range(3):
        if t.phase is not Phase.DONE:
            t.feed(Replied(1, "GenericError", "Duplicate device ID 'vcpu1'"))
            t.feed(snap(0, 1) if how == "plugged by another client" else snap(0))
        if how == "deadline":
            t.feed(Expired())
            t.feed(snap(0))
        t.feed(Again())
    assert (end(t).outcome, end(t).plugged) == ("failed", ())
    assert "Duplicate" in end(t).failures[0].text


def test_one_that_is_asked_again_is_not_over():
    t = Transaction([], [entity(1, True)], retries=1)
    t.start()
    t.feed(Replied(1))
    t.feed(Signal(SignalKind.DELETED, 1))
    t.feed(refused(1))
    assert kinds(t.feed(Again())) == ["Delete"]
    t.feed(Replied(1))
    assert not t.seems_over


def test_a_plug_that_is_not_in_the_query_is_a_failure():
    t = Transaction([entity(1)])
    t.start()
    t.feed(Replied(1))
    t.feed(snap(0))
    assert (end(t).outcome, "not there" in end(t).failures[0].text) == ("failed", True)


def test_a_failing_plug_undoes_the_others_and_each_undo_is_verified():
    t = Transaction([entity(1), entity(2)])
    t.start()
    t.feed(Replied(1))
    assert t.feed(Replied(2, "GenericError", "taken")) == []  # the query under way says what there is to undo
    effects = t.feed(snap(0, 1))
    assert [(type(e), e.entity.first, e.undo) for e in effects] == [(Delete, 1, True)]
    assert kinds(t.feed(Replied(1))) == ["Query"]
    assert t.feed(snap(0, 1)) == []
    assert t.phase is Phase.UNDO
    assert kinds(t.feed(Signal(SignalKind.DELETED, 1))) == ["Query"]
    t.feed(snap(0))
    result = end(t)
    assert (result.outcome, result.undone, result.remaining) == ("failed", (1,), ())
    assert (result.failures[0].error_class, result.failures[0].text) == ("GenericError", "taken")


@pytest.mark.parametrize("how", ["refused", "error", "silent"])
def test_an_undo_that_fails_is_partial_and_names_what_stays(how):
    t = Transaction([entity(1), entity(2)])
    t.start()
    t.feed(Replied(1))
    t.feed(Replied(2, "GenericError", "taken"))
    t.feed(snap(0, 1))
    t.feed(Replied(1, "GenericError", "no") if how == "error" else Replied(1))
    t.feed(snap(0, 1))
    if how == "refused":
        t.feed(refused(1))
        t.feed(snap(0, 1))
    if how == "silent":
        t.feed(Expired())
        t.feed(snap(0, 1))
    result = end(t)
    assert (result.outcome, result.remaining, result.undone) == ("partial", (1,), ())
    assert result.pending == ((1,) if how == "silent" else ())


def test_where_an_undo_is_forbidden_none_is_tried():
    t = Transaction([entity(1), entity(2)], undo_forbidden="it kills QEMU")
    t.start()
    t.feed(Replied(1))
    assert t.feed(Replied(2, "E", "taken")) == []
    t.feed(snap(0, 1))
    result = end(t)
    assert (result.outcome, result.remaining, result.undo_forbidden) == ("partial", (1,), "it kills QEMU")


def test_unplugs_are_asked_together_and_end_by_a_query_only():
    t = Transaction([], [entity(1, True), entity(2, True)])
    assert kinds(t.start()) == ["Delete", "Delete"]
    assert t.feed(Replied(1)) == [] and not t.to_look_soon
    # QEMU is not kept from its work; but before long it is looked at.
    assert t.feed(Replied(2)) == [] and t.to_look_soon
    assert kinds(t.feed(Poll())) == ["Query"]
    t.asked()
    assert not t.to_look_soon
    t.feed(snap(0, 1, 2))
    # Of several that go, the last is worth a query; and an event alone ends nothing.
    assert t.feed(Signal(SignalKind.DELETED, 1)) == []
    assert kinds(t.feed(Signal(SignalKind.DELETED, 2))) == ["Query"]
    assert t.feed(snap(0, 1, 2)) == []
    t.feed(Poll())
    t.feed(snap(0, 2))
    assert t.phase is Phase.RUN
    t.feed(Signal(SignalKind.LOOK_AGAIN))
    t.feed(snap(0))
    assert (end(t).outcome, end(t).removed) == ("applied", (1, 2))


def test_of_what_a_query_shows_gone_an_event_behind_it_asks_for_no_other():
    t = Transaction([], [entity(1, True), entity(2, True)])
    t.start()
    t.feed(Replied(1))
    t.feed(Replied(2))
    t.feed(Poll())
    t.asked()
    for first in (1, 2):
        assert t.feed(Signal(SignalKind.DELETED, first)) == []
    assert t.feed(snap(0)) == []
    assert end(t).removed == (1, 2)


def test_one_that_is_to_come_back_is_looked_at_as_soon_as_it_is_gone():
    t = Transaction([], [entity(2, True)], [entity(1, True)])
    t.start()
    t.feed(Replied(2))
    t.feed(snap(0, 1, 2))
    assert kinds(t.feed(Signal(SignalKind.DELETED, 1))) == ["Query"]
    assert kinds(t.feed(snap(0, 2))) == ["Add"]


def test_gone_before_the_reply_to_device_del():
    t = Transaction([], [entity(8, True, 8)])
    t.start()
    t.feed(Signal(SignalKind.DELETED, 8))
    assert kinds(t.feed(Replied(8))) == ["Query"]
    t.feed(snap(0))
    assert (end(t).outcome, end(t).removed) == ("applied", tuple(range(8, 16)))


def test_device_not_found_is_gone_if_the_query_says_so():
    t = Transaction([], [entity(1, True)])
    t.start()
    t.feed(Replied(1, "DeviceNotFound", "Device 'vcpu1' not found"))
    t.feed(snap(0))
    assert end(t).outcome == "applied"


def test_an_error_of_device_del_is_a_failure_with_qemus_text():
    t = Transaction([], [entity(1, True)])
    t.start()
    t.feed(Replied(1, "GenericError", "not supported"))
    t.feed(snap(0, 1))
    assert (end(t).outcome, end(t).failures[0].text) == ("failed", "not supported")


def test_a_rejection_keeps_the_guests_reason_and_is_checked_by_a_query():
    t = Transaction([], [entity(1, True)])
    t.start()
    t.feed(Replied(1))
    t.feed(snap(0, 1))
    assert kinds(t.feed(refused(1, "eject disabled"))) == ["Query"]
    t.feed(snap(0, 1))
    assert (end(t).outcome, end(t).rejections[0].text) == ("rejected", "eject disabled")


def test_ejecting_is_no_end():
    t = Transaction([], [entity(1, True)])
    t.start()
    t.feed(Replied(1))
    t.feed(snap(0, 1))
    assert t.feed(Signal(SignalKind.EJECTING, 1)) == []
    assert t.waiting


def test_at_the_deadline_one_last_query_decides_between_pending_and_done():
    for last, outcome in ((snap(0, 1), "pending"), (snap(0), "applied")):
        t = Transaction([], [entity(1, True)])
        t.start()
        t.feed(Replied(1))
        t.feed(snap(0, 1))
        assert kinds(t.feed(Expired())) == ["Query"]
        t.feed(last)
        assert end(t).outcome == outcome


def test_async_ends_as_soon_as_qemu_took_it():
    t = Transaction([], [entity(1, True)], wait=False)
    t.start()
    t.feed(Replied(1))
    t.feed(snap(0, 1))
    assert (end(t).outcome, end(t).pending) == ("requested", (1,))


def test_a_reset_drops_what_was_asked_where_the_machine_is_a_pc():
    for drops, phase in ((True, Phase.DONE), (False, Phase.RUN)):
        t = Transaction([], [entity(1, True)], reset_drops_unplug=drops)
        t.start()
        t.feed(Replied(1))
        t.feed(snap(0, 1))
        t.feed(Signal(SignalKind.RESET, None, "the machine was reset"))
        t.feed(snap(0, 1))
        assert t.phase is phase


def test_cancelled_plugs_are_undone_and_cancelled_unplugs_stay_pending():
    t = Transaction([entity(1)], [entity(2, True)])
    t.start()
    assert t.feed(Cancelled()) == []
    t.feed(Replied(1))
    t.feed(Replied(2))
    assert kinds(t.feed(snap(0, 1, 2))) == ["Delete"]
    assert kinds(t.feed(Replied(1))) == ["Query"]
    t.feed(snap(0, 2))
    assert (end(t).undone, end(t).pending, end(t).plugged) == ((1,), (2,), ())


def test_plug_after_a_pending_unplug():
    t = Transaction([], [], [entity(1, True)])
    t.start()
    assert t.waiting
    t.feed(Poll())
    assert kinds(t.feed(snap(0))) == ["Add"]
    assert kinds(t.feed(Replied(1))) == ["Query"]
    t.feed(snap(0, 1))
    assert (end(t).outcome, end(t).plugged) == ("applied", (1,))


def test_a_pending_unplug_that_the_guest_then_refused_leaves_it_enabled():
    t = Transaction([], [], [entity(1, True)])
    t.start()
    t.feed(refused(1))
    t.feed(snap(0, 1))
    assert (end(t).outcome, end(t).kept, end(t).plugged) == ("applied", (1,), ())


def test_a_refusal_before_the_reply_may_answer_an_earlier_request():
    t = Transaction([], [entity(1, True)], doubted=frozenset({1}))
    t.start()
    t.feed(refused(1, "the one before, or this one"))
    assert kinds(t.feed(Replied(1))) == ["Delete"]
    t.feed(Replied(1))
    t.feed(snap(0, 1))
    assert t.phase is Phase.RUN
    t.feed(refused(1, "this one"))
    t.feed(snap(0, 1))
    assert end(t).rejections[0].text == "this one"


def test_a_failing_device_del_leaves_an_earlier_unplug_open():
    for last, outcome, pending in ((snap(0, 1), "failed", (1,)), (snap(0), "applied", ())):
        t = Transaction([], [entity(1, True)], doubted=frozenset({1}))
        t.start()
        t.feed(Replied(1, "GenericError", "no"))
        t.feed(last)
        assert (end(t).outcome, end(t).pending, t.still_asked) == (outcome, pending, pending)


def test_a_refusal_may_overtake_the_reply():
    t = Transaction([], [entity(1, True)])
    t.start()
    t.feed(refused(1, "eject disabled"))
    t.feed(Replied(1))
    t.feed(snap(0, 1))
    assert end(t).rejections[0].text == "eject disabled"


def test_removed_and_plugged_by_another_client_is_not_called_removed():
    t = Transaction([], [entity(1, True), entity(2, True)])
    t.start()
    t.feed(Replied(1))
    t.feed(Replied(2))
    t.feed(Snapshot(frozenset({0, 1}), frozenset({1})))
    t.feed(snap(0, 1))
    result = end(t)
    assert (result.outcome, result.removed, result.pending) == ("partial", (2,), ())
    assert "another client plugged it again" in result.failures[0].text


def test_a_retry_asks_again_after_the_pause_and_only_so_often():
    t = Transaction([], [entity(1, True)], retries=1)
    t.start()
    t.feed(Replied(1))
    t.feed(snap(0, 1))
    assert kinds(t.feed(refused(1, "busy"))) == ["Query"]
    t.feed(snap(0, 1))
    assert (t.phase, t.to_retry, t.still_asked) == (Phase.RUN, True, ())
    assert kinds(t.feed(Again())) == ["Delete"]
    t.feed(Replied(1))
    t.feed(snap(0, 1))
    t.feed(refused(1, "busy still"))
    t.feed(snap(0, 1))
    assert (end(t).outcome, end(t).rejections[0].text) == ("rejected", "busy still")


def test_a_retry_that_works_is_a_removal():
    t = Transaction([], [entity(1, True)], retries=3)
    t.start()
    text = "acpi: device unplug request for not supported device type: qemu64-x86_64-cpu"
    t.feed(Replied(1, "GenericError", text))
    t.feed(snap(0, 1))
    assert t.to_retry
    t.feed(Again())
    t.feed(Replied(1))
    t.feed(snap(0, 1))
    t.feed(Signal(SignalKind.DELETED, 1))
    t.feed(snap(0))
    assert (end(t).outcome, end(t).failures) == ("applied", ())


@pytest.mark.parametrize("how", [Expired(), Cancelled()])
def test_a_retry_that_is_still_to_come_at_the_end_is_the_rejection_it_was(how):
    t = Transaction([], [entity(1, True)], retries=3)
    t.start()
    t.feed(Replied(1))
    t.feed(snap(0, 1))
    t.feed(refused(1, "busy"))
    t.feed(snap(0, 1))
    t.feed(how)
    assert t.feed(Again()) == []
    t.feed(snap(0, 1))
    assert (end(t).outcome, end(t).pending) == ("rejected", ())


def test_an_error_that_does_not_pass_is_not_asked_again():
    t = Transaction([], [entity(1, True)], retries=3)
    t.start()
    t.feed(Replied(1, "GenericError", "no such thing"))
    t.feed(snap(0, 1))
    assert end(t).outcome == "failed"


def atomic_with_one_refusal(**options):
    t = Transaction([], [entity(1, True), entity(2, True), entity(3, True)], atomic=True, **options)
    t.start()
    for first in (1, 2, 3):
        t.feed(Replied(first))
    t.feed(snap(0, 1, 2, 3))
    t.feed(snap(0, 1, 2, 3))
    t.feed(refused(2, "busy"))
    t.feed(snap(0, 2, 3))
    return t


def test_atomic_waits_for_every_end_and_brings_back_what_was_removed():
    t = atomic_with_one_refusal()
    assert t.phase is Phase.RUN  # 3 may still go
    t.feed(Signal(SignalKind.DELETED, 3))
    effects = t.feed(snap(0, 2))
    assert [(type(e), e.entity.first) for e in effects[:2]] == [(Add, 1), (Add, 3)]
    assert kinds(effects[2:]) == ["Query"]
    t.feed(Replied(1))
    t.feed(Replied(3))
    t.feed(snap(0, 1, 2, 3))
    result = end(t)
    assert (result.outcome, result.undone, result.removed, result.lost) == ("rejected", (1, 3), (), ())


def test_atomic_with_one_pending_brings_back_the_rest_and_names_it():
    t = atomic_with_one_refusal()
    t.feed(Expired())
    assert kinds(t.feed(snap(0, 2, 3))) == ["Add", "Query"]
    t.feed(Replied(1))
    t.feed(snap(0, 1, 2, 3))
    assert (end(t).outcome, end(t).undone, end(t).pending) == ("rejected", (1,), (3,))


@pytest.mark.parametrize("how", ["error", "vanished", "forbidden"])
def test_atomic_that_cannot_bring_back_is_partial(how):
    t = atomic_with_one_refusal(restore_forbidden="it kills QEMU" if how == "forbidden" else None)
    t.feed(Expired())
    effects = t.feed(snap(0, 2, 3))
    if how == "forbidden":
        assert effects == []
    else:
        t.feed(Replied(1, "GenericError", "no") if how == "error" else Replied(1))
        t.feed(snap(0, 2, 3))
    result = end(t)
    assert (result.outcome, result.lost, result.pending) == ("partial", (1,), (3,))
    assert result.undo_forbidden == ("it kills QEMU" if how == "forbidden" else None)


@pytest.mark.parametrize(
    ("name", "data", "signal"),
    [
        ("DEVICE_DELETED", {"device": "vcpu1", "path": "/machine/peripheral/vcpu1"}, (SignalKind.DELETED, 1)),
        ("DEVICE_DELETED", {"path": "/machine/unattached/device[3]"}, (SignalKind.DELETED, 2)),
        ("DEVICE_DELETED", {"path": "/machine/peripheral/vcpu1/lapic"}, (SignalKind.DELETED, 1)),
        ("DEVICE_DELETED", {"path": "/machine/peripheral/vcpu1/thread[0]"}, (SignalKind.LOOK_AGAIN, None)),
        ("DEVICE_DELETED", {"path": "/machine/peripheral/other/lapic"}, (SignalKind.LOOK_AGAIN, None)),
        ("DEVICE_DELETED", {"device": "vcpu4", "path": "/machine/peripheral/vcpu4"}, (SignalKind.DELETED, 4)),
        ("DEVICE_UNPLUG_GUEST_ERROR", {"device": "vcpu1", "path": "x"}, (SignalKind.GUEST_REFUSED, 1)),
        ("DEVICE_UNPLUG_GUEST_ERROR", {"device": "net0", "path": "x"}, None),
        ("ACPI_DEVICE_OST", {"info": {"slot-type": "DIMM", "slot": "1", "source": 3, "status": 128}}, None),
        ("RESET", {"guest": False}, (SignalKind.RESET, None)),
        ("STOP", {}, None),
        ("ACPI_DEVICE_OST", {}, None),
    ],
)
def test_events_are_matched_by_id_or_exact_path(name, data, signal):
    cold = Entity((2,), "t", Props({"core-id": 2}), "/machine/unattached/device[3]", None, True)
    found = interpret(name, data, Names([entity(1, True), cold, entity(4)]))
    assert (None if found is None else (found.kind, found.first)) == signal


@pytest.mark.parametrize(
    ("source", "status", "kind", "words"),
    [
        (3, 132, SignalKind.EJECTING, None),
        (3, 0, SignalKind.LOOK_AGAIN, None),
        (3, 128, SignalKind.GUEST_REFUSED, "eject disabled"),
        (3, 1, SignalKind.GUEST_REFUSED, "failed"),
        (3, 999, SignalKind.GUEST_REFUSED, "unknown status 999"),
        (1, 0, SignalKind.LOOK_AGAIN, None),
    ],
)
def test_ost_codes_in_words(source, status, kind, words):
    info = {"slot-type": "CPU", "slot": "1", "source": source, "status": status}
    found = interpret("ACPI_DEVICE_OST", {"info": info}, Names([entity(0, True), entity(1, True)]))
    assert found.kind is kind
    if words:
        assert (found.first, words in found.reason) == (1, True)


class World(RuleBasedStateMachine):
    """A QEMU and a guest that do anything in any order; the transaction is told of it late, doubled or never."""

    def __init__(self):
        super().__init__()
        self.slots = set()
        self.asked = set()  # unplugs QEMU has taken and the guest has not ended
        self.in_flight = []
        self.expired_in = {}
        self.cancelled = False
        self.fed_after_expiry = 0

    @initialize(
        plugs=st.sets(st.integers(1, 4)),
        unplugs=st.sets(st.integers(5, 8)),
        awaited=st.sets(st.integers(9, 10)),
        forbidden=st.sampled_from([None, "kills"]),
        wait=st.booleans(),
        drops=st.booleans(),
        atomic=st.booleans(),
        unrestorable=st.sampled_from([None, "kills"]),
        retries=st.integers(0, 2),
        doubted=st.sets(st.integers(5, 8)),
    )
    def begin(self, plugs, unplugs, awaited, forbidden, wait, drops, atomic, unrestorable, retries, doubted):
        self.plugs, self.unplugs, self.awaited, self.wait, self.drops = plugs, unplugs, awaited, wait, drops
        self.atomic, self.unrestorable, self.retries = atomic, unrestorable, retries
        self.replaced = set()
        self.deletes = 0
        self.slots = {0, *unplugs, *awaited}
        self.doubted = doubted & unplugs
        self.asked = {*awaited, *self.doubted}
        self.t = Transaction(
            [entity(n) for n in sorted(plugs)],
            [entity(n, True) for n in sorted(unplugs)],
            [entity(n, True) for n in sorted(awaited)],
            undo_forbidden=forbidden,
            wait=wait,
            reset_drops_unplug=drops,
            atomic=atomic,
            retries=retries,
            doubted=frozenset(doubted),
            restore_forbidden=unrestorable,
        )
        self.perform(self.t.start())

    def perform(self, effects):
        assert not (self.cancelled and any(type(e) is Add for e in effects)), "a new plug after a cancel"
        deletes = [e for e in effects if type(e) is Delete and not e.undo]
        assert not (self.cancelled and deletes), "a new unplug after a cancel"
        self.deletes += len(deletes)
        assert self.deletes <= len(self.unplugs) * (1 + self.retries) + len(self.doubted), (
            "asked more often than allowed"
        )
        if not self.atomic or self.unrestorable:
            assert not any(type(e) is Add and e.entity.first in self.unplugs for e in effects)
        self.in_flight += effects

    def feed(self, happened):
        if self.t.phase is not Phase.DONE:
            self.perform(self.t.feed(happened))

    @property
    def open(self):
        return hasattr(self, "t") and self.t.phase is not Phase.DONE

    @precondition(lambda self: self.open and self.in_flight)
    @rule(succeeds=st.booleans())
    def qemu_answers_the_oldest(self, succeeds):
        effect = self.in_flight.pop(0)
        if isinstance(effect, Query):
            self.feed(Snapshot(frozenset(self.slots), frozenset(self.replaced)))
            return
        first = effect.entity.first
        if isinstance(effect, Add):
            if succeeds and first not in self.slots:
                self.slots.add(first)
                self.replaced.add(first)
                self.feed(Replied(first))
            else:
                self.feed(Replied(first, "GenericError", "no"))
        elif succeeds and first in self.slots:
            self.asked.add(first)
            self.feed(Replied(first))
        else:
            self.feed(Replied(first, "DeviceNotFound", "gone"))

    @precondition(lambda self: self.open and self.asked)
    @rule(data=st.data(), told=st.sampled_from(["never", "once", "twice", "unclearly"]))
    def guest_lets_go(self, data, told):
        first = data.draw(st.sampled_from(sorted(self.asked)))
        self.asked.discard(first)
        self.slots.discard(first)
        self.replaced.discard(first)
        for _ in range({"never": 0, "once": 1, "twice": 2, "unclearly": 0}[told]):
            self.feed(Signal(SignalKind.DELETED, first))
        if told == "unclearly":
            self.feed(Signal(SignalKind.LOOK_AGAIN))

    @precondition(lambda self: self.open and self.asked)
    @rule(data=st.data())
    def guest_refuses(self, data):
        first = data.draw(st.sampled_from(sorted(self.asked)))
        self.asked.discard(first)
        self.feed(refused(first))

    @precondition(lambda self: self.open)
    @rule(first=st.integers(0, 12), kind=st.sampled_from([SignalKind.EJECTING, SignalKind.DELETED]))
    def a_stray_event_comes(self, first, kind):
        self.feed(Signal(kind, first))

    @property
    def gone_unseen(self):
        """What the guest let go, and no query has shown yet."""
        unseen = (ItemState.ASKED, ItemState.AWAITING)
        return sorted(n for n in self.unplugs | self.awaited if n not in self.slots and self.t.states[n] in unseen)

    @precondition(lambda self: self.open and self.gone_unseen)
    @rule(data=st.data())
    def another_client_plugs_it(self, data):
        first = data.draw(st.sampled_from(self.gone_unseen))
        self.slots.add(first)
        self.replaced.add(first)

    @precondition(lambda self: self.open and self.t.to_retry)
    @rule()
    def the_pause_is_over(self):
        self.feed(Again())

    @precondition(lambda self: self.open and self.drops)
    @rule()
    def the_machine_is_reset(self):
        self.asked.clear()
        self.feed(Signal(SignalKind.RESET, None, "reset"))

    @precondition(lambda self: self.open)
    @rule()
    def time_goes_by(self):
        self.feed(Poll())

    @precondition(lambda self: self.open and not self.expired_in.get(self.t.phase))
    @rule()
    def the_deadline_comes(self):
        self.expired_in[self.t.phase] = True
        self.feed(Expired())

    @precondition(lambda self: self.open and not self.cancelled)
    @rule()
    def the_caller_cancels(self):
        self.cancelled = True
        self.feed(Cancelled())

    @precondition(lambda self: not self.open)
    @rule()
    def it_is_over(self):
        pass

    @invariant()
    def nothing_is_claimed_that_the_slot_denies(self):
        if not hasattr(self, "t"):
            return
        for first, state in self.t.states.items():
            if state in (ItemState.REMOVED, ItemState.UNDONE):
                assert first not in self.slots
            if state is ItemState.PLUGGED:
                assert first in self.slots
        if self.t.phase is not Phase.DONE:
            return
        result = self.t.result()
        if result.outcome == "applied" and not self.cancelled:
            assert self.plugs <= self.slots
            assert not self.unplugs & self.slots
        # What QEMU was asked to let go and the guest has not ended is told, or was given up as rejected.
        silent = self.asked - set(result.pending)
        for first in silent:
            assert self.t.states[first] in (ItemState.REJECTED, ItemState.UNDO_FAILED, ItemState.KEPT), first

    def teardown(self):
        """Whatever has happened, deadline and answers alone bring it to its end."""
        if not hasattr(self, "t"):
            return
        for _ in range(200):
            if self.t.phase is Phase.DONE:
                return
            if self.in_flight:
                self.qemu_answers_the_oldest(succeeds=True)
            elif not self.expired_in.get(self.t.phase):
                self.expired_in[self.t.phase] = True
                self.feed(Expired())
            else:
                raise AssertionError(f"stuck in {self.t.states}")
        raise AssertionError("does not end")


World.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestEveryOrder = World.TestCase
