"""libvirt-python's calls block: they run in threads of ours. One more runs libvirt's event loop.

Not `libvirtaio`: that is registered once for a process, with one asyncio loop, and a process may have many.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final, TypeVar

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
        #: What waits for its turn; guarded by the lock, so that whoever takes it away knows that it did not begin.
        self._waiting: set[asyncio.Future[Any]] = set()
        self._lock = threading.Lock()
        self._running: asyncio.Future[Any] | None = None
        #: Why nothing gets a turn: a call that was given up has not come back.
        self._stuck: Callable[[], Exception] | None = None
        self._is_finished = False
        self._thread = threading.Thread(target=self._run, name=f"qmpvcpu libvirt {name}", daemon=True)
        self._thread.start()

    @property
    def is_here(self) -> bool:
        """Whether it is its thread that asks."""
        return threading.current_thread() is self._thread

    def call(self, function: Callable[[], T], begun: Callable[[], None] = lambda: None) -> asyncio.Future[T]:
        """Call it; what it returns or raises. One whose future is done before its turn is not called.

        Args:
            function: called in the thread.
            begun: called in the loop when it is its turn.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        # One that nobody awaits any more has nothing to say.
        result.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self._is_finished:
            result.set_exception(self._ended())
            return result
        if self._stuck is not None:
            result.set_exception(self._stuck())
            return result

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
            with self._lock:
                if result not in self._waiting or result.done():
                    return
                self._waiting.discard(result)
                self._running = result
            deliver(begun)
            try:
                value = function()
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                failure = error
                self._come_back()
                deliver(lambda: fail(failure))
            else:
                self._come_back()
                deliver(lambda: give(value))

        with self._lock:
            self._waiting.add(result)
        result.add_done_callback(self._take_away)
        self._jobs.put(job)
        return result

    def drop(self, result: asyncio.Future[Any]) -> bool:
        """Cancel a call; whether it had not begun, and will not."""
        return self._take_away(result) and result.cancel()

    def give_up(self, result: asyncio.Future[Any], error: Callable[[], Exception]) -> None:
        """A call has taken too long. If it is under way, everything else fails at once until it comes back; if it
        still waits for its turn, it is not made.
        """
        with self._lock:
            if self._running is not result:
                self._waiting.discard(result)
                return
            self._stuck = error
        self._fail_waiting(error)

    def finish(
        self, ended: Callable[[], Exception], last: Callable[[], None] = lambda: None
    ) -> asyncio.Future[None]:
        """Call `last`, after what it does now, and end; what waits fails, and so does every later call."""
        self._fail_waiting(ended)
        self._stuck = None
        done = self.call(last)
        self._ended, self._is_finished = ended, True
        self._jobs.put(None)
        return done

    def _fail_waiting(self, error: Callable[[], Exception]) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, set()
        for result in waiting:
            if not result.done():
                result.set_exception(error())

    def _come_back(self) -> None:
        with self._lock:
            self._running = self._stuck = None

    def _take_away(self, result: asyncio.Future[Any]) -> bool:
        with self._lock:
            is_there = result in self._waiting
            self._waiting.discard(result)
            return is_there

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
