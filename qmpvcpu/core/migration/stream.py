"""QEMU's migration stream: the tables at its beginning and at its end. Pure.

The beginning lists the RAM blocks (migration/ram.c, RAM_SAVE_FLAG_MEM_SIZE). The end lists every
section of device state, with the address in its name (migration/savevm.c, QEMU_VM_VMDESCRIPTION,
JSON). The part between them is not read. The bytes may come from anywhere: each size is checked
before it is used.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

#: Bytes of the beginning and of the end that have the tables. One vCPU of x86_64 takes 10 KB at the
#: end.
HEAD_BYTES: Final = 1 << 20
TAIL_BYTES: Final = 64 << 20
#: Magic and version: migration/savevm.h, QEMU_VM_FILE_MAGIC and QEMU_VM_FILE_VERSION.
_BEGIN: Final = b"QEVM\0\0\0\3"
_CONFIGURATION: Final = 7
_DESCRIPTION: Final = 6
#: How the section "ram" begins after its number: its name, instance 0, version 4 (7.2 to 11.1).
_RAM: Final = b"\3ram\0\0\0\0\0\0\0\4"
#: How far from the beginning it may be: the machine's name and its subsections come before it.
_RAM_WITHIN: Final = 4096
_MEM_SIZE: Final = 4
#: The low bits of an address are flags: the smallest page of any target is 1 KiB.
_FLAGS: Final = 1023
_NUMBER: Final = struct.Struct(">I")
_SIZE: Final = struct.Struct(">Q")
_LONGEST_NAME: Final = 256
#: RAM blocks of firmware tables: QEMU resizes them if it has to, also while it reads a stream.
_RESIZED: Final = "/rom@"


class StreamError(ValueError):
    """It is not a migration stream of QEMU, or its tables are incomplete."""


@dataclass(frozen=True, slots=True)
class StreamTable:
    """What a stream lists.

    Attributes:
        machine: QEMU's machine type; None if the stream does not have it.
        blocks: RAM blocks, bytes by name.
        sections: device state, by name (with the address) and instance; None if the machine type
            writes no list (those up to 2.2).
    """

    machine: str | None
    blocks: Mapping[str, int] = field(hash=False)
    sections: frozenset[tuple[str, int]] | None


def parse_stream(head: bytes, tail: bytes) -> StreamTable:
    """The tables of a stream.

    Args:
        head: its first bytes, `HEAD_BYTES` or all.
        tail: its last bytes, `TAIL_BYTES` or all.

    Raises:
        StreamError: it is not a migration stream of QEMU, or it is incomplete.
    """
    if not head.startswith(_BEGIN):
        raise StreamError("it does not begin like a migration stream of QEMU")
    machine, start = _machine(head)
    return StreamTable(machine, _blocks(head, start), _sections(tail))


def _machine(head: bytes) -> tuple[str | None, int]:
    at = len(_BEGIN)
    if head[at : at + 1] != bytes((_CONFIGURATION,)):
        return None, at
    (length,) = _unpack(_NUMBER, head, at + 1)
    at += 1 + _NUMBER.size
    if not 0 < length <= _LONGEST_NAME:
        raise StreamError("the length of its machine's name is impossible")
    return _name(head, at, length), at + length


def _blocks(head: bytes, start: int) -> dict[str, int]:
    at = head.find(_RAM, start, start + _RAM_WITHIN)
    if at < 0:
        raise StreamError("it has no list of RAM blocks")
    at += len(_RAM)
    (word,) = _unpack(_SIZE, head, at)
    at += _SIZE.size
    if word & _FLAGS != _MEM_SIZE:
        raise StreamError("its list of RAM blocks does not begin with their size")
    left = word & ~_FLAGS
    found: dict[str, int] = {}
    while left > 0:
        length = head[at] if at < len(head) else 0
        name = _name(head, at + 1, length)
        (size,) = _unpack(_SIZE, head, at + 1 + length)
        at += 1 + length + _SIZE.size
        if not length or not 0 < size <= left or name in found:
            raise StreamError("its list of RAM blocks does not add up")
        found[name] = size
        left -= size
    return found


def _name(data: bytes, at: int, length: int) -> str:
    if at + length > len(data):
        raise StreamError("it ends inside its tables")
    return data[at : at + length].decode(errors="replace")


def _unpack(what: struct.Struct, data: bytes, at: int) -> tuple[int]:
    if at + what.size > len(data):
        raise StreamError("it ends inside its tables")
    value: tuple[int] = what.unpack_from(data, at)
    return value


def _sections(tail: bytes) -> frozenset[tuple[str, int]] | None:
    """The list at the end; None if there is none: then the last byte is the mark of the end of the
    file.
    """
    if tail.endswith(b"\0"):
        return None
    described = _description(tail)
    devices = described.get("devices") if isinstance(described, dict) else None
    if not isinstance(devices, list):
        raise StreamError("its list of devices is not a list")
    found = Counter(_section(row) for row in devices)
    if any(count > 1 for count in found.values()):
        raise StreamError("its list of devices has a device twice")
    # The presence of this section depends only on the run state.
    return frozenset(key for key in found if key[0] != "globalstate")


def _description(tail: bytes) -> Any:
    end = len(tail)
    # The list is text, but its length may have the mark's byte too: so a few candidates are tried
    # from the end.
    for _ in range(1 + _NUMBER.size):
        end = tail.rfind(_DESCRIPTION, 0, end)
        if end < 0:
            break
        begin = end + 1 + _NUMBER.size
        if begin <= len(tail) and _unpack(_NUMBER, tail, end + 1)[0] == len(tail) - begin:
            try:
                return json.loads(tail[begin:])
            except (ValueError, RecursionError) as error:
                raise StreamError("its list of devices cannot be read") from error
    raise StreamError("it does not end with a list of its devices")


def _section(row: object) -> tuple[str, int]:
    name = row.get("name") if isinstance(row, dict) else None
    instance = row.get("instance_id") if isinstance(row, dict) else None
    if not isinstance(name, str) or type(instance) is not int:
        raise StreamError("its list of devices has a device without a name")
    return name, instance


def table_differences(source: StreamTable, target: StreamTable) -> list[str]:
    """Every difference between a stream and what the definition's machine (`target`) would write,
    each as a text.
    """
    found = []
    if None not in (source.machine, target.machine) and source.machine != target.machine:
        found.append(
            f"machine type: {source.machine} at the source, {target.machine} in the definition"
        )
    for name in sorted(source.blocks.keys() | target.blocks.keys()):
        there, now = source.blocks.get(name), target.blocks.get(name)
        if there != now and not (there and now and name.startswith(_RESIZED)):
            found.append(
                f"RAM block '{name}': {_kib(there)} at the source, {_kib(now)} in the definition"
            )
    one, other = source.sections, target.sections
    if one is None or other is None:
        if one is not other:
            found.append("only one side has a list of devices")
        return found
    for names, where in (
        (one - other, "only at the source"),
        (other - one, "only in the definition"),
    ):
        found += [
            f"device state '{name}' (instance {number}) is {where}"
            for name, number in sorted(names)
        ]
    return found


def _kib(size: int | None) -> str:
    return "none" if size is None else f"{size // 1024} KiB"
