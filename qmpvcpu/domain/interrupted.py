"""`Interrupted`: what a cancelled call has left, passed from the place of the cancel to
`Domain.interrupted`.

It travels inside the CancelledError, whose class must stay exactly CancelledError: in Python 3.11,
`asyncio.timeout` and `asyncio.TaskGroup` do not accept a subclass as a cancel.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Interrupted:
    """What a call has left when it was cancelled: `Domain.interrupted`.

    Attributes:
        changed_ids: vCPU ids that the call has changed in the running guest and could not undo.
        pending: vCPU ids whose unplug was requested, by this call or an earlier one, and has not
            finished.
        unsure_ids: vCPU ids whose plug QEMU has not answered, or whose switch the guest agent has
            not answered; both may still happen.
        definition_unsure: whether the definition was being written, which may still happen.
        definition_written: whether the definition was written. If both are false, it is unchanged.
    """

    changed_ids: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()
    unsure_ids: tuple[int, ...] = ()
    definition_unsure: bool = False
    definition_written: bool = False

    def __or__(self, other: Interrupted) -> Interrupted:
        """Combine both."""
        return Interrupted(
            _ids(self.changed_ids, other.changed_ids),
            _ids(self.pending, other.pending),
            _ids(self.unsure_ids, other.unsure_ids),
            self.definition_unsure or other.definition_unsure,
            self.definition_written or other.definition_written,
        )

    def with_pending(self, ids: Iterable[int]) -> Interrupted:
        """The same, with these unplugs pending. A pending vCPU does not count as changed."""
        pending = tuple(ids)
        return replace(
            self,
            changed_ids=tuple(number for number in self.changed_ids if number not in pending),
            pending=pending,
        )

    def to_json(self) -> dict[str, Any]:
        """Lists of vCPU ids, and the result for the definition."""
        return {
            "changed_ids": list(self.changed_ids),
            "pending": list(self.pending),
            "unsure": list(self.unsure_ids),
            "definition_unsure": self.definition_unsure,
            "definition_written": self.definition_written,
        }


def leaving(cancelled: CancelledError, found: Interrupted) -> CancelledError:
    """Return the same cancel with `found` added; raise it from `cancelled`."""
    others = (one for one in cancelled.args if not isinstance(one, Interrupted))
    return CancelledError(*others, left_by(cancelled) | found)


@contextmanager
def leaves(found: Callable[[], Interrupted]) -> Iterator[None]:
    """Add the result of `found` to a cancel that leaves the body."""
    try:
        yield
    except CancelledError as error:
        raise leaving(error, found()) from error


def left_by(cancelled: CancelledError) -> Interrupted:
    """Return what a call has left, as recorded in its cancel."""
    return next((one for one in cancelled.args if isinstance(one, Interrupted)), Interrupted())


def _ids(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({*one, *other}))
