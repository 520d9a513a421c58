"""SIGINT and SIGTERM of a command: recorded, and never raised as an exception, from its first line to its last."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

__all__ = ["Signals"]

#: What is left of a command that is interrupted after its outcome may take so long, seconds.
_GRACE: Final = 1.0


class Signals:
    """`number` is the signal that came first, or None. `react` is called at each."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.react: Callable[[], None] | None = None
        #: Whether this process is ours to end.
        self.owns_process = False
        self._before: dict[int, Any] = {}
        self._leaves = False
        self._code: int | None = None

    def install(self) -> None:
        """Handle them, where this is the main thread; other threads have no signals."""
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:
            return

    def restore(self) -> None:
        """Have them handled as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """What a signal does."""
        if self.number is None:
            self.number = number
        if self._leaves:
            self._end_soon()
        if self.react is not None:
            self.react()

    @contextmanager
    def leaving(self, code: int | None = None) -> Iterator[None]:
        """The body may block (a reader that does not read, a thread that does not end): a second after a signal
        the process ends with `code`, or with that of an interrupted command.
        """
        before = self._leaves, self._code
        self._leaves, self._code = True, code
        if self.number is not None:
            # It came before: what blocks now does not know.
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
