"""libvirt-python's calls block: they run in threads of ours. One more runs libvirt's event loop.

Not `libvirtaio`: that is registered once for a process, with one asyncio loop, and a process may have many.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Final, TypeVar

__all__ = ["Worker", "start_events"]

T = TypeVar("T")

_lock: Final = threading.Lock()
_running: list[threading.Thread] = []


def start_events() -> None:
    """Run libvirt's event loop, once for this process; before the first connection is made."""
    import libvirt

    with _lock:
        if _running:
            return
        libvirt.virEventRegisterDefaultImpl()
        # Errors are raised; libvirt would print them too.
        libvirt.registerErrorHandler(lambda context, error: None, None)
        # A daemon thread: it holds nothing, and must not keep the process.
        _running.append(threading.Thread(target=_run_events, name="qmpvcpu libvirt events", daemon=True))
        _running[0].start()


def _run_events() -> None:
    import libvirt

    while True:
        libvirt.virEventRunDefaultImpl()


class Worker:
    """One thread that makes calls in the order in which they are given; a daemon, since a call may never end."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"qmpvcpu libvirt {name}", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T], begun: Callable[[], None] = lambda: None) -> asyncio.Future[T]:
        """Call it; what it returns or raises. One whose future is cancelled before its turn is not called.

        Args:
            function: called in the thread.
            begun: called in the loop when it is its turn.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def deliver(act: Callable[[], None]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(act)

        def give(value: T) -> None:
            if not result.done():
                result.set_result(value)

        def fail(error: BaseException) -> None:
            if not result.done():
                result.set_exception(error)

        def job() -> None:
            if result.cancelled():
                return
            deliver(begun)
            try:
                value = function()
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                failure = error
                deliver(lambda: fail(failure))
            else:
                deliver(lambda: give(value))

        self._jobs.put(job)
        return result

    def close(self) -> None:
        """End, after what it does now; what waits is not done any more."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
