"""libvirt-python's calls block: they run in threads of ours. One more runs libvirt's event loop.

Not `libvirtaio`: that is registered once for a process, with one asyncio loop, and a process may have many.
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
    """Run libvirt's event loop, once for this process; before the first connection is made."""
    libvirt = libvirt_module()
    with _lock:
        if _running:
            return
        libvirt.virEventRegisterDefaultImpl()
        # Errors are raised; libvirt would print them too.
        libvirt.registerErrorHandler(lambda context, error: None, None)
        # A daemon thread: it holds nothing, and must not keep the process.
        run = partial(_run_events, libvirt)
        _running.append(threading.Thread(target=run, name="qmpvcpu libvirt events", daemon=True))
        _running[0].start()


def _run_events(libvirt: Any) -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


class _Call(Generic[T]):
    """One call, and `result`, its future in the loop of whoever asks for it."""

    def __init__(self, function: Callable[[], T], begun: Callable[[], None]) -> None:
        self._function = function
        self._begun = begun
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[T] = self._loop.create_future()
        # One that nobody awaits any more has nothing to say.
        self.result.add_done_callback(lambda done: done.cancelled() or done.exception())

    def make(self) -> Callable[[], None]:
        """Make it, in the worker's thread; what is returned delivers what came of it."""
        self._deliver(self._begun)
        try:
            settle = partial(self._settle, self.result.set_result, self._function())
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            settle = partial(self._settle, self.result.set_exception, error)
        return partial(self._deliver, settle)

    def _deliver(self, act: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(act)

    def _settle(self, settle: Callable[[Any], None], outcome: object) -> None:
        if not self.result.done():
            settle(outcome)


class Worker:
    """One thread that makes calls in the order in which they are given; a daemon, since a call may never end."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        #: What waits for its turn; guarded by the lock, so that whoever takes it away knows that it did not begin.
        self._waiting: set[asyncio.Future[Any]] = set()
        self._lock = threading.Lock()
        self._running: asyncio.Future[Any] | None = None
        #: Why nothing gets a turn: a call that was given up has not come back, or this has ended.
        self._stuck: Callable[[], Exception] | None = None
        self._ended: Callable[[], Exception] | None = None
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
        call = _Call(function, begun)
        why = self._ended or self._stuck
        if why is not None:
            call.result.set_exception(why())
            return call.result
        with self._lock:
            self._waiting.add(call.result)
        call.result.add_done_callback(self._take_away)
        self._calls.put(call)
        return call.result

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
        self._ended = ended
        self._calls.put(None)
        return done

    def _fail_waiting(self, error: Callable[[], Exception]) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, set()
        for result in waiting:
            if not result.done():
                result.set_exception(error())

    def _take_away(self, result: asyncio.Future[Any]) -> bool:
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
