"""Calls that block, made in their order in a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from qmpvcpu.libvirt.threads import Worker

Call = asyncio.Future[Any]


class Calls:
    def __init__(self, name: str) -> None:
        self._name = name
        self._worker = Worker(name)

    def make(self, function: Callable[[], Any]) -> Call:
        """Call it when it is its turn; what it returns or raises."""
        return self._worker.call(function)

    def take_back(self, call: Call) -> bool:
        """Cancel it; whether it had not begun, and will not."""
        return self._worker.drop(call)

    def give_up(self, call: Call, error: Exception) -> None:
        """It has taken too long: until it comes back, everything else fails with `error`."""
        self._worker.give_up(call, lambda: error)

    def end(self, error: Exception, last: Callable[[], Any] = lambda: None) -> Call:
        """Make the `last` call after the one that is being made, and end; everything else fails
        with `error`.
        """
        return self._worker.finish(lambda: error, last)

    @property
    def has_thread(self) -> bool:
        return any(self._name in thread.name for thread in threading.enumerate())
