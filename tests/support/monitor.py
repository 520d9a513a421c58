"""An open QMP connection: commands go out, replies, errors and events come in. Its words are those
of QMP.

All of it raises `qmpvcpu.VcpuConnectionError` for a connection that cannot be made, or is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from qmpvcpu import VcpuConnectionError
from qmpvcpu.aio import finish
from qmpvcpu.core.address import parse_address
from qmpvcpu.ports import CommandError, MonitorEvent
from qmpvcpu.qemu.monitor import QmpMonitor, connect_monitor


@dataclass
class QmpError(Exception):
    """The error that a command is answered with."""

    error_class: str
    desc: str


class Event(NamedTuple):
    """An event; `time` in seconds since the epoch."""

    name: str
    data: Any
    time: float


#: What a listener hears: events, and last the loss of the connection.
EventReceived = Event | VcpuConnectionError


class Connection:
    """Of one client to one server, negotiated."""

    def __init__(self, monitor: QmpMonitor) -> None:
        self._monitor = monitor

    async def command(self, name: str, **arguments: Any) -> Any:
        """Send it; its reply. Raises QmpError."""
        try:
            return await self._monitor.execute(name, arguments or None)
        except CommandError as error:
            raise QmpError(error.error_class, error.text) from None

    def send(self, name: str) -> asyncio.Future[Any]:
        """Send it; its reply, which need not be awaited."""
        return self._monitor.execute(name)

    @contextmanager
    def listening(self, sink: Callable[[EventReceived], object]) -> Iterator[None]:
        """Give `sink` everything that is heard from now on."""

        def plain(heard: Any) -> None:
            is_event = isinstance(heard, MonitorEvent)
            sink(Event(heard.name, heard.data, heard.time) if is_event else heard)

        with self._monitor.listen(plain):
            yield

    @property
    def unsent_bytes(self) -> int:
        """What waits in this process, because the server does not read."""
        writer = self._monitor._client._writer
        return 0 if writer is None else writer.transport.get_write_buffer_size()

    async def close(self) -> None:
        await self._monitor.close()


@asynccontextmanager
async def connected(address: str, **options: Any) -> AsyncIterator[Connection]:
    """Connect to an address and close at the end; `connect_timeout` and `command_timeout` in
    seconds, `log` a `qmpvcpu.QmpLog`.
    """
    monitor = await connect_monitor(address, **options)
    try:
        yield Connection(monitor)
    finally:
        await finish(monitor.close())


async def ends(connection: Connection, count: int) -> list[Any]:
    """What that many commands, sent at once, end with: replies and errors."""
    calls = (connection.command("query-status") for _ in range(count))
    return await asyncio.gather(*calls, return_exceptions=True)


def meaning(address: str) -> str | tuple[str, int] | int:
    """What an address is taken for: a path, a host and port, or a file descriptor."""
    return parse_address(address)
