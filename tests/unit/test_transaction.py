"""One request in QEMU: each path by hand, then every order of replies, events, losses and cancels."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.engine import QUERY, Engine, Report, add, delete, meaning, undo

CORE = tuple(range(8, 16))


def started(*, plug=(), unplug=(), awaited=(), **options):
    """What is to be done is sent; `start()` has its effects."""
    engine = Engine(plug, unplug, awaited, **options)
    engine.start()
    return engine


def unplugging(*firsts, **options):
    """QEMU has taken these unplugs, and a query has shown that they are still there."""
    engine = started(unplug=firsts, **options)
    for first in firsts:
        engine.replied(first)
    engine.poll()
    engine.query_goes_out()
    engine.seen(0, *firsts)
    return engine


def failing_plug(**options):
    """Of two plugs the first is done, and the second declined."""
    engine = started(plug=[1, 2], **options)
    engine.replied(1)
    engine.failed(2, "taken")
    return engine


# -- plugs -----------------------------------------------------------------------------------------


def test_plugs_go_out_together_with_one_query_behind_them():
    assert Engine([1, 2, 3]).start() == [add(1), add(2), add(3), QUERY]


def test_replies_to_plugs_ask_for_no_query_of_their_own():
    engine = started(plug=[1, 2, 3])
    assert [engine.replied(first) for first in (1, 2, 3)] == [[], [], []]


def test_replies_to_plugs_end_nothing():
    engine = started(plug=[1])
    engine.replied(1)
    assert not engine.ended


def test_plugs_end_with_the_query_that_shows_them():
    engine = started(plug=[1, 2, 3])
    for first in (1, 2, 3):
        engine.replied(first)
    engine.seen(0, 1, 2, 3)
    assert engine.end() == Report("applied", plugged=(1, 2, 3))


def test_a_plug_that_is_not_in_the_query_is_a_failure():
    engine = started(plug=[1])
    engine.replied(1)
    engine.seen(0)
    text = "QEMU accepted device_add, but the vCPU is not there"
    assert engine.end() == Report("failed", failures={(1,): text})


# -- an id that is still taken ---------------------------------------------------------------------

DUPLICATE = "Duplicate device ID 'vcpu8'"


def still_taken():
    """A core's slot is empty, and its device not quite gone."""
    engine = started(awaited=[8], ids={8: CORE}, doubted=[8])
    engine.something_changed()
    engine.seen(0)
    return engine


def test_an_id_that_is_still_taken_is_looked_at():
    assert still_taken().failed(8, DUPLICATE) == [QUERY]


def test_an_id_that_is_still_taken_waits_for_a_pause():
    engine = still_taken()
    engine.failed(8, DUPLICATE)
    assert engine.seen(0) == []
    assert "retry" in engine.wakes


def test_an_id_that_is_still_taken_is_tried_again():
    engine = still_taken()
    engine.failed(8, DUPLICATE)
    engine.seen(0)
    assert engine.pause_is_over() == [add(8)]
    engine.replied(8)
    engine.seen(0, 8)
    assert engine.end() == Report("applied", plugged=CORE)


def test_an_id_that_is_taken_by_the_vcpu_itself_since_another_client_plugged_it_is_no_failure():
    engine = started(plug=[1, 2])
    engine.failed(1, "Duplicate device ID 'vcpu1'")
    engine.replied(2)
    engine.seen(0, 1, 2)
    engine.pause_is_over()
    engine.seen(0, 1, 2)
    assert engine.end() == Report("applied", plugged=(2,))


@pytest.mark.parametrize("how", ["taken for good", "deadline"])
def test_an_id_that_stays_taken_is_a_failure(how):
    engine = started(plug=[1])
    engine.seen(0)
    for _ in range(5):
        if not engine.ended:
            engine.failed(1, "Duplicate device ID 'vcpu1'")
            engine.seen(0)
        if how == "deadline":
            engine.expired()
            engine.seen(0)
        engine.pause_is_over()
    assert engine.end() == Report(
        "failed", failures={(1,): "GenericError: Duplicate device ID 'vcpu1'"}
    )


# -- the undo of plugs -----------------------------------------------------------------------------


def test_what_there_is_to_undo_says_the_query_under_way():
    engine = started(plug=[1, 2])
    engine.replied(1)
    assert engine.failed(2, "taken") == []


def test_a_failing_plug_undoes_the_others():
    assert failing_plug().seen(0, 1) == [undo(1)]


def test_an_undo_is_looked_at():
    engine = failing_plug()
    engine.seen(0, 1)
    assert engine.replied(1) == [QUERY]


def test_an_undo_has_not_ended_while_its_slot_is_full():
    engine = failing_plug()
    engine.seen(0, 1)
    engine.replied(1)
    assert engine.seen(0, 1) == []
    assert not engine.ended


def test_the_event_of_an_undo_is_verified_by_a_query():
    engine = failing_plug()
    engine.seen(0, 1)
    engine.replied(1)
    engine.seen(0, 1)
    assert engine.gone(1) == [QUERY]
    engine.seen(0)
    assert engine.end() == Report("failed", undone=(1,), failures={(2,): "GenericError: taken"})


@pytest.mark.parametrize("how", ["refused", "error", "silent"])
def test_an_undo_that_fails_is_partial_and_names_what_stays(how):
    engine = failing_plug()
    engine.seen(0, 1)
    if how == "error":
        engine.failed(1, "no")
    else:
        engine.replied(1)
    engine.seen(0, 1)
    if how == "refused":
        engine.refused(1)
        engine.seen(0, 1)
    if how == "silent":
        engine.expired()
        engine.seen(0, 1)
    pending = (1,) if how == "silent" else ()
    failures = {(2,): "GenericError: taken"}
    assert engine.end() == Report(
        "partial", plugged=(1,), remaining=(1,), pending=pending, failures=failures
    )


def test_where_an_undo_is_forbidden_none_is_tried():
    engine = failing_plug(undo_forbidden="it kills QEMU")
    assert engine.seen(0, 1) == []


def test_where_an_undo_is_forbidden_the_end_says_why():
    engine = failing_plug(undo_forbidden="it kills QEMU")
    engine.seen(0, 1)
    assert engine.end() == Report(
        "partial",
        plugged=(1,),
        remaining=(1,),
        failures={(2,): "GenericError: taken"},
        undo_forbidden="it kills QEMU",
    )


# -- unplugs ---------------------------------------------------------------------------------------


def test_unplugs_go_out_together():
    assert Engine(unplug=[1, 2]).start() == [delete(1), delete(2)]


def test_qemu_that_has_taken_all_unplugs_is_looked_at_soon_and_not_at_once():
    engine = started(unplug=[1, 2])
    effects = [engine.replied(first) for first in (1, 2)]
    assert (effects, "soon" in engine.wakes) == ([[], []], True)


def test_qemu_that_has_not_taken_all_unplugs_is_left_to_its_work():
    engine = started(unplug=[1, 2])
    engine.replied(1)
    assert "soon" not in engine.wakes


def test_the_first_look_is_taken_once():
    engine = started(unplug=[1])
    engine.replied(1)
    assert engine.poll() == [QUERY]
    engine.query_goes_out()
    assert "soon" not in engine.wakes


def test_of_several_that_go_the_last_is_worth_a_query():
    engine = unplugging(1, 2)
    assert [engine.gone(first) for first in (1, 2)] == [[], [QUERY]]


def test_events_alone_end_no_unplug():
    engine = unplugging(1)
    engine.gone(1)
    engine.seen(0, 1)
    assert not engine.ended


def test_unplugs_end_when_queries_show_all_of_them_gone():
    engine = unplugging(1, 2)
    engine.poll()
    engine.seen(0, 2)
    assert not engine.ended
    engine.something_changed()
    engine.seen(0)
    assert engine.end() == Report("applied", removed=(1, 2))


def test_what_happened_before_a_query_goes_out_asks_for_no_other():
    engine = started(unplug=[1, 2])
    engine.replied(1)
    engine.replied(2)
    assert engine.poll() == [QUERY]
    assert [engine.gone(first) for first in (1, 2)] == [[], []]
    engine.query_goes_out()
    assert engine.seen(0) == []
    assert engine.end() == Report("applied", removed=(1, 2))


def test_a_query_has_only_to_confirm_once_qemu_has_said_that_all_are_gone():
    engine = started(unplug=[1, 2])
    engine.replied(1)
    engine.replied(2)
    confirms = [engine.query_goes_out()]
    for first in (1, 2):
        engine.gone(first)
        confirms.append(engine.query_goes_out())
    assert confirms == [False, False, True]


def test_what_happens_while_a_query_is_under_way_asks_once_more():
    engine = started(unplug=[1])
    engine.replied(1)
    engine.poll()
    engine.query_goes_out()
    engine.gone(1)
    assert engine.seen(0, 1) == [QUERY]
    engine.seen(0)
    assert engine.end() == Report("applied", removed=(1,))


def test_of_what_a_query_shows_gone_an_event_behind_it_asks_for_no_other():
    engine = started(unplug=[1, 2])
    engine.replied(1)
    engine.replied(2)
    engine.poll()
    engine.query_goes_out()
    assert [engine.gone(first) for first in (1, 2)] == [[], []]
    assert engine.seen(0) == []
    assert engine.end() == Report("applied", removed=(1, 2))


def test_gone_before_the_reply_to_device_del():
    engine = started(unplug=[8], ids={8: CORE})
    engine.gone(8)
    assert engine.replied(8) == [QUERY]
    engine.seen(0)
    assert engine.end() == Report("applied", removed=CORE)


def test_device_not_found_is_gone_if_the_query_says_so():
    engine = started(unplug=[1])
    engine.failed(1, "Device 'vcpu1' not found", "DeviceNotFound")
    engine.seen(0)
    assert engine.end() == Report("applied", removed=(1,))


def test_an_error_of_device_del_is_a_failure_with_qemus_text():
    engine = started(unplug=[1])
    engine.failed(1, "not supported")
    engine.seen(0, 1)
    assert engine.end() == Report("failed", failures={(1,): "GenericError: not supported"})


def test_an_error_before_others_are_answered_is_looked_at_when_they_are():
    engine = started(unplug=[5, 6])
    assert engine.failed(5, "Device 'vcpu5' not found", "DeviceNotFound") == []
    assert engine.unsent(6) == [QUERY]
    engine.seen(0, 6)
    assert engine.end() == Report("partial", removed=(5,), not_requested=(6,))


def test_ejecting_asks_for_no_query():
    assert unplugging(1).ejecting(1) == []


def test_ejecting_is_not_an_end():
    engine = unplugging(1)
    engine.ejecting(1)
    assert "guest" in engine.wakes


def test_at_the_deadline_one_last_query_decides():
    assert unplugging(1).expired() == [QUERY]


@pytest.mark.parametrize(
    ("last", "end"),
    [((0, 1), Report("pending", pending=(1,))), ((0,), Report("applied", removed=(1,)))],
)
def test_the_last_query_decides_between_pending_and_done(last, end):
    engine = unplugging(1)
    engine.expired()
    engine.seen(*last)
    assert engine.end() == end


def test_async_ends_as_soon_as_qemu_took_it():
    engine = started(unplug=[1], wait=False)
    engine.replied(1)
    engine.seen(0, 1)
    assert engine.end() == Report("requested", pending=(1,))


@pytest.mark.parametrize("drops", [True, False])
def test_a_reset_drops_what_was_asked_where_the_machine_is_a_pc(drops):
    engine = unplugging(1, reset_drops_unplug=drops)
    engine.machine_is_reset()
    engine.seen(0, 1)
    assert engine.ended is drops


def test_removed_and_plugged_by_another_client_is_not_called_removed():
    engine = started(unplug=[1, 2])
    engine.replied(1)
    engine.replied(2)
    engine.seen(0, 1, replaced=[1])
    engine.seen(0, 1)
    text = "it was removed, and another client plugged it again"
    assert engine.end() == Report("partial", removed=(2,), failures={(1,): text})


# -- the guest refuses -----------------------------------------------------------------------------


def test_a_rejection_is_checked_by_a_query():
    assert unplugging(1).refused(1, "eject disabled") == [QUERY]


def test_a_rejection_keeps_the_guests_reason():
    engine = unplugging(1)
    engine.refused(1, "eject disabled")
    engine.seen(0, 1)
    assert engine.end() == Report("rejected", rejections={(1,): "eject disabled"})


def test_a_refusal_may_overtake_the_reply():
    engine = started(unplug=[1])
    engine.refused(1, "eject disabled")
    engine.replied(1)
    engine.seen(0, 1)
    assert engine.end() == Report("rejected", rejections={(1,): "eject disabled"})


def test_a_refusal_before_the_reply_may_answer_an_earlier_request():
    engine = started(unplug=[1], doubted=[1])
    engine.refused(1, "the one before, or this one")
    assert engine.replied(1) == [delete(1)]
    engine.replied(1)
    engine.seen(0, 1)
    assert not engine.ended
    engine.refused(1, "this one")
    engine.seen(0, 1)
    assert engine.end() == Report("rejected", rejections={(1,): "this one"})


def test_a_repeated_unplug_that_fails_leaves_the_first_open():
    engine = started(unplug=[5], doubted=[5])
    # It may answer the earlier one: asked once more, which QEMU declines.
    engine.refused(5)
    assert engine.replied(5) == [delete(5)]
    engine.failed(5, "in the process of unplug")
    for _ in range(2):
        engine.seen(0, 5)
    failures = {(5,): "GenericError: in the process of unplug"}
    assert engine.end() == Report("failed", pending=(5,), failures=failures)


@pytest.mark.parametrize(
    ("last", "end"),
    [
        ((0, 1), Report("failed", pending=(1,), failures={(1,): "GenericError: no"})),
        ((0,), Report("applied", removed=(1,))),
    ],
)
def test_a_failing_device_del_leaves_an_earlier_unplug_open(last, end):
    engine = started(unplug=[1], doubted=[1])
    engine.failed(1, "no")
    engine.seen(*last)
    assert engine.end() == end
    assert engine.so_far().pending == end.pending


# -- and is asked again ----------------------------------------------------------------------------


def test_a_refusal_that_may_be_asked_again_is_looked_at_too():
    assert unplugging(1, retries=1).refused(1, "busy") == [QUERY]


def refused_once(**options):
    engine = unplugging(1, **options)
    engine.refused(1, "busy")
    engine.seen(0, 1)
    return engine


def test_a_retry_waits_for_a_pause():
    engine = refused_once(retries=1)
    assert not engine.ended
    assert "retry" in engine.wakes


def test_between_two_tries_nothing_is_pending():
    assert refused_once(retries=1).so_far().pending == ()


def test_a_retry_asks_again_after_the_pause_and_only_so_often():
    engine = refused_once(retries=1)
    assert engine.pause_is_over() == [delete(1)]
    engine.replied(1)
    engine.seen(0, 1)
    engine.refused(1, "busy still")
    engine.seen(0, 1)
    assert engine.end() == Report("rejected", rejections={(1,): "busy still"})


def too_early():
    """The guest's ACPI does not yet know how to unplug."""
    engine = started(unplug=[1], retries=3)
    engine.failed(1, "acpi: device unplug request for not supported device type: qemu64-x86_64-cpu")
    engine.seen(0, 1)
    return engine


def test_an_error_that_passes_is_asked_again():
    assert "retry" in too_early().wakes


def test_a_retry_that_works_is_a_removal():
    engine = too_early()
    engine.pause_is_over()
    engine.replied(1)
    engine.seen(0, 1)
    engine.gone(1)
    engine.seen(0)
    assert engine.end() == Report("applied", removed=(1,))


def test_an_error_that_does_not_pass_is_not_asked_again():
    engine = started(unplug=[1], retries=3)
    engine.failed(1, "no such thing")
    engine.seen(0, 1)
    assert engine.end() == Report("failed", failures={(1,): "GenericError: no such thing"})


@pytest.mark.parametrize("how", [Engine.expired, Engine.cancelled])
def test_a_retry_that_is_still_to_come_at_the_end_is_the_rejection_it_was(how):
    engine = refused_once(retries=3)
    how(engine)
    assert engine.pause_is_over() == []
    engine.seen(0, 1)
    assert engine.end() == Report("rejected", rejections={(1,): "busy"})


def test_one_that_is_asked_again_is_not_over():
    engine = started(unplug=[1], retries=1)
    engine.replied(1)
    engine.gone(1)
    engine.refused(1)
    assert engine.pause_is_over() == [delete(1)]
    engine.replied(1)
    assert not engine.query_goes_out()


# -- what was never sent ---------------------------------------------------------------------------


def test_a_plug_that_was_not_sent_is_not_undone():
    engine = started(plug=[1, 2])
    engine.replied(1)
    engine.unsent(2)
    assert engine.cancelled() == []
    assert engine.seen(0, 1) == [undo(1)]


def test_what_was_not_sent_is_not_done_and_nothing_is_claimed_of_it():
    engine = started(plug=[1, 2])
    engine.replied(1)
    engine.unsent(2)
    engine.cancelled()
    engine.seen(0, 1)
    engine.unsent(1)
    for _ in range(2):
        engine.seen(0, 1)
    # Plugged, its undo was not sent either; the other never began.
    assert engine.end() == Report("partial", plugged=(1,), remaining=(1,))


def test_unplugs_that_were_not_sent_leave_those_that_were():
    engine = started(unplug=[1, 2])
    engine.replied(1)
    engine.unsent(2)
    engine.query_goes_out()
    engine.expired()
    for _ in range(3):
        engine.seen(0, 1, 2)
    assert engine.end() == Report("pending", pending=(1,), not_requested=(2,))


def test_what_is_asked_before_or_refused_before_stays_so_where_it_is_not_asked_again():
    engine = started(unplug=[5, 6], retries=1, doubted=[6])
    engine.replied(5)
    engine.refused(5, "busy")
    assert engine.pause_is_over() == [delete(5)]
    engine.unsent(5)
    engine.unsent(6)
    engine.expired()
    for _ in range(2):
        engine.seen(0, 5, 6)
    end = engine.end()
    assert (end.rejections, end.pending, end.not_requested) == ({(5,): "busy"}, (6,), ())


# -- cancelled -------------------------------------------------------------------------------------


def cancelled_both_ways():
    engine = started(plug=[1], unplug=[2])
    engine.cancelled()
    engine.replied(1)
    engine.replied(2)
    return engine


def test_a_cancel_waits_for_the_answers_under_way():
    assert started(plug=[1], unplug=[2]).cancelled() == []


def test_cancelled_plugs_are_undone():
    engine = cancelled_both_ways()
    assert engine.seen(0, 1, 2) == [QUERY]
    engine.query_goes_out()
    assert engine.seen(0, 1, 2) == [undo(1)]
    assert engine.replied(1) == [QUERY]


def test_cancelled_unplugs_stay_pending():
    engine = cancelled_both_ways()
    for _ in range(2):
        engine.query_goes_out()
        engine.seen(0, 1, 2)
    engine.replied(1)
    engine.seen(0, 2)
    assert engine.end() == Report("pending", undone=(1,), pending=(2,))


def cancelled_once_asked():
    engine = started(unplug=[1, 2])
    engine.replied(1)
    engine.replied(2)
    return engine, engine.cancelled()


def test_a_cancel_looks_once_at_what_was_asked():
    _, effects = cancelled_once_asked()
    assert effects == [QUERY]


def test_what_has_gone_before_the_cancel_is_removed_and_the_rest_is_pending():
    engine, _ = cancelled_once_asked()
    engine.query_goes_out()
    engine.seen(0, 2)
    assert engine.end() == Report("pending", removed=(1,), pending=(2,))


def test_what_goes_while_plugs_are_undone_is_removed():
    engine = cancelled_both_ways()
    for _ in range(2):
        engine.query_goes_out()
        engine.seen(0, 1, 2)
    engine.replied(1)
    engine.seen(0)
    assert engine.end() == Report("applied", undone=(1,), removed=(2,))


def test_an_earlier_unplug_that_ends_after_the_cancel_is_not_this_calls():
    engine = started(plug=[2], awaited=[1])
    engine.replied(2)
    engine.cancelled()
    engine.seen(0, 1, 2)
    engine.replied(2)
    engine.seen(0)
    assert engine.end() == Report("pending", undone=(2,), pending=(1,))


def test_what_is_asked_when_the_cancel_comes_is_looked_at_once_qemu_has_taken_it():
    engine = started(unplug=[1])
    assert engine.cancelled() == []
    assert engine.replied(1) == [QUERY]
    engine.query_goes_out()
    engine.seen(0)
    assert engine.end() == Report("applied", removed=(1,))


# -- a plug after an unplug that has not ended -----------------------------------------------------


def test_a_plug_after_a_pending_unplug_waits_for_the_guest():
    assert "guest" in started(awaited=[1]).wakes


def test_a_plug_after_a_pending_unplug():
    engine = started(awaited=[1])
    engine.poll()
    assert engine.seen(0) == [add(1)]
    assert engine.replied(1) == [QUERY]
    engine.seen(0, 1)
    assert engine.end() == Report("applied", plugged=(1,))


def test_one_that_is_to_come_back_is_looked_at_as_soon_as_it_is_gone():
    engine = started(unplug=[2], awaited=[1])
    engine.replied(2)
    engine.seen(0, 1, 2)
    assert engine.gone(1) == [QUERY]
    assert engine.seen(0, 2) == [add(1)]


def test_a_plug_that_does_not_wait_looks_once_at_the_pending_unplug():
    engine = Engine(awaited=[1], wait=False)
    assert engine.start() == [QUERY]
    assert engine.seen(0, 1) == []
    assert engine.end() == Report("pending", pending=(1,))


def test_a_plug_that_does_not_wait_is_done_where_the_pending_unplug_has_ended():
    engine = started(awaited=[1], wait=False)
    assert engine.seen(0) == [add(1)]


def test_an_unplug_asked_earlier_makes_nothing_requested():
    engine = started(unplug=[2], awaited=[1], wait=False)
    engine.replied(2)
    engine.seen(0, 1, 2)
    engine.seen(0, 1, 2)
    assert engine.end() == Report("pending", pending=(1, 2))


def test_a_pending_unplug_that_the_guest_then_refused_leaves_it_enabled():
    engine = started(awaited=[1])
    engine.refused(1)
    engine.seen(0, 1)
    assert engine.end() == Report("applied", kept=(1,))


@pytest.mark.parametrize("stopped", ["cancelled", "failed"])
def test_a_pending_unplug_that_the_guest_has_refused_is_over_whatever_stops_the_call(stopped):
    engine = started(plug=[4], awaited=[2, 3])
    engine.refused(2)
    if stopped == "cancelled":
        engine.cancelled()
    else:
        engine.failed(4, "no")
    so_far = engine.so_far()
    assert (so_far.kept, so_far.pending) == ((2,), (3,))


# -- atomic ----------------------------------------------------------------------------------------


def atomic_with_one_refusal(**options):
    """Of three unplugs 1 is gone, 2 is refused, 3 may still go."""
    engine = unplugging(1, 2, 3, atomic=True, **options)
    engine.refused(2, "busy")
    engine.seen(0, 2, 3)
    return engine


def test_atomic_waits_for_every_end():
    assert not atomic_with_one_refusal().ended


def test_atomic_brings_back_what_was_removed():
    engine = atomic_with_one_refusal()
    engine.gone(3)
    assert engine.seen(0, 2) == [add(1), add(3), QUERY]
    engine.replied(1)
    engine.replied(3)
    engine.seen(0, 1, 2, 3)
    assert engine.end() == Report("rejected", undone=(1, 3), rejections={(2,): "busy"})


def test_atomic_with_one_pending_brings_back_the_rest_and_names_it():
    engine = atomic_with_one_refusal()
    engine.expired()
    assert engine.seen(0, 2, 3) == [add(1), QUERY]
    engine.replied(1)
    engine.seen(0, 1, 2, 3)
    assert engine.end() == Report("rejected", undone=(1,), pending=(3,), rejections={(2,): "busy"})


@pytest.mark.parametrize("how", ["error", "vanished"])
def test_atomic_that_cannot_bring_back_is_partial(how):
    engine = atomic_with_one_refusal()
    engine.expired()
    engine.seen(0, 2, 3)
    if how == "error":
        engine.failed(1, "no")
    else:
        engine.replied(1)
    engine.seen(0, 2, 3)
    end = engine.end()
    assert (end.outcome, end.lost, end.pending, end.undo_forbidden) == ("partial", (1,), (3,), None)


@pytest.fixture(params=["in time", "after the deadline", "cancelled"])
def bringing_back_what_is_taken(request):
    """The slot of 1 is empty, but its device has not ended: QEMU declines to add it again."""
    engine = atomic_with_one_refusal()
    if request.param == "after the deadline":
        engine.expired()
    else:
        engine.gone(3)
    assert add(1) in engine.seen(0, 2)
    if request.param == "cancelled":
        engine.cancelled()
    engine.replied(3)
    engine.failed(1, "Duplicate device ID 'vcpu1'")
    engine.seen(0, 2, 3)
    return engine


def test_atomic_brings_back_again_what_is_still_taken(bringing_back_what_is_taken):
    engine = bringing_back_what_is_taken
    assert engine.pause_is_over()[0] == add(1)
    engine.replied(1)
    engine.seen(0, 1, 2, 3)
    assert engine.end() == Report("rejected", undone=(1, 3), rejections={(2,): "busy"})


def test_what_stays_taken_is_lost(bringing_back_what_is_taken):
    engine = bringing_back_what_is_taken
    for _ in range(5):
        if not engine.ended:
            engine.pause_is_over()
            engine.failed(1, "Duplicate device ID 'vcpu1'")
            engine.seen(0, 2, 3)
    end = engine.end()
    assert (end.outcome, end.lost, end.undone) == ("partial", (1,), (3,))


def test_what_is_still_taken_when_the_undo_has_no_time_left_is_lost(bringing_back_what_is_taken):
    engine = bringing_back_what_is_taken
    engine.expired()
    for _ in range(2):
        if not engine.ended:
            engine.seen(0, 2, 3)
    end = engine.end()
    assert (end.outcome, end.lost, end.undone) == ("partial", (1,), (3,))


def test_an_undo_that_unplugs_is_not_tried_again_for_an_id_that_is_taken():
    """Only a `device_add` can meet that; scripts/soak oracle found it."""
    engine = failing_plug()
    assert undo(1) in engine.seen(0, 1)
    engine.failed(1, "Duplicate device ID 'vcpu1'")
    engine.seen(0, 1)
    assert engine.end().remaining == (1,)


def test_atomic_that_must_not_bring_back_does_not_try():
    engine = atomic_with_one_refusal(restore_forbidden="it kills QEMU")
    engine.expired()
    assert engine.seen(0, 2, 3) == []


def test_atomic_that_must_not_bring_back_says_why():
    engine = atomic_with_one_refusal(restore_forbidden="it kills QEMU")
    engine.expired()
    engine.seen(0, 2, 3)
    assert engine.end() == Report(
        "partial",
        removed=(1,),
        lost=(1,),
        pending=(3,),
        rejections={(2,): "busy"},
        undo_forbidden="it kills QEMU",
    )


def test_one_that_goes_after_others_were_brought_back_for_it_makes_no_success():
    engine = started(unplug=[7, 8], atomic=True, doubted=[7, 8])
    engine.replied(7)
    engine.failed(8, "in the process of unplug")
    assert add(7) in engine.seen(0, 8)
    engine.replied(7)
    # Only now the earlier unplug of 8 ends.
    for _ in range(4):
        engine.seen(0, 7)
    end = engine.end()
    assert (end.outcome, end.undone, end.removed) == ("partial", (7,), (8,))


# -- what events say -------------------------------------------------------------------------------

PATHS = {1: "/machine/peripheral/vcpu1", 2: "/machine/unattached/device[3]"}
LOOK = ("something changed",)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("DEVICE_DELETED", {"device": "vcpu1", "path": "/machine/peripheral/vcpu1"}, ("gone", 1)),
        ("DEVICE_DELETED", {"path": "/machine/unattached/device[3]"}, ("gone", 2)),
        ("DEVICE_DELETED", {"path": "/machine/peripheral/vcpu1/lapic"}, ("gone", 1)),
        ("DEVICE_DELETED", {"path": "/machine/peripheral/vcpu1/thread[0]"}, LOOK),
        ("DEVICE_DELETED", {"path": "/machine/peripheral/other/lapic"}, LOOK),
        ("DEVICE_DELETED", {"device": "vcpu4", "path": "/machine/peripheral/vcpu4"}, ("gone", 4)),
        (
            "DEVICE_UNPLUG_GUEST_ERROR",
            {"device": "vcpu1", "path": "x"},
            ("refused", 1, "the guest could not release it"),
        ),
        ("DEVICE_UNPLUG_GUEST_ERROR", {"device": "net0", "path": "x"}, None),
        (
            "ACPI_DEVICE_OST",
            {"info": {"slot-type": "DIMM", "slot": "1", "source": 3, "status": 128}},
            None,
        ),
        ("RESET", {"guest": False}, ("reset",)),
        ("STOP", {}, None),
        ("ACPI_DEVICE_OST", {}, None),
    ],
)
def test_events_are_matched_by_id_or_exact_path(name, data, says):
    assert meaning(name, data, PATHS, empty=[4]) == says


@pytest.mark.parametrize(
    ("source", "status", "says", "words"),
    [
        (3, 132, "ejecting", ""),
        (3, 0, "something changed", ""),
        (3, 128, "refused", "eject disabled"),
        (3, 1, "refused", "failed"),
        (3, 999, "refused", "unknown status 999"),
        (1, 0, "something changed", ""),
    ],
)
def test_ost_codes_in_words(source, status, says, words):
    info = {"slot-type": "CPU", "slot": "1", "source": source, "status": status}
    kind, *about = meaning(
        "ACPI_DEVICE_OST", {"info": info}, {0: "/machine/peripheral/vcpu0", **PATHS}
    )
    assert kind == says
    if words:
        assert (about[0], words in about[1]) == (1, True)


class World(RuleBasedStateMachine):
    """A QEMU and a guest that do anything in any order; the engine is told of it late, doubled or
    never.
    """

    engine = None

    def __init__(self):
        super().__init__()
        self.slots = set()
        self.asked = set()  # unplugs QEMU has taken and the guest has not ended
        self.in_flight = []
        self.cancelled = False

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
    def begin(
        self,
        plugs,
        unplugs,
        awaited,
        forbidden,
        wait,
        drops,
        atomic,
        unrestorable,
        retries,
        doubted,
    ):
        self.plugs, self.unplugs, self.awaited, self.drops = plugs, unplugs, awaited, drops
        self.restores, self.retries = atomic and not unrestorable, retries
        self.replaced = set()
        self.deletes = 0
        self.undos = set()
        self.slots = {0, *unplugs, *awaited}
        self.doubted = doubted & unplugs
        self.asked = {*awaited, *self.doubted}
        #: Unplugs that QEMU has taken, and nobody but the guest has heard more of.
        self.unended = set(awaited)
        #: The call has a deadline, and so has its undo.
        self.expired = self.undo_expired = self.undoing = False
        self.engine = Engine(
            sorted(plugs),
            sorted(unplugs),
            sorted(awaited),
            undo_forbidden=forbidden,
            wait=wait,
            reset_drops_unplug=drops,
            atomic=atomic,
            retries=retries,
            doubted=doubted,
            restore_forbidden=unrestorable,
        )
        self.perform(self.engine.start())

    def perform(self, effects):
        adds = [effect[1] for effect in effects if effect[0] == "device_add"]
        undos = [effect[1] for effect in effects if effect[2:] == ("undo",)]
        deletes = [
            effect[1] for effect in effects if effect[0] == "device_del" and effect[1] not in undos
        ]
        restored = self.unplugs & set(adds)
        assert not (self.cancelled and adds), "a new plug after a cancel"
        assert not (self.cancelled and deletes), "a new unplug after a cancel"
        self.deletes += len(deletes)
        most = len(self.unplugs) * (1 + self.retries) + len(self.doubted)
        assert self.deletes <= most, "asked more often than allowed"
        assert self.restores or not restored, "taken back where that was not to be"
        self.undos |= set(undos)
        self.undoing = self.undoing or bool(undos or restored)
        self.unended -= set(deletes)
        self.in_flight += effects

    @property
    def open(self):
        return self.engine is not None and not self.engine.ended

    @property
    def may_expire(self):
        return self.engine.has_deadline and not (
            self.undo_expired if self.undoing else self.expired
        )

    @precondition(lambda self: self.open and self.in_flight)
    @rule(succeeds=st.booleans())
    def qemu_answers_the_oldest(self, succeeds):
        what, *about = self.in_flight.pop(0)
        if what == "query":
            self.unended &= self.slots
            self.perform(self.engine.seen(*self.slots, replaced=self.replaced))
            return
        first = about[0]
        if what == "device_add":
            if succeeds and first not in self.slots:
                self.slots.add(first)
                self.replaced.add(first)
                self.perform(self.engine.replied(first))
            else:
                self.perform(self.engine.failed(first, "no"))
        elif succeeds and first in self.slots:
            self.asked.add(first)
            self.unended |= {first} & self.unplugs
            self.perform(self.engine.replied(first))
        else:
            self.perform(self.engine.failed(first, "gone", "DeviceNotFound"))

    @precondition(lambda self: self.open and self.asked)
    @rule(data=st.data(), told=st.sampled_from(["never", "once", "twice", "unclearly"]))
    def guest_lets_go(self, data, told):
        first = data.draw(st.sampled_from(sorted(self.asked)))
        self.asked.discard(first)
        self.slots.discard(first)
        self.replaced.discard(first)
        for _ in range({"never": 0, "once": 1, "twice": 2, "unclearly": 0}[told]):
            if self.open:
                self.perform(self.engine.gone(first))
        if told == "unclearly":
            self.perform(self.engine.something_changed())

    @precondition(lambda self: self.open and self.asked)
    @rule(data=st.data())
    def guest_refuses(self, data):
        first = data.draw(st.sampled_from(sorted(self.asked)))
        self.asked.discard(first)
        self.unended.discard(first)
        self.perform(self.engine.refused(first))

    @precondition(lambda self: self.open)
    @rule(first=st.integers(0, 12), event=st.sampled_from([Engine.ejecting, Engine.gone]))
    def a_stray_event_comes(self, first, event):
        self.perform(event(self.engine, first))

    @property
    def gone_unseen(self):
        """What the guest let go, and no query has shown yet."""
        return sorted(self.unended - self.slots)

    @precondition(lambda self: self.open and self.gone_unseen)
    @rule(data=st.data())
    def another_client_plugs_it(self, data):
        first = data.draw(st.sampled_from(self.gone_unseen))
        self.slots.add(first)
        self.replaced.add(first)

    @precondition(lambda self: self.open and "retry" in self.engine.wakes)
    @rule()
    def the_pause_is_over(self):
        self.perform(self.engine.pause_is_over())

    @precondition(lambda self: self.open and self.drops)
    @rule()
    def the_machine_is_reset(self):
        self.asked.clear()
        self.unended.clear()
        self.perform(self.engine.machine_is_reset())

    @precondition(lambda self: self.open)
    @rule()
    def time_goes_by(self):
        self.perform(self.engine.poll())

    @precondition(lambda self: self.open and self.may_expire)
    @rule()
    def the_deadline_comes(self):
        if self.undoing:
            self.undo_expired = True
        else:
            self.expired = True
        self.perform(self.engine.expired())

    @precondition(lambda self: self.open and not self.cancelled)
    @rule()
    def the_caller_cancels(self):
        self.cancelled = True
        self.perform(self.engine.cancelled())

    @precondition(lambda self: not self.open)
    @rule()
    def it_is_over(self):
        pass

    @precondition(lambda self: self.engine is not None)
    @invariant()
    def what_is_called_removed_is_gone(self):
        assert not set(self.engine.so_far().removed) & self.slots

    @precondition(lambda self: self.engine is not None)
    @invariant()
    def what_is_called_undone_is_as_it_was(self):
        undone = set(self.engine.so_far().undone)
        assert undone & self.slots == undone & self.unplugs

    @precondition(lambda self: self.engine is not None)
    @invariant()
    def what_is_called_plugged_is_there(self):
        # Of what is being undone only the end can say where it is.
        so_far = self.engine.so_far()
        assert set(so_far.plugged) - self.undos <= self.slots

    @precondition(lambda self: self.engine is not None and self.engine.ended)
    @invariant()
    def what_is_called_plugged_at_the_end_is_there(self):
        end = self.engine.end()
        assert set(end.plugged) - set(end.pending) <= self.slots

    @precondition(lambda self: self.engine is not None and self.engine.ended and not self.cancelled)
    @invariant()
    def what_is_called_applied_is_done(self):
        if self.engine.end().outcome == "applied":
            assert self.plugs <= self.slots
            assert not self.unplugs & self.slots

    @precondition(lambda self: self.engine is not None and self.engine.ended)
    @invariant()
    def only_what_this_call_asked_is_called_requested(self):
        end = self.engine.end()
        assert end.outcome != "requested" or set(end.pending) <= self.unplugs

    @precondition(lambda self: self.engine is not None and self.engine.ended)
    @invariant()
    def what_qemu_was_asked_to_let_go_and_the_guest_has_not_ended_is_told(self):
        end = self.engine.end()
        told = {*end.pending, *end.remaining, *end.kept}
        assert self.asked <= told.union(*end.rejections)

    def teardown(self):
        """Whatever has happened, deadline and answers alone bring it to its end."""
        for _ in range(200):
            if not self.open:
                return
            if self.in_flight:
                self.qemu_answers_the_oldest(succeeds=True)
            else:
                assert self.may_expire, f"stuck: {self.engine.so_far()}"
                self.the_deadline_comes()
        raise AssertionError("does not end")


World.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestEveryOrder = World.TestCase


def plugs(effects):
    return [effect for effect in effects if effect[0] == "device_add"]


def test_nothing_is_plugged_while_undoing():
    engine = started(plug=[2, 3], awaited=[1])
    engine.replied(2)
    engine.failed(3, "no")
    engine.seen(0, 1, 2)
    engine.replied(2)
    assert not plugs(engine.seen(0))


def test_nothing_is_plugged_after_a_known_failure():
    engine = started(plug=[3], awaited=[1])
    engine.failed(3, "no")
    engine.seen(0, 1)
    engine.poll()
    assert not plugs(engine.seen(0))


def test_that_the_guest_keeps_a_vcpu_is_confirmed_by_its_slot():
    engine = started(awaited=[1])
    engine.refused(1)
    engine.seen(0)
    assert not engine.ended or engine.end().outcome != "applied"


@pytest.mark.parametrize("info", [{"source": [3]}, {"source": {}}])
def test_an_ost_event_of_a_wrong_shape_is_passed_over(info):
    meaning(
        "ACPI_DEVICE_OST", {"info": {"slot-type": "CPU", **info}}, {1: "/machine/peripheral/vcpu1"}
    )
