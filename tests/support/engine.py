"""What carries one request out in QEMU: what happened goes in, what is to be done comes out.

An effect is `("device_add", n)`, `("device_del", n)`, `("device_del", n, "undo")` or `("query",)`; n is the first
vCPU id of an entity. Another engine behind these calls needs nothing else: the clock stays inside the harness
(`expired` is the moment of the deadline, `poll` and `pause_is_over` are those that `wakes` names).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qmpvcpu import Entity, Props
from qmpvcpu.core.engine.transaction import (
    Add,
    Again,
    Cancelled,
    Delete,
    Effect,
    Expired,
    Failure,
    Input,
    Phase,
    Poll,
    Replied,
    Snapshot,
    Transaction,
    Unsent,
)
from qmpvcpu.core.state.events import Names, Signal, SignalKind, interpret

QUERY = ("query",)


def add(first: int) -> tuple[Any, ...]:
    return ("device_add", first)


def delete(first: int) -> tuple[Any, ...]:
    return ("device_del", first)


def undo(first: int) -> tuple[Any, ...]:
    return ("device_del", first, "undo")


@dataclass(frozen=True)
class Report:
    """How it ended, by vCPU ids. `failures` and `rejections`: the ids of an entity -> what QEMU or the guest said,
    an error of QEMU's with its class in front.
    """

    outcome: str
    plugged: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()
    undone: tuple[int, ...] = ()
    remaining: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    unasked: tuple[int, ...] = ()
    failures: Mapping[tuple[int, ...], str] = field(default_factory=dict)
    rejections: Mapping[tuple[int, ...], str] = field(default_factory=dict)
    undo_forbidden: str | None = None


class Engine:
    """One request. `plug`, `unplug` and `awaited` (to be plugged once an earlier unplug has ended) are first vCPU
    ids; `ids` are all vCPU ids of an entity that has several.

    `wait=False` is `--async`. `atomic` brings back what was removed if anything fails. `retries` is how often an
    unplug that the guest refused is asked again. Of `doubted` an unplug was asked before. `undo_forbidden` and
    `restore_forbidden` say why a plug must not be undone, and a removal not be taken back. `reset_drops_unplug` is
    how an x86 machine behaves.
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

        self._transaction = Transaction(
            entities(plug, False),
            entities(unplug, True),
            entities(awaited, True),
            doubted=frozenset(doubted),
            wait=wait,
            atomic=atomic,
            retries=retries,
            undo_forbidden=undo_forbidden,
            restore_forbidden=restore_forbidden,
            reset_drops_unplug=reset_drops_unplug,
        )

    def start(self) -> list[tuple[Any, ...]]:
        """The first effects. Every call below gives the next ones."""
        return _plain(self._transaction.start())

    # -- QEMU's answers ---------------------------------------------------------------------------

    def replied(self, first: int) -> list[tuple[Any, ...]]:
        """QEMU took the `device_add` or `device_del`."""
        return self._feed(Replied(first))

    def failed(self, first: int, text: str, error_class: str = "GenericError") -> list[tuple[Any, ...]]:
        """QEMU declined it."""
        return self._feed(Replied(first, error_class, text))

    def unsent(self, first: int) -> list[tuple[Any, ...]]:
        """It was taken back before it was sent."""
        return self._feed(Unsent(first))

    def query_goes_out(self) -> bool:
        """The query is sent, or sent once more; whether it has only to confirm that all is gone."""
        confirms = self._transaction.seems_over
        self._transaction.asked()
        return confirms

    def seen(self, *plugged: int, replaced: Iterable[int] = ()) -> list[tuple[Any, ...]]:
        """The answer to the query: what is plugged, and what of it another client has plugged meanwhile."""
        return self._feed(Snapshot(frozenset(plugged), frozenset(replaced)))

    # -- events -----------------------------------------------------------------------------------

    def gone(self, first: int) -> list[tuple[Any, ...]]:
        """DEVICE_DELETED."""
        return self._feed(Signal(SignalKind.DELETED, first))

    def refused(self, first: int, reason: str = "no") -> list[tuple[Any, ...]]:
        """The guest does not let it go."""
        return self._feed(Signal(SignalKind.GUEST_REFUSED, first, reason))

    def ejecting(self, first: int) -> list[tuple[Any, ...]]:
        """The guest is about to let it go."""
        return self._feed(Signal(SignalKind.EJECTING, first))

    def something_changed(self) -> list[tuple[Any, ...]]:
        """An event that does not name its vCPU."""
        return self._feed(Signal(SignalKind.LOOK_AGAIN))

    def machine_is_reset(self) -> list[tuple[Any, ...]]:
        """RESET."""
        return self._feed(Signal(SignalKind.RESET, None, "the machine was reset"))

    # -- time and the caller ----------------------------------------------------------------------

    def poll(self) -> list[tuple[Any, ...]]:
        """Some time went by without an event."""
        return self._feed(Poll())

    def pause_is_over(self) -> list[tuple[Any, ...]]:
        """What was refused may be asked again."""
        return self._feed(Again())

    def expired(self) -> list[tuple[Any, ...]]:
        """The deadline: the call's, or that of the undo where one has begun."""
        return self._feed(Expired())

    def cancelled(self) -> list[tuple[Any, ...]]:
        """The caller does not want it any more."""
        return self._feed(Cancelled())

    # -- what can be seen of it -------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        return self._transaction.phase is Phase.DONE

    @property
    def wakes(self) -> frozenset[str]:
        """What it wants to be called for: `guest` (its next step is the guest's: `poll`), `soon` (so, before
        long), `retry` (`pause_is_over`).
        """
        transaction = self._transaction
        words = {"guest": transaction.waiting, "soon": transaction.to_look_soon, "retry": transaction.to_retry}
        return frozenset(word for word, is_so in words.items() if is_so)

    def end(self) -> Report:
        assert self.ended
        return self._report()

    def so_far(self) -> Report:
        """What is reported if the connection is lost now; `pending` is all that QEMU may still carry out."""
        return self._report(pending=self._transaction.still_asked)

    def _report(self, **other: Any) -> Report:
        result = self._transaction.result()
        names = "plugged removed pending undone remaining kept lost unasked undo_forbidden"
        return Report(
            outcome=str(result.outcome),
            failures=_told(result.failures),
            rejections=_told(result.rejections),
            **{name: getattr(result, name) for name in names.split()} | other,
        )

    def _feed(self, happened: Input) -> list[tuple[Any, ...]]:
        return _plain(self._transaction.feed(happened))


def meaning(
    event: str, data: Mapping[str, Any], plugged: Mapping[int, str], empty: Iterable[int] = ()
) -> tuple[Any, ...] | None:
    """What an event of QEMU's says: `("gone", n)`, `("refused", n, reason)`, `("ejecting", n)`, `("reset",)`,
    `("something changed",)`; None where it says nothing of a CPU.

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
            return ("gone", signal.first)
        case SignalKind.EJECTING:
            return ("ejecting", signal.first)
        case SignalKind.GUEST_REFUSED:
            return ("refused", signal.first, signal.reason)
        case SignalKind.RESET:
            return ("reset",)
        case SignalKind.LOOK_AGAIN:
            return ("something changed",)


def _entity(ids: tuple[int, ...], plugged: bool, path: str | None = None) -> Entity:
    path = f"/machine/peripheral/vcpu{ids[0]}" if plugged else path
    return Entity(ids, "t", Props({"core-id": ids[0]}), path, None, True)


def _plain(effects: Iterable[Effect]) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for effect in effects:
        match effect:
            case Add():
                found.append(add(effect.entity.first))
            case Delete():
                found.append((undo if effect.undo else delete)(effect.entity.first))
            case _:
                found.append(QUERY)
    return found


def _told(failures: Iterable[Failure]) -> dict[tuple[int, ...], str]:
    return {
        failure.entity.ids: f"{failure.error_class}: {failure.text}" if failure.error_class else failure.text
        for failure in failures
    }
