"""`migrate` and its phases as a user calls them: the destination is a name or an address; one with
a name is started if it does not run.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from qmpvcpu.aio import finish
from qmpvcpu.app.definitions import undefine
from qmpvcpu.app.destination import FromFile, Target, Where, open_destination, startable
from qmpvcpu.app.start import clean_up, remove_ended
from qmpvcpu.core.migration.cookie import Cookie
from qmpvcpu.core.model import DomainState
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain import Domain
from qmpvcpu.domain.connect import connect
from qmpvcpu.domain.migration import ownership
from qmpvcpu.domain.migration.move import Migrated
from qmpvcpu.domain.migration.sides import Transfer
from qmpvcpu.errors import VcpuRefused, VcpuUsageError
from qmpvcpu.host.definition_files import check_name
from qmpvcpu.host.files import read_file, read_stream
from qmpvcpu.host.ownership import Role
from qmpvcpu.host.runtime import Runtime
from qmpvcpu.xml.cookie import read_cookie, write_cookie

#: Bytes that a cookie may have: two domains of 8 MiB each.
_LIMIT = 17 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Prepared:
    """A destination that waits; `uri` is where the source connects."""

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


def cookie_text(cookie: Cookie) -> str:
    """The cookie as XML."""
    return write_cookie(cookie).decode()


def load_cookie(path: str) -> Cookie:
    """Read a cookie from a file; `-` is standard input.

    Raises:
        VcpuRefused: the file does not exist, or is not a cookie.
    """
    try:
        data = (
            read_stream(sys.stdin.fileno(), _LIMIT)
            if path == "-"
            else read_file(path, _LIMIT, with_pipes=True)
        )
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise catalogue.COOKIE_NOT_READ.error(path=path, why=why) from error
    if len(data) > _LIMIT:
        raise catalogue.COOKIE_TOO_LONG.error(path=path, most=_LIMIT)
    return read_cookie(data)


async def migrate(
    source: Domain,
    where: Where,
    how: Transfer,
    *,
    persistent: bool = False,
    undefine_source: bool = False,
    wait: float = 0.0,
    force: bool = False,
    at_destination: Callable[[], None] = lambda: None,
) -> Migrated:
    """Move a guest to another QEMU, and verify it there.

    Args:
        source: the guest's domain, connected.
        where: the destination; a named one is started on this host if it does not run.
        how: how the guest's memory is sent; its host is replaced by the destination's.
        persistent: also define the domain at the destination, under the destination's name.
        undefine_source: remove the source's definition.
        wait: seconds for pending unplugs to end.
        force: also do what is known to hang a guest.
        at_destination: called once the guest runs there, or may run there, even if an error
            follows.

    Raises:
        VcpuError: as `Migration.migrate`.
    """
    _check_words(source, where, persistent=persistent, undefine_source=undefine_source)
    cookie = await source.migration.begin(
        persistent=persistent,
        wait=wait,
        force=force,
        with_agents=where.agent is not None or where.is_name,
    )
    messages: list[str] = []
    async with open_destination(where, cookie) as target:
        await target.prepare(cookie, place=where.place, with_disks=target.is_name)

        def finished() -> None:
            target.is_kept = True
            messages.extend(target.define(cookie, persistent=persistent))
            at_destination()

        async with nothing_left_of(source, lambda: target.is_kept):
            done = await source.migration.migrate(
                target.domain.migration,
                cookie,
                replace(how, host=where.host),
                force=force,
                finished=finished,
            )
    # The guest runs at the destination now, so an error of ours must not read as if it did not.
    try:
        if undefine_source:
            undefine(source.name)
    except VcpuRefused as error:
        messages.append(f"the source is still defined: {error.message}")
    return replace(done, messages=(*target.messages, *done.messages, *messages))


def _check_words(source: Domain, where: Where, *, persistent: bool, undefine_source: bool) -> None:
    if persistent and not where.is_name:
        raise VcpuUsageError(
            f"--persistent needs a name for the definition, and '{where.dest}' is an address",
            hint="name the destination, or leave out --persistent and define it there",
        )
    if where.dest == source.name:
        raise catalogue.SAME_NAME.error(name=where.dest)
    if undefine_source and not source.has_definition:
        raise catalogue.NOTHING_TO_UNDEFINE.error()


@asynccontextmanager
async def nothing_left_of(source: Domain, has_left: Callable[[], bool]) -> AsyncIterator[None]:
    """Remove the source's QEMU, folder and cgroups after the body, which moves the guest. If the
    body fails and the guest `has_left`, they are removed only if that QEMU has ended.
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


async def migrate_prepare(cookie: Cookie, where: Where, uri: str | None) -> Prepared:
    """Start or check a destination, plug its vCPUs, and let it listen.

    Args:
        cookie: as it was read from a file.
        where: the destination.
        uri: where it should listen; None: next to its QMP socket, in a folder that its QEMU can
            write to.

    Raises:
        VcpuError: as `Migration.prepare`; a QEMU that was started for the guest is ended.
    """
    async with open_destination(where, cookie, FromFile(ownership.recall_source(cookie))) as target:
        await target.prepare(
            cookie,
            place=where.place,
            with_disks=target.is_name and ownership.is_present(cookie, Role.SOURCE),
        )
        # A destination that listens on every address is reached by its host's name, as libvirt
        # does.
        there = await target.domain.migration.listen(
            uri,
            where.host or socket.gethostname(),
            target.default_uri(where.host),
        )
        state = await target.domain.state()
        return Prepared(target.name, there, target.qmp, state.enabled_ids, target.messages)


async def migrate_finish(
    dest: str, cookie: Cookie | None, *, force: bool = False
) -> tuple[DomainState, bool]:
    """Verify a destination, and let it run; returns its state, and whether it runs, as it did at
    the source.

    Args:
        dest: its name, or its QMP address.
        cookie: as it was read from a file; None: the one that it was prepared with, on this host.
        force: also where another side has claimed the guest.

    Raises:
        VcpuError: as `Migration.finish`.
    """
    async with connect(dest) as domain:
        begun = cookie or await domain.migration.cookie()
        state = await domain.migration.finish(begun, force=force)
    target = Target(domain, dest, check_name(dest) is None and ":" not in dest, ())
    # The cookie that this destination was prepared with was checked then.
    file = None if cookie is None else FromFile(ownership.recall_source(cookie))
    with suppress(VcpuRefused):
        definable = (await startable(begun, dest, file)).definable
        target.define(definable, persistent=definable.persistent is not None)
    return state, begun.runs


async def migrate_cancel(domain: Domain, *, force: bool = False) -> str:
    """`Migration.cancel`, which also removes what is left of a destination that we have started.

    Raises:
        VcpuError: as `Migration.cancel`.
    """
    async with domain:
        done = await domain.migration.cancel(force=force)
    if check_name(domain.name) is None and Runtime(domain.name).pid() is None:
        await clean_up(domain.name)
    return done
