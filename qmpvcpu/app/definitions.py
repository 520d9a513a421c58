"""`undefine` and `list`: the domains that are defined, or that `start` has started."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain import backends
from qmpvcpu.domain.connect import connect
from qmpvcpu.errors import VcpuError, VcpuRefused
from qmpvcpu.host.definition_files import Addresses, DefinitionFolder, check_name
from qmpvcpu.host.definition_files import read_document as read_file_or_pipe
from qmpvcpu.host.runtime import Runtime, remove_folder, running_names
from qmpvcpu.xml.document import read_domain

_LOOK_SECONDS: Final = 1.0


#: QAPI RunState -> virsh's word; every other one is "paused".
_RUN_STATES: Final = {
    "suspended": "pmsuspended",
    "guest-panicked": "crashed",
    "shutdown": "in shutdown",
}


@dataclass(frozen=True, slots=True)
class ListedDomain:
    """One row of `list`. `active` is None where that is not known, and `trouble` says why."""

    name: str
    active: bool | None
    addresses: Addresses
    current: int | None = None
    maximum: int | None = None
    trouble: str | None = None
    #: The process id of its QEMU, if `start` has started it.
    pid: int | None = None
    #: The QAPI RunState of a running domain.
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


def undefine(name: str) -> Path:
    """Remove a domain's definition; returns the path where its last XML is kept.

    Raises:
        VcpuRefused: it is not defined, or cannot be removed.
    """
    if check_name(name) is None and (pid := Runtime(name).pid()) is not None:
        raise catalogue.ACTIVE_DEFINITION.error(name=name, pid=pid)
    kept = DefinitionFolder().undefine(name)
    remove_folder(name)
    return kept


async def list_domains() -> list[ListedDomain]:
    """Every domain that is defined or that we have started, and whether a QEMU listens at its
    sockets.
    """
    folder = DefinitionFolder()
    return await asyncio.gather(
        *(_look(folder, name) for name in sorted({*folder.names(), *running_names()}))
    )


async def list_libvirt(uri: str) -> list[ListedDomain]:
    """Every domain of libvirt's at a URI.

    Raises:
        VcpuConnectionError: libvirt cannot be reached.
    """
    rows = []
    for row in await backends.list_libvirt(uri):
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
    current = maximum = trouble = run_state = None
    try:
        definition = read_domain(folder.file(name).read())[1]
        current, maximum = len(definition.enabled_ids), definition.maxcpus
    except VcpuRefused as error:
        # A domain that waits for a migration is defined once the guest has arrived.
        trouble = error.message if folder.is_defined(name) else None
    active: bool | None = False
    try:
        async with connect(
            name, connect_timeout=_LOOK_SECONDS, command_timeout=_LOOK_SECONDS
        ) as domain:
            active, run_state = domain.is_active, domain.run_state
            if active:
                state = domain.last_state
                current, maximum = len(state.enabled_ids), state.maxcpus
    except VcpuError as error:
        # QEMU listens there, and another client holds the socket.
        active = True if getattr(error, "reason", None) == "no-greeting" else None
        current = None
        trouble = trouble or error.message
    return ListedDomain(name, active, addresses, current, maximum, trouble, pid, run_state)


def read_document(path: str) -> bytes:
    """Read a file that the user names.

    Raises:
        VcpuRefused: it does not exist, or cannot be read.
    """
    if not os.path.lexists(path):
        raise catalogue.NO_FILE.error(path=path)
    return read_file_or_pipe(path)
