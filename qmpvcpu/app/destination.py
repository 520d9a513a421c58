"""A migration's destination: a QEMU that waits for a guest. It is given by name or by address; one
with a name is started if it does not run.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from qmpvcpu.app.probes import ProbeMode
from qmpvcpu.app.qemus import find_emulator
from qmpvcpu.app.start import clean_up, launch_waiting
from qmpvcpu.app.twin import check_held, check_sides
from qmpvcpu.core.machine.boot_arguments import qemu_arch
from qmpvcpu.core.migration.cookie import Cookie
from qmpvcpu.core.migration.status import last_words
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain import Domain
from qmpvcpu.domain.connect import connect
from qmpvcpu.domain.migration import ownership
from qmpvcpu.errors import VcpuFailed, VcpuRefused
from qmpvcpu.host.definition_files import Addresses, DefinitionFolder, require_name
from qmpvcpu.host.ownership import Role
from qmpvcpu.host.runtime import Runtime
from qmpvcpu.xml.document import read_domain, renamed
from qmpvcpu.xml.foreign import host_parts, without_placing, without_program


@dataclass(frozen=True, slots=True)
class Where:
    """Where a guest goes, and how a QEMU is started there.

    Attributes:
        dest: a name, or the QMP address of a QEMU that waits; None: the guest's own name.
        agent: address of the guest's agent there; a QEMU that we start has its own agent socket.
        place: False leaves the threads where the kernel puts them.
        mode: when a throwaway QEMU may be asked for the topology.
        timeout: seconds until QEMU must have set up its machine.
    """

    dest: str | None = None
    agent: str | None = None
    place: bool = True
    mode: ProbeMode = ProbeMode.AUTO
    timeout: float = 30.0

    @property
    def is_name(self) -> bool:
        """Whether it is a name; else it is an address."""
        return self.dest is None or ("/" not in self.dest and ":" not in self.dest)

    @property
    def host(self) -> str | None:
        """The host of an address host:port."""
        if self.dest is None or self.is_name or "/" in self.dest:
            return None
        return self.dest.rpartition(":")[0].strip("[]") or None


@dataclass(slots=True)
class Target:
    """A destination that we are connected to.

    Attributes:
        domain: the connected domain.
        name: its name on this host, or its address.
        is_name: whether `name` is a name.
        qmp: addresses of its QMP sockets.
        messages: from its start.
        cookie: of the guest that QEMU was started for, and whose XML may be defined; None: QEMU ran
            already.
        is_kept: whether QEMU must not be ended any more.
    """

    domain: Domain
    name: str
    is_name: bool
    qmp: tuple[str, ...]
    messages: tuple[str, ...] = ()
    cookie: Cookie | None = None
    is_kept: bool = False

    def default_uri(self, host: str | None) -> str:
        """Where it listens by default: next to its QMP socket, where its QEMU can write."""
        if host is not None:
            return f"tcp:{host}:0"
        return f"unix:{os.path.abspath(self.qmp[0])}.migrate"  # noqa: PTH100

    async def prepare(self, cookie: Cookie, *, place: bool, with_disks: bool = False) -> None:
        """Check that it is the guest's machine, and plug the guest's vCPUs.

        Args:
            cookie: of the guest.
            place: False leaves its threads where the kernel puts them.
            with_disks: both run on this host, so that the names of their disks can be compared.

        Raises:
            VcpuRefused: it cannot take in the guest; the error has every reason.
            VcpuFailed: QEMU declines something.
        """
        await self.domain.migration.prepare(
            # The destination keeps this cookie for `migrate-finish`, which may define it.
            self.cookie or cookie,
            place=place,
            differences=await check_sides(cookie, self.domain, with_disks=with_disks),
        )

    @property
    def is_defined(self) -> bool:
        """Whether a domain of that name is defined."""
        return self.is_name and DefinitionFolder().is_defined(self.name)

    def define(self, cookie: Cookie, *, persistent: bool) -> list[str]:
        """Define a destination that has a name; returns messages."""
        if not self.is_name or (not persistent and self.is_defined):
            return []
        folder = DefinitionFolder()
        try:
            known = folder.addresses(self.name) if self.is_defined else Addresses()
            xml = cookie.persistent if persistent and cookie.persistent is not None else cookie.xml
            folder.define(self.name, renamed(xml, self.name), known)
        except VcpuRefused as error:
            return [f"the destination is not defined: {error.message}"]
        if persistent:
            return []
        return [f"'{self.name}' is now defined as the guest runs, so that its name is known"]


# -- what is trusted: from what a destination is started if the guest's XML comes from a file
# ----------


@dataclass(frozen=True, slots=True)
class FromFile:
    """A cookie was read from a file: a saved guest, or a cookie of another process. `definition` is
    the one that this user had of the guest when the file was written, if it is known, and if the
    cookie has not been changed since.
    """

    definition: bytes | None


@dataclass(frozen=True, slots=True)
class Startable:
    """A cookie whose XML may be started and defined. `devices` is the XML that has the program and
    the devices; None: the cookie's own XML. `messages` name what of a file was left out.
    """

    cookie: Cookie
    devices: bytes | None = None
    messages: tuple[str, ...] = ()

    @property
    def definable(self) -> Cookie:
        """The cookie with the XML that may be defined, and that says where on this host the guest's
        threads run.
        """
        return self.cookie if self.devices is None else replace(self.cookie, xml=self.devices)


async def startable(cookie: Cookie, name: str, file: FromFile | None) -> Startable:
    """From what a destination of that name is started; `file` is given if the cookie was read from
    a file.

    What the user has defined is trusted. A file supplies the machine, CPUs, memory and addresses,
    and never a program, a command line, a socket, a path or a place on the host. Those come from
    the definition that the guest had when this user saved it, or that the user has of it now;
    without such a definition a file that names them is refused.

    Raises:
        VcpuRefused: the file names parts of a host, and no trusted definition has them; the error
            names every part.
    """
    if file is None:
        return Startable(cookie)
    if file.definition is not None:
        return Startable(replace(cookie, xml=file.definition))
    trusted = _defined(cookie, (name, cookie.name))
    definition = read_domain(trusted)[1] if trusted is not None else None
    if found := host_parts(cookie.xml, definition):
        raise catalogue.TRUST.error(parts=", ".join(found), name=cookie.name)
    xml, left_out = without_placing(cookie.xml)
    if trusted is not None:
        return Startable(replace(cookie, xml=xml, persistent=None), trusted)
    emulator = await find_emulator(
        qemu_arch(read_domain(cookie.xml)[1]),
        cookie.picture.version if cookie.picture is not None else None,
    )
    messages = (
        f"{', '.join(left_out)}: left out, as only a definition says where on this host a guest"
        " runs",
    )
    xml = without_program(xml, emulator)
    return Startable(replace(cookie, xml=xml, persistent=None), None, messages if left_out else ())


def _defined(cookie: Cookie, names: Iterable[str]) -> bytes | None:
    """The definition that the user has of this guest."""
    folder = DefinitionFolder()
    for name in names:
        if folder.is_defined(name):
            data = folder.file(name).read()
            if read_domain(data)[1].uuid == cookie.uuid:
                return data
    return None


# -- the QEMU
# ------------------------------------------------------------------------------------------


@asynccontextmanager
async def open_destination(
    where: Where, cookie: Cookie, file: FromFile | None = None
) -> AsyncIterator[Target]:
    """Connect until the end of the body. A QEMU that does not run is started, and ended if the body
    fails.

    Args:
        where: the destination.
        cookie: of the guest.
        file: as of `startable`.

    Raises:
        VcpuRefused: there cannot be such a destination.
        VcpuFailed, VcpuConnectionError: its QEMU exited, or does not answer.
    """
    name = where.dest if where.dest is not None else cookie.name
    if where.is_name and not await _runs(name, cookie):
        if cookie.is_described:
            raise catalogue.SOURCE_NOT_DESCRIBED.error(name=name)
        async with _started(where, name, await startable(cookie, name, file)) as target:
            yield target
        return
    async with connect(name, agent=where.agent) as domain:
        yield Target(domain, name, where.is_name, Runtime(name).qmp if where.is_name else (name,))


async def _runs(name: str, cookie: Cookie) -> bool:
    """Whether the QEMU of that name runs. Raises VcpuRefused if another domain is defined under the
    name.
    """
    require_name(name)
    folder = DefinitionFolder()
    if folder.is_defined(name):
        defined = read_domain(folder.file(name).read())[1].uuid
        if defined != cookie.uuid:
            raise catalogue.ANOTHER_DOMAIN.error(name=name, defined=defined, uuid=cookie.uuid)
    if Runtime(name).pid() is not None:
        return True
    if not folder.is_defined(name):
        return False
    async with connect(name) as domain:
        return domain.is_active


@asynccontextmanager
async def _started(where: Where, name: str, start: Startable) -> AsyncIterator[Target]:
    runtime, folder, cookie = Runtime(name), DefinitionFolder(), start.cookie
    source_runs = ownership.is_present(cookie, Role.SOURCE)
    if source_runs and (refusals := check_held(cookie)):
        raise VcpuRefused(refusals)
    launched = await launch_waiting(
        name,
        cookie.xml,
        cookie.machine.type if cookie.machine is not None else None,
        mode=where.mode,
        timeout=where.timeout,
        place=where.place,
        source_runs=source_runs,
        devices=start.devices,
    )
    target: Target | None = None
    xml = folder.file(name).place if folder.is_defined(name) else None
    try:
        async with connect(qmp=runtime.qmp, agent=where.agent or runtime.agent, xml=xml) as domain:
            notes = await domain.place(start.definable.xml) if where.place else []
            target = Target(
                domain,
                name,
                True,
                runtime.qmp,
                (*start.messages, *launched.messages, *notes),
                start.definable,
            )
            yield target
    except BaseException as error:
        if target is None or not target.is_kept:
            await clean_up(name)
        words = last_words(runtime.log_end(4000))
        if isinstance(error, VcpuFailed) and words and error.qmp_text is None:
            raise VcpuFailed(
                f"{error.message}; the destination's QEMU reported: {words}",
                hint=error.hint,
                qmp_class=error.qmp_class,
                qmp_text=words,
                messages=error.messages,
            ) from error
        raise
