"""The entities of a transaction with their stages, and the result that these make. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from qmpvcpu.core.engine.messages import Failure, Moves, Result, Terms
from qmpvcpu.core.engine.stages import (
    FAILED,
    FORWARD,
    NOT_BEGUN,
    NOT_RESTORED,
    NOT_UNDONE,
    REJECTED,
    STILL_REQUESTED,
    UNDOABLE,
    UNDOING,
    On,
    Stage,
)
from qmpvcpu.core.model import Entity, grouped
from qmpvcpu.errors import OutcomeKind

#: How often a taken device id is tried again, with a growing pause: QEMU frees it a moment after
#: the slot.
_READDS: Final = 4

_RESTORED: Final = frozenset({Stage.PLUGGED, Stage.OTHERS})

#: The text of a failure for which QEMU gave none.
_WORDS: Final = {
    Stage.VANISHED: "QEMU accepted device_add, but the vCPU is not there",
    Stage.RETURNED: "it was removed, and another client plugged it again",
}


@dataclass(slots=True)
class Item:
    """One entity.

    Attributes:
        is_plug: whether the request plugs it; else the request removes it.
        is_undo: whether what the request did to it is being undone.
        retries: how often an unplug may still be requested again.
        doubt: whether an earlier unplug may still be answered.
        repeat: whether an answer came that may be to that earlier one.
        repeated: whether it was requested once more without an answer to the first request.
        readds: how often it may be added again while its device id is taken.
        taken: how often its device id was taken.
        note: the last error of QEMU or of the guest.
    """

    entity: Entity
    stage: Stage
    is_plug: bool
    retries: int = 0
    doubt: bool = False
    is_undo: bool = False
    repeat: bool = False
    repeated: bool = False
    readds: int = _READDS
    taken: int = 0
    note: Failure | None = None

    def begin_undo(self) -> Stage:
        """Begin to undo what was done; return the stage that sends the command for it."""
        self.is_undo, self.doubt, self.repeat, self.repeated = True, False, False, False
        self.retries, self.readds = 0, 0 if self.is_plug else _READDS
        return Stage.DELETING if self.is_plug else Stage.ADDING

    @property
    def words(self) -> str:
        """Its stage, for a message."""
        return f"undo: {self.stage.value}" if self.is_undo else self.stage.value


class Items:
    """All entities of a transaction, by id. The items in each stage are counted, because every
    message asks which stages there are, and there may be hundreds of entities.
    """

    __slots__ = ("_by_id", "_forward", "_undo")

    def __init__(self, moves: Moves, terms: Terms) -> None:
        self._by_id: dict[int, Item] = {}
        self._forward = dict.fromkeys(Stage, 0)
        self._undo = dict.fromkeys(Stage, 0)
        retries = terms.retries if terms.wait else 0
        for entities, stage in (
            (moves.awaited, Stage.READY_TO_REPLACE),
            (moves.plugs, Stage.READY_TO_ADD),
            (moves.unplugs, Stage.READY_TO_REMOVE),
        ):
            is_plug = stage is not Stage.READY_TO_REMOVE
            for entity in entities:
                self._by_id[entity.id] = Item(
                    entity,
                    stage,
                    is_plug,
                    retries,
                    doubt=not is_plug and entity.id in moves.doubted,
                )
                self._forward[stage] += 1

    def __iter__(self) -> Iterator[Item]:
        return iter(self._by_id.values())

    def __getitem__(self, first: int) -> Item:
        return self._by_id[first]

    def get(self, first: int | None) -> Item | None:
        """The entity of that id, if it is one of these."""
        return None if first is None else self._by_id.get(first)

    def target(self, item: Item, what: On) -> Stage | None:
        """The stage that this leads to, None if it changes nothing."""
        return (UNDOING if item.is_undo else FORWARD).get((item.stage, what))

    def put(self, item: Item, stage: Stage, *, undo: bool = False) -> None:
        """Move it to this stage; with `undo`, to the first stage of its undo."""
        (self._undo if item.is_undo else self._forward)[item.stage] -= 1
        if undo:
            stage = item.begin_undo()
        (self._undo if item.is_undo else self._forward)[stage] += 1
        item.stage = stage

    def any(self, stages: Iterable[Stage]) -> bool:
        """Whether any item is in one of these stages."""
        first, undo = self._forward, self._undo
        return any(first[stage] or undo[stage] for stage in stages)

    def any_forward(self, stages: Iterable[Stage]) -> bool:
        """Whether any item is in one of these stages and is not being undone."""
        first = self._forward
        return any(first[stage] for stage in stages)

    def any_undo(self, stage: Stage) -> bool:
        """Whether any item that is being undone is in this stage."""
        return self._undo[stage] != 0

    def ids(
        self,
        first: Collection[Stage] = (),
        *,
        unplugging: Collection[Stage] = (),
        restoring: Collection[Stage] = (),
    ) -> tuple[int, ...]:
        """The vCPU ids of the items in a stage of `first`; of plugs that are being undone, in one
        of `unplugging`; of removals that are being undone, in one of `restoring`.
        """

        def is_meant(item: Item) -> bool:
            if not item.is_undo:
                return item.stage in first
            return item.stage in (unplugging if item.is_plug else restoring)

        return tuple(
            sorted(number for item in self if is_meant(item) for number in item.entity.ids)
        )

    def notes(self, stages: Collection[Stage], default: str | None = None) -> tuple[Failure, ...]:
        """The errors of the items in these stages."""
        return tuple(
            item.note or Failure(item.entity, default or _WORDS.get(item.stage, item.stage.value))
            for item in self
            if not item.is_undo and item.stage in stages
        )


def result_of(
    items: Items,
    terms: Terms,
    *,
    cancelled: bool,
    undo_forbidden: str | None,
    restore_forbidden: str | None,
) -> Result:
    """The result, or the state so far."""
    failures = items.notes(FAILED)
    rejections = items.notes(REJECTED, "the guest refused")
    failing = bool(failures) or cancelled
    plugged = items.ids(UNDOABLE, unplugging=NOT_UNDONE)
    remaining = plugged if failing else ()
    requested = items.ids({Stage.PENDING} if terms.wait else {Stage.PENDING, Stage.REQUESTED})
    awaited = items.ids({Stage.STILL_AWAITED})
    pending = items.ids(STILL_REQUESTED, unplugging=STILL_REQUESTED)
    removed = items.ids({Stage.REMOVED}, restoring=NOT_RESTORED)
    not_requested = items.ids({Stage.NOT_REQUESTED})
    # An unplug that seemed to have failed may have ended after others were plugged back because of
    # it.
    returned = items.ids(restoring=_RESTORED)
    lost = removed if terms.atomic and (failures or rejections or not_requested or returned) else ()
    if lost or (failing and (remaining or (failures and removed))):
        outcome = OutcomeKind.PARTIAL
    elif failures:
        outcome = OutcomeKind.FAILED
    elif rejections:
        outcome = OutcomeKind.REJECTED
    elif requested and not (awaited or terms.wait or not_requested):
        outcome = OutcomeKind.REQUESTED
    elif pending:
        outcome = OutcomeKind.PENDING
    elif not_requested or returned:
        outcome = (
            OutcomeKind.PARTIAL if removed or items.any_forward(UNDOABLE) else OutcomeKind.FAILED
        )
    else:
        outcome = OutcomeKind.APPLIED
    return Result(
        outcome=outcome,
        plugged=plugged,
        removed=removed,
        pending=pending,
        undone=items.ids(unplugging={Stage.REMOVED}, restoring=_RESTORED),
        remaining=remaining,
        kept=items.ids({Stage.KEPT, Stage.STAYED}),
        failures=failures,
        rejections=rejections,
        lost=lost,
        not_requested=not_requested,
        undo_forbidden=(undo_forbidden if remaining else None)
        or (restore_forbidden if lost else None),
        pending_entities=tuple(item.entity for item in items if item.stage in STILL_REQUESTED),
        unsure=items.ids({Stage.ADDING}, restoring={Stage.ADDING}),
        removed_entities=tuple(
            item.entity.id for item in items if item.stage is Stage.REMOVED and not item.is_undo
        ),
        finished_entities=tuple(
            item.entity.id
            for item in items
            if item.stage not in STILL_REQUESTED and item.stage not in NOT_BEGUN
        ),
        stages=grouped((item.words, number) for item in items for number in item.entity.ids),
    )
