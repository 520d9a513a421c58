"""`domain.migration`: takes a domain's guest to another QEMU, or into a file and back."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Final

from qmpvcpu.core.arguments import checked
from qmpvcpu.core.machine.described import Described
from qmpvcpu.core.migration.cookie import Cookie, features_of, machine_of
from qmpvcpu.core.migration.status import MigrationStatus, Progress
from qmpvcpu.core.migration.who_runs import Destination
from qmpvcpu.core.model import DomainState
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.definition import DefinitionHandle
from qmpvcpu.domain.dump import DescribedXml, dump
from qmpvcpu.domain.migration import ownership, phases, saving, sides
from qmpvcpu.domain.migration.move import Migrated, Move
from qmpvcpu.domain.migration.picture import read_picture
from qmpvcpu.domain.migration.saving import Save, SaveTarget
from qmpvcpu.domain.session import Session
from qmpvcpu.errors import Refusal, VcpuConnectionError, VcpuFailed
from qmpvcpu.host.ownership import Role
from qmpvcpu.host.process import is_alive
from qmpvcpu.host.room import memory_in_use
from qmpvcpu.host.saves import PausedGuest
from qmpvcpu.ports import CommandError

#: Seconds between two looks for the end of a pending unplug.
_PENDING_LOOK: Final = 0.05


@dataclass(frozen=True, slots=True)
class Access:
    """What a migration needs of the domain that owns it. These are calls, since a domain connects again.

    Attributes:
        connected: the open connection, while nothing else happens to the domain; raises VcpuError without one.
        agent: the guest's, where it is known.
        definition: the domain's, where it has one.
        describe: what QEMU tells of the guest.
        describe_xml: the same as a definition.
        plug: enables vCPUs; with `place`, their threads are placed.
        reconnect: close, and connect again.
    """

    connected: Callable[[], AbstractAsyncContextManager[Session]]
    agent: Callable[[], Guest | None]
    definition: Callable[[], DefinitionHandle | None]
    describe: Callable[[DomainState], Awaitable[Described]]
    describe_xml: Callable[[DomainState], Awaitable[DescribedXml]]
    plug: Callable[[Sequence[int], bool], Awaitable[object]]
    reconnect: Callable[[], Awaitable[Session]]


class Migration:
    """The phases, for those who run the two sides themselves; `migrate`, all of them; `save` and `restore`."""

    def __init__(self, domain: Access) -> None:
        self._domain = domain
        #: What was done on connecting with a guest that a save, which was killed, had left paused.
        self._recovered: tuple[Session, str] | None = None

    # -- the phases -------------------------------------------------------------------------------

    @checked
    async def begin(
        self,
        *,
        persistent: bool = False,
        wait: float = 0.0,
        force: bool = False,
        with_agents: bool = False,
        is_paused: bool = False,
    ) -> Cookie:
        """What goes with the guest, and whether it can go; touches nothing.

        Args:
            persistent: its definition goes too.
            wait: seconds for pending unplugs to end.
            force: do what is known to hang.
            with_agents: `migrate` follows, to a destination whose agent is known: what the guest's agent can save
                from a hang is not refused.
            is_paused: the guest is paused on the way, as `save` does it: a pending unplug may go with it.

        Raises:
            VcpuRefused: it cannot be migrated now; every reason.
        """
        deadline = time.monotonic() + wait
        while True:
            async with self._domain.connected() as session:
                if persistent and self._domain.definition() is None:
                    raise catalogue.NO_DEFINITION.error()
                if not session.pending_unplugs.firsts or time.monotonic() >= deadline:
                    agent = self._domain.agent() if with_agents else None
                    state, runs = await phases.check_begin(session, force=force, agent=agent, is_paused=is_paused)
                    cookie = await self._cookie(session, state, runs=runs, persistent=persistent)
                    ownership.remember(session, Role.SOURCE, cookie)
                    return cookie
                await session.read()
            await asyncio.sleep(_PENDING_LOOK)

    async def _cookie(self, session: Session, state: DomainState, *, runs: bool, persistent: bool) -> Cookie:
        described = (await self._domain.describe(state)).definition
        handle = self._domain.definition()
        definition = handle.definition() if handle is not None else None
        data = handle.read() if handle is not None else (await self._domain.describe_xml(state)).xml
        return Cookie(
            name=definition.name if definition is not None else described.name,
            uuid=(definition.uuid if definition is not None else None) or described.uuid,
            xml=dump(data, state, None, None),
            persistent=data if persistent else None,
            features=features_of(state, definition if persistent else None),
            machine=machine_of(state),
            runs=runs,
            is_described=definition is None,
            number=ownership.begin_number(session),
            pending=tuple(sorted(session.pending_unplugs.firsts)),
            picture=await read_picture(session.monitor, session.process),
        )

    @checked
    async def prepare(self, cookie: Cookie, *, place: bool = True, differences: Sequence[Refusal] = ()) -> None:
        """Make this guest, which waits for a migration (-incoming), ready to take that of the cookie: checked, its
        vCPUs plugged, and so that it does not start by itself.

        Args:
            cookie: of `begin`.
            place: False leaves its threads where the kernel puts them.
            differences: reasons against it that are known already, to be reported with the others.

        Raises:
            VcpuRefused: it cannot take it; every reason.
            VcpuFailed: QEMU declines something.
        """
        async with self._domain.connected() as session:
            await phases.prepare(session, cookie, lambda ids: self._domain.plug(ids, place), differences)
            ownership.remember(session, Role.DESTINATION, cookie)

    @checked
    async def listen(self, uri: str | None = None, host: str | None = None, default: str | None = None) -> str:
        """Where this destination listens from now on, as a source names it.

        Args:
            uri: `unix:PATH` or `tcp:HOST:PORT`, where it should.
            host: how the source reaches it, if it listens everywhere.
            default: as `uri`, if it does not listen yet.

        Raises:
            VcpuRefused: it listens elsewhere, or nobody said where it should.
            VcpuFailed: it cannot listen there.
        """
        async with self._domain.connected() as session:
            return await phases.listen(session, uri, host, default)

    @checked
    async def perform(
        self,
        uri: str,
        *,
        cookie: Cookie | None = None,
        bandwidth: int | None = None,
        timeout: float | None = None,
        progress: Progress | None = None,
        force: bool = False,
    ) -> MigrationStatus:
        """Move the guest to where a destination listens. It is paused here then, and does not run there yet.

        Args:
            uri: where the destination listens.
            cookie: of `begin`: what the guest must still be.
            bandwidth: MiB a second at most.
            timeout: seconds after which it is paused, so that the migration comes to an end.
            progress: called with each fresh status.
            force: do what is known to hang.

        Raises:
            VcpuRefused: nothing was sent.
            VcpuFailed: it was not completed; the guest goes on here.
            VcpuConnectionError: QEMU is lost.
        """
        how = sides.Transfer(uri, None, bandwidth, timeout, progress)
        async with self._domain.connected() as session:
            return await phases.perform(session, uri, cookie, how, force=force)

    async def cookie(self) -> Cookie:
        """What this destination was prepared with, on this host.

        Raises:
            VcpuRefused: that is not known.
        """
        async with self._domain.connected() as session:
            cookie = ownership.recall(session, Role.DESTINATION)
        if cookie is None:
            raise catalogue.COOKIE_UNKNOWN.error()
        return cookie

    @checked
    async def finish(
        self,
        cookie: Cookie,
        *,
        force: bool = False,
        hint: str | None = None,
        reported: Callable[[bool], None] = lambda _: None,
        moved: Callable[[], object] = lambda: None,
    ) -> DomainState:
        """Verify that all of the guest has arrived here, and let it run; its vCPUs.

        Args:
            cookie: of `begin`.
            force: also where another side has taken it.
            hint: goes with an error; None: what the source can do.
            reported: called with True before it is let run, and with False if it was not.
            moved: how far it has come; while that changes, it is waited for.

        Raises:
            VcpuRefused: the source has taken the guest back.
            VcpuFailed: it has not; it does not run here, and can go on at the source (`cancel` there).
            VcpuConnectionError: QEMU is lost.
        """
        async with self._domain.connected() as session:
            found, why = await phases.finish(session, cookie, force=force, reported=reported, moved=moved)
        if found is Destination.RUNNING:
            return session.state
        hint = hint or "migrate-cancel at the source lets the guest go on there"
        if found is Destination.UNKNOWN:
            hint = "migrate-finish again; if it is gone, migrate-cancel --force lets the source go on"
        if found in (Destination.GONE, Destination.DIED, Destination.UNKNOWN):
            raise VcpuConnectionError(why, reason="closed", hint=hint)
        raise VcpuFailed(why, hint=hint)

    @checked
    async def cancel(self, *, force: bool = False) -> str:
        """End what is under way: a source goes on, a destination that has not run ends. What was done, in words.

        Args:
            force: also what may make the guest run twice, or nowhere.

        Raises:
            VcpuRefused: there is nothing to cancel, or the other side has the guest.
        """
        async with self._domain.connected() as session:
            if self._recovered is not None and self._recovered[0] is session:
                (_, done), self._recovered = self._recovered, None
                return done
            return await saving.cancel_save(session) or await phases.cancel(session, force=force)

    # -- all of them ------------------------------------------------------------------------------

    @checked
    async def migrate(
        self,
        destination: Migration,
        cookie: Cookie,
        how: sides.Transfer | None = None,
        *,
        force: bool = False,
        finished: Callable[[], None] = lambda: None,
    ) -> Migrated:
        """Move the guest to a destination that is prepared, verify it there, and end the QEMU here.

        Where QEMU would make it hang otherwise, and the agents of both sides are known, it has just its first CPU
        online on the way; what was taken offline is online again then.

        Args:
            destination: `domain.migration` of it, after its `prepare`.
            cookie: of `begin`.
            how: its memory is moved.
            force: do what is known to hang.
            finished: called when the destination runs the guest, or may: it must not be ended any more.

        Raises:
            VcpuRefused: nothing was touched.
            VcpuFailed: the guest goes on here; the destination's QEMU is ended.
            VcpuPartial: nobody can tell which side runs it, and neither was touched; or CPUs are offline in it.
            VcpuConnectionError: QEMU is lost.
        """
        here, there = self._domain, destination._domain
        async with here.connected() as source, there.connected() as target:
            move = Move(source, target, cookie, how or sides.Transfer(), finished)
            return await move.run(here.agent(), there.agent(), force=force)

    # -- into a file, and back --------------------------------------------------------------------

    async def memory_in_use(self) -> int | None:
        """Bytes of memory that the running guest has at most: what a file of it takes. None: nothing tells.

        Raises:
            VcpuRefused: it does not run.
            VcpuConnectionError: QEMU is lost.
        """
        async with self._domain.connected() as session:
            used = memory_in_use(session.process) if session.process is not None else None
            try:
                summary = await session.monitor.query_memory_size_summary()
            except CommandError:
                return used
        sizes = summary.values() if isinstance(summary, dict) else ()
        total = sum(size for size in sizes if type(size) is int)
        return min(total, used) if total and used is not None else total or used

    @checked
    async def save(
        self, cookie: Cookie, file: SaveTarget, progress: Progress | None = None, *, force: bool = False
    ) -> bool:
        """Pause the guest, write it to a file, and end its QEMU. On every other way out it goes on as it was.

        Returns whether QEMU has ended, as far as can be told; the guest is in the file in any case.

        Args:
            cookie: of `begin`.
            file: open.
            progress: called with each fresh status.
            force: do what is known to hang.

        Raises:
            VcpuRefused: nothing was touched.
            VcpuFailed: it could not be written; the guest goes on.
            VcpuConnectionError: QEMU is lost.
        """
        async with self._domain.connected() as session:
            _, runs = await phases.check_perform(session, cookie, force=force, is_paused=True)
            if not session.monitor.takes_descriptors:
                raise catalogue.NO_DESCRIPTOR.error()
            if cookie.runs is not runs:
                raise catalogue.CHANGED_WHILE_SAVING.error(done="let run" if runs else "paused")
            return await Save(session, cookie, file, self._domain.reconnect).run(progress)

    @checked
    async def restore(
        self, cookie: Cookie, fd: int, offset: int, reported: Callable[[bool], None] = lambda _: None
    ) -> DomainState:
        """Read a saved guest into this QEMU, which is prepared, verify it, and let it run, if it ran; its vCPUs.

        Args:
            cookie: what was saved with it.
            fd: opened to read, and standing at `offset`, in bytes.
            offset: where QEMU's stream begins.
            reported: as of `finish`.

        Raises:
            VcpuFailed: it is not whole, or not of this machine, and QEMU may have ended over it; it does not run.
            VcpuConnectionError: QEMU is lost.
        """
        async with self._domain.connected() as session:
            await sides.receive_file(session.monitor, session.state.qemu, fd, offset)
        # A file is good for as many guests as are made of it.
        once = replace(cookie, number=None)
        try:
            return await self.finish(
                once, hint="the file is as it was", reported=reported, moved=lambda: _position(fd)
            )
        except VcpuConnectionError as error:
            if session.process is None or is_alive(session.process.key):
                raise
            hint = "look at QEMU's log; the file is as it was"
            raise VcpuFailed("QEMU could not read the saved guest, and has ended", hint=hint) from error

    @checked
    async def read_saved(self, fd: int, offset: int) -> None:
        """Read a saved guest into this QEMU, which waits for one, and do not let it run.

        Args:
            fd: opened to read, and standing at `offset`, in bytes.
            offset: where QEMU's stream begins.

        Raises:
            VcpuFailed: it cannot be read.
            VcpuConnectionError: QEMU is lost, perhaps over it.
        """
        async with self._domain.connected() as session:
            await sides.receive_file(session.monitor, session.state.qemu, fd, offset, only_reads=True)
            refusal = await phases.arrival(session, lambda: _position(fd))
        if refusal is not None:
            raise VcpuFailed(refusal.message, hint=refusal.hint)

    @checked
    async def recover(self, session: Session, paused: PausedGuest) -> None:
        """On connecting: a guest that a save, which was killed, has left `paused` goes on.

        Raises:
            VcpuConnectionError: all of the guest is in the file, and its QEMU was ended.
        """
        done = await saving.recover(session, paused)
        self._recovered = None if done is None else (session, done)


def _position(fd: int) -> int:
    """How far QEMU has read: its descriptor of the file is the same one."""
    return os.lseek(fd, 0, os.SEEK_CUR)
