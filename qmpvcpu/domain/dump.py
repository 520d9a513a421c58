"""The XML of a domain: the running guest's own, or its definition with what the running guest is now."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Final

from qmpvcpu.core.definition import Definition, definition_of
from qmpvcpu.core.model import DomainState, Vcpu
from qmpvcpu.errors import VcpuUsageError
from qmpvcpu.host.process import Process
from qmpvcpu.ports import CommandError, Monitor

__all__ = ["DETAILS", "DIALECTS", "check_dump", "describe", "dump"]

DIALECTS: Final = ("rfc", "libvirt")
DETAILS: Final = ("minimal", "cell", "full")

_NODE: Final = re.compile(r"^node ([0-9]{1,4}) size: ([0-9]{1,9}) MB", re.MULTILINE)
_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"


async def describe(monitor: Monitor, state: DomainState, process: Process | None, agent: str | None) -> Definition:
    """What QEMU tells of a running guest, for an XML of its own."""
    found = definition_of(state)
    memory = await _memory(monitor)
    nodes = await _nodes(monitor) if found.cells else {}
    cells = tuple(replace(cell, memory=nodes.get(cell.id)) for cell in found.cells)
    return replace(
        found,
        name=await _name(monitor, state.name),
        uuid=await _uuid(monitor),
        memory=memory,
        # QEMU without -numa puts every ppc64 CPU on node 0, and says that there are no nodes.
        cells=cells if nodes else (),
        emulator=_emulator(process),
        agent=agent if agent is not None and agent.startswith("/") else None,
    )


def check_dump(dialect: str | None, detail: str | None) -> None:
    """Raises VcpuUsageError for words that `dump` does not know."""
    for word, words in ((dialect, DIALECTS), (detail, DETAILS)):
        if word is not None and word not in words:
            raise VcpuUsageError(f"'{word}' is none of {', '.join(words)}", hint="choose one of them")


def dump(
    data: bytes, state: DomainState | None, dialect: str | None, detail: str | None, *, running: bool = False
) -> bytes:
    """A document with the vCPUs of `state`, or with its own, in this dialect.

    Args:
        data: a domain's XML.
        state: the running guest.
        dialect: "rfc" or "libvirt", or None: its own.
        detail: what the RFC's dialect shows: "minimal", "cell" or, if None, "full".
        running: the document is libvirt's, of a running guest.
    """
    from qmpvcpu.core.config import state_of
    from qmpvcpu.xml.domain import read_domain, write_vcpus

    document, old = read_domain(data, running=running)
    if dialect is None and detail is not None:
        dialect = "rfc"
    if state is None and dialect is None:
        return data
    new = old if state is None else replace(old, vcpus=definition_of(state).vcpus)
    defined = {vcpu.id: vcpu for vcpu in state_of(old).vcpus}
    shown = detail or "full"
    details = {vcpu.id: _details(vcpu, defined.get(vcpu.id), shown) for vcpu in (state or state_of(old)).vcpus}
    return write_vcpus(document, old, new, dialect or old.dialect or "libvirt", details)


def _details(vcpu: Vcpu, defined: Vcpu | None, detail: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    if detail in ("cell", "full"):
        node = vcpu.node if vcpu.node is not None or defined is None else defined.node
        found["cell"] = str(node) if node is not None else None
    if detail == "full":
        found["pin"] = vcpu.pin or (defined.pin if defined is not None else None)
        found["scheduler"] = vcpu.scheduler or (defined.scheduler if defined is not None else None)
    return found


async def _name(monitor: Monitor, name: str) -> str:
    """A domain that is only a path has the name that QEMU was given (-name), else its socket's."""
    if "/" not in name:
        return name
    try:
        reply = await monitor.query_name()
    except CommandError:
        reply = None
    found = reply.get("name") if isinstance(reply, dict) else None
    if isinstance(found, str) and found and "/" not in found and found.isprintable():
        return found
    return Path(name).stem or "domain"


async def _uuid(monitor: Monitor) -> str | None:
    try:
        reply = await monitor.query_uuid()
    except CommandError:
        return None
    found = reply.get("UUID") if isinstance(reply, dict) else None
    return found if isinstance(found, str) and len(found) == len(_NO_UUID) and found != _NO_UUID else None


async def _memory(monitor: Monitor) -> int | None:
    try:
        reply = await monitor.query_memory_size_summary()
    except CommandError:
        return None
    found = reply.get("base-memory") if isinstance(reply, dict) else None
    return found if type(found) is int and found > 0 else None


async def _nodes(monitor: Monitor) -> dict[int, int]:
    """Memory of each NUMA node, bytes. QMP has no word for it; HMP rounds to MiB (7.2 to 11.1)."""
    try:
        text = await monitor.human_monitor_command("info numa")
    except CommandError:
        return {}
    found = _NODE.findall(text) if isinstance(text, str) else []
    return {int(node): int(size) << 20 for node, size in found}


def _emulator(process: Process | None) -> str | None:
    """The binary that runs; where a loader was called by name (`ld.so qemu-system-…`), what it was told to run."""
    if process is None:
        return None
    folder = Path(f"/proc/{process.pid}")
    try:
        found = str((folder / "exe").readlink()).removesuffix(" (deleted)")
        words = [os.fsdecode(word) for word in (folder / "cmdline").read_bytes().split(b"\0")]
    except OSError:
        return None
    if "qemu" in Path(found).name:
        return found
    return next((word for word in words if word.startswith("/") and "qemu" in Path(word).name), found)
