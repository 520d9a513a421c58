"""One request being carried out in QEMU: feed what happened, get what to do next. No IO, no clock.
Pure.

Each entity of the request moves through one of the tables of `core.engine.stages`; this module has
the rules about several of them.

- Phases: RUN, then UNDO if a plug has failed, the call was cancelled, or an atomic call must bring
  back what it removed; then DONE. `Cancelled` after DONE takes a finished call back.
- Every undo in QEMU is decided in this module, and none is made that the last `Snapshot` forbids.
- A cancelled call queries once more: unplugs that have ended are REMOVED, the others stay PENDING.
- A guest's answer may overtake the reply to `device_del` (seen with 10.0). While an earlier unplug
  is pending, the answer may be to that one: then the unplug is requested once more, and the next
  answer counts.

`domain.drive` performs the effects in the order given, and feeds what happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from enum import Enum
from typing import Final

from qmpvcpu.core.engine import timers as clock
from qmpvcpu.core.engine.items import Item, Items, result_of
from qmpvcpu.core.engine.messages import (
    Add,
    Cancelled,
    Delete,
    Drop,
    Effect,
    EventReceived,
    Failure,
    Finished,
    Input,
    Moves,
    Query,
    Replied,
    Result,
    Snapshot,
    Terms,
    Unsent,
    Wake,
    Woke,
)
from qmpvcpu.core.engine.stages import (
    FAILED,
    IN_FLIGHT,
    PAUSED,
    PLUG_FAILED,
    REJECTED,
    UNDOABLE,
    UNVERIFIED,
    WAITING,
    On,
    Stage,
)
from qmpvcpu.core.engine.timers import Timers, is_due
from qmpvcpu.core.state.events import (
    PERIPHERAL,
    Names,
    SignalKind,
    interpret,
    is_filled,
    is_taken,
    is_transient,
)

_UNFINISHED: Final = WAITING | IN_FLIGHT
_NOT_AS_REQUESTED: Final = FAILED | REJECTED | {Stage.NOT_REQUESTED}


class Phase(Enum):
    """The phase of the whole transaction."""

    RUN = "run"
    UNDO = "undo"
    DONE = "done"


class Transaction:
    """The machine: `start()`, then `feed()` until `Finished` is among the effects, then `result()`.

    Args:
        moves: what is to be plugged and unplugged.
        terms: what the request allows.
    """

    def __init__(self, moves: Moves, terms: Terms) -> None:
        self._terms = terms
        self._items = Items(moves, terms)
        self._names = Names(moves.entities)
        self._phase = Phase.RUN
        self._timers = Timers()
        self._wake: float | None = None
        self._effects: list[Effect] = []
        self._undo_forbidden: str | None = None
        self._restore_forbidden: str | None = None
        #: Ids of the entities whose removal QEMU has reported.
        self._deleted: set[int] = set()
        self._querying = False
        self._query_again = False
        #: A reply calls for a query, once all replies have come.
        self._query_due = False
        #: An unplug was accepted, and no query was sent since.
        self._unplug_not_queried = False
        #: Ids of the entities that had an event while a query was under way.
        self._reported: set[int] = set()
        self._dropped = False
        self._expired = False
        self._cancelled = False

    # -- the driver's side ------------------------------------------------------------------------

    def start(self, now: float) -> list[Effect]:
        """The first effects: all commands that can be sent, and one query after the plugs."""
        self._all(On.START)
        if self._items.any({Stage.ADDING}) or (
            not self._terms.wait and self._items.any({Stage.AWAITING})
        ):
            # QEMU answers in order, so this one query has the result of all plugs. The guest's time
            # begins with its answer.
            self._query()
        else:
            self._timers.start(now, self._terms.timeout, self._terms.timeout)
        return self._proceed(now)

    def feed(self, happened: Input, now: float) -> list[Effect]:
        """What happened -> what to do next; `now` is a moment of the caller's clock, seconds."""
        match happened:
            case Replied():
                self._replied(happened)
            case Snapshot():
                if not self._timers.started:
                    self._timers.start(now, self._terms.timeout, self._terms.timeout)
                self._snapshot(happened)
            case EventReceived():
                self._event(happened)
            case Woke():
                self._woke(now)
            case Unsent():
                self._unsent(self._items[happened.entity_id])
            case Cancelled():
                self._cancel(now)
        if self._cancelled:
            self._all(On.CANCEL, undo=False)
        return self._proceed(now)

    def query_sent(self, now: float) -> tuple[bool, list[Effect]]:
        """Note that the query that was due goes out, for the first time or again.

        Returns:
            Whether QEMU has already reported every awaited removal, and what to do next.
        """
        self._query_again = False
        self._unplug_not_queried = False
        self._reported.clear()
        return self._all_reported(), self._timed(now)

    def result(self) -> Result:
        """The result; before `Finished`, the state so far."""
        return result_of(
            self._items,
            self._terms,
            cancelled=self._cancelled,
            undo_forbidden=self._undo_forbidden,
            restore_forbidden=self._restore_forbidden,
        )

    # -- what happens -----------------------------------------------------------------------------

    def _replied(self, reply: Replied) -> None:
        item = self._items[reply.entity_id]
        failed = reply.error_class is not None or reply.text is not None
        text = reply.text or "no reason given"
        if failed and is_taken(text):
            self._rename(item)
        if failed and is_filled(text) and self._move(item, On.FILLED):
            return
        moved = self._move(item, On.ERROR if failed else On.OK)
        if moved and failed:
            item.note = Failure(item.entity, text, reply.error_class)
            if is_transient(text):
                self._retry(item)
            elif (
                is_taken(text)
                and item.readds
                and not self._expired
                and (item.is_undo or not self._cancelled)
            ):
                item.readds -= 1
                self._query_due |= self._move(item, On.RETRY)
            if item.doubt or item.repeated:
                self._move(item, On.DOUBT)
        if item.stage is Stage.REQUESTED and item.repeat and not (self._cancelled or self._expired):
            item.repeat, item.repeated = False, True
            self._move(item, On.REPEAT)
        if item.stage is not Stage.REQUESTED:
            # "DeviceNotFound" may mean that the CPU is removed.
            self._query_due |= item.stage in (Stage.NOT_REMOVED, Stage.DOUBTED)
        elif item.is_undo:
            # What the undo removes may be gone before the reply.
            self._query_due = True
        else:
            # On ppc64 before the guest runs it is removed before the reply. Where QEMU will still
            # send an event, a query now would only delay it.
            self._query_due |= not self._terms.wait or self._cancelled or self._all_reported()
            self._unplug_not_queried = True

    def _rename(self, item: Item) -> None:
        """Its device id is taken, perhaps by a device that is being removed: so it is tried once
        more first.
        """
        item.taken += 1
        if item.taken > 1:
            item.entity = replace(item.entity, suffix=item.entity.suffix + 1)
            self._names.add(item.entity)

    def _unsent(self, item: Item) -> None:
        if not self._move(item, On.UNSENT) or item.stage is not Stage.NOT_REQUESTED:
            return
        # An earlier error about it still counts, and so does an earlier unplug that has not ended.
        if item.note is not None:
            self._move(item, On.REFUSED if item.note.error_class is None else On.ERROR)
        if item.doubt or item.repeated:
            self._move(item, On.DOUBT)

    def _snapshot(self, now: Snapshot) -> None:
        self._undo_forbidden, self._restore_forbidden = now.undo_forbidden, now.restore_forbidden
        self._querying = False
        for item in self._items:
            first = item.entity.id
            if first not in now.plugged:
                self._move(item, On.ABSENT)
            else:
                moved = first in now.replaced and self._move(item, On.REPLACED)
                if not moved:
                    self._move(item, On.PRESENT)
        # An entity that this query shows as removed needs no other query.
        self._query_again |= any(self._items[first].stage in WAITING for first in self._reported)
        self._reported.clear()
        if self._query_again:
            return
        if not self._terms.wait:
            self._all(On.QUERIED)
        if self._expired:
            self._all(On.EXPIRE)
        if self._cancelled:
            self._all(On.LEAVE, undo=False)

    def _event(self, heard: EventReceived) -> None:
        signal = interpret(heard.event, heard.data, self._names)
        if signal is None or signal.kind is SignalKind.EJECTING:
            return
        item = self._items.get(signal.entity_id)
        is_gone = signal.kind is SignalKind.DELETED and item is not None
        if is_gone and signal.entity_id is not None:
            self._deleted.add(signal.entity_id)
        waited = self._waiting
        if signal.kind is SignalKind.RESET and self._terms.reset_drops_unplug:
            for one in self._items:
                if one.stage in WAITING:
                    self._refused(one, signal.reason)
        elif signal.kind is SignalKind.GUEST_REFUSED and item is not None:
            self._refused(item, signal.reason)
        if not waited:
            return
        if not is_gone or item is None:
            self._query()
        elif item.stage is Stage.AWAITING or self._all_reported():
            # Of several removals only the last is worth a query; a poll replaces an event that is
            # lost.
            self._query(item.entity.id)

    def _refused(self, item: Item, reason: str | None) -> None:
        if item.doubt and item.stage is Stage.DELETING:
            item.doubt, item.repeat = False, True
        elif self._move(item, On.REFUSED):
            item.note = Failure(item.entity, reason or "the guest refused")
            self._retry(item)

    def _retry(self, item: Item) -> None:
        if (
            item.retries
            and not self._expired
            and self._phase is Phase.RUN
            and self._move(item, On.RETRY)
        ):
            item.retries -= 1

    def _woke(self, now: float) -> None:
        timers = self._timers
        # A clock may wake a moment too early: then `_timed` asks to be woken again.
        self._wake = None
        if is_due(timers.drop, now):
            timers.drop = None
            if self._phase is Phase.RUN:
                self._effects.append(Drop(plugs=False))
        if is_due(timers.deadline, now):
            timers.deadline = None
            if self._cancelled or self._phase is Phase.UNDO:
                self._effects.append(Drop())
            if self._cancelled:
                # What has not ended by now is reported as it stands.
                self._finish()
            else:
                # A query decides: what ended right at the deadline has ended.
                self._expired = True
                self._query()
        elif is_due(timers.retry, now):
            timers.retry = None
            if not self._expired:
                self._all(On.RETRY_NOW)
        elif is_due(timers.soon, now):
            timers.soon = None
            self._poll()
        elif is_due(timers.poll, now):
            timers.polled(now)
            self._poll()

    def _poll(self) -> None:
        """Query, because events may have been lost."""
        if self._waiting and not self._querying:
            self._query()

    def _cancel(self, now: float) -> None:
        self._cancelled = self._dropped = True
        if self._phase is Phase.DONE:
            self._phase = Phase.RUN
        self._timers = Timers()
        self._timers.start(now, clock.UNDO_SECONDS, self._terms.timeout)
        self._effects.append(Drop())
        if self._items.any_forward({Stage.REQUESTED}):
            # An unplug may have ended right before the cancellation.
            self._query()

    # -- what is to be done -----------------------------------------------------------------------

    def _move(self, item: Item, what: On) -> bool:
        target = self._items.target(item, what)
        if target is None:
            return False
        self._items.put(item, target)
        self._send(item)
        return True

    def _all(self, what: On, *, undo: bool = True) -> None:
        """Apply this to all entities; `undo`: also to those that are being undone."""
        for item in self._items:
            if undo or not item.is_undo:
                self._move(item, what)

    def _undo(self, stages: Iterable[Stage]) -> None:
        """Begin to undo what was done to the entities in these stages."""
        self._phase = Phase.UNDO
        for item in self._items:
            if item.stage in stages and not item.is_undo:
                self._items.put(item, item.stage, undo=True)
                self._send(item)

    def _send(self, item: Item) -> None:
        if item.stage is Stage.ADDING:
            self._effects.append(Add(item.entity))
        elif item.stage is Stage.DELETING:
            self._deleted.discard(item.entity.id)
            name = PERIPHERAL + item.entity.device_id if item.is_undo else item.entity.unplug_name
            self._effects.append(Delete(item.entity, name))

    def _query(self, about: int | None = None) -> None:
        """Query now, or after the query that is under way; `about`: the id of the only entity that
        it is for.
        """
        if not self._querying:
            self._querying, self._query_again = True, False
            self._effects.append(Query())
        elif about is None:
            self._query_again = True
        else:
            self._reported.add(about)

    def _proceed(self, now: float) -> list[Effect]:
        """Go on to the next phase if this one has nothing left to wait for; return the effects."""
        items = self._items
        if self._failing:
            # A call that is known to fail plugs nothing more: it would only be undone.
            self._all(On.GIVE_UP, undo=False)
            if not self._dropped and self._phase is Phase.RUN:
                self._dropped = True
                self._effects.append(Drop())
        in_flight = items.any(IN_FLIGHT)
        if self._query_due and not in_flight:
            self._query_due = False
            self._query()
        if self._phase is not Phase.DONE and not in_flight:
            self._advance(now)
        return self._timed(now)

    def _advance(self, now: float) -> None:
        if self._query_again and not self._querying:
            self._query()
        elif self._undo_is_due():
            if not self._querying:
                # The last query showed whether an undo is safe, and what there is to undo.
                self._timers.extend(now)
                self._expired = False
                self._undo(UNDOABLE)
        elif self._items.any(UNVERIFIED):
            if not self._querying:
                self._query()
        elif self._is_waited_for():
            return
        elif self._restore_is_due():
            if not self._querying:
                self._timers.extend(now)
                self._expired = False
                self._undo({Stage.REMOVED})
                self._query()
        elif not self._querying:
            self._finish()

    def _finish(self) -> None:
        self._phase = Phase.DONE
        self._effects.append(Finished())

    def _timed(self, now: float) -> list[Effect]:
        self._timers.arm(
            now,
            soon=self._unplug_not_queried and self._waiting and not self._items.any(IN_FLIGHT),
            retry=self._items.any(PAUSED),
        )
        wake = self._timers.next(polls=self._waiting) if self._phase is not Phase.DONE else None
        if wake != self._wake:
            self._wake = wake
            self._effects.append(Wake(wake))
        effects, self._effects = self._effects, []
        return effects

    # -- what is so -------------------------------------------------------------------------------

    @property
    def _waiting(self) -> bool:
        """Whether the guest or a timer must act next."""
        return self._items.any(WAITING)

    @property
    def _failing(self) -> bool:
        """Whether a plug has failed, or the caller has cancelled: what was plugged is to be
        undone.
        """
        return self._cancelled or self._items.any_forward(PLUG_FAILED)

    def _all_reported(self) -> bool:
        """Whether QEMU has reported every removal that is awaited: a query has only to confirm
        them.
        """
        if not self._deleted:
            return False
        return self._deleted.issuperset(
            item.entity.id for item in self._items if item.stage in _UNFINISHED
        )

    def _is_waited_for(self) -> bool:
        if self._terms.wait:
            return self._waiting
        if self._items.any({Stage.AWAITING}):
            return True
        return self._items.any_undo(Stage.REQUESTED) or self._items.any_undo(Stage.ADD_PAUSED)

    def _undo_is_due(self) -> bool:
        if self._phase is not Phase.RUN or self._undo_forbidden is not None:
            return False
        return self._failing and self._items.any_forward(UNDOABLE)

    def _restore_is_due(self) -> bool:
        if not self._terms.atomic or self._cancelled or self._restore_forbidden is not None:
            return False
        return self._items.any_forward(_NOT_AS_REQUESTED) and self._items.any_forward(
            {Stage.REMOVED}
        )
