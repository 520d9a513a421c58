"""A guest that is paused to be saved, and what becomes of it where the process that saves it is killed: the next
one that connects to the guest lets it go on, or ends it where all of it is in the file.
"""

from __future__ import annotations

import logging
import shlex
from contextlib import suppress
from typing import Final

from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain.reader import run_state
from qmpvcpu.domain.session import Link
from qmpvcpu.errors import VcpuConnectionError, VcpuError
from qmpvcpu.host.process import pid_in
from qmpvcpu.host.saves import PausedGuest, Saves, paused_by_us
from qmpvcpu.ports import CommandError, Monitor

__all__ = ["begin", "cancel_save", "forget", "is_still_paused", "let_go_on", "settle"]

_LOGGER: Final = logging.getLogger(__name__)
#: QAPI RunState of a guest that was paused to be saved.
_PAUSED: Final = frozenset({"paused", "postmigrate", "finish-migrate"})


def _saves() -> Saves | None:
    with suppress(RuntimeError):  # no home folder
        return Saves()
    return None


def begin(link: Link, fd: int, files: tuple[str, ...], *, runs: bool) -> None:
    """Remember that this guest is about to be paused; `files` are the names that the file `fd` can have.

    Raises:
        VcpuRefused: another process is saving it.
    """
    saves = _saves()
    if saves is None or link.process is None:
        return
    other = saves.kept(link.process)
    if other is not None and not other.is_here and not other.is_left:
        raise catalogue.SAVING.error(pid=pid_in(other.saver))
    with suppress(OSError):
        saves.keep(link.process, paused_by_us(fd, files, runs=runs))


def forget(link: Link) -> None:
    """It is not being saved any more, and QEMU's run state says where it is."""
    saves = _saves()
    if saves is not None and link.process is not None:
        saves.forget(link.process)


async def settle(link: Link) -> None:
    """It is not being saved any more. One that was paused before, and is "postmigrate" now, stays here: only
    `cont` would change that state.
    """
    saves = _saves()
    if saves is None or link.process is None:
        return
    if await run_state(link.monitor) == "postmigrate":
        saves.keep_here(link.process)
    else:
        saves.forget(link.process)


def _saving(link: Link) -> PausedGuest | None:
    """What is known of a save that has paused this guest."""
    saves = _saves()
    return saves.kept(link.process) if saves is not None and link.process is not None else None


async def is_still_paused(monitor: Monitor) -> bool:
    """Whether nobody has let the guest run since it was paused."""
    return await run_state(monitor) in _PAUSED


async def let_go_on(link: Link) -> str | None:
    """If a save was killed while it had this guest paused, the guest goes on as it was, and the file is taken
    away. What was done, in words; None where there was nothing to do, or it could not be done.

    Raises:
        VcpuConnectionError: all of the guest is in the file, and its QEMU was ended.
    """
    found = _saving(link)
    if found is None or not found.is_left:
        return None
    if found.is_here:
        # It may have run since.
        await settle(link)
        return None
    if found.is_saved:
        await _end(link, found)
        return None
    try:
        was_paused = await _resume(link, found)
    except (VcpuError, CommandError) as error:
        _LOGGER.info("a save was killed, and its guest cannot be let go on: %s", error)
        return None
    found.remove_file()
    await settle(link)
    if not was_paused:
        return None
    text = f"the guest, which a save that was killed had paused, {_done(found)}"
    _LOGGER.info("%s", text)
    return text


async def _end(link: Link, guest: PausedGuest) -> None:
    """The save was made, but for the end of its QEMU."""
    from qmpvcpu.domain.migration.phases import end

    try:
        is_paused = await is_still_paused(link.monitor)
    except (VcpuError, CommandError) as error:
        _LOGGER.info("a save was killed, and its guest cannot be asked: %s", error)
        return
    if is_paused and not await end(link):
        return
    forget(link)
    if is_paused:
        file = guest.files[-1]
        raise VcpuConnectionError(
            f"the guest is saved in '{file}', and its QEMU, which a save that was killed had left, was ended",
            reason="closed",
            hint=f"`qmpvcpu restore {shlex.quote(file)}`",
        )


async def cancel_save(link: Link) -> str | None:
    """If a process that is there is saving this guest, the guest goes on as it was, and that save fails. What was
    done, in words; None where nobody saves it.

    Raises:
        VcpuError: it could not be done.
    """
    found = _saving(link)
    if found is None or found.is_here or not await _resume(link, found):
        return None
    return f"the save was cancelled, and the guest {_done(found)}"


async def _resume(link: Link, guest: PausedGuest) -> bool:
    """Whether it was paused."""
    # Loaded here: every connection looks whether there is something to do, and there rarely is.
    from qmpvcpu.domain.migration.phases import go_on, status_of, stop_moving

    if (await status_of(link.monitor)).is_active:
        await stop_moving(link.monitor)
    was_paused = await is_still_paused(link.monitor)
    if was_paused:
        await go_on(link, runs=guest.runs)
    return was_paused


def _done(guest: PausedGuest) -> str:
    return "goes on" if guest.runs else "is paused, as it was"
