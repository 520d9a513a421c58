"""The guest agent (qemu-ga) over a socket: commands in order, each with a deadline.

This is not built on `qemu.qmp`: QMP greets and negotiates, and gives up a connection at the first
invalid byte. A client of the agent must skip what an earlier client left behind, and go on.

The guest may be hostile: the length of a line and every wait are bounded, and a message that
answers no command of ours is dropped. QEMU keeps the socket open whatever happens in the guest, so
only silence shows that no agent runs.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import itertools
import json
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from math import inf
from typing import Any, Final, TypeGuard

from qmpvcpu.core.address import parse_address
from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.ports import CommandError
from qmpvcpu.qemu.descriptor import socket_of

logger = logging.getLogger("qmpvcpu.qemu.agent")

AGENT_TIMEOUT: Final = 5.0

#: Longest line, bytes: 16000 CPUs of `guest-get-vcpus` fit, and parsed they take less than 25 MB.
LINE_LIMIT: Final = 1024 * 1024
#: Bytes asked for in one `guest-file-read`.
_CHUNK: Final = 64 * 1024
#: Seconds that closing files in the guest may take.
_CLOSE_SECONDS: Final = 1.0
#: Commands that are sent at once.
_WINDOW: Final = 16

_SENTINEL: Final = b"\xff"

#: Most bytes of the answer to `guest-sync-delimited`.
_ANSWER: Final = 200
#: After so many lines other tasks get a turn: a flood of lines must not delay a deadline.
_TURN: Final = 64
#: Most open files of the guest that we remember, even if its agent never closes any.
_MOST_HANDLES: Final = 256

#: When all commands of this task must be answered (the loop's clock), and after how many seconds.
_LIMIT: Final[ContextVar[tuple[float, float]]] = ContextVar(
    "qmpvcpu agent limit", default=(inf, inf)
)

Command = tuple[str, Mapping[str, Any] | None]


class AgentClient:
    """The agent at one address; one task at a time uses it, others queue.

    Args:
        address: a unix path, `host:port` or `fd:N`.
        timeout: seconds for each command. Opening the socket may take `AGENT_TIMEOUT`, even if this
            is shorter.

    The first command, and the first one after an error, begins with `guest-sync-delimited`.
    """

    #: Whether this kind of connection can read files; the agent's own configuration may still
    #: forbid it.
    reads_files = True

    def __init__(self, address: str, timeout: float = AGENT_TIMEOUT) -> None:
        self._address = address
        self._timeout = timeout
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._synced = False
        # Not from 1: a late answer to an earlier client must not pass for an answer to us.
        self._numbers = itertools.count(secrets.randbits(48))
        self._lock = asyncio.Lock()
        #: Whether this agent repeats the id of a command (qemu-ga 5.0 and later).
        self._repeats_ids = False
        #: Files open in the guest, and the ids of `guest-file-open` commands without an answer yet.
        self._handles: set[int] = set()
        self._opening: set[str] = set()

    @property
    def address(self) -> str:
        """What it is connected to, as the user wrote it."""
        return self._address

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Give all commands of this task in the body so many seconds together; nests."""
        end = asyncio.get_running_loop().time() + seconds
        token = _LIMIT.set(min((end, seconds), _LIMIT.get()))
        try:
            yield
        finally:
            _LIMIT.reset(token)

    async def open(self) -> None:
        """Connect to the socket, if it is not connected. Only a command shows whether an agent
        answers.

        Raises:
            VcpuConnectionError: there is no such socket, or it cannot be opened.
        """
        if self._writer is not None:
            return
        where = parse_address(self._address)
        try:
            async with asyncio.timeout(_left(AGENT_TIMEOUT)):
                if isinstance(where, str):
                    opened = await asyncio.open_unix_connection(where, limit=LINE_LIMIT)
                elif isinstance(where, tuple):
                    opened = await asyncio.open_connection(*where, limit=LINE_LIMIT)
                else:
                    opened = await asyncio.open_connection(
                        sock=socket_of(self._address, where), limit=LINE_LIMIT
                    )
        except TimeoutError as error:
            raise self._error("no-agent", "did not accept the connection") from error
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise self._error("missing", None) from error
            raise self._error("refused", f"cannot be reached: {error.strerror or error}") from error
        self._reader, self._writer = opened
        self._writer.transport.set_write_buffer_limits(high=0)  # drain() waits until all is written
        self._synced = self._repeats_ids = False

    async def close(self) -> None:
        """Close the connection. Never raises; may be called twice."""
        writer, self._reader, self._writer = self._writer, None, None
        if writer is not None:
            # Not close(): it would wait for QEMU, which does not read while no agent has the port
            # open.
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()

    # -- commands, one to one ---------------------------------------------------------------------

    async def get_vcpus(self) -> object:
        """`guest-get-vcpus`; the reply is the guest's, unchecked."""
        return await self.execute("guest-get-vcpus")

    async def set_vcpus(self, wanted: Mapping[int, bool]) -> object:
        """`guest-set-vcpus`: logical id -> online. Stops at the first error and keeps what it
        did.
        """
        vcpus = [{"logical-id": number, "online": online} for number, online in wanted.items()]
        return await self.execute("guest-set-vcpus", {"vcpus": vcpus})

    async def read_files(self, limits: Mapping[str, int]) -> list[bytes | None]:
        """Read files of the guest. `limits`: path -> most bytes that the file may have.

        The content is None if a file cannot be read, is longer, or did not come within the deadline
        that all files have together.

        Raises:
            CommandError: `guest-file-open` is disabled (class CommandNotFound).
            VcpuConnectionError: see `execute`.
        """
        contents: list[bytes | None] = []
        paths = list(limits)
        until = asyncio.get_running_loop().time() + _left(self._timeout)
        try:
            for begin in range(0, len(paths), _WINDOW):
                contents += await self._window(
                    [(path, limits[path]) for path in paths[begin : begin + _WINDOW]], until
                )
        except _OutOfTime:
            logger.debug("the agent at %s took too long over its files", self._address)
        return contents + [None] * (len(paths) - len(contents))

    async def _window(self, files: Sequence[tuple[str, int]], until: float) -> list[bytes | None]:
        contents: list[bytes | None] = [None] * len(files)
        try:
            opened = await self._all(
                [("guest-file-open", {"path": path, "mode": "r"}) for path, _ in files], until
            )
            for reply in opened:
                if isinstance(reply, CommandError) and reply.error_class == "CommandNotFound":
                    raise reply
            handles = {n: handle for n, handle in enumerate(opened) if _is_handle(handle)}
            counts = {n: min(files[n][1], _CHUNK) for n in handles}
            replies = await self._all(
                [_read(handle, counts[n]) for n, handle in handles.items()], until
            )
            for (number, handle), reply in zip(handles.items(), replies, strict=True):
                contents[number] = await self._rest(handle, reply, files[number][1], until)
            return contents
        finally:
            await self._close_files()

    async def _close_files(self) -> None:
        """Close the files that are open in the guest; one that fails is tried again next time."""
        handles = sorted(self._handles)
        for begin in range(0, len(handles), _WINDOW):
            part = handles[begin : begin + _WINDOW]
            try:
                async with asyncio.timeout(min(self._timeout, _CLOSE_SECONDS)):
                    await self._all([("guest-file-close", {"handle": handle}) for handle in part])
            except (VcpuConnectionError, TimeoutError):
                return
            self._handles.difference_update(part)

    async def _rest(self, handle: int, reply: object, limit: int, until: float) -> bytes | None:
        """Read the rest of a file; `reply` is the answer to the first read."""
        content = bytearray()
        count = min(limit, _CHUNK)
        while True:
            if not isinstance(reply, dict) or not isinstance(text := reply.get("buf-b64"), str):
                return None
            try:
                part = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                return None
            content += part
            if len(part) > count or len(content) > limit:
                return None
            if not part or reply.get("eof") is True:
                return bytes(content)
            (reply,) = await self._all([_read(handle, count)], until)

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> object:
        """One agent command.

        Raises:
            CommandError: the agent answered with an error.
            VcpuConnectionError: no agent answers within the deadline (`reason` "no-agent"), it
                answers later commands but not this one ("agent-restarted"), the answer is invalid
                ("malformed"), or the socket was closed ("closed").
        """
        (reply,) = await self._all([(command, arguments)])
        if isinstance(reply, CommandError):
            raise reply
        return reply

    # -- inside -----------------------------------------------------------------------------------

    async def _all(self, commands: Sequence[Command], until: float | None = None) -> list[object]:
        """Send several commands in one write; returns the answers in order, a `CommandError` for a
        failed one.

        `until`: after this time no command is sent any more (the loop's clock).
        """
        if not commands:
            return []
        async with self._lock:
            if until is not None and asyncio.get_running_loop().time() >= until:
                raise _OutOfTime
            if self._writer is None:
                await self.open()
            if not self._synced:
                await self._sync(_left(self._timeout))
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
            if command == "guest-file-open":
                self._opening.add(number)
            message: dict[str, object] = {"execute": command, "id": number}
            if arguments is not None:
                message["arguments"] = arguments
            sent.append((command, number))
            text += json.dumps(message).encode() + b"\n"
        replies: list[object] = []
        try:
            async with asyncio.timeout(_left(self._timeout)):
                writer.write(text)
                await writer.drain()
                for command, number in sent:
                    replies.append(self._understood(command, number, await reader.readuntil(b"\n")))
        except TimeoutError as error:
            raise await self._lost(sent[len(replies)][0]) from error
        except asyncio.LimitOverrunError as error:
            raise self._error(
                "malformed", f"sent a line of more than {LINE_LIMIT >> 20} MiB"
            ) from error
        except (EOFError, OSError) as error:
            raise await self._closed(error) from error
        return replies

    async def _lost(self, command: str) -> VcpuConnectionError:
        """Why a command got no answer in time."""
        if _left(inf) == 0:
            return self._too_slow(command)
        with suppress(VcpuConnectionError):
            await self._sync(min(self._timeout, 1.0))
            return self._error("agent-restarted", f"was restarted, or never answers '{command}'")
        return self._error("no-agent", f"did not answer '{command}' within {self._timeout:g} s")

    def _too_slow(self, command: str) -> VcpuConnectionError:
        text = f"is too slow: it did not answer '{command}' before {_LIMIT.get()[1]:g} s were over"
        hint = "try again when the guest is less busy, or look at qemu-ga in it"
        return self._error("no-agent", text, hint)

    async def _sync(self, seconds: float) -> None:
        """`guest-sync-delimited`; the sentinel in front ends a command that an earlier client left
        incomplete.
        """
        reader, writer = self._connection()
        number = next(self._numbers)
        request = json.dumps(
            {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        ).encode()
        try:
            async with asyncio.timeout(seconds):
                await writer.drain()  # a peer that does not read gets no more
                writer.write(_SENTINEL + request + b"\n")
                await writer.drain()
                late = await _read_to_sync(reader, number, LINE_LIMIT if self._opening else 0)
        except TimeoutError as error:
            if _left(inf) == 0:
                raise self._too_slow("guest-sync-delimited") from error
            raise self._error("no-agent", f"did not answer within {seconds:g} s") from error
        except (EOFError, OSError) as error:
            raise await self._closed(error) from error
        self._synced = True
        self._came_late(late)

    def _came_late(self, text: bytes) -> None:
        """Note the files that late answers to `guest-file-open` name, so that they are closed."""
        for line in text.split(b"\n") if self._opening else ():
            with suppress(ValueError, RecursionError):
                reply = json.loads(line)
                if (
                    isinstance(reply, dict)
                    and isinstance(reply.get("id"), str)
                    and reply["id"] in self._opening
                ):
                    self._opened(reply["id"], reply.get("return"))
        self._opening.clear()

    def _opened(self, number: str, handle: object) -> None:
        self._opening.discard(number)
        if _is_handle(handle) and len(self._handles) < _MOST_HANDLES:
            self._handles.add(handle)

    def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert self._reader is not None
        assert self._writer is not None
        return self._reader, self._writer

    def _understood(self, command: str, number: str, line: bytes) -> object:
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._error("malformed", f"answered '{command}' with what is not JSON") from error
        if not isinstance(reply, dict) or ("return" in reply) == ("error" in reply):
            raise self._error(
                "malformed", f"answered '{command}' with neither a result nor an error"
            )
        # Agents before 5.0 do not repeat the id. Later ones leave it out only if they could not
        # read the command.
        self._repeats_ids = self._repeats_ids or "id" in reply
        if reply.get("id", None if self._repeats_ids else number) != number:
            raise self._error(
                "malformed", f"answered '{command}' with the answer to another command"
            )
        if "return" in reply:
            if command == "guest-file-open":
                self._opened(number, reply["return"])
            return reply["return"]
        self._opening.discard(number)
        answer = reply["error"]
        if not isinstance(answer, dict) or not isinstance(answer.get("desc"), str):
            raise self._error("malformed", f"answered '{command}' with an error without a text")
        return CommandError(command, str(answer.get("class"))[:100], _shortened(answer["desc"]))

    async def _closed(self, error: EOFError | OSError) -> VcpuConnectionError:
        """Close our side of a connection that the other side has closed; returns the error."""
        await self.close()
        text = (
            f"broke the connection: {error.strerror or error}"
            if isinstance(error, OSError)
            else "closed its socket"
        )
        return self._error("closed", text)

    def _error(self, reason: str, text: str | None, hint: str | None = None) -> VcpuConnectionError:
        """`text` says what the agent did; None: its socket does not exist."""
        return VcpuConnectionError(
            f"the guest agent at '{self._address}' {text}"
            if text
            else f"there is no agent socket '{self._address}'",
            address=self._address,
            reason=reason,
            hint=hint or _HINTS.get(reason, "check that qemu-ga runs in the guest"),
            libvirt="VIR_ERR_AGENT_UNRESPONSIVE",
        )


_HINTS: Final = {
    "no-agent": "start qemu-ga in the guest, or close another client of this socket",
    "agent-restarted": "try again",
    "missing": "give the socket of the chardev behind the port org.qemu.guest_agent.0",
    "closed": "check that QEMU runs, or close another client of this socket",
}


def _shortened(text: str) -> str:
    """The guest's words as one printable line of bounded length."""
    clean = "".join(char if char.isprintable() else " " for char in text[:1000])
    return clean if len(clean) <= 300 else clean[:297] + "..."


async def _read_to_sync(reader: asyncio.StreamReader, number: int, keep: int) -> bytes:
    """Read up to and including the answer to our sync; returns the first `keep` bytes before it."""
    late, begun = bytearray(), b""
    for count in itertools.count(1):
        if not count % _TURN:
            await asyncio.sleep(0)
        try:
            line = begun + await reader.readuntil(b"\n")
            begun = b""
        except asyncio.LimitOverrunError as error:
            line = begun + await reader.readexactly(max(error.consumed, 1))
            # The answer may be at the end of an overlong line.
            line, begun = line[:-_ANSWER], line[-_ANSWER:]
        before, sentinel, answer = line.rpartition(_SENTINEL)
        late += (before if sentinel else line)[: max(keep - len(late), 0)]
        if sentinel and len(answer) <= _ANSWER:
            with suppress(ValueError, RecursionError):
                reply = json.loads(answer)
                if isinstance(reply, dict) and _is_number(reply.get("return"), number):
                    break
    return bytes(late)


def _left(seconds: float) -> float:
    """How many of `seconds` the limit of the whole task leaves."""
    return max(min(seconds, _LIMIT.get()[0] - asyncio.get_running_loop().time()), 0.0)


def _read(handle: int, count: int) -> Command:
    return "guest-file-read", {"handle": handle, "count": count}


def _is_handle(value: object) -> TypeGuard[int]:
    return type(value) is int and abs(value) < 1 << 63


def _is_number(value: object, number: int) -> bool:
    return type(value) is int and value == number


class _OutOfTime(Exception):
    """Reading the guest's files took too long; the rest is not read."""
