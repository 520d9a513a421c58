"""Drive one transaction over a monitor: perform its effects, and feed it what happens."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final, Protocol, assert_never

from qmpvcpu.aio import wind_up
from qmpvcpu.core.engine.messages import (
    Add,
    Cancelled,
    Delete,
    Drop,
    Effect,
    EventReceived,
    Finished,
    Input,
    Query,
    Replied,
    Result,
    Snapshot,
    Unsent,
    Wake,
    Woke,
)
from qmpvcpu.core.engine.transaction import Transaction
from qmpvcpu.core.model import Entity
from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.ports import CommandError, Monitor, MonitorEvent

#: Finished tasks are removed from the list when it is longer than this.
_TASKS_KEPT: Final = 512


class MakeQuery(Protocol):
    """Makes a fresh query of the vCPUs."""

    def __call__(
        self, *, is_last: bool, resent: Callable[[], object], declined: Collection[int]
    ) -> Awaitable[Snapshot]:
        """Make the query.

        Args:
            is_last: QEMU has reported every vCPU that should leave as removed.
            resent: called before a query is sent a second time.
            declined: ids of entities that QEMU declined to plug; more may come until the reply
                arrives, so it is read then.
        """


class Drive:
    """One run of a transaction.

    Args:
        transaction: a transaction that has not started.
        monitor: the QMP connection.
        make_query: makes a fresh query.
        asking: called with the entities before their `device_del` is sent.
    """

    def __init__(
        self,
        transaction: Transaction,
        monitor: Monitor,
        make_query: MakeQuery,
        asking: Callable[[Sequence[Entity]], None],
    ) -> None:
        self._transaction = transaction
        self._monitor = monitor
        self._make_query = make_query
        self._asking = asking
        self._now = asyncio.get_running_loop().time
        self._effects: deque[Effect] = deque()
        self._is_performing = False
        self._is_finished = False
        self._tasks: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._waker: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None
        #: Device id of each command that was sent, by entity id.
        self._sent: dict[int, str] = {}
        #: Ids of entities that QEMU has declined to plug or unplug.
        self._declined: set[int] = set()

    @property
    def result(self) -> Result:
        """The result of the transaction, or its present state if it has not finished."""
        return self._transaction.result()

    async def run(self) -> None:
        """Run the transaction to its end. `result` then holds its result, even if this raises.

        If the call is cancelled, nothing new begins, plugs are undone within 5 s, and requested
        unplugs stay pending. Then CancelledError continues. A second cancel stops at once.

        Raises:
            VcpuConnectionError: the connection broke, or QEMU stopped answering.
        """
        with self._monitor.listen(self._sink):
            try:
                await self._to_the_end(self._transaction.start(self._now()))
            except asyncio.CancelledError as error:
                raise error from await wind_up(self._cancel())
            finally:
                await self._stop()

    async def take_back(self) -> None:
        """Undo the plugs of a finished run, within 5 s.

        Raises:
            VcpuConnectionError: as in `run`.
        """
        self._is_finished = False
        with self._monitor.listen(self._sink):
            try:
                await self._cancel()
            finally:
                await self._stop()

    async def _cancel(self) -> None:
        self._feed(Cancelled())
        await self._to_the_end([])

    async def _to_the_end(self, effects: Sequence[Effect]) -> None:
        """Perform these effects, and wait until the transaction has finished."""
        query = next((effect for effect in effects if isinstance(effect, Query)), None)
        self._perform([effect for effect in effects if effect is not query])
        if query is not None:
            # A query after plugs is awaited here, because for nearly every plug it is the last
            # step. This saves a task and a turn of the loop, a good part of what a plug costs in
            # Python.
            try:
                await self._query()
            except asyncio.CancelledError:
                self._perform([query])
                raise
        while not self._is_finished:
            if self._failure is not None:
                raise self._failure
            self._waker = asyncio.get_running_loop().create_future()
            try:
                await self._waker
            finally:
                self._waker = None

    async def _stop(self) -> None:
        """Stop sending commands and feeding the transaction."""
        self._is_finished = True
        if self._timer is not None:
            self._timer.cancel()
        for first in self._dropped(plugs=True):
            # The effects of this input are not performed any more.
            self._transaction.feed(Unsent(first), self._now())
        unfinished = [task for task in self._tasks if not task.done()]
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished)

    def _feed(self, happened: Input) -> None:
        """Feed the transaction at once, in order of arrival, and perform the effects that it
        returns.
        """
        if self._failure is None:
            self._perform(self._transaction.feed(happened, self._now()))

    def _perform(self, effects: Sequence[Effect]) -> None:
        """Perform all effects now, in this order. QEMU answers in this order too. Effects that
        result from them come after them.
        """
        if self._is_finished:
            return
        try:
            if deletes := [effect.entity for effect in effects if isinstance(effect, Delete)]:
                self._asking(deletes)
            self._effects.extend(effects)
            if not self._is_performing:
                self._is_performing = True
                while self._effects:
                    self._do(self._effects.popleft())
                self._is_performing = False
        except Exception as error:  # noqa: BLE001 - raised where `run` is awaited
            self._effects.clear()
            self._is_performing = False
            self._fail(error)

    def _do(self, effect: Effect) -> None:
        match effect:
            case Add():
                self._send(effect)
            case Delete():
                self._send(effect)
            case Query():
                if len(self._tasks) > _TASKS_KEPT:
                    self._tasks = [task for task in self._tasks if not task.done()]
                self._tasks.append(asyncio.create_task(self._query()))
            case Wake():
                if self._timer is not None:
                    self._timer.cancel()
                loop = asyncio.get_running_loop()
                self._timer = (
                    None if effect.at is None else loop.call_at(effect.at, self._feed, Woke())
                )
            case Drop():
                for first in self._dropped(plugs=effect.plugs):
                    self._feed(Unsent(first))
            case Finished():
                self._is_finished = True
                self._wake()
            case _:
                assert_never(effect)

    def _send(self, effect: Add | Delete) -> None:
        entity = effect.entity
        self._sent[entity.id] = entity.device_id
        if isinstance(effect, Add):
            assert entity.driver is not None and entity.props is not None
            reply = self._monitor.device_add(entity.driver, entity.device_id, entity.props)
        else:
            reply = self._monitor.device_del(effect.name)
        reply.add_done_callback(lambda reply: self._replied(entity.id, reply))

    def _dropped(self, *, plugs: bool) -> list[int]:
        """Drop the commands that were not sent yet, and return the ids of their entities."""
        found = self._monitor.drop_queued(plugs=plugs)
        return [first for first, device_id in self._sent.items() if device_id in found]

    def _replied(self, first: int, reply: asyncio.Future[object]) -> None:
        if reply.cancelled():
            # `_dropped` has fed this, unless another caller closed the monitor's queue.
            self._feed(Unsent(first))
            return
        error = reply.exception()
        if error is None:
            self._feed(Replied(first))
        elif isinstance(error, CommandError):
            self._declined.add(first)
            self._feed(Replied(first, error.error_class, error.text))
        else:
            self._fail(error)

    async def _query(self) -> None:
        try:
            self._feed(
                await self._make_query(
                    is_last=self._note_query(), resent=self._note_query, declined=self._declined
                ),
            )
        except Exception as error:  # noqa: BLE001 - raised where `run` is awaited
            self._fail(error)

    def _note_query(self) -> bool:
        """Note that the query is sent, and return whether it only has to confirm what QEMU has
        reported.
        """
        only_confirms, effects = self._transaction.query_sent(self._now())
        self._perform(effects)
        return only_confirms

    def _sink(self, event: MonitorEvent | VcpuConnectionError) -> None:
        if isinstance(event, VcpuConnectionError):
            self._fail(event)
        else:
            self._feed(EventReceived(event.name, event.data))

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._wake()

    def _wake(self) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)
