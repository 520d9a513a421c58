"""Make a definition of a running guest from what its QEMU reports."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from qmpvcpu.core.definition import definition_of
from qmpvcpu.core.machine.command_line import QemuCommandLine, read_command_line
from qmpvcpu.core.machine.described import Described, MachineFacts, agrees, described, machine_facts
from qmpvcpu.core.model import DomainState
from qmpvcpu.domain.reader import answers_of
from qmpvcpu.host.process import Process, command_line_of, folder_of
from qmpvcpu.host.program import startable_program
from qmpvcpu.ports import CommandError, Monitor

_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class DescribedXml:
    """A definition that was made from a running guest. `left_out` lists the parts of the guest that
    it cannot express, and `has_devices` is whether the guest's devices are known.
    """

    xml: bytes
    left_out: tuple[str, ...] = ()
    has_devices: bool = False


async def describe(
    monitor: Monitor, state: DomainState, process: Process | None, agent: str | None
) -> Described:
    """Return a definition of a running guest, and the parts that no definition can express.

    Args:
        monitor: the monitor of the guest's QEMU.
        state: the guest's vCPUs.
        process: the QEMU process, if it runs on this host.
        agent: address of the guest agent.
    """
    words = await asyncio.to_thread(command_line_of, process) if process is not None else []
    facts, line = await _facts(monitor, read_command_line(words) if words else None)
    driver = next((entity.driver for entity in state.entities if entity.driver), None)
    machine = described(
        definition_of(state),
        driver,
        facts,
        line,
        folder_of(process) if process is not None else None,
    )
    emulator = (
        await asyncio.to_thread(startable_program, process, words) if process is not None else None
    )
    left_out = list(machine.left_out)
    if process is not None and emulator is None:
        left_out.append("the program that runs it: other users can change each one that was found")
    return Described(
        replace(
            machine.definition,
            name=await _name(monitor, state.name),
            uuid=await _uuid(monitor),
            emulator=emulator,
            agent=agent if agent is not None and agent.startswith("/") else None,
        ),
        tuple(left_out),
        machine.devices,
    )


async def _name(monitor: Monitor, name: str) -> str:
    """Return the domain's name. If it is only a path, use QEMU's own name (-name), else the name of
    its socket.
    """
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
    return (
        found
        if isinstance(found, str) and len(found) == len(_NO_UUID) and found != _NO_UUID
        else None
    )


async def _facts(
    monitor: Monitor, line: QemuCommandLine | None
) -> tuple[MachineFacts, QemuCommandLine | None]:
    """Return the machine facts from QMP, and the command line if it can be this QEMU's."""
    names = ("query-memdev", "query-memory-devices", "query-memory-size-summary")
    queries: dict[str, Awaitable[object]] = {name: monitor.execute(name) for name in names}
    queries |= {name: monitor.qom_get("/machine", name) for name in ("memory", "memory-backend")}
    replies = await answers_of(queries)
    facts = machine_facts(replies)
    known = line if agrees(line, facts) else None
    if known is not None and (
        not known.nodes or any(node.memdev or node.memory for node in known.nodes)
    ):
        return facts, known
    # QMP reports neither the size of a NUMA node nor the memory on it; HMP does.
    more: dict[str, Awaitable[object]] = {
        text: monitor.human_monitor_command(text) for text in ("info numa", "info mtree -f")
    }
    more["query-cpu-definitions"] = monitor.execute("query-cpu-definitions")
    return machine_facts(replies | await answers_of(more)), known
