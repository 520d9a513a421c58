"""When a transaction acts by itself: deadlines, polls and pauses, in seconds of the caller's clock.
Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: What an undo may take, also after a cancellation, seconds.
UNDO_SECONDS: Final = 5.0
#: Seconds between polls. They are needed because events are lost while no client is connected to
#: QEMU, and because on x86 under TCG the last one never comes.
_POLL_FIRST: Final = 0.05
_POLL_MOST: Final = 1.0
#: Seconds from the last accepted unplug to a query: an entity whose event was lost may be removed
#: already.
_POLL_SOON: Final = 0.005
#: Seconds before an unplug that the guest refused is requested again, doubled each time.
_RETRY_FIRST: Final = 0.25
_RETRY_MOST: Final = 2.0
#: Seconds that a backend which sends one unplug after the other has to send them all, also for a
#: call that does not wait.
_REQUEST_SECONDS: Final = 2.0


@dataclass(slots=True)
class Timers:
    """The next moment of each timer, None while it is off. Before `start` all are off."""

    deadline: float | None = None
    drop: float | None = None
    poll: float | None = None
    soon: float | None = None
    retry: float | None = None
    started: bool = False
    _poll_pause: float = _POLL_FIRST
    _retry_pause: float = _RETRY_FIRST

    def start(self, now: float, patience: float, timeout: float) -> None:
        """The deadline is `patience` seconds away, in a call whose guest has `timeout` seconds."""
        self.started = True
        self.deadline = now + patience
        self.drop = now + max(timeout, _REQUEST_SECONDS)
        self.poll = now + _POLL_FIRST

    def extend(self, now: float) -> None:
        """An undo begins, and has time of its own."""
        self.deadline = max(self.deadline or 0.0, now + UNDO_SECONDS)

    def arm(self, now: float, *, soon: bool, retry: bool) -> None:
        """Set the timers of an early query (`soon`) and of another try (`retry`), where they are
        needed.
        """
        if not self.started:
            return
        self.soon = (self.soon or now + _POLL_SOON) if soon else None
        if retry and self.retry is None:
            self.retry = now + self._retry_pause
            self._retry_pause = min(self._retry_pause * 2, _RETRY_MOST)

    def polled(self, now: float) -> None:
        """A poll was made: the next one comes after a longer pause."""
        self._poll_pause = min(self._poll_pause * 2, _POLL_MOST)
        self.poll = now + self._poll_pause

    def next(self, *, polls: bool) -> float | None:
        """The earliest moment; `polls`: whether there is something to poll for."""
        moments = (self.deadline, self.drop, self.soon, self.retry, self.poll if polls else None)
        return min((at for at in moments if at is not None), default=None)


def is_due(at: float | None, now: float) -> bool:
    """Whether that moment has come."""
    return at is not None and now >= at
