"""A QMP monitor on `qemu.qmp`: each command has a deadline, and events go to listeners as they
arrive.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

from qemu.qmp import ConnectError, Runstate

from qmpvcpu.aio import finish
from qmpvcpu.core.address import parse_address
from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.ports import Monitor, Peer, Sink
from qmpvcpu.qemu.client import Client, fail
from qmpvcpu.qemu.connection_errors import connect_error, lost, no_answer, os_error
from qmpvcpu.qemu.descriptor import socket_of
from qmpvcpu.qemu.fast_client import FastClient
from qmpvcpu.qemu.qmp_log import QmpLog

logger = logging.getLogger("qmpvcpu.qemu.monitor")

CONNECT_TIMEOUT: Final = 5.0
COMMAND_TIMEOUT: Final = 10.0

#: Seconds that a server gets to read what it was sent when the connection is closed.
_CLOSE_SECONDS: Final = 1.0

#: The client of each connection. Tests put `Client` here: everything works without the tricks for
#: speed.
CLIENT: type[Client] = FastClient


class QmpMonitor(Monitor):
    """An open QMP connection (`ports.Monitor`); made by `connect_monitor`."""

    #: QMP has no such id.
    run_id = None
    #: It gets the events directly from QEMU.
    hears_all = True

    def __init__(
        self, client: Client, address: str, command_timeout: float, qemu_log: str | None
    ) -> None:
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
        """The process it is connected to, as far as the kernel knows it."""
        return self._client.peer()

    @property
    def greeting(self) -> Mapping[str, Any]:
        """The `QMP` member of the greeting."""
        greeting = self._client.greeting
        return {"version": greeting.QMP.version} if greeting is not None else {}

    @contextmanager
    def listen(self, sink: Sink) -> Iterator[None]:
        """Call `sink` with every event, and with the loss of the connection, until the context is
        left.
        """
        self._client.sinks.append(sink)
        try:
            if self._lost is not None:
                sink(self._lost)
            yield
        finally:
            self._client.sinks.remove(sink)

    async def _watch(self) -> None:
        """Notice the end of the connection, even while no command waits for a reply."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        if self._closing:
            return
        self._lost = lost(self._address, await self._disconnect(), self._qemu_log)
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
        # Else the watcher ends by itself: cancelling qemu.qmp 0.0.6 in a disconnect leaves an
        # exception that is never retrieved.
        await asyncio.wait([self._watcher])
        self._drop_replies()
        if self._client.runstate is not Runstate.IDLE:
            await self._disconnect()

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None
    ) -> asyncio.Future[object]:
        """Send any QMP command at once, in the order of the calls; await the result.

        Its deadline begins when QEMU can begin with it: QEMU answers commands in order, so of
        several only the oldest has a running deadline.

        Raises (when awaited):
            CommandError: QEMU answered with an error.
            VcpuConnectionError: no answer within 10 s (`reason` "timeout"), or the connection is
                lost.
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
        """One timer for all commands: they fail when QEMU has answered nothing for the whole
        deadline.
        """
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
                fail(result, no_answer(self._address, command, self._timeout, TimeoutError()))

    def _end_with_loss(self, result: asyncio.Future[object]) -> None:
        """Fail a command of a lost connection; the watcher knows the reason now or in a moment."""

        def fail_now(_: object = None) -> None:
            if not result.done():
                fail(result, self._lost or lost(self._address, None, self._qemu_log))

        if self._lost is not None or self._watcher.done():
            fail_now()
        else:
            self._watcher.add_done_callback(fail_now)

    def add_fd(self, fd: int) -> asyncio.Future[object]:
        """QMP `add-fd` into a new set, with the descriptor itself (SCM_RIGHTS)."""
        self._client.send_fd_scm(fd)
        return self.execute("add-fd")

    def getfd(self, name: str, fd: int) -> asyncio.Future[object]:
        """QMP `getfd`, with the descriptor itself (SCM_RIGHTS)."""
        # It is sent ahead of the command: QEMU keeps it for the next command that needs a
        # descriptor.
        self._client.send_fd_scm(fd)
        return self.execute("getfd", {"fdname": name})

    @property
    def takes_descriptors(self) -> bool:
        """Whether it is a unix socket, which can pass descriptors."""
        return self.peer.pid is not None


async def connect_monitor(
    address: str,
    *,
    log: QmpLog | None = None,
    connect_timeout: float = CONNECT_TIMEOUT,
    command_timeout: float = COMMAND_TIMEOUT,
    qemu_log: str | None = None,
) -> QmpMonitor:
    """Connect to a QMP server and negotiate; the caller closes the monitor.

    Args:
        address: a unix path, `host:port` or `fd:N`.
        log: the file that gets every message.
        connect_timeout, command_timeout: seconds.
        qemu_log: path of QEMU's own log, if it is known.

    Raises:
        VcpuConnectionError: at once if the socket is missing, refuses or is not QMP; after
            `connect_timeout` if the server accepts and never greets.
    """
    where = parse_address(address)
    client = CLIENT(address, log)
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
            hint = "check the host's name and its firewall"
            raise VcpuConnectionError(
                text,
                address=address,
                reason="timeout",
                libvirt="VIR_ERR_OPERATION_TIMEOUT",
                hint=hint,
            ) from error
        greeted = (
            "greeted and did not finish the handshake"
            if client.greeting is not None
            else "did not greet"
        )
        raise VcpuConnectionError(
            f"'{address}' accepted the connection and {greeted} within {connect_timeout:g} s",
            address=address,
            reason="no-greeting",
            libvirt="VIR_ERR_OPERATION_TIMEOUT",
            hint="close another client of this socket, which takes one at a time, or give QEMU a"
            " second -qmp; or QEMU hangs",
        ) from error
    except ConnectError as error:
        raise connect_error(address, error) from error
    except OSError as error:
        raise os_error(address, error) from error
    except AssertionError as error:
        # qemu.qmp 0.0.6 asserts that the session still runs; one closed right after negotiation
        # does not.
        raise lost(address, None, qemu_log) from error
    finally:
        if client.runstate is not Runstate.RUNNING:
            with suppress(Exception):
                await finish(client.disconnect())
            if isinstance(target, socket.socket):
                target.close()
    logger.debug("connected to %s", address)
    return QmpMonitor(client, address, command_timeout, qemu_log)
