"""`domain.migration`: moves a domain's guest to another QEMU, or into a file and back."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Final

from qmpvcpu import xml as documents
from qmpvcpu.core.arguments import checked
from qmpvcpu.core.machine.described import Described
from qmpvcpu.core.migration.cookie import Cookie, features_of, machine_of
from qmpvcpu.core.migration.status import MigrationStatus, Progress
from qmpvcpu.core.migration.who_runs import Destination
from qmpvcpu.core.model import DomainState
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.definition import DefinitionHandle
from qmpvcpu.domain.dump import dump
from qmpvcpu.domain.migration import ownership, phases, saving, sides
from qmpvcpu.domain.migration.move import Migrated, Move
from qmpvcpu.domain.migration.picture import read_picture
from qmpvcpu.domain.migration.saving import Save, SaveTarget
from qmpvcpu.domain.session import Session
from qmpvcpu.errors import Refusal, VcpuConnectionError, VcpuFailed, VcpuUsageError
from qmpvcpu.host.ownership import Role
from qmpvcpu.host.process import is_alive, memory_in_use
from qmpvcpu.host.saves import PausedGuest
from qmpvcpu.ports import CommandError

#: Seconds between two queries for the end of a pending unplug.
_PENDING_LOOK: Final = 0.05


@dataclass(frozen=True, slots=True)
class Access:
    """What a migration needs from its domain. These are functions, because the domain may connect
    again.

    Attributes:
        connected: opens a context with the connection, in which no other operation runs; raises
            VcpuError without a connection.
        agent: returns the guest's agent, or None if it is not known.
        definition: returns the domain's definition, or None if it has none.
        describe: returns what QEMU reports about the guest.
        plug: enables vCPUs; with `place`, their threads are placed.
        reconnect: closes the connection, and connects again.
    """

    connected: Callable[[], AbstractAsyncContextManager[Session]]
    agent: Callable[[], Guest | None]
    definition: Callable[[], DefinitionHandle | None]
    describe: Callable[[DomainState], Awaitable[Described]]
    plug: Callable[[Sequence[int], bool], Awaitable[object]]
    reconnect: Callable[[], Awaitable[Session]]


class Migration:
    """Migrates and saves a guest: `migrate` runs all phases; the single phases are for callers that
    run the two sides themselves; `save` and `restore` use a file.
    """

    def __init__(self, domain: Access) -> None:
        self._domain = domain
        #: What was done on connecting with a guest that a killed save had left paused.
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
        """Return the cookie that goes with the guest, if the guest can be migrated; nothing is
        touched.

        Args:
            persistent: the definition goes with the guest too.
            wait: seconds to wait until pending unplugs finish.
            force: also do what is known to hang the guest.
            with_agents: `migrate` follows, to a destination whose agent is known. A hang that the
                guest's agent can prevent is not a refusal then.
            is_paused: the guest is paused during the transfer, as in `save`, so a pending unplug
                may go with it.

        Raises:
            VcpuRefused: the guest cannot be migrated now; it lists every reason.
        """
        deadline = time.monotonic() + wait
        while True:
            async with self._domain.connected() as session:
                if persistent and self._domain.definition() is None:
                    raise catalogue.NO_DEFINITION.error()
                if not session.pending_unplugs.entity_ids or time.monotonic() >= deadline:
                    state, runs = await phases.check_begin(
                        session,
                        force=force,
                        agent=self._domain.agent() if with_agents else None,
                        is_paused=is_paused,
                    )
                    cookie = await self._make_cookie(
                        session, state, runs=runs, persistent=persistent
                    )
                    ownership.remember(session, Role.SOURCE, cookie)
                    return cookie
                await session.read()
            await asyncio.sleep(_PENDING_LOOK)

    async def _make_cookie(
        self, session: Session, state: DomainState, *, runs: bool, persistent: bool
    ) -> Cookie:
        described = await self._domain.describe(state)
        handle = self._domain.definition()
        definition = handle.definition() if handle is not None else None
        if handle is not None:
            data = handle.read()
        else:
            data = documents.minimal_domain(described.definition, described.devices)
        return Cookie(
            name=definition.name if definition is not None else described.definition.name,
            uuid=(definition.uuid if definition is not None else None) or described.definition.uuid,
            xml=dump(data, state, None, None),
            persistent=data if persistent else None,
            features=features_of(state, definition if persistent else None),
            machine=machine_of(state),
            runs=runs,
            is_described=definition is None,
            number=ownership.begin_number(session),
            pending=tuple(sorted(session.pending_unplugs.entity_ids)),
            picture=await read_picture(session.monitor, session.process),
        )

    @checked
    async def prepare(
        self, cookie: Cookie, *, place: bool = True, differences: Sequence[Refusal] = ()
    ) -> None:
        """Prepare this QEMU, which waits for a migration (-incoming), for the guest of the cookie:
        check it, plug its vCPUs, and make sure that it does not start by itself.

        Args:
            cookie: the result of `begin`.
            place: False does not place the threads; the kernel places them.
            differences: refusals that are known already and are reported with the others.

        Raises:
            VcpuRefused: this QEMU cannot take the guest; it lists every reason.
            VcpuFailed: QEMU declined a command.
        """
        async with self._domain.connected() as session:
            await phases.prepare(
                session, cookie, lambda ids: self._domain.plug(ids, place), differences
            )
            ownership.remember(session, Role.DESTINATION, cookie)

    @checked
    async def listen(
        self, uri: str | None = None, host: str | None = None, default: str | None = None
    ) -> str:
        """Let this destination listen, and return its address as the source must name it.

        Args:
            uri: the address to listen at, `unix:PATH` or `tcp:HOST:PORT`.
            host: how the source reaches this host, if the destination listens on all addresses.
            default: used instead of `uri` if the destination does not listen yet.

        Raises:
            VcpuRefused: the destination listens elsewhere, or no address was given.
            VcpuFailed: the destination cannot listen there.
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
        """Send the guest to a destination that listens. Afterwards it is paused here, and does not
        run there yet.

        Args:
            uri: where the destination listens.
            cookie: the result of `begin`; the guest must still match it.
            bandwidth: maximum MiB per second.
            timeout: seconds after which the guest is paused, so that the migration can finish.
            progress: called with each fresh status.
            force: also do what is known to hang the guest.

        Raises:
            VcpuRefused: nothing was sent.
            VcpuFailed: the migration did not complete; the guest continues here.
            VcpuConnectionError: the connection to QEMU broke.
        """
        how = sides.Transfer(uri, None, bandwidth, timeout, progress)
        async with self._domain.connected() as session:
            return await phases.perform(session, uri, cookie, how, force=force)

    async def cookie(self) -> Cookie:
        """Return the cookie that this destination was prepared with, on this host.

        Raises:
            VcpuRefused: no cookie is known.
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
        """Verify that the whole guest has arrived here, let it run, and return its vCPUs.

        Args:
            cookie: the result of `begin`.
            force: also run the guest if another side has claimed it.
            hint: the hint of an error; None names what the source can do.
            reported: called with True before the guest is let run, and with False if it was not.
            moved: returns the progress of the transfer; while it changes, the wait goes on.

        Raises:
            VcpuRefused: the source has claimed the guest again.
            VcpuFailed: the guest has not arrived whole; it does not run here, and can continue at
                the source (`cancel` there).
            VcpuConnectionError: the connection to QEMU broke.
        """
        async with self._domain.connected() as session:
            found, why = await phases.finish(
                session, cookie, force=force, reported=reported, moved=moved
            )
        if found is Destination.RUNNING:
            return session.state
        hint = hint or "let the guest go on at the source: migrate-cancel"
        if found is Destination.UNKNOWN:
            hint = "repeat migrate-finish; if QEMU has ended, migrate-cancel --force at the source"
        if found in (Destination.GONE, Destination.DIED, Destination.UNKNOWN):
            raise VcpuConnectionError(why, reason="closed", hint=hint)
        raise VcpuFailed(why, hint=hint)

    @checked
    async def cancel(self, *, force: bool = False) -> str:
        """Cancel a migration or save: a source continues, a destination that has not run ends.
        Return what was done, in words.

        Args:
            force: also do what may let the guest run twice, or nowhere.

        Raises:
            VcpuRefused: there is nothing to cancel, or the other side has the guest.
        """
        async with self._domain.connected() as session:
            if self._recovered is not None and self._recovered[0] is session:
                _, done = self._recovered
                self._recovered = None
                return done
            return await saving.cancel_save(session) or await phases.cancel(session, force=force)

    # -- all phases -------------------------------------------------------------------------------

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
        """Move the guest to a prepared destination, verify it there, and end the QEMU here.

        Some QEMU versions would make the guest hang. If the agents of both sides are known, the
        guest then has only its first CPU online during the migration. The other CPUs are online
        again afterwards.

        Args:
            destination: `domain.migration` of the destination, after its `prepare`.
            cookie: the result of `begin`.
            how: how the guest's memory is sent.
            force: also do what is known to hang the guest.
            finished: called when the destination runs the guest, or may run it, and must not be
                ended any more.

        Raises:
            VcpuRefused: nothing was touched.
            VcpuFailed: the guest continues here; the destination's QEMU was ended.
            VcpuPartial: it is not known which side runs the guest, and neither was touched; or CPUs
                are offline in it.
            VcpuConnectionError: the connection to QEMU broke.
        """
        one, there = self._domain, destination._domain
        async with one.connected() as source, there.connected() as target:
            return await Move(source, target, cookie, how or sides.Transfer(), finished).run(
                one.agent(), there.agent(), force=force
            )

    # -- into a file, and back --------------------------------------------------------------------

    async def memory_in_use(self) -> int | None:
        """Return the bytes of memory that the running guest uses at most, which a file of it needs.
        None: not known.

        Raises:
            VcpuRefused: the guest does not run.
            VcpuConnectionError: the connection to QEMU broke.
        """
        async with self._domain.connected() as session:
            used = memory_in_use(session.process) if session.process is not None else None
            try:
                summary = await session.monitor.query_memory_size_summary()
            except CommandError:
                return used
        sizes = summary.values() if isinstance(summary, dict) else ()
        total = sum(size for size in sizes if type(size) is int)
        known = [size for size in (total or None, used) if size is not None]
        return min(known, default=None)

    @checked
    async def save(
        self,
        cookie: Cookie,
        file: SaveTarget,
        progress: Progress | None = None,
        *,
        force: bool = False,
    ) -> bool:
        """Pause the guest, write it to a file, and end its QEMU. If this fails, the guest continues
        as it was.

        Return whether QEMU has ended, as far as known; in both cases the guest is in the file.

        Args:
            cookie: the result of `begin`.
            file: the open file.
            progress: called with each fresh status.
            force: also do what is known to hang the guest.

        Raises:
            VcpuRefused: nothing was touched.
            VcpuFailed: the file could not be written; the guest continues.
            VcpuConnectionError: the connection to QEMU broke.
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
        self,
        cookie: Cookie,
        fd: int,
        offset: int,
        reported: Callable[[bool], None] = lambda _: None,
    ) -> DomainState:
        """Read a saved guest into this prepared QEMU, verify it, let it run if it ran, and return
        its vCPUs.

        Args:
            cookie: the cookie that was saved with the guest.
            fd: a file descriptor that is open for reading and positioned at `offset`.
            offset: where QEMU's stream begins, in bytes.
            reported: as in `finish`.

        Raises:
            VcpuFailed: the file is incomplete, or belongs to another machine; the guest does not
                run, and QEMU may have exited because of it.
            VcpuConnectionError: the connection to QEMU broke.
        """
        async with self._domain.connected() as session:
            await sides.receive_file(session.monitor, session.state.qemu, fd, offset)
        # A file can be restored any number of times, so the restored guest has no owner.
        once = replace(cookie, number=None)
        try:
            return await self.finish(
                once,
                hint="restore again: the file is as it was",
                reported=reported,
                moved=lambda: _position(fd),
            )
        except VcpuConnectionError as error:
            if session.process is None or is_alive(session.process.key):
                raise
            raise VcpuFailed(
                "QEMU could not read the saved guest, and has ended",
                hint="look at QEMU's log; the file is as it was",
            ) from error

    @checked
    async def read_saved(self, fd: int, offset: int) -> None:
        """Read a saved guest into this QEMU, which waits for one, without letting it run.

        Args:
            fd: a file descriptor that is open for reading and positioned at `offset`.
            offset: where QEMU's stream begins, in bytes.

        Raises:
            VcpuUsageError: `fd` is not an open file.
            VcpuFailed: the file cannot be read.
            VcpuConnectionError: the connection to QEMU broke, perhaps because of the file.
        """
        try:
            _position(fd)
        except (OSError, OverflowError) as error:
            hint = "open the saved file, and position it where QEMU's stream begins"
            raise VcpuUsageError(f"fd={fd} is not an open file: {error}", hint=hint) from error
        async with self._domain.connected() as session:
            await sides.receive_file(
                session.monitor, session.state.qemu, fd, offset, only_reads=True
            )
            refusal = await phases.arrival(session, lambda: _position(fd))
        if refusal is not None:
            raise VcpuFailed(refusal.message, hint=refusal.hint)

    @checked
    async def recover(self, session: Session, paused: PausedGuest) -> None:
        """On connecting, let a guest continue that a killed save has left `paused`.

        Raises:
            VcpuConnectionError: the whole guest is in the file, and its QEMU was ended.
        """
        done = await saving.recover(session, paused)
        self._recovered = None if done is None else (session, done)


def _position(fd: int) -> int:
    """Return how far QEMU has read. It shares the position of this file descriptor."""
    return os.lseek(fd, 0, os.SEEK_CUR)
