"""QEMU's migration streams, as bytes: one is made of what it is to list, and what any lists is
read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from qmpvcpu.core.migration.stream import StreamError, StreamTable, parse_stream, table_differences

Section = tuple[str, int]
__all__ = ["Section", "StreamError", "StreamTable", "differences", "read", "table", "written"]


def read(head: bytes, tail: bytes | None = None) -> StreamTable:
    """What a stream lists, by its first and its last bytes. Raises StreamError."""
    return parse_stream(head, head if tail is None else tail)


def table(
    blocks: Mapping[str, int],
    sections: Iterable[Section] | None = (),
    machine: str | None = "pc-q35-10.0",
) -> StreamTable:
    return StreamTable(machine, blocks, None if sections is None else frozenset(sections))


def differences(source: StreamTable, here: StreamTable) -> list[str]:
    """In what the stream of one machine is not what the other would write."""
    return table_differences(source, here)


def written(
    blocks: Mapping[str, int],
    devices: Iterable[Any] | None = (),
    *,
    machine: str | None = "pc-q35-10.0",
    between: bytes = b"",
) -> bytes:
    """As QEMU writes it; `devices` are rows of its list, `between` is guest memory and device
    state.
    """
    data = b"QEVM\0\0\0\3"
    if machine is not None:
        data += b"\7" + struct.pack(">I", len(machine)) + machine.encode()
    data += b"\1\0\0\0\2\3ram\0\0\0\0\0\0\0\4" + struct.pack(">Q", sum(blocks.values()) | 4)
    for name, size in blocks.items():
        data += bytes((len(name.encode()),)) + name.encode() + struct.pack(">Q", size)
    data += b"\0\0\0\0\0\0\0\x10~\0\0\0\2" + between + b"\0"
    if devices is None:
        return data
    described = json.dumps({"page_size": 4096, "devices": list(devices)}).encode()
    return data + b"\6" + struct.pack(">I", len(described)) + described
