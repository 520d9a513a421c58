"""`migrate` and its phases as a user has them: destinations by name or address, started where they do not run."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qmpvcpu.aio import finish
from qmpvcpu.app.definitions import undefine
from qmpvcpu.app.probes import ProbeMode
from qmpvcpu.app.start import clean_up, launch_waiting, remove_ended
from qmpvcpu.app.trust import Startable, of_file, of_user
from qmpvcpu.app.twin import HINT, Checked, check_held, check_readable, check_sides, compare_with_twin, read_back
from qmpvcpu.core.machine.comparison import check_movable
from qmpvcpu.core.migration.cookie import Cookie
from qmpvcpu.core.migration.status import MigrationStatus, Progress, last_words
from qmpvcpu.core.migration.stream import StreamError, StreamTable, table_differences
from qmpvcpu.core.model import DomainState
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain import Domain, connect
from qmpvcpu.domain.migration.move import Migrated
from qmpvcpu.domain.migration.ownership import is_present, recall_source
from qmpvcpu.errors import Refusal, VcpuFailed, VcpuRefused, VcpuUsageError
from qmpvcpu.host.definition_files import Addresses, DefinitionFolder, check_name
from qmpvcpu.host.files import read_file, read_stream
from qmpvcpu.host.ownership import Role
from qmpvcpu.host.process import pid_in
from qmpvcpu.host.room import free_disk, free_memory
from qmpvcpu.host.runtime import Runtime
from qmpvcpu.host.savefile import SavedFile, Saving, open_saved
from qmpvcpu.host.saves import SavedDefinitions, Saves
from qmpvcpu.xml.cookie import read_cookie, write_cookie
from qmpvcpu.xml.document import read_domain, renamed

__all__ = [
    "Prepared",
    "cookie_text",
    "describe_status",
    "load_cookie",
    "migrate",
    "migrate_cancel",
    "migrate_finish",
    "migrate_prepare",
    "restore",
    "save",
]

#: What a cookie may have: two domains of 8 MiB.
_LIMIT = 17 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Prepared:
    """A destination that waits; `uri` is what the source is told."""

    name: str
    uri: str
    qmp: tuple[str, ...]
    vcpus: tuple[int, ...]
    messages: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document of `migrate-prepare --json`."""
        return {
            "outcome": "applied",
            "changed": True,
            "domain": self.name,
            "uri": self.uri,
            "qmp": list(self.qmp),
            "vcpus": list(self.vcpus),
            "messages": list(self.messages),
        }


@dataclass(slots=True)
class _Place:
    """A destination: `domain` to connect to, and whether we have started it for this. `is_kept`: it must not be
    ended any more. `cookie` is that of what was started, and may be defined.
    """

    domain: Domain
    name: str
    is_name: bool
    is_ours: bool
    qmp: tuple[str, ...]
    messages: tuple[str, ...] = ()
    is_kept: bool = False
    cookie: Cookie | None = None


def cookie_text(cookie: Cookie) -> str:
    """As XML."""
    return write_cookie(cookie).decode()


def load_cookie(path: str) -> Cookie:
    """From a file; `-` is standard input.

    Raises:
        VcpuRefused: it is not there, or is no cookie.
    """
    try:
        data = read_stream(sys.stdin.fileno(), _LIMIT) if path == "-" else read_file(path, _LIMIT, with_pipes=True)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise catalogue.COOKIE_NOT_READ.error(path=path, why=why) from error
    if len(data) > _LIMIT:
        raise catalogue.COOKIE_TOO_LONG.error(path=path, most=_LIMIT)
    return read_cookie(data)


@asynccontextmanager
async def _destination(
    dest: str | None,
    cookie: Cookie,
    mode: ProbeMode,
    *,
    place: bool,
    timeout: float,
    agent: str | None = None,
    startable: Callable[[str], Awaitable[Startable]] | None = None,
) -> AsyncIterator[_Place]:
    """The destination that a word means (none: the guest's own name), connected; one that does not run is started,
    and ended if this fails. `agent` is the address of the guest's agent there, where the word does not tell it.
    `startable` says what it is started of, given its name, where the cookie comes from a file.
    """
    word = dest if dest is not None else cookie.name
    if dest is not None and not _is_name(dest):
        async with connect(word, agent=agent) as domain:
            yield _Place(domain, word, is_name=False, is_ours=False, qmp=(word,))
        return
    refusal = check_name(word)
    if refusal is not None:
        raise VcpuRefused([refusal])
    _check_same(word, cookie)
    runtime = Runtime(word)
    if runtime.pid() is None and not await _runs(word):
        if cookie.is_described:
            raise catalogue.SOURCE_NOT_DESCRIBED.error(name=word)
        start = await startable(word) if startable is not None else of_user(cookie)
        cookie = start.cookie
        place_there: _Place | None = None
        source_runs = is_present(cookie, Role.SOURCE)
        if source_runs and (refusals := check_held(cookie)):
            raise VcpuRefused(refusals)
        machine = cookie.machine.type if cookie.machine is not None else None
        launched = await launch_waiting(
            word,
            cookie.xml,
            machine,
            mode=mode,
            timeout=timeout,
            place=place,
            source_runs=source_runs,
            devices=start.devices,
        )
        try:
            async with connect(qmp=runtime.qmp, agent=agent or runtime.agent, xml=_file(word)) as domain:
                notes = await domain.place(start.definable.xml) if place else []
                messages = (*start.messages, *launched.messages, *notes)
                place_there = _Place(
                    domain,
                    word,
                    is_name=True,
                    is_ours=True,
                    qmp=runtime.qmp,
                    messages=messages,
                    cookie=start.definable,
                )
                yield place_there
        except BaseException as error:
            if place_there is None or not place_there.is_kept:
                await clean_up(word)
            said = last_words(runtime.said(4000))
            if isinstance(error, VcpuFailed) and said and error.qmp_text is None:
                raise _with_words(error, said) from error
            raise
        return
    async with connect(word, agent=agent) as domain:
        yield _Place(domain, word, is_name=True, is_ours=runtime.pid() is not None, qmp=runtime.qmp)


def _startable(cookie: Cookie, kept: bytes | None) -> Callable[[str], Awaitable[Startable]]:
    """What a destination is started of whose cookie was read from a file; `kept` as of `of_file`."""

    async def of_name(name: str) -> Startable:
        return await of_file(cookie, (name, cookie.name), kept)

    return of_name


def _with_words(error: VcpuFailed, said: str) -> VcpuFailed:
    """The same with what the destination's QEMU said."""
    text = f"{error.message}; the destination's QEMU said: {said}"
    found = VcpuFailed(text, hint=error.hint, qmp_class=error.qmp_class, qmp_text=said)
    found.messages = error.messages
    return found


def _is_name(word: str) -> bool:
    """Of a destination; else it is an address."""
    return "/" not in word and ":" not in word


def _check_same(name: str, cookie: Cookie) -> None:
    """A name that stands for another domain is not for this one."""
    folder = DefinitionFolder()
    if not folder.is_defined(name):
        return
    defined = read_domain(folder.file(name).read())[1]
    if defined.uuid != cookie.uuid:
        raise catalogue.ANOTHER_DOMAIN.error(name=name, defined=defined.uuid, uuid=cookie.uuid)


def _file(name: str) -> str | None:
    folder = DefinitionFolder()
    return folder.file(name).place if folder.is_defined(name) else None


async def _runs(name: str) -> bool:
    if not DefinitionFolder().is_defined(name):
        return False
    async with connect(name) as domain:
        return domain.is_active


def _host_of(word: str) -> str | None:
    """Of an address host:port."""
    return word.rpartition(":")[0].strip("[]") or None if "/" not in word and ":" in word else None


def _check_words(dest: str, *, persistent: bool) -> None:
    if persistent and ("/" in dest or ":" in dest):
        raise VcpuUsageError(
            f"--persistent needs a name for the definition, and '{dest}' is an address",
            hint="name the destination, or leave out --persistent and define it there",
        )


def _define(place: _Place, cookie: Cookie, *, persistent: bool) -> list[str]:
    """A destination by name is defined from now on."""
    folder = DefinitionFolder()
    if not place.is_name or (not persistent and folder.is_defined(place.name)):
        return []
    known = Addresses()
    if folder.is_defined(place.name):
        known = folder.addresses(place.name)
    xml = cookie.persistent if persistent and cookie.persistent is not None else cookie.xml
    folder.define(place.name, renamed(xml, place.name), known)
    return [] if persistent else [f"'{place.name}' is defined as it runs: its name would not be known otherwise"]


async def migrate(
    source: Domain,
    dest: str,
    *,
    dest_agent: str | None = None,
    persistent: bool = False,
    undefine_source: bool = False,
    wait: float = 0.0,
    uri: str | None = None,
    bandwidth: int | None = None,
    timeout: float | None = None,
    progress: Progress | None = None,
    place: bool = True,
    mode: ProbeMode = ProbeMode.AUTO,
    start_timeout: float = 30.0,
    force: bool = False,
    at_destination: Callable[[], None] | None = None,
) -> Migrated:
    """Take a guest to `dest`, and verify it there.

    Args:
        source: connected.
        dest: a name, which is started here if it does not run, or a QMP address of a QEMU that waits.
        dest_agent: address of the guest's agent there; one that is started here has its own.
        persistent: its definition goes too, under the name `dest`.
        undefine_source: the source's definition is forgotten.
        wait: seconds for pending unplugs to end.
        uri, bandwidth, timeout, progress: as `Domain.migrate`.
        place: False leaves the destination's threads where the kernel puts them.
        mode: when a throwaway QEMU may be asked for the destination's topology.
        start_timeout: seconds for the destination's machine to stand.
        force: do what is known to hang.
        at_destination: called when the guest runs there, or may, whatever comes then.

    Raises:
        VcpuError: as `Domain.migrate`.
    """
    _check_words(dest, persistent=persistent)
    if dest == source.name:
        raise catalogue.SAME_NAME.error(name=dest)
    if undefine_source and not source.has_definition:
        raise catalogue.NOTHING_TO_UNDEFINE.error()
    with_agents = dest_agent is not None or _is_name(dest)
    cookie = await source.migrate_begin(persistent=persistent, wait=wait, force=force, with_agents=with_agents)
    async with _destination(dest, cookie, mode, place=place, timeout=start_timeout, agent=dest_agent) as target:
        found = await check_sides(cookie, target.domain, with_disks=target.is_name)
        await target.domain.migration.prepare(cookie, place=place, differences=found)
        messages: list[str] = []

        def settled() -> None:
            target.is_kept = True
            try:
                messages.extend(_define(target, cookie, persistent=persistent))
            except VcpuRefused as error:
                messages.append(f"the destination is not defined: {error.message}")
            if at_destination is not None:
                at_destination()

        async with _nothing_left_of(source, lambda: target.is_kept):
            done = await source.migrate(
                target.domain,
                cookie,
                uri=uri,
                host=_host_of(dest),
                bandwidth=bandwidth,
                timeout=timeout,
                progress=progress,
                force=force,
                settled=settled,
            )
    # From here on the guest runs there, and nothing may look as if it did not.
    messages = [*target.messages, *done.messages, *messages]
    try:
        if undefine_source:
            undefine(source.name)
    except VcpuRefused as error:
        messages.append(f"the source is still defined: {error.message}")
    return Migrated(done.vcpus, done.status, tuple(messages), done.seconds)


@asynccontextmanager
async def _nothing_left_of(source: Domain, has_left: Callable[[], bool]) -> AsyncIterator[None]:
    """The body takes the guest away: its QEMU, folder and cgroups go then. If the body fails when the guest
    `has_left`, they go where that QEMU has ended.
    """
    is_ours = source.has_definition and check_name(source.name) is None
    try:
        yield
    except BaseException:
        if is_ours:
            await finish(asyncio.to_thread(remove_ended, source.name, is_ending=has_left()))
        raise
    if is_ours:
        await clean_up(source.name)


def _default_uri(place: _Place, host: str | None) -> str:
    """Where a destination listens if nobody says it: beside its QMP socket, which its QEMU can write to."""
    return f"tcp:{host}:0" if host is not None else f"unix:{os.path.abspath(place.qmp[0])}.migrate"  # noqa: PTH100


async def migrate_prepare(
    cookie: Cookie, dest: str | None, *, uri: str | None, place: bool, mode: ProbeMode, timeout: float
) -> Prepared:
    """Start or check a destination, plug its vCPUs, and let it listen.

    Raises:
        VcpuError: as `Domain.migrate_prepare`; a QEMU that was started for it is ended.
    """
    startable = _startable(cookie, recall_source(cookie))
    async with _destination(dest, cookie, mode, place=place, timeout=timeout, startable=startable) as target:
        is_near = target.is_name and is_present(cookie, Role.SOURCE)
        found = await check_sides(cookie, target.domain, with_disks=is_near)
        await target.domain.migration.prepare(target.cookie or cookie, place=place, differences=found)
        host = _host_of(dest) if dest is not None else None
        # One that listens everywhere is reached by its host's name, as libvirt's are.
        reached = host or socket.gethostname()
        where = await target.domain.migrate_listen(uri, reached, _default_uri(target, host))
        state = await target.domain.state()
        return Prepared(target.name, where, target.qmp, state.enabled_ids, target.messages)


async def migrate_finish(dest: str, cookie: Cookie | None, *, force: bool = False) -> tuple[DomainState, bool]:
    """Verify a destination, and let it run; its vCPUs, and whether it runs, as it did at the source.

    Args:
        dest: its name, or its QMP address.
        cookie: None is the one that it was prepared with, on this host.
        force: also where another side has taken the guest.

    Raises:
        VcpuError: as `Domain.migrate_finish`.
    """
    async with connect(dest) as domain:
        given = cookie
        cookie = cookie if cookie is not None else await domain.migrate_cookie()
        state = await domain.migrate_finish(cookie, force=force)
    is_name = check_name(dest) is None and ":" not in dest
    place = _Place(domain, dest, is_name=is_name, is_ours=False, qmp=())
    with suppress(VcpuRefused):
        # What this destination was prepared with was looked at then.
        may = of_user(cookie) if given is None else await _startable(cookie, recall_source(cookie))(dest)
        _define(place, may.definable, persistent=may.definable.persistent is not None)
    return state, cookie.runs


async def migrate_cancel(domain: Domain, *, force: bool = False) -> str:
    """`Domain.migrate_cancel`, and what is left of a destination that we have started.

    Raises:
        VcpuError: as `Domain.migrate_cancel`.
    """
    async with domain:
        done = await domain.migrate_cancel(force=force)
    if check_name(domain.name) is None and Runtime(domain.name).pid() is None:
        await clean_up(domain.name)
    return done


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
    """A guest that was in a file, and runs now (unless it did not when it was saved)."""

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
    """Save a guest to a file, and end its QEMU. What was in the file is there until the new one is whole.

    Args:
        source: connected.
        file: path of the file.
        wait: seconds for pending unplugs to end.
        force: do what is known to hang.
        progress: told each fresh status.
        verify: a second QEMU reads the whole file before the first one ends.

    Raises:
        VcpuRefused: nothing was touched.
        VcpuFailed: it could not be written, or it is not the guest; the guest goes on, and the file is as it was.
        VcpuConnectionError: QEMU is lost.
    """
    cookie = await source.migrate_begin(persistent=source.has_definition, wait=wait, force=force, is_paused=True)
    machine = cookie.machine
    is_defined = not cookie.is_described and machine is not None
    memory = await source.memory_in_use() or 0
    second = (_QEMU_BYTES if is_defined else 0) + (memory if verify else 0)
    if refusals := _check_room(Path(file), memory + _REST_BYTES, second, verify=verify):
        raise VcpuRefused(refusals)
    if verify and not is_defined:
        raise catalogue.VERIFY_UNDEFINED.error()
    checked = Checked(check_movable(cookie.picture) if cookie.picture is not None else [])
    if machine is not None and is_defined:
        # Without a definition, who restores it names a QEMU of his own.
        if verify and (refusals := check_readable(cookie.xml)):
            raise VcpuRefused(refusals)
        checked = await compare_with_twin(source, cookie.xml, machine.type, with_table=True)
    if checked.refusals:
        raise VcpuRefused(checked.refusals)
    written = write_cookie(cookie)
    # What cannot be read again is told before the guest is paused.
    read_cookie(written)
    try:
        saving = await finish(asyncio.to_thread(Saving, Path(file), written), discard=Saving.discard)
    except OSError as error:
        raise catalogue.FILE_NOT_WRITTEN.error(file=file, error=error) from error
    size = 0

    def finished() -> None:
        nonlocal size
        size = saving.finish()

    async def check() -> None:
        await _check_saved(saving, checked.table)
        if verify and machine is not None:
            await _read_back(saving, cookie.xml, machine.type)
        if is_defined and saving.digest is not None:
            await finish(asyncio.to_thread(SavedDefinitions().keep, saving.digest, cookie.xml))

    try:
        async with _nothing_left_of(source, lambda: size > 0):
            has_ended = await source.save(
                cookie,
                saving.fd,
                saving.offset,
                finished,
                progress,
                force=force,
                check=check,
                files=(saving.temporary, saving.path),
            )
    finally:
        saving.discard()
    slots = machine.slots if machine is not None else ()
    vcpus = tuple(sorted(n for slot in slots if slot.plugged for n in slot.ids))
    messages = () if has_ended else ("QEMU was told to end, and may still be there, paused: do not let it run",)
    return Saved(file, size, vcpus, messages)


#: Bytes for what a saved guest has besides its memory, and for a QEMU without a guest.
_REST_BYTES: Final = 16 << 20
_QEMU_BYTES: Final = 128 << 20


def _check_room(file: Path, size: int, second: int, *, verify: bool) -> list[Refusal]:
    """Whether a file of `size` and a `second` QEMU of so many bytes have room, before the guest is paused."""
    found = []
    disk, memory = free_disk(Path(os.path.realpath(file)).parent), free_memory()
    if disk is not None and disk < size:
        found.append(catalogue.NO_DISK(file=file, size=size >> 20, left=disk >> 20))
    if memory is not None and memory < second:
        reason = catalogue.NO_MEMORY_TO_VERIFY if verify else catalogue.NO_MEMORY_TO_COMPARE
        found.append(reason(size=second >> 20, left=memory >> 20))
    return found


async def _check_saved(saving: Saving, table: StreamTable | None) -> None:
    """What QEMU wrote is on the disk, and is the machine of its definition (`table`); its digest is in its header.

    Raises:
        VcpuFailed: it is not.
        OSError: the disk declines.
    """
    await finish(asyncio.to_thread(saving.sync))
    try:
        there = await finish(asyncio.to_thread(saving.table))
    except StreamError as error:
        raise VcpuFailed(
            f"what QEMU has written is not a whole guest: {error}", hint="look at QEMU's log"
        ) from error
    if table is not None and (found := table_differences(there, table)):
        raise VcpuFailed(f"what QEMU has written is another machine: {'; '.join(found)}", hint=HINT)
    await finish(asyncio.to_thread(saving.seal), on_cancel=saving.give_up)


async def _read_back(saving: Saving, xml: bytes, machine: str) -> None:
    with saving.opened() as fd:
        os.lseek(fd, saving.offset, os.SEEK_SET)
        await read_back(xml, machine, fd, saving.offset)


async def restore(
    file: str,
    dest: str | None = None,
    *,
    place: bool = True,
    mode: ProbeMode = ProbeMode.AUTO,
    timeout: float = 30.0,
) -> Restored:
    """Start a saved guest again, with exactly its vCPUs and pending unplugs; the file stays.

    Args:
        file: what `save` has written.
        dest: as of `migrate`; the guest's own name, if it is not said.
        place: False leaves its threads where the kernel puts them.
        mode: when a throwaway QEMU may be asked.
        timeout: seconds for its machine to stand.

    Raises:
        VcpuRefused: it is no whole guest, or runs already, or the destination cannot take it.
        VcpuFailed: QEMU could not read it. The file is as it was.
    """
    given_up = threading.Event()
    reading = asyncio.to_thread(open_saved, file, given_up)
    saved = await finish(reading, on_cancel=given_up.set, discard=SavedFile.close)
    try:
        if (still := Saves().into(saved.fd)) is not None:
            raise catalogue.STILL_HERE.error(file=file, pid=pid_in(still))
        cookie = read_cookie(saved.cookie)
        known = await finish(asyncio.to_thread(SavedDefinitions().kept, saved.digest))
        async with _destination(
            dest, cookie, mode, place=place, timeout=timeout, startable=_startable(cookie, known)
        ) as target:
            # From here on, what is remembered of this destination is what may be defined.
            cookie = target.cookie or cookie
            differences = await check_sides(cookie, target.domain)
            await target.domain.migration.prepare(cookie, place=place, differences=differences)

            def told(runs: bool) -> None:
                target.is_kept = runs

            state = await target.domain.restore(cookie, saved.fd, saved.offset, told)
            target.is_kept = True
            messages = [*target.messages]
            if saved.digest is None:
                messages.append(f"'{file}' has no digest: whether it is what was saved could not be checked")
            try:
                messages += _define_restored(target, cookie)
            except VcpuRefused as error:
                messages.append(f"it is not defined: {error.message}")
            return Restored(target.name, target.qmp, state.enabled_ids, cookie.runs, tuple(messages))
    finally:
        saved.close()


def _define_restored(place: _Place, cookie: Cookie) -> list[str]:
    if not place.is_name or DefinitionFolder().is_defined(place.name):
        return []
    return _define(place, cookie, persistent=cookie.persistent is not None)


def describe_status(status: MigrationStatus) -> str:
    """One line for a terminal."""
    words = [f"{status.percent} %"] if status.percent is not None else [status.status]
    if status.transferred is not None:
        sent = status.transferred
        words.append(f"{sent >> 20} MiB sent" if sent >= 10 << 20 else f"{sent >> 10} KiB sent")
    if status.downtime is not None:
        words.append(f"downtime {status.downtime} ms")
    return ", ".join(words)
