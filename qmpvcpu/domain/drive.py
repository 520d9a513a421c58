"""Drives one `core.transaction` over a monitor: performs effects, feeds what happens, keeps the deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from qmpvcpu.core.events import interpret
from qmpvcpu.core.model import DomainState, Entity
from qmpvcpu.core.plan import unplug_name
from qmpvcpu.core.transaction import (
    Add,
    Cancelled,
    Delete,
    Effect,
    Expired,
    Input,
    Phase,
    Poll,
    Query,
    Replied,
    Result,
    Snapshot,
    Transaction,
)
from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.ports import CommandError, Monitor, MonitorEvent

__all__ = ["Drive", "UNDO_SECONDS"]

#: What an undo may take, also after a cancellation, seconds.
UNDO_SECONDS: Final = 5.0

#: Events are lost while no client is connected to QEMU, and on x86 under TCG the last one never comes.
_POLL_FIRST: Final = 0.05
_POLL_MOST: Final = 1.0


class Drive:
    """One run of a transaction.

    Args:
        transaction: not yet started.
        monitor: the QMP connection.
        look: a fresh query that returns the state (and keeps it for the domain).
        timeout: seconds the guest has; 0 does not wait.
    """

    def __init__(
        self,
        transaction: Transaction,
        monitor: Monitor,
        look: Callable[[], Awaitable[DomainState]],
        timeout: float,
    ) -> None:
        self._transaction = transaction
        self._monitor = monitor
        self._look = look
        self._timeout = timeout
        self._inbox: asyncio.Queue[Input | BaseException] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._entities: tuple[Entity, ...] = ()

    def cancel(self) -> None:
        """The caller was cancelled: begin nothing new, undo the plugs; `run` then ends by itself."""
        self._inbox.put_nowait(Cancelled())

    async def run(self, entities: Iterable[Entity]) -> Result:
        """Carry the transaction to its end. `entities`: those it is about.

        Raises:
            VcpuConnectionError: the connection was lost, or QEMU stopped answering.
        """
        self._entities = tuple(entities)
        try:
            with self._monitor.listen(self._sink):
                await self._loop()
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
        return self._transaction.result()

    async def _loop(self) -> None:
        transaction = self._transaction
        now = asyncio.get_running_loop().time
        deadline = now() + self._timeout
        phase = Phase.RUN
        poll = _POLL_FIRST
        expired = False
        self._perform(transaction.start())
        while transaction.phase is not Phase.DONE:
            if transaction.phase is not phase:
                phase = transaction.phase
                deadline = max(deadline, now() + UNDO_SECONDS)
                expired = False
            happened = await self._next(None if expired else deadline, poll)
            if isinstance(happened, Poll):
                poll = min(poll * 2, _POLL_MOST)
            elif isinstance(happened, Expired):
                expired = True
            elif isinstance(happened, Cancelled):
                deadline = now() + UNDO_SECONDS
            self._perform(transaction.feed(happened))

    async def _next(self, deadline: float | None, poll: float) -> Input:
        if self._inbox.empty():
            loop = asyncio.get_running_loop()
            polls_at = loop.time() + poll if self._transaction.waiting else None
            wakes = [when for when in (deadline, polls_at) if when is not None]
            try:
                async with asyncio.timeout_at(min(wakes) if wakes else None):
                    happened = await self._inbox.get()
            except TimeoutError:
                if deadline is not None and loop.time() >= deadline:
                    return Expired()
                return Poll()
        else:
            happened = self._inbox.get_nowait()
        if isinstance(happened, BaseException):
            raise happened
        return happened

    def _sink(self, event: MonitorEvent | VcpuConnectionError) -> None:
        if isinstance(event, VcpuConnectionError):
            self._inbox.put_nowait(event)
            return
        signal = interpret(event.name, event.data, self._entities)
        if signal is not None:
            self._inbox.put_nowait(signal)

    def _perform(self, effects: list[Effect]) -> None:
        """Send all of them now, in this order; QEMU answers in this order."""
        for effect in effects:
            task = asyncio.create_task(self._do(effect))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _do(self, effect: Effect) -> None:
        try:
            self._inbox.put_nowait(await self._answer(effect))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - it is raised where the loop waits
            self._inbox.put_nowait(error)

    async def _answer(self, effect: Effect) -> Input:
        if isinstance(effect, Query):
            state = await self._look()
            return Snapshot(frozenset(entity.first for entity in state.entities if entity.plugged))
        entity = effect.entity
        try:
            if isinstance(effect, Add):
                assert entity.driver is not None and entity.props is not None
                await self._monitor.device_add(entity.driver, entity.device_id, entity.props)
            else:
                assert isinstance(effect, Delete)
                name = f"/machine/peripheral/{entity.device_id}" if effect.undo else None
                await self._monitor.device_del(name or unplug_name(entity))
        except CommandError as error:
            return Replied(entity.first, error.error_class, error.text)
        return Replied(entity.first)
