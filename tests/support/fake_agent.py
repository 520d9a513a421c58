"""A scripted guest agent, for what qemu-ga cannot be made to do: lies, silence, floods, answers
that come late.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any


class FakeAgent:
    """CPUs by logical id; `files` by path; `answers`: command -> a function, what it returns is
    sent raw.
    """

    def __init__(
        self, online: dict[int, bool] | None = None, files: dict[str, bytes] | None = None
    ) -> None:
        self.online = dict(online or {0: True, 1: True})
        self.files = dict(files or {})
        self.fixed = {0}
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Callable[[dict[str, Any]], bytes | None]] = {}
        self.handles: dict[int, str] = {}
        self.before_sync = b""
        self.connections = 0
        #: Seconds that each answer takes.
        self.pause = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        buffer = b""
        while data := await reader.read(1 << 16):
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                await self.line(line, writer)

    async def line(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        before, sentinel, rest = line.rpartition(b"\xff")
        if sentinel:
            # What qemu-ga says of a 0xFF, or of what it cuts short.
            writer.write(
                b'{"error": {"class": "GenericError", "desc": "JSON parse error, stray"}}\n'
            )
        command = json.loads(rest)
        name, arguments = command["execute"], command.get("arguments", {})
        self.commands.append((name, arguments))
        if self.pause:
            await asyncio.sleep(self.pause)
        if name in self.answers:
            raw = self.answers[name](command)
        elif name == "guest-sync-delimited":
            raw = (
                self.before_sync
                + b"\xff"
                + json.dumps({"return": arguments["id"]}).encode()
                + b"\n"
            )
        else:
            raw = json.dumps(self.answer(name, arguments) | {"id": command["id"]}).encode() + b"\n"
        if raw is not None:
            writer.write(raw)
            await writer.drain()

    def answer(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match name:
            case "guest-get-vcpus":
                rows = [
                    {"logical-id": n, "online": on, "can-offline": n not in self.fixed}
                    for n, on in self.online.items()
                ]
                return {"return": rows}
            case "guest-set-vcpus":
                return self.set(arguments["vcpus"])
            case "guest-file-open":
                if arguments["path"] not in self.files:
                    return error(
                        f"failed to open file '{arguments['path']}' (mode: 'r'): No such file or"
                        " directory"
                    )
                handle = 1000 + len(self.handles)
                self.handles[handle] = arguments["path"]
                return {"return": handle}
            case "guest-file-read":
                if arguments["handle"] not in self.handles:
                    return error(f"handle '{arguments['handle']}' has not been found")
                data = self.files[self.handles[arguments["handle"]]]
                text = base64.b64encode(data).decode()
                return {"return": {"count": len(data), "buf-b64": text, "eof": True}}
            case "guest-file-close":
                if self.handles.pop(arguments["handle"], None) is None:
                    return error(f"handle '{arguments['handle']}' has not been found")
                return {"return": {}}
        return error(f"The command {name} has not been found", "CommandNotFound")

    def set(self, wanted: list[dict[str, Any]]) -> dict[str, Any]:
        done = 0
        for row in wanted:
            number = row["logical-id"]
            if number not in self.online:
                problem = f'open("/sys/devices/system/cpu/cpu{number}/"): No such file or directory'
            elif number in self.fixed and not row["online"]:
                problem = f"logical processor #{number} can't be offlined"
            else:
                self.online[number] = row["online"]
                done += 1
                continue
            return {"return": done} if done else error(problem)
        return {"return": done}


def error(text: str, name: str = "GenericError") -> dict[str, Any]:
    return {"error": {"class": name, "desc": text}}


@asynccontextmanager
async def serve_agent(folder: Path, agent: FakeAgent) -> AsyncIterator[str]:
    """Listens as QEMU does for a virtio-serial port; yields the socket's path."""
    tasks: set[asyncio.Task[None]] = set()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with suppress(ConnectionResetError):  # a client that was killed
                await agent.serve(reader, writer)
        finally:
            writer.close()

    path = folder / "fake.agent"
    server = await asyncio.start_unix_server(client, path)
    try:
        yield str(path)
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
