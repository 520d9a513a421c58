"""What carries one request out in QEMU: what happened goes in, what is to be done comes out.

An effect is `("device_add", n)`, `("device_del", n)`, `("device_del", n, "undo")` or `("query",)`;
n is the first vCPU id of an entity. Another engine behind these calls needs nothing else: the clock
stays inside the harness (`expired` is the moment of the deadline, `poll` and `pause_is_over` are
those that `wakes` names).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qmpvcpu import Entity, Props
from qmpvcpu.core.engine.messages import (
    Add,
    Cancelled,
    Delete,
    Effect,
    EventReceived,
    Failure,
    Finished,
    Input,
    Moves,
    Query,
    Replied,
    Snapshot,
    Terms,
    Unsent,
    Woke,
)
from qmpvcpu.core.engine.transaction import Transaction
from qmpvcpu.core.state.events import Names, SignalKind, interpret

#: Seconds of a call that nothing but `expired` ends; more than any poll, pause or undo takes.
_TIMEOUT = 1000.0
_PAUSE = 3.0

QUERY = ("query",)


def add(first: int) -> tuple[Any, ...]:
    return ("device_add", first)


def delete(first: int) -> tuple[Any, ...]:
    return ("device_del", first)


def undo(first: int) -> tuple[Any, ...]:
    return ("device_del", first, "undo")


@dataclass(frozen=True)
class Report:
    """How it ended, by vCPU ids. `failures` and `rejections`: the ids of an entity -> what QEMU or
    the guest said, an error of QEMU's with its class in front.
    """

    outcome: str
    plugged: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()
    undone: tuple[int, ...] = ()
    remaining: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    not_requested: tuple[int, ...] = ()
    failures: Mapping[tuple[int, ...], str] = field(default_factory=dict)
    rejections: Mapping[tuple[int, ...], str] = field(default_factory=dict)
    undo_forbidden: str | None = None


class Engine:
    """One request. `plug`, `unplug` and `awaited` (to be plugged once an earlier unplug has ended)
    are first vCPU ids; `ids` are all vCPU ids of an entity that has several.

    `wait=False` is `--async`. `atomic` brings back what was removed if anything fails. `retries` is
    how often an unplug that the guest refused is asked again. Of `doubted` an unplug was asked
    before. `undo_forbidden` and `restore_forbidden` say why a plug must not be undone, and a
    removal not be taken back. `reset_drops_unplug` is how an x86 machine behaves.
    """

    def __init__(
        self,
        plug: Iterable[int] = (),
        unplug: Iterable[int] = (),
        awaited: Iterable[int] = (),
        *,
        ids: Mapping[int, tuple[int, ...]] | None = None,
        doubted: Iterable[int] = (),
        wait: bool = True,
        atomic: bool = False,
        retries: int = 0,
        undo_forbidden: str | None = None,
        restore_forbidden: str | None = None,
        reset_drops_unplug: bool = False,
    ) -> None:
        ids = ids or {}

        def entities(firsts: Iterable[int], plugged: bool) -> list[Entity]:
            return [_entity(ids.get(first, (first,)), plugged) for first in firsts]

        self._now = 0.0
        self._ended = False
        self._forbidden = undo_forbidden, restore_forbidden
        self._transaction = Transaction(
            Moves(
                tuple(entities(plug, False)),
                tuple(entities(unplug, True)),
                tuple(entities(awaited, True)),
                frozenset(doubted),
            ),
            Terms(
                _TIMEOUT,
                wait=wait,
                atomic=atomic,
                retries=retries,
                reset_drops_unplug=reset_drops_unplug,
            ),
        )

    def start(self) -> list[tuple[Any, ...]]:
        """The first effects. Every call below gives the next ones."""
        return self._plain(self._transaction.start(self._now))

    # -- QEMU's answers ---------------------------------------------------------------------------

    def replied(self, first: int) -> list[tuple[Any, ...]]:
        """QEMU took the `device_add` or `device_del`."""
        return self._feed(Replied(first))

    def failed(
        self, first: int, text: str, error_class: str = "GenericError"
    ) -> list[tuple[Any, ...]]:
        """QEMU declined it."""
        return self._feed(Replied(first, error_class, text))

    def unsent(self, first: int) -> list[tuple[Any, ...]]:
        """It was taken back before it was sent."""
        return self._feed(Unsent(first))

    def query_goes_out(self) -> bool:
        """The query is sent, or sent once more; whether it has only to confirm that all is gone."""
        return self._transaction.query_sent(self._now)[0]

    def seen(self, *plugged: int, replaced: Iterable[int] = ()) -> list[tuple[Any, ...]]:
        """The answer to the query: what is plugged, and what of it another client has plugged
        meanwhile.
        """
        return self._feed(Snapshot(frozenset(plugged), frozenset(replaced), *self._forbidden))

    # -- events -----------------------------------------------------------------------------------

    def gone(self, first: int) -> list[tuple[Any, ...]]:
        """DEVICE_DELETED."""
        return self._feed(EventReceived("DEVICE_DELETED", {"path": _path(first)}))

    def refused(self, first: int, reason: str = "no") -> list[tuple[Any, ...]]:
        """The guest does not let it go."""
        return self._feed(
            EventReceived("DEVICE_UNPLUG_GUEST_ERROR", {"path": _path(first), "text": reason})
        )

    def ejecting(self, first: int) -> list[tuple[Any, ...]]:
        """The guest is about to let it go."""
        info = {"slot-type": "CPU", "slot": str(first), "source": 3, "status": 0x84}
        return self._feed(EventReceived("ACPI_DEVICE_OST", {"info": info}))

    def something_changed(self) -> list[tuple[Any, ...]]:
        """An event that does not name its vCPU."""
        return self._feed(
            EventReceived("DEVICE_DELETED", {"path": "/machine/unattached/device[9]"})
        )

    def machine_is_reset(self) -> list[tuple[Any, ...]]:
        """RESET."""
        return self._feed(EventReceived("RESET"))

    # -- time and the caller ----------------------------------------------------------------------

    def poll(self) -> list[tuple[Any, ...]]:
        """Some time went by without an event."""
        timers = self._transaction._timers
        return self._at(timers.soon or timers.poll or self._now)

    def pause_is_over(self) -> list[tuple[Any, ...]]:
        """What was refused may be asked again."""
        return self._at(self._now + _PAUSE)

    def expired(self) -> list[tuple[Any, ...]]:
        """The deadline: the call's, or that of the undo where one has begun."""
        return self._at(self._now + _TIMEOUT)

    def _at(self, moment: float) -> list[tuple[Any, ...]]:
        self._now = max(self._now, moment)
        return self._feed(Woke())

    def cancelled(self) -> list[tuple[Any, ...]]:
        """The caller does not want it any more; after the end: it is taken back."""
        self._ended = False
        return self._feed(Cancelled())

    # -- what can be seen of it -------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def has_deadline(self) -> bool:
        """Whether the deadline may come: the guest's time begins once QEMU has done what is its
        own.
        """
        return self._transaction._timers.deadline is not None

    @property
    def wakes(self) -> frozenset[str]:
        """What it wants to be called for: `guest` (its next step is the guest's: `poll`), `soon`
        (so, before long), `retry` (`pause_is_over`).
        """
        timers = self._transaction._timers
        words = {
            "guest": self._transaction._waiting,
            "soon": timers.soon is not None,
            "retry": timers.retry is not None,
        }
        return frozenset(word for word, is_filled in words.items() if is_filled)

    def end(self) -> Report:
        assert self.ended
        return self._report()

    def so_far(self) -> Report:
        """What is reported if the connection is lost now; `pending` is all that QEMU may still
        carry out.
        """
        return self._report()

    def _report(self, **other: Any) -> Report:
        result = self._transaction.result()
        names = "plugged removed pending undone remaining kept lost not_requested undo_forbidden"
        return Report(
            outcome=str(result.outcome),
            failures=_told(result.failures),
            rejections=_told(result.rejections),
            **{name: getattr(result, name) for name in names.split()} | other,
        )

    def _feed(self, happened: Input) -> list[tuple[Any, ...]]:
        return self._plain(self._transaction.feed(happened, self._now))

    def _plain(self, effects: Iterable[Effect]) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for effect in effects:
            match effect:
                case Add():
                    found.append(add(effect.entity.id))
                case Delete():
                    found.append(
                        (undo if effect.name.startswith("/machine/peripheral/") else delete)(
                            effect.entity.id
                        )
                    )
                case Query():
                    found.append(QUERY)
                case Finished():
                    self._ended = True
        return found


def meaning(
    event: str, data: Mapping[str, Any], plugged: Mapping[int, str], empty: Iterable[int] = ()
) -> tuple[Any, ...] | None:
    """What an event of QEMU's says: `("gone", n)`, `("refused", n, reason)`, `("ejecting", n)`,
    `("reset",)`, `("something changed",)`; None where it says nothing of a CPU.

    Args:
        event, data: as QMP has them.
        plugged: first vCPU ids -> QOM paths.
        empty: first vCPU ids of slots that are being filled.
    """
    paths: dict[int, str | None] = {**plugged, **dict.fromkeys(empty)}
    signal = interpret(event, data, Names(_entity((n,), False, path) for n, path in paths.items()))
    if signal is None:
        return None
    match signal.kind:
        case SignalKind.DELETED:
            return ("gone", signal.entity_id)
        case SignalKind.EJECTING:
            return ("ejecting", signal.entity_id)
        case SignalKind.GUEST_REFUSED:
            return ("refused", signal.entity_id, signal.reason)
        case SignalKind.RESET:
            return ("reset",)
        case SignalKind.REFRESH:
            return ("something changed",)


def _path(first: int) -> str:
    return f"/machine/peripheral/vcpu{first}"


def _entity(ids: tuple[int, ...], plugged: bool, path: str | None = None) -> Entity:
    path = _path(ids[0]) if plugged else path
    return Entity(ids, "t", Props({"core-id": ids[0]}), path, None, True)


def _told(failures: Iterable[Failure]) -> dict[tuple[int, ...], str]:
    return {
        failure.entity.ids: f"{failure.error_class}: {failure.text}"
        if failure.error_class
        else failure.text
        for failure in failures
    }
