"""Takes a guest from one QEMU to another through all phases; at the end exactly one side runs it.

`core.migration.who_runs` has the table: which step comes next, given what became of both sides.
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from qmpvcpu import aio
from qmpvcpu.core.migration.cookie import Cookie, machine_of
from qmpvcpu.core.migration.leaving import ONE_CPU, check_hangs, needs_one_cpu, without_one_cpu
from qmpvcpu.core.migration.machines import check_uri
from qmpvcpu.core.migration.status import MigrationStatus, address_of
from qmpvcpu.core.migration.who_runs import Destination, Source, Step, next_step
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.migration import ownership, phases, sides
from qmpvcpu.domain.migration.one_cpu import OneCpu
from qmpvcpu.domain.migration.phases import Departure
from qmpvcpu.domain.session import Session
from qmpvcpu.errors import (
    OutcomeKind,
    VcpuConnectionError,
    VcpuError,
    VcpuFailed,
    VcpuPartial,
    VcpuRefused,
)
from qmpvcpu.host.ownership import Role


@dataclass(frozen=True, slots=True)
class Migrated:
    """A guest that runs at the destination, verified there. `vcpus` are its ids."""

    vcpus: tuple[int, ...]
    status: MigrationStatus
    messages: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The document of `migrate --json`: bytes, milliseconds, seconds."""
        return {
            "outcome": str(OutcomeKind.APPLIED),
            "changed": True,
            "vcpus": list(self.vcpus),
            "transferred": self.status.transferred,
            "downtime": self.status.downtime,
            "total_time": self.status.total_time,
            "messages": list(self.messages),
            "seconds": round(self.seconds, 6),
        }


@asynccontextmanager
async def _direct(source: Session, destination: Session, how: sides.Transfer) -> AsyncIterator[str]:
    """How the source reaches the destination: what it listens at, as requested, else a socket pair."""
    there = address_of(await sides.status_of(destination.monitor), how.host)
    if (
        how.uri is None
        and there is None
        and source.monitor.takes_descriptors
        and destination.monitor.takes_descriptors
    ):
        # Nothing that others could connect to, and nothing left behind.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs, sides.declined("be given a socket"):
            await destination.monitor.getfd(sides.FD_NAME, theirs.fileno())
            await source.monitor.getfd(sides.FD_NAME, ours.fileno())
            await destination.monitor.migrate_incoming(f"fd:{sides.FD_NAME}")
        yield f"fd:{sides.FD_NAME}"
        return
    yield await phases.listen(destination, how.uri, how.host, f"tcp:{how.host or '127.0.0.1'}:0")


class Move:
    """One migration, to a destination that is prepared.

    Args:
        source: connected.
        destination: connected.
        cookie: of the guest.
        how: its memory is moved.
        finished: called when the destination runs the guest, or may: it must not be ended any more.
    """

    def __init__(
        self,
        source: Session,
        destination: Session,
        cookie: Cookie,
        how: sides.Transfer,
        finished: Callable[[], None],
    ) -> None:
        self._source = source
        self._destination = destination
        self._cookie = cookie
        self._how = how
        self._finished = finished
        self._one_cpu = OneCpu(None, source.state)
        #: What has become of the two sides, and why the guest does not run at the destination.
        self._left = Source.KEPT
        self._arrived = Destination.BROKEN
        self._why = ""
        #: Whether the destination was let run, with or without success.
        self._was_let_run = False

    async def run(self, agent: Guest | None, agent_there: Guest | None, *, force: bool) -> Migrated:
        """All phases from `perform` on.

        Args:
            agent: the guest's, at the source.
            agent_there: the guest's, at the destination: where both are known, and that saves it from a hang, it
                migrates with one CPU online.
            force: do what is known to hang.

        Raises:
            VcpuRefused: nothing was touched.
            VcpuFailed: the guest goes on at the source; the destination's QEMU is ended.
            VcpuPartial: nobody can tell which side runs it, and neither was touched; or CPUs are offline in it.
            VcpuConnectionError: the source is lost, and the guest with it if its QEMU has ended.
        """
        began = time.monotonic()
        agents = (agent, agent_there) if agent is not None and agent_there is not None else None
        state, runs = await phases.check_perform(
            self._source, self._cookie, force=force, agent=agents[0] if agents is not None else None
        )
        if self._how.uri is not None:
            check_uri(self._how.uri)
        self._cookie = replace(self._cookie, runs=runs)
        phases.claim_source(self._source, self._cookie, runs=runs)
        self._one_cpu = OneCpu(agents if runs and needs_one_cpu(state) else None, state)
        notes: list[str] = []
        try:
            notes = await self._leave_one_cpu(force=force)
            status, messages = await self._move()
        except BaseException as error:
            stayed = await aio.finish(self._one_cpu.go_back())
            if isinstance(error, VcpuError) and (more := [*notes, *stayed]):
                raise error.having(messages=(*error.messages, *more)) from error
            raise
        slots = machine_of(self._destination.state).slots
        ids = sorted(number for slot in slots if slot.plugged for number in slot.ids)
        return Migrated(tuple(ids), status, (*notes, *messages), time.monotonic() - began)

    async def _leave_one_cpu(self, *, force: bool) -> list[str]:
        """Leave the guest with its first CPU, where it needs that; messages.

        Raises:
            VcpuRefused: it cannot be, and `force` is not given. All are online again.
            VcpuPartial: it cannot be, and not all are online again.
        """
        try:
            await self._one_cpu.begin()
        except BaseException as error:
            stayed = await aio.finish(self._one_cpu.go_back())
            if force and not stayed and isinstance(error, VcpuError):
                return [f"migrated with all its CPUs online, and it may hang: {error.message}"]
            # Nothing has been sent.
            ownership.release(self._cookie, Role.SOURCE)
            if not isinstance(error, VcpuError):
                raise
            if stayed:
                text = f"{error.message}; the guest was not migrated"
                remaining = self._one_cpu.vcpus
                raise VcpuPartial(text, hint=error.hint, remaining=remaining, messages=stayed) from error
            hangs = without_one_cpu(check_hangs(self._source.state, self._source.removals), error.message)
            raise VcpuRefused([one for one in hangs if one.code == ONE_CPU]) from error
        return []

    async def _move(self) -> tuple[MigrationStatus, list[str]]:
        """How it ended, and messages."""
        channel = _direct(self._source, self._destination, self._how)
        try:
            left = await phases.depart(self._source, self._cookie, channel, self._how)
        except VcpuFailed as error:
            text = f"{error.message}; the guest goes on at the source"
            raise VcpuFailed(text, hint=error.hint, qmp_text=error.qmp_text) from error
        return left.status, await phases.bring_to_end(left, self._decide(left))

    # -- who runs it: the acts of the table's steps return messages once all is finished ---------------

    async def _decide(self, left: Departure) -> list[str]:
        """Step by step, as the table says; messages."""
        self._left, self._why = left.end, left.why
        if left.lost is not None and await sides.has_ended(self._source):
            self._left = Source.DEAD
            ownership.release(self._cookie, Role.SOURCE)
        if self._left is not Source.KEPT:
            self._arrived, reasons = await phases.arrive(self._destination, self._cookie)
            self._why = "; ".join(one.message for one in reasons) or self._why
        while True:
            act = self._ACTS[next_step(self._left, self._arrived)]
            if (messages := await act(self)) is not None:
                return messages

    async def _start_destination(self) -> None:
        if not ownership.claim(self._cookie, Role.DESTINATION, self._destination):
            self._arrived, self._why = Destination.OTHER, "another side has taken the guest"
            return
        self._was_let_run = True
        self._arrived, why = await sides.let_run(self._destination, self._cookie)
        self._why = why or self._why

    async def _end_source(self) -> list[str]:
        self._finished()
        ownership.forget(self._destination)
        messages = []
        if self._left is Source.DEAD:
            messages = ["the source's QEMU ended by itself, after it had handed the guest over"]
        elif not await sides.end(self._source):
            messages = ["the source's QEMU may still be there, paused: end it, and do not let it go on"]
        return messages + await self._one_cpu.arrive(self._destination.state)

    async def _go_back(self) -> None:
        """End the destination, then let the source go on."""
        if (lost := await sides.lost(self._source)) is not None:
            # What is at the destination may be all there is.
            self._why = f"{self._why}; the source's QEMU is gone, or does not answer"
            if self._left is Source.KEPT and lost is Source.DEAD:
                ownership.release(self._cookie, Role.SOURCE)
                self._arrived, _ = await phases.arrive(self._destination, self._cookie)
            self._left = lost
            return
        if not await sides.end(self._destination) and self._was_let_run:
            # It may have run, and run again.
            self._arrived = Destination.UNKNOWN
            return
        # What may be left there is not let run any more.
        ownership.release(self._cookie, Role.DESTINATION, self._destination)
        if not ownership.claim(self._cookie, Role.SOURCE):
            self._finished()
            text = f"{self._why}, and neither side here was touched"
            raise VcpuPartial(text, hint="look where it runs", messages=self._one_cpu.leave())
        await sides.go_on(self._source, runs=self._cookie.runs)
        raise VcpuFailed(f"{self._why}; the guest goes on at the source", hint="correct that, and migrate again")

    async def _leave(self) -> None:
        self._finished()
        raise VcpuPartial(
            f"{self._why}; which side runs the guest cannot be told, and neither was touched",
            hint="look at both: migrate-cancel --force lets the source go on, migrate-finish the destination",
            messages=self._one_cpu.leave(),
        )

    async def _give_up(self) -> None:
        if self._arrived is Destination.GONE and not await sides.has_ended(self._destination):
            # It only does not answer.
            self._finished()
        else:
            await sides.end(self._destination)
        raise VcpuConnectionError(
            f"{self._why}; nobody runs it that we know of, and what had come to the destination is not let run",
            reason="closed",
            hint="if the source's QEMU is there, the guest goes on in it",
            messages=self._one_cpu.leave(),
        )

    _ACTS: Final[Mapping[Step, Callable[[Move], Awaitable[list[str] | None]]]] = {
        Step.START_DESTINATION: _start_destination,
        Step.END_SOURCE: _end_source,
        Step.GO_BACK: _go_back,
        Step.LEAVE: _leave,
        Step.GIVE_UP: _give_up,
    }
