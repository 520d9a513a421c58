"""`save` and `restore`: a guest is written to a file, and started again from it."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qmpvcpu.aio import finish
from qmpvcpu.app.destination import FromFile, Where, open_destination
from qmpvcpu.app.migrate import nothing_left_of
from qmpvcpu.app.twin import HINT, Checked, check_readable, compare_with_twin, read_back
from qmpvcpu.core.machine.comparison import check_movable
from qmpvcpu.core.migration.cookie import Cookie
from qmpvcpu.core.migration.status import Progress
from qmpvcpu.core.migration.stream import StreamError, StreamTable, table_differences
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain import Domain
from qmpvcpu.domain.migration.saving import SaveTarget
from qmpvcpu.errors import Refusal, VcpuFailed, VcpuRefused
from qmpvcpu.host.process import pid_in
from qmpvcpu.host.rights import free_disk, free_memory
from qmpvcpu.host.savefile import SavedFile, Saving, open_saved
from qmpvcpu.host.saves import SavedDefinitions, Saves
from qmpvcpu.xml.cookie import read_cookie, write_cookie

#: Bytes of a saved guest besides its memory, and of a QEMU without a guest.
_REST_BYTES: Final = 16 << 20
_QEMU_BYTES: Final = 128 << 20


@dataclass(frozen=True, slots=True)
class Saved:
    """A guest in a file; `size` in bytes."""

    file: str
    size: int
    vcpus: tuple[int, ...]
    messages: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document of `save --json`."""
        return {
            "outcome": "applied",
            "changed": True,
            "file": self.file,
            "size": self.size,
            "vcpus": list(self.vcpus),
            "messages": list(self.messages),
        }


@dataclass(frozen=True, slots=True)
class Restored:
    """A guest that was started from a file; `runs` is False if it was paused when it was saved."""

    name: str
    qmp: tuple[str, ...]
    vcpus: tuple[int, ...]
    runs: bool
    messages: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document of `restore --json`."""
        return {
            "outcome": "applied",
            "changed": True,
            "domain": self.name,
            "qmp": list(self.qmp),
            "vcpus": list(self.vcpus),
            "running": self.runs,
            "messages": list(self.messages),
        }


async def save(
    source: Domain,
    file: str,
    *,
    wait: float = 0.0,
    force: bool = False,
    progress: Progress | None = None,
    verify: bool = False,
) -> Saved:
    """Save a guest to a file, and end its QEMU. An older file is replaced only once the new one is
    complete.

    Args:
        source: the guest's domain, connected.
        file: path of the file.
        wait: seconds for pending unplugs to end.
        force: also do what is known to hang a guest.
        progress: called with each fresh status.
        verify: a second QEMU reads the whole file before the first one ends.

    Raises:
        VcpuRefused: nothing was changed.
        VcpuFailed: the file could not be written, or does not hold the guest; the guest goes on,
            and an older file is unchanged.
        VcpuConnectionError: the connection to QEMU is lost.
    """
    cookie = await source.migration.begin(
        persistent=source.has_definition, wait=wait, force=force, is_paused=True
    )
    table = await _check_save(source, file, cookie, verify=verify)
    written = write_cookie(cookie)
    # A cookie that could not be read again is reported before the guest is paused.
    read_cookie(written)
    try:
        saving = await finish(
            asyncio.to_thread(Saving, Path(file), written), discard=Saving.discard
        )
    except OSError as error:
        raise catalogue.FILE_NOT_WRITTEN.error(file=file, error=error) from error
    size = 0

    def finished() -> None:
        nonlocal size
        size = saving.finish()

    into = SaveTarget(
        saving.fd,
        saving.offset,
        finished,
        lambda: _check_saved(saving, cookie, table, verify),
        (saving.temporary, saving.path),
    )
    try:
        async with nothing_left_of(source, lambda: size > 0):
            has_ended = await source.migration.save(cookie, into, progress, force=force)
    finally:
        saving.discard()
    slots = cookie.machine.slots if cookie.machine is not None else ()
    vcpus = tuple(sorted(n for slot in slots if slot.plugged for n in slot.ids))
    still = "QEMU was asked to quit, and may still run, with the guest paused: do not resume it"
    return Saved(file, size, vcpus, () if has_ended else (still,))


async def _check_save(
    source: Domain, file: str, cookie: Cookie, *, verify: bool
) -> StreamTable | None:
    """Check everything that could prevent a save, before the guest is paused; returns what its
    twin's stream lists.

    Raises:
        VcpuRefused: it cannot be saved; the error has every reason of one kind.
    """
    machine = None if cookie.is_described else cookie.machine
    memory = await source.migration.memory_in_use() or 0
    second = (_QEMU_BYTES if machine is not None else 0) + (memory if verify else 0)
    if refusals := _check_room(Path(file), memory + _REST_BYTES, second, verify=verify):
        raise VcpuRefused(refusals)
    if machine is None:
        # It has no definition: `restore` starts it in a QEMU that the user names.
        if verify:
            raise catalogue.VERIFY_UNDEFINED.error()
        checked = Checked(check_movable(cookie.picture) if cookie.picture is not None else [])
    else:
        if verify and (refusals := check_readable(cookie.xml)):
            raise VcpuRefused(refusals)
        checked = await compare_with_twin(source, cookie.xml, machine.type, with_table=True)
    if checked.refusals:
        raise VcpuRefused(checked.refusals)
    return checked.table


def _check_room(file: Path, size: int, second: int, *, verify: bool) -> list[Refusal]:
    """Refusals if there is no room for a file of `size` bytes, or for a second QEMU of `second`
    bytes.
    """
    found = []
    disk, memory = free_disk(Path(os.path.realpath(file)).parent), free_memory()
    if disk is not None and disk < size:
        found.append(catalogue.NO_DISK(file=file, size=size >> 20, left=disk >> 20))
    if memory is not None and memory < second:
        reason = catalogue.NO_MEMORY_TO_VERIFY if verify else catalogue.NO_MEMORY_TO_COMPARE
        found.append(reason(size=second >> 20, left=memory >> 20))
    return found


async def _check_saved(
    saving: Saving, cookie: Cookie, table: StreamTable | None, verify: bool
) -> None:
    """Sync what QEMU wrote, compare it with the twin's `table`, and write its digest into its
    header.

    Raises:
        VcpuFailed: it is another machine, or a second QEMU cannot read it.
        OSError: it cannot be written to the disk.
    """
    await finish(asyncio.to_thread(saving.sync))
    try:
        there = await finish(asyncio.to_thread(saving.table))
    except StreamError as error:
        raise VcpuFailed(
            f"what QEMU has written is incomplete: {error}",
            hint="look at QEMU's log",
        ) from error
    if table is not None and (found := table_differences(there, table)):
        raise VcpuFailed(f"what QEMU has written is another machine: {'; '.join(found)}", hint=HINT)
    await finish(asyncio.to_thread(saving.seal), on_cancel=saving.give_up)
    if verify and cookie.machine is not None:
        with saving.opened() as fd:
            os.lseek(fd, saving.offset, os.SEEK_SET)
            await read_back(cookie.xml, cookie.machine.type, fd, saving.offset)
    if not cookie.is_described and cookie.machine is not None and saving.digest is not None:
        await finish(asyncio.to_thread(SavedDefinitions().keep, saving.digest, cookie.xml))


async def restore(file: str, where: Where) -> Restored:
    """Start a saved guest again, with exactly its vCPUs and pending unplugs; the file stays.

    Args:
        file: a file that `save` has written.
        where: the destination, as for `migrate`; by default the guest's own name.

    Raises:
        VcpuRefused: the file is not a complete guest, or the guest runs already, or the destination
            cannot take it.
        VcpuFailed: QEMU could not read it. The file is unchanged.
    """
    given_up = threading.Event()
    saved = await finish(
        asyncio.to_thread(open_saved, file, given_up),
        on_cancel=given_up.set,
        discard=SavedFile.close,
    )
    try:
        if (still := Saves().into(saved.fd)) is not None:
            raise catalogue.STILL_EXISTS.error(file=file, pid=pid_in(still))
        cookie = read_cookie(saved.cookie)
        known = await finish(asyncio.to_thread(SavedDefinitions().kept, saved.digest))
        async with open_destination(where, cookie, FromFile(known)) as target:
            await target.prepare(cookie, place=where.place)

            def reported(runs: bool) -> None:
                target.is_kept = runs

            cookie = target.cookie or cookie
            state = await target.domain.migration.restore(cookie, saved.fd, saved.offset, reported)
            target.is_kept = True
            messages = [*target.messages]
            if saved.digest is None:
                messages.append(f"'{file}' has no digest: a change of it could not be noticed")
            if not target.is_defined:
                messages += target.define(cookie, persistent=cookie.persistent is not None)
            return Restored(
                target.name, target.qmp, state.enabled_ids, cookie.runs, tuple(messages)
            )
    finally:
        saved.close()
