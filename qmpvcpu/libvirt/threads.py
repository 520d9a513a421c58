"""Threads for the calls of libvirt-python, which block, and one thread for libvirt's event loop.

`libvirtaio` is not used: it is registered once for a process, with one asyncio loop, and a process
may have many loops.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeVar

from qmpvcpu.libvirt.library import libvirt_module

T = TypeVar("T")

_lock: Final = threading.Lock()
_running: list[threading.Thread] = []


def start_events() -> None:
    """Run libvirt's event loop, once for this process. It must run before the first connection is
    made.
    """
    libvirt = libvirt_module()
    with _lock:
        if _running:
            return
        libvirt.virEventRegisterDefaultImpl()
        # libvirt-python raises errors; without this handler, libvirt would also print them.
        libvirt.registerErrorHandler(lambda context, error: None, None)
        # It is a daemon thread: it has nothing to clean up, and must not keep the process alive.
        _running.append(
            threading.Thread(
                target=partial(_run_events, libvirt), name="qmpvcpu libvirt events", daemon=True
            )
        )
        _running[0].start()


def _run_events(libvirt: Any) -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


class _Call(Generic[T]):
    """One call, and `result`, its future in the loop of the caller."""

    def __init__(self, function: Callable[[], T], begun: Callable[[], None]) -> None:
        self._function = function
        self._begun = begun
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[T] = self._loop.create_future()
        # Mark the exception as retrieved, in case nobody awaits the future any more.
        self.result.add_done_callback(lambda done: done.cancelled() or done.exception())

    def make(self) -> Callable[[], None]:
        """Make the call in the worker's thread. The returned function delivers the result."""
        self._deliver(self._begun)
        try:
            set_outcome = partial(self._set, self.result.set_result, self._function())
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            set_outcome = partial(self._set, self.result.set_exception, error)
        return partial(self._deliver, set_outcome)

    def _deliver(self, act: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(act)

    def _set(self, set_outcome: Callable[[Any], None], outcome: object) -> None:
        if not self.result.done():
            set_outcome(outcome)


class Worker:
    """One thread that makes calls in the order in which they come. It is a daemon thread, since a
    call may never return.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        #: The futures of calls that have not begun. The lock guards the set, so that removing a
        #: future from it ensures that its call does not begin.
        self._waiting: set[asyncio.Future[Any]] = set()
        self._lock = threading.Lock()
        self._running: asyncio.Future[Any] | None = None
        #: The error for new calls: `_stuck` while a call that was given up has not returned, and
        #: `_ended` after the end.
        self._stuck: Callable[[], Exception] | None = None
        self._ended: Callable[[], Exception] | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"qmpvcpu libvirt {name}", daemon=True
        )
        self._thread.start()

    @property
    def is_here(self) -> bool:
        """Whether the caller runs in this thread."""
        return threading.current_thread() is self._thread

    def call(
        self, function: Callable[[], T], begun: Callable[[], None] = lambda: None
    ) -> asyncio.Future[T]:
        """Call the function in the thread. Returns a future for its result or exception.

        The function is not called if the future is done before its turn.

        Args:
            function: called in the thread.
            begun: called in the loop when it is its turn.
        """
        call = _Call(function, begun)
        why = self._ended or self._stuck
        if why is not None:
            call.result.set_exception(why())
            return call.result
        with self._lock:
            self._waiting.add(call.result)
        call.result.add_done_callback(self._remove)
        self._calls.put(call)
        return call.result

    def drop(self, result: asyncio.Future[Any]) -> bool:
        """Cancel a call that has not begun. Returns whether it was cancelled."""
        return self._remove(result) and result.cancel()

    def give_up(self, result: asyncio.Future[Any], error: Callable[[], Exception]) -> None:
        """Give up a call that takes too long.

        If it is in flight, all other calls fail at once until it returns. If it has not begun, it
        is not made.
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
        """Call `last` after the call in flight, and end. Waiting calls and all later calls fail."""
        self._fail_waiting(ended)
        self._stuck = None
        done = self.call(last)
        self._ended = ended
        self._calls.put(None)
        return done

    def _fail_waiting(self, error: Callable[[], Exception]) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, set()
        for result in waiting:
            if not result.done():
                result.set_exception(error())

    def _remove(self, result: asyncio.Future[Any]) -> bool:
        with self._lock:
            is_there = result in self._waiting
            self._waiting.discard(result)
            return is_there

    def _begins(self, result: asyncio.Future[Any]) -> bool:
        with self._lock:
            if result not in self._waiting or result.done():
                return False
            self._waiting.discard(result)
            self._running = result
            return True

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._begins(call.result):
                deliver = call.make()
                with self._lock:
                    self._running = self._stuck = None
                deliver()
