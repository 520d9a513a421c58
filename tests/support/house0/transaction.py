"""One request being carried out, as a table: feed what happened, get what to do next. No IO, no
clock.

Rules of the table
- An *item* is one entity on its way: to be plugged, to be unplugged, or (its unplug still pending)
  to be waited for and plugged again.
- Only a `Snapshot`, a query answered after the act, makes an item PLUGGED, REMOVED or UNDONE.
  Replies and events say at most that it is time to look. So nothing is ever reported that the slot
  does not confirm.
- A pair (state, input) that is not in the table changes nothing: a late or doubled message is
  harmless.
- Every state outside `WAITING` is left by itself or final; `WAITING` ones end by the deadline at
  the latest.
- A call that is cancelled looks once more: what it asked for and is gone is REMOVED, the rest stays
  PENDING.
- A guest's answer may overtake the reply to `device_del` (seen with 10.0). Where an earlier unplug
  was still open, it may as well be the answer to that one: then it is asked once more, and the next
  answer counts.

Phases: RUN, then UNDO if a plug failed, the call was cancelled, or an atomic call must bring back
    what it removed;
then DONE. What drives it (`domain.drive`) performs the effects in the order given, feeds `Replied`
for each, `Again` some time after `to_retry` turned true, and `Expired` at the phase's deadline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from qmpvcpu.core.model import Entity
from qmpvcpu.core.state.events import Signal, SignalKind, is_taken, is_transient
from qmpvcpu.core.state.events import is_filled as is_so
from qmpvcpu.errors import OutcomeKind

__all__ = [
    "Add",
    "Again",
    "Cancelled",
    "Delete",
    "Effect",
    "Expired",
    "Failure",
    "Input",
    "ItemState",
    "Phase",
    "Poll",
    "Query",
    "Replied",
    "Result",
    "SETTLED",
    "STILL_ASKED",
    "Snapshot",
    "TABLE",
    "Transaction",
    "Unsent",
    "WAITING",
]


class ItemState(Enum):
    """Where one entity stands."""

    #: Enum's own is a Python function, and every message looks a dozen members up.
    __hash__ = object.__hash__

    TO_ADD = "to add"
    ADDING = "device_add sent"
    ADDED = "device_add accepted"
    PLUGGED = "plugged"
    NOT_ADDED = "device_add failed"
    VANISHED = "accepted, and not there"
    TO_REMOVE = "to remove"
    DELETING = "device_del sent"
    ASKED = "unplug asked"
    REMOVED = "removed"
    NOT_ASKED = "device_del failed"
    REJECTED = "rejected by the guest"
    PENDING = "unplug pending"
    STILL_AWAITED = "its earlier unplug pending"
    TO_READD = "to add after its unplug"
    AWAITING = "its earlier unplug awaited"
    KEPT = "its earlier unplug did not happen"
    STAYED = "its earlier unplug did not happen, and no more is done"
    UNDOING = "undo: device_del sent"
    UNDO_ASKED = "undo: unplug asked"
    UNDONE = "undone"
    UNDO_FAILED = "undo: failed"
    UNDO_PENDING = "undo: unplug pending"
    NOT_ASKED_AGAIN = "device_del failed, an earlier unplug is open"
    RETURNED = "removed, and plugged by another client"
    RETRY_REJECTED = "rejected, to be asked again"
    RETRY_ERROR = "device_del failed, to be asked again"
    RESTORING = "taking it back: device_add sent"
    RESTORE_ADDED = "taking it back: device_add accepted"
    RESTORED = "taken back"
    NOT_RESTORED = "removed, and could not be taken back"
    DROPPED = "never begun"
    UNASKED = "never asked for"
    FOUND = "plugged by another client"
    OTHERS = "plugged by another client, and there"
    RETRY_ADD = "its id is still taken, to be added again"


class _On(Enum):
    """What can happen to an item."""

    __hash__ = object.__hash__

    START = "start"
    OK = "ok"
    ERROR = "error"
    PRESENT = "present"
    ABSENT = "absent"
    REFUSED = "refused"
    EXPIRE = "expire"
    CANCEL = "cancel"
    LEAVE = "leave"
    LOOKED = "looked"
    GIVE_UP = "give up"
    UNDO = "undo"
    REPEAT = "repeat"
    DOUBT = "doubt"
    REPLACED = "replaced"
    RETRY = "retry"
    AGAIN = "again"
    SO = "so already"
    UNSENT = "unsent"
    RESTORE = "restore"


S = ItemState

#: Item, what happened -> item. Whoever enters ADDING or RESTORING sends `device_add`, DELETING or
#: UNDOING `device_del`.
TABLE: Final[Mapping[tuple[ItemState, _On], ItemState]] = {
    (S.TO_ADD, _On.START): S.ADDING,
    (S.TO_ADD, _On.CANCEL): S.DROPPED,
    (S.ADDING, _On.OK): S.ADDED,
    (S.ADDING, _On.UNSENT): S.DROPPED,
    (S.ADDING, _On.ERROR): S.NOT_ADDED,
    (S.ADDING, _On.SO): S.FOUND,
    (S.FOUND, _On.PRESENT): S.OTHERS,
    (S.FOUND, _On.ABSENT): S.VANISHED,
    (S.OTHERS, _On.ABSENT): S.VANISHED,
    (S.NOT_ADDED, _On.RETRY): S.RETRY_ADD,
    (S.RETRY_ADD, _On.AGAIN): S.ADDING,
    (S.RETRY_ADD, _On.PRESENT): S.OTHERS,
    (S.RETRY_ADD, _On.EXPIRE): S.NOT_ADDED,
    (S.RETRY_ADD, _On.CANCEL): S.NOT_ADDED,
    (S.RETRY_ADD, _On.GIVE_UP): S.NOT_ADDED,
    (S.ADDED, _On.PRESENT): S.PLUGGED,
    (S.ADDED, _On.ABSENT): S.VANISHED,
    (S.ADDED, _On.UNDO): S.UNDOING,
    (S.PLUGGED, _On.ABSENT): S.VANISHED,
    (S.PLUGGED, _On.UNDO): S.UNDOING,
    (S.UNDOING, _On.OK): S.UNDO_ASKED,
    (S.UNDOING, _On.UNSENT): S.UNDO_FAILED,
    (S.UNDOING, _On.ERROR): S.UNDO_FAILED,
    (S.UNDOING, _On.REFUSED): S.UNDO_FAILED,
    (S.UNDO_ASKED, _On.ABSENT): S.UNDONE,
    (S.UNDO_ASKED, _On.REFUSED): S.UNDO_FAILED,
    (S.UNDO_ASKED, _On.EXPIRE): S.UNDO_PENDING,
    (S.UNDO_FAILED, _On.ABSENT): S.UNDONE,
    (S.TO_REMOVE, _On.START): S.DELETING,
    (S.TO_REMOVE, _On.CANCEL): S.DROPPED,
    (S.DELETING, _On.OK): S.ASKED,
    (S.DELETING, _On.UNSENT): S.UNASKED,
    (S.UNASKED, _On.DOUBT): S.NOT_ASKED_AGAIN,
    (S.UNASKED, _On.REFUSED): S.REJECTED,
    (S.UNASKED, _On.ERROR): S.NOT_ASKED,
    (S.UNASKED, _On.ABSENT): S.REMOVED,
    (S.DELETING, _On.ERROR): S.NOT_ASKED,
    (S.DELETING, _On.REFUSED): S.REJECTED,
    (S.NOT_ASKED, _On.ABSENT): S.REMOVED,
    (S.ASKED, _On.REPEAT): S.DELETING,
    (S.NOT_ASKED, _On.DOUBT): S.NOT_ASKED_AGAIN,
    (S.NOT_ASKED_AGAIN, _On.ABSENT): S.REMOVED,
    (S.NOT_ASKED_AGAIN, _On.REFUSED): S.NOT_ASKED,
    (S.ASKED, _On.ABSENT): S.REMOVED,
    (S.ASKED, _On.REFUSED): S.REJECTED,
    (S.ASKED, _On.EXPIRE): S.PENDING,
    (S.ASKED, _On.LEAVE): S.PENDING,
    (S.PENDING, _On.ABSENT): S.REMOVED,
    (S.ASKED, _On.REPLACED): S.RETURNED,
    (S.REJECTED, _On.RETRY): S.RETRY_REJECTED,
    (S.RETRY_REJECTED, _On.AGAIN): S.DELETING,
    (S.RETRY_REJECTED, _On.ABSENT): S.REMOVED,
    (S.RETRY_REJECTED, _On.EXPIRE): S.REJECTED,
    (S.RETRY_REJECTED, _On.CANCEL): S.REJECTED,
    (S.RETRY_REJECTED, _On.GIVE_UP): S.REJECTED,
    (S.NOT_ASKED, _On.RETRY): S.RETRY_ERROR,
    (S.RETRY_ERROR, _On.AGAIN): S.DELETING,
    (S.RETRY_ERROR, _On.ABSENT): S.REMOVED,
    (S.RETRY_ERROR, _On.EXPIRE): S.NOT_ASKED,
    (S.RETRY_ERROR, _On.CANCEL): S.NOT_ASKED,
    (S.RETRY_ERROR, _On.GIVE_UP): S.NOT_ASKED,
    (S.REMOVED, _On.RESTORE): S.RESTORING,
    (S.RESTORING, _On.OK): S.RESTORE_ADDED,
    (S.RESTORING, _On.UNSENT): S.NOT_RESTORED,
    (S.RESTORING, _On.ERROR): S.NOT_RESTORED,
    (S.RESTORE_ADDED, _On.PRESENT): S.RESTORED,
    (S.RESTORE_ADDED, _On.ABSENT): S.NOT_RESTORED,
    (S.RESTORED, _On.ABSENT): S.NOT_RESTORED,
    (S.NOT_RESTORED, _On.PRESENT): S.RESTORED,
    (S.REJECTED, _On.ABSENT): S.REMOVED,
    (S.TO_READD, _On.START): S.AWAITING,
    (S.TO_READD, _On.CANCEL): S.DROPPED,
    (S.AWAITING, _On.ABSENT): S.ADDING,
    (S.AWAITING, _On.REFUSED): S.KEPT,
    (S.AWAITING, _On.REPLACED): S.KEPT,
    (S.AWAITING, _On.EXPIRE): S.STILL_AWAITED,
    (S.AWAITING, _On.LOOKED): S.STILL_AWAITED,
    (S.AWAITING, _On.CANCEL): S.STILL_AWAITED,
    (S.AWAITING, _On.GIVE_UP): S.STILL_AWAITED,
    (S.KEPT, _On.ABSENT): S.ADDING,
    (S.KEPT, _On.CANCEL): S.STAYED,
    (S.KEPT, _On.GIVE_UP): S.STAYED,
}

#: To be asked again after a pause.
_TO_RETRY: Final = frozenset({S.RETRY_REJECTED, S.RETRY_ERROR, S.RETRY_ADD})
#: States whose end comes from the guest or with time, not from QEMU's reply.
WAITING: Final = frozenset({S.ASKED, S.AWAITING, S.UNDO_ASKED}) | _TO_RETRY
#: States that a query answers.
_UNVERIFIED: Final = frozenset({S.ADDED, S.FOUND, S.RESTORE_ADDED})
#: States in which a reply leaves something to be looked at at once: "DeviceNotFound" may mean gone,
#: and what is undone may have gone before the reply.
_QUERIED_ON_REPLY: Final = frozenset({S.UNDO_ASKED, S.NOT_ASKED, S.NOT_ASKED_AGAIN, S.UNDO_FAILED})
#: States that a reply ends.
_IN_FLIGHT: Final = frozenset({S.ADDING, S.DELETING, S.UNDOING, S.RESTORING})
_UNENDED: Final = WAITING | _IN_FLIGHT
_PLUG_FAILED: Final = frozenset({S.NOT_ADDED, S.VANISHED})
_FAILED: Final = _PLUG_FAILED | {
    S.NOT_ASKED,
    S.NOT_ASKED_AGAIN,
    S.RETRY_ERROR,
    S.RETRY_ADD,
    S.RETURNED,
}
_REJECTED: Final = frozenset({S.REJECTED, S.RETRY_REJECTED})
#: At whatever moment it stops: QEMU may still carry out an unplug that it was asked for.
STILL_ASKED: Final = frozenset(
    {
        S.ASKED,
        S.PENDING,
        S.UNDOING,
        S.UNDO_ASKED,
        S.UNDO_PENDING,
        S.AWAITING,
        S.DELETING,
        S.NOT_ASKED_AGAIN,
    }
    | {S.STILL_AWAITED}
)
#: An unplug was asked, and has ended.
SETTLED: Final = frozenset(S) - STILL_ASKED - {S.TO_ADD, S.TO_REMOVE, S.TO_READD, S.DROPPED}
_LEFT_PLUGGED: Final = frozenset({S.ADDED, S.PLUGGED, S.UNDO_FAILED, S.UNDO_PENDING})
_LEFT_REMOVED: Final = frozenset({S.REMOVED, S.NOT_RESTORED})


#: Tries, with a growing pause, for an id that QEMU frees a moment after the slot. Another device
#: may have it, too.
_READDS: Final = 4
_NONE: Final = dict.fromkeys(S, 0)
_BIT: Final = {state: 1 << number for number, state in enumerate(S)}


def _mask(states: Iterable[ItemState]) -> int:
    """States as one number, a bit each."""
    return sum(_BIT[state] for state in frozenset(states))


_WAITING: Final = _mask(WAITING)
_RETRYING: Final = _mask(_TO_RETRY)
_SENT: Final = _mask(_IN_FLIGHT)
_DOUBTFUL: Final = _mask(_UNVERIFIED)
_PLUGS_FAILED: Final = _mask(_PLUG_FAILED)
_NOT_AS_ASKED: Final = _mask(_FAILED | _REJECTED | {S.UNASKED})
_UNDOABLE: Final = _mask({S.ADDED, S.PLUGGED})
#: Waited for also by a call that does not wait.
_NEVER_LEFT: Final = _mask({S.AWAITING, S.UNDO_ASKED})


class Phase(Enum):
    """Where the whole transaction stands."""

    RUN = "run"
    UNDO = "undo"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Add:
    """Effect: `device_add` this entity."""

    entity: Entity


@dataclass(frozen=True, slots=True)
class Delete:
    """Effect: `device_del` this entity."""

    entity: Entity
    undo: bool = False


@dataclass(frozen=True, slots=True)
class Query:
    """Effect: a fresh query, to be answered with a `Snapshot`."""


Effect = Add | Delete | Query


@dataclass(frozen=True, slots=True)
class Replied:
    """Input: QEMU answered an `Add` or `Delete`; `error_class` None is success."""

    first: int
    error_class: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Unsent:
    """Input: an `Add` or `Delete` was taken back before QEMU was asked."""

    first: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Input: the first ids of all entities that are plugged, from a query sent after the last
    effect.

    `replaced` are those of them that are not the same object or thread as when the call was
    planned.
    """

    plugged: frozenset[int]
    replaced: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Poll:
    """Input: some time went by; events may have been lost."""


@dataclass(frozen=True, slots=True)
class Again:
    """Input: the pause after a rejection is over; what may be asked again is asked."""


@dataclass(frozen=True, slots=True)
class Expired:
    """Input: the deadline of this phase."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Input: the caller does not want it any more."""


Input = Replied | Unsent | Signal | Snapshot | Poll | Again | Expired | Cancelled


@dataclass(frozen=True, slots=True)
class Failure:
    """What QEMU, or the guest, said of one entity."""

    entity: Entity
    text: str
    error_class: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """How it ended, by vCPU ids.

    `remaining` are plugs that should have been undone and are still there, `removed` what is gone,
    `lost` those of it that an atomic call should have brought back, `unasked` unplugs that had to
    wait for others, and that nobody was asked for. `undo_forbidden` says why, where that was not
    tried.
    """

    outcome: OutcomeKind
    plugged: tuple[int, ...]
    removed: tuple[int, ...]
    pending: tuple[int, ...]
    undone: tuple[int, ...]
    remaining: tuple[int, ...]
    kept: tuple[int, ...]
    failures: tuple[Failure, ...]
    rejections: tuple[Failure, ...]
    lost: tuple[int, ...] = ()
    unasked: tuple[int, ...] = ()
    undo_forbidden: str | None = None


@dataclass(slots=True)
class _Item:
    entity: Entity
    state: ItemState
    retries: int = 0
    #: An earlier unplug of it may still be answered; and one was answered since this one went out.
    doubt: bool = False
    repeat: bool = False
    #: How often it may be added again, where its device id is still taken.
    readds: int = _READDS
    #: It was asked once more, and the first time is not answered either.
    repeated: bool = False
    note: Failure | None = None


@dataclass(slots=True)
class Transaction:
    """The machine: `start()`, then `feed()` until `phase` is DONE, then `result()`.

    Args:
        plugs, unplugs, awaited: entities of the plan.
        undo_forbidden: why plugs of this call must not be undone here, None if they may. What
            drives it sets this anew with each query, before the `Snapshot`.
        restore_forbidden: the same for bringing back what an atomic call removed.
        wait: False ends as soon as QEMU took the unplugs (`--async`), and a look has told which
            earlier ones have ended.
        reset_drops_unplug: on x86 a reset drops what was asked.
        atomic: bring back what was removed if anything is rejected or fails.
        retries: how often an unplug that the guest refused is asked again.
        doubted: first ids of entities whose unplug was asked before and had not ended.
    """

    plugs: Iterable[Entity]
    unplugs: Iterable[Entity] = ()
    awaited: Iterable[Entity] = ()
    undo_forbidden: str | None = None
    wait: bool = True
    reset_drops_unplug: bool = False
    atomic: bool = False
    retries: int = 0
    doubted: frozenset[int] = frozenset()
    restore_forbidden: str | None = None
    phase: Phase = Phase.RUN
    _items: dict[int, _Item] = field(default_factory=dict)
    #: How many items are in each state, and the `_mask` of those where there are any: with hundreds
    #: of items, every message asks.
    _counts: dict[ItemState, int] = field(default_factory=_NONE.copy)
    _present: int = 0
    _effects: list[Effect] = field(default_factory=list)
    #: First ids of what QEMU says is gone.
    _deleted: set[int] = field(default_factory=set)
    _querying: bool = False
    _look_again: bool = False
    #: A reply has left something to be looked at, once all have come.
    _to_look: bool = False
    #: An unplug was taken, and no query was sent since.
    _unseen: bool = False
    #: First ids of what was told about while a query was under way.
    _told: set[int] = field(default_factory=set)
    _expired: bool = False
    _cancelled: bool = False

    def __post_init__(self) -> None:
        for entities, state in (
            (self.awaited, S.TO_READD),
            (self.plugs, S.TO_ADD),
            (self.unplugs, S.TO_REMOVE),
        ):
            for entity in entities:
                doubt = entity.first in self.doubted and state is S.TO_REMOVE
                self._items[entity.first] = _Item(
                    entity, state, self.retries if self.wait else 0, doubt
                )
                self._count(state, 1)

    # -- inputs -----------------------------------------------------------------------------------

    def start(self) -> list[Effect]:
        """The first effects: everything that can go out goes out together, one query behind the
        plugs.
        """
        for item in self._items.values():
            self._move(item, _On.START)
        if any(isinstance(effect, Add) for effect in self._effects):
            # QEMU answers in order, so this one query, sent along, sees the result of all plugs.
            self._query()
        elif not self.wait and self._any(_BIT[S.AWAITING]):
            self._query()
        return self._settle()

    def feed(self, happened: Input) -> list[Effect]:
        """What happened -> what to do next."""
        match happened:
            case Replied():
                self._replied(happened)
            case Unsent():
                self._unsent(self._items[happened.first])
            case Signal():
                self._signal(happened)
            case Snapshot():
                self._querying = False
                for first, item in self._items.items():
                    if first not in happened.plugged:
                        self._move(item, _On.ABSENT)
                    elif not (first in happened.replaced and self._move(item, _On.REPLACED)):
                        self._move(item, _On.PRESENT)
                # Of what is seen gone there is no more to learn.
                if any(self._items[first].state in WAITING for first in self._told):
                    self._look_again = True
                self._told.clear()
                if not self.wait and not self._look_again:
                    self._all(_On.LOOKED)
                if self._expired and not self._look_again:
                    self._all(_On.EXPIRE)
                if self._cancelled and not self._look_again:
                    self._all(_On.LEAVE)
            case Poll():
                if self.waiting and not self._querying:
                    self._query()
            case Again():
                if not self._expired:
                    self._all(_On.AGAIN)
            case Expired():
                # The last word is a query's: what ended right at the deadline has ended.
                self._expired = True
                self._query()
            case Cancelled():
                self._cancelled = True
                if self._any(_BIT[S.ASKED]):
                    # What ended right before the cancel has ended.
                    self._query()
        if self._cancelled:
            self._all(_On.CANCEL)
        return self._settle()

    def asked(self) -> None:
        """The query goes out, for the first time or once more: it sees what has happened until now."""
        self._look_again = self._unseen = False
        self._told.clear()

    # -- what the driver asks ---------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether the next step is the guest's (poll, and listen)."""
        return self._any(_WAITING)

    @property
    def to_look_soon(self) -> bool:
        """Whether QEMU has taken all unplugs, and nobody has looked yet: feed `Poll` before long."""
        return self._unseen and self.waiting and not self._any(_SENT)

    @property
    def seems_over(self) -> bool:
        """Whether QEMU has said of all that is waited for that it is gone: a query has only to
        confirm that.
        """
        left = (first for first, item in self._items.items() if item.state in _UNENDED)
        return bool(self._deleted) and self._deleted.issuperset(left)

    @property
    def to_retry(self) -> bool:
        """Whether something is to be asked again after a pause: feed `Again` then."""
        return self._any(_RETRYING)

    @property
    def still_asked(self) -> tuple[int, ...]:
        """vCPU ids whose unplug QEMU may still carry out, whenever this is asked."""
        return self._ids(STILL_ASKED)

    @property
    def unsure(self) -> tuple[int, ...]:
        """vCPU ids whose `device_add` has not been answered, whenever this is asked."""
        return self._ids({S.ADDING, S.RESTORING})

    @property
    def states(self) -> dict[int, ItemState]:
        """First vCPU id -> state, for reports while it runs."""
        return {first: item.state for first, item in self._items.items()}

    def result(self) -> Result:
        """The end, by ids."""
        failures = tuple(
            item.note or Failure(item.entity, _WORDS.get(item.state, item.state.value))
            for item in self._items.values()
            if item.state in _FAILED
        )
        rejections = tuple(
            item.note or Failure(item.entity, "the guest refused")
            for item in self._items.values()
            if item.state in _REJECTED
        )
        failing = bool(failures) or self._cancelled
        remaining = self._ids(_LEFT_PLUGGED) if failing else ()
        asked = self._ids({S.PENDING} if self.wait else {S.PENDING, S.ASKED})
        awaited = self._ids({S.STILL_AWAITED})
        pending = tuple(sorted({*asked, *awaited, *self._ids({S.UNDO_PENDING, S.NOT_ASKED_AGAIN})}))
        removed = self._ids(_LEFT_REMOVED)
        unasked = self._ids({S.UNASKED})
        # One whose unplug looked as if it had failed may have gone after others were brought back
        # on its account.
        returned = self._ids({S.RESTORED})
        lost = removed if self.atomic and (failures or rejections or unasked or returned) else ()
        if lost or (failing and (remaining or (failures and removed))):
            outcome = OutcomeKind.PARTIAL
        elif failures:
            outcome = OutcomeKind.FAILED
        elif rejections:
            outcome = OutcomeKind.REJECTED
        elif asked and not awaited and not self.wait and not unasked:
            outcome = OutcomeKind.REQUESTED
        elif pending:
            outcome = OutcomeKind.PENDING
        elif unasked or returned:
            outcome = OutcomeKind.PARTIAL if removed or self._any(_UNDOABLE) else OutcomeKind.FAILED
        else:
            outcome = OutcomeKind.APPLIED
        return Result(
            outcome=outcome,
            plugged=self._ids(_LEFT_PLUGGED),
            removed=removed,
            pending=pending,
            undone=self._ids({S.UNDONE, S.RESTORED}),
            remaining=remaining,
            kept=self._ids({S.KEPT, S.STAYED}),
            failures=failures,
            rejections=rejections,
            lost=lost,
            unasked=unasked,
            undo_forbidden=(self.undo_forbidden if remaining else None)
            or (self.restore_forbidden if lost else None),
        )

    # -- inside -----------------------------------------------------------------------------------

    def _ids(self, states: Iterable[ItemState]) -> tuple[int, ...]:
        wanted = frozenset(states)
        return tuple(
            sorted(
                n for item in self._items.values() if item.state in wanted for n in item.entity.ids
            )
        )

    def _any(self, states: int) -> bool:
        """Whether any item is in one of these states (a `_mask`)."""
        return self._present & states != 0

    def _all(self, what: _On) -> None:
        for item in self._items.values():
            self._move(item, what)

    def _move(self, item: _Item, what: _On) -> bool:
        target = TABLE.get((item.state, what))
        if target is None:
            return False
        self._count(item.state, -1)
        self._count(target, 1)
        item.state = target
        if target in (S.ADDING, S.RESTORING):
            self._effects.append(Add(item.entity))
        elif target in (S.DELETING, S.UNDOING):
            self._deleted.discard(item.entity.first)
            self._effects.append(Delete(item.entity, undo=target is S.UNDOING))
        return True

    def _count(self, state: ItemState, change: int) -> None:
        self._counts[state] += change
        if self._counts[state]:
            self._present |= _BIT[state]
        else:
            self._present &= ~_BIT[state]

    def _query(self, about: int | None = None) -> None:
        """`about`: the first id of the entity on whose account, if it is that alone."""
        if self._querying:
            if about is None:
                self._look_again = True
            else:
                self._told.add(about)
            return
        self._querying = True
        self._look_again = False
        self._effects.append(Query())

    def _replied(self, reply: Replied) -> None:
        item = self._items[reply.first]
        failed = reply.error_class is not None or reply.text is not None
        if failed and is_so(reply.text or "") and self._move(item, _On.SO):
            return
        if self._move(item, _On.ERROR if failed else _On.OK) and failed:
            item.note = Failure(item.entity, reply.text or "no reason given", reply.error_class)
            if is_transient(item.note.text):
                self._retry(item)
            elif (
                is_taken(item.note.text) and item.readds and not (self._expired or self._cancelled)
            ):
                item.readds -= 1
                self._to_look |= self._move(item, _On.RETRY)
            if item.doubt or item.repeated:
                self._move(item, _On.DOUBT)
        if item.state is S.ASKED and item.repeat and not (self._cancelled or self._expired):
            item.repeat, item.repeated = False, True
            self._move(item, _On.REPEAT)
        if item.state is S.ASKED:
            # On ppc64 before the guest runs it is gone before the reply. Where QEMU has yet to say
            # so, a query would only keep it from its work.
            self._to_look |= not self.wait or self.seems_over or self._cancelled
            self._unseen = True
        else:
            self._to_look |= item.state in _QUERIED_ON_REPLY

    def _unsent(self, item: _Item) -> None:
        if not self._move(item, _On.UNSENT) or item.state is not S.UNASKED:
            return
        # What was said of it before counts still, and so does an earlier unplug that has not ended.
        if item.note is not None:
            self._move(item, _On.REFUSED if item.note.error_class is None else _On.ERROR)
        if item.doubt or item.repeated:
            self._move(item, _On.DOUBT)

    def _signal(self, signal: Signal) -> None:
        if signal.kind is SignalKind.EJECTING:
            return
        if signal.kind is SignalKind.DELETED and signal.first is not None:
            self._deleted.add(signal.first)
        refused: list[_Item] = []
        if signal.kind is SignalKind.GUEST_REFUSED:
            refused = [item for first, item in self._items.items() if first == signal.first]
        elif signal.kind is SignalKind.RESET and self.reset_drops_unplug:
            refused = [item for item in self._items.values() if item.state in WAITING]
        waited = self.waiting
        for item in refused:
            if item.doubt and item.state is S.DELETING:
                item.doubt, item.repeat = False, True
            elif self._move(item, _On.REFUSED):
                item.note = Failure(item.entity, signal.reason or "the guest refused")
                self._retry(item)
        gone = self._items.get(-1 if signal.first is None else signal.first)
        if signal.kind is SignalKind.DELETED and gone is not None:
            # Of several that go, the last is worth a query; an event that is lost, a poll makes
            # good.
            if waited and (self.seems_over or gone.state is S.AWAITING):
                self._query(gone.entity.first)
        elif waited:
            self._query()

    def _retry(self, item: _Item) -> None:
        if (
            item.retries
            and not self._expired
            and self.phase is Phase.RUN
            and self._move(item, _On.RETRY)
        ):
            item.retries -= 1

    def _settle(self) -> list[Effect]:
        """Go on to the next phase where this one has nothing left to wait for; hand out the
        effects.
        """
        if self.failing:
            # What is already known to fail plugs nothing more.
            self._all(_On.GIVE_UP)
        if self._to_look and not self._any(_SENT):
            self._to_look = False
            self._query()
        if self.phase is not Phase.DONE and not self._any(_SENT):
            self._advance()
        effects, self._effects = self._effects, []
        return effects

    def _advance(self) -> None:
        if self._look_again and not self._querying and not self._effects:
            self._query()
            return
        if self._any(_DOUBTFUL) and not self._undo_due():
            if not self._querying:
                self._query()
            return
        if self.phase is Phase.RUN and self._undo_due():
            if self._querying:
                return  # whether an undo is safe, and what there is to undo, that query says
            self.phase = Phase.UNDO
            self._expired = False
            self._all(_On.UNDO)
            if self._any(_SENT):
                return
        if self.waiting and self.wait:
            return
        if self.waiting and self._any(_NEVER_LEFT):
            return
        if self._restore_due():
            if self._querying:
                return
            self.phase = Phase.UNDO
            self._all(_On.RESTORE)
            self._query()
            return
        if not self._querying:
            self.phase = Phase.DONE

    def _undo_due(self) -> bool:
        if self.phase is not Phase.RUN or self.undo_forbidden is not None:
            return False
        return self.failing and self._any(_UNDOABLE)

    def _restore_due(self) -> bool:
        if not self.atomic or self._cancelled or self.restore_forbidden is not None:
            return False
        return self._any(_NOT_AS_ASKED) and self._any(_BIT[S.REMOVED])

    @property
    def failing(self) -> bool:
        """Whether a plug has failed, or the caller has cancelled: what was plugged is to be undone."""
        return self._cancelled or self._any(_PLUGS_FAILED)


#: What to say of a failure that QEMU gave no words for.
_WORDS: Final = {
    S.VANISHED: "QEMU accepted device_add, but the vCPU is not there",
    S.RETURNED: "it was removed, and another client plugged it again",
}
