"""The listeners of one domain: bounded subscriptions, and a task that queries while there is a
listener.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Final

from qmpvcpu.core.model import Event
from qmpvcpu.core.state.inventory import InconsistentReplies
from qmpvcpu.errors import VcpuConnectionError, VcpuError, VcpuOverflow

#: Seconds between two queries. QEMU has no event for a plug, and under TCG on x86 none for the end
#: of an unplug.
_LOOK_EVERY: Final = 1.0
#: How many queries in a row may fail. Each may take as long as a query can, about 10 s.
_PATIENCE: Final = 6


class EventBus:
    """Passes events to all subscriptions of one domain."""

    def __init__(self) -> None:
        self._all: set[Events] = set()
        #: Called when a listener subscribes.
        self.on_listener: Callable[[], None] = lambda: None

    @property
    def listening(self) -> bool:
        """Whether there is a listener."""
        return bool(self._all)

    def add(self, events: Events) -> None:
        """Add a subscription."""
        self._all.add(events)
        self.on_listener()

    def remove(self, events: Events) -> None:
        """Remove a subscription; may be called twice."""
        self._all.discard(events)

    def emit(self, found: Iterable[Event]) -> None:
        """Pass these events to every subscription."""
        for event in found:
            for listener in tuple(self._all):
                listener.put(event)

    def end(self, error: VcpuError | None) -> None:
        """End all subscriptions, because of an error or because the domain was left."""
        for listener in tuple(self._all):
            listener.end(error)


class Events:
    """The events of a domain's vCPUs, also those that other clients cause: an async context manager
    to iterate.

    The subscription begins on entry. At most `limit` events wait to be read.

    Raises (on entry and from the iteration, after the events that arrived before):
        VcpuConnectionError: the connection broke.
        VcpuOverflow: events came faster than they were read, and some are lost.
    """

    def __init__(
        self,
        bus: EventBus,
        check: Callable[[], None],
        check_loop: Callable[[], None],
        *,
        steps: bool,
        limit: int,
    ) -> None:
        self._bus = bus
        self._check = check
        self._check_loop = check_loop
        self._steps = steps
        self._limit = limit
        self._waiting: deque[Event] = deque()
        self._ended = False
        self._error: VcpuError | None = None
        self._waker: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Events:
        self._check_loop()
        self._check()
        self._bus.add(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(None)

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Event:
        self._check_loop()
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waker = asyncio.get_running_loop().create_future()
            try:
                await self._waker
            finally:
                self._waker = None
        return self._waiting.popleft()

    def put(self, event: Event) -> None:
        """Add an event. Called by the bus."""
        if self._ended or (event.event.is_step and not self._steps):
            return
        if len(self._waiting) >= self._limit:
            self.end(
                VcpuOverflow(
                    f"events are lost: more than {self._limit} waited to be read",
                    hint="subscribe again and read the state; read faster, or give events() a"
                    " larger limit",
                )
            )
            return
        self._waiting.append(event)
        self._wake()

    def end(self, error: VcpuError | None) -> None:
        """End the subscription. Called by the bus."""
        if not self._ended:
            self._ended, self._error = True, error
            self._bus.remove(self)
            self._wake()

    def _wake(self) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)


class Watcher:
    """A task that queries the domain as long as `wanted` returns true.

    Args:
        look: makes a fresh query and emits what has changed.
        wanted: whether there is a listener, or an unplug is pending.
        failed: called with a permanent error, so that listeners do not wait for ever.
    """

    def __init__(
        self,
        look: Callable[[], Awaitable[object]],
        wanted: Callable[[], bool],
        failed: Callable[[VcpuError], None],
    ) -> None:
        self._look = look
        self._wanted = wanted
        self._failed = failed
        self._poked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the task, if it is wanted and does not run yet."""
        if self._task is None and self._wanted():
            self._task = asyncio.create_task(self._run(), name="qmpvcpu watcher")

    def poke(self) -> None:
        """Query now, because something has happened."""
        self._poked.set()
        self.start()

    async def stop(self) -> None:
        """Stop the task. It has ended when this returns."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _run(self) -> None:
        try:
            await self._look_on()
        finally:
            if self._task is asyncio.current_task():
                self._task = None

    async def _look_on(self) -> None:
        failures = 0
        while self._wanted():
            try:
                async with asyncio.timeout(_LOOK_EVERY):
                    await self._poked.wait()
            except TimeoutError:
                pass
            self._poked.clear()
            try:
                await self._look()
            except InconsistentReplies:
                continue
            except VcpuError as error:
                # A QEMU that is busy or stopped for a while will answer again.
                failures += 1
                is_lost = isinstance(error, VcpuConnectionError) and error.reason == "closed"
                if is_lost or failures == _PATIENCE:
                    self._failed(error)
                    return
            else:
                failures = 0
