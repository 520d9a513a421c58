"""The same hour of a QEMU, a guest and a caller, for the transaction of `house-0` and for today's."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from qmpvcpu import DomainState
from qmpvcpu.core.engine.messages import Moves, Result, Snapshot, Terms
from qmpvcpu.core.engine.transaction import Transaction
from qmpvcpu.core.model import Entity
from qmpvcpu.core.state.events import Signal
from qmpvcpu.domain.drive import Drive
from qmpvcpu.ports import CommandError, MonitorEvent
from tests.support.house0.drive import Drive as OldDrive
from tests.support.house0.transaction import Transaction as OldTransaction
from tests.support.states import x86
from tests.support.virtual_time import run_at_once

# The frozen transaction reads entity ids by the name of its time.
setattr(Entity, "first", Entity.id)  # noqa: B010
setattr(Signal, "first", property(lambda signal: signal.entity_id))  # noqa: B010

_SLOTS = 10


@dataclass(frozen=True)
class Reply:
    """How QEMU answers one command: after `seconds`, with this error, if any."""

    seconds: float = 0.001
    error: str | None = None


@dataclass(frozen=True)
class Answer:
    """What the guest does `seconds` after an unplug was requested: `go` and `go unheard`, `refuse`,
    or nothing.
    """

    what: str = "nothing"
    seconds: float = 0.1


@dataclass(frozen=True)
class Hour:
    """What happens. `replies` and `answers` are those of one entity, one after the other; then the
    defaults.
    """

    plugs: tuple[int, ...] = ()
    unplugs: tuple[int, ...] = ()
    awaited: tuple[int, ...] = ()
    doubted: frozenset[int] = frozenset()
    timeout: float = 1.0
    wait: bool = True
    atomic: bool = False
    retries: int = 0
    drops: bool = False
    undo_forbidden: str | None = None
    restore_forbidden: str | None = None
    replies: Mapping[int, tuple[Reply, ...]] = field(default_factory=dict)
    answers: Mapping[int, tuple[Answer, ...]] = field(default_factory=dict)
    resets: tuple[float, ...] = ()
    cancels: tuple[float, ...] = ()


@dataclass(frozen=True)
class Course:
    """What was sent, in order and without queries, and how it ended."""

    sent: tuple[tuple[str, int], ...]
    end: str
    queries: int
    seconds: float


class _World:
    """QEMU's monitor, and the guest behind it."""

    def __init__(self, hour: Hour) -> None:
        self.hour = hour
        self.slots = {0, *hour.unplugs, *hour.awaited}
        self.sent: list[tuple[str, int]] = []
        self.queries = 0
        self._sinks: list[Callable[[Any], None]] = []
        self._free_at = 0.0
        self._replies = {first: list(found) for first, found in hour.replies.items()}
        self._answers = {first: list(found) for first, found in hour.answers.items()}
        loop = asyncio.get_running_loop()
        for at in hour.resets:
            loop.call_at(at, self._reset)
        for first in (*hour.awaited, *sorted(hour.doubted)):
            self._guest(first)

    @property
    def state(self) -> DomainState:
        return x86(sorted(self.slots), sockets=_SLOTS, cores=1, threads=1)

    @contextmanager
    def listen(self, sink: Callable[[Any], None]) -> Iterator[None]:
        self._sinks.append(sink)
        try:
            yield
        finally:
            self._sinks.remove(sink)

    def drop_queued(self, *, plugs: bool = True) -> frozenset[str]:
        return frozenset()

    def device_add(self, driver: str, device_id: str, props: Any) -> asyncio.Future[object]:
        first = int(device_id.removeprefix("vcpu").split("-")[0])
        return self._command("device_add", first, device_id, lambda: self.slots.add(first))

    def device_del(self, name: str) -> asyncio.Future[object]:
        first = int(re.findall(r"\d+", name)[0])
        return self._command("device_del", first, name, lambda: self._guest(first))

    def _command(
        self, what: str, first: int, name: str, act: Callable[[], object]
    ) -> asyncio.Future[object]:
        self.sent.append((f"{what} {name}", first))
        waiting = self._replies.get(first)
        reply = waiting.pop(0) if waiting else Reply()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[object] = loop.create_future()
        self._free_at = max(self._free_at, loop.time()) + reply.seconds

        def answer() -> None:
            is_full = first in self.slots
            error = reply.error
            if error is None and what == "device_add" and is_full:
                error = f"CPU[{first}] exists"
            if error is None and what == "device_del" and not is_full:
                error = "Device not found"
            if error is None:
                act()
            if not future.done():
                if error is None:
                    future.set_result({})
                else:
                    future.set_exception(CommandError(what, "GenericError", error))

        loop.call_at(self._free_at, answer)
        return future

    def _guest(self, first: int) -> None:
        waiting = self._answers.get(first)
        answer = waiting.pop(0) if waiting else Answer()
        if answer.what != "nothing":
            asyncio.get_running_loop().call_later(answer.seconds, self._answer, first, answer.what)

    def _answer(self, first: int, what: str) -> None:
        data = {"path": f"/machine/peripheral/vcpu{first}"}
        if what == "refuse":
            self._tell("DEVICE_UNPLUG_GUEST_ERROR", data)
            return
        self.slots.discard(first)
        if what == "go":
            self._tell("DEVICE_DELETED", data)

    def _reset(self) -> None:
        self._tell("RESET", {})

    def _tell(self, name: str, data: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink(MonitorEvent(name, data, 0.0))

    async def query(self) -> DomainState:
        self.queries += 1
        loop = asyncio.get_running_loop()
        self._free_at = max(self._free_at, loop.time()) + 0.0005
        future: asyncio.Future[DomainState] = loop.create_future()
        loop.call_at(self._free_at, lambda: future.done() or future.set_result(self.state))
        return await future


def then(hour: Hour) -> Course:
    """As `house-0` did it."""

    async def make(world: _World, planned: DomainState) -> Course:
        entities = [planned.by_id[n] for n in (*hour.awaited, *hour.plugs, *hour.unplugs)]
        transaction = OldTransaction(
            [planned.by_id[n] for n in hour.plugs],
            [planned.by_id[n] for n in hour.unplugs],
            [planned.by_id[n] for n in hour.awaited],
            wait=hour.wait,
            atomic=hour.atomic,
            retries=hour.retries,
            doubted=hour.doubted,
            reset_drops_unplug=hour.drops,
        )

        def prepare(fresh: DomainState) -> None:
            transaction.undo_forbidden = hour.undo_forbidden
            transaction.restore_forbidden = hour.restore_forbidden

        async def look(
            *, is_last: bool, anew: Callable[[], None], declined: Collection[int]
        ) -> DomainState:
            return await world.query()

        drive = OldDrive(
            transaction,
            world,
            look,
            hour.timeout,
            planned,
            prepare,
            lambda entities: None,  # type: ignore[arg-type]
        )
        return await _course(hour, world, drive.run(entities), transaction.result)

    return run_at_once(_started(hour, make))


def now(hour: Hour) -> Course:
    """As it is done today."""

    async def make(world: _World, planned: DomainState) -> Course:
        moves = Moves(
            tuple(planned.by_id[n] for n in hour.plugs),
            tuple(planned.by_id[n] for n in hour.unplugs),
            tuple(planned.by_id[n] for n in hour.awaited),
            hour.doubted,
        )
        terms = Terms(hour.timeout, hour.wait, hour.atomic, hour.retries, hour.drops)

        async def look(
            *, is_last: bool, resent: Callable[[], object], declined: Collection[int]
        ) -> Snapshot:
            return Snapshot.of(
                await world.query(), planned, moves, hour.undo_forbidden, hour.restore_forbidden
            )

        drive = Drive(Transaction(moves, terms), world, look, lambda entities: None)  # type: ignore[arg-type]
        return await _course(hour, world, drive.run(), lambda: drive.result)

    return run_at_once(_started(hour, make))


async def _started(hour: Hour, make: Any) -> Course:
    world = _World(hour)
    found: Course = await make(world, world.state)
    return found


async def _course(hour: Hour, world: _World, work: Any, result: Callable[[], Any]) -> Course:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    for at in hour.cancels:
        loop.call_at(at, task.cancel)
    end = "returned"
    try:
        await task
    except BaseException as error:
        end = type(error).__name__
    found = result()
    names = ["removed", "undone", "kept", "lost"]
    if end == "returned":
        # What a cancelled call has left open, `house-0` left out.
        names += ["outcome", "plugged", "remaining", "pending", "undo_forbidden"]
    facts = {name: str(getattr(found, name)) for name in names}
    never = found.not_requested if isinstance(found, Result) else found.unasked
    facts["not_requested"] = str(never)
    facts |= {
        name: str([(failure.entity.ids, failure.text) for failure in getattr(found, name)])
        for name in ("failures", "rejections")
    }
    # At one moment the order of what is sent is that of the entities; which of two comes first
    # decides nothing.
    return Course(tuple(world.sent), f"{end} {facts}", world.queries, round(loop.time(), 1))
