"""Asks a QEMU what its machine is, for `core.machine.comparison`."""

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
from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.host.process import Process, command_line_of, folder_of
from qmpvcpu.ports import Monitor

#: Where devices are: with an id, without one, and a machine's own.
_ADDED: Final = ("/machine/peripheral", "/machine/peripheral-anon")
_OWN: Final = "/machine/unattached"
#: QOM types of properties whose values are compared.
_VALUES: Final = frozenset(
    {"bool", "string", "str", "int", "uint8", "uint16", "uint32", "uint64", "OnOffAuto", "size"}
)
#: By the end of a type's name, the property that tells its place where it is not on a PCI bus.
_PLACES: Final = {"-ccw": "dev_id", "virtserialport": "nr", "virtconsole": "nr", "pc-dimm": "addr"}
#: A bus of a device that has an id; QOM paths of other buses differ between versions.
_BUS: Final = re.compile(r"/machine/peripheral/([^/]+)/")
#: What tells the place on a bus: of PCI, of SCSI.
_ADDRESSES: Final = ("addr", "scsi-id")
#: Of a memory backend.
_ACCESS: Final = ("readonly", "rom")


async def read_picture(monitor: Monitor, process: Process | None = None) -> Picture:
    """Ask one, whatever its guest does; nothing is touched.

    Args:
        monitor: of QEMU.
        process: of QEMU, where that runs on this host.

    Raises:
        VcpuConnectionError: QEMU is lost.
    """
    asked: dict[str, Awaitable[object]] = {
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
    replies = await _all(asked)
    summary = replies.get("summary")
    replies["memory"] = summary.get("base-memory") if isinstance(summary, dict) else None
    replies["machine"] = await _values(monitor, "/machine", replies.get("properties"))
    cpus = replies.get("cpus")
    first = cpus[0].get("qom-path") if isinstance(cpus, list) and cpus and isinstance(cpus[0], dict) else None
    if isinstance(first, str):
        replies["cpu"] = await _values(monitor, first, await _answer(_list(monitor, first)))
    memdevs = replies.get("memdevs")
    rows = [row for row in _rows(memdevs) if isinstance(row, dict)]
    ids = [row["id"] for row in rows if isinstance(row.get("id"), str)]
    access = {name: _all({key: monitor.qom_get(f"/objects/{name}", key) for key in _ACCESS}) for name in ids}
    replies["backends"] = dict(zip(access, await asyncio.gather(*access.values()), strict=True))
    replies["added"] = [row for path in _ADDED for row in await _devices(monitor, path, replies.get(path))]
    replies["own"] = await _devices(monitor, _OWN, replies.get(_OWN))
    picture = parse_picture(parse_version(monitor.greeting), replies)
    if picture.disks is not None:
        picture = replace(picture, disks=await asyncio.to_thread(_real_disks, picture.disks, process))
    words = await asyncio.to_thread(command_line_of, process) if process is not None else []
    return with_command_line(picture, read_command_line(words)) if words else picture


def _real_disks(disks: Mapping[str, tuple[str, ...]], process: Process | None) -> dict[str, tuple[str, ...]]:
    folder = folder_of(process) if process is not None else None
    return {key: (real_file(file, folder), *rest) for key, (file, *rest) in disks.items()}


def real_file(file: str, folder: str | None) -> str:
    """The name of an image without links, where it is a file of this host; the same where its folder is not known.

    Args:
        file: the name.
        folder: where QEMU runs.
    """
    if not file or not is_local(file) or (folder is None and not file.startswith("/")):
        return file
    return os.path.realpath(os.path.join(folder or "/", file))  # noqa: PTH118 - names are all we need


def _list(monitor: Monitor, path: str) -> Awaitable[object]:
    return monitor.execute("qom-list", {"path": path})


async def _all(asked: Mapping[str, Awaitable[object]]) -> dict[str, object]:
    """The replies; None for what this QEMU declines."""
    answers = await asyncio.gather(*asked.values(), return_exceptions=True)
    found: dict[str, object] = {}
    for name, answer in zip(asked, answers, strict=True):
        if isinstance(answer, VcpuConnectionError) or (
            isinstance(answer, BaseException) and not isinstance(answer, Exception)
        ):
            raise answer
        found[name] = None if isinstance(answer, Exception) else answer
    return found


def _rows(listed: object) -> list[Any]:
    """Of each of them something is asked."""
    if not isinstance(listed, list):
        return []
    if len(listed) > _MOST_ROWS:
        raise VcpuConnectionError(
            f"QEMU lists {len(listed)} objects or properties in one place, and no machine has that many",
            reason="malformed",
            hint="is this socket really QEMU's? --qmp-log FILE keeps what it says",
        )
    return listed


#: A CPU of x86 has 500 properties (11.1).
_MOST_ROWS: Final = 5000


async def _answer(asked: Awaitable[object]) -> object:
    return (await _all({"": asked}))[""]


async def _values(monitor: Monitor, path: str, listed: object) -> dict[str, Any]:
    """Every plain property of an object."""
    rows = [row for row in _rows(listed) if isinstance(row, dict)]
    names = [str(row.get("name")) for row in rows if row.get("type") in _VALUES]
    return await _all({name: monitor.qom_get(path, name) for name in names})


async def _devices(monitor: Monitor, path: str, listed: object) -> list[tuple[str, str]]:
    """Type and place of each child."""
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
    """The place of what is on a bus of a device with an id: QEMU's list of PCI devices has it only once firmware
    has numbered that bus.
    """
    asked = {key: monitor.qom_get(device, key) for key in ("parent_bus", *_ADDRESSES)}
    replies = await _all(asked)
    bus = replies["parent_bus"]
    match = _BUS.match(bus) if isinstance(bus, str) else None
    if match is None:
        return None
    slot, target = (replies[key] for key in _ADDRESSES)
    if isinstance(slot, int):
        return f"behind '{match[1]}' at {slot >> 3:02x}.{slot & 7}"
    return f"behind '{match[1]}'" + (f" at {target}" if target is not None else "")
