"""Drives one transaction over a monitor: performs effects, feeds what happens, keeps the deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Final, Protocol

from qmpvcpu.aio import wind_up
from qmpvcpu.core.model import DomainState, Entity
from qmpvcpu.core.state.events import Names, interpret, is_taken, replugged
from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.ports import CommandError, Monitor, MonitorEvent
from tests.support.house0.transaction import (
    Add,
    Again,
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
    Unsent,
)

__all__ = ["Drive", "UNDO_SECONDS"]

#: What an undo may take, also after a cancellation, seconds.
UNDO_SECONDS: Final = 5.0

#: Events are lost while no client is connected to QEMU, and on x86 under TCG the last one never
#: comes.
_POLL_FIRST: Final = 0.05
_POLL_MOST: Final = 1.0

#: Seconds after QEMU took the last unplug: one whose event was lost may be gone already.
_POLL_SOON: Final = 0.005

#: Seconds before an unplug that the guest refused is asked again, doubled each time.
_RETRY_FIRST: Final = 0.25
_RETRY_MOST: Final = 2.0

#: A monitor that passes on one unplug after the other has so long to pass them on, seconds, also
#: for a call that waits for nothing.
_ASK_SECONDS: Final = 2.0

#: Finished tasks are swept out when there are this many.
_TASKS_KEPT: Final = 512


class Look(Protocol):
    """A fresh query."""

    def __call__(
        self, *, is_last: bool, anew: Callable[[], None], declined: Collection[int]
    ) -> Awaitable[DomainState]: ...


class Drive:
    """One run of a transaction.

    Args:
        transaction: not yet started.
        monitor: the QMP connection.
        look: a fresh query that returns the state (and keeps it for the domain); told whether it is
            the last, what to call before it asks a second time, and first ids of entities that QEMU
            declined to plug.
        timeout: seconds the guest has; 0 does not wait.
        planned: the state the transaction was planned on.
        prepare: called with each fresh state, before the transaction gets it.
        asking: called with entities before their `device_del` goes out.
    """

    def __init__(
        self,
        transaction: Transaction,
        monitor: Monitor,
        look: Look,
        timeout: float,
        planned: DomainState,
        prepare: Callable[[DomainState], None],
        asking: Callable[[Sequence[Entity]], None],
    ) -> None:
        self._transaction = transaction
        self._monitor = monitor
        self._look = look
        self._timeout = timeout
        self._planned = planned
        self._prepare = prepare
        self._asking = asking
        self._tasks: list[asyncio.Task[None]] = []
        self._names = Names(())
        self._entities: tuple[Entity, ...] = ()
        self._unplugging: tuple[Entity, ...] = ()
        self._waker: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None
        self._is_cancelled = False
        #: First ids of entities that QEMU has declined to plug or unplug.
        self._declined: set[int] = set()
        #: First id -> how often its device id was taken, and what tells its id from that.
        self._duplicates: dict[int, int] = {}
        self._suffixes: dict[int, int] = {}

    async def run(self, entities: Iterable[Entity]) -> Result:
        """Carry the transaction to its end. `entities`: those it is about.

        Cancelled: nothing new begins, plugs are undone within `UNDO_SECONDS`, asked unplugs stay
            pending, then
        CancelledError goes on. A second cancel stops at once.

        Raises:
            VcpuConnectionError: the connection was lost, or QEMU stopped answering.
        """
        entities = tuple(entities)
        self._names = Names(entities)
        self._entities = entities
        self._unplugging = tuple(entity for entity in entities if entity.plugged)
        try:
            with self._monitor.listen(self._sink):
                try:
                    await self._begin()
                    await self._keep_time()
                except asyncio.CancelledError as error:
                    self._cancel()
                    raise error from await wind_up(self._keep_time())
        finally:
            for first in self._dropped():
                # Whatever that would lead to is not done any more.
                self._transaction.feed(Unsent(first))
            unfinished = [task for task in self._tasks if not task.done()]
            for task in unfinished:
                task.cancel()
            if unfinished:
                await asyncio.wait(unfinished)
        return self._transaction.result()

    async def _begin(self) -> None:
        """The first effects. A query behind plugs is awaited here: for nearly every plug it is the
        last word, and what is left out, a task and a turn of the loop, is a good part of what a
        plug costs in Python.
        """
        effects = self._transaction.start()
        if not effects or not isinstance(effects[-1], Query):
            self._perform(effects)
            return
        self._perform(effects[:-1])
        try:
            await self._query()
        except asyncio.CancelledError:
            self._perform(effects[-1:])
            raise

    def _cancel(self) -> None:
        """From here on nothing new begins."""
        self._is_cancelled = True
        self._drop()
        self._take(Cancelled())

    def _drop(self, *, plugs: bool = True) -> None:
        """Nothing that has not been sent is sent any more."""
        for first in self._dropped(plugs=plugs):
            self._take(Unsent(first))

    def _dropped(self, *, plugs: bool = True) -> list[int]:
        found = self._monitor.drop_queued(plugs=plugs)
        return [entity.first for entity in self._entities if self._named(entity).device_id in found]

    async def _keep_time(self) -> None:
        """Sleep until the transaction is done, feeding it what time brings: polls and deadlines."""
        transaction = self._transaction
        now = asyncio.get_running_loop().time
        deadline: float | None = now() + (UNDO_SECONDS if self._is_cancelled else self._timeout)
        # `house-0` had `transaction.phase` here: an undo that had begun already got no 5 s of its
        # own.
        phase = Phase.UNDO if self._is_cancelled else Phase.RUN
        drop_at: float | None = now() + max(self._timeout, _ASK_SECONDS)
        poll, poll_at, soon_at = _POLL_FIRST, now() + _POLL_FIRST, None
        pause, again_at = _RETRY_FIRST, None
        while transaction.phase is not Phase.DONE:
            if transaction.phase is not phase:
                phase, deadline = transaction.phase, max(deadline or 0.0, now() + UNDO_SECONDS)
            wakes = [deadline] if deadline is not None else []
            soon_at = (soon_at or now() + _POLL_SOON) if transaction.to_look_soon else None
            if soon_at is not None:
                wakes.append(soon_at)
            if transaction.waiting:
                wakes.append(poll_at)
            if transaction.to_retry and again_at is None:
                again_at = now() + pause
                pause = min(pause * 2, _RETRY_MOST)
            if again_at is not None:
                wakes.append(again_at)
            if drop_at is not None:
                wakes.append(drop_at)
            await self._sleep(min(wakes, default=None))
            if drop_at is not None and now() >= drop_at:
                drop_at = None
                if transaction.phase is Phase.RUN:
                    self._drop(plugs=False)
            if deadline is not None and now() >= deadline:
                deadline = None
                if self._is_cancelled or transaction.phase is Phase.UNDO:
                    self._drop()
                self._take(Expired())
                if self._is_cancelled:
                    return  # what has not ended by now is told as it stands
            elif again_at is not None and now() >= again_at:
                again_at = None
                self._take(Again())
            elif soon_at is not None and now() >= soon_at:
                soon_at = None
                self._take(Poll())
            elif now() >= poll_at:
                poll = min(poll * 2, _POLL_MOST)
                poll_at = now() + poll
                self._take(Poll())
            if self._failure is not None:
                raise self._failure

    async def _sleep(self, until: float | None) -> None:
        """Until `_wake`, or that moment of the loop's clock."""
        if self._failure is not None:
            return
        loop = asyncio.get_running_loop()
        self._waker = loop.create_future()
        timer = loop.call_at(until, self._wake) if until is not None else None
        try:
            await self._waker
        finally:
            self._waker = None
            if timer is not None:
                timer.cancel()

    def _take(self, happened: Input) -> None:
        """Feed the transaction at once, in the order in which things arrive, and do what it says."""
        if self._failure is not None:
            return
        before = self._attitude()
        try:
            self._perform(self._transaction.feed(happened))
        except Exception as error:
            self._failure = error
        if not self._failure and self._transaction.failing and self._transaction.phase is Phase.RUN:
            # What waits behind what has failed would only have to be undone.
            self._drop()
        if self._failure or before != self._attitude():
            self._wake()

    def _attitude(self) -> tuple[object, ...]:
        """What `_keep_time` goes by."""
        transaction = self._transaction
        return (
            transaction.phase,
            transaction.waiting,
            transaction.to_retry,
            transaction.to_look_soon,
        )

    def _wake(self) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    def _sink(self, event: MonitorEvent | VcpuConnectionError) -> None:
        if isinstance(event, VcpuConnectionError):
            self._fail(event)
            return
        signal = interpret(event.name, event.data, self._names)
        if signal is not None:
            self._take(signal)

    def _perform(self, effects: list[Effect]) -> None:
        """Send all of them now, in this order; QEMU answers in this order."""
        if deletes := [effect.entity for effect in effects if isinstance(effect, Delete)]:
            self._asking(deletes)
        for effect in effects:
            if isinstance(effect, Query):
                if len(self._tasks) > _TASKS_KEPT:
                    self._tasks = [task for task in self._tasks if not task.done()]
                self._tasks.append(asyncio.create_task(self._query()))
            else:
                self._send(effect)

    def _send(self, effect: Add | Delete) -> None:
        entity = self._named(effect.entity)
        if isinstance(effect, Add):
            assert entity.driver is not None and entity.props is not None
            reply = self._monitor.device_add(entity.driver, entity.device_id, entity.props)
        else:
            name = f"/machine/peripheral/{entity.device_id}" if effect.undo else entity.unplug_name
            reply = self._monitor.device_del(name)
        reply.add_done_callback(lambda reply: self._replied(entity.first, reply))

    def _replied(self, first: int, reply: asyncio.Future[object]) -> None:
        if reply.cancelled():
            # `_drop` has told, unless somebody else has closed the way to it.
            self._take(Unsent(first))
            return
        error = reply.exception()
        if error is None:
            self._take(Replied(first))
        elif isinstance(error, CommandError):
            self._declined.add(first)
            if is_taken(error.text):
                self._rename(first)
            self._take(Replied(first, error.error_class, error.text))
        else:
            self._fail(error)

    def _named(self, entity: Entity) -> Entity:
        """The entity with the device id that it has got."""
        return (
            replace(entity, suffix=suffix)
            if (suffix := self._suffixes.get(entity.first, 0))
            else entity
        )

    def _rename(self, first: int) -> None:
        """Its device id is taken, perhaps by a device that is leaving: so the same id is tried once
        more first.
        """
        duplicates = self._duplicates[first] = self._duplicates.get(first, 0) + 1
        if duplicates > 1:
            entity = next(entity for entity in self._entities if entity.first == first)
            self._suffixes[first] = entity.suffix + duplicates - 1
            self._names.add(self._named(entity))

    async def _query(self) -> None:
        transaction = self._transaction
        try:
            transaction.asked()
            state = await self._look(
                is_last=transaction.seems_over, anew=transaction.asked, declined=self._declined
            )
            self._prepare(state)
            self._take(
                Snapshot(
                    frozenset(entity.first for entity in state.entities if entity.plugged),
                    frozenset(
                        entity.first
                        for entity in self._unplugging
                        if replugged(entity, state.by_id[entity.first], self._planned, state)
                    ),
                )
            )
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._wake()
