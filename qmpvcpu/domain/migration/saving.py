"""A guest goes into a file: it is paused, written, and its QEMU ends; or it goes on as it was.

Where the process that saves it is killed, the next one that connects to the guest lets it go on, or ends its QEMU
where all of the guest is in the file.
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
from qmpvcpu.core.migration.cookie import Cookie
from qmpvcpu.core.migration.machines import check_same
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
#: QAPI RunState of a guest that was paused to be saved.
_PAUSED: Final = frozenset({"paused", "postmigrate", "finish-migrate"})
#: Seconds a QEMU that was lost while it saved has to come back, and between two looks.
_BRING_BACK_SECONDS: Final = 60.0
_LOOK: Final = 0.05


@dataclass(frozen=True, slots=True)
class SaveTarget:
    """A file that a guest is saved in.

    Attributes:
        fd: opened to write, and standing at `offset`.
        offset: bytes; where QEMU's stream begins.
        finish: makes the file last, and raises OSError where it cannot; it may block.
        check: awaited before `finish`, once all is written; raises OSError or VcpuFailed where it is not good.
        names: that the file can have. Should this process be killed, the next one takes it away.
    """

    fd: int
    offset: int
    finish: Callable[[], object]
    check: Callable[[], Awaitable[object]] | None = None
    names: tuple[str, ...] = ()


class Save:
    """One guest on its way into a file. However it ends, the guest is in the file, or it goes on as it was.

    Args:
        session: of the guest.
        cookie: of the guest, as it is now.
        file: open.
        reconnect: after a lost connection.
    """

    def __init__(
        self, session: Session, cookie: Cookie, file: SaveTarget, reconnect: Callable[[], Awaitable[Session]]
    ) -> None:
        self._session = session
        self._cookie = cookie
        self._file = file
        self._reconnect = reconnect
        self._is_written = False

    async def run(self, progress: Progress | None) -> bool:
        """Whether QEMU has ended, as far as can be told; the guest is in the file in any case.

        Raises:
            VcpuRefused: another process saves it, or it has changed.
            VcpuFailed: it could not be written.
            VcpuConnectionError: QEMU is lost.
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
        if self._session.pending_unplugs.firsts:
            # What was pending may have ended until now.
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
            # All that there is of the guest is in the file.
            return
        if not is_paused:
            raise VcpuFailed("somebody has let the guest run while it was being saved", hint="save again")

    def _finish_file(self) -> None:
        self._file.finish()
        self._is_written = True

    async def _end(self) -> bool:
        """The guest is in the file: its QEMU ends; whether it has."""
        has_ended = await sides.end(self._session)
        if has_ended:
            forget(self._session)
        return has_ended

    async def _keep_guest(self, error: BaseException) -> BaseException:
        """The guest is not saved after all, and goes on; what its caller gets."""
        state = "goes on" if self._cookie.runs else "is paused, as it was"
        if isinstance(error, VcpuConnectionError):
            if await self._bring_back():
                text = f"{error.message}; the guest {state}"
                return VcpuConnectionError(text, reason=error.reason, hint="save again")
            return VcpuConnectionError(
                error.message,
                reason=error.reason,
                hint="the guest may be there, and paused: migrate-cancel lets it go on",
            )
        await self._go_on(self._session)
        if not isinstance(error, CommandError | OSError | VcpuFailed):
            return error
        why = error.strerror if isinstance(error, OSError) else str(error)
        hint = error.hint if isinstance(error, VcpuFailed) else None
        return VcpuFailed(f"{why}; the guest {state}", hint=hint or "look at the disk, and save again")

    async def _go_on(self, session: Session) -> None:
        await sides.go_on(session, runs=self._cookie.runs)
        await _finish_record(session)

    async def _bring_back(self) -> bool:
        """After QMP was lost: let the guest go on; whether it does. A QEMU that waits for a disk does not answer,
        and will.
        """
        process, deadline = self._session.process, time.monotonic() + _BRING_BACK_SECONDS
        while process is not None and is_alive(process.key) and time.monotonic() < deadline:
            with suppress(VcpuError):
                await self._go_on(await self._reconnect())
                return True
            await asyncio.sleep(_LOOK)
        return False


# -- the record of it, for the next process ------------------------------------------------------------


def _saves() -> Saves | None:
    with suppress(RuntimeError):  # no home folder
        return Saves()
    return None


def _begin(session: Session, file: SaveTarget, *, runs: bool) -> None:
    """Remember that this guest is about to be paused.

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
    """It is not being saved any more, and QEMU's run state says where it is."""
    saves = _saves()
    if saves is not None and session.process is not None:
        saves.forget(session.process)


async def _finish_record(session: Session) -> None:
    """It is not being saved any more. One that was paused before, and is "postmigrate" now, stays here: only
    `cont` would change that state.
    """
    saves = _saves()
    if saves is None or session.process is None:
        return
    if await run_state(session.monitor) == "postmigrate":
        saves.keep_here(session.process)
    else:
        saves.forget(session.process)


# -- by the next process -------------------------------------------------------------------------------


async def recover(session: Session, guest: PausedGuest) -> str | None:
    """A save was killed while it had this guest paused: the guest goes on as it was, and the file is taken away.
    What was done, in words; None where there was nothing to do, or it could not be done.

    Raises:
        VcpuConnectionError: all of the guest is in the file, and its QEMU was ended.
    """
    if guest.is_here:
        # It may have run since.
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
    """The save was made, but for the end of its QEMU."""
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
            f"the guest is saved in '{file}', and its QEMU, which a save that was killed had left, was ended",
            reason="closed",
            hint=f"`qmpvcpu restore {shlex.quote(file)}`",
        )


async def cancel_save(session: Session) -> str | None:
    """If a process that is there is saving this guest, the guest goes on as it was, and that save fails. What was
    done, in words; None where nobody saves it.

    Raises:
        VcpuError: it could not be done.
    """
    found = paused_guest(session.process)
    if found is None or found.is_here or not await _resume(session, found):
        return None
    return f"the save was cancelled, and the guest {_done(found)}"


async def _is_still_paused(monitor: Monitor) -> bool:
    """Whether nobody has let the guest run since it was paused."""
    return await run_state(monitor) in _PAUSED


async def _resume(session: Session, guest: PausedGuest) -> bool:
    """Whether it was paused."""
    if (await sides.status_of(session.monitor)).is_active:
        await sides.stop_moving(session.monitor)
    was_paused = await _is_still_paused(session.monitor)
    if was_paused:
        await sides.go_on(session, runs=guest.runs)
    return was_paused


def _done(guest: PausedGuest) -> str:
    return "goes on" if guest.runs else "is paused, as it was"
