"""`Domain`: one QEMU guest, and the RFC's one call on it.

Source: the RFC on libvirt's list, `int virDomainVcpu(virDomainPtr domain, unsigned int id, unsigned int flags)`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from qmpvcpu.core import checks
from qmpvcpu.core.events import CPU_EVENTS, SignalKind, interpret
from qmpvcpu.core.model import DomainState, Outcome, Vcpu, format_ids
from qmpvcpu.core.outcome import conclude, queried, unchanged
from qmpvcpu.core.plan import Plan, make_plan, select
from qmpvcpu.core.request import Knowledge, Request
from qmpvcpu.core.transaction import SETTLED, STILL_ASKED, Result, Transaction
from qmpvcpu.domain.drive import Drive
from qmpvcpu.domain.read import Reader, firmware_runs, has_x2apic, open_reader, run_state
from qmpvcpu.errors import (
    OutcomeKind,
    Refusal,
    VcpuConnectionError,
    VcpuError,
    VcpuRefused,
    VcpuUsageError,
)
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.ports import Monitor, MonitorEvent

__all__ = ["Domain", "connect"]

#: What needs more than a QMP connection.
_ELSEWHERE = int(VcpuFlag.CONFIG | VcpuFlag.GUEST)

#: Opens a monitor at one address.
Opener = Callable[[str], Awaitable[Monitor]]


def connect(
    domain: str | None = None,
    *,
    qmp: str | Sequence[str] | None = None,
    qmp_log: Any = None,
    connect_timeout: float = 5.0,
    command_timeout: float = 10.0,
) -> Domain:
    """The guest at a QMP address, as a single-use async context manager.

    Args:
        domain: a QMP address, and the name it is reported under.
        qmp: QMP addresses instead: unix path, `host:port` or `fd:N`; of several the first that is free.
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

    return Domain(domain or addresses[0], addresses, open_one)


class Domain:
    """One guest. Enter it once (`async with`), call it from one event loop; operations queue.

    State is held between calls and kept fresh by events; a claim that something is already so is always made from
    a fresh query.
    """

    def __init__(self, name: str, addresses: Sequence[str], opener: Opener) -> None:
        self.name = name
        self._addresses = tuple(addresses)
        self._open = opener
        self._entered = False
        self._monitor: Monitor | None = None
        self._listening: Any = None
        self._reader: Reader | None = None
        self._state: DomainState | None = None
        self._stale = True
        self._pending: set[int] = set()
        self._removals_seen = 0
        self._queue = asyncio.Lock()

    def __repr__(self) -> str:
        state = "closed" if self._monitor is None else "connected"
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
        await self._close()

    async def reconnect(self) -> None:
        """Connect again after a lost connection, and read the state anew.

        Raises:
            VcpuConnectionError: as on entry.
        """
        async with self._queue:
            before = self._state
            await self._close()
            await self._connect()
            now = self._state
            if before is None or now is None or not _same_machine(before, now):
                # Another QEMU listens there now: what was pending and lost is no business of this one.
                self._pending.clear()
                self._removals_seen = 0
            elif now is not None:
                self._state = before
                self._keep(now)

    # -- the call, and its exploded forms ---------------------------------------------------------

    async def vcpu(
        self,
        vcpu_id: int,
        flags: VcpuFlag = VcpuFlag.CURRENT,
        *,
        count: int | None = None,
        timeout: float = 30.0,
        force: bool = False,
    ) -> Outcome:
        """Query, enable or disable one vCPU by id: the RFC's `virDomainVcpu`.

        Args:
            vcpu_id: a vCPU id; with NUMA_NODE a node.
            flags: neither ENABLE nor DISABLE is a query.
            count: with NUMA_NODE, how many vCPUs (with CORE: cores) of the node.
            timeout: seconds for what the guest must do; 0 does not wait.
            force: do what is known to kill QEMU.

        Raises:
            VcpuRefused, VcpuRejected, VcpuFailed, VcpuPartial, VcpuConnectionError: see `qmpvcpu.errors`.
        """
        return await self.request(Request(_ids(vcpu_id), VcpuFlag(flags), count, force), timeout=timeout)

    async def request(self, request: Request, *, timeout: float = 30.0, wait: bool = True) -> Outcome:
        """Carry out a `Request` made elsewhere; arguments and errors are those of `vcpu` and `disable`."""
        if request.is_query:
            return await self._query(request)
        return await self._change(request, timeout=timeout, wait=wait)

    async def enable(
        self,
        ids: int | Iterable[int],
        *,
        core: bool = False,
        live: bool = False,
        config: bool = False,
        timeout: float = 30.0,
        force: bool = False,
    ) -> Outcome:
        """Plug these vCPUs, all or none. Arguments and errors are those of `vcpu`."""
        request = _request(ids, VcpuFlag.ENABLE, core, live, config, force)
        return await self._change(request, timeout=timeout)

    async def disable(
        self,
        ids: int | Iterable[int],
        *,
        core: bool = False,
        live: bool = False,
        config: bool = False,
        timeout: float = 30.0,
        force: bool = False,
        wait: bool = True,
    ) -> Outcome:
        """Unplug these vCPUs and wait for the guest's real answer.

        `wait=False` returns `requested` once QEMU took the request. Other arguments and errors as of `vcpu`.
        """
        request = _request(ids, VcpuFlag.DISABLE, core, live, config, force)
        return await self._change(request, timeout=timeout, wait=wait)

    async def vcpus(self) -> tuple[Vcpu, ...]:
        """Every vCPU, by a fresh query."""
        return (await self.state()).vcpus

    async def state(self, flags: VcpuFlag = VcpuFlag.CURRENT) -> DomainState:
        """Everything known of the domain, by a fresh query; `flags` may name the impact.

        Raises:
            VcpuRefused: there is no such side of this domain.
        """
        async with self._queue:
            refusals = checks.check_flags(flags) + self._not_here(flags)
            if refusals:
                raise VcpuRefused(refusals)
            return await self._read()

    @property
    def last_state(self) -> DomainState:
        """The state of the last query, without asking again.

        Raises:
            VcpuConnectionError: it was never connected.
        """
        if self._state is None:
            self._connected()
        assert self._state is not None
        return self._state

    @property
    def pending_ids(self) -> tuple[int, ...]:
        """vCPU ids whose unplug was asked here and has not ended, as far as is known."""
        if self._state is None:
            return ()
        entities = self._state.by_id
        return tuple(sorted(n for first in self._pending if first in entities for n in entities[first].ids))

    async def plan(self, request: Request) -> Plan:
        """What `request` would do, and every reason why not; touches nothing."""
        async with self._queue:
            state = await self._read()
            plan, _ = await self._plan(state, request)
            return plan

    async def plan_enable(self, ids: int | Iterable[int], *, core: bool = False, force: bool = False) -> Plan:
        """What `enable` would do."""
        return await self.plan(_request(ids, VcpuFlag.ENABLE, core, False, False, force))

    async def plan_disable(self, ids: int | Iterable[int], *, core: bool = False, force: bool = False) -> Plan:
        """What `disable` would do."""
        return await self.plan(_request(ids, VcpuFlag.DISABLE, core, False, False, force))

    # -- inside -----------------------------------------------------------------------------------

    async def _connect(self) -> None:
        errors: list[VcpuConnectionError] = []
        for address in self._addresses:
            try:
                self._monitor = await self._open(address)
                break
            except VcpuConnectionError as error:
                errors.append(error)
        else:
            raise errors[0] if len(errors) == 1 else _none_free(errors)
        try:
            self._listening = self._monitor.listen(self._sink)
            self._listening.__enter__()
            self._reader, self._state = await open_reader(self._monitor, self.name)
            self._stale = False
        except BaseException:
            await self._close()
            raise

    async def _close(self) -> None:
        monitor, self._monitor = self._monitor, None
        if self._listening is not None:
            self._listening.__exit__(None, None, None)
            self._listening = None
        if monitor is not None:
            await monitor.close()

    def _sink(self, event: MonitorEvent | VcpuConnectionError) -> None:
        if isinstance(event, VcpuConnectionError) or event.name not in CPU_EVENTS:
            return
        self._stale = True
        if not self._pending or self._state is None:
            return
        signal = interpret(event.name, event.data, self._state.entities)
        if signal is None:
            return
        if signal.kind is SignalKind.GUEST_REFUSED and signal.first is not None:
            self._pending.discard(signal.first)
        elif signal.kind is SignalKind.RESET and checks.is_x86(self._state):
            self._pending.clear()

    def _connected(self) -> tuple[Monitor, Reader]:
        if self._monitor is None or self._reader is None:
            raise VcpuConnectionError(
                f"the domain '{self.name}' is not connected",
                address=self._addresses[0],
                reason="closed",
                hint="use it inside `async with connect(…)`, or await reconnect()",
            )
        return self._monitor, self._reader

    async def _read(self) -> DomainState:
        _, reader = self._connected()
        self._stale = False
        try:
            state = await reader.full(self._pending)
        except BaseException:
            self._stale = True
            raise
        self._keep(state)
        return state

    async def _look(self) -> DomainState:
        """The query of a running transaction."""
        _, reader = self._connected()
        assert self._state is not None
        state = await reader.fast(self._state, self._pending)
        self._keep(state)
        return state

    def _keep(self, state: DomainState) -> None:
        before, self._state = self._state, state
        if before is not None and before is not state:
            if state.threads_shared is None:
                # One vCPU alone does not show it; what was seen with two still holds.
                self._state = state = replace(state, threads_shared=before.threads_shared)
            self._removals_seen += sum(
                len(was.ids) * (was.plugged and not now.plugged)
                for was, now in zip(before.entities, state.entities, strict=False)
            )
        entities = state.by_id
        self._pending = {first for first in self._pending if first in entities and entities[first].plugged}

    async def _query(self, request: Request) -> Outcome:
        began = time.monotonic()
        async with self._queue:
            refusals = checks.check_flags(request.flags) + self._not_here(request.flags)
            if refusals:
                raise VcpuRefused(refusals, ids=request.ids)
            state = await self._read()
            ids, refusals = select(state, request)
        if refusals:
            raise VcpuRefused(refusals, ids=ids)
        return queried(state, ids, time.monotonic() - began)

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
        if flags & VcpuFlag.GUEST:
            found.append(
                Refusal(
                    "no-agent",
                    "no guest agent of this domain is known",
                    (),
                    "leave out --guest (GUEST)",
                    "VIR_ERR_OPERATION_INVALID",
                )
            )
        return found

    async def _plan(self, state: DomainState, request: Request) -> tuple[Plan, Knowledge]:
        """Plan, and ask QEMU what only some plans need to know."""
        monitor, _ = self._connected()
        known = Knowledge(removals_seen=self._removals_seen, pending=frozenset(self._pending))
        plan = make_plan(state, request, known)
        moved = [*plan.awaited, *plan.plugs]
        x2apic = firmware = None
        if checks.needs_x2apic(state, moved):
            x2apic = await has_x2apic(monitor, state)
        # An undo unplugs too.
        if checks.needs_firmware_state(state) and (moved or plan.unplugs):
            firmware = await firmware_runs(monitor)
        if x2apic is not None or firmware is not None:
            known = Knowledge(self._removals_seen, x2apic, firmware, frozenset(self._pending))
            plan = make_plan(state, request, known)
        here = tuple(self._not_here(request.flags))
        if here:
            plan = Plan(request, plan.targets, refusals=here + plan.refusals, messages=plan.messages)
        return plan, known

    async def _change(self, request: Request, *, timeout: float, wait: bool = True) -> Outcome:
        _check_timeout(timeout)
        began = time.monotonic()
        async with self._queue:
            held = self._state
            if request.enable and held is not None and not self._stale and not self._pending:
                plan, known = await self._plan(held, request)
                # Only what is certainly to be done may rest on held state; a claim needs a fresh query.
                certain = plan.plugs and not (plan.refusals or plan.unchanged or plan.awaited)
            else:
                certain = False
            if not certain:
                held = await self._read()
                plan, known = await self._plan(held, request)
            if plan.refusals:
                raise VcpuRefused(
                    plan.refusals,
                    ids=plan.targets,
                    messages=plan.messages,
                    seconds=round(time.monotonic() - began, 6),
                )
            assert held is not None
            if not (plan.plugs or plan.unplugs or plan.awaited):
                return unchanged(held, plan, time.monotonic() - began)
            result = await self._carry_out(held, plan, known, timeout, wait)
            assert self._state is not None
            monitor, _ = self._connected()
            stopped = await run_state(monitor) if result.pending else None
            end = conclude(
                self._state,
                plan,
                result,
                time.monotonic() - began,
                stopped=None if stopped in (None, "running") else stopped,
            )
            if certain and end.outcome is OutcomeKind.FAILED:
                # The held state was behind: another client had plugged just what was asked for.
                now, _ = await self._plan(self._state, request)
                if now.unchanged == now.targets and not now.refusals:
                    return unchanged(self._state, now, time.monotonic() - began)
        if isinstance(end, VcpuError):
            raise end
        return end

    async def _carry_out(
        self, state: DomainState, plan: Plan, known: Knowledge, timeout: float, wait: bool
    ) -> Result:
        monitor, _ = self._connected()
        transaction = Transaction(
            plan.plugs,
            plan.unplugs,
            plan.awaited,
            wait=wait,
            reset_drops_unplug=checks.is_x86(state),
        )
        drive = Drive(
            transaction,
            monitor,
            self._look,
            timeout,
            undo_forbidden=lambda fresh: checks.undo_forbidden(fresh, known),
        )
        entities = (*plan.awaited, *plan.plugs, *plan.unplugs)
        try:
            return await drive.run(entities)
        except VcpuConnectionError as error:
            raise _lost_on_the_way(error, plan, transaction) from error
        finally:
            for first, state_now in transaction.states.items():
                if state_now in STILL_ASKED:
                    self._pending.add(first)
                elif state_now in SETTLED:
                    self._pending.discard(first)


def _same_machine(one: DomainState, other: DomainState) -> bool:
    slots = [(entity.ids, entity.props) for entity in one.entities]
    return (one.machine, one.version, slots) == (
        other.machine,
        other.version,
        [(entity.ids, entity.props) for entity in other.entities],
    )


def _check_timeout(timeout: float) -> None:
    if not 0 <= timeout <= 86400 * 365:
        raise VcpuUsageError(f"a timeout of {timeout} s makes no sense", hint="give seconds, 0 or more")


def _lost_on_the_way(error: VcpuConnectionError, plan: Plan, transaction: Transaction) -> VcpuConnectionError:
    """The same error, with what was under way."""
    states: dict[str, list[int]] = {}
    for entity in (*plan.awaited, *plan.plugs, *plan.unplugs):
        states.setdefault(transaction.states[entity.first].value, []).extend(entity.ids)
    way = "; ".join(f"vCPU {format_ids(ids)}: {what}" for what, ids in states.items())
    result = transaction.result()
    return VcpuConnectionError(
        f"{error.message}. When it was lost: {way}",
        address=error.address,
        reason=error.reason,
        hint=error.hint,
        libvirt=error.libvirt,
        ids=plan.targets,
        changed_ids=sorted({*result.plugged, *result.removed}),
        pending=transaction.still_asked,
        undone=result.undone,
        messages=plan.messages,
        mechanism="hotplug",
    )


def _none_free(errors: Sequence[VcpuConnectionError]) -> VcpuConnectionError:
    return VcpuConnectionError(
        "no QMP address answers: " + "; ".join(error.message for error in errors),
        address=errors[0].address,
        reason=errors[0].reason,
        hint=errors[0].hint,
        libvirt=errors[0].libvirt,
    )


def _request(
    ids: int | Iterable[int], flag: VcpuFlag, core: bool, live: bool, config: bool, force: bool
) -> Request:
    flags = flag
    for wanted, name in ((core, VcpuFlag.CORE), (live, VcpuFlag.LIVE), (config, VcpuFlag.CONFIG)):
        if wanted:
            flags |= name
    return Request(_ids(ids), flags, force=force)


def _ids(ids: object) -> tuple[int, ...]:
    chosen = tuple(ids) if isinstance(ids, Iterable) and not isinstance(ids, str | bytes) else (ids,)
    if not chosen:
        raise VcpuUsageError("no vCPU id given", hint="name at least one")
    for number in chosen:
        if type(number) is not int:
            raise VcpuUsageError(f"{number!r} is no vCPU id", hint="ids are integers")
    return tuple(sorted(set(chosen)))
