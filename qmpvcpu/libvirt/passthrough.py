"""A QEMU monitor behind libvirt, which passes QMP on (`--via monitor`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.libvirt.calls import LibvirtGuest
from qmpvcpu.ports import CommandError, Monitor, MonitorEvent, Peer, Sink


class Behind(Monitor):
    """The common part of both ways: the listeners, and the error if the guest stops or libvirt is
    lost.
    """

    #: libvirt delays events, and does not report unplugs by its other clients.
    hears_all = False
    #: The kernel does not report the process at the other end.
    peer = Peer()
    #: libvirt passes no descriptors on.
    takes_descriptors = False

    def __init__(self, guest: LibvirtGuest) -> None:
        self.guest = guest
        self._sinks: list[Sink] = []
        self._lost: VcpuConnectionError | None = None
        self._end_watch: Callable[[], None] = lambda: None
        self._end_loss = guest.connection.on_loss(self._lose)

    @property
    def address(self) -> str:
        """libvirt's URI."""
        return self.guest.connection.uri

    @property
    def is_local(self) -> bool:
        """Whether we can place QEMU's threads."""
        return False

    @property
    def run_id(self) -> object:
        """An identifier of this run of the domain, as libvirt counts them."""
        return self.guest.run_id

    @property
    def greeting(self) -> Mapping[str, Any]:
        """QEMU's greeting; empty if nothing is known."""
        return {}

    def add_fd(self, fd: int) -> asyncio.Future[object]:
        """Always fails: see `takes_descriptors`."""
        return self.execute("add-fd")

    def getfd(self, name: str, fd: int) -> asyncio.Future[object]:
        """Always fails: see `takes_descriptors`."""
        return self.execute("getfd")

    @contextmanager
    def listen(self, sink: Sink) -> Iterator[None]:
        """Pass every event to `sink` until the context is left, and also the error if the
        connection is lost.
        """
        self._sinks.append(sink)
        try:
            if self._lost is not None:
                sink(self._lost)
            yield
        finally:
            self._sinks.remove(sink)

    def deliver(self, event: MonitorEvent | VcpuConnectionError) -> None:
        """Pass an event or an error to every listener."""
        for sink in tuple(self._sinks):
            sink(event)

    def _lose(self, error: VcpuConnectionError) -> None:
        if self._lost is None:
            self._lost = error
            self.deliver(error)

    def check(self) -> None:
        """Check the connection. Raises VcpuConnectionError if the guest has stopped, or if libvirt
        is lost.
        """
        if self._lost is not None:
            raise self._lost

    def stopped(self) -> VcpuConnectionError:
        """Record that the guest has stopped, and return the error for that."""
        self._on_event("stopped", "")
        assert self._lost is not None
        return self._lost

    def _on_event(self, word: str, device: str) -> None:
        """Handle an event of libvirt about the guest."""
        if word == "stopped":
            text = f"the domain '{self.guest.name}' has stopped"
            self._lose(
                VcpuConnectionError(
                    text,
                    address=self.address,
                    reason="closed",
                    hint="start it, and try again (reconnect())",
                )
            )

    async def close(self) -> None:
        """Cancel the subscriptions. Never raises; may be called twice."""
        self._end_loss()
        end, self._end_watch = self._end_watch, lambda: None
        await self.guest.connection.quietly(end)


class PassedMonitor(Behind):
    """QEMU's monitor behind libvirt's `virDomainQemuMonitorCommand`."""

    def __init__(self, guest: LibvirtGuest, log: Any = None) -> None:
        super().__init__(guest)
        self._log = log
        self._greeting: Mapping[str, Any] = {}

    @property
    def is_local(self) -> bool:
        """Whether QEMU runs on this host."""
        return self.guest.connection.is_local

    @property
    def greeting(self) -> Mapping[str, Any]:
        """The greeting that QEMU would send."""
        return self._greeting

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Subscribe to QEMU's events, and query its version. Blocks."""
        self._end_watch = self.guest.watch(loop, self._on_event, self._event)
        reply = json.loads(self.guest.monitor_command_now('{"execute": "query-version"}'))
        found = reply.get("return") if isinstance(reply, dict) else None
        self._greeting = {"version": found} if isinstance(found, dict) else {}

    def _event(self, name: str, when: float, data: str) -> None:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return
        if self._log is not None:
            self._log.write("receive", {"event": name, "data": found})
        self.deliver(MonitorEvent(name, found if isinstance(found, dict) else {}, when))

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None
    ) -> asyncio.Future[object]:
        """Send any QMP command. Commands are sent in the order of the calls."""
        message: dict[str, Any] = {"execute": command}
        if arguments is not None:
            message["arguments"] = dict(arguments)
        if self._log is not None:
            self._log.write("send", message)
        sent = self.guest.begin_monitor_command(json.dumps(message))
        result: asyncio.Future[object] = asyncio.get_running_loop().create_future()

        def ended(done: asyncio.Future[str]) -> None:
            if result.done():
                return
            if done.cancelled():
                result.cancel()
            elif (error := done.exception()) is not None:
                result.set_exception(error)
            else:
                self._answer(command, done.result(), result)

        sent.add_done_callback(ended)
        return result

    def _answer(self, command: str, line: str, result: asyncio.Future[object]) -> None:
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if self._log is not None:
            self._log.write("receive", reply if isinstance(reply, dict) else {"text": line})
        if isinstance(reply, dict) and "return" in reply:
            result.set_result(reply["return"])
            return
        answer = reply.get("error") if isinstance(reply, dict) else None
        if isinstance(answer, dict):
            result.set_exception(
                CommandError(command, str(answer.get("class")), str(answer.get("desc")))
            )
            return
        result.set_exception(
            VcpuConnectionError(
                f"libvirt passed on a reply to '{command}' that is neither result nor error",
                address=self.address,
                reason="malformed",
            )
        )
