"""The guest agent (qemu-ga) over a socket: commands in order, deadlines, nothing believed that was not asked for.

Not on `qemu.qmp`: its protocol greets, negotiates, and gives a connection up at the first odd byte, where the
agent's has to drop what an earlier client left behind and go on.

The guest is hostile: one line is bounded, all waiting is, and what comes unasked is dropped unread. QEMU keeps the
socket open whatever happens in the guest, so a missing agent is known by its silence only.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.ports import CommandError
from qmpvcpu.qemu.monitor import parse_address

__all__ = ["AgentClient", "open_agent"]

logger = logging.getLogger("qmpvcpu.qemu.agent")

AGENT_TIMEOUT: Final = 5.0

#: Longest line, bytes: 16000 CPUs of `guest-get-vcpus` fit, and what JSON makes of it stays below 25 MB.
LINE_LIMIT: Final = 1024 * 1024
#: Bytes asked for in one `guest-file-read`, and of one file in all.
_CHUNK: Final = 64 * 1024
_FILE_LIMIT: Final = 8 * 1024 * 1024
#: Commands under way at once.
_WINDOW: Final = 16

_SENTINEL: Final = b"\xff"

Command = tuple[str, Mapping[str, Any] | None]


class AgentClient:
    """An agent at one address; made by `open_agent`, used by one task at a time (others queue).

    The first use, and the first after anything went wrong, begins with `guest-sync-delimited`.
    """

    def __init__(self, address: str, timeout: float = AGENT_TIMEOUT) -> None:
        self._address = address
        self._timeout = timeout
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._synced = False
        self._numbers = itertools.count(1)
        self._lock = asyncio.Lock()

    @property
    def address(self) -> str:
        """What it is connected to, as the user wrote it."""
        return self._address

    async def open(self) -> None:
        """Connect to the socket; whether an agent listens behind it, the first command shows.

        Raises:
            VcpuConnectionError: there is no such socket, or it cannot be opened.
        """
        where = parse_address(self._address)
        try:
            async with asyncio.timeout(self._timeout):
                if isinstance(where, str):
                    opened = await asyncio.open_unix_connection(where, limit=LINE_LIMIT)
                elif isinstance(where, tuple):
                    opened = await asyncio.open_connection(*where, limit=LINE_LIMIT)
                else:
                    from qmpvcpu.qemu.monitor import _socket_of

                    opened = await asyncio.open_connection(sock=_socket_of(self._address, where), limit=LINE_LIMIT)
        except TimeoutError as error:
            raise self._error("no-agent", "did not accept the connection", error) from error
        except OSError as error:
            text = f"cannot connect to the agent's socket: {error.strerror or error}"
            reason = "missing" if isinstance(error, FileNotFoundError) else "refused"
            raise self._error(reason, text, error) from error
        self._reader, self._writer = opened
        self._synced = False

    async def close(self) -> None:
        """Close the connection. Never raises; may be called twice."""
        writer, self._reader, self._writer = self._writer, None, None
        if writer is not None:
            writer.close()
            with suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    # -- commands, one to one ---------------------------------------------------------------------

    async def get_vcpus(self) -> object:
        """`guest-get-vcpus`; the reply is the guest's, unchecked."""
        return await self.execute("guest-get-vcpus")

    async def set_vcpus(self, wanted: Mapping[int, bool]) -> object:
        """`guest-set-vcpus`: logical id -> online. Stops at the first error and keeps what it did."""
        vcpus = [{"logical-id": number, "online": online} for number, online in wanted.items()]
        return await self.execute("guest-set-vcpus", {"vcpus": vcpus})

    async def read_files(self, paths: Sequence[str]) -> list[bytes | None]:
        """The contents of these files of the guest, None for one that cannot be read there.

        Raises:
            CommandError: `guest-file-open` is disabled (class CommandNotFound).
            VcpuConnectionError: see `execute`.
        """
        contents: list[bytes | None] = [None] * len(paths)
        for begin in range(0, len(paths), _WINDOW):
            part = paths[begin : begin + _WINDOW]
            opened = await self._all([("guest-file-open", {"path": path, "mode": "r"}) for path in part])
            handles = {n: handle for n, handle in enumerate(opened) if type(handle) is int}
            refused = [e for e in opened if isinstance(e, CommandError) and e.error_class == "CommandNotFound"]
            if refused:
                raise refused[0]
            try:
                replies = await self._all(
                    [("guest-file-read", {"handle": handle, "count": _CHUNK}) for handle in handles.values()]
                )
                for (number, handle), reply in zip(handles.items(), replies, strict=True):
                    contents[begin + number] = await self._rest(handle, reply)
            finally:
                with suppress(VcpuConnectionError):
                    await self._all([("guest-file-close", {"handle": handle}) for handle in handles.values()])
        return contents

    async def _rest(self, handle: int, reply: object) -> bytes | None:
        """What a file holds, from the reply to its first read on."""
        content = b""
        while True:
            if not isinstance(reply, dict) or not isinstance(text := reply.get("buf-b64"), str):
                return None
            try:
                content += base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                return None
            if not text or reply.get("eof") is True or len(content) > _FILE_LIMIT:
                return content if len(content) <= _FILE_LIMIT else None
            (reply,) = await self._all([("guest-file-read", {"handle": handle, "count": _CHUNK})])

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> object:
        """One agent command.

        Raises:
            CommandError: the agent answered with an error.
            VcpuConnectionError: no agent answers within the deadline (`reason` "no-agent"), it answered again only
                after this command was lost ("agent-restarted"), the answer is none ("malformed"), or the socket
                was closed ("closed").
        """
        (reply,) = await self._all([(command, arguments)])
        if isinstance(reply, CommandError):
            raise reply
        return reply

    # -- inside -----------------------------------------------------------------------------------

    async def _all(self, commands: Sequence[Command]) -> list[object]:
        """Several commands, written at once and answered in order; of one that fails, its `CommandError`."""
        async with self._lock:
            if self._writer is None:
                await self.open()
            if not self._synced:
                await self._sync(self._timeout)
            self._synced = False
            replies = await self._converse(commands)
            self._synced = True
            return replies

    async def _converse(self, commands: Sequence[Command]) -> list[object]:
        reader, writer = self._connection()
        sent: list[tuple[str, str]] = []
        text = b""
        for command, arguments in commands:
            number = f"qmpvcpu#{next(self._numbers)}"
            message: dict[str, object] = {"execute": command, "id": number}
            if arguments is not None:
                message["arguments"] = arguments
            sent.append((command, number))
            text += json.dumps(message).encode() + b"\n"
        replies: list[object] = []
        try:
            async with asyncio.timeout(self._timeout):
                writer.write(text)
                await writer.drain()
                for command, number in sent:
                    replies.append(self._understood(command, number, await reader.readuntil(b"\n")))
        except TimeoutError as error:
            raise await self._lost(sent[len(replies)][0], error) from error
        except asyncio.IncompleteReadError as error:
            await self.close()
            raise self._error("closed", "closed its socket", error) from error
        except asyncio.LimitOverrunError as error:
            raise self._error("malformed", f"sent a line of more than {LINE_LIMIT >> 20} MiB", error) from error
        except OSError as error:
            await self.close()
            raise self._error("closed", f"is gone: {error.strerror or error}", error) from error
        return replies

    async def _lost(self, command: str, cause: BaseException) -> VcpuConnectionError:
        """Why a command got no answer in time."""
        with suppress(VcpuConnectionError):
            await self._sync(min(self._timeout, 1.0))
            return self._error("agent-restarted", f"was restarted, or never answers '{command}'", cause)
        return self._error("no-agent", f"did not answer '{command}' within {self._timeout:g} s", cause)

    async def _sync(self, seconds: float) -> None:
        """`guest-sync-delimited`, with a sentinel in front that ends whatever an earlier client left half said."""
        reader, writer = self._connection()
        number = next(self._numbers)
        request = json.dumps({"execute": "guest-sync-delimited", "arguments": {"id": number}}).encode()
        try:
            async with asyncio.timeout(seconds):
                writer.write(_SENTINEL + request + b"\n")
                await writer.drain()
                while True:
                    await _skip_to_sentinel(reader)
                    try:
                        line = await reader.readuntil(b"\n")
                    except asyncio.LimitOverrunError:
                        continue
                    with suppress(ValueError, RecursionError):
                        reply = json.loads(line)
                        if isinstance(reply, dict) and reply.get("return") == number:
                            self._synced = True
                            return
        except TimeoutError as error:
            raise self._error("no-agent", f"did not answer within {seconds:g} s", error) from error
        except asyncio.IncompleteReadError as error:
            await self.close()
            raise self._error("closed", "closed its socket", error) from error
        except OSError as error:
            await self.close()
            raise self._error("closed", f"is gone: {error.strerror or error}", error) from error

    def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert self._reader is not None
        assert self._writer is not None
        return self._reader, self._writer

    def _understood(self, command: str, number: str, line: bytes) -> object:
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._error("malformed", f"answered '{command}' with what is not JSON", error) from error
        if not isinstance(reply, dict) or ("return" in reply) == ("error" in reply):
            raise self._error("malformed", f"answered '{command}' with neither a result nor an error", None)
        # Agents before 5.0 do not repeat the id.
        if "id" in reply and reply["id"] != number:
            raise self._error("malformed", f"answered '{command}' with the answer to another command", None)
        if "return" in reply:
            return reply["return"]
        answer = reply["error"]
        if not isinstance(answer, dict) or not isinstance(answer.get("desc"), str):
            raise self._error("malformed", f"answered '{command}' with an error that says nothing", None)
        return CommandError(command, str(answer.get("class"))[:100], _shortened(answer["desc"]))

    def _error(self, reason: str, text: str, cause: BaseException | None) -> VcpuConnectionError:
        hint = _HINTS.get(reason, "look at the guest's agent: is it qemu-ga, and does it run?")
        error = VcpuConnectionError(
            f"the guest agent at '{self._address}' {text}",
            address=self._address,
            reason=reason,
            hint=hint,
            libvirt="VIR_ERR_AGENT_UNRESPONSIVE",
        )
        error.__cause__ = cause
        return error


_HINTS: Final = {
    "no-agent": "start qemu-ga in the guest; the socket takes one client at a time, another one may hold it",
    "agent-restarted": "ask again",
    "missing": "name the chardev's socket of the port org.qemu.guest_agent.0",
    "closed": "QEMU has exited, or another client holds the socket",
}


def _shortened(text: str) -> str:
    """The guest's words: printable, one line, bounded."""
    clean = "".join(char if char.isprintable() else " " for char in text[:1000])
    return clean if len(clean) <= 300 else clean[:297] + "..."


async def _skip_to_sentinel(reader: asyncio.StreamReader) -> None:
    while True:
        try:
            await reader.readuntil(_SENTINEL)
            return
        except asyncio.LimitOverrunError as error:
            await reader.readexactly(max(error.consumed, 1))


async def open_agent(address: str, *, timeout: float = AGENT_TIMEOUT) -> AgentClient:
    """Connect to an agent's socket: a unix path, `host:port` or `fd:N`; `timeout` in seconds, for each command.

    Raises:
        VcpuConnectionError: the socket cannot be opened.
    """
    client = AgentClient(address, timeout)
    await client.open()
    logger.debug("connected to the agent at %s", address)
    return client
