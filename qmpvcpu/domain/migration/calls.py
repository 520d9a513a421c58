"""The calls of a `Domain` that take its guest elsewhere; what they do is in `domain.migration.phases`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qmpvcpu import aio
from qmpvcpu.core.arguments import checked
from qmpvcpu.core.model import DomainState, Outcome
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.definition import Persistent
from qmpvcpu.domain.dump import DescribedXml, describe, dump
from qmpvcpu.domain.migration.ownership import Side, begin_number, forget, give, keep, kept, release, take
from qmpvcpu.domain.placement import Placing
from qmpvcpu.domain.resolve import Place
from qmpvcpu.domain.run import Reach, run
from qmpvcpu.domain.session import Link
from qmpvcpu.errors import Refusal, VcpuConnectionError, VcpuError, VcpuFailed, VcpuRefused
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.host.process import is_alive
from qmpvcpu.ports import CommandError

if TYPE_CHECKING:
    from qmpvcpu.core.migration.cookie import Cookie
    from qmpvcpu.core.migration.status import MigrationStatus
    from qmpvcpu.domain.migration.phases import Migrated, Progress

__all__ = ["MigrationCalls"]

#: Seconds between two looks for the end of a pending unplug.
_PENDING_LOOK: Final = 0.05
#: Seconds a QEMU that was lost while it saved has to come back.
_BRING_BACK_SECONDS: Final = 60.0


def _position(fd: int) -> int:
    """How far QEMU has read: its descriptor of the file is the same one."""
    return os.lseek(fd, 0, os.SEEK_CUR)


_GO_BACK: Final = "migrate-cancel at the source lets the guest go on there"


class MigrationCalls:
    """A part of `Domain`. The phases, for those who run the two sides themselves, and `migrate`, all of them."""

    _place: Place
    _guest: Guest | None
    _persistent: Persistent | None
    #: What was done on connecting with a guest that a save, which was killed, had left paused.
    _let_go_on: str | None = None

    if TYPE_CHECKING:

        def _call(self) -> AbstractAsyncContextManager[None]: ...

        def _connected(self) -> Link: ...

        def _placing(self, request: Request, here: list[Refusal]) -> tuple[Placing, list[Refusal]]: ...

        async def _described(self, state: DomainState) -> DescribedXml: ...

        async def _connect(self) -> None: ...

        async def _close(self) -> None: ...

    @checked
    async def migrate_begin(
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
        from qmpvcpu.domain.migration.phases import check_begin

        deadline = time.monotonic() + wait
        while True:
            async with self._call():
                link = self._connected()
                if persistent and self._persistent is None:
                    raise catalogue.NO_DEFINITION.error()
                if not link.ledger.firsts or time.monotonic() >= deadline:
                    agent = self._guest if with_agents else None
                    state, runs = await check_begin(link, force=force, agent=agent, is_paused=is_paused)
                    return await self._cookie(link, state, runs, persistent)
                await link.read()
            await asyncio.sleep(_PENDING_LOOK)

    async def _cookie(self, link: Link, state: DomainState, runs: bool, persistent: bool) -> Cookie:
        from qmpvcpu.core.migration.cookie import Cookie, features_of, machine_of
        from qmpvcpu.domain.migration.picture import read_picture

        described = (await describe(link.monitor, state, link.process, self._place.agent)).definition
        definition = self._persistent.definition() if self._persistent is not None else None
        inactive = self._persistent.read() if persistent and self._persistent is not None else None
        if self._persistent is not None:
            xml = dump(self._persistent.read(), state, None, None)
        else:
            xml = dump((await self._described(state)).xml, state, None, None)
        cookie = Cookie(
            definition.name if definition is not None else described.name,
            (definition.uuid if definition is not None else None) or described.uuid,
            xml,
            inactive,
            features_of(state, definition if persistent else None),
            machine_of(state),
            runs,
            definition is None,
            begin_number(link),
            tuple(sorted(link.ledger.firsts)),
            await read_picture(link.monitor, link.process),
        )
        keep(link, Side.SOURCE, cookie)
        return cookie

    @checked
    async def migrate_prepare(
        self, cookie: Cookie, *, place: bool = True, differences: Sequence[Refusal] = ()
    ) -> None:
        """Make this guest, which waits for a migration (-incoming), ready to take that of the cookie: checked, its
        vCPUs plugged, and so that it does not start by itself.

        Args:
            cookie: of `migrate_begin`.
            place: False leaves its threads where the kernel puts them.
            differences: reasons against it that are known already, to be told with the others.

        Raises:
            VcpuRefused: it cannot take it; every reason.
            VcpuFailed: QEMU declines something.
        """
        from qmpvcpu.domain.migration.phases import prepare

        async with self._call():
            link = self._connected()

            async def plug(ids: Sequence[int]) -> Outcome:
                request = Request(tuple(ids), VcpuFlag.ENABLE, fallback=False, place=place)
                placing, here = self._placing(request, [])
                return await run(Reach(link, placing=placing, preconditions=tuple(here)), request)

            await prepare(link, cookie, plug, differences)
            keep(link, Side.DESTINATION, cookie)

    @checked
    async def migrate_listen(
        self, uri: str | None = None, host: str | None = None, default: str | None = None
    ) -> str:
        """Where this destination listens from now on, as a source names it.

        Args:
            uri: `unix:PATH` or `tcp:HOST:PORT`, where it shall.
            host: how the source reaches it, if it listens everywhere.
            default: as `uri`, if it does not listen yet.

        Raises:
            VcpuRefused: it listens elsewhere, or nobody said where it shall.
            VcpuFailed: it cannot listen there.
        """
        from qmpvcpu.domain.migration.phases import listen_at

        async with self._call():
            return await listen_at(self._connected(), uri, host, default)

    @checked
    async def migrate_perform(
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
            cookie: of `migrate_begin`: what the guest must still be.
            bandwidth: MiB a second at most.
            timeout: seconds after which it is paused, so that the migration comes to an end.
            progress: told each fresh status.
            force: do what is known to hang.

        Raises:
            VcpuRefused: nothing was sent.
            VcpuFailed: it was not completed; the guest goes on here.
            VcpuConnectionError: QEMU is lost.
        """
        from qmpvcpu.domain.migration.phases import check_perform, go_on, perform, status_of, take_for_perform

        async with self._call():
            link = self._connected()
            _, runs = await check_perform(link, cookie, force=force)
            begun = cookie or kept(link, Side.SOURCE)
            take_for_perform(link, begun, runs=runs)
            try:
                status = await perform(link.monitor, uri, bandwidth=bandwidth, timeout=timeout, progress=progress)
            except (VcpuFailed, VcpuRefused):
                # It did not begin.
                if begun is not None:
                    release(begun, Side.SOURCE)
                raise
            except asyncio.CancelledError:
                # What has been handed over may be started there.
                if (await status_of(link.monitor)).status != "completed":
                    await aio.finish(go_on(link, runs=runs))
                elif begun is not None:
                    release(begun, Side.SOURCE)
                raise
            if status.status != "completed":
                # The number is used up: whatever has arrived there is not let run any more.
                await go_on(link, runs=runs)
                why = status.error or f"it was {status.status}"
                raise VcpuFailed(f"the migration failed: {why}; the guest goes on here", hint="see QEMU's logs")
            if begun is not None:
                release(begun, Side.SOURCE)
            return status

    async def migrate_cookie(self) -> Cookie:
        """What this destination was prepared with, on this host.

        Raises:
            VcpuRefused: that is not known.
        """
        async with self._call():
            cookie = kept(self._connected(), Side.DESTINATION)
        if cookie is None:
            raise catalogue.COOKIE_UNKNOWN.error()
        return cookie

    @checked
    async def migrate_finish(
        self,
        cookie: Cookie,
        *,
        force: bool = False,
        hint: str = _GO_BACK,
        told: Callable[[bool], None] = lambda _: None,
        moved: Callable[[], object] = lambda: None,
    ) -> DomainState:
        """Verify that all of the guest has arrived here, and let it run; its vCPUs.

        Args:
            cookie: of `migrate_begin`.
            force: also where another side has taken it.
            hint: goes with an error.
            told: called with True before it is let run, and with False if it was not.
            moved: how far it has come; while that changes, it is waited for.

        Raises:
            VcpuRefused: the source has taken the guest back.
            VcpuFailed: it has not; it does not run here, and can go on at the source (`migrate_cancel` there).
            VcpuConnectionError: QEMU is lost.
        """
        from qmpvcpu.core.migration.who_runs import Destination
        from qmpvcpu.domain.migration.phases import finish, keep_pending, start

        async with self._call():
            link = self._connected()
            found, refusals = await finish(link, cookie, moved)
            text = "; ".join(one.message for one in refusals)
            if found is Destination.WHOLE:
                if force:
                    give(cookie, Side.DESTINATION, link)
                elif not take(cookie, Side.DESTINATION, link):
                    raise catalogue.RUNS_AT_SOURCE.error()
                told(True)
                found, said = await start(link, cookie)
                text = said or text
                told(found in (Destination.RUNNING, Destination.UNKNOWN))
            if found is Destination.RUNNING:
                keep_pending(link, cookie)
                forget(link)
                return link.state
            if found is Destination.UNKNOWN:
                hint = "migrate-finish again; if it is gone, migrate-cancel --force lets the source go on"
            if found in (Destination.GONE, Destination.DIED, Destination.UNKNOWN):
                raise VcpuConnectionError(text, reason="closed", hint=hint)
            raise VcpuFailed(text, hint=hint)

    async def memory_in_use(self) -> int | None:
        """Bytes of memory that the running guest has at most: what a file of it takes. None: nothing tells.

        Raises:
            VcpuRefused: it does not run.
            VcpuConnectionError: QEMU is lost.
        """
        from qmpvcpu.host.room import memory_in_use

        async with self._call():
            link = self._connected()
            used = memory_in_use(link.process) if link.process is not None else None
            try:
                summary = await link.monitor.query_memory_size_summary()
            except CommandError:
                return used
        sizes = summary.values() if isinstance(summary, dict) else ()
        total = sum(size for size in sizes if type(size) is int)
        return min(total, used) if total and used is not None else total or used

    @checked
    async def save(
        self,
        cookie: Cookie,
        fd: int,
        offset: int,
        finish: Callable[[], object],
        progress: Progress | None = None,
        *,
        force: bool = False,
        check: Callable[[], Awaitable[object]] | None = None,
        files: tuple[str, ...] = (),
    ) -> bool:
        """Pause the guest, write it to a file, and end its QEMU. On every other way out it goes on as it was.

        Returns whether QEMU has ended, as far as can be told; the guest is in the file in any case.

        Args:
            cookie: of `migrate_begin`.
            fd: opened to write, and standing at `offset`, in bytes.
            finish: makes the file last, and raises OSError where it cannot; it may block.
            progress: told each fresh status.
            force: do what is known to hang.
            check: awaited before `finish`, once all is written; raises OSError or VcpuFailed where it is not good.
            files: names that the file can have. Should this process be killed, the next one takes it away.

        Raises:
            VcpuRefused: nothing was touched.
            VcpuFailed: it could not be written; the guest goes on.
            VcpuConnectionError: QEMU is lost.
        """
        from qmpvcpu.domain.migration import saving
        from qmpvcpu.domain.migration.phases import check_perform, check_same, has_ended, perform_to_file

        async with self._call():
            link = self._connected()
            state, runs = await check_perform(link, cookie, force=force, is_paused=True)
            if not link.monitor.takes_descriptors:
                raise catalogue.NO_DESCRIPTOR.error()
            if cookie.runs is not runs:
                raise catalogue.CHANGED_WHILE_SAVING.error(done="let run" if runs else "paused")
            is_written = False

            def finished() -> None:
                nonlocal is_written
                finish()
                is_written = True

            saving.begin(link, fd, files, runs=runs)
            try:
                await link.monitor.stop()
                if link.ledger.firsts:
                    # What was pending may have ended until now.
                    check_same(cookie, await link.read())
                status = await perform_to_file(link.monitor, state.qemu, fd, offset, progress)
                if status.status != "completed":
                    raise VcpuFailed(f"QEMU could not write it: {status.error or status.status}")
                if check is not None:
                    await check()
                try:
                    is_paused = await saving.is_still_paused(link.monitor)
                except VcpuConnectionError:
                    if not await has_ended(link):
                        raise
                    # All that there is of the guest is in the file.
                    is_paused = True
                if not is_paused:
                    raise VcpuFailed("somebody has let the guest run while it was being saved", hint="save again")
                await aio.finish(asyncio.to_thread(finished))
            except VcpuConnectionError as error:
                said, hint = error.message, "the guest may be there, and paused: migrate-cancel lets it go on"
                if await aio.finish(self._bring_back(link, runs=runs)):
                    now = "goes on" if runs else "is paused, as it was"
                    said, hint = f"{said}; the guest {now}", "save again"
                raise VcpuConnectionError(said, reason=error.reason, hint=hint) from error
            except VcpuRefused:
                await aio.finish(self._go_on(link, runs=runs))
                raise
            except (CommandError, OSError, VcpuFailed) as error:
                await aio.finish(self._go_on(link, runs=runs))
                why = error.strerror if isinstance(error, OSError) else str(error)
                told = error.hint if isinstance(error, VcpuFailed) else None
                hint = told or "look at the disk, and save again"
                now = "goes on" if runs else "is paused, as it was"
                raise VcpuFailed(f"{why}; the guest {now}", hint=hint) from error
            except BaseException:
                if is_written:
                    await aio.finish(self._end_saved(link))
                else:
                    await aio.finish(self._go_on(link, runs=runs))
                raise
            return await aio.finish(self._end_saved(link))

    async def _end_saved(self, link: Link) -> bool:
        """The guest is in the file: its QEMU ends; whether it has."""
        from qmpvcpu.domain.migration import saving
        from qmpvcpu.domain.migration.phases import end

        has_ended = await end(link)
        if has_ended:
            saving.forget(link)
        return has_ended

    async def _after_killed_save(self, link: Link) -> str | None:
        """A guest that a save, which was killed, has left paused goes on."""
        from qmpvcpu.domain.migration import saving

        return await saving.let_go_on(link)

    async def _go_on(self, link: Link, *, runs: bool) -> None:
        """A guest that is not saved after all."""
        from qmpvcpu.domain.migration import saving
        from qmpvcpu.domain.migration.phases import go_on

        await go_on(link, runs=runs)
        await saving.settle(link)

    async def _bring_back(self, link: Link, *, runs: bool) -> bool:
        """After QMP was lost while the guest was being saved: let it go on; whether it does. A QEMU that waits for
        a disk does not answer, and will.
        """
        deadline = time.monotonic() + _BRING_BACK_SECONDS
        while link.process is not None and is_alive(link.process.key) and time.monotonic() < deadline:
            with suppress(VcpuError):
                await aio.finish(self._close())
                await self._connect()
                await self._go_on(self._connected(), runs=runs)
                return True
            await asyncio.sleep(_PENDING_LOOK)
        return False

    @checked
    async def restore(
        self, cookie: Cookie, fd: int, offset: int, told: Callable[[bool], None] = lambda _: None
    ) -> DomainState:
        """Read a saved guest into this QEMU, which is prepared (`migrate_prepare`), verify it, and let it run, if
        it ran; its vCPUs.

        Args:
            cookie: what was saved with it.
            fd: opened to read, and standing at `offset`, in bytes.
            told: as `migrate_finish`.

        Raises:
            VcpuFailed: it is not whole, or not of this machine, and QEMU may have ended over it; it does not run.
            VcpuConnectionError: QEMU is lost.
        """
        from qmpvcpu.domain.migration.phases import incoming_from_file

        async with self._call():
            link = self._connected()
            await incoming_from_file(link, link.state.qemu, fd, offset)
        try:
            # A file is good for as many guests as are made of it.
            once = replace(cookie, number=None)
            return await self.migrate_finish(
                once, hint="the file is as it was", told=told, moved=lambda: _position(fd)
            )
        except VcpuConnectionError as error:
            if link.process is None or is_alive(link.process.key):
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
        from qmpvcpu.domain.migration.phases import arrival, incoming_from_file

        async with self._call():
            link = self._connected()
            await incoming_from_file(link, link.state.qemu, fd, offset, only_reads=True)
            refusal = await arrival(link, lambda: _position(fd))
            if refusal is not None:
                raise VcpuFailed(refusal.message, hint=refusal.hint)

    @checked
    async def migrate_cancel(self, *, force: bool = False) -> str:
        """End what is under way: a source goes on, a destination that has not run ends. What was done, in words.

        Args:
            force: also what may make the guest run twice, or nowhere.

        Raises:
            VcpuRefused: there is nothing to cancel, or the other side has the guest.
        """
        from qmpvcpu.domain.migration import saving
        from qmpvcpu.domain.migration.phases import cancel

        async with self._call():
            if self._let_go_on is not None:
                done, self._let_go_on = self._let_go_on, None
                return done
            if (stopped := await saving.cancel_save(self._connected())) is not None:
                return stopped
            return await cancel(self._connected(), force=force)

    @checked
    async def migrate(
        self,
        destination: MigrationCalls,
        cookie: Cookie,
        *,
        uri: str | None = None,
        host: str | None = None,
        bandwidth: int | None = None,
        timeout: float | None = None,
        progress: Progress | None = None,
        force: bool = False,
        settled: Callable[[], None] = lambda: None,
    ) -> Migrated:
        """Move the guest to a destination that is prepared, verify it there, and end the QEMU here.

        Where QEMU would make it hang otherwise, and the agents of both sides are known, it has just its first CPU
        online on the way; what was taken offline is online again then.

        Args:
            destination: after its `migrate_prepare`.
            cookie: of `migrate_begin`.
            uri: where it shall listen; None: two QEMUs of this host get a socket of their own.
            host: how the source's host reaches the destination's.
            bandwidth, timeout, progress, force: as `migrate_perform`.
            settled: called when the destination runs the guest, or may: it must not be ended any more.

        Raises:
            VcpuRefused: nothing was touched.
            VcpuFailed: the guest goes on here; the destination's QEMU is ended.
            VcpuPartial: nobody can tell which side runs it, and neither was touched; or CPUs are offline in it.
            VcpuConnectionError: QEMU is lost.
        """
        from qmpvcpu.domain.migration.phases import migrate

        async with self._call(), destination._call():
            here, there = self._guest, destination._guest
            return await migrate(
                self._connected(),
                destination._connected(),
                cookie,
                uri=uri,
                host=host,
                bandwidth=bandwidth,
                timeout=timeout,
                progress=progress,
                force=force,
                settled=settled,
                agents=(here, there) if here is not None and there is not None else None,
            )
