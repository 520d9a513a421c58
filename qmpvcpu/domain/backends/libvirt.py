"""A domain of libvirt's (`-c URI`), by its API or through its QEMU monitor.

By the API libvirt stays the owner of its truth: the state is that of its XML, and one call of its own switches one
entity. Everything around it, several of them at once, whole cores, nodes, undoing, the true end of an unplug, is
ours, and the same as over QMP: the API stands where a monitor would.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Literal

from qmpvcpu import aio
from qmpvcpu.core.definition import Definition
from qmpvcpu.core.machine.versions import oldest_with
from qmpvcpu.core.model import DomainState, Outcome, format_ids
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.core.quirks import quirk
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.request import check_count, check_flags, check_range
from qmpvcpu.core.rules.selection import guest_total
from qmpvcpu.core.state.from_definition import state_of
from qmpvcpu.core.state.from_live_xml import running_state
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.definition import Persistent
from qmpvcpu.domain.domain import Domain
from qmpvcpu.domain.dump import check_dump, dump
from qmpvcpu.domain.pin import check_pin
from qmpvcpu.domain.reader import open_reader
from qmpvcpu.domain.resolve import Place
from qmpvcpu.domain.session import open_link, store_of
from qmpvcpu.errors import (
    OutcomeKind,
    Refusal,
    VcpuConnectionError,
    VcpuError,
    VcpuFailed,
    VcpuPartial,
    VcpuRefused,
)
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.host.process import find_by_uuid
from qmpvcpu.libvirt.calls import QUERY_SECONDS, Connection, LibvirtGuest, Row, open_connection
from qmpvcpu.libvirt.monitor import ApiAgent, ApiMonitor
from qmpvcpu.libvirt.passthrough import PassedMonitor
from qmpvcpu.ports import CommandError, DefinitionStore, Monitor
from qmpvcpu.qemu.agent import AgentClient

__all__ = ["TAINTED", "LibvirtDomain", "Via", "list_domains"]

logger = logging.getLogger("qmpvcpu.domain.backends.libvirt")

#: How a libvirt domain is reached: by libvirt's API, or with our own engine through its QEMU monitor.
Via = Literal["api", "monitor"]

#: What libvirt declines because of what was asked; nothing was touched then.
_REFUSALS: Final = frozenset(
    {
        "VIR_ERR_INVALID_ARG",
        "VIR_ERR_NO_SUPPORT",
        "VIR_ERR_CONFIG_UNSUPPORTED",
        "VIR_ERR_ARGUMENT_UNSUPPORTED",
        "VIR_ERR_OPERATION_UNSUPPORTED",
        "VIR_ERR_OPERATION_INVALID",
        "VIR_ERR_OPERATION_DENIED",
        "VIR_ERR_ACCESS_DENIED",
        "VIR_ERR_XML_ERROR",
        "VIR_ERR_XML_DETAIL",
    }
)
#: Of every way through the monitor.
TAINTED: Final = (
    "through its monitor: libvirt marks the domain tainted (custom-monitor), and its XML does not follow what is"
    " plugged and unplugged"
)
_UNSEEN: Final = "libvirt has not seen that vCPU {} is gone, and its XML lists it still: QEMU under TCG tells none"
_DOUBTFUL: Final = (
    "one of vCPU {} may be gone: libvirt lists them with one order, and sees no end of an unplug under TCG;"
    " --via monitor asks QEMU"
)
_AGENT_CHANNEL: Final = b"org.qemu.guest_agent.0"


class LibvirtDomain(Domain):
    """One domain of libvirt's; the calls are those of `Domain`, and its promises.

    Args:
        name: or UUID.
        uri: libvirt's.
        via: "api" or "monitor".
        qmp_log: a `qmpvcpu.QmpLog`; with "monitor" it keeps every message.
        connect_timeout: seconds; 5 if not given, and to another host 30.
        query_timeout: seconds for a call of libvirt's that changes nothing.
    """

    def __init__(
        self,
        name: str,
        uri: str,
        via: Via = "api",
        qmp_log: Any = None,
        connect_timeout: float | None = None,
        query_timeout: float = QUERY_SECONDS,
    ) -> None:
        super().__init__(Place(name, (uri,)), self._monitor_of)
        self._timeouts = connect_timeout, query_timeout
        self._uri = uri
        self._via: Via = via
        self._log = qmp_log
        self._connection: Connection | None = None
        self._domain: LibvirtGuest | None = None
        self._store: _Definition | None = None
        self._is_broken_off = False
        #: How often it was left.
        self._leaves = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of this way to the guest."""
        if self._link is None:
            return ()
        if self._via == "monitor":
            return (TAINTED,)
        monitor = self._link.monitor
        if not isinstance(monitor, ApiMonitor):
            return ()
        rows = ((monitor.unseen, _UNSEEN), (monitor.doubtful, _DOUBTFUL))
        return tuple(text.format(format_ids(ids)) for ids, text in rows if ids)

    # -- connecting ---------------------------------------------------------------------------------

    async def _monitor_of(self, address: str) -> Monitor:
        assert self._domain is not None and self._connection is not None
        loop = asyncio.get_running_loop()
        if self._via == "monitor":
            passed = PassedMonitor(self._domain, self._log)
            await self._connection.query("virDomainQemuMonitorCommand", lambda: passed.start(loop))
            return passed
        monitor = ApiMonitor(self._domain)
        await self._connection.query("virConnectDomainEventRegisterAny", lambda: monitor.start(loop))
        return monitor

    async def _connect(self) -> None:
        self._inactive = False
        self._connection = Connection(self._uri, *self._timeouts)
        try:
            with _answered():
                live = await self._enter(self._connection)
        except BaseException:
            await aio.finish(self._close())
            raise
        self._is_broken_off = False
        if live is not None and _AGENT_CHANNEL in live and self._link is not None and self._domain is not None:
            agent = ApiAgent(self._domain) if self._via == "api" else PassedAgent(self._domain)
            self._guest = Guest(agent, self._link.monitor, self._hub.emit)
            self._link.guest = self._guest

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_broken_off = False
        self._leaves += 1
        await super().__aexit__(kind, error, trace)

    async def _enter(self, connection: Connection) -> bytes | None:
        """The running guest's XML, if it runs."""
        await connection.open()
        self._domain = await connection.guest(self.name)
        live, inactive = await self._domain.sides()
        self._define(inactive)
        self._inactive = live is None
        if live is None:
            return None
        reads = self._reads if self._via == "api" else open_reader
        self._link = await open_link(
            self.name, self._place.qmp, self._monitor_of, self._hub, self._queue, self._last, reads
        )
        return live

    async def _reads(self, monitor: Monitor, name: str) -> tuple[XmlReader, DomainState]:
        assert isinstance(monitor, ApiMonitor)
        reader = XmlReader(monitor, name)
        return reader, await reader.full()

    def _define(self, data: bytes | None) -> None:
        """Its definition, as libvirt has it now."""
        if data is None or self._domain is None:
            self._store = self._persistent = None
        elif self._store is not None:
            self._store.data = data
        else:
            self._store = _Definition(self._domain, data)
            self._persistent = _Defined(self._store)

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        try:
            await super()._close()
        finally:
            # They hold libvirt's connection, and its sockets.
            self._domain = self._store = self._persistent = None
            self._inactive = False
            if connection is not None:
                await connection.close()

    async def _refresh(self) -> None:
        """Whether it runs, and its definition, as libvirt has them now."""
        if self._is_broken_off:
            # A call that was to connect anew, since the domain was started, was cancelled in the middle.
            await self._connect_anew()
        if self._connection is None or self._domain is None:
            self._connected()
            return
        self._connection.check()
        if self._link is not None:
            self._link.check()
        with _answered():
            is_active, definition = await self._domain.now()
        self._define(definition)
        if is_active and self._link is None:
            # It was started meanwhile.
            self._is_broken_off = True
            await self._connect_anew()

    async def _connect_anew(self) -> None:
        """Unless the domain is left meanwhile."""
        leaves = self._leaves
        await aio.finish(self._close())
        if leaves == self._leaves:
            await self._connect()
        if leaves != self._leaves:
            self._is_broken_off = False
            await aio.finish(self._close())
            self._connected()

    # -- calls --------------------------------------------------------------------------------------

    async def request(self, request: Request) -> Outcome:
        """Carry out a `Request` made elsewhere; errors are those of `vcpu`."""
        if self._counts_only and not request.is_query:
            if request.total is None:
                raise VcpuRefused([catalogue.COUNTS_ONLY()], ids=request.ids)
            return await self._count(request)
        try:
            end = await super().request(request)
        except VcpuFailed as error:
            raise _refused(error) from error
        except VcpuRefused as refused:
            if not self._is_counted_there(request, refused.refusals):
                raise
            end = await self._count_there(request)
        more = [] if request.is_query else [*self.notes]
        if self._via == "api" and request.enables_more and not request.place:
            more.append(_LIBVIRT_PLACES)
        return replace(end, messages=(*end.messages, *more)) if more else end

    async def plan(self, request: Request) -> Plan:
        """What `request` would do, and every reason why not; touches nothing."""
        if self._counts_only and not request.is_query:
            if request.total is None:
                return Plan(request, request.ids, refusals=(catalogue.COUNTS_ONLY(),))
            async with self._turn():
                refusals = self._against_count(request)
            return Plan(
                request, (), refusals=tuple(refusals), messages=(f"virDomainSetVcpusFlags {request.total}",)
            )
        plan = await super().plan(request)
        if self._is_counted_there(request, plan.refusals):
            ids, online, refusals = guest_total(await self.guest_vcpus(), request.total or 0)
            what = f"take the guest's CPU {format_ids(ids)} {'online' if online else 'offline'}"
            return Plan(request, (), refusals=tuple(refusals), messages=(what, _BY_NUMBER) if ids else ())
        return plan

    def _is_counted_there(self, request: Request, refusals: Iterable[Refusal]) -> bool:
        """Whether to count by the guest's own numbers: nothing tells which is which, and a count needs none."""
        is_count = request.total is not None and request.has(VcpuFlag.GUEST)
        return self._via == "api" and is_count and {refusal.code for refusal in refusals} == {"guest-cpu"}

    async def _count_there(self, request: Request) -> Outcome:
        assert request.total is not None
        ids, online, refusals = guest_total(await self.guest_vcpus(), request.total)
        if refusals:
            raise VcpuRefused(refusals)
        if not ids:
            return Outcome(OutcomeKind.APPLIED, ())
        end = await self.set_guest_vcpus(ids, online)
        return replace(end, messages=(*end.messages, _BY_NUMBER))

    async def dump_xml(
        self, *, inactive: bool = False, dialect: str | None = None, detail: str | None = None
    ) -> bytes:
        """The domain's XML; of one that runs it is libvirt's, but for its vCPUs: see `Domain.dump_xml`."""
        if inactive or self._link is None:
            return await super().dump_xml(inactive=inactive, dialect=dialect, detail=detail)
        check_dump(dialect, detail)
        async with self._turn():
            state = await self._connected().read()
            assert self._domain is not None
            with _answered():
                live = await self._domain.live_xml()
            return dump(live or b"", state, dialect, detail, running=True)

    @property
    def _counts_only(self) -> bool:
        """Whether its driver switches vCPUs by number only (test:///)."""
        return self._connection is not None and self._connection.driver == "TEST" and self._link is not None

    def _against_count(self, request: Request) -> list[Refusal]:
        """What stands against `_count`, as far as is known without doing it."""
        found = [*self._not_here(request), *check_flags(request.flags, is_query=request.is_query)]
        live, _ = self._sides(request.flags)
        total = request.total or 0
        most = self._connected().state.maxcpus if live and self._link is not None else total
        return found + check_count(total, most)

    async def _count(self, request: Request) -> Outcome:
        """`virDomainSetVcpusFlags`."""
        began = time.monotonic()
        async with self._turn():
            live, config = self._sides(request.flags)
            assert self._domain is not None and self._connection is not None and request.total is not None
            if refusals := self._against_count(request):
                raise VcpuRefused(refusals)
            before = [await self._state(flag) for flag in _impacts(live, config)]
            flags = self._domain.flags(live=live, config=config)
            flags |= self._domain.count_flags(request.maximum, request.hotpluggable)
            with _answered():
                await self._connection.change(
                    "virDomainSetVcpusFlags", self._domain.set_vcpus(request.total, flags)
                )
            await self._refresh()
            after = [await self._state(flag) for flag in _impacts(live, config)]
        sides = [
            tuple(sorted(set(a.enabled_ids) ^ set(b.enabled_ids))) for a, b in zip(before, after, strict=True)
        ]
        changed = tuple(sorted({number for side in sides for number in side}))
        written = sides[-1] if config else ()
        return Outcome(
            OutcomeKind.APPLIED,
            changed,
            tuple(vcpu for vcpu in after[0].vcpus if vcpu.id in changed),
            changed_ids=changed,
            mechanism="hotplug" if live and sides[0] else None,
            seconds=time.monotonic() - began,
            live_changed_ids=sides[0] if live else (),
            config_changed_ids=written,
            defined=config and before[-1] != after[-1],
        )

    async def pin(
        self, vcpu_id: int, cpus: str | Iterable[int] | None, flags: VcpuFlag = VcpuFlag.CURRENT
    ) -> Outcome:
        """Pin a vCPU to host CPUs, with `virDomainPinVcpuFlags`; see `Domain.pin`."""
        if self._via != "api":
            return await super().pin(vcpu_id, cpus, flags)
        began = time.monotonic()
        wanted, request = check_pin(vcpu_id, cpus, flags)
        async with self._turn():
            self._shown = None
            live, config = self._sides(request.flags)
            refusals = self._not_here(request)
            if (config and self._persistent is None) or (live and self._link is None):
                raise VcpuRefused(refusals, ids=request.ids)
            states = [await self._state(flag) for flag in _impacts(live, config)]
            for state in states:
                refusals += [one for one in check_range(state, request.ids) if one not in refusals]
            if not refusals and live and not states[0].vcpus[vcpu_id].enabled:
                refusals.append(catalogue.NO_THREAD((vcpu_id,)))
            if refusals:
                raise VcpuRefused(refusals, ids=request.ids)
            everywhere = range(await self._domain.host_cpus()) if self._domain is not None else ()
            pin = format_ids(everywhere if wanted is None else wanted)
            # libvirt writes all of its CPUs where none is named.
            differ = [(state.vcpus[vcpu_id].pin or format_ids(everywhere)) != pin for state in states]
            changed = any(differ)
            assert self._domain is not None and self._connection is not None
            if changed:
                # A driver that knows only what runs (test:///) declines the flag.
                named = request.flags != VcpuFlag.CURRENT
                impact = self._domain.flags(live=live, config=config) if named else 0
                with _answered():
                    await self._connection.change(
                        "virDomainPinVcpuFlags", self._domain.pin_vcpu(vcpu_id, wanted, impact)
                    )
            if live:
                row = (await self._connected().read()).vcpus[vcpu_id]
            else:
                await self._refresh()
                row = (await self._state(VcpuFlag.CONFIG)).vcpus[vcpu_id]
        ids = (vcpu_id,)
        return Outcome(
            OutcomeKind.APPLIED,
            ids,
            (row,),
            changed_ids=ids if changed else (),
            seconds=time.monotonic() - began,
            live_changed_ids=ids if live and differ[0] else (),
            config_changed_ids=ids if config and differ[-1] else (),
            defined=config and differ[-1],
        )


#: `--no-place` by the API.
_LIBVIRT_PLACES: Final = "libvirt places threads itself, as its definition says, with --no-place (place=False) too"
#: Of a count in the guest.
_BY_NUMBER: Final = "which vCPU is which in the guest is not known: these are the guest's own numbers"


def _impacts(live: bool, config: bool) -> list[VcpuFlag]:
    return [flag for flag, on in ((VcpuFlag.LIVE, live), (VcpuFlag.CONFIG, config)) if on]


async def list_domains(uri: str) -> Sequence[Row]:
    """Every domain at a URI.

    Raises:
        VcpuConnectionError: libvirt cannot be reached.
    """
    async with open_connection(uri) as connection:
        with _answered():
            return await connection.list()


def _may_be_unseen(definition: Definition) -> bool:
    """Whether vCPUs may leave without an event."""
    return quirk("x86-tcg-no-deleted-event").affects(definition.arch, definition.accel, None)


def _doubtful(definition: Definition, gone: Collection[int]) -> tuple[int, ...]:
    """vCPUs of one order, where each has its own: one of them is gone, and libvirt does not know (TCG)."""
    by_order: dict[int, list[int]] = {}
    if not _may_be_unseen(definition):
        return ()
    for entity in state_of(definition, "", active=True).entities:
        order = definition.vcpus[entity.first].order
        if entity.first not in gone and definition.vcpus[entity.first].enabled and order is not None:
            by_order.setdefault(order, []).append(entity.first)
    return tuple(first for firsts in by_order.values() if len(firsts) > 1 for first in firsts)


@contextmanager
def _answered() -> Iterator[None]:
    """libvirt's answer as ours: what it declines was not touched."""
    try:
        yield
    except CommandError as error:
        raise _from_libvirt(error) from error


def _from_libvirt(error: CommandError) -> VcpuError:
    if error.error_class in _REFUSALS:
        return VcpuRefused([replace(catalogue.LIBVIRT(said=error.text), libvirt=error.error_class)])
    if error.error_class == "VIR_ERR_OPERATION_TIMEOUT":
        return VcpuConnectionError(
            error.text,
            reason="timeout",
            libvirt=error.error_class,
            hint="another call holds the domain: try again",
        )
    return VcpuFailed(error.text, libvirt=error.error_class, hint="look at libvirtd's log")


def _refused(error: VcpuFailed) -> VcpuError:
    """What libvirt declined before anything was done is a refusal."""
    touched = error.changed_ids or error.pending or error.undone
    if isinstance(error, VcpuPartial) or touched or error.libvirt not in _REFUSALS:
        return error
    refusal = replace(catalogue.LIBVIRT(error.ids, said=error.message), hint=error.hint, libvirt=error.libvirt)
    return VcpuRefused([refusal], ids=error.ids, messages=error.messages, seconds=error.seconds)


class _Defined(Persistent):
    """The definition that libvirt keeps."""

    def __init__(self, store: _Definition) -> None:
        connection = store.guest.connection
        super().__init__(store, lambda work: connection.change("the definition", work))
        self._libvirts = store

    def _store_for(self, request: Request) -> DefinitionStore:
        # What is asked says how libvirt is told.
        return replace(self._libvirts, request=request)


@dataclass(slots=True)
class _Definition:
    """`ports.DefinitionStore`: the XML that libvirt keeps, as it was when the call began; `request` is what is to
    be done to it.
    """

    guest: LibvirtGuest
    data: bytes
    request: Request | None = None

    @property
    def place(self) -> str:
        """What it is called in messages."""
        return f"{self.guest.name} at {self.guest.connection.uri}"

    def read(self) -> bytes:
        """The document."""
        return self.data

    def fetch(self) -> bytes:
        """As it is now. Blocks."""
        return self.guest.read_definition()

    def stage(self, data: bytes) -> _Staged:
        """Nothing is written before it counts: libvirt knows one definition."""
        return _Staged(self, data)


class _Staged:
    """A next version (`ports.Staged`)."""

    def __init__(self, store: _Definition, data: bytes) -> None:
        self._store = store
        self._guest = store.guest
        self._data = data

    def commit(self, before: bytes, again: Callable[[bytes], bytes], given_up: Callable[[], bool]) -> None:
        """Tell libvirt what is to be different; in words of its own where it has them."""
        from qmpvcpu.xml.document import read_domain

        with _answered():
            now = self._store.fetch()
            if now != before:
                self._data = again(now)
            if self._data == now:
                return
            calls = self._calls(read_domain(now)[1], read_domain(self._data)[1])
            if given_up():
                raise OSError(errno.ECANCELED, "it was cancelled")
            try:
                if calls is None:
                    # A definition is replaced whole: with the passwords that libvirt does not show.
                    self._guest.define(again(self._guest.read_definition(secure=True)))
                for call in calls or ():
                    self._guest.call("the definition", call)
            except CommandError as error:
                # libvirt changes it in memory first (9.0), and keeps that if it cannot be written.
                if self._store.fetch() == now:
                    raise
                text = f"libvirt has changed the definition, and cannot keep it: {error.text}"
                hint = "look at libvirtd's log; it is lost when the daemon is restarted"
                raise VcpuPartial(text, libvirt=error.error_class, hint=hint) from error

    def _calls(self, old: Definition, new: Definition) -> list[Callable[[], object]] | None:
        """Of libvirt's; None where it has none that say just this."""
        request, guest = self._store.request, self._guest
        config = guest.flags(config=True)
        if request is not None and request.total is not None and not request.has(VcpuFlag.GUEST):
            flags = config | guest.count_flags(request.maximum, request.hotpluggable)
            return [guest.set_vcpus(request.total, flags)]
        if replace(new, vcpus=old.vcpus, dialect=old.dialect) != old:
            return None
        if request is not None and request.listed is not None:
            return None
        found = []
        for enable in (True, False):
            ids = [
                vcpu.id
                for was, vcpu in zip(old.vcpus, new.vcpus, strict=False)
                if vcpu.enabled is enable and was.enabled is not enable
            ]
            if ids:
                found.append(guest.set_vcpu(ids, enable, config))
        return found or None

    def discard(self) -> None:
        """There is nothing to take away."""


class XmlReader:
    """Reads a running guest's state from libvirt's XML (in the place of `domain.read.Reader`)."""

    def __init__(self, monitor: ApiMonitor, name: str) -> None:
        self._monitor = monitor
        self._name = name
        self.thread_ids: frozenset[int] = frozenset()
        guest = monitor.guest
        #: For what is pending; its threads are libvirt's to place.
        self.process = find_by_uuid(guest.uuid) if guest.connection.is_local else None
        self._store = store_of(self.process)
        self._seen_gone: frozenset[int] = frozenset()

    async def full(self, pending: Iterable[int] = ()) -> DomainState:
        """Its XML."""
        from qmpvcpu.xml.document import read_domain

        asked = tuple(pending)
        guest = self._monitor.guest
        await self._monitor.plugs_done()
        self._monitor.check()
        with _answered():
            xml, run = await asyncio.gather(guest.live_xml(), guest.run_state())
        if xml is None:
            raise self._monitor.stopped()
        definition = read_domain(xml, running=True)[1]
        # libvirt tells the version of no running QEMU: it is at least that of its machine type.
        version = oldest_with(definition.machine or "")
        gone = await self._gone(definition)
        state = running_state(definition, self._name, version, run, gone, asked)
        self._monitor.entities = {entity.first: entity.ids for entity in state.entities}
        self._monitor.unseen = gone
        self._monitor.doubtful = _doubtful(definition, gone)
        return state

    async def _gone(self, definition: Definition) -> frozenset[int]:
        """vCPUs that left QEMU without libvirt's knowledge: on x86 under TCG no event comes."""
        plugged = [vcpu.id for vcpu in definition.vcpus if vcpu.enabled and vcpu.hotpluggable]
        if not plugged or not _may_be_unseen(definition):
            return frozenset()
        # Once libvirt looks at its threads anew, as with every plug, it shows no more that one is gone.
        known = self._store.gone() if self._store is not None else self._seen_gone
        found: frozenset[int] = frozenset()
        try:
            found = await self._monitor.guest.without_threads(plugged)
        except (CommandError, VcpuConnectionError) as error:
            logger.debug("whether a vCPU is gone is not known: %s", error)
            self._monitor.check()
        gone = (found | known).intersection(plugged)
        if self._store is None:
            self._seen_gone = gone
        elif gone != known:
            # Whoever sees one back has struck it out there, also a moment ago.
            self._store.note_gone((self._store.gone() | found).intersection(plugged))
        return gone

    async def fast(
        self,
        state: DomainState,
        pending: Collection[int] = (),
        expected: Collection[int] = (),
        told: bool = False,
        anew: Callable[[], object] = lambda: None,
        declined: Collection[int] = (),
    ) -> DomainState:
        """The same."""
        return await self.full(pending)


class PassedAgent(AgentClient):
    """The guest's agent behind libvirt's `virDomainQemuAgentCommand`; libvirt keeps it in step."""

    def __init__(self, guest: LibvirtGuest) -> None:
        super().__init__(guest.connection.uri)
        self._behind = guest

    async def open(self) -> None:
        """libvirt is connected."""

    async def _all(
        self, commands: Sequence[tuple[str, Mapping[str, Any] | None]], until: float | None = None
    ) -> list[object]:
        replies: list[object] = []
        for command, arguments in commands:
            message = {"execute": command} | ({"arguments": dict(arguments)} if arguments is not None else {})
            try:
                reply = json.loads(await self._behind.agent_command(json.dumps(message), 5))
            except CommandError as error:
                known = (
                    "CommandNotFound"
                    if "not been found" in error.text or "disabled" in error.text
                    else "GenericError"
                )
                replies.append(CommandError(command, known, error.text))
                continue
            except (ValueError, RecursionError) as error:
                raise self._error("malformed", f"answered '{command}' with what is not JSON") from error
            found = reply.get("return") if isinstance(reply, dict) else None
            if command == "guest-file-open" and type(found) is int:
                self._handles.add(found)
            replies.append(found)
        return replies
