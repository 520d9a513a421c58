"""A client on `qemu.qmp` that delivers events and replies in QEMU's order, and survives a hostile
server.

It sends commands with `QMPClient`'s own methods. The members of `qemu.qmp` that it overrides are
for safety, not for speed; the tricks for speed are in `fast_client`, and everything works without
them.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from qemu.qmp import ExecInterruptedError, Message, QMPClient, Runstate
from qemu.qmp.error import ProtocolError
from qemu.qmp.message import DeserializationError
from qemu.qmp.protocol import StateError

from qmpvcpu.ports import CommandError, MonitorEvent, Peer, Sink
from qmpvcpu.qemu.connection_errors import MESSAGE_LIMIT, malformed
from qmpvcpu.qemu.qmp_log import QmpLog

#: Most values in one message, about: 65536 vCPUs have 700,000. A message of 32 MiB could have 11
#: million empty lists, which take 1 GB of memory.
_VALUES: Final = 1_000_000

#: After so many messages other tasks get a turn: a flood of messages must not delay a deadline.
_TURN: Final = 64

#: Most commands in one write, so that QEMU begins before the last of many has been made.
_BATCH: Final = 32

#: Bytes of an invalid line that its error quotes.
_SHOWN: Final = 100

#: Most characters that are kept of an error text of QEMU's.
_LONGEST: Final = 2000

_KINDS: Final = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}


class Client(QMPClient):
    """`QMPClient` that hands every event to our sinks as it arrives, in order with the replies."""

    def __init__(self, name: str, log: QmpLog | None) -> None:
        super().__init__(name, readbuflen=MESSAGE_LIMIT)
        self.sinks: list[Sink] = []
        self.log = log
        #: By message id, oldest first: name and result of each command without an answer yet.
        self.replies: dict[str, tuple[str, asyncio.Future[object]]] = {}
        #: When QEMU could begin with the oldest: when it was sent, or the one before was answered
        #: (loop's clock).
        self.began = 0.0
        #: Whether the other side has accepted the connection.
        self.was_open = False
        self._sent = 0
        self._batch: list[bytes] = []
        self._received = 0
        #: Replies (None) that their callers have not received yet, and the events that QEMU wrote
        #: between them.
        self._unseen: deque[MonitorEvent | None] = deque()
        self._calls: set[asyncio.Task[None]] = set()

    def request(
        self, command: str, arguments: Mapping[str, Any] | None, result: asyncio.Future[object]
    ) -> None:
        """Send one command now, in order; `result` gets what QEMU answers."""
        number = f"qmpvcpu#{self._sent}"
        self._sent += 1
        content: dict[str, object] = {"execute": command, "id": number}
        if arguments is not None:
            content["arguments"] = arguments
        if not self.replies:
            self.began = asyncio.get_running_loop().time()
        self.replies[number] = command, result
        self._put(content, command, result)

    def _put(
        self, content: Mapping[str, object], command: str, result: asyncio.Future[object]
    ) -> None:
        call = asyncio.create_task(self._call(content, command, result))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _call(
        self, content: Mapping[str, object], command: str, result: asyncio.Future[object]
    ) -> None:
        # Where the connection is lost, the monitor ends the command, since it knows why.
        with suppress(ExecInterruptedError, StateError):
            self._finish(command, result, await self._raw(content, assign_id=False))

    def _finish(self, command: str, result: asyncio.Future[object], message: Message) -> None:
        """Set the result of a command; later events wait until its caller has received it."""
        _answer(self.name or "", command, result, message)
        asyncio.get_running_loop().call_soon(self._reply_was_seen)

    async def _receive_reply(
        self, command: str, result: asyncio.Future[object], message: Message
    ) -> None:
        """Handle a reply to one of `replies`; it must end in a call of `_finish`."""
        await super()._on_message(message)

    # --- for safety: overridden members of qemu.qmp

    async def _recv(self) -> Message:
        # An event may overtake the reply to qmp_capabilities (RESUME of a QEMU that starts), and
        # qemu.qmp 0.0.6 takes it for that. A QEMU that is connected to while it starts may greet
        # twice (10.0).
        msg = await super()._recv()
        while self.runstate is Runstate.CONNECTING and (
            "event" in msg or ("QMP" in msg and self._greeting is not None)
        ):
            msg = await super()._recv()
        return msg

    async def _establish_session(self) -> None:
        # An error's text needs to know that the other side had accepted the connection.
        self.was_open = True
        await super()._establish_session()

    async def _do_recv(self) -> Message:
        # qemu.qmp 0.0.6 does not bound the number of values, and does not let other tasks run. It
        # pretty-prints an invalid message into its error: with 30 MB that takes seconds and 1 GB.
        self._received += 1
        if not self._received % _TURN:
            await asyncio.sleep(0)
        line = await self._readline()
        if line.count(b",") + line.count(b"[") + line.count(b"{") > _VALUES:
            raise ProtocolError(f"a message of more than {_VALUES} values")
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise DeserializationError(f"what is not JSON: {error.msg}", line[:_SHOWN]) from error
        if not isinstance(found, dict):
            raise ProtocolError(
                f"a message that is {_KINDS.get(type(found), 'a number')}, not an object"
            )
        return Message(found, eager=False)

    def _do_send(self, msg: Message) -> None:
        # Commands that are ready together go out in one write. If QEMU exited at one of them, a
        # later write would fail, and asyncio then drops the replies that have arrived: the results
        # of the earlier commands would be lost.
        self._batch.append(bytes(msg))
        if (
            self.runstate is not Runstate.RUNNING
            or self._outgoing.empty()
            or len(self._batch) >= _BATCH
        ):
            assert self._writer is not None
            self._writer.write(b"".join(self._batch))
            self._batch.clear()

    async def _on_message(self, msg: Message) -> None:
        # qemu.qmp 0.0.6 keeps each event until `events` is read (`_cb_inbound` has delivered it to
        # our sinks), uses ids of any type as keys, and pretty-prints a message that answers no
        # command.
        if "event" in msg:
            return
        number = msg.get("id")
        call = self.replies.pop(number, None) if isinstance(number, str) else None
        if call is not None:
            self.began = asyncio.get_running_loop().time()
            self._unseen.append(None)
            await self._receive_reply(*call, msg)
        elif "error" in msg and "id" not in msg:
            # QEMU could not parse what we sent.
            raise ProtocolError(f"an error that answers no command: {_text(msg['error'])}")
        # The QMP specification: a reply with an unknown id is dropped.

    # --- hooks that qemu.qmp offers

    def _cb_outbound(self, msg: Message) -> Message:
        self._note_sent(msg)
        return super()._cb_outbound(msg)

    def _cb_inbound(self, msg: Message) -> Message:
        self._note_received(msg)
        return super()._cb_inbound(msg)

    def _note_sent(self, msg: Message) -> None:
        if self.log is not None:
            self.log.write("send", msg)

    def _note_received(self, msg: Message) -> None:
        if self.log is not None:
            self.log.write("receive", msg)
        if "event" in msg and self.sinks:
            if self._unseen:
                self._unseen.append(_event(msg))
            else:
                self._deliver(_event(msg))

    def _reply_was_seen(self) -> None:
        self._unseen.popleft()
        while self._unseen and (event := self._unseen[0]) is not None:
            self._unseen.popleft()
            self._deliver(event)

    def _deliver(self, event: MonitorEvent) -> None:
        for sink in tuple(self.sinks):
            try:
                sink(event)
            except Exception as error:  # noqa: BLE001 - a mistake in one must not end the connection
                loop = asyncio.get_running_loop()
                loop.call_exception_handler(
                    {"message": f"a listener fails on {event.name}", "exception": error}
                )

    # --- the socket

    def abort(self) -> None:
        """Close the socket at once, and drop what is not written yet: asyncio would wait until that
        is read.
        """
        if self._writer is not None:
            self._writer.transport.abort()

    def is_local(self) -> bool:
        """Whether it is a unix socket, or a TCP connection whose ends have the same address."""
        sock = self._socket()
        if sock is None:
            return False
        if sock.family == socket.AF_UNIX:
            return True
        with suppress(OSError):
            return bool(sock.getsockname()[0] == sock.getpeername()[0])
        return False

    def peer(self) -> Peer:
        """Credentials and path of a unix socket's other end."""
        sock = self._socket()
        if sock is None or sock.family != socket.AF_UNIX:
            return Peer()
        with suppress(OSError, struct.error):
            pid, _, _ = struct.unpack(
                "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            )
            name = sock.getpeername()
            return Peer(pid, name if isinstance(name, str) and name else None)
        return Peer()

    def _socket(self) -> Any:
        return None if self._writer is None else self._writer.get_extra_info("socket")


def _text(error: object) -> str:
    text = error.get("desc") if isinstance(error, dict) else None
    return text[:_LONGEST] if isinstance(text, str) else "it has no text"


def _answer(address: str, command: str, result: asyncio.Future[object], message: Message) -> None:
    if result.done():
        return  # its caller does not wait any more
    if "return" in message:
        result.set_result(message["return"])
        return
    answer = message.get("error")
    if isinstance(answer, dict) and {"class", "desc"} <= answer.keys():
        words = (
            found if isinstance(found := answer[key], str) else repr(found)
            for key in ("class", "desc")
        )
        fail(result, CommandError(command, *(text[:_LONGEST] for text in words)))
    else:
        fail(
            result,
            malformed(
                address, ValueError(f"a reply to '{command}' that is neither result nor error")
            ),
        )


def fail(result: asyncio.Future[object], error: Exception) -> None:
    """End a command with an error.

    A caller of several commands stops waiting when the first one fails. Nothing reads the errors of
    the others then, and asyncio would log each of them.
    """
    result.set_exception(error)
    result.exception()


def _event(msg: Message) -> MonitorEvent:
    data = msg.get("data")
    stamp = msg.get("timestamp")
    seconds = 0.0
    if isinstance(stamp, dict):
        whole, micro = stamp.get("seconds"), stamp.get("microseconds")
        # QEMU writes -1 where the host's clock fails. A time after the year 2514 is invalid, too.
        if type(whole) is type(micro) is int and 0 <= whole < 1 << 34 and 0 <= micro < 1_000_000:
            seconds = whole + micro / 1e6
    return MonitorEvent(str(msg.get("event")), data if isinstance(data, dict) else {}, seconds)
