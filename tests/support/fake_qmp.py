"""A scripted QMP server, for what real QEMU cannot be made to do: lies, silence, garbage, closing
at a bad time
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

GREETING = {
    "QMP": {
        "version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""},
        "capabilities": [],
    }
}


class Connection:
    """One client, seen from the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.buffer = ""

    def send(self, message: Any) -> None:
        self.raw(json.dumps(message).encode() + b"\r\n")

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    def event(self, name: str, **data: Any) -> None:
        self.send({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 5}})

    async def receive(self) -> dict[str, Any] | None:
        # A client need not end its commands with a newline, and qemu.qmp does not.
        while True:
            text = self.buffer.lstrip()
            try:
                message, used = json.JSONDecoder().raw_decode(text)
                self.buffer = text[used:]
                return message
            except ValueError:
                data = await self.reader.read(1 << 16)
                if not data:
                    return None
                self.buffer += data.decode()

    async def greet(self, greeting: dict[str, Any] = GREETING) -> None:
        self.send(greeting)
        command = await self.receive()
        assert command["execute"] == "qmp_capabilities"
        self.send({"return": {}, "id": command.get("id")})

    def reply(self, command: dict[str, Any], value: Any) -> None:
        self.send({"return": value, "id": command["id"]})

    def close(self) -> None:
        self.writer.close()


Script = Callable[[Connection], Awaitable[None]]


@asynccontextmanager
async def serve(
    folder: Path,
    script: Script,
    on_listen: Callable[[int], None] = lambda listening: None,
    kind: type[Connection] = Connection,
) -> AsyncIterator[str]:
    """Run `script` for every client; yields the socket's path. `on_listen` is given its descriptor,
    `kind` is what the script is given.
    """
    tasks: set[asyncio.Task[None]] = set()
    connections: list[Connection] = []

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(kind(reader, writer))
        task = asyncio.ensure_future(script(connections[-1]))
        tasks.add(task)
        await asyncio.wait([task])

    path = folder / "fake.qmp"
    server = await asyncio.start_unix_server(client, path)
    on_listen(server.sockets[0].fileno())
    try:
        yield str(path)
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in connections:
            connection.close()


def answering(answer: Callable[[Connection, dict[str, Any]], Any]) -> Script:
    """Greet, then call `answer(connection, command)` for each command; what it returns is the
    reply.
    """

    async def script(connection: Connection) -> None:
        await connection.greet()
        while (command := await connection.receive()) is not None:
            value = answer(connection, command)
            if asyncio.iscoroutine(value):
                value = await value
            if value is not None:
                connection.reply(command, value)

    return script
