"""The inputs, the effects and the result of a transaction. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qmpvcpu.core.model import DomainState, Entity
from qmpvcpu.core.state.events import replugged
from qmpvcpu.errors import OutcomeKind


@dataclass(frozen=True, slots=True)
class Moves:
    """The entities of a request, each as it was planned.

    `awaited` are to be plugged once their earlier unplug has ended. `doubted` are entity ids whose
    unplug was requested before and has not ended.
    """

    plugs: tuple[Entity, ...] = ()
    unplugs: tuple[Entity, ...] = ()
    awaited: tuple[Entity, ...] = ()
    doubted: frozenset[int] = frozenset()

    @property
    def entities(self) -> tuple[Entity, ...]:
        """All of them, in the order in which they are sent."""
        return (*self.awaited, *self.plugs, *self.unplugs)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a request allows.

    Attributes:
        timeout: seconds that the guest has; 0 does not wait.
        wait: False ends once QEMU accepted the unplugs and a query has shown which earlier ones
            ended (`--async`).
        atomic: bring back what was removed if anything is rejected or fails.
        retries: how often an unplug that the guest refused is requested again.
        reset_drops_unplug: whether a reset of the machine drops what was requested (x86).
    """

    timeout: float
    wait: bool = True
    atomic: bool = False
    retries: int = 0
    reset_drops_unplug: bool = False


# -- inputs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replied:
    """QEMU answered an `Add` or `Delete`; `error_class` None is success."""

    entity_id: int
    error_class: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Unsent:
    """An `Add` or `Delete` was withdrawn before it was sent."""

    entity_id: int


@dataclass(frozen=True, slots=True)
class EventReceived:
    """A QMP event: its QAPI name and its data."""

    event: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The answer to a query.

    Attributes:
        plugged: ids of all entities that are plugged.
        replaced: those of them that are not the same object or thread as when the request was
            planned.
        undo_forbidden: why a plug of this call must not be undone now, None if it may.
        restore_forbidden: why a removal of this call must not be undone now, None if it may.
    """

    plugged: frozenset[int]
    replaced: frozenset[int] = frozenset()
    undo_forbidden: str | None = None
    restore_forbidden: str | None = None

    @classmethod
    def of(
        cls,
        now: DomainState,
        planned: DomainState,
        moves: Moves,
        undo_forbidden: str | None,
        restore_forbidden: str | None,
    ) -> Snapshot:
        """A fresh state, compared with the one on which the moves were planned."""
        return cls(
            frozenset(entity.id for entity in now.entities if entity.plugged),
            frozenset(
                entity.id
                for entity in (*moves.awaited, *moves.unplugs)
                if replugged(entity, now.by_id[entity.id], planned, now)
            ),
            undo_forbidden,
            restore_forbidden,
        )


@dataclass(frozen=True, slots=True)
class Woke:
    """The moment of the last `Wake` has come."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The caller has cancelled: nothing new begins, and plugs are undone."""


Input = Replied | Unsent | EventReceived | Snapshot | Woke | Cancelled

# -- effects ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Add:
    """`device_add` this entity, under its `device_id`."""

    entity: Entity


@dataclass(frozen=True, slots=True)
class Delete:
    """`device_del` `name`, which is this entity's device id or QOM path."""

    entity: Entity
    name: str


@dataclass(frozen=True, slots=True)
class Query:
    """A fresh query is due. Call `query_sent` right before it goes out, then feed its answer, a
    `Snapshot`.
    """


@dataclass(frozen=True, slots=True)
class Drop:
    """Withdraw what has not been sent yet, and feed `Unsent` for each; `plugs`: `device_add`
    too.
    """

    plugs: bool = True


@dataclass(frozen=True, slots=True)
class Wake:
    """Feed `Woke` at this moment, in seconds of the caller's clock, instead of the last one; None:
    not at all.
    """

    at: float | None


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing is left to do; `result()` returns the result."""


Effect = Add | Delete | Query | Drop | Wake | Finished

# -- the result ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failure:
    """The error of QEMU, or of the guest, about one entity."""

    entity: Entity
    text: str
    error_class: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The result, or the state so far, by vCPU ids.

    Attributes:
        pending: unplugs that QEMU may still carry out.
        remaining: plugs that should have been undone and are still there.
        removed: what was unplugged.
        lost: those of `removed` that an atomic call should have plugged back.
        kept: those whose earlier unplug did not happen.
        not_requested: unplugs that had to wait for others, and were never requested.
        undo_forbidden: why an undo was not tried, where it was not.
        pending_entities: the entities of `pending`.
        unsure: plugs that QEMU has not answered.
        removed_entities, finished_entities: ids of the entities that this call has removed; and of
            those that have nothing pending.
        stages: the stage of each entity as text -> its vCPU ids.
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
    not_requested: tuple[int, ...] = ()
    undo_forbidden: str | None = None
    pending_entities: tuple[Entity, ...] = ()
    unsure: tuple[int, ...] = ()
    removed_entities: tuple[int, ...] = ()
    finished_entities: tuple[int, ...] = ()
    stages: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def changed(self) -> tuple[int, ...]:
        """vCPU ids that this call has changed and left so."""
        return tuple(sorted({*self.plugged, *self.removed}))
