"""A QMP monitor on `qemu.qmp`: commands one to one, a deadline on each, events before the act."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final

from qemu.qmp import ConnectError, Message, QMPClient, Runstate
from qemu.qmp.error import ProtocolError
from qemu.qmp.message import DeserializationError

from qmpvcpu.aio import finish
from qmpvcpu.core.address import parse_address
from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.ports import CommandError, Monitor, MonitorEvent, Peer, Sink
from qmpvcpu.qemu.connection_errors import MESSAGE_LIMIT, connect_error, lost, malformed, no_answer, os_error
from qmpvcpu.qemu.descriptor import socket_of
from qmpvcpu.qemu.qmp_log import QmpLog

logger = logging.getLogger("qmpvcpu.qemu.monitor")

CONNECT_TIMEOUT: Final = 5.0
COMMAND_TIMEOUT: Final = 10.0

#: So long a server may take to read what it was sent, when the connection is closed, seconds.
_CLOSE_SECONDS: Final = 1.0

#: Most values in one, about: 65536 vCPUs have 700,000. In 32 MiB there is room for 11 million empty lists, and in
#: memory for 1 GB of them.
_VALUES: Final = 1_000_000

#: After so many messages everything else has its turn: a flood of them must not hold up a deadline.
_TURN: Final = 64

#: Commands in one write, at most: QEMU is to begin before the last of many is made.
_BATCH: Final = 32


class _Client(QMPClient):
    """`QMPClient` that hands every event to our sinks as it arrives, in order with the replies."""

    def __init__(self, name: str, log: QmpLog | None) -> None:
        super().__init__(name, readbuflen=MESSAGE_LIMIT)
        self.sinks: list[Sink] = []
        self.log = log
        #: By message id, oldest first: command and result of what has not been answered yet.
        self.replies: dict[str, tuple[str, asyncio.Future[object]]] = {}
        self.sent = 0
        self._batch: list[bytes] = []
        #: Replies that were delivered, and that who waits for them has not seen yet.
        self._answered = 0
        self._received = 0
        #: Whether the other side has taken the connection.
        self.was_open = False
        #: When the oldest could begin: as it was sent, or as the one before was answered (the loop's clock).
        self.began = 0.0

    def request(self, command: str, arguments: Mapping[str, Any] | None, result: asyncio.Future[object]) -> None:
        """Send one command now, in order; `result` gets what QEMU answers.

        `QMPClient.execute` copies and serialises each command three times, and wants a task for each that is to be
        pipelined: that was half of what a plug cost in Python (qemu.qmp 0.0.6).
        """
        number = f"qmpvcpu#{self.sent}"
        self.sent += 1
        content: dict[str, object] = {"execute": command, "id": number}
        if arguments is not None:
            content["arguments"] = arguments
        if not self.replies:
            self.began = asyncio.get_running_loop().time()
        self.replies[number] = command, result
        self._outgoing.put_nowait(Message(content, eager=False))

    async def _recv(self) -> Message:
        # An event may overtake the reply to qmp_capabilities (RESUME of a QEMU that starts), and qemu.qmp 0.0.6
        # takes it for that.
        msg = await super()._recv()
        while self.runstate is Runstate.CONNECTING and "event" in msg:
            msg = await super()._recv()
        return msg

    async def _establish_session(self) -> None:
        self.was_open = True
        await super()._establish_session()

    async def _do_recv(self) -> Message:
        # qemu.qmp 0.0.6 puts what it does not understand into its errors, whole and pretty-printed: of 30 MB that
        # takes seconds and 1 GB.
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
            raise ProtocolError(f"a message that is {_KINDS.get(type(found), 'a number')}, not an object")
        return Message(found, eager=False)

    async def _on_message(self, msg: Message) -> None:
        if "event" in msg:
            # `_cb_inbound` has given it to our sinks. qemu.qmp 0.0.6 would keep it until somebody reads its
            # `events`, and nobody does.
            return
        number = msg.get("id")
        asked = self.replies.pop(number, None) if isinstance(number, str) else None
        if asked is None:
            if "error" in msg and "id" not in msg:
                # What QEMU says of what it could not read.
                raise ProtocolError(f"an error that answers no command: {_words(msg['error'])}")
            # The specification: replies with an id that is not known are dropped.
            return
        loop = asyncio.get_running_loop()
        self.began = loop.time()
        _answer(self.name or "", *asked, msg)
        self._answered += 1
        loop.call_soon(self._note_seen)

    def abort(self) -> None:
        """Close the socket, with what is still to be written: asyncio would wait until that is read."""
        if self._writer is not None:
            self._writer.transport.abort()

    def is_local(self) -> bool:
        """A unix socket, or TCP between two ends of one address."""
        writer = self._writer
        sock = None if writer is None else writer.get_extra_info("socket")
        if sock is None:
            return False
        if sock.family == socket.AF_UNIX:
            return True
        with suppress(OSError):
            return bool(sock.getsockname()[0] == sock.getpeername()[0])
        return False

    def peer(self) -> Peer:
        """Credentials and path of a unix socket's other end."""
        sock = self._writer.get_extra_info("socket") if self._writer is not None else None
        if sock is None or sock.family != socket.AF_UNIX:
            return Peer()
        with suppress(OSError, struct.error):
            pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            name = sock.getpeername()
            return Peer(pid, name if isinstance(name, str) and name else None)
        return Peer()

    def _do_send(self, msg: Message) -> None:
        # What was asked at once goes out at once: each write wakes QEMU, and that takes as long as all else.
        self._batch.append(bytes(msg))
        if self.runstate is not Runstate.RUNNING or self._outgoing.empty() or len(self._batch) >= _BATCH:
            assert self._writer is not None
            self._writer.write(b"".join(self._batch))
            self._batch.clear()

    def _cb_outbound(self, msg: Message) -> Message:
        if self.log is not None:
            self.log.write("send", msg)
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        if self.log is not None:
            self.log.write("receive", msg)
        if "event" in msg and self.sinks:
            if self._answered:
                # What waits for a reply runs in the next turn of the loop: so replies and events are seen in the
                # order in which QEMU wrote them.
                asyncio.get_running_loop().call_soon(self._give, _event(msg))
            else:
                self._give(_event(msg))
        return msg

    def _note_seen(self) -> None:
        self._answered -= 1

    def _give(self, event: MonitorEvent) -> None:
        for sink in tuple(self.sinks):
            try:
                sink(event)
            except Exception as error:  # noqa: BLE001 - a mistake in one must not end the connection
                loop = asyncio.get_running_loop()
                loop.call_exception_handler({"message": f"a listener fails on {event.name}", "exception": error})


#: Bytes of a line that are shown of it.
_SHOWN: Final = 100
_KINDS: Final = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}


def _words(error: object) -> str:
    text = error.get("desc") if isinstance(error, dict) else None
    return text[:_LONGEST] if isinstance(text, str) else "it says nothing"


#: Most characters of an error of QEMU's that are kept.
_LONGEST: Final = 2000


def _answer(address: str, command: str, result: asyncio.Future[object], message: Message) -> None:
    if result.done():
        return  # whoever asked does not wait any more
    if "return" in message:
        result.set_result(message["return"])
        return
    answer = message.get("error")
    if isinstance(answer, dict) and {"class", "desc"} <= answer.keys():
        words = (found if isinstance(found := answer[key], str) else repr(found) for key in ("class", "desc"))
        _fail(result, CommandError(command, *(text[:_LONGEST] for text in words)))
    else:
        what = ValueError(f"a reply to '{command}' that is neither result nor error")
        _fail(result, malformed(address, what))


def _fail(result: asyncio.Future[object], error: Exception) -> None:
    """Who has asked for several at once gives the others up with the first that fails: nobody looks at those then,
    and asyncio would log each of them.
    """
    result.set_exception(error)
    result.exception()


def _event(msg: Message) -> MonitorEvent:
    data = msg.get("data")
    stamp = msg.get("timestamp")
    seconds = 0.0
    if isinstance(stamp, dict):
        whole, micro = stamp.get("seconds"), stamp.get("microseconds")
        # QEMU writes -1 where the host's clock fails. What is later than the year 2514 no clock can show.
        if type(whole) is type(micro) is int and 0 <= whole < 1 << 34 and 0 <= micro < 1_000_000:
            seconds = whole + micro / 1e6
    return MonitorEvent(str(msg.get("event")), data if isinstance(data, dict) else {}, seconds)


class QmpMonitor(Monitor):
    """An open QMP connection (`ports.Monitor`); made by `open_monitor`."""

    #: QMP has nothing of the kind.
    run_id = None
    #: It is QEMU's own.
    hears_all = True

    def __init__(self, client: _Client, address: str, command_timeout: float, qemu_log: str | None) -> None:
        self._client = client
        self._address = address
        self._timeout = command_timeout
        self._qemu_log = qemu_log
        self._closing = False
        self._lost: VcpuConnectionError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watcher = asyncio.create_task(self._watch(), name=f"qmpvcpu watch {address}")

    @property
    def address(self) -> str:
        """What it is connected to, as the user wrote it."""
        return self._address

    @property
    def is_local(self) -> bool:
        """Whether both ends of the connection are on this host."""
        return self._client.is_local()

    @property
    def is_lost(self) -> bool:
        """Whether the other side has closed the connection."""
        return self._lost is not None

    @property
    def peer(self) -> Peer:
        """Whom it is connected to, as far as the kernel tells."""
        return self._client.peer()

    @property
    def greeting(self) -> Mapping[str, Any]:
        """The `QMP` member of the greeting."""
        greeting = self._client.greeting
        return {"version": greeting.QMP.version} if greeting is not None else {}

    @contextmanager
    def listen(self, sink: Sink) -> Iterator[None]:
        """Give every event, and at the end a lost connection, to `sink` until the context is left."""
        self._client.sinks.append(sink)
        try:
            if self._lost is not None:
                sink(self._lost)
            yield
        finally:
            self._client.sinks.remove(sink)

    async def _watch(self) -> None:
        """Notice that the connection ends, also while nobody waits for a reply."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        if self._closing:
            return
        cause = await self._disconnect()
        self._lost = lost(self._address, cause, self._qemu_log)
        self._drop_replies()
        for sink in tuple(self._client.sinks):
            sink(self._lost)

    def _drop_replies(self) -> None:
        replies = list(self._client.replies.values())
        self._client.replies.clear()
        for _, result in replies:
            self._end_with_loss(result)

    async def _disconnect(self) -> BaseException | None:
        timer = asyncio.get_running_loop().call_later(_CLOSE_SECONDS, self._client.abort)
        try:
            await self._client.disconnect()
        except Exception as error:  # noqa: BLE001 - whatever ended the reader is the cause we report
            return error
        finally:
            timer.cancel()
        return None

    async def close(self) -> None:
        """Close the connection. Never raises; may be called twice."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        if self._client.runstate is Runstate.RUNNING:
            self._watcher.cancel()
        # Else it ends by itself: qemu.qmp 0.0.6, cancelled in a disconnect, leaves an exception nobody retrieves.
        await asyncio.wait([self._watcher])
        self._drop_replies()
        if self._client.runstate is not Runstate.IDLE:
            await self._disconnect()

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> asyncio.Future[object]:
        """Any QMP command: sent at once, in the order of the calls; to be awaited.

        Its deadline runs from when QEMU can begin with it: QEMU answers in the order asked, so of many at once
        only the oldest is on the clock.

        Raises (when awaited):
            CommandError: QEMU answered with an error.
            VcpuConnectionError: no answer within 10 s (`reason` "timeout"), or the connection is gone.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[object] = loop.create_future()
        if self._lost is not None or self._client.runstate is not Runstate.RUNNING:
            self._end_with_loss(result)
            return result
        self._client.request(command, arguments, result)
        if self._timer is None:
            self._timer = loop.call_later(self._timeout, self._check_time)
        return result

    def _check_time(self) -> None:
        """One timer for all: QEMU is given up when it has answered nothing for the whole of a deadline."""
        self._timer = None
        client, loop = self._client, asyncio.get_running_loop()
        if not client.replies:
            return
        if loop.time() < client.began + self._timeout:
            self._timer = loop.call_at(client.began + self._timeout, self._check_time)
            return
        replies = list(client.replies.values())
        client.replies.clear()
        for command, result in replies:
            if not result.done():
                _fail(result, no_answer(self._address, command, self._timeout, TimeoutError()))

    def _end_with_loss(self, result: asyncio.Future[object]) -> None:
        """The connection is gone; the watcher knows why, at once or in a moment."""

        def tell(_: object = None) -> None:
            if not result.done():
                _fail(result, self._lost or lost(self._address, None, self._qemu_log))

        if self._lost is not None or self._watcher.done():
            tell()
        else:
            self._watcher.add_done_callback(tell)

    def add_fd(self, fd: int) -> asyncio.Future[object]:
        """QMP `add-fd`, into a set of its own, with the descriptor itself."""
        self._client.send_fd_scm(fd)
        return self.execute("add-fd")

    def getfd(self, name: str, fd: int) -> asyncio.Future[object]:
        """QMP `getfd`, with the descriptor itself (SCM_RIGHTS)."""
        # It travels ahead of the command: QEMU keeps it for the next one that wants a descriptor.
        self._client.send_fd_scm(fd)
        return self.execute("getfd", {"fdname": name})

    @property
    def takes_descriptors(self) -> bool:
        """Whether descriptors can be handed over: a unix socket."""
        return self.peer.pid is not None


@asynccontextmanager
async def open_monitor(
    address: str,
    *,
    log: QmpLog | None = None,
    connect_timeout: float = CONNECT_TIMEOUT,
    command_timeout: float = COMMAND_TIMEOUT,
) -> AsyncIterator[QmpMonitor]:
    """Connect to a QMP server, negotiate, and close at the end.

    Args:
        address: a unix path, `host:port` or `fd:N`.
        log: where to keep every message.
        connect_timeout, command_timeout: seconds.

    Raises:
        VcpuConnectionError: at once for what is known at once (missing, refused, not QMP), after
            `connect_timeout` for a server that accepts and never greets.
    """
    monitor = await connect_monitor(
        address, log=log, connect_timeout=connect_timeout, command_timeout=command_timeout
    )
    try:
        yield monitor
    finally:
        await finish(monitor.close())


async def connect_monitor(
    address: str,
    *,
    log: QmpLog | None = None,
    connect_timeout: float = CONNECT_TIMEOUT,
    command_timeout: float = COMMAND_TIMEOUT,
    qemu_log: str | None = None,
) -> QmpMonitor:
    """`open_monitor` for who closes it himself. `qemu_log`: path of QEMU's own log, where it is known."""
    where = parse_address(address)
    client = _Client(address, log)
    if isinstance(where, str) and where:
        # asyncio reports a plain file as "connection refused".
        with suppress(OSError):
            if not stat.S_ISSOCK(os.stat(where).st_mode):  # noqa: PTH116 - one stat(2)
                raise os_error(address, OSError(errno.ENOTSOCK, "not a socket"))
    target = socket_of(address, where) if isinstance(where, int) else where
    try:
        async with asyncio.timeout(connect_timeout):
            await client.connect(target)
    except TimeoutError as error:
        if not client.was_open:
            text = f"no connection to '{address}' was made within {connect_timeout:g} s"
            hint = "check the host's name, and whether a firewall drops what is sent to it"
            raise VcpuConnectionError(
                text, address=address, reason="timeout", libvirt="VIR_ERR_OPERATION_TIMEOUT", hint=hint
            ) from error
        greeted = "greeted and did not finish the handshake" if client.greeting is not None else "did not greet"
        raise VcpuConnectionError(
            f"'{address}' accepted the connection and {greeted} within {connect_timeout:g} s",
            address=address,
            reason="no-greeting",
            libvirt="VIR_ERR_OPERATION_TIMEOUT",
            hint="a QMP socket takes one client at a time: another one probably holds it, or QEMU hangs;"
            " close that one, or give QEMU a second -qmp",
        ) from error
    except ConnectError as error:
        raise connect_error(address, error) from error
    except OSError as error:
        raise os_error(address, error) from error
    except AssertionError as error:
        # qemu.qmp 0.0.6 asserts that the session still runs; one closed right after negotiation does not.
        raise lost(address, None, qemu_log) from error
    finally:
        if client.runstate is not Runstate.RUNNING:
            with suppress(Exception):
                await finish(client.disconnect())
            if isinstance(target, socket.socket):
                target.close()
    logger.debug("connected to %s", address)
    return QmpMonitor(client, address, command_timeout, qemu_log)
