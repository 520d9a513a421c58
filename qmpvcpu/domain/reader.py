"""Read a domain's state over a monitor: the facts of the boot once, and the two CPU queries as
often as needed.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Final, Protocol

from qmpvcpu.core.model import DomainState
from qmpvcpu.core.state.inventory import (
    LONGEST_TEXT,
    BootFacts,
    InconsistentReplies,
    build_state,
    parse_cpus_fast,
    parse_hotpluggable_cpus,
    parse_topology,
    parse_version,
    refresh_state,
    short,
)
from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.host.process import Process
from qmpvcpu.ports import CommandError, Monitor

_TRIES: Final = 30
#: Seconds for repeated queries; each single answer may take as long as a command.
_TRY_SECONDS: Final = 10.0
#: Seconds before the second try, doubled for each further try, and the maximum. On a busy host, a
#: CPU that has left its slot is listed until its thread has ended (10.0, KVM).
_TRY_AGAIN: Final = 0.002
_TRY_MOST: Final = 0.1


class StateReader(Protocol):
    """Reads a domain's state, as often as needed."""

    thread_ids: frozenset[int]
    #: The QEMU process, if the state names it and its threads do not.
    process: Process | None

    async def full(self, pending: Iterable[int] = ()) -> DomainState:
        """Read all of the state. `pending` are the ids of entities whose unplug was requested and
        has not finished.
        """

    async def fast(
        self,
        state: DomainState,
        pending: Collection[int] = (),
        expected: Collection[int] = (),
        reports_removals: bool = False,
        before_retry: Callable[[], object] = lambda: None,
        declined: Collection[int] = (),
    ) -> DomainState:
        """Read what has changed since `state`. If `reports_removals`, QEMU has reported every vCPU
        that left. `before_retry` is called before a second query.
        """


class Reader:
    """What one connection knows about its QEMU. Created by `open_reader`."""

    def __init__(self, monitor: Monitor, boot: BootFacts, hotplug: bool) -> None:
        self._monitor = monitor
        self.boot = boot
        #: Linux thread ids of all vCPUs at the last `full`.
        self.thread_ids: frozenset[int] = frozenset()
        self.process: Process | None = None
        self._hotplug = hotplug
        #: The vCPU ids of each entity. They do not change while QEMU runs.
        self._ids: list[tuple[int, ...]] | None = None
        #: The last reply to `query-cpus-fast` alone, and the state made from it.
        self._last: tuple[object, DomainState] | None = None

    async def full(self, pending: Iterable[int] = ()) -> DomainState:
        """Send both queries together.

        Raises:
            InconsistentReplies: another client keeps plugging and unplugging between the two.
            VcpuConnectionError: the replies are impossible, or have other slots than before.
        """
        until = time.monotonic() + _TRY_SECONDS
        for attempt in range(_TRIES):
            try:
                if self._hotplug:
                    slots_reply, cpus_reply = _good(
                        await asyncio.gather(
                            self._monitor.query_hotpluggable_cpus(),
                            self._monitor.query_cpus_fast(),
                            return_exceptions=True,
                        )
                    )
                    slots = parse_hotpluggable_cpus(slots_reply)
                else:
                    slots, cpus_reply = None, await self._monitor.query_cpus_fast()
                cpus = parse_cpus_fast(cpus_reply, props=slots is None)
                self.thread_ids = frozenset(cpu.thread_id for cpu in cpus)
                return self._checked(build_state(self.boot, slots, cpus, pending=pending))
            except InconsistentReplies:
                if attempt == _TRIES - 1 or time.monotonic() >= until:
                    raise
                await asyncio.sleep(min(_TRY_AGAIN * 2**attempt, _TRY_MOST))
            except CommandError as error:
                raise _unexpected(self._monitor, error) from error
        raise AssertionError("unreachable")

    def _checked(self, state: DomainState) -> DomainState:
        """Make sure that every id of the previous state exists in this one."""
        ids = [entity.ids for entity in state.entities]
        if self._ids is not None and ids != self._ids:
            before, now = (
                f"{len(found)} slots of {sum(map(len, found))} vCPUs" for found in (self._ids, ids)
            )
            raise _malformed(
                self._monitor,
                f"QEMU listed {before}, and now lists {now}: a machine's slots never change",
            )
        self._ids = ids
        return state

    async def fast(
        self,
        state: DomainState,
        pending: Collection[int] = (),
        expected: Collection[int] = (),
        reports_removals: bool = False,
        before_retry: Callable[[], object] = lambda: None,
        declined: Collection[int] = (),
    ) -> DomainState:
        """Send `query-cpus-fast` alone, and both queries if that is not enough.

        A CPU that it does not list has left its slot: QEMU empties the slot first (x86, ppc64; 7.2
        to 11.1). So both queries are needed only if no DEVICE_DELETED has reported that too, and
        only once the last entity in `pending` (entity ids) has left, because more may leave between
        the queries. `expected` are the ids of the entities that we plug ourselves. Only for these
        does the device id identify the slot, unless QEMU has `declined` their plug.
        """
        try:
            reply = await self._monitor.query_cpus_fast()
            if self._last is not None and self._last[1] is state and self._last[0] == reply:
                return state
            fresh = refresh_state(
                state, self.boot, parse_cpus_fast(reply, props=False), pending=pending
            )
        except InconsistentReplies:
            before_retry()
            return await self.full(pending)
        except CommandError as error:
            raise _unexpected(self._monitor, error) from error
        came = has_left = leaving = False
        for before, after in zip(state.entities, fresh.entities, strict=True):
            if before is not after:
                came |= after.plugged and (before.id not in expected or before.id in declined)
                has_left |= before.plugged and not after.plugged
            leaving |= after.plugged and after.id in pending
        if came or (has_left and not leaving and not reports_removals):
            with suppress(InconsistentReplies):
                before_retry()
                return await self.full(pending)
        self._last = reply, fresh
        return fresh


async def open_reader(monitor: Monitor, name: str) -> tuple[Reader, DomainState]:
    """Query everything once, all at the same time.

    Raises:
        VcpuConnectionError: QEMU's answer is impossible, or QEMU does not answer.
    """
    version = parse_version(monitor.greeting)
    try:
        target, kvm, machine, topology, slots = _good(
            await asyncio.gather(
                monitor.query_target(),
                monitor.query_kvm(),
                monitor.qom_get("/machine", "type"),
                _topology(monitor),
                _slots(monitor),
                return_exceptions=True,
            )
        )
    except CommandError as error:
        raise _unexpected(monitor, error) from error
    boot = BootFacts(
        name=name,
        arch=_text(
            monitor, "query-target", target.get("arch") if isinstance(target, dict) else None
        ),
        machine=_text(monitor, "qom-get /machine type", machine).removesuffix("-machine"),
        kvm=isinstance(kvm, dict) and kvm.get("enabled") is True,
        version=version,
        topology=parse_topology(topology),
    )
    if slots is not True:
        try:
            await _confirm_no_hotplug(monitor, boot)
        except CommandError as error:
            raise _unexpected(monitor, error) from error
    reader = Reader(monitor, boot, hotplug=slots is True)
    return reader, await reader.full()


async def _slots(monitor: Monitor) -> bool:
    try:
        await monitor.query_hotpluggable_cpus()
    except CommandError:
        return False
    return True


async def _confirm_no_hotplug(monitor: Monitor, boot: BootFacts) -> None:
    """Check `query-machines`, because the text of the error differs from version to version."""
    machines = await monitor.query_machines()
    if not isinstance(machines, list):
        machines = []
    for machine in machines:
        if isinstance(machine, dict) and machine.get("name") == boot.machine:
            if machine.get("hotpluggable-cpus") is True:
                raise _malformed(monitor, "query-hotpluggable-cpus fails on a machine that has it")
            return


async def _topology(monitor: Monitor) -> object:
    try:
        return await monitor.qom_get("/machine", "smp")
    except CommandError:
        return None  # QEMU before 6.2


async def run_state(monitor: Monitor) -> str | None:
    """Return the status of `query-status`: "running", "paused", "prelaunch" …; None if QEMU does
    not report it.
    """
    try:
        status = await monitor.query_status()
    except CommandError:
        return None
    found = status.get("status") if isinstance(status, dict) else None
    return found[:_LONGEST_STATE] if isinstance(found, str) else None


_LONGEST_STATE: Final = 40


async def has_x2apic(monitor: Monitor, state: DomainState) -> bool | None:
    """Return whether the guest's CPU model has x2apic, read from a plugged CPU."""
    path = next((vcpu.qom_path for vcpu in state.vcpus if vcpu.qom_path is not None), None)
    if path is None:
        return None
    try:
        return await monitor.qom_get(path, "x2apic") is True
    except CommandError:
        return None


async def has_smm_firmware(monitor: Monitor) -> bool:
    """Return whether the firmware's flash is writable only in SMM, as with OVMF with SMM (7.2 to
    11.1).
    """
    try:
        return await monitor.qom_get("/machine/system.flash0", "secure") is True
    except CommandError:
        return False


async def is_hotplug_legacy(monitor: Monitor) -> bool:
    """Return whether the CPU hotplug block is in legacy mode; False if QEMU lacks the property
    (11.1).
    """
    try:
        return await monitor.qom_get("/machine/acpi-device", "cpu-hotplug-legacy") is True
    except CommandError:
        return False


async def lacks_acpi(monitor: Monitor) -> bool:
    """Return whether the machine was started without ACPI."""
    try:
        return await monitor.qom_get("/machine", "acpi") == "off"
    except CommandError:
        return False


_MSR = re.compile(r"\bMSR ([0-9a-fA-F]{8,16})\b")


async def firmware_runs(monitor: Monitor) -> bool | None:
    """Return whether a ppc64 guest still executes its firmware; None if QEMU does not report it.

    QMP cannot report this. SLOF runs in real mode (MSR[IR] off, seen with 7.2: at the top of the
    first 512 MiB). A kernel runs with translation on, except for moments. A guest that was never
    started executes nothing.
    """
    if await run_state(monitor) == "prelaunch":
        return False
    for _ in range(_FIRMWARE_SAMPLES):
        try:
            text = await monitor.human_monitor_command("info registers -a")
        except CommandError:
            return None
        registers = _MSR.findall(text) if isinstance(text, str) else []
        if not registers:
            return None
        # A CPU that the kernel took offline stays in real mode (RTAS stop-self), so one translating
        # CPU is enough.
        if any(int(msr, 16) & _MSR_IR for msr in registers):
            return False
        await asyncio.sleep(_FIRMWARE_PAUSE)
    return True


_MSR_IR: Final = 0x20
_FIRMWARE_SAMPLES: Final = 5
_FIRMWARE_PAUSE: Final = 0.01


def _good(replies: tuple[object, ...]) -> tuple[object, ...]:
    """Return the results of `gather(…, return_exceptions=True)`, or raise the first error among
    them.
    """
    for reply in replies:
        if isinstance(reply, BaseException):
            raise reply
    return replies


async def answers_of(queries: Mapping[str, Awaitable[object]]) -> dict[str, object]:
    """Return the replies; None for each query that this QEMU declines."""
    answers = await asyncio.gather(*queries.values(), return_exceptions=True)
    found: dict[str, object] = {}
    for name, answer in zip(queries, answers, strict=True):
        if isinstance(answer, VcpuConnectionError) or (
            isinstance(answer, BaseException) and not isinstance(answer, Exception)
        ):
            raise answer
        found[name] = None if isinstance(answer, Exception) else answer
    return found


def _text(monitor: Monitor, command: str, value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_TEXT:
        raise _malformed(monitor, f"{command} answers {short(value)}")
    return value


def _malformed(monitor: Monitor, what: str) -> VcpuConnectionError:
    return VcpuConnectionError(
        f"'{monitor.address}': {what}",
        address=monitor.address,
        reason="malformed",
        hint="check that this is QEMU's QMP socket; --qmp-log FILE keeps what it sends",
    )


def _unexpected(monitor: Monitor, error: CommandError) -> VcpuConnectionError:
    return VcpuConnectionError(
        f"QEMU at '{monitor.address}' cannot answer {error}",
        address=monitor.address,
        reason="malformed",
        hint="use QEMU 6.2 or later, past its -preconfig stage (x-exit-preconfig)",
    )
