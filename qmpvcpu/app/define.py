"""`define`: keep a domain's XML and its addresses under a name."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qmpvcpu.app.boot import listed_program
from qmpvcpu.app.definitions import read_document
from qmpvcpu.app.twin import check_definition
from qmpvcpu.core.address import parse_address
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain.connect import connect
from qmpvcpu.errors import VcpuRefused, VcpuUsageError
from qmpvcpu.host.definition_files import Addresses, DefinitionFolder, require_name
from qmpvcpu.host.runtime import Runtime
from qmpvcpu.xml.boot_devices import command_line_of
from qmpvcpu.xml.document import read_domain, renamed


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


async def define(
    word: str, qmp: Sequence[str] = (), agent: str | None = None, xml: str | None = None
) -> Defined:
    """Define a domain: from a file of domain XML, or under a name with its sockets.

    Without `xml`, the definition is made from what the running QEMU reports.

    Raises:
        VcpuRefused: the name, the XML or the folder does not allow it; nothing is changed.
        VcpuConnectionError: the definition is to be made from a running QEMU, which does not
            answer.
    """
    addresses = Addresses(
        tuple(_absolute(address) for address in qmp), _absolute(agent) if agent else None
    )
    if "/" in word or (xml is None and not qmp and agent is None):
        if xml is not None:
            raise VcpuUsageError(
                f"two files are given, '{word}' and '{xml}'",
                hint="define FILE, or define NAME --xml FILE",
            )
        return await _define_file(word, addresses)
    require_name(word)
    _check_not_ours(word, addresses)
    messages = []
    if xml is not None:
        data = read_document(xml)
        own = _checked(data, xml)
        if own != word:
            messages.append(f"the name in '{xml}' is '{own}': the domain is defined as '{word}'")
            data = renamed(data, word)
        messages += [*_trusted(data), *_old_sockets(word, addresses)]
        addresses = _with_known(word, addresses)
    elif addresses.qmp:
        messages += _old_sockets(word, addresses)
        # Not by its name: an older definition of that name does not describe this guest.
        async with connect(qmp=addresses.qmp, agent=addresses.agent) as domain:
            described = await domain.describe_machine()
            # This finds what was plugged since QEMU was started, and what else its command line
            # does not show.
            differs = await check_definition(domain, described.xml) if described.has_devices else []
        data = renamed(described.xml, word)
        messages += [f"the definition does not hold {text}" for text in described.left_out]
        messages += [
            f"the guest differs from what the definition starts: {one.message}" for one in differs
        ]
    else:
        raise VcpuUsageError(
            "neither its QMP socket nor its XML is given",
            hint="define NAME --qmp ADDR, or --xml FILE",
        )
    return await asyncio.to_thread(_write, word, data, addresses, messages)


async def _define_file(path: str, addresses: Addresses) -> Defined:
    data = read_document(path)
    name = _checked(data, path)
    require_name(name)
    _check_not_ours(name, addresses)
    return await asyncio.to_thread(
        _write,
        name,
        data,
        _with_known(name, addresses),
        [*_trusted(data), *_old_sockets(name, addresses)],
    )


def _check_not_ours(name: str, addresses: Addresses) -> None:
    """Check that no guest of that name, started by `start`, runs with other sockets.

    Raises:
        VcpuRefused: other sockets are given for it.
    """
    runtime = Runtime(name)
    if not set(addresses.qmp) <= set(runtime.qmp) and (pid := runtime.pid()) is not None:
        raise catalogue.ACTIVE_WITH_OTHER_SOCKETS.error(name=name, pid=pid)


def _old_sockets(name: str, addresses: Addresses) -> list[str]:
    """A message that names the old sockets, if the domain gets others."""
    known = _known(name)
    if not addresses.qmp or not known.qmp or addresses.qmp == known.qmp:
        return []
    return [f"it was reached at {', '.join(known.qmp)} until now"]


def _known(name: str) -> Addresses:
    with suppress(VcpuRefused):
        return DefinitionFolder().addresses(name)
    return Addresses()


def _with_known(name: str, addresses: Addresses) -> Addresses:
    """The given addresses, else the ones that are known: new XML does not change where the domain
    is reached.
    """
    if addresses.qmp:
        return addresses
    known = _known(name)
    return Addresses(known.qmp, addresses.agent or known.agent)


def _trusted(data: bytes) -> list[str]:
    """Messages about what a definition makes this host run that a user may not expect of XML;
    printed once.
    """
    document, definition = read_domain(data)
    found = []
    if definition.emulator is not None and listed_program(definition) is None:
        found.append(
            f"it is started with the program '{definition.emulator}', which `qmpvcpu doctor` does"
            " not list"
        )
    if words := command_line_of(document):
        found.append(f"<qemu:commandline> adds to QEMU's arguments: {shlex.join(words)}")
    return found


def _write(name: str, data: bytes, addresses: Addresses, messages: Sequence[str]) -> Defined:
    folder = DefinitionFolder()
    replaced = folder.define(name, data, addresses)
    return Defined(name, folder.file(name).place, replaced, addresses, tuple(messages))


def _checked(data: bytes, path: str) -> str:
    """The domain's name in a document, which is checked. Raises VcpuRefused."""
    try:
        return read_domain(data)[1].name
    except VcpuRefused as error:
        raise error.at(path) from error


def _absolute(address: str) -> str:
    """The address with an absolute path: a definition is used from every folder, and cannot hold
    descriptors.
    """
    where = parse_address(address)
    if isinstance(where, int):
        raise VcpuUsageError(
            f"'{address}' cannot be defined: it belongs to this process",
            hint="give the socket's path",
        )
    if isinstance(where, tuple):
        return address
    return os.path.abspath(where)  # noqa: PTH100 - links are not resolved
