"""A libvirt domain (`-c URI`), reached through libvirt's API or through its QEMU monitor.

With the API, libvirt stays the owner of the state: the state is read from its XML, and one libvirt
call switches
one entity. Our engine does the rest as it does over QMP: several entities at once, whole cores,
nodes, undo, and the wait for the end of an unplug. The API then takes the place of a monitor.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from qmpvcpu import aio
from qmpvcpu.core.model import DomainState, Outcome, format_ids
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.request import check_count, check_flags, check_range
from qmpvcpu.core.rules.selection import guest_total
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.backends.backend import Backend
from qmpvcpu.domain.backends.libvirt_answers import answered, as_refused
from qmpvcpu.domain.backends.libvirt_definition import DefinitionXml, LibvirtDefinition
from qmpvcpu.domain.backends.libvirt_reader import XmlReader
from qmpvcpu.domain.dump import dump
from qmpvcpu.domain.event_bus import EventBus
from qmpvcpu.domain.reached import Reached
from qmpvcpu.domain.reader import open_reader
from qmpvcpu.domain.session import Session, open_session
from qmpvcpu.errors import OutcomeKind, Refusal, VcpuFailed, VcpuRefused
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.libvirt.calls import QUERY_SECONDS, Connection, LibvirtGuest, Row, open_connection
from qmpvcpu.libvirt.monitor import ApiAgent, ApiMonitor
from qmpvcpu.libvirt.passthrough import PassedMonitor
from qmpvcpu.ports import CommandError, Monitor
from qmpvcpu.qemu.agent import AgentClient

#: How to reach a libvirt domain: through libvirt's API, or with our own engine through its QEMU
#: monitor.
Via = Literal["api", "monitor"]

#: Reported for every connection through the monitor.
TAINTED: Final = (
    "through its monitor: libvirt marks the domain tainted (custom-monitor), and its XML does not"
    " follow what is"
    " plugged and unplugged"
)
_UNSEEN: Final = (
    "vCPU {} was unplugged, and libvirt's XML still has it: under TCG libvirt does not notice it"
)
_DOUBTFUL: Final = (
    "one of vCPU {} may have been unplugged: libvirt gives them the same order, and does not notice"
    " the end of an unplug under TCG; --via monitor asks QEMU"
)
_AGENT_CHANNEL: Final = b"org.qemu.guest_agent.0"
#: Reported for `--no-place` with the API.
_LIBVIRT_PLACES: Final = "--no-place (place=False) has no effect: libvirt always places threads"
#: Reported for a count in the guest.
_BY_NUMBER: Final = "these are the guest's own CPU numbers: which vCPU each one is, is not known"


class LibvirtBackend(Backend):
    """The way through libvirt.

    Args:
        name: the domain's name or UUID.
        uri: the libvirt URI.
        via: "api" or "monitor".
        log: a `qmpvcpu.QmpLog`; with "monitor" it records every message.
        connect_timeout: seconds; the default is 5, or 30 for another host.
        query_timeout: seconds for a libvirt call that changes nothing.
    """

    def __init__(
        self,
        name: str,
        uri: str,
        via: Via = "api",
        log: Any = None,
        connect_timeout: float | None = None,
        query_timeout: float = QUERY_SECONDS,
    ) -> None:
        self._name = name
        self._uri = uri
        self._via: Via = via
        self._log = log
        self._timeouts = connect_timeout, query_timeout
        self._open: _Open | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Backend`."""
        monitor = self._open.monitor if self._open is not None else None
        if monitor is None:
            return ()
        if not isinstance(monitor, ApiMonitor):
            return (TAINTED,)
        rows = ((monitor.unseen, _UNSEEN), (monitor.doubtful, _DOUBTFUL))
        return tuple(text.format(format_ids(ids)) for ids, text in rows if ids)

    def unreached(self) -> Reached:
        """Return what is known of the domain before it is reached."""
        return Reached(self._name, addresses=(self._uri,))

    # -- connecting --------------------------------------------------------------------------------

    async def reach(self, bus: EventBus, queue: asyncio.Lock, last: Session | None) -> Reached:
        """See `Backend`."""
        connection = Connection(self._uri, *self._timeouts)
        try:
            with answered():
                await connection.open()
                self._open = _Open(connection, await connection.guest(self._name))
                return await self._reach(self._open, bus, queue, last)
        except BaseException:
            self._open = None
            await aio.finish(connection.close())
            raise

    async def _reach(
        self, opened: _Open, bus: EventBus, queue: asyncio.Lock, last: Session | None
    ) -> Reached:
        live, inactive = await opened.guest.sides()
        reached = replace(
            self.unreached(), definition=opened.definition(inactive), is_inactive=live is None
        )
        if live is None:
            return reached

        async def monitor_of(address: str) -> Monitor:
            opened.monitor = await self._monitor(opened)
            return opened.monitor

        session = await open_session(
            self._name,
            reached.addresses,
            monitor_of,
            bus,
            queue,
            last,
            _read_xml if self._via == "api" else open_reader,
        )
        if _AGENT_CHANNEL in live:
            session.guest = Guest(
                ApiAgent(opened.guest) if self._via == "api" else PassedAgent(opened.guest),
                session.monitor,
                bus.emit,
            )
        return replace(reached, session=session, guest=session.guest)

    async def _monitor(self, opened: _Open) -> Monitor:
        loop = asyncio.get_running_loop()
        if self._via == "monitor":
            passed = PassedMonitor(opened.guest, self._log)
            await opened.connection.query("virDomainQemuMonitorCommand", lambda: passed.start(loop))
            return passed
        monitor = ApiMonitor(opened.guest)
        await opened.connection.query(
            "virConnectDomainEventRegisterAny", lambda: monitor.start(loop)
        )
        return monitor

    async def refresh(self, reached: Reached) -> Reached | None:
        """See `Backend`. Read from libvirt whether the domain runs, and its definition."""
        opened = self._open
        if opened is None:
            reached.connected()
            return reached
        opened.connection.check()
        if reached.session is not None:
            reached.session.check()
        with answered():
            is_active, data = await opened.guest.now()
        if is_active and reached.session is None:
            return None
        return replace(reached, definition=opened.definition(data))

    def closed(self, reached: Reached) -> Reached:
        """See `Backend`."""
        return self.unreached()

    async def close(self) -> None:
        """See `Backend`."""
        opened, self._open = self._open, None
        if opened is not None:
            await opened.connection.close()

    # -- calls -------------------------------------------------------------------------------------

    async def change(self, reached: Reached, request: Request) -> Outcome:
        """See `Backend`."""
        if self._counts_only(reached):
            return await self._count(reached, request)
        try:
            end = await reached.change(request)
        except VcpuFailed as error:
            raise as_refused(error) from error
        except VcpuRefused as refused:
            if not self._is_counted_there(request, refused.refusals):
                raise
            end = await self._count_there(reached, request)
        more = [*self.notes]
        if self._via == "api" and request.enables_more and not request.place:
            more.append(_LIBVIRT_PLACES)
        return replace(end, messages=(*end.messages, *more)) if more else end

    async def plan(self, reached: Reached, request: Request) -> Plan:
        """See `Backend`."""
        if self._counts_only(reached) and not request.is_query:
            refusals = self._against_count(reached, request)
            says = (f"virDomainSetVcpusFlags {request.total}",) if request.total is not None else ()
            return Plan(
                request, () if says else request.ids, refusals=tuple(refusals), messages=says
            )
        plan = await reached.plan(request)
        if self._is_counted_there(request, plan.refusals):
            ids, online, refusals = guest_total(await reached.guest_view(), request.total or 0)
            what = f"take the guest's CPU {format_ids(ids)} {'online' if online else 'offline'}"
            return Plan(
                request, (), refusals=tuple(refusals), messages=(what, _BY_NUMBER) if ids else ()
            )
        return plan

    def _is_counted_there(self, request: Request, refusals: Iterable[Refusal]) -> bool:
        """Whether to count by the guest's own CPU numbers. A count does not need to know which CPU
        is which vCPU.
        """
        is_count = request.total is not None and request.has(VcpuFlag.GUEST)
        return (
            self._via == "api"
            and is_count
            and {refusal.code for refusal in refusals} == {"guest-cpu"}
        )

    async def _count_there(self, reached: Reached, request: Request) -> Outcome:
        assert request.total is not None
        ids, online, refusals = guest_total(await reached.guest_view(), request.total)
        if refusals:
            raise VcpuRefused(refusals)
        if not ids:
            return Outcome(OutcomeKind.APPLIED, ())
        end = await reached.switch_guest(ids, online)
        return replace(end, messages=(*end.messages, _BY_NUMBER))

    async def dump_xml(
        self, reached: Reached, flags: VcpuFlag, dialect: str | None, detail: str | None
    ) -> bytes:
        """See `Backend`. For a running domain this is libvirt's XML with only the vCPUs
        replaced.
        """
        if flags & VcpuFlag.CONFIG or reached.session is None or self._open is None:
            return await super().dump_xml(reached, flags, dialect, detail)
        state = await reached.session.read()
        with answered():
            live = await self._open.guest.live_xml()
        return dump(live or b"", state, dialect, detail, running=True)

    def _counts_only(self, reached: Reached) -> bool:
        """Whether the libvirt driver can only set a number of vCPUs (test:///)."""
        return (
            self._open is not None
            and self._open.connection.driver == "TEST"
            and reached.session is not None
        )

    def _against_count(self, reached: Reached, request: Request) -> list[Refusal]:
        """Return the reasons against `_count` that are known in advance."""
        if request.total is None:
            return [catalogue.COUNTS_ONLY()]
        found = [
            *reached.preconditions(request),
            *check_flags(request.flags, is_query=request.is_query),
        ]
        live, _ = reached.sides(request.flags)
        most = (
            reached.session.state.maxcpus if live and reached.session is not None else request.total
        )
        return found + check_count(request.total, most)

    async def _count(self, reached: Reached, request: Request) -> Outcome:
        """Carry out a count with `virDomainSetVcpusFlags`."""
        began = time.monotonic()
        if refusals := self._against_count(reached, request):
            raise VcpuRefused(refusals, ids=request.ids)
        assert self._open is not None and request.total is not None
        guest, connection = self._open.guest, self._open.connection
        live, config = reached.sides(request.flags)
        before = [await reached.state(flag) for flag in _impacts(live, config)]
        flags = guest.flags(live=live, config=config) | guest.count_flags(
            request.maximum, request.hotpluggable
        )
        with answered():
            await connection.change("virDomainSetVcpusFlags", guest.set_vcpus(request.total, flags))
        reached = await self.refresh(reached) or reached
        after = [await reached.state(flag) for flag in _impacts(live, config)]
        sides = [
            tuple(sorted(set(a.enabled_ids) ^ set(b.enabled_ids)))
            for a, b in zip(before, after, strict=True)
        ]
        changed = tuple(sorted({number for side in sides for number in side}))
        return Outcome(
            OutcomeKind.APPLIED,
            changed,
            tuple(vcpu for vcpu in after[0].vcpus if vcpu.id in changed),
            changed_ids=changed,
            mechanism="hotplug" if live and sides[0] else None,
            seconds=time.monotonic() - began,
            live_changed_ids=sides[0] if live else (),
            config_changed_ids=sides[-1] if config else (),
            defined=config and before[-1] != after[-1],
        )

    async def pin(
        self, reached: Reached, request: Request, cpus: tuple[int, ...] | None
    ) -> Outcome:
        """See `Backend`. With the API this calls `virDomainPinVcpuFlags`."""
        if self._via != "api":
            return await super().pin(reached, request, cpus)
        began = time.monotonic()
        (vcpu_id,) = ids = request.ids
        live, config = reached.sides(request.flags)
        states = await self._states_to_pin(reached, request)
        assert self._open is not None
        guest, connection = self._open.guest, self._open.connection
        everywhere = format_ids(range(await guest.host_cpus()))
        pin = everywhere if cpus is None else format_ids(cpus)
        # libvirt writes all host CPUs if no CPU is named.
        differ = [(state.vcpus[vcpu_id].pin or everywhere) != pin for state in states]
        if any(differ):
            # A driver that has only a running side (test:///) declines the flag.
            impact = (
                guest.flags(live=live, config=config) if request.flags != VcpuFlag.CURRENT else 0
            )
            with answered():
                await connection.change(
                    "virDomainPinVcpuFlags", guest.pin_vcpu(vcpu_id, cpus, impact)
                )
        if live:
            now = await reached.connected().read()
        else:
            now = await (await self.refresh(reached) or reached).state(VcpuFlag.CONFIG)
        return Outcome(
            OutcomeKind.APPLIED,
            ids,
            (now.vcpus[vcpu_id],),
            changed_ids=ids if any(differ) else (),
            seconds=time.monotonic() - began,
            live_changed_ids=ids if live and differ[0] else (),
            config_changed_ids=ids if config and differ[-1] else (),
            defined=config and differ[-1],
        )

    async def _states_to_pin(self, reached: Reached, request: Request) -> list[DomainState]:
        """Return the state of each side. Raises VcpuRefused if one side has an objection."""
        live, config = reached.sides(request.flags)
        refusals = reached.preconditions(request)
        if (config and reached.definition is None) or (live and reached.session is None):
            raise VcpuRefused(refusals, ids=request.ids)
        states = [await reached.state(flag) for flag in _impacts(live, config)]
        for state in states:
            refusals += [one for one in check_range(state, request.ids) if one not in refusals]
        if not refusals and live and not states[0].vcpus[request.ids[0]].enabled:
            refusals.append(catalogue.NO_THREAD(request.ids))
        if refusals:
            raise VcpuRefused(refusals, ids=request.ids)
        return states


class _Open:
    """An open libvirt connection: the domain, its monitor, and the definition that was read
    last.
    """

    def __init__(self, connection: Connection, guest: LibvirtGuest) -> None:
        self.connection = connection
        self.guest = guest
        self.monitor: Monitor | None = None
        self._definition: LibvirtDefinition | None = None
        self._xml: DefinitionXml | None = None

    def definition(self, data: bytes | None) -> LibvirtDefinition | None:
        """Return the definition of this XML, or None if the domain has none."""
        if data is None:
            self._xml = self._definition = None
        elif self._xml is not None:
            self._xml.data = data
        else:
            self._xml = DefinitionXml(self.guest, data)
            self._definition = LibvirtDefinition(self._xml)
        return self._definition


async def _read_xml(monitor: Monitor, name: str) -> tuple[XmlReader, DomainState]:
    assert isinstance(monitor, ApiMonitor)
    reader = XmlReader(monitor, name)
    return reader, await reader.full()


def _impacts(live: bool, config: bool) -> list[VcpuFlag]:
    return [flag for flag, on in ((VcpuFlag.LIVE, live), (VcpuFlag.CONFIG, config)) if on]


async def list_libvirt(uri: str) -> Sequence[Row]:
    """List every domain at a URI.

    Raises:
        VcpuConnectionError: libvirt cannot be reached.
    """
    async with open_connection(uri) as connection:
        with answered():
            return await connection.list()


class PassedAgent(AgentClient):
    """The guest agent behind libvirt's `virDomainQemuAgentCommand`; libvirt keeps its messages in
    step.
    """

    def __init__(self, guest: LibvirtGuest) -> None:
        super().__init__(guest.connection.uri)
        self._behind = guest

    async def open(self) -> None:
        """Do nothing: libvirt is already connected."""

    async def _all(
        self, commands: Sequence[tuple[str, Mapping[str, Any] | None]], until: float | None = None
    ) -> list[object]:
        replies: list[object] = []
        for command, arguments in commands:
            message = {"execute": command} | (
                {"arguments": dict(arguments)} if arguments is not None else {}
            )
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
                raise self._error(
                    "malformed", f"answered '{command}' with what is not JSON"
                ) from error
            found = reply.get("return") if isinstance(reply, dict) else None
            if command == "guest-file-open" and type(found) is int:
                self._handles.add(found)
            replies.append(found)
        return replies
