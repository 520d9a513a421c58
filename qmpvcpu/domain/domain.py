"""`Domain`: one QEMU guest, and the RFC's one call on it.

Source: the RFC on libvirt's list, `int virDomainVcpu(virDomainPtr domain, unsigned int id, unsigned int flags)`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from qmpvcpu import aio
from qmpvcpu.core.arguments import checked
from qmpvcpu.core.engine.report import Report, queried
from qmpvcpu.core.migration.status import MigrationStatus, Progress
from qmpvcpu.core.model import DomainState, Event, Outcome, Vcpu
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.core.request import Listed, Request
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.agent import check_guest_ids
from qmpvcpu.core.rules.hotplug import plugs_left
from qmpvcpu.core.rules.placement import with_threads
from qmpvcpu.core.rules.request import check_flags, check_request, check_sides
from qmpvcpu.core.rules.selection import select
from qmpvcpu.core.state.from_definition import state_of
from qmpvcpu.core.state.guest_view import GuestView, with_online
from qmpvcpu.domain import migration as migrating
from qmpvcpu.domain.addresses import NOBODY_LISTENS, Opener
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.definition import Persistent
from qmpvcpu.domain.dump import DescribedXml, check_dump, describe, dump
from qmpvcpu.domain.event_bus import Events, Hub
from qmpvcpu.domain.interrupted import Interrupted, left_by
from qmpvcpu.domain.pin import change_pin, check_pin
from qmpvcpu.domain.placement import Placing, place_all
from qmpvcpu.domain.planned import plan_on
from qmpvcpu.domain.resolve import Place, locate, unknown_domain
from qmpvcpu.domain.run import Reach, run, run_on_definition, with_config
from qmpvcpu.domain.session import Link, open_link
from qmpvcpu.errors import Refusal, VcpuConnectionError, VcpuError, VcpuRefused, VcpuUsageError
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.host.saves import paused_guest
from qmpvcpu.ports import Agent, Monitor

if TYPE_CHECKING:
    from qmpvcpu.core.machine.comparison import Picture
    from qmpvcpu.core.machine.described import Described
    from qmpvcpu.core.migration.cookie import Cookie
    from qmpvcpu.domain.migration import Migration
    from qmpvcpu.domain.migration.move import Migrated

__all__ = ["Domain", "Options", "connect"]


#: So long a socket may take to greet where it hardly matters, seconds.
_HELD_SECONDS = 0.3
#: The same for one that runs.
_CONNECT_SECONDS = 5.0
#: No deadline is later.
_LONGEST_SECONDS = 86400.0 * 365


class Options(TypedDict, total=False):
    """Keywords of every call that changes something, and of its plan."""

    #: The running guest (LIVE).
    live: bool
    #: The persistent definition (CONFIG).
    config: bool
    #: Every vCPU of the cores that hold the ids (CORE).
    core: bool
    #: Through the guest agent: online and offline only (GUEST).
    guest: bool
    #: Seconds for what the guest must do; 0 does not wait. Default (None): 30, and 0 while the guest is stopped.
    timeout: float | None
    #: False: return `requested` once QEMU took an unplug. Default True.
    wait: bool
    #: True: bring back what was removed, if the rest is rejected or fails.
    atomic: bool
    #: How often an unplug that the guest refused is asked again, within `timeout`.
    retry: int
    #: False: never ask the guest agent for what hotplug cannot do. Default True.
    fallback: bool
    #: True: do what is known to kill QEMU.
    force: bool
    #: False: leave the threads of what is plugged where the kernel puts them. Default True.
    place: bool


class TransferOptions(TypedDict, total=False):
    """Keywords of `Domain.migrate`: how the guest's memory goes to the destination."""

    #: Where the destination should listen. Default (None): two QEMUs of this host get a socket of their own.
    uri: str | None
    #: How the source's host reaches the destination's.
    host: str | None
    #: MiB a second at most. Default (None): QEMU's own limit.
    bandwidth: int | None
    #: Seconds after which the guest is paused, so that the migration comes to an end. Default (None): never.
    timeout: float | None
    #: Called with each fresh status.
    progress: Progress | None


@checked
def connect(
    domain: str | os.PathLike[str] | None = None,
    *,
    qmp: str | os.PathLike[str] | Sequence[str] | None = None,
    agent: str | os.PathLike[str] | None = None,
    xml: str | os.PathLike[str] | None = None,
    qmp_log: Any = None,
    connect_timeout: float | None = None,
    command_timeout: float = 10.0,
    config_only: bool = False,
    watch: bool = False,
    uri: str | None = None,
    via: Literal["api", "monitor"] = "api",
) -> Domain:
    """One domain, as a single-use async context manager.

    Args:
        domain: with a `/` in it, the path of a QMP socket or of a domain XML file; else a name given to `define`,
            else a file or an address.
        qmp: QMP addresses instead: unix path, `host:port`, `fd:N`, or QEMU's own `unix:PATH` and `tcp:HOST:PORT`;
            of several the first that is free.
        agent: address of the guest agent's socket; it is opened when it is first needed.
        xml: path of its definition, for CONFIG.
        qmp_log: a `qmpvcpu.QmpLog` that keeps every message.
        connect_timeout: seconds for connection and greeting, per address; 5 if not given, to libvirt on another
            host 30.
        command_timeout: seconds for one QMP command, or one query of libvirt's.
        uri: libvirt's: `domain` is one of its domains then, by name or UUID, and knows its own sockets.
        via: how a libvirt domain is reached: by libvirt's API, or with our own engine through its QEMU monitor.
        config_only: it is only the definition that is wanted: where another client holds the running guest's
            socket, that is no error and is not waited for.
        watch: it is held for long, to listen to events: of several addresses the last that is free is taken, so
            that others find the first one free.

    Raises (on entry):
        VcpuConnectionError: no address could be reached, or what answers is not QMP. Where nobody listens, a
            domain that has a definition is inactive.
        VcpuUsageError: nothing is named.
        VcpuRefused: what is known of the domain cannot be read.
    """
    domain, agent, xml = (None if path is None else os.fspath(path) for path in (domain, agent, xml))
    qmp = os.fspath(qmp) if isinstance(qmp, os.PathLike) else qmp
    for name, seconds in (("connect_timeout", connect_timeout), ("command_timeout", command_timeout)):
        if seconds is not None and not 0 <= seconds <= _LONGEST_SECONDS:
            raise VcpuUsageError(f"{name}={seconds} makes no sense", hint="give seconds, 0 or more")
    if qmp_log is not None and not hasattr(qmp_log, "write"):
        raise VcpuUsageError(f"qmp_log={qmp_log!r:.60} is not a QmpLog", hint="give qmpvcpu.QmpLog(FILE)")
    if uri is not None:
        if domain is None or qmp is not None or agent is not None or xml is not None:
            text = "of a libvirt domain, its name and nothing else is given"
            raise VcpuUsageError(text, hint="leave out its sockets and XML: libvirt knows them")
        if qmp_log is not None and via == "api":
            text = "by libvirt's API no QMP message is ours to keep"
            raise VcpuUsageError(text, hint="leave out --qmp-log (qmp_log=), or go --via monitor")
        from qmpvcpu.domain.backends.libvirt import LibvirtDomain

        return LibvirtDomain(domain, uri, via, qmp_log, connect_timeout, command_timeout)
    if via != "api":
        raise VcpuUsageError("--via is about a libvirt domain", hint="give libvirt's URI: -c URI (uri=)")
    place = locate(domain, qmp, agent, xml)
    patience = connect_timeout if connect_timeout is not None else _CONNECT_SECONDS
    if config_only:
        patience = min(patience, _HELD_SECONDS)
    if watch:
        place = replace(place, qmp=place.qmp[::-1])

    async def open_one(address: str) -> Monitor:
        if place.is_unknown:
            raise unknown_domain(address)
        # Loaded here: `qemu.qmp` is most of what importing qmpvcpu would cost.
        from qmpvcpu.qemu.monitor import connect_monitor

        return await connect_monitor(
            address,
            log=qmp_log,
            connect_timeout=patience,
            command_timeout=command_timeout,
            qemu_log=place.qemu_log,
        )

    def agent_at(address: str) -> Agent:
        from qmpvcpu.qemu.agent import AgentClient

        return AgentClient(address)

    # Where nothing is, there is no definition either.
    return Domain(place, open_one, agent_at, config_only=config_only and not place.is_unknown)


class Domain:
    """One guest. Enter it once (`async with`), call it from one event loop; operations queue.

    State is held between calls and kept fresh by events; a claim that something is already so is always made from
    a fresh query.
    """

    def __init__(
        self,
        place: Place,
        opener: Opener,
        agent_at: Callable[[str], Agent] | None = None,
        *,
        config_only: bool = False,
    ) -> None:
        self.name = place.name
        self._place = place
        self._open = opener
        self._agent_at = agent_at
        self._config_only = config_only
        self._persistent = Persistent(place.definition) if place.definition is not None else None
        self._guest: Guest | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._link: Link | None = None
        self._last: Link | None = None
        self._inactive = False
        self._held: VcpuConnectionError | None = None
        self._shown: DomainState | None = None
        self._hub = Hub()
        self._queue = asyncio.Lock()
        self._interrupted: Interrupted | None = None

    def __repr__(self) -> str:
        state = "connected" if self._link is not None else "inactive" if self._inactive else "closed"
        return f"<Domain {self.name!r} {state}>"

    async def __aenter__(self) -> Domain:
        if self._loop is not None:
            raise VcpuUsageError("a Domain is entered once", hint="call connect() again")
        self._loop = asyncio.get_running_loop()
        await self._connect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._check_loop()
        self._hub.end(None)
        await aio.finish(self._close())

    @asynccontextmanager
    async def _call(self) -> AsyncIterator[None]:
        """Operations on one domain queue. What one of them has left, cancelled, is known until the next begins."""
        self._check_loop()
        async with self._queue:
            self._interrupted = None
            try:
                yield
            except asyncio.CancelledError as error:
                self._interrupted = left_by(error).with_pending(self.pending_ids)
                raise

    def _check_loop(self) -> None:
        """Raises VcpuUsageError if this is not the event loop in which the domain was entered."""
        if self._loop is None:
            raise VcpuUsageError(
                f"the domain '{self.name}' is not entered", hint="use it inside `async with connect(…) as domain`"
            )
        if asyncio.get_running_loop() is not self._loop:
            raise VcpuUsageError(
                f"the domain '{self.name}' was entered in another event loop",
                hint="call connect() in each event loop; from another thread: asyncio.run_coroutine_threadsafe()",
            )

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """`_call`, with what is held of a domain that is kept elsewhere read anew."""
        async with self._call():
            await self._refresh()
            yield

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[Link]:
        """`_call`, with the open connection."""
        async with self._call():
            yield self._connected()

    async def _refresh(self) -> None:
        """Before each call: what is held of a domain that is kept elsewhere is read anew."""

    async def reconnect(self) -> None:
        """Connect again after a lost connection, and read the state anew.

        Raises:
            VcpuConnectionError: as on entry.
        """
        async with self._call():
            await self._reconnect()

    # -- the call, and its exploded forms ---------------------------------------------------------

    @checked
    async def vcpu(
        self,
        vcpu_id: int,
        flags: VcpuFlag = VcpuFlag.CURRENT,
        *,
        count: int | None = None,
        **options: Unpack[Options],
    ) -> Outcome:
        """Query, enable or disable one vCPU by id: the RFC's `virDomainVcpu`.

        Args:
            vcpu_id: a vCPU id; with NUMA_NODE a node.
            flags: neither ENABLE nor DISABLE is a query.
            count: with NUMA_NODE, how many vCPUs (with CORE: cores) of the node.
            options: see `Options`.

        Raises:
            VcpuRefused, VcpuRejected, VcpuFailed, VcpuPartial, VcpuConnectionError: see `qmpvcpu.errors`.
        """
        return await self.request(_request(vcpu_id, VcpuFlag(flags), options, count=count))

    @checked
    async def request(self, request: Request) -> Outcome:
        """Carry out a `Request` made elsewhere; errors are those of `vcpu`."""
        if request.is_query:
            return await self._query(request)
        async with self._turn():
            self._shown = None
            live, config = self._sides(request.flags)
            here = self._not_here(request)
            if config and not live:
                return await run_on_definition(self._persistent, request, here, self.name)
            if here and self._link is None:
                # Whatever else the definition has against it.
                raise VcpuRefused([*here, *self._against(request, config)], ids=request.ids)
            link = self._connected()
            placing, here = self._placing(request, here)
            definition = self._persistent if config else None
            return await run(Reach(link, self._guest, placing, definition, tuple(here)), request)

    @property
    def is_active(self) -> bool:
        """Whether the guest runs, as far as this connection knows."""
        return self._link is not None or self._held is not None

    @property
    def has_definition(self) -> bool:
        """Whether a definition of it is known."""
        return self._persistent is not None

    @checked
    async def enable(self, ids: int | Iterable[int], **options: Unpack[Options]) -> Outcome:
        """Plug these vCPUs, all or none. Arguments and errors are those of `vcpu`."""
        return await self.request(_request(ids, VcpuFlag.ENABLE, options))

    @checked
    async def disable(self, ids: int | Iterable[int], **options: Unpack[Options]) -> Outcome:
        """Unplug these vCPUs and wait for the guest's real answer. Arguments and errors are those of `vcpu`."""
        return await self.request(_request(ids, VcpuFlag.DISABLE, options))

    @checked
    async def numa_node(
        self,
        node: int,
        flags: VcpuFlag = VcpuFlag.CURRENT,
        *,
        count: int | None = None,
        **options: Unpack[Options],
    ) -> Outcome:
        """The vCPUs of a NUMA node; with ENABLE its `count` (1) lowest disabled, with DISABLE its highest enabled.

        Other arguments and errors are those of `vcpu`.
        """
        return await self.request(_request(node, VcpuFlag(flags) | VcpuFlag.NUMA_NODE, options, count=count))

    @checked
    async def set_vcpus(
        self, count: int, *, maximum: bool = False, hotpluggable: bool = False, **options: Unpack[Options]
    ) -> Outcome:
        """Have `count` vCPUs enabled: the lowest are added, the highest removed (`virDomainSetVcpusFlags`).

        Args:
            count: how many.
            maximum: change the maximum instead, which only a definition can (CONFIG).
            hotpluggable: in a definition, make what is added hotpluggable; in a running guest it always is.
            options: see `Options`.

        Raises:
            VcpuRefused: also where the count cannot be reached with whole cores.
        """
        return await self.request(_total(count, options, maximum=maximum, hotpluggable=hotpluggable))

    @checked
    async def apply(self, xml: bytes, *, source: str = "the file", **options: Unpack[Options]) -> Outcome:
        """Make the running guest and/or the definition what `<vcpus>` in a document says, as one transaction.

        Args:
            xml: a domain's XML, or `<vcpus>` alone.
            source: what it is called in messages.
            options: see `Options`; nothing is left to the guest agent.

        Raises:
            VcpuRefused: also where the document cannot be this domain's.
        """
        return await self.request(await self._listed(xml, source, options))

    @checked
    async def plan_apply(self, xml: bytes, *, source: str = "the file", **options: Unpack[Options]) -> Plan:
        """What `apply` would do."""
        return await self.plan(await self._listed(xml, source, options))

    async def _listed(self, xml: bytes, source: str, options: Options) -> Request:
        from qmpvcpu.xml.document import read_listed

        async with self._turn():
            live, _ = self._sides(_flags_of(options))
            link, persistent = self._link, self._persistent
            if live and link is not None:
                maximum = link.state.maxcpus
            elif persistent is not None:
                maximum = persistent.definition().maxcpus
            else:
                maximum = self._connected().state.maxcpus
        try:
            vcpus, exact = read_listed(xml, maximum)
        except VcpuRefused as error:
            raise error.at(source) from error
        given: Options = {"atomic": True, **options, "fallback": False}
        return replace(
            _request((), VcpuFlag.CURRENT, given, total=0), total=None, listed=Listed(vcpus, exact, source)
        )

    @checked
    async def dump_xml(
        self, *, inactive: bool = False, dialect: str | None = None, detail: str | None = None
    ) -> bytes:
        """The domain's XML: of the running guest, if it runs, else its definition.

        Args:
            inactive: its definition in any case.
            dialect: how `<vcpus>` is written, "rfc" or "libvirt"; None: as it is there, else libvirt's.
            detail: what the RFC's dialect shows: "minimal" (id, state), "cell", or "full".

        Raises:
            VcpuRefused: there is no definition.
        """
        check_dump(dialect, detail)
        async with self._turn():
            flags = VcpuFlag.CONFIG if inactive else VcpuFlag.CURRENT
            self._check_here(Request((), flags))
            live, _ = self._sides(flags)
            state = _with_threads(link := self._connected(), await link.read()) if live else None
            if self._persistent is not None:
                return dump(self._persistent.read(), state, dialect, detail)
            assert state is not None
            return dump((await self._described(state)).xml, state, dialect, detail)

    async def describe_xml(self) -> bytes:
        """A definition for the running guest, of what QEMU tells: name, machine, topology, memory, vCPUs.

        Raises:
            VcpuRefused: it does not run.
        """
        return (await self.describe_machine()).xml

    async def describe_machine(self) -> DescribedXml:
        """`describe_xml`, and what of the guest such a definition cannot hold.

        Raises:
            VcpuRefused: it does not run.
        """
        async with self._turn():
            return await self._described(await self._connected().read())

    async def picture(self) -> Picture:
        """What QEMU tells of the running guest's machine: RAM blocks, nodes, devices, properties.

        Raises:
            VcpuRefused: it does not run.
            VcpuConnectionError: QEMU is lost.
        """
        async with self._turn():
            link = self._connected()
            return await migrating.read_picture(link.monitor, link.process)

    async def _described(self, state: DomainState) -> DescribedXml:
        from qmpvcpu.xml.minimal import minimal_domain

        told = await self._describe(state)
        return DescribedXml(minimal_domain(told.definition, told.devices), told.left_out, told.devices is not None)

    async def _describe(self, state: DomainState) -> Described:
        link = self._connected()
        return await describe(link.monitor, state, link.process, self._place.agent)

    async def guest_vcpus(self) -> GuestView:
        """The guest's own CPUs, and which vCPU each one is.

        Raises:
            VcpuRefused: no agent of this domain is known, or it is not allowed to tell.
            VcpuConnectionError: no agent answers, or what it says cannot be.
        """
        async with self._turn():
            self._check_here(Request((), VcpuFlag.GUEST))
            link = self._connected()
            assert self._guest is not None
            return await self._guest.view(await link.read())

    @checked
    async def set_guest_vcpus(self, logical_ids: int | Iterable[int], online: bool) -> Outcome:
        """Take CPUs of the guest online or offline, all or none, by the guest's own ids."""
        began = time.monotonic()
        ids = _ids(logical_ids)
        async with self._turn():
            self._check_here(Request(ids, VcpuFlag.GUEST))
            link = self._connected()
            assert self._guest is not None
            view = await self._guest.view(await link.read())
            refusals = check_guest_ids(ids, view.own, online=online)
            if refusals:
                raise VcpuRefused(refusals, ids=ids)
            report = Report(ids)
            report.switched(await self._guest.switch(view.own, ids, online), "the guest's CPU")
        return report.end(None, time.monotonic() - began)

    @checked
    async def place(self, xml: bytes | None = None) -> list[str]:
        """Give every vCPU's thread, and the emulator's, what the definition says; what there is to say of it.

        Args:
            xml: a domain's XML instead of its definition.

        Raises:
            VcpuRefused: they cannot be placed, or there is no definition; none is.
            VcpuFailed: the kernel declines; the others are placed.
        """
        async with self._turn():
            link = self._connected()
            if xml is not None:
                from qmpvcpu.xml.document import read_domain

                definition = read_domain(xml)[1]
            elif self._persistent is not None:
                definition = self._persistent.definition()
            else:
                raise catalogue.NO_DEFINITION.error()
            return place_all(link.threads, definition, await link.read())

    @checked
    async def pin(
        self,
        vcpu_id: int,
        cpus: str | Iterable[int] | None,
        flags: VcpuFlag = VcpuFlag.CURRENT,
    ) -> Outcome:
        """Pin a vCPU to host CPUs (`virDomainPinVcpuFlags`): its thread now, and/or in the definition.

        Args:
            vcpu_id: of the vCPU.
            cpus: host CPUs, `0-3,^2` or numbers; None lets it go everywhere.
            flags: LIVE, CONFIG, both, or CURRENT.

        Raises:
            VcpuRefused: nothing was touched.
            VcpuFailed: the kernel declines.
            VcpuPartial: the thread is pinned, and the definition could not be written.
        """
        wanted, request = check_pin(vcpu_id, cpus, flags)
        async with self._turn():
            self._shown = None
            live, config = self._sides(request.flags)
            here = self._not_here(request)
            if (config and self._persistent is None) or (live and self._inactive):
                raise VcpuRefused(here, ids=request.ids)
            link = self._connected() if live else None
            return await change_pin(link, self._persistent if config else None, vcpu_id, wanted, here)

    @checked
    async def vcpus(self, ids: Iterable[int] | None = None) -> tuple[Vcpu, ...]:
        """These vCPUs, or every one, by a fresh query."""
        if ids is None:
            return (await self.state()).vcpus
        return (await self.request(_request(ids, VcpuFlag.CURRENT, {}))).rows

    @checked
    async def state(self, flags: VcpuFlag = VcpuFlag.CURRENT) -> DomainState:
        """Everything known of the domain, by a fresh query; `flags` may name the impact.

        Raises:
            VcpuRefused: there is no such side of this domain.
        """
        async with self._turn():
            self._check_here(Request((), flags), check_flags(flags))
            return await self._state(flags)

    @property
    def agent_trouble(self) -> VcpuConnectionError | None:
        """Why the agent's view is missing from the last state; None where it is there, or no agent is known."""
        return self._guest.trouble if self._guest is not None else None

    async def agent_refusal(self) -> VcpuError | None:
        """Why the guest's agent cannot switch CPUs; None where it can, or where no agent is known."""
        async with self._turn():
            if self._guest is None:
                return None
            try:
                await self._guest.check_switch()
            except VcpuError as error:
                return error
        return None

    def plugs_left(self) -> list[str]:
        """How many plugs this QEMU can take before it aborts, as one text; none where they do not run out."""
        return plugs_left(self._link.state, self._link.knowledge()) if self._link is not None else []

    @property
    def run_state(self) -> str | None:
        """QEMU's RunState ("running", "paused", "prelaunch" …) when it was asked last; None if not known."""
        return self._link.seen_run_state if self._link is not None else None

    @checked
    def events(self, *, steps: bool = False, limit: int = 1000) -> Events:
        """What happens to the vCPUs, whoever does it; subscribed on entry:

            async with domain.events() as events:
                async for event in events: …

        Args:
            steps: also what is only under way (`unplug-requested`, `guest-ejecting`).
            limit: how many events may wait to be read.

        Raises (on entry and from the iteration):
            VcpuConnectionError: the connection is lost.
            VcpuOverflow: more than `limit` events waited.
        """
        if limit < 1:
            raise VcpuUsageError(f"a limit of {limit} events makes no sense", hint="give 1 or more")
        return Events(self._hub, lambda: self._connected().check(), self._check_loop, steps=steps, limit=limit)

    @property
    def last_state(self) -> DomainState:
        """The state of the last query, without asking again.

        Raises:
            VcpuConnectionError: it was never connected.
        """
        if self._shown is not None:
            return self._shown
        link = self._link or self._last
        return link.state if link is not None else self._connected().state

    @property
    def pending_ids(self) -> tuple[int, ...]:
        """vCPU ids whose unplug was asked and has not ended, as far as is known."""
        link = self._link or self._last
        if link is None:
            return ()
        entities = link.state.by_id
        return tuple(sorted(n for first in link.ledger.firsts if first in entities for n in entities[first].ids))

    @property
    def interrupted(self) -> Interrupted | None:
        """What the last call has left, if it was cancelled; None if it was not.

        Each call, a query too, sets it back to None when its turn comes. One that is cancelled while it waits for
        its turn has begun nothing, and leaves it alone. It stays readable after the domain is left.
        """
        return self._interrupted

    @property
    def settled(self) -> tuple[Event, ...]:
        """What had ended while nobody listened, as found when this connection was made."""
        return self._link.settled if self._link is not None else ()

    # -- plans: what would be done, and every reason why not; nothing is touched --------------------

    @checked
    async def plan(self, request: Request) -> Plan:
        """What `request` would do, and every reason why not; touches nothing."""
        async with self._turn():
            self._shown = None
            live, config = self._sides(request.flags)
            here = self._not_here(request)
            plan = Plan(request, request.ids)
            if live and self._link is not None:
                state, away = await self._link.read_at_rest()
                plan, _ = await plan_on(self._link, state, request, self._guest)
                placing, here = self._placing(request, here)
                plan = placing.check(plan, state).refused(away)
            elif not here and not config:
                self._connected()
            if config and self._persistent is not None:
                plan = with_config(plan, self._persistent, live=live and self._link is not None)
            return plan.refused(here)

    @checked
    async def plan_vcpu(
        self, vcpu_id: int, flags: VcpuFlag, *, count: int | None = None, **options: Unpack[Options]
    ) -> Plan:
        """What `vcpu` would do."""
        return await self.plan(_request(vcpu_id, VcpuFlag(flags), options, count=count))

    @checked
    async def plan_enable(self, ids: int | Iterable[int], **options: Unpack[Options]) -> Plan:
        """What `enable` would do."""
        return await self.plan(_request(ids, VcpuFlag.ENABLE, options))

    @checked
    async def plan_disable(self, ids: int | Iterable[int], **options: Unpack[Options]) -> Plan:
        """What `disable` would do."""
        return await self.plan(_request(ids, VcpuFlag.DISABLE, options))

    @checked
    async def plan_numa_node(
        self, node: int, flags: VcpuFlag, *, count: int | None = None, **options: Unpack[Options]
    ) -> Plan:
        """What `numa_node` would do."""
        return await self.plan(_request(node, VcpuFlag(flags) | VcpuFlag.NUMA_NODE, options, count=count))

    @checked
    async def plan_set_vcpus(
        self, count: int, *, maximum: bool = False, hotpluggable: bool = False, **options: Unpack[Options]
    ) -> Plan:
        """What `set_vcpus` would do."""
        return await self.plan(_total(count, options, maximum=maximum, hotpluggable=hotpluggable))

    # -- to another QEMU, or into a file -----------------------------------------------------------

    @cached_property
    def migration(self) -> Migration:
        """Takes the guest to another QEMU, or into a file and back. Each `migrate_…` below is one of its calls."""
        return migrating.Migration(
            migrating.Access(
                session=self._session,
                agent=lambda: self._guest,
                definition=lambda: self._persistent,
                describe=self._describe,
                describe_xml=self._described,
                plug=self._plug,
                reconnect=self._reconnect,
            )
        )

    @checked
    async def migrate_begin(
        self,
        *,
        persistent: bool = False,
        wait: float = 0.0,
        force: bool = False,
        with_agents: bool = False,
        is_paused: bool = False,
    ) -> Cookie:
        """`migration.begin`."""
        return await self.migration.begin(
            persistent=persistent, wait=wait, force=force, with_agents=with_agents, is_paused=is_paused
        )

    @checked
    async def migrate_prepare(
        self, cookie: Cookie, *, place: bool = True, differences: Sequence[Refusal] = ()
    ) -> None:
        """`migration.prepare`."""
        await self.migration.prepare(cookie, place=place, differences=differences)

    @checked
    async def migrate_listen(
        self, uri: str | None = None, host: str | None = None, default: str | None = None
    ) -> str:
        """`migration.listen`."""
        return await self.migration.listen(uri, host, default)

    @checked
    async def migrate_perform(
        self,
        uri: str,
        *,
        cookie: Cookie | None = None,
        bandwidth: int | None = None,
        timeout: float | None = None,
        progress: Progress | None = None,
        force: bool = False,
    ) -> MigrationStatus:
        """`migration.perform`."""
        return await self.migration.perform(
            uri, cookie=cookie, bandwidth=bandwidth, timeout=timeout, progress=progress, force=force
        )

    async def migrate_cookie(self) -> Cookie:
        """`migration.cookie`."""
        return await self.migration.cookie()

    @checked
    async def migrate_finish(
        self,
        cookie: Cookie,
        *,
        force: bool = False,
        hint: str | None = None,
        told: Callable[[bool], None] = lambda _: None,
        moved: Callable[[], object] = lambda: None,
    ) -> DomainState:
        """`migration.finish`; `told` is its `reported`."""
        return await self.migration.finish(cookie, force=force, hint=hint, reported=told, moved=moved)

    @checked
    async def migrate_cancel(self, *, force: bool = False) -> str:
        """`migration.cancel`."""
        return await self.migration.cancel(force=force)

    @checked
    async def migrate(
        self,
        destination: Domain,
        cookie: Cookie,
        *,
        force: bool = False,
        settled: Callable[[], None] = lambda: None,
        **transfer: Unpack[TransferOptions],
    ) -> Migrated:
        """`migration.migrate`; `settled` is its `finished`."""
        how = migrating.Transfer(**transfer)
        return await self.migration.migrate(destination.migration, cookie, how, force=force, finished=settled)

    async def memory_in_use(self) -> int | None:
        """`migration.memory_in_use`."""
        return await self.migration.memory_in_use()

    @checked
    async def save(
        self,
        cookie: Cookie,
        fd: int,
        offset: int,
        finish: Callable[[], object],
        progress: Progress | None = None,
        *,
        force: bool = False,
        check: Callable[[], Awaitable[object]] | None = None,
        files: tuple[str, ...] = (),
    ) -> bool:
        """`migration.save`, into a `SaveTarget` of these."""
        file = migrating.SaveTarget(fd, offset, finish, check, files)
        return await self.migration.save(cookie, file, progress, force=force)

    @checked
    async def restore(
        self, cookie: Cookie, fd: int, offset: int, told: Callable[[bool], None] = lambda _: None
    ) -> DomainState:
        """`migration.restore`; `told` is its `reported`."""
        return await self.migration.restore(cookie, fd, offset, told)

    @checked
    async def read_saved(self, fd: int, offset: int) -> None:
        """`migration.read_saved`."""
        await self.migration.read_saved(fd, offset)

    # -- inside -----------------------------------------------------------------------------------

    async def _connect(self) -> None:
        self._inactive = False
        self._held = None
        if not self._place.qmp:
            self._inactive = True
            return
        try:
            self._link = await open_link(
                self.name, self._place.qmp, self._open, self._hub, self._queue, self._last
            )
        except VcpuConnectionError as error:
            # Nobody listens: it does not run. Whatever else is wrong, it may.
            if self._persistent is not None and error.reason in NOBODY_LISTENS:
                self._inactive = True
            elif self._config_only:
                self._held = error
            else:
                raise
            return
        try:
            paused = paused_guest(self._link.process)
            if paused is not None and paused.is_left:
                await self.migration.recover(self._link, paused)
        except BaseException:
            await aio.finish(self._close())
            raise
        address = self._agent_address()
        if address is not None and self._agent_at is not None:
            self._guest = Guest(self._agent_at(address), self._link.monitor, self._hub.emit)
            self._link.guest = self._guest

    async def _reconnect(self) -> Link:
        await aio.finish(self._close())
        await self._connect()
        return self._connected()

    def _agent_address(self) -> str | None:
        if self._place.agent is not None or self._persistent is None:
            return self._place.agent
        # An XML that cannot be read is told where it is needed.
        with suppress(VcpuRefused):
            return self._persistent.definition().agent
        return None

    async def _close(self) -> None:
        link, self._link = self._link, None
        guest, self._guest = self._guest, None
        try:
            if link is not None:
                self._last = link
                await link.close()
        finally:
            # Only now: the link's watcher asks the agent too, and would open its socket again.
            if guest is not None:
                await guest.close()

    def _connected(self) -> Link:
        if self._link is None and self._inactive:
            raise catalogue.INACTIVE.error(name=self.name)
        if self._held is not None:
            raise self._held
        if self._link is None:
            raise VcpuConnectionError(
                f"the domain '{self.name}' is not connected",
                address=next(iter(self._place.qmp), None),
                reason="closed",
                hint="use it inside `async with connect(…)`, or await reconnect()",
            )
        return self._link

    async def _query(self, request: Request) -> Outcome:
        began = time.monotonic()
        async with self._turn():
            self._check_here(request, check_flags(request.flags, is_query=request.is_query))
            state = await self._state(request.flags)
        ids, refusals = select(state, request)
        if refusals:
            raise VcpuRefused(refusals, ids=ids)
        return queried(state, ids, time.monotonic() - began)

    async def _state(self, flags: VcpuFlag) -> DomainState:
        """Of the side that `flags` name."""
        self._shown = None
        live, _ = self._sides(flags)
        if not live:
            assert self._persistent is not None
            from qmpvcpu.core.machine.boot_arguments import located

            definition = self._persistent.definition()
            self._shown = located(definition, state_of(definition, self.name, active=self.is_active))
            return self._shown
        link = self._connected()
        state = await self._lit(await link.read(), required=bool(flags & VcpuFlag.GUEST))
        return _with_threads(link, state)

    def _placing(self, request: Request, here: list[Refusal]) -> tuple[Placing, list[Refusal]]:
        """Where the definition wants the threads of what is plugged; and what keeps it from being read."""
        threads = self._connected().threads
        if self._persistent is None or not request.place or not request.enables_more:
            return Placing(threads, None), here
        try:
            definition = self._persistent.definition()
        except VcpuRefused as error:
            hint = "correct it, or leave threads where the kernel puts them: --no-place (place=False)"
            return Placing(threads, None), [*here, *(replace(refusal, hint=hint) for refusal in error.refusals)]
        return Placing(threads, definition), here

    async def _plug(self, ids: Sequence[int], place: bool) -> Outcome:
        """Plug what a destination lacks of the guest that comes."""
        request = Request(tuple(ids), VcpuFlag.ENABLE, fallback=False, place=place)
        placing, refusals = self._placing(request, [])
        return await run(Reach(self._connected(), placing=placing, preconditions=tuple(refusals)), request)

    def _sides(self, flags: VcpuFlag) -> tuple[bool, bool]:
        """Whether LIVE, whether CONFIG; CURRENT is LIVE if it runs, else CONFIG."""
        live, config = bool(flags & (VcpuFlag.LIVE | VcpuFlag.GUEST)), bool(flags & VcpuFlag.CONFIG)
        if not live and not config:
            config = self._inactive
            live = not config
        return live, config

    def _against(self, request: Request, config: bool) -> list[Refusal]:
        """What the definition has against it."""
        if not config or self._persistent is None:
            return []
        return check_request(request) or list(self._persistent.plan(request).plan.refusals)

    async def _lit(self, state: DomainState, *, required: bool) -> DomainState:
        """With the guest's own view of each vCPU, where an agent gives it."""
        if self._guest is None:
            return state
        view = await (self._guest.view(state) if required else self._guest.try_view(state))
        return state if view is None else with_online(state, view)

    def _check_here(self, request: Request, refusals: Sequence[Refusal] = ()) -> None:
        found = [*refusals, *self._not_here(request)]
        if found:
            raise VcpuRefused(found, ids=request.ids)

    def _not_here(self, request: Request) -> list[Refusal]:
        """What this connection cannot serve, whatever the state."""
        live, config = self._sides(request.flags)
        return check_sides(
            request,
            self.name,
            live=live,
            config=config,
            is_active=not self._inactive,
            has_definition=self._persistent is not None,
            has_agent=self._guest is not None or self._link is None,
        )


def _with_threads(link: Link, state: DomainState) -> DomainState:
    """With what the vCPUs' threads are given, where they run on this host."""
    if link.threads is None:
        return state
    ids = [vcpu.thread_id for vcpu in state.vcpus if vcpu.thread_id is not None]
    return with_threads(state, link.threads.look(ids))


def _request(
    ids: int | Iterable[int],
    flags: VcpuFlag,
    options: Options,
    *,
    count: int | None = None,
    total: int | None = None,
) -> Request:
    given: dict[str, Any] = dict(options)
    for name, flag in _FLAG_WORDS:
        if given.pop(name, False):
            flags |= flag
    return Request(_ids(ids) if total is None else (), flags, count, total=total, **given)


def _flags_of(options: Options) -> VcpuFlag:
    return _request((), VcpuFlag.CURRENT, options, total=0).flags


_FLAG_WORDS = (
    ("core", VcpuFlag.CORE),
    ("live", VcpuFlag.LIVE),
    ("config", VcpuFlag.CONFIG),
    ("guest", VcpuFlag.GUEST),
)


def _total(count: int, options: Options, *, maximum: bool, hotpluggable: bool) -> Request:
    if type(count) is not int:
        raise VcpuUsageError(f"{count!r} is not a number of vCPUs", hint="give an integer")
    if maximum and not options.get("config"):
        raise catalogue.MAXIMUM_IS_CONFIG.error()
    request = _request((), VcpuFlag.CURRENT, options, total=count)
    return replace(request, maximum=maximum, hotpluggable=hotpluggable)


def _ids(ids: object) -> tuple[int, ...]:
    chosen = tuple(ids) if isinstance(ids, Iterable) and not isinstance(ids, str | bytes) else (ids,)
    if not chosen:
        raise VcpuUsageError("no vCPU id given", hint="name at least one")
    for number in chosen:
        if type(number) is not int:
            raise VcpuUsageError(f"{number!r} is not a vCPU id", hint="ids are integers")
    return tuple(sorted(set(chosen)))
