"""`Interrupted`: what a cancelled call has left, from the place where it was cancelled to `Domain.interrupted`.

It travels in the CancelledError itself, whose class stays exactly that: in Python 3.11 `asyncio.timeout` and
`asyncio.TaskGroup` do not take a subclass for a cancel.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Interrupted", "leaves", "leaving", "left_by"]


@dataclass(frozen=True, slots=True)
class Interrupted:
    """What a call has left when it was cancelled: `Domain.interrupted`.

    Attributes:
        changed_ids: vCPU ids that the call has changed in the running guest, and could not put back.
        pending: vCPU ids whose unplug was asked, by this call or before it, and has not ended.
        unsure_ids: vCPU ids whose plug QEMU has not answered, or whose switch the guest agent has not: that may
            still be done.
        definition_unsure: whether the definition was being written, and that may still be done.
        definition_written: whether the definition was written. If neither is true, it is as it was.
    """

    changed_ids: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()
    unsure_ids: tuple[int, ...] = ()
    definition_unsure: bool = False
    definition_written: bool = False

    def __or__(self, other: Interrupted) -> Interrupted:
        """What both say."""
        return Interrupted(
            _ids(self.changed_ids, other.changed_ids),
            _ids(self.pending, other.pending),
            _ids(self.unsure_ids, other.unsure_ids),
            self.definition_unsure or other.definition_unsure,
            self.definition_written or other.definition_written,
        )

    def with_pending(self, ids: Iterable[int]) -> Interrupted:
        """The same, with these unplugs pending: what is pending is not changed yet."""
        pending = tuple(ids)
        changed = tuple(number for number in self.changed_ids if number not in pending)
        return replace(self, changed_ids=changed, pending=pending)

    def to_json(self) -> dict[str, Any]:
        """Lists of vCPU ids, and what became of the definition."""
        return {
            "changed_ids": list(self.changed_ids),
            "pending": list(self.pending),
            "unsure": list(self.unsure_ids),
            "definition_unsure": self.definition_unsure,
            "definition_written": self.definition_written,
        }


def leaving(cancelled: CancelledError, found: Interrupted) -> CancelledError:
    """The same cancel, which also tells what it has left; to be raised from `cancelled`."""
    others = (one for one in cancelled.args if not isinstance(one, Interrupted))
    return CancelledError(*others, left_by(cancelled) | found)


@contextmanager
def leaves(found: Callable[[], Interrupted]) -> Iterator[None]:
    """A cancel in the body also tells what `found` gives then."""
    try:
        yield
    except CancelledError as error:
        raise leaving(error, found()) from error


def left_by(cancelled: CancelledError) -> Interrupted:
    """What this cancel has left, as far as it tells."""
    return next((one for one in cancelled.args if isinstance(one, Interrupted)), Interrupted())


def _ids(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({*one, *other}))
