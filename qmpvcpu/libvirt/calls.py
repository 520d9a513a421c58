"""A connection to libvirt, and the calls of one of its domains. No call blocks the asyncio loop,
unless its docstring says "Blocks".
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import SplitResult, urlsplit

from qmpvcpu.aio import finish
from qmpvcpu.core.model import format_ids
from qmpvcpu.errors import VcpuConnectionError, VcpuUsageError
from qmpvcpu.libvirt.library import (
    connection_error,
    libvirt_module,
    libvirt_qemu_module,
    lost,
    translated,
)
from qmpvcpu.libvirt.threads import Worker, start_events
from qmpvcpu.ports import CommandError

if TYPE_CHECKING:
    import libvirt

T = TypeVar("T")

#: Seconds to connect: to this host, and to another host over ssh or TLS.
CONNECT_SECONDS: Final = 5.0
FAR_CONNECT_SECONDS: Final = 30.0
#: Seconds for a call that changes something. libvirt itself waits up to 30 s for another client's
#: job, up to 10 s for an unplug, and up to 5 s for the agent.
CALL_SECONDS: Final = 60.0
QUERY_SECONDS: Final = 10.0
#: Seconds between two keepalive messages, and how many of them may be missing.
_KEEPALIVE: Final = (5, 2)
#: Seconds for libvirt to cancel our subscriptions and to close.
_CLOSE_SECONDS: Final = 1.0

#: QEMU's name (QAPI RunState) for each virDomainState of libvirt.
_RUN_STATES: Final = (
    "none",
    "running",
    "running",
    "paused",
    "shutdown",
    "shutdown",
    "crashed",
    "suspended",
)
#: virConnectCloseReason in words.
_CLOSED: Final = (
    "the daemon or the network failed",
    "the daemon has ended",
    "the daemon did not answer keepalive messages",
    "qmpvcpu closed it",
)
_MONITOR_COMMAND: Final = "virDomainQemuMonitorCommand"


@dataclass(frozen=True, slots=True)
class _Own:
    """The connection of one thread, and the domains that it has looked up, by UUID."""

    conn: libvirt.virConnect
    domains: dict[bytes, libvirt.virDomain]


@dataclass(frozen=True, slots=True)
class Row:
    """A domain as a row of `list`."""

    name: str
    active: bool
    xml: bytes


class Connection:
    """A connection to libvirt, from `open()` to `close()`. `open_connection` does both."""

    def __init__(
        self, uri: str, connect_timeout: float | None = None, query_timeout: float = QUERY_SECONDS
    ) -> None:
        self.uri = uri
        self._connect_timeout = connect_timeout
        self.query_timeout = query_timeout
        self.library = libvirt_module()
        self._changes = Worker("changes")
        self._queries = Worker("queries")
        self._agents: Worker | None = None
        self._conn: libvirt.virConnect | None = None
        #: By thread id, for threads that have a connection of their own: see `domain_here`.
        self._own: dict[int, _Own] = {}
        self._lost: VcpuConnectionError | None = None
        self._loop = asyncio.get_running_loop()
        self._is_closed = False
        #: Functions that cancel our subscriptions in libvirt. `close()` calls them in the thread of
        #: the queries.
        self.at_close: list[Callable[[], None]] = []
        self._where = _split(uri)
        #: The name that libvirt has for its driver ("QEMU", "TEST").
        self.driver = ""
        #: Called in the loop, once, when the connection is lost.
        self._listeners: list[Callable[[VcpuConnectionError], None]] = []

    @property
    def is_local(self) -> bool:
        """Whether its guests run on this host."""
        parts = self._where
        # Without a scheme, the URI is an alias in libvirt.conf, which may stand for any host.
        return (
            bool(parts.scheme)
            and not parts.hostname
            and parts.scheme.partition("+")[2] in ("", "unix")
        )

    @property
    def conn(self) -> libvirt.virConnect:
        """The connection of libvirt-python."""
        assert self._conn is not None
        return self._conn

    def domain_here(self, domain: libvirt.virDomain) -> libvirt.virDomain:
        """The same domain, over the connection of the calling thread. Blocks in the first call.

        Changes and calls to the agent take long. If two threads call at once over one connection,
        libvirt's client (9.0) sometimes does not notice a new request until the other's answer
        comes. So each of these threads opens a connection of its own with its first call. The
        exception is the test driver, which may keep its domains by connection.
        """
        own = self._own_here()
        if own is None:
            return domain
        uuid = domain.UUID()
        if uuid not in own.domains:
            own.domains[uuid] = own.conn.lookupByUUID(uuid)
        return own.domains[uuid]

    def conn_here(self) -> libvirt.virConnect:
        """The connection of libvirt-python for the calling thread: see `domain_here`."""
        own = self._own_here()
        return self.conn if own is None else own.conn

    def _own_here(self) -> _Own | None:
        if self.driver == "TEST" or not any(
            one is not None and one.is_here for one in (self._changes, self._agents)
        ):
            return None
        thread = threading.get_ident()
        if thread not in self._own:
            conn = self.library.open(self.uri)
            with suppress(self.library.libvirtError):
                conn.setKeepAlive(*_KEEPALIVE)
            self._own[thread] = _Own(conn, {})
        return self._own[thread]

    def _end_own(self) -> None:
        """Close the connection of the calling thread, if it has one of its own."""
        own = self._own.pop(threading.get_ident(), None)
        if own is not None:
            own.domains.clear()
            with suppress(self.library.libvirtError):
                own.conn.close()

    def check(self) -> None:
        """Raises VcpuConnectionError if the connection is lost."""
        if self._lost is not None:
            raise self._lost

    def on_loss(self, listener: Callable[[VcpuConnectionError], None]) -> Callable[[], None]:
        """Call `listener` once if the connection is lost. The returned function cancels that."""
        self._listeners.append(listener)

        def end() -> None:
            with suppress(ValueError):
                self._listeners.remove(listener)

        return end

    async def open(self) -> None:
        """Connect to libvirt.

        Raises:
            VcpuConnectionError: libvirt cannot be reached.
        """
        start_events()
        library = self.library

        def work() -> libvirt.virConnect:
            # Store it here, in the thread that also closes it: the caller may have stopped waiting.
            self._conn = conn = library.open(self.uri)
            if self._is_closed:
                return conn
            self._where, self.driver = _split(conn.getURI()), conn.getType()
            with suppress(library.libvirtError):
                conn.setKeepAlive(
                    *_KEEPALIVE
                )  # fails without a daemon (test:///), which needs no keepalive
            with suppress(library.libvirtError):
                conn.registerCloseCallback(self._closed, None)
            return conn

        seconds = self._connect_timeout or (
            CONNECT_SECONDS if self.is_local else FAR_CONNECT_SECONDS
        )
        try:
            await _within(self._queries.call(work), seconds)
        except library.libvirtError as error:
            raise connection_error(error, self.uri) from error
        except TimeoutError as error:
            raise VcpuConnectionError(
                f"libvirt at '{self.uri}' did not answer within {seconds:g} s",
                address=self.uri,
                reason="timeout",
                libvirt="VIR_ERR_OPERATION_TIMEOUT",
                hint="try `virsh -c URI version`",
            ) from error

    def _closed(self, conn: libvirt.virConnect, reason: int, opaque: object) -> None:
        why = _CLOSED[reason] if 0 <= reason < len(_CLOSED) else "it was closed"
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._lose, lost(self.uri, why))

    def _lose(self, error: VcpuConnectionError) -> None:
        if self._lost is None:
            self._lost = error
            listeners, self._listeners = self._listeners, []
            for listener in listeners:
                listener(error)

    async def close(self) -> None:
        """Close the connection. Never raises; may be called twice."""
        if self._is_closed:
            return
        self._is_closed = True

        def ended() -> VcpuConnectionError:
            return lost(self.uri, "qmpvcpu closed it")

        # Listeners and callers that wait for an answer must not wait for ever.
        self._lose(ended())

        def work() -> None:
            conn, self._conn = self._conn, None
            if conn is None:
                return
            for end in self.at_close:
                end()
            with suppress(self.library.libvirtError):
                conn.unregisterCloseCallback()
            with suppress(self.library.libvirtError):
                conn.close()

        # Close after the calls in flight: libvirt's objects must not be freed while a call uses
        # them.
        ends = [
            one.finish(ended, self._end_own)
            for one in (self._changes, self._agents)
            if one is not None
        ]
        ends.append(self._queries.finish(ended, work))
        await asyncio.wait(ends, timeout=_CLOSE_SECONDS)

    async def quietly(self, function: Callable[[], object]) -> None:
        """Call the function in a thread, even if the connection is lost. Its errors are ignored."""
        if not self._is_closed:
            with suppress(TimeoutError, Exception):
                await _within(self._queries.call(function), _CLOSE_SECONDS)

    # -- calls -------------------------------------------------------------------------------------

    async def query(self, name: str, function: Callable[[], T], seconds: float | None = None) -> T:
        """Make a call that changes nothing.

        Args:
            name: libvirt's name of the call, for messages.
            function: makes the call; runs in a thread.
            seconds: the deadline; None stands for `query_timeout`.

        Raises:
            CommandError: libvirt's answer is an error.
            VcpuConnectionError: the connection is lost, or there was no answer in time.
        """
        return await self._await(
            self._queries,
            self._queries.call(self.checked(name, function)),
            name,
            seconds or self.query_timeout,
        )

    async def ask_agent(
        self, name: str, function: Callable[[], T], seconds: float = QUERY_SECONDS
    ) -> T:
        """Make a call to the guest's agent, like `query`. An agent that does not answer blocks no
        other calls.
        """
        self.check()
        if self._agents is None:
            self._agents = Worker("agent")
        if not self.is_local:
            # In its first call, this thread also connects.
            seconds += FAR_CONNECT_SECONDS
        return await self._await(
            self._agents, self._agents.call(self.checked(name, function)), name, seconds
        )

    async def change(
        self, name: str, function: Callable[[], T], seconds: float = CALL_SECONDS
    ) -> T:
        """Make a call like `query`, after every earlier `change` has finished."""
        return await self._noted(self.begin_change(name, function, seconds=seconds))

    def begin_change(
        self,
        name: str,
        function: Callable[[], T],
        begun: Callable[[], None] = lambda: None,
        seconds: float = CALL_SECONDS,
    ) -> asyncio.Future[T]:
        """Send a call like `change`, and return at once.

        It is not sent if its future is cancelled before its turn.

        Args:
            name: libvirt's name of the call, for messages.
            function: makes the call; runs in a thread.
            begun: called at its turn, when the deadline begins.
            seconds: the deadline.
        """
        timers: list[asyncio.TimerHandle] = []

        def expire() -> None:
            if not result.done():
                result.set_exception(self._silent(name, seconds))
                self._changes.give_up(result, lambda: self._silent(name, seconds))

        def start() -> None:
            if not result.done():
                timers.append(self._loop.call_later(seconds, expire))
            begun()

        result = self._changes.call(self.checked(name, function), start)

        def stop(_: object) -> None:
            for timer in timers:
                timer.cancel()

        result.add_done_callback(stop)
        return result

    def drop(self, change: asyncio.Future[Any]) -> bool:
        """Cancel a change that has not begun. Returns whether it had not."""
        return self._changes.drop(change)

    def _silent(self, name: str, seconds: float) -> VcpuConnectionError:
        return VcpuConnectionError(
            f"libvirt at '{self.uri}' did not answer {name} within {seconds:g} s",
            address=self.uri,
            reason="timeout",
            libvirt="VIR_ERR_OPERATION_TIMEOUT",
            hint="query again: libvirt is busy or hangs, and may still do what the call asks",
        )

    def checked(self, name: str, function: Callable[[], T]) -> Callable[[], T]:
        """Wrap a call so that its errors are translated to `CommandError` and
        `VcpuConnectionError`.
        """

        def work() -> T:
            if self._lost is not None:
                raise self._lost
            try:
                return function()
            except self.library.libvirtError as error:
                own = self._own.get(threading.get_ident())
                conn = self._conn if own is None else own.conn
                alive = False
                with suppress(self.library.libvirtError):
                    alive = conn is not None and conn.isAlive() != 0
                if not alive:
                    # The next call of this thread opens another connection.
                    self._end_own()
                raise translated(error, name, self.uri, alive=alive) from error

        return work

    async def _await(
        self, worker: Worker, result: asyncio.Future[T], name: str, seconds: float
    ) -> T:
        try:
            return await _within(self._noted(result), seconds)
        except TimeoutError as error:
            worker.give_up(result, lambda: self._silent(name, seconds))
            raise self._silent(name, seconds) from error

    async def _noted(self, result: asyncio.Future[T]) -> T:
        try:
            return await result
        except VcpuConnectionError as error:
            if error.reason == "closed":
                self._lose(error)
            raise

    async def list(self) -> Sequence[Row]:
        """All domains, sorted by name."""

        def work() -> list[Row]:
            rows = []
            for domain in self.conn.listAllDomains(0):
                with suppress(self.library.libvirtError):  # it was undefined meanwhile
                    rows.append(
                        Row(domain.name(), bool(domain.isActive()), domain.XMLDesc(0).encode())
                    )
            return sorted(rows, key=lambda row: row.name)

        return await self.query("virConnectListAllDomains", work, CALL_SECONDS)

    async def guest(self, name: str) -> LibvirtGuest:
        """Find a domain by its name, or by its UUID, like virsh.

        Raises:
            VcpuConnectionError: there is no such domain (`reason` "unknown-domain").
        """

        def work() -> libvirt.virDomain:
            try:
                return self.conn.lookupByName(name)
            except self.library.libvirtError:
                with suppress(self.library.libvirtError):
                    return self.conn.lookupByUUIDString(name)
                raise

        return LibvirtGuest(self, await self.query("virDomainLookupByName", work))


class LibvirtGuest:
    """One domain of libvirt. Each method makes one call of libvirt's API.

    Each raises `CommandError` if libvirt's answer is an error, and `VcpuConnectionError`.
    """

    def __init__(self, connection: Connection, domain: libvirt.virDomain) -> None:
        self.connection = connection
        self._domain = domain
        self.name: str = domain.name()
        self.uuid: str = domain.UUIDString()
        self._library = connection.library
        self._id = domain.ID()

    @property
    def run_id(self) -> tuple[str, int]:
        """An identifier that changes each time the domain is started."""
        return self.uuid, self._id

    @property
    def domain(self) -> libvirt.virDomain:
        """The domain of libvirt-python, for the calling thread."""
        return self.connection.domain_here(self._domain)

    def flags(self, *, live: bool = False, config: bool = False) -> int:
        """`virDomainModificationImpact` as a number."""
        library = self._library
        return (library.VIR_DOMAIN_AFFECT_LIVE if live else 0) | (
            library.VIR_DOMAIN_AFFECT_CONFIG if config else 0
        )

    async def sides(self) -> tuple[bytes | None, bytes | None]:
        """The running domain's XML and the XML of its definition; None for one that does not
        exist.
        """

        def work() -> tuple[bytes | None, bytes | None]:
            live = self.domain.XMLDesc(0).encode() if self.domain.isActive() else None
            return live, self._definition()

        return await self.connection.query("virDomainGetXMLDesc", work)

    async def now(self) -> tuple[bool, bytes | None]:
        """Whether the domain runs, and the XML of its definition; None if it has no definition."""
        return await self.connection.query(
            "virDomainGetXMLDesc", lambda: (bool(self.domain.isActive()), self._definition())
        )

    def _definition(self) -> bytes | None:
        return (
            self.domain.XMLDesc(self._library.VIR_DOMAIN_XML_INACTIVE).encode()
            if self.domain.isPersistent()
            else None
        )

    async def live_xml(self) -> bytes | None:
        """The running domain's XML; None if the domain has stopped, even if it was started once
        more.
        """

        def work() -> bytes | None:
            now = self.connection.conn.lookupByUUID(self.domain.UUID())
            return now.XMLDesc(0).encode() if now.isActive() and now.ID() == self._id else None

        return await self.connection.query("virDomainGetXMLDesc", work)

    def read_definition(self, *, secure: bool = False) -> bytes:
        """The XML of its definition; with `secure`, it contains the passwords. Blocks."""
        flags = self._library.VIR_DOMAIN_XML_INACTIVE | (
            self._library.VIR_DOMAIN_XML_SECURE if secure else 0
        )
        text: str = self.call("virDomainGetXMLDesc", lambda: self.domain.XMLDesc(flags))
        return text.encode()

    def define(self, xml: bytes) -> None:
        """`virDomainDefineXML`. Blocks."""
        self.call("virDomainDefineXML", lambda: self.connection.conn_here().defineXML(xml.decode()))

    def call(self, name: str, function: Callable[[], T]) -> T:
        """Make one call with its errors translated. Blocks."""
        return self.connection.checked(name, function)()

    def count_flags(self, maximum: bool, hotpluggable: bool) -> int:
        """`virDomainVcpuFlags` as a number."""
        library = self._library
        return (library.VIR_DOMAIN_VCPU_MAXIMUM if maximum else 0) | (
            library.VIR_DOMAIN_VCPU_HOTPLUGGABLE if hotpluggable else 0
        )

    async def run_state(self) -> str:
        """The state under QEMU's name: "running", "paused", "shutdown" …"""
        number, _ = await self.connection.query("virDomainGetState", lambda: self.domain.state())
        return _RUN_STATES[number] if 0 <= number < len(_RUN_STATES) else "running"

    def is_busy(self) -> bool:
        """Whether a job of any client holds the domain (`virDomainGetControlInfo`); a change waits
        for its end.

        Returns False if the driver does not support the call. Blocks.
        """
        with suppress(self._library.libvirtError):
            return bool(self.domain.controlInfo()[0] != self._library.VIR_DOMAIN_CONTROL_OK)
        return False

    def set_vcpu(self, ids: Iterable[int], enable: bool, flags: int) -> Callable[[], object]:
        """`virDomainSetVcpu`, as a function to be called in a thread."""
        cpus = format_ids(ids)
        return lambda: self.domain.setVcpu(cpus, int(enable), flags)

    def set_vcpus(self, count: int, flags: int) -> Callable[[], object]:
        """`virDomainSetVcpusFlags`, as a function to be called in a thread."""
        return lambda: self.domain.setVcpusFlags(count, flags)

    def pin_vcpu(
        self, vcpu_id: int, cpus: Iterable[int] | None, flags: int
    ) -> Callable[[], object]:
        """`virDomainPinVcpuFlags`, as a function to be called in a thread. None stands for every
        host CPU.
        """

        def work() -> object:
            count: int = self.connection.conn_here().getCPUMap(0)[0]
            chosen = set(range(count) if cpus is None else cpus)
            size = max(count, *(number + 1 for number in chosen))
            return self.domain.pinVcpuFlags(vcpu_id, tuple(n in chosen for n in range(size)), flags)

        return work

    async def host_cpus(self) -> int:
        """The number of CPUs of its host."""
        found = await self.connection.query(
            "virNodeGetCPUMap", lambda: self.connection.conn.getCPUMap(0)
        )
        return int(found[0])

    async def guest_vcpus(self) -> Mapping[str, Any]:
        """`virDomainGetGuestVcpus`: CPU lists under the keys `vcpus`, `online`, `offlinable`."""
        name = "virDomainGetGuestVcpus"

        def work() -> Mapping[str, Any]:
            reply: Any = self.domain.guestVcpus()
            if reply is None:
                # libvirt-python 9.0 does not raise it. The exception reads the error from libvirt
                # itself.
                raise self._library.libvirtError(f"{name}() failed")
            return dict(reply)

        return await self.connection.ask_agent(name, work)

    async def set_guest_vcpus(self, cpus: Iterable[int], online: bool) -> None:
        """`virDomainSetGuestVcpus`, with the guest's own CPU numbers."""
        words = format_ids(cpus)
        await self.connection.ask_agent(
            "virDomainSetGuestVcpus",
            lambda: self.domain.setGuestVcpus(words, int(online)),
            CALL_SECONDS,
        )

    async def without_threads(self, ids: Iterable[int]) -> frozenset[int]:
        """Which of these vCPUs, plugged according to libvirt, have no thread any more.

        If a thread has ended, virDomainGetVcpus fails, and virConnectGetAllDomainStats has no times
        for that vCPU (9.0).
        """

        def work() -> frozenset[int]:
            try:
                self.domain.vcpus()
                return frozenset()
            except self._library.libvirtError as error:
                if (
                    error.get_error_code() != self._library.VIR_ERR_SYSTEM_ERROR
                    or error.get_int1() != errno.ESRCH
                ):
                    raise
            # Do not wait: another call, perhaps of another client, may hold the domain for long.
            rows = self.connection.conn.domainListGetStats(
                [self.domain],
                self._library.VIR_DOMAIN_STATS_VCPU,
                self._library.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT,
            )
            stats: Mapping[str, Any] = rows[0][1] if rows else {}
            idle = {
                n: [stats.get(f"vcpu.{n}.{word}", 0) for word in ("time", "delay")] for n in ids
            }
            return frozenset(
                n for n, times in idle.items() if f"vcpu.{n}.state" in stats and not any(times)
            )

        return await self.connection.query("virDomainGetVcpus", work)

    def monitor_command_now(self, line: str) -> str:
        """`virDomainQemuMonitorCommand`: send a QMP command, and return QEMU's reply, both as JSON.
        Blocks.
        """
        return str(
            self.call(
                _MONITOR_COMMAND,
                lambda: libvirt_qemu_module().qemuMonitorCommand(self.domain, line, 0),
            )
        )

    def begin_monitor_command(self, line: str) -> asyncio.Future[str]:
        """`monitor_command_now` in a thread, in the order of the calls."""
        return self.connection.begin_change(
            _MONITOR_COMMAND,
            lambda: libvirt_qemu_module().qemuMonitorCommand(self.domain, line, 0),
            seconds=self.connection.query_timeout,
        )

    async def agent_command(self, line: str, seconds: int) -> str:
        """`virDomainQemuAgentCommand`: send a command to the agent, and return its reply, both as
        JSON.
        """
        return str(
            await self.connection.ask_agent(
                "virDomainQemuAgentCommand",
                lambda: libvirt_qemu_module().qemuAgentCommand(self.domain, line, seconds, 0),
                seconds + QUERY_SECONDS,
            )
        )

    def watch(
        self,
        loop: asyncio.AbstractEventLoop,
        report: Callable[[str, str], None],
        monitor: Callable[[str, float, str], None] | None = None,
    ) -> Callable[[], None]:
        """Call `report` and `monitor` in the loop when something happens to the domain. Blocks for
        some calls.

        The returned function cancels the subscriptions.

        Args:
            loop: the loop of the callbacks.
            report: called with "stopped", "agent", "removed", "removal-failed" or "changed", and
                with the name of a device if the event is about one.
            monitor: called with the name, time (seconds since the epoch) and data (JSON) of each
                QMP event.
        """
        library, conn = self._library, self.connection.conn
        subscribed: list[Callable[[], object]] = []

        def end() -> None:
            while subscribed:
                with suppress(library.libvirtError):
                    subscribed.pop()()

        # The caller may be cancelled half-way, and each subscription keeps the connection alive.
        self.connection.at_close.append(end)

        def tell(act: Callable[..., None], *words: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(act, *words)

        if monitor is not None:

            def event(
                conn: object,
                domain: object,
                name: str,
                seconds: int,
                micros: int,
                data: str,
                opaque: object,
            ) -> None:
                tell(monitor, name, seconds + micros / 1e6, data or "{}")

            register = partial(
                libvirt_qemu_module().qemuMonitorEventRegister,
                conn,
                self.domain,
                None,
                event,
                None,
                0,
            )
            number = self.call("virConnectDomainQemuMonitorEventRegister", register)
            subscribed.append(
                partial(libvirt_qemu_module().qemuMonitorEventDeregister, conn, number)
            )
        stopped = library.VIR_DOMAIN_EVENT_STOPPED
        for kind, words in {
            library.VIR_DOMAIN_EVENT_ID_LIFECYCLE: lambda event, *_: (
                "stopped" if event == stopped else "changed",
                "",
            ),
            library.VIR_DOMAIN_EVENT_ID_TUNABLE: lambda *_: ("changed", ""),
            library.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED: lambda device, _: ("removed", device or ""),
            library.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED: lambda device, _: (
                "removal-failed",
                device or "",
            ),
            library.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE: lambda *_: ("agent", ""),
        }.items():

            def happened(
                conn: object, domain: object, *given: Any, words: Callable[..., Any] = words
            ) -> None:
                tell(report, *words(*given))

            subscribe = partial(conn.domainEventRegisterAny, self.domain, kind, happened, None)
            with suppress(CommandError):  # not every driver has all of these events
                number = self.call("virConnectDomainEventRegisterAny", subscribe)
                subscribed.append(partial(conn.domainEventDeregisterAny, number))
        return end


def _split(uri: str) -> SplitResult:
    try:
        return urlsplit(uri)
    except ValueError as error:
        raise VcpuUsageError(
            f"'{uri}' is not a URI: {error}", hint="give one of libvirt's: qemu:///system"
        ) from error


async def _within(result: Awaitable[T], seconds: float) -> T:
    """Await the result, or raise TimeoutError. A call in flight cannot be cancelled; its end is not
    awaited.
    """
    async with asyncio.timeout(seconds):
        return await result


@asynccontextmanager
async def open_connection(uri: str) -> AsyncIterator[Connection]:
    """Connect to libvirt, and close the connection at the end.

    Args:
        uri: a URI of libvirt: `qemu:///system`, `qemu+ssh://host/system`, `test:///default` …

    Raises:
        VcpuConnectionError: libvirt cannot be reached.
        VcpuRefused: libvirt-python is not installed.
    """
    connection = Connection(uri)
    try:
        await connection.open()
        yield connection
    finally:
        await finish(connection.close())
