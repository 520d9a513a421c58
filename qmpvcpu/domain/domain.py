"""`Domain`: one QEMU guest, and the RFC's one call on it.

Source: the RFC on libvirt's list, `int virDomainVcpu(virDomainPtr domain, unsigned int id, unsigned int flags)`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TypedDict, Unpack

from qmpvcpu.core import checks
from qmpvcpu.core.guest import GuestView
from qmpvcpu.core.model import DomainState, Event, Outcome, Vcpu
from qmpvcpu.core.outcome import queried, switched_ids
from qmpvcpu.core.plan import Plan
from qmpvcpu.core.request import Request
from qmpvcpu.core.select import select
from qmpvcpu.domain.change import change, plan_on
from qmpvcpu.domain.guest import Guest, with_online
from qmpvcpu.domain.link import Link, Opener, open_link
from qmpvcpu.domain.listen import Events, Hub
from qmpvcpu.errors import Refusal, VcpuConnectionError, VcpuError, VcpuRefused, VcpuUsageError
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.ports import Agent, Monitor

__all__ = ["Domain", "Options", "connect"]

#: What needs more than a QMP connection.
_ELSEWHERE = int(VcpuFlag.CONFIG | VcpuFlag.GUEST)


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
    #: Seconds for what the guest must do; 0 does not wait. Default 30.
    timeout: float
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


def connect(
    domain: str | None = None,
    *,
    qmp: str | Sequence[str] | None = None,
    agent: str | None = None,
    qmp_log: Any = None,
    connect_timeout: float = 5.0,
    command_timeout: float = 10.0,
) -> Domain:
    """The guest at a QMP address, as a single-use async context manager.

    Args:
        domain: a QMP address, and the name it is reported under.
        qmp: QMP addresses instead: unix path, `host:port` or `fd:N`; of several the first that is free.
        agent: address of the guest agent's socket; it is opened when it is first needed.
        qmp_log: a `qmpvcpu.QmpLog` that keeps every message.
        connect_timeout: seconds for connection and greeting, per address.
        command_timeout: seconds for one QMP command.

    Raises (on entry):
        VcpuConnectionError: no address could be reached, or what answers is not QMP.
        VcpuUsageError: no address given.
    """
    addresses = [qmp] if isinstance(qmp, str) else list(qmp or ())
    if not addresses and domain is not None:
        addresses = [domain]
    if not addresses:
        raise VcpuUsageError("no domain given", hint="connect('/path/to/qmp.sock') or connect(qmp=…)")

    async def open_one(address: str) -> Monitor:
        # Loaded here: `qemu.qmp` is most of what importing qmpvcpu would cost.
        from qmpvcpu.qemu.monitor import connect_monitor

        return await connect_monitor(
            address, log=qmp_log, connect_timeout=connect_timeout, command_timeout=command_timeout
        )

    def agent_of() -> Agent:
        from qmpvcpu.qemu.agent import AgentClient

        assert agent is not None
        return AgentClient(agent)

    return Domain(domain or addresses[0], addresses, open_one, agent_of if agent is not None else None)


class Domain:
    """One guest. Enter it once (`async with`), call it from one event loop; operations queue.

    State is held between calls and kept fresh by events; a claim that something is already so is always made from
    a fresh query.
    """

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        opener: Opener,
        agent: Callable[[], Agent] | None = None,
    ) -> None:
        self.name = name
        self._addresses = tuple(addresses)
        self._open = opener
        self._agent = agent
        self._guest: Guest | None = None
        self._entered = False
        self._link: Link | None = None
        self._last: Link | None = None
        self._hub = Hub()
        self._queue = asyncio.Lock()

    def __repr__(self) -> str:
        state = "closed" if self._link is None else "connected"
        return f"<Domain {self.name!r} {state}>"

    async def __aenter__(self) -> Domain:
        if self._entered:
            raise VcpuUsageError("a Domain is entered once", hint="call connect() again")
        self._entered = True
        await self._connect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hub.end(None)
        await self._close()

    async def reconnect(self) -> None:
        """Connect again after a lost connection, and read the state anew.

        Raises:
            VcpuConnectionError: as on entry.
        """
        async with self._queue:
            await self._close()
            await self._connect()

    # -- the call, and its exploded forms ---------------------------------------------------------

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

    async def request(self, request: Request) -> Outcome:
        """Carry out a `Request` made elsewhere; errors are those of `vcpu`."""
        if request.is_query:
            return await self._query(request)
        async with self._queue:
            here = self._not_here(request.flags)
            return await change(self._connected(), request, here, self._guest)

    async def enable(self, ids: int | Iterable[int], **options: Unpack[Options]) -> Outcome:
        """Plug these vCPUs, all or none. Arguments and errors are those of `vcpu`."""
        return await self.request(_request(ids, VcpuFlag.ENABLE, options))

    async def disable(self, ids: int | Iterable[int], **options: Unpack[Options]) -> Outcome:
        """Unplug these vCPUs and wait for the guest's real answer. Arguments and errors are those of `vcpu`."""
        return await self.request(_request(ids, VcpuFlag.DISABLE, options))

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
        return await self.request(_total(count, maximum, options))

    async def guest_vcpus(self) -> GuestView:
        """The guest's own CPUs, and which vCPU each one is.

        Raises:
            VcpuRefused: no agent of this domain is known, or it is not allowed to tell.
            VcpuConnectionError: no agent answers, or what it says cannot be.
        """
        async with self._queue:
            self._check_here(VcpuFlag.GUEST, ())
            link = self._connected()
            assert self._guest is not None
            return await self._guest.view(await link.read())

    async def set_guest_vcpus(self, logical_ids: int | Iterable[int], online: bool) -> Outcome:
        """Take CPUs of the guest online or offline, all or none, by the guest's own ids."""
        began = time.monotonic()
        ids = _ids(logical_ids)
        async with self._queue:
            self._check_here(VcpuFlag.GUEST, ids)
            link = self._connected()
            assert self._guest is not None
            view = await self._guest.view(await link.read())
            own = GuestView(view.cpus, {cpu.logical_id: cpu for cpu in view.cpus})
            refusals = checks.check_guest_ids(ids, own, online=online)
            if refusals:
                raise VcpuRefused(refusals, ids=ids)
            run = await self._guest.switch(own, ids, online)
            end = switched_ids(ids, run, time.monotonic() - began)
        if isinstance(end, VcpuError):
            raise end
        return end

    async def vcpus(self, ids: Iterable[int] | None = None) -> tuple[Vcpu, ...]:
        """These vCPUs, or every one, by a fresh query."""
        if ids is None:
            return (await self.state()).vcpus
        return (await self.request(_request(ids, VcpuFlag.CURRENT, {}))).rows

    async def state(self, flags: VcpuFlag = VcpuFlag.CURRENT) -> DomainState:
        """Everything known of the domain, by a fresh query; `flags` may name the impact.

        Raises:
            VcpuRefused: there is no such side of this domain.
        """
        async with self._queue:
            self._check_here(flags, (), checks.check_flags(flags))
            return await self._lit(await self._connected().read(), required=bool(flags & VcpuFlag.GUEST))

    @property
    def agent_trouble(self) -> VcpuConnectionError | None:
        """Why the agent's view is missing from the last state; None where it is there, or no agent is known."""
        return self._guest.trouble if self._guest is not None else None

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
        return Events(self._hub, lambda: self._connected().check(), steps=steps, limit=limit)

    @property
    def last_state(self) -> DomainState:
        """The state of the last query, without asking again.

        Raises:
            VcpuConnectionError: it was never connected.
        """
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
    def settled(self) -> tuple[Event, ...]:
        """What had ended while nobody listened, as found when this connection was made."""
        return self._link.settled if self._link is not None else ()

    # -- plans: what would be done, and every reason why not; nothing is touched --------------------

    async def plan(self, request: Request) -> Plan:
        """What `request` would do, and every reason why not; touches nothing."""
        async with self._queue:
            link = self._connected()
            plan, _ = await plan_on(link, await link.read(), request, self._guest)
            return plan.refused(self._not_here(request.flags))

    async def plan_vcpu(
        self, vcpu_id: int, flags: VcpuFlag, *, count: int | None = None, **options: Unpack[Options]
    ) -> Plan:
        """What `vcpu` would do."""
        return await self.plan(_request(vcpu_id, VcpuFlag(flags), options, count=count))

    async def plan_enable(self, ids: int | Iterable[int], **options: Unpack[Options]) -> Plan:
        """What `enable` would do."""
        return await self.plan(_request(ids, VcpuFlag.ENABLE, options))

    async def plan_disable(self, ids: int | Iterable[int], **options: Unpack[Options]) -> Plan:
        """What `disable` would do."""
        return await self.plan(_request(ids, VcpuFlag.DISABLE, options))

    async def plan_numa_node(
        self, node: int, flags: VcpuFlag, *, count: int | None = None, **options: Unpack[Options]
    ) -> Plan:
        """What `numa_node` would do."""
        return await self.plan(_request(node, VcpuFlag(flags) | VcpuFlag.NUMA_NODE, options, count=count))

    async def plan_set_vcpus(
        self, count: int, *, maximum: bool = False, hotpluggable: bool = False, **options: Unpack[Options]
    ) -> Plan:
        """What `set_vcpus` would do."""
        return await self.plan(_total(count, maximum, options))

    # -- inside -----------------------------------------------------------------------------------

    async def _connect(self) -> None:
        self._link = await open_link(self.name, self._addresses, self._open, self._hub, self._queue, self._last)
        if self._agent is not None:
            self._guest = Guest(self._agent(), self._link.monitor, self._hub.emit)
            self._link.look_further = self._guest.try_view

    async def _close(self) -> None:
        link, self._link = self._link, None
        guest, self._guest = self._guest, None
        if guest is not None:
            await guest.close()
        if link is not None:
            self._last = link
            await link.close()

    def _connected(self) -> Link:
        if self._link is None:
            raise VcpuConnectionError(
                f"the domain '{self.name}' is not connected",
                address=self._addresses[0],
                reason="closed",
                hint="use it inside `async with connect(…)`, or await reconnect()",
            )
        return self._link

    async def _query(self, request: Request) -> Outcome:
        began = time.monotonic()
        async with self._queue:
            self._check_here(request.flags, request.ids, checks.check_flags(request.flags))
            state = await self._connected().read()
            state = await self._lit(state, required=request.has(VcpuFlag.GUEST))
        ids, refusals = select(state, request)
        if refusals:
            raise VcpuRefused(refusals, ids=ids)
        return queried(state, ids, time.monotonic() - began)

    async def _lit(self, state: DomainState, *, required: bool) -> DomainState:
        """With the guest's own view of each vCPU, where an agent gives it."""
        if self._guest is None:
            return state
        view = await (self._guest.view(state) if required else self._guest.try_view(state))
        return state if view is None else with_online(state, view)

    def _check_here(self, flags: VcpuFlag, ids: Sequence[int], refusals: Sequence[Refusal] = ()) -> None:
        found = [*refusals, *self._not_here(flags)]
        if found:
            raise VcpuRefused(found, ids=ids)

    def _not_here(self, flags: VcpuFlag) -> list[Refusal]:
        """What this connection cannot serve, whatever the state."""
        found: list[Refusal] = []
        if int(flags) & _ELSEWHERE == 0:
            return found
        if flags & VcpuFlag.CONFIG:
            found.append(
                Refusal(
                    "no-definition",
                    "no persistent definition of this domain is known",
                    (),
                    "leave out --config (CONFIG): the running guest alone can be changed",
                    "VIR_ERR_OPERATION_INVALID",
                )
            )
        if flags & VcpuFlag.GUEST and self._agent is None:
            found.append(
                Refusal(
                    "no-agent",
                    "no guest agent of this domain is known",
                    (),
                    "name its socket: --agent ADDR (agent=), or leave out --guest (GUEST)",
                    "VIR_ERR_OPERATION_INVALID",
                )
            )
        return found


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
    try:
        return Request(_ids(ids) if total is None else (), flags, count, total=total, **given)
    except TypeError as error:
        raise TypeError(str(error).replace("Request.__init__()", "this call")) from None


_FLAG_WORDS = (
    ("core", VcpuFlag.CORE),
    ("live", VcpuFlag.LIVE),
    ("config", VcpuFlag.CONFIG),
    ("guest", VcpuFlag.GUEST),
)


def _total(count: int, maximum: bool, options: Options) -> Request:
    if type(count) is not int:
        raise VcpuUsageError(f"{count!r} is no number of vCPUs", hint="give an integer")
    if maximum and not options.get("config"):
        raise VcpuRefused([checks.MAXIMUM_IS_CONFIG])
    return _request((), VcpuFlag.CURRENT, options, total=count)


def _ids(ids: object) -> tuple[int, ...]:
    chosen = tuple(ids) if isinstance(ids, Iterable) and not isinstance(ids, str | bytes) else (ids,)
    if not chosen:
        raise VcpuUsageError("no vCPU id given", hint="name at least one")
    for number in chosen:
        if type(number) is not int:
            raise VcpuUsageError(f"{number!r} is no vCPU id", hint="ids are integers")
    return tuple(sorted(set(chosen)))
