"""SIGINT and SIGTERM of a command: they are recorded, and never raised as an exception, during its
whole run.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

#: Seconds that an interrupted command has left once its result is known.
_GRACE: Final = 1.0


class Signals:
    """`number` is the first signal that arrived, or None. `react` is called at each signal."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.react: Callable[[], None] | None = None
        #: Whether this object may end the process.
        self.owns_process = False
        self._before: dict[int, Any] = {}
        self._leaves = False
        self._code: int | None = None

    def install(self) -> None:
        """Install the handlers, if this is the main thread; Python handles signals only there."""
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:
            return

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Record a signal and react to it."""
        if self.number is None:
            self.number = number
        if self._leaves:
            self._end_soon()
        if self.react is not None:
            self.react()

    @contextmanager
    def leaving(self, code: int | None = None) -> Iterator[None]:
        """Protect a body that may block (a reader that does not read, a thread that does not end).
        A second after a signal the process ends with `code`, or with the exit code of an
        interrupted command.
        """
        before = self._leaves, self._code
        self._leaves, self._code = True, code
        if self.number is not None:
            # The signal arrived before, so the blocking call will not see it.
            self._end_soon()
        try:
            yield
        finally:
            self._leaves, self._code = before
            if self.owns_process and not self._leaves:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _end_soon(self) -> None:
        if self.owns_process:
            signal.signal(signal.SIGALRM, self._leave)
            signal.setitimer(signal.ITIMER_REAL, _GRACE)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.interrupt(number)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        os._exit(self._code if self._code is not None else 128 + (self.number or signal.SIGINT))
