"""`Domain`: one QEMU guest, with the RFC's single call for its vCPUs.

Source: the RFC on libvirt's list,
`int virDomainVcpu(virDomainPtr domain, unsigned int id, unsigned int flags)`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from qmpvcpu import aio
from qmpvcpu import xml as documents
from qmpvcpu.core.arguments import checked
from qmpvcpu.core.engine.report import queried
from qmpvcpu.core.migration.status import MigrationStatus, Progress
from qmpvcpu.core.model import DomainState, Event, Outcome, Vcpu
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.core.request import Listed, Request
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.hotplug import plugs_left
from qmpvcpu.core.rules.request import check_flags
from qmpvcpu.core.rules.selection import select
from qmpvcpu.core.state.guest_view import GuestView
from qmpvcpu.domain import dump
from qmpvcpu.domain import migration as migrating
from qmpvcpu.domain.backends.backend import Backend
from qmpvcpu.domain.event_bus import EventBus, Events
from qmpvcpu.domain.interrupted import Interrupted, left_by
from qmpvcpu.domain.pin import check_pin
from qmpvcpu.domain.placement import place_all
from qmpvcpu.domain.reached import Reached
from qmpvcpu.domain.session import Session
from qmpvcpu.errors import Refusal, VcpuConnectionError, VcpuError, VcpuRefused, VcpuUsageError
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.host.saves import paused_guest

if TYPE_CHECKING:
    from qmpvcpu.core.machine.comparison import Picture
    from qmpvcpu.core.migration.cookie import Cookie
    from qmpvcpu.domain.dump import DescribedXml
    from qmpvcpu.domain.migration import Migration
    from qmpvcpu.domain.migration.move import Migrated


class Options(TypedDict, total=False):
    """Keyword arguments of every call that changes something, and of its plan."""

    #: Change the running guest (LIVE).
    live: bool
    #: Change the persistent definition (CONFIG).
    config: bool
    #: Extend the ids to every vCPU of their cores (CORE).
    core: bool
    #: Switch through the guest agent, online and offline only (GUEST).
    guest: bool
    #: Seconds to wait for the guest; 0 does not wait. Default (None): 30, or 0 while the guest is
    #: stopped.
    timeout: float | None
    #: False: return `requested` as soon as QEMU has accepted an unplug. Default True.
    wait: bool
    #: True: plug removed vCPUs again, if the rest of the request is rejected or fails.
    atomic: bool
    #: How often an unplug that the guest refused is requested again, within `timeout`.
    retry: int
    #: False: never use the guest agent for what hotplug cannot do. Default True.
    fallback: bool
    #: True: also do what is known to crash QEMU.
    force: bool
    #: False: do not place the threads of plugged vCPUs; the kernel places them. Default True.
    place: bool


class TransferOptions(TypedDict, total=False):
    """Keyword arguments of `Domain.migrate`: how the guest's memory is sent to the destination."""

    #: Where the destination should listen. Default (None): two QEMUs on this host use a private
    #: socket.
    uri: str | None
    #: The address by which the source's host reaches the destination's host.
    host: str | None
    #: Maximum MiB per second. Default (None): QEMU's own limit.
    bandwidth: int | None
    #: Seconds after which the guest is paused, so that the migration can finish. Default (None):
    #: never.
    timeout: float | None
    #: Called with each fresh status.
    progress: Progress | None


class Domain:
    """One guest. Enter it once (`async with`) and call it from one event loop; operations queue.

    State is cached between calls, and events keep it fresh. A call reports that something is
    already so only after a fresh query.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._reached = backend.unreached()
        self.name = self._reached.name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._last: Session | None = None
        self._reported: DomainState | None = None
        self._bus = EventBus()
        self._queue = asyncio.Lock()
        self._interrupted: Interrupted | None = None
        #: Whether a call was cancelled while it was connecting again.
        self._is_broken_off = False
        #: How often the domain was left.
        self._leaves = 0

    def __repr__(self) -> str:
        reached = self._reached
        state = (
            "connected"
            if reached.session is not None
            else "inactive"
            if reached.is_inactive
            else "closed"
        )
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
        self._is_broken_off = False
        self._leaves += 1
        self._bus.end(None)
        await aio.finish(self._close())

    @asynccontextmanager
    async def _call(self) -> AsyncIterator[None]:
        """Queue operations on the domain, and remember until the next one what a cancelled one has
        left.
        """
        self._check_loop()
        async with self._queue:
            self._interrupted = None
            try:
                yield
            except asyncio.CancelledError as error:
                self._interrupted = left_by(error).with_pending(self.pending_ids)
                raise

    def _check_loop(self) -> None:
        """Raise VcpuUsageError if this is not the event loop in which the domain was entered."""
        if self._loop is None:
            raise VcpuUsageError(
                f"the domain '{self.name}' is not entered",
                hint="use it inside `async with connect(…) as domain`",
            )
        if asyncio.get_running_loop() is not self._loop:
            raise VcpuUsageError(
                f"the domain '{self.name}' was entered in another event loop",
                hint="call connect() in each event loop; from another thread:"
                " asyncio.run_coroutine_threadsafe()",
            )

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[Reached]:
        """`_call`, with the domain refreshed."""
        async with self._call():
            if self._is_broken_off:
                await self._retry_connect()
            now = await self._backend.refresh(self._reached)
            if now is None:
                # The guest was started meanwhile.
                self._is_broken_off = True
                await self._retry_connect()
            else:
                self._reached = now
            yield self._reached

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[Session]:
        """`_call`, with the open connection."""
        async with self._call():
            yield self._reached.connected()

    async def reconnect(self) -> None:
        """Connect again after the connection broke, and refresh the state.

        Raises:
            VcpuConnectionError: as on entry.
        """
        async with self._call():
            await self._reconnect()

    # -- the call, and its separate forms ---------------------------------------------------------

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
            vcpu_id: a vCPU id; with NUMA_NODE, a node id.
            flags: a combination of `VcpuFlag`; without ENABLE and DISABLE the call is a query.
            count: with NUMA_NODE, the number of vCPUs (with CORE: of cores) of the node.
            options: see `Options`.

        Raises:
            VcpuRefused, VcpuRejected, VcpuFailed, VcpuPartial, VcpuConnectionError: see
            `qmpvcpu.errors`.
        """
        return await self.request(_request(vcpu_id, VcpuFlag(flags), options, count=count))

    @checked
    async def request(self, request: Request) -> Outcome:
        """Carry out a `Request` that was made elsewhere. Errors are those of `vcpu`."""
        if request.is_query:
            return await self._query(request)
        async with self._turn() as reached:
            self._reported = None
            return await self._backend.change(reached, request)

    @property
    def is_active(self) -> bool:
        """Whether the guest runs, as far as this connection knows."""
        return self._reached.session is not None or self._reached.busy is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages about the connection to the guest."""
        return self._backend.notes

    @property
    def has_definition(self) -> bool:
        """Whether a definition of the domain is known."""
        return self._reached.definition is not None

    @checked
    async def enable(self, ids: int | Iterable[int], **options: Unpack[Options]) -> Outcome:
        """Plug these vCPUs, all or none. Arguments and errors are those of `vcpu`."""
        return await self.request(_request(ids, VcpuFlag.ENABLE, options))

    @checked
    async def disable(self, ids: int | Iterable[int], **options: Unpack[Options]) -> Outcome:
        """Unplug these vCPUs and wait for the guest's answer. Arguments and errors are those of
        `vcpu`.
        """
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
        """Query or switch the vCPUs of a NUMA node: ENABLE takes its `count` (1) lowest disabled
        ones, DISABLE its highest enabled ones.

        Other arguments and errors are those of `vcpu`.
        """
        return await self.request(
            _request(node, VcpuFlag(flags) | VcpuFlag.NUMA_NODE, options, count=count)
        )

    @checked
    async def set_vcpus(
        self,
        count: int,
        *,
        maximum: bool = False,
        hotpluggable: bool = False,
        **options: Unpack[Options],
    ) -> Outcome:
        """Set the number of enabled vCPUs: the lowest are added, the highest removed
        (`virDomainSetVcpusFlags`).

        Args:
            count: the number of vCPUs.
            maximum: change the maximum instead, which is possible only in a definition (CONFIG).
            hotpluggable: make added vCPUs hotpluggable in a definition; in a running guest they
                always are.
            options: see `Options`.

        Raises:
            VcpuRefused: among other reasons, the count cannot be reached with whole cores.
        """
        return await self.request(
            _total(count, options, maximum=maximum, hotpluggable=hotpluggable)
        )

    @checked
    async def apply(
        self, xml: bytes, *, source: str = "the file", **options: Unpack[Options]
    ) -> Outcome:
        """Change the running guest, the definition, or both, to match `<vcpus>` in a document, as
        one transaction.

        Args:
            xml: a domain's XML, or `<vcpus>` alone.
            source: the name of the document in messages.
            options: see `Options`; the guest agent is not used.

        Raises:
            VcpuRefused: among other reasons, the document cannot belong to this domain.
        """
        return await self.request(await self._listed(xml, source, options))

    @checked
    async def plan_apply(
        self, xml: bytes, *, source: str = "the file", **options: Unpack[Options]
    ) -> Plan:
        """Return what `apply` would do."""
        return await self.plan(await self._listed(xml, source, options))

    async def _listed(self, xml: bytes, source: str, options: Options) -> Request:
        async with self._turn() as reached:
            live, _ = reached.sides(_flags_of(options))
            if reached.definition is not None and not (live and reached.session is not None):
                maximum = reached.definition.definition().maxcpus
            else:
                maximum = reached.connected().state.maxcpus
        try:
            vcpus, exact = documents.read_listed(xml, maximum)
        except VcpuRefused as error:
            raise error.at(source) from error
        given: Options = {"atomic": True, **options, "fallback": False}
        return replace(
            _request((), VcpuFlag.CURRENT, given, total=0),
            total=None,
            listed=Listed(vcpus, exact, source),
        )

    @checked
    async def dump_xml(
        self, *, inactive: bool = False, dialect: str | None = None, detail: str | None = None
    ) -> bytes:
        """Return the domain's XML: of the running guest, or of its definition if the guest does not
        run.

        Args:
            inactive: return the definition in any case.
            dialect: how `<vcpus>` is written, "rfc" or "libvirt"; None keeps the document's
                dialect, or uses libvirt's.
            detail: what the RFC dialect shows: "minimal" (id, state), "cell", or "full".

        Raises:
            VcpuRefused: there is no definition.
        """
        dump.check_dump(dialect, detail)
        async with self._turn() as reached:
            return await self._backend.dump_xml(
                reached, VcpuFlag.CONFIG if inactive else VcpuFlag.CURRENT, dialect, detail
            )

    async def describe_xml(self) -> bytes:
        """Return a definition of the running guest from what QEMU reports: name, machine, topology,
        memory, vCPUs.

        Raises:
            VcpuRefused: the guest does not run.
        """
        return (await self.describe_machine()).xml

    async def describe_machine(self) -> DescribedXml:
        """Return `describe_xml`, and the parts of the guest that such a definition cannot express.

        Raises:
            VcpuRefused: the guest does not run.
        """
        async with self._turn() as reached:
            return await reached.describe_xml(await reached.connected().read())

    async def picture(self) -> Picture:
        """Return what QEMU reports about the running machine: RAM blocks, nodes, devices,
        properties.

        Raises:
            VcpuRefused: the guest does not run.
            VcpuConnectionError: the connection to QEMU broke.
        """
        async with self._turn() as reached:
            session = reached.connected()
            return await migrating.read_picture(session.monitor, session.process)

    async def guest_vcpus(self) -> GuestView:
        """Return the guest's own CPUs, and the vCPU that each one is.

        Raises:
            VcpuRefused: no agent of this domain is known, or it is not allowed to list CPUs.
            VcpuConnectionError: no agent answers, or its answer is impossible.
        """
        async with self._turn() as reached:
            return await reached.guest_view()

    @checked
    async def set_guest_vcpus(self, logical_ids: int | Iterable[int], online: bool) -> Outcome:
        """Take CPUs of the guest online or offline, all or none, by the guest's own ids."""
        ids = _ids(logical_ids)
        async with self._turn() as reached:
            return await reached.switch_guest(ids, online)

    @checked
    async def place(self, xml: bytes | None = None) -> list[str]:
        """Place the threads of every vCPU and of the emulator as the definition says; return
        messages.

        Args:
            xml: a domain's XML instead of its definition.

        Raises:
            VcpuRefused: the threads cannot be placed, or there is no definition; no thread was
                placed.
            VcpuFailed: the kernel declined for some threads; the others are placed.
        """
        async with self._turn() as reached:
            session = reached.connected()
            if xml is not None:
                definition = documents.read_domain(xml)[1]
            elif reached.definition is not None:
                definition = reached.definition.definition()
            else:
                raise catalogue.NO_DEFINITION.error()
            return place_all(session.threads, definition, await session.read())

    @checked
    async def pin(
        self,
        vcpu_id: int,
        cpus: str | Iterable[int] | None,
        flags: VcpuFlag = VcpuFlag.CURRENT,
    ) -> Outcome:
        """Pin a vCPU to host CPUs (`virDomainPinVcpuFlags`): its thread now, the definition, or
        both.

        Args:
            vcpu_id: the vCPU's id.
            cpus: host CPUs, `0-3,^2` or numbers; None allows all host CPUs.
            flags: LIVE, CONFIG, both, or CURRENT.

        Raises:
            VcpuRefused: nothing was touched.
            VcpuFailed: the kernel declined.
            VcpuPartial: the thread is pinned, and the definition could not be written.
        """
        wanted, request = check_pin(vcpu_id, cpus, flags)
        async with self._turn() as reached:
            self._reported = None
            return await self._backend.pin(reached, request, wanted)

    @checked
    async def vcpus(self, ids: Iterable[int] | None = None) -> tuple[Vcpu, ...]:
        """Return these vCPUs, or all of them, from a fresh query."""
        if ids is None:
            return (await self.state()).vcpus
        return (await self.request(_request(ids, VcpuFlag.CURRENT, {}))).rows

    @checked
    async def state(self, flags: VcpuFlag = VcpuFlag.CURRENT) -> DomainState:
        """Return everything known of the domain, from a fresh query. `flags` may name the side,
        LIVE or CONFIG.

        Raises:
            VcpuRefused: the domain does not have this side.
        """
        async with self._turn() as reached:
            reached.check(Request((), flags), check_flags(flags))
            return await self._state(reached, flags)

    @property
    def agent_trouble(self) -> VcpuConnectionError | None:
        """Why the last state lacks the agent's view; None if it has the view, or if no agent is
        known.
        """
        return self._reached.guest.trouble if self._reached.guest is not None else None

    async def agent_refusal(self) -> VcpuError | None:
        """Return why the guest's agent cannot switch CPUs; None if it can, or if no agent is
        known.
        """
        async with self._turn() as reached:
            if reached.guest is None:
                return None
            try:
                await reached.guest.check_switch()
            except VcpuError as error:
                return error
        return None

    def plugs_left(self) -> list[str]:
        """Return one text with the number of plugs that this QEMU can take before it aborts; an
        empty list if there is no limit.
        """
        session = self._reached.session
        return plugs_left(session.state, session.knowledge()) if session is not None else []

    @property
    def run_state(self) -> str | None:
        """QEMU's RunState ("running", "paused", "prelaunch" …) at the last query; None if not
        known.
        """
        return self._reached.session.seen_run_state if self._reached.session is not None else None

    @checked
    def events(self, *, steps: bool = False, limit: int = 1000) -> Events:
        """What happens to the vCPUs, also by other clients. The subscription begins on entry:

            async with domain.events() as events:
                async for event in events: …

        Args:
            steps: also report intermediate steps (`unplug-requested`, `guest-ejecting`).
            limit: how many events may wait to be read.

        Raises (on entry and from the iteration):
            VcpuConnectionError: the connection broke.
            VcpuOverflow: more than `limit` events waited.
        """
        if limit < 1:
            raise VcpuUsageError(f"the limit of events is {limit}", hint="give 1 or more")
        return Events(
            self._bus,
            lambda: self._reached.connected().check(),
            self._check_loop,
            steps=steps,
            limit=limit,
        )

    @property
    def last_state(self) -> DomainState:
        """The state of the last query, without a new one.

        Raises:
            VcpuConnectionError: the domain was never connected.
        """
        if self._reported is not None:
            return self._reported
        session = self._reached.session or self._last
        return session.state if session is not None else self._reached.connected().state

    @property
    def pending_ids(self) -> tuple[int, ...]:
        """vCPU ids whose unplug was requested and has not finished, as far as known."""
        session = self._reached.session or self._last
        if session is None:
            return ()
        entities = session.state.by_id
        return tuple(
            sorted(
                n
                for first in session.pending_unplugs.entity_ids
                if first in entities
                for n in entities[first].ids
            )
        )

    @property
    def interrupted(self) -> Interrupted | None:
        """What the last call has left, if it was cancelled, else None.

        Each call, including a query, resets this to None when its turn comes. A call that is
        cancelled while it waits for its turn has begun nothing, and does not change this. It stays
        readable after the domain is left.
        """
        return self._interrupted

    @property
    def settled(self) -> tuple[Event, ...]:
        """What had finished while no connection was open, as found when this one was made."""
        return self._reached.session.settled if self._reached.session is not None else ()

    # -- plans: what a call would do, and every refusal; nothing is touched ------------------------

    @checked
    async def plan(self, request: Request) -> Plan:
        """Return what `request` would do, with every refusal; nothing is touched."""
        async with self._turn() as reached:
            self._reported = None
            return await self._backend.plan(reached, request)

    @checked
    async def plan_vcpu(
        self, vcpu_id: int, flags: VcpuFlag, *, count: int | None = None, **options: Unpack[Options]
    ) -> Plan:
        """Return what `vcpu` would do."""
        return await self.plan(_request(vcpu_id, VcpuFlag(flags), options, count=count))

    @checked
    async def plan_enable(self, ids: int | Iterable[int], **options: Unpack[Options]) -> Plan:
        """Return what `enable` would do."""
        return await self.plan(_request(ids, VcpuFlag.ENABLE, options))

    @checked
    async def plan_disable(self, ids: int | Iterable[int], **options: Unpack[Options]) -> Plan:
        """Return what `disable` would do."""
        return await self.plan(_request(ids, VcpuFlag.DISABLE, options))

    @checked
    async def plan_numa_node(
        self, node: int, flags: VcpuFlag, *, count: int | None = None, **options: Unpack[Options]
    ) -> Plan:
        """Return what `numa_node` would do."""
        return await self.plan(
            _request(node, VcpuFlag(flags) | VcpuFlag.NUMA_NODE, options, count=count)
        )

    @checked
    async def plan_set_vcpus(
        self,
        count: int,
        *,
        maximum: bool = False,
        hotpluggable: bool = False,
        **options: Unpack[Options],
    ) -> Plan:
        """Return what `set_vcpus` would do."""
        return await self.plan(_total(count, options, maximum=maximum, hotpluggable=hotpluggable))

    # -- to another QEMU, or into a file -----------------------------------------------------------

    @cached_property
    def migration(self) -> Migration:
        """Moves the guest to another QEMU, or into a file and back. Each `migrate_…` below is one
        of its calls.
        """
        return migrating.Migration(
            migrating.Access(
                connected=self._alone,
                agent=lambda: self._reached.guest,
                definition=lambda: self._reached.definition,
                describe=lambda state: self._reached.describe(state),
                plug=lambda ids, place: self._reached.plug(ids, place),
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
            persistent=persistent,
            wait=wait,
            force=force,
            with_agents=with_agents,
            is_paused=is_paused,
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
        return await self.migration.finish(
            cookie, force=force, hint=hint, reported=told, moved=moved
        )

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
        return await self.migration.migrate(
            destination.migration,
            cookie,
            migrating.Transfer(**transfer),
            force=force,
            finished=settled,
        )

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
        """`migration.save`, into a `SaveTarget` of these arguments."""
        return await self.migration.save(
            cookie, migrating.SaveTarget(fd, offset, finish, check, files), progress, force=force
        )

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
        self._reached = await self._backend.reach(self._bus, self._queue, self._last)
        self._is_broken_off = False
        session = self._reached.session
        if session is None:
            return
        try:
            paused = paused_guest(session.process)
            if paused is not None and paused.is_left:
                await self.migration.recover(session, paused)
        except BaseException:
            await aio.finish(self._close())
            raise

    async def _reconnect(self) -> Session:
        await aio.finish(self._close())
        await self._connect()
        return self._reached.connected()

    async def _retry_connect(self) -> None:
        """Connect again, unless the domain is left meanwhile."""
        leaves = self._leaves
        await aio.finish(self._close())
        if leaves == self._leaves:
            await self._connect()
        if leaves != self._leaves:
            self._is_broken_off = False
            await aio.finish(self._close())
            self._reached.connected()

    async def _close(self) -> None:
        reached, self._reached = self._reached, self._backend.closed(self._reached)
        try:
            if reached.session is not None:
                self._last = reached.session
                await reached.session.close()
        finally:
            try:
                # The agent is closed after the session, because the session's watcher queries it
                # and would open its socket again.
                if reached.guest is not None:
                    await reached.guest.close()
            finally:
                await self._backend.close()

    async def _query(self, request: Request) -> Outcome:
        began = time.monotonic()
        async with self._turn() as reached:
            reached.check(request, check_flags(request.flags, is_query=request.is_query))
            state = await self._state(reached, request.flags)
        ids, refusals = select(state, request)
        if refusals:
            raise VcpuRefused(refusals, ids=ids)
        return queried(state, ids, time.monotonic() - began)

    async def _state(self, reached: Reached, flags: VcpuFlag) -> DomainState:
        """Return the state of the side that `flags` name."""
        self._reported = None
        state = await reached.state(flags)
        live, _ = reached.sides(flags)
        self._reported = None if live else state
        return state


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
    return replace(
        _request((), VcpuFlag.CURRENT, options, total=count),
        maximum=maximum,
        hotpluggable=hotpluggable,
    )


def _ids(ids: object) -> tuple[int, ...]:
    chosen = (
        tuple(ids) if isinstance(ids, Iterable) and not isinstance(ids, str | bytes) else (ids,)
    )
    if not chosen:
        raise VcpuUsageError("no vCPU id given", hint="name at least one")
    for number in chosen:
        if type(number) is not int:
            raise VcpuUsageError(f"{number!r} is not a vCPU id", hint="ids are integers")
    return tuple(sorted(set(chosen)))
