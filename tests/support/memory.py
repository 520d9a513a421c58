"""A guest's memory, written and read by its physical addresses, whatever its architecture: by
QEMU's gdb stub.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.waiting import within

#: A command of the human monitor -> its text.
Monitor = Callable[[str], Awaitable[str]]

_RANGE = re.compile(r"(0[0-9a-f]{15})-(0[0-9a-f]{15}) \(prio -?\d+, ram\): (\S+)")
#: Out of the way of what a reset writes to the lowest addresses.
_LOW = 0x30000
_LENGTH = 16


async def blocks(hmp: Monitor, names: set[str]) -> dict[str, list[tuple[int, int]]]:
    """First and last addresses of each of these RAM blocks in the guest."""
    views = (await hmp("info mtree -f")).split("FlatView #")
    (text,) = (view for view in views if 'AS "memory"' in view)
    found: dict[str, list[tuple[int, int]]] = {}
    for start, end, name in _RANGE.findall(text):
        if name in names and (place := (int(start, 16), int(end, 16))) not in found.setdefault(
            name, []
        ):
            found[name].append(place)
    return found


def patterns(places: Mapping[str, list[tuple[int, int]]]) -> dict[int, bytes]:
    """Bytes for addresses in each block, another for each: near its beginning and at its end."""
    found = {}
    for name, ranges in places.items():
        for address in (min(ranges)[0] + _LOW, max(ranges)[1] + 1 - 4096):
            found[address] = hashlib.sha256(f"{name} {address}".encode()).digest()[:_LENGTH]
    return found


async def read(hmp: Monitor, address: int) -> bytes:
    """What is at a physical address."""
    text = await hmp(f"xp /{_LENGTH}xb {address:#x}")
    return bytes(
        int(word, 16) for line in text.splitlines() for word in line.partition(":")[2].split()
    )


async def write(hmp: Monitor, folder: Path, data: Mapping[int, bytes]) -> None:
    """Write to physical addresses; the guest stays paused. The stub's socket is made in `folder`."""
    path = folder / "gdb"
    await hmp(f"gdbserver unix:{path},server=on,wait=off")
    try:
        async with _stub(path) as ask:
            assert await ask("Qqemu.PhyMemMode:1") == "OK"
            for address, value in data.items():
                assert await ask(f"M{address:x},{len(value):x}:{value.hex()}") == "OK"
    finally:
        await hmp("gdbserver none")


@asynccontextmanager
async def _stub(path: Path) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """The gdb remote serial protocol: a packet and its answer."""
    reader, writer = await asyncio.open_unix_connection(path)

    async def ask(packet: str) -> str:
        writer.write(f"${packet}#{sum(packet.encode()) % 256:02x}".encode())
        await within(reader.readuntil(b"$"), "the stub answers")
        answer = (await within(reader.readuntil(b"#"), "the stub has answered"))[:-1]
        await reader.readexactly(2)
        writer.write(b"+")
        return answer.decode()

    try:
        yield ask
    finally:
        writer.close()
