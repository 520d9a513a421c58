"""`define`, `undefine`, `list`: the domains that have a home here."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qmpvcpu.core.address import parse_address
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain import Domain, connect
from qmpvcpu.errors import VcpuError, VcpuRefused, VcpuUsageError
from qmpvcpu.host.definition_files import Addresses, DefinitionFolder, check_name
from qmpvcpu.host.definition_files import read_document as read_file_or_pipe
from qmpvcpu.host.runtime import Runtime, remove_folder, running_names
from qmpvcpu.xml.document import read_domain, renamed

_LOOK_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Defined:
    """What `define` did."""

    name: str
    path: str
    replaced: bool
    addresses: Addresses
    messages: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document of `define --json`."""
        return {
            "domain": self.name,
            "path": self.path,
            "replaced": self.replaced,
            **self.addresses.to_json(),
            "messages": list(self.messages),
        }


#: QAPI RunState -> virsh's word; every other one is "paused".
_RUN_STATES: Final = {"suspended": "pmsuspended", "guest-panicked": "crashed", "shutdown": "in shutdown"}


@dataclass(frozen=True, slots=True)
class ListedDomain:
    """One row of `list`. `active` is None where nobody can tell, and `trouble` says why."""

    name: str
    active: bool | None
    addresses: Addresses
    current: int | None = None
    maximum: int | None = None
    trouble: str | None = None
    #: Of its QEMU, where `start` has started it.
    pid: int | None = None
    #: QAPI RunState of one that runs.
    run_state: str | None = None

    @property
    def state(self) -> str:
        """virsh's word."""
        if self.active and self.run_state not in (None, "running"):
            return _RUN_STATES.get(self.run_state, "paused")
        return {True: "running", False: "shut off", None: "unknown"}[self.active]

    def to_json(self) -> dict[str, Any]:
        """As JSON data; `current` and `maximum` are the running guest's, else the definition's."""
        return {
            "name": self.name,
            "state": self.state,
            "active": self.active,
            "current": self.current,
            "maximum": self.maximum,
            **self.addresses.to_json(),
            "trouble": self.trouble,
            "pid": self.pid,
        }


async def define(word: str, qmp: Sequence[str] = (), agent: str | None = None, xml: str | None = None) -> Defined:
    """Define a domain: by a file of domain XML, or under a name with its sockets.

    Without `xml`, the definition is made of what the running QEMU tells.

    Raises:
        VcpuRefused: the name, the XML or the folder does not allow it; nothing is changed.
        VcpuConnectionError: its QEMU was to be asked, and does not answer.
    """
    addresses = Addresses(tuple(_absolute(address) for address in qmp), _absolute(agent) if agent else None)
    if "/" in word or (xml is None and not qmp and agent is None):
        if xml is not None:
            raise VcpuUsageError(
                f"two files are given, '{word}' and '{xml}'", hint="define FILE, or define NAME --xml FILE"
            )
        return await _define_file(word, addresses)
    refusal = check_name(word)
    if refusal is not None:
        raise VcpuRefused([refusal])
    _check_not_ours(word, addresses)
    messages = []
    if xml is not None:
        data = read_document(xml)
        own = _checked(data, xml)
        if own != word:
            messages.append(f"'{xml}' calls the domain '{own}': it is defined as '{word}'")
            data = renamed(data, word)
        messages += _trusted(data)
        messages += _left_behind(word, addresses)
        addresses = _with_known(word, addresses)
    elif addresses.qmp:
        messages += _left_behind(word, addresses)
        # Not by its name: a definition that is there says nothing of this guest.
        async with connect(qmp=addresses.qmp, agent=addresses.agent) as domain:
            told = await domain.describe_machine()
            differs = await _differences(domain, told.xml) if told.has_devices else []
        data = renamed(told.xml, word)
        messages += [f"the definition does not hold {text}" for text in told.left_out]
        messages += [f"the guest differs from what the definition starts: {text}" for text in differs]
    else:
        raise VcpuUsageError(
            "neither its QMP socket nor its XML is given", hint="define NAME --qmp ADDR, or --xml FILE"
        )
    return await asyncio.to_thread(_write, word, data, addresses, messages)


async def _differences(domain: Domain, xml: bytes) -> list[str]:
    """What was plugged since QEMU was started, and whatever else its command line does not tell."""
    from qmpvcpu.app.twin import check_definition

    return [one.message for one in await check_definition(domain, xml, None)]


async def _define_file(path: str, addresses: Addresses) -> Defined:
    data = read_document(path)
    name = _checked(data, path)
    refusal = check_name(name)
    if refusal is not None:
        raise VcpuRefused([refusal])
    _check_not_ours(name, addresses)
    messages = [*_trusted(data), *_left_behind(name, addresses)]
    return await asyncio.to_thread(_write, name, data, _with_known(name, addresses), messages)


def _check_not_ours(name: str, addresses: Addresses) -> None:
    """A guest that `start` has started keeps its name and its sockets while it runs.

    Raises:
        VcpuRefused: other sockets are given for it.
    """
    runtime = Runtime(name)
    if not set(addresses.qmp) <= set(runtime.qmp) and (pid := runtime.pid()) is not None:
        raise catalogue.ACTIVE_WITH_OTHER_SOCKETS.error(name=name, pid=pid)


def _left_behind(name: str, addresses: Addresses) -> list[str]:
    """The sockets by which it was reached until now, if it is given others."""
    known = _known(name)
    if not addresses.qmp or not known.qmp or addresses.qmp == known.qmp:
        return []
    return [f"it was reached at {', '.join(known.qmp)} until now"]


def _known(name: str) -> Addresses:
    with suppress(VcpuRefused):
        return DefinitionFolder().addresses(name)
    return Addresses()


def _with_known(name: str, addresses: Addresses) -> Addresses:
    """A new XML for a domain says nothing new of where it is reached, and its QEMU may run there."""
    if addresses.qmp:
        return addresses
    known = _known(name)
    return Addresses(known.qmp, addresses.agent or known.agent)


def _trusted(data: bytes) -> list[str]:
    """What a definition makes this host do that nobody expects of a domain's XML: it is said once."""
    from qmpvcpu.app.boot import listed_program
    from qmpvcpu.xml.boot_devices import command_line_of

    document, definition = read_domain(data)
    found = []
    if definition.emulator is not None and listed_program(definition) is None:
        found.append(
            f"it is started with the program '{definition.emulator}', which `qmpvcpu doctor` does not list"
        )
    if words := command_line_of(document):
        found.append(f"its QEMU gets, by <qemu:commandline>: {shlex.join(words)}")
    return found


def _write(name: str, data: bytes, addresses: Addresses, messages: Sequence[str]) -> Defined:
    folder = DefinitionFolder()
    replaced = folder.define(name, data, addresses)
    return Defined(name, folder.file(name).place, replaced, addresses, tuple(messages))


def undefine(name: str) -> Path:
    """Forget a domain; where its last XML is kept.

    Raises:
        VcpuRefused: it is not defined, or cannot be removed.
    """
    if check_name(name) is None and (pid := Runtime(name).pid()) is not None:
        raise catalogue.ACTIVE_DEFINITION.error(name=name, pid=pid)
    kept = DefinitionFolder().undefine(name)
    remove_folder(name)
    return kept


async def list_domains() -> list[ListedDomain]:
    """Every domain that is defined, or that we have started, and whether somebody listens at its sockets."""
    folder = DefinitionFolder()
    names = sorted({*folder.names(), *running_names()})
    return list(await asyncio.gather(*(_look(folder, name) for name in names)))


async def list_libvirt(uri: str) -> list[ListedDomain]:
    """Every domain of libvirt's at a URI.

    Raises:
        VcpuConnectionError: it cannot be reached.
    """
    from qmpvcpu.domain.backends.libvirt import list_domains as rows_of

    rows = []
    for row in await rows_of(uri):
        current = maximum = trouble = None
        try:
            definition = read_domain(row.xml)[1]
            current, maximum = len(definition.enabled_ids), definition.maxcpus
        except VcpuRefused as error:
            trouble = error.message
        rows.append(ListedDomain(row.name, row.active, Addresses(), current, maximum, trouble))
    return rows


async def _look(folder: DefinitionFolder, name: str) -> ListedDomain:
    try:
        runtime = Runtime(name)
        pid = runtime.pid()
        addresses = folder.addresses(name) if pid is None else Addresses(runtime.qmp, runtime.agent)
    except VcpuRefused as error:
        return ListedDomain(name, None, Addresses(), trouble=error.message)
    current = maximum = None
    trouble = None
    try:
        definition = read_domain(folder.file(name).read())[1]
        current, maximum = len(definition.enabled_ids), definition.maxcpus
    except VcpuRefused as error:
        # One that waits for a migration is defined when it has arrived.
        trouble = error.message if folder.is_defined(name) else None
    active: bool | None = False
    run_state = None
    try:
        async with connect(name, connect_timeout=_LOOK_SECONDS, command_timeout=_LOOK_SECONDS) as domain:
            active, run_state = domain.is_active, domain.run_state
            if active:
                state = domain.last_state
                current, maximum = len(state.enabled_ids), state.maxcpus
    except VcpuError as error:
        # Somebody listens, and holds it.
        active = True if getattr(error, "reason", None) == "no-greeting" else None
        current = None
        trouble = trouble or error.message
    return ListedDomain(name, active, addresses, current, maximum, trouble, pid, run_state)


def against_libvirts_schema(data: bytes) -> list[str] | None:
    """What libvirt's own schema has against a document, with lines; None where libvirt's is not installed."""
    from qmpvcpu.xml.schema import check_domain

    return check_domain(data)


def read_document(path: str) -> bytes:
    """A file that the user names.

    Raises:
        VcpuRefused: it is not there, or cannot be read.
    """
    if not os.path.lexists(path):
        raise catalogue.NO_FILE.error(path=path)
    return read_file_or_pipe(path)


def _checked(data: bytes, path: str) -> str:
    """The name in a document that holds."""
    try:
        return read_domain(data)[1].name
    except VcpuRefused as error:
        raise VcpuRefused([replace(r, message=f"'{path}': {r.message}") for r in error.refusals]) from error


def _absolute(address: str) -> str:
    """A definition is used from every folder, and has no descriptors."""
    where = parse_address(address)
    if isinstance(where, int):
        raise VcpuUsageError(
            f"'{address}' cannot be kept: a descriptor is this process's", hint="give the socket's path"
        )
    if isinstance(where, tuple):
        return address
    return os.path.abspath(where)  # noqa: PTH100 - a link stays what it is
