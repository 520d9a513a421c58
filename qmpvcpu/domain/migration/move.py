"""Move a guest from one QEMU to another through all phases. At the end exactly one side runs it.

The table in `core.migration.who_runs` decides which step comes next, from what became of both
sides.
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from qmpvcpu import aio
from qmpvcpu.core.migration.cookie import Cookie, check_uri, machine_of
from qmpvcpu.core.migration.leaving import ONE_CPU, check_hangs, needs_one_cpu, without_one_cpu
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
    """A guest that runs at the destination and was verified there. `vcpus` are its vCPU ids."""

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
    """Yield the URI at which the source reaches the destination: the requested or present one, else
    a socket pair.
    """
    there = address_of(await sides.status_of(destination.monitor), how.host)
    if (
        how.uri is None
        and there is None
        and source.monitor.takes_descriptors
        and destination.monitor.takes_descriptors
    ):
        # Other processes cannot connect to a socket pair, and it leaves no file.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs, sides.declined("be given a socket"):
            await destination.monitor.getfd(sides.FD_NAME, theirs.fileno())
            await source.monitor.getfd(sides.FD_NAME, ours.fileno())
            await destination.monitor.migrate_incoming(f"fd:{sides.FD_NAME}")
        yield f"fd:{sides.FD_NAME}"
        return
    yield await phases.listen(destination, how.uri, how.host, f"tcp:{how.host or '127.0.0.1'}:0")


class Move:
    """One migration to a prepared destination.

    Args:
        source: the open connection to the source.
        destination: the open connection to the destination.
        cookie: the guest's cookie.
        how: how the guest's memory is sent.
        finished: called when the destination runs the guest, or may run it, and must not be ended
            any more.
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
        #: What became of the two sides, and why the guest does not run at the destination.
        self._left = Source.KEPT
        self._arrived = Destination.BROKEN
        self._why = ""
        #: Whether `cont` was sent to the destination, with or without success.
        self._was_let_run = False

    async def run(self, agent: Guest | None, agent_there: Guest | None, *, force: bool) -> Migrated:
        """Run all phases from `perform` on.

        Args:
            agent: the guest's agent at the source.
            agent_there: the guest's agent at the destination. If both are known, and this prevents
                a hang, the guest migrates with one CPU online.
            force: also do what is known to hang the guest.

        Raises:
            VcpuRefused: nothing was touched.
            VcpuFailed: the guest continues at the source; the destination's QEMU was ended.
            VcpuPartial: it is not known which side runs the guest, and neither was touched; or CPUs
                are offline in it.
            VcpuConnectionError: the connection to the source broke; if its QEMU has ended, the
                guest has ended too.
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
        return Migrated(
            tuple(sorted(number for slot in slots if slot.plugged for number in slot.ids)),
            status,
            (*notes, *messages),
            time.monotonic() - began,
        )

    async def _leave_one_cpu(self, *, force: bool) -> list[str]:
        """Take all CPUs but the first offline, if the guest needs that; return messages.

        Raises:
            VcpuRefused: this is not possible, and `force` is not given. All CPUs are online again.
            VcpuPartial: this is not possible, and not all CPUs are online again.
        """
        try:
            await self._one_cpu.begin()
        except BaseException as error:
            stayed = await aio.finish(self._one_cpu.go_back())
            if force and not stayed and isinstance(error, VcpuError):
                return [f"migrated with all its CPUs online, and it may hang: {error.message}"]
            # Nothing has been sent, so any side may claim the guest.
            ownership.release(self._cookie, Role.SOURCE)
            if not isinstance(error, VcpuError):
                raise
            if stayed:
                text = f"{error.message}; the guest was not migrated"
                raise VcpuPartial(
                    text, hint=error.hint, remaining=self._one_cpu.vcpus, messages=stayed
                ) from error
            hangs = without_one_cpu(
                check_hangs(self._source.state, self._source.removals), error.message
            )
            raise VcpuRefused([one for one in hangs if one.code == ONE_CPU]) from error
        return []

    async def _move(self) -> tuple[MigrationStatus, list[str]]:
        """Send the guest and bring both sides to an end; return the final status, and messages."""
        channel = _direct(self._source, self._destination, self._how)
        try:
            left = await phases.depart(self._source, self._cookie, channel, self._how)
        except VcpuFailed as error:
            raise VcpuFailed(
                f"{error.message}; the guest goes on at the source",
                hint=error.hint,
                qmp_text=error.qmp_text,
            ) from error
        return left.status, await phases.bring_to_end(left, self._decide(left))

    # -- who runs it: the steps of the table; a step returns messages if everything is finished ----

    async def _decide(self, left: Departure) -> list[str]:
        """Take the steps that the table gives; return messages."""
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
            self._arrived, self._why = Destination.OTHER, "another side has claimed the guest"
            return
        self._was_let_run = True
        self._arrived, why = await sides.let_run(self._destination, self._cookie)
        self._why = why or self._why

    async def _end_source(self) -> list[str]:
        self._finished()
        ownership.forget(self._destination)
        messages = []
        if self._left is Source.DEAD:
            messages = ["the source's QEMU ended by itself, after it had sent the guest"]
        elif not await sides.end(self._source):
            messages = ["the source's QEMU may still run, paused: end it, and do not resume it"]
        return messages + await self._one_cpu.arrive(self._destination.state)

    async def _go_back(self) -> None:
        """End the destination, then let the source continue."""
        if (lost := await sides.lost(self._source)) is not None:
            # The destination may have the only copy of the guest.
            self._why = f"{self._why}; the source's QEMU has ended, or does not answer"
            if self._left is Source.KEPT and lost is Source.DEAD:
                ownership.release(self._cookie, Role.SOURCE)
                self._arrived, _ = await phases.arrive(self._destination, self._cookie)
            self._left = lost
            return
        if not await sides.end(self._destination) and self._was_let_run:
            # The destination may have run, and may run again.
            self._arrived = Destination.UNKNOWN
            return
        # After this, a destination that is still there cannot claim the guest and run it.
        ownership.release(self._cookie, Role.DESTINATION, self._destination)
        if not ownership.claim(self._cookie, Role.SOURCE):
            self._finished()
            text = f"{self._why}, and neither side here was touched"
            raise VcpuPartial(
                text, hint="look on which side it runs", messages=self._one_cpu.leave()
            )
        await sides.go_on(self._source, runs=self._cookie.runs)
        raise VcpuFailed(
            f"{self._why}; the guest goes on at the source", hint="correct that, and migrate again"
        )

    async def _leave(self) -> None:
        self._finished()
        raise VcpuPartial(
            f"{self._why}; which side runs the guest cannot be told, and neither was touched",
            hint="look at both: migrate-cancel --force lets the source go on, migrate-finish the"
            " destination",
            messages=self._one_cpu.leave(),
        )

    async def _give_up(self) -> None:
        if self._arrived is Destination.GONE and not await sides.has_ended(self._destination):
            # The destination has not ended; it only does not answer.
            self._finished()
        else:
            await sides.end(self._destination)
        raise VcpuConnectionError(
            f"{self._why}; no QEMU is known to run it, and what had arrived elsewhere is not run",
            reason="closed",
            hint="look at the source: if its QEMU still runs, the guest goes on in it",
            messages=self._one_cpu.leave(),
        )

    _ACTS: Final[Mapping[Step, Callable[[Move], Awaitable[list[str] | None]]]] = {
        Step.START_DESTINATION: _start_destination,
        Step.END_SOURCE: _end_source,
        Step.GO_BACK: _go_back,
        Step.LEAVE: _leave,
        Step.GIVE_UP: _give_up,
    }
