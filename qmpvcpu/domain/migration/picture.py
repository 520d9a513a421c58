"""Query what machine a QEMU runs, for `core.machine.comparison`."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from typing import Any, Final

from qmpvcpu.core.machine.command_line import read_command_line
from qmpvcpu.core.machine.comparison import (
    Picture,
    child_type,
    is_local,
    parse_picture,
    with_command_line,
)
from qmpvcpu.core.state.inventory import parse_version
from qmpvcpu.domain.reader import answers_of
from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.host.process import Process, command_line_of, folder_of
from qmpvcpu.ports import Monitor

#: The QOM paths of devices: those with an id, those without, and the machine's own.
_ADDED: Final = ("/machine/peripheral", "/machine/peripheral-anon")
_OWN: Final = "/machine/unattached"
#: QOM types of properties whose values are compared.
_VALUES: Final = frozenset(
    {"bool", "string", "str", "int", "uint8", "uint16", "uint32", "uint64", "OnOffAuto", "size"}
)
#: The property that holds the place of a device that is not on a PCI bus, by the end of its type's
#: name.
_PLACES: Final = {"-ccw": "dev_id", "virtserialport": "nr", "virtconsole": "nr", "pc-dimm": "addr"}
#: A bus of a device that has an id. The QOM paths of other buses differ between versions.
_BUS: Final = re.compile(r"/machine/peripheral/([^/]+)/")
#: The properties that hold the place on a bus: for PCI, and for SCSI.
_ADDRESSES: Final = ("addr", "scsi-id")
#: The compared properties of a memory backend.
_ACCESS: Final = ("readonly", "rom")


async def read_picture(monitor: Monitor, process: Process | None = None) -> Picture:
    """Query one QEMU, in any run state of its guest; nothing is touched.

    Args:
        monitor: the monitor of QEMU.
        process: the QEMU process, if it runs on this host.

    Raises:
        VcpuConnectionError: the connection to QEMU broke.
    """
    queries: dict[str, Awaitable[object]] = {
        "summary": monitor.query_memory_size_summary(),
        "ramblock": monitor.execute("x-query-ramblock"),
        "memdevs": monitor.execute("query-memdev"),
        "pci": monitor.execute("query-pci"),
        "block": monitor.execute("query-block"),
        "mtree": monitor.human_monitor_command("info mtree -f"),
        "numa": monitor.human_monitor_command("info numa"),
        "cpus": monitor.query_cpus_fast(),
        "properties": _list(monitor, "/machine"),
        **{path: _list(monitor, path) for path in (*_ADDED, _OWN)},
    }
    replies = await answers_of(queries)
    summary = replies.get("summary")
    replies["memory"] = summary.get("base-memory") if isinstance(summary, dict) else None
    replies["machine"] = await _values(monitor, "/machine", replies.get("properties"))
    cpus = replies.get("cpus")
    first = (
        cpus[0].get("qom-path")
        if isinstance(cpus, list) and cpus and isinstance(cpus[0], dict)
        else None
    )
    if isinstance(first, str):
        replies["cpu"] = await _values(monitor, first, await _answer(_list(monitor, first)))
    rows = [row for row in _rows(replies.get("memdevs")) if isinstance(row, dict)]
    ids = [row["id"] for row in rows if isinstance(row.get("id"), str)]
    access = {
        name: answers_of({key: monitor.qom_get(f"/objects/{name}", key) for key in _ACCESS})
        for name in ids
    }
    replies["backends"] = dict(zip(access, await asyncio.gather(*access.values()), strict=True))
    replies["added"] = [
        row for path in _ADDED for row in await _devices(monitor, path, replies.get(path))
    ]
    replies["own"] = await _devices(monitor, _OWN, replies.get(_OWN))
    picture = parse_picture(parse_version(monitor.greeting), replies)
    if picture.disks is not None:
        picture = replace(
            picture, disks=await asyncio.to_thread(_real_disks, picture.disks, process)
        )
    words = await asyncio.to_thread(command_line_of, process) if process is not None else []
    return with_command_line(picture, read_command_line(words)) if words else picture


def _real_disks(
    disks: Mapping[str, tuple[str, ...]], process: Process | None
) -> dict[str, tuple[str, ...]]:
    folder = folder_of(process) if process is not None else None
    return {key: (real_file(file, folder), *rest) for key, (file, *rest) in disks.items()}


def real_file(file: str, folder: str | None) -> str:
    """Return the name of an image without symbolic links, if it is a file on this host and its
    folder is known; else the same name.

    Args:
        file: the name.
        folder: the working directory of QEMU.
    """
    if not file or not is_local(file) or (folder is None and not file.startswith("/")):
        return file
    return os.path.realpath(os.path.join(folder or "/", file))  # noqa: PTH118 - a string is enough


def _list(monitor: Monitor, path: str) -> Awaitable[object]:
    return monitor.execute("qom-list", {"path": path})


def _rows(listed: object) -> list[Any]:
    """Check the number of rows, because each row leads to a query."""
    if not isinstance(listed, list):
        return []
    if len(listed) > _MOST_ROWS:
        raise VcpuConnectionError(
            f"QEMU lists {len(listed)} objects or properties in one place, and no machine has that"
            " many",
            reason="malformed",
            hint="check that this is QEMU's QMP socket; --qmp-log FILE keeps what it sends",
        )
    return listed


#: An x86 CPU has 500 properties (11.1).
_MOST_ROWS: Final = 5000


async def _answer(queries: Awaitable[object]) -> object:
    return (await answers_of({"": queries}))[""]


async def _values(monitor: Monitor, path: str, listed: object) -> dict[str, Any]:
    """Return every property of an object that has a plain type."""
    rows = [row for row in _rows(listed) if isinstance(row, dict)]
    names = [str(row.get("name")) for row in rows if row.get("type") in _VALUES]
    return await answers_of({name: monitor.qom_get(path, name) for name in names})


async def _devices(monitor: Monitor, path: str, listed: object) -> list[tuple[str, str]]:
    """Return the type and place of each child."""
    found: list[tuple[str, str]] = []
    for row in _rows(listed):
        kind = child_type(row)
        if kind is None:
            continue
        key = next((key for end, key in _PLACES.items() if kind.endswith(end)), None)
        device = f"{path}/{row['name']}"
        place = await _answer(monitor.qom_get(device, key)) if key is not None else None
        if place is None and path in _ADDED:
            place = await _behind(monitor, device)
        found.append((kind, "" if place is None else str(place)))
    return found


async def _behind(monitor: Monitor, device: str) -> str | None:
    """Return the place of a device on a bus of another device that has an id. QEMU lists this place
    among its PCI devices only after the firmware has numbered that bus.
    """
    replies = await answers_of(
        {key: monitor.qom_get(device, key) for key in ("parent_bus", *_ADDRESSES)}
    )
    bus = replies["parent_bus"]
    match = _BUS.match(bus) if isinstance(bus, str) else None
    if match is None:
        return None
    slot, target = (replies[key] for key in _ADDRESSES)
    if isinstance(slot, int):
        return f"behind '{match[1]}' at {slot >> 3:02x}.{slot & 7}"
    return f"behind '{match[1]}'" + (f" at {target}" if target is not None else "")
