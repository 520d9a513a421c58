"""Save a guest into a file: it is paused and written, and its QEMU ends; or it continues as it was.

If the saving process is killed, the next process that connects to the guest lets it continue. If
the whole guest is in the file, that process ends its QEMU instead.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from qmpvcpu import aio
from qmpvcpu.core.migration.cookie import Cookie, check_same
from qmpvcpu.core.migration.status import Progress
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain.migration import sides
from qmpvcpu.domain.reader import run_state
from qmpvcpu.domain.session import Session
from qmpvcpu.errors import VcpuConnectionError, VcpuError, VcpuFailed
from qmpvcpu.host.process import is_alive, pid_in
from qmpvcpu.host.saves import PausedGuest, Saves, paused_by_us, paused_guest
from qmpvcpu.ports import CommandError, Monitor

_LOGGER: Final = logging.getLogger(__name__)
#: QAPI RunStates of a guest that was paused to be saved.
_PAUSED: Final = frozenset({"paused", "postmigrate", "finish-migrate"})
#: Seconds that a QEMU has to answer again after its connection broke during a save, and seconds
#: between two tries.
_BRING_BACK_SECONDS: Final = 60.0
_LOOK: Final = 0.05


@dataclass(frozen=True, slots=True)
class SaveTarget:
    """The file that a guest is saved in.

    Attributes:
        fd: a file descriptor that is open for writing and positioned at `offset`.
        offset: where QEMU's stream begins, in bytes.
        finish: makes the file permanent, or raises OSError. It may block.
        check: awaited before `finish`, when everything is written; raises OSError or VcpuFailed if
            the file is not good.
        names: the names that the file can have. If this process is killed, the next one removes the
            file.
    """

    fd: int
    offset: int
    finish: Callable[[], object]
    check: Callable[[], Awaitable[object]] | None = None
    names: tuple[str, ...] = ()


class Save:
    """One save of a guest. However it ends, either the guest is in the file, or it continues as it
    was.

    Args:
        session: the connection to the guest.
        cookie: the guest's present cookie.
        file: the open file.
        reconnect: connects again after a broken connection.
    """

    def __init__(
        self,
        session: Session,
        cookie: Cookie,
        file: SaveTarget,
        reconnect: Callable[[], Awaitable[Session]],
    ) -> None:
        self._session = session
        self._cookie = cookie
        self._file = file
        self._reconnect = reconnect
        self._is_written = False

    async def run(self, progress: Progress | None) -> bool:
        """Save the guest; return whether QEMU has ended, as far as known. In both cases the guest
        is in the file.

        Raises:
            VcpuRefused: another process is saving the guest, or the guest has changed.
            VcpuFailed: the file could not be written.
            VcpuConnectionError: the connection to QEMU broke.
        """
        _begin(self._session, self._file, runs=self._cookie.runs)
        try:
            await self._write(progress)
            if self._file.check is not None:
                await self._file.check()
            await self._check_paused()
            await aio.finish(asyncio.to_thread(self._finish_file))
        except BaseException as error:
            if self._is_written:
                await aio.finish(self._end())
                raise
            found = await aio.finish(self._keep_guest(error))
            if found is error:
                raise
            raise found from error
        return await aio.finish(self._end())

    async def _write(self, progress: Progress | None) -> None:
        monitor = self._session.monitor
        await monitor.stop()
        if self._session.pending_unplugs.entity_ids:
            # A pending unplug may have finished before the guest was paused.
            check_same(self._cookie.machine, await self._session.read())
        qemu, file = self._session.state.qemu, self._file
        status = await sides.send_to_file(monitor, qemu, file.fd, file.offset, progress)
        if status.status != "completed":
            raise VcpuFailed(f"QEMU could not write it: {status.error or status.status}")

    async def _check_paused(self) -> None:
        try:
            is_paused = await _is_still_paused(self._session.monitor)
        except VcpuConnectionError:
            if not await sides.has_ended(self._session):
                raise
            # QEMU has ended, so the file has the only copy of the guest.
            return
        if not is_paused:
            raise VcpuFailed("another client let the guest run during the save", hint="save again")

    def _finish_file(self) -> None:
        self._file.finish()
        self._is_written = True

    async def _end(self) -> bool:
        """End the QEMU of the saved guest; return whether it has ended."""
        has_ended = await sides.end(self._session)
        if has_ended:
            forget(self._session)
        return has_ended

    async def _keep_guest(self, error: BaseException) -> BaseException:
        """Let the guest continue after a failed save; return the error for the caller."""
        state = "goes on" if self._cookie.runs else "is paused, as it was"
        if isinstance(error, VcpuConnectionError):
            if await self._bring_back():
                return VcpuConnectionError(
                    f"{error.message}; the guest {state}", reason=error.reason, hint="save again"
                )
            return VcpuConnectionError(
                error.message,
                reason=error.reason,
                hint="if the guest is still there, and paused, let it go on: migrate-cancel",
            )
        await self._go_on(self._session)
        if not isinstance(error, CommandError | OSError | VcpuFailed):
            return error
        why = error.strerror if isinstance(error, OSError) else str(error)
        hint = error.hint if isinstance(error, VcpuFailed) else None
        return VcpuFailed(
            f"{why}; the guest {state}", hint=hint or "look at the disk, and save again"
        )

    async def _go_on(self, session: Session) -> None:
        await sides.go_on(session, runs=self._cookie.runs)
        await _finish_record(session)

    async def _bring_back(self) -> bool:
        """Let the guest continue after the QMP connection broke; return whether it does. A QEMU
        that waits for a disk does not answer at first, but it will.
        """
        process, deadline = self._session.process, time.monotonic() + _BRING_BACK_SECONDS
        while process is not None and is_alive(process.key) and time.monotonic() < deadline:
            with suppress(VcpuError):
                await self._go_on(await self._reconnect())
                return True
            await asyncio.sleep(_LOOK)
        return False


# -- the record of a save, for the next process ----------------------------------------------------


def _saves() -> Saves | None:
    with suppress(RuntimeError):  # there is no home folder
        return Saves()
    return None


def _begin(session: Session, file: SaveTarget, *, runs: bool) -> None:
    """Store that this guest is about to be paused.

    Raises:
        VcpuRefused: another process is saving it.
    """
    saves, other = _saves(), paused_guest(session.process)
    if saves is None or session.process is None:
        return
    if other is not None and not other.is_here and not other.is_left:
        raise catalogue.SAVING.error(pid=pid_in(other.saver))
    with suppress(OSError):
        saves.keep(session.process, paused_by_us(file.fd, file.names, runs=runs))


def forget(session: Session) -> None:
    """Store that the guest is not being saved any more. QEMU's run state shows where it is."""
    saves = _saves()
    if saves is not None and session.process is not None:
        saves.forget(session.process)


async def _finish_record(session: Session) -> None:
    """Store that the guest is not being saved any more. If it was paused before the save, its run
    state is "postmigrate" now, which only `cont` would change; the record then says that it has not
    left.
    """
    saves = _saves()
    if saves is None or session.process is None:
        return
    if await run_state(session.monitor) == "postmigrate":
        saves.keep_here(session.process)
    else:
        saves.forget(session.process)


# -- recovery by the next process ------------------------------------------------------------------


async def recover(session: Session, guest: PausedGuest) -> str | None:
    """After a save was killed that had paused this guest, let the guest continue as it was, and
    remove the file. Return what was done, in words; None if there was nothing to do, or if it
    failed.

    Raises:
        VcpuConnectionError: the whole guest is in the file, and its QEMU was ended.
    """
    if guest.is_here:
        # The guest may have run since, which makes the record obsolete.
        await _finish_record(session)
        return None
    if guest.is_saved:
        await _end_saved(session, guest)
        return None
    try:
        was_paused = await _resume(session, guest)
    except (VcpuError, CommandError) as error:
        _LOGGER.info("a save was killed, and its guest cannot be let go on: %s", error)
        return None
    guest.remove_file()
    await _finish_record(session)
    if not was_paused:
        return None
    text = f"the guest, which a save that was killed had paused, {_done(guest)}"
    _LOGGER.info("%s", text)
    return text


async def _end_saved(session: Session, guest: PausedGuest) -> None:
    """End the QEMU of a guest whose save was killed after the file was complete."""
    try:
        is_paused = await _is_still_paused(session.monitor)
    except (VcpuError, CommandError) as error:
        _LOGGER.info("a save was killed, and its guest cannot be asked: %s", error)
        return
    if is_paused and not await sides.end(session):
        return
    forget(session)
    if is_paused:
        file = guest.files[-1]
        raise VcpuConnectionError(
            f"the guest is saved in '{file}', and its QEMU, which a save that was killed had left,"
            " was ended",
            reason="closed",
            hint=f"`qmpvcpu restore {shlex.quote(file)}`",
        )


async def cancel_save(session: Session) -> str | None:
    """If another running process is saving this guest, make that save fail and let the guest
    continue as it was. Return what was done, in words; None if the guest is not being saved.

    Raises:
        VcpuError: the guest could not be resumed.
    """
    found = paused_guest(session.process)
    if found is None or found.is_here or not await _resume(session, found):
        return None
    return f"the save was cancelled, and the guest {_done(found)}"


async def _is_still_paused(monitor: Monitor) -> bool:
    """Return whether the guest is still paused."""
    return await run_state(monitor) in _PAUSED


async def _resume(session: Session, guest: PausedGuest) -> bool:
    """Let the guest continue; return whether it was paused."""
    if (await sides.status_of(session.monitor)).is_active:
        await sides.stop_moving(session.monitor)
    was_paused = await _is_still_paused(session.monitor)
    if was_paused:
        await sides.go_on(session, runs=guest.runs)
    return was_paused


def _done(guest: PausedGuest) -> str:
    return "goes on" if guest.runs else "is paused, as it was"
