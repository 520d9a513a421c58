"""Give the thread of a new vCPU its cgroup, host CPUs and scheduler: check before the plug, place
after it.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from qmpvcpu.core.definition import Definition
from qmpvcpu.core.engine.report import Report
from qmpvcpu.core.model import DomainState, format_ids
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.placement import (
    Placement,
    ThreadState,
    check_emulator,
    check_placements,
    emulator_placement,
    is_unplaced,
    placements,
)
from qmpvcpu.errors import Refusal, VcpuConnectionError, VcpuFailed, VcpuRefused
from qmpvcpu.host.affinity import QemuThreads
from qmpvcpu.host.cgroup.widen import Widened


class ThreadPlacement:
    """Where vCPUs run, for one change of the running guest. Call `check`, `prepare`, `room` around
    the plug, then `place`.
    """

    def __init__(self, threads: QemuThreads | None, definition: Definition | None) -> None:
        self._threads = threads
        self._definition = definition
        self._has_layout = False
        #: Set by `check`: each vCPU that will be plugged -> its placement.
        self._to_plug: dict[int, Placement] = {}

    @property
    def is_idle(self) -> bool:
        """After `check`: whether no vCPU to plug has a placement."""
        return not self._to_plug

    def check(self, plan: Plan, state: DomainState) -> Plan:
        """Return the plan with the placements of the vCPUs that it plugs, and of enabled ones that
        were never placed, and with every refusal of a placement.
        """
        if not plan.request.place or not (
            plan.plugs or plan.awaited or (plan.unchanged and plan.request.enables)
        ):
            return plan
        self._has_layout = self._threads is not None and self._threads.has_layout()
        wanted = self._wanted(_plugged(plan))
        if state.threads_shared:
            return replace(plan, messages=(*plan.messages, _SHARED)) if wanted else plan
        wanted |= self._left(plan, state)
        if not wanted:
            return plan
        self._to_plug = wanted
        return replace(plan, placed=wanted).refused(
            check_placements(
                wanted, self._threads.facts(wanted.values()) if self._threads is not None else None
            )
        )

    def _left(self, plan: Plan, state: DomainState) -> dict[int, Placement]:
        """Return the placements of vCPUs that are enabled already and were never placed."""
        if self._threads is None or not plan.request.enables:
            return {}
        found = self._wanted(number for number in plan.unchanged if state.vcpus[number].enabled)
        if not found:
            return {}
        main = self._threads.look([self._threads.main_id]).get(self._threads.main_id)
        ids = {
            number: thread
            for number in found
            if (thread := state.vcpus[number].thread_id) is not None
        }
        seen = self._threads.look(list(ids.values())) if ids else {}
        return {
            number: found[number]
            for number, thread in ids.items()
            if main is not None
            and thread in seen
            and (
                is_unplaced(found[number], seen[thread], main)
                or not self._threads.is_in_group(thread, found[number], number)
            )
        }

    def prepare(self, plan: Plan) -> Plan:
        """Make the cgroups of the vCPUs to plug. If a cgroup cannot be made, the plan is
        refused.
        """
        if self._threads is None or self.is_idle:
            return plan
        try:
            self._threads.make_groups(self._to_plug)
        except OSError as error:
            return plan.refused([_no_group(self._to_plug, error)])
        return plan

    @asynccontextmanager
    async def room(self, plan: Plan, trouble: list[str]) -> AsyncIterator[None]:
        """Allow QEMU to allocate on the host nodes of its new vCPUs, while the context lasts. If
        this cannot be undone, the reason is added to `trouble`.

        Raises:
            VcpuRefused: QEMU cannot be allowed to.
        """
        nodes = sorted(
            {node for placement in self._to_plug.values() for node in placement.mems or ()}
        )
        widened = None
        if nodes and self._threads is not None:
            try:
                widened = await _widen(self._threads, nodes)
            except OSError as error:
                raise VcpuRefused([_no_group(self._to_plug, error)], ids=plan.targets) from error
        try:
            yield
        finally:
            try:
                if widened is not None:
                    widened.end()
            except OSError as error:
                trouble.append(
                    f"the emulator's cpuset.mems could not be put back ({_why(error)}): the next"
                    " change tries it"
                )

    def place(self, before: DomainState, now: DomainState, plan: Plan, report: Report) -> None:
        """Place the vCPUs that have come since `before`, and those that were never placed. The
        report lists failures.
        """
        if not plan.request.place or (self.is_idle and not plan.unplugs):
            return
        left = [number for number in plan.unchanged if number in self._to_plug]
        wanted = self._wanted([*_came(before, now, plan), *left])
        if not wanted:
            return
        if now.threads_shared:
            # Only a second vCPU shows that threads are shared.
            if self._threads is not None and self._to_plug:
                self._threads.remove_groups(self._to_plug, now.enabled_ids)
            if _SHARED not in report.messages:
                report.messages.append(_SHARED)
            return
        placed, failed = self._place(wanted, now)
        if not failed:
            report.placed(placed, [number for number in left if number in placed])
        elif self._threads is not None and self._threads.facts(()) is None:
            report.failed(
                VcpuConnectionError(
                    f"QEMU has ended after vCPU {format_ids(wanted)} was plugged",
                    reason="closed",
                    hint="look at its log",
                )
            )
        else:
            report.not_placed(failed)

    def _place(
        self, wanted: Mapping[int, Placement], now: DomainState
    ) -> tuple[dict[int, ThreadState], dict[str, list[int]]]:
        """Return what the threads have afterwards, and why some could not be given their
        placement.
        """
        failed: dict[str, list[int]] = {}
        taken_back = {number: wanted[number] for number in wanted if number not in self._to_plug}
        if taken_back and self._threads is not None:
            try:
                self._threads.make_groups(taken_back)
            except OSError as error:
                failed[f"its cgroup: {_why(error)}"] = list(taken_back)
        placed, declined = _place_threads(self._threads, wanted, now)
        return placed, failed | declined

    def _wanted(self, ids: Iterable[int]) -> dict[int, Placement]:
        """Return the placements of these vCPUs. If every vCPU has a cgroup of its own, those
        without a configured placement are included.
        """
        numbers = list(ids)
        found = dict.fromkeys(numbers, Placement()) if self._has_layout else {}
        return found | placements(self._definition, numbers)


def check_start(threads: QemuThreads, definition: Definition) -> list[Refusal]:
    """Return why a guest that should start here cannot be placed. `threads` are this process's own,
    because QEMU inherits its rights and cgroups.
    """
    wanted = placements(definition, definition.enabled_ids)
    emulator = emulator_placement(definition)
    facts = threads.facts([*wanted.values(), emulator])
    return check_placements(wanted, facts) + check_emulator(emulator, facts)


def place_all(threads: QemuThreads | None, definition: Definition, state: DomainState) -> list[str]:
    """Place every present vCPU and the emulator's threads; return messages.

    Raises:
        VcpuRefused: the threads cannot be placed; none was.
        VcpuFailed: the kernel declined for some threads; the others are placed.
    """
    wanted = placements(definition, state.enabled_ids)
    emulator = emulator_placement(definition)
    messages = []
    if state.threads_shared and wanted:
        wanted, messages = {}, [_SHARED]
    if not wanted and not emulator:
        return messages
    facts = threads.facts([*wanted.values(), emulator]) if threads is not None else None
    refusals = check_placements(wanted, facts) + check_emulator(emulator, facts)
    if refusals or threads is None:
        raise VcpuRefused(refusals)
    own = {vcpu.thread_id for vcpu in state.vcpus if vcpu.thread_id is not None}
    try:
        threads.lay_out(wanted.values(), emulator, own)
        if threads.has_layout():
            wanted = dict.fromkeys(state.enabled_ids, Placement()) | wanted
        threads.make_groups(wanted)
    except OSError as error:
        raise VcpuRefused([_no_group(wanted, error)]) from error
    failed = []
    try:
        for thread in threads.others(own) if emulator.cpus is not None else ():
            threads.place(thread, Placement(emulator.cpus))
    except OSError as error:
        failed.append(f"the emulator could not be given {emulator}: {_why(error)}")
    _, declined = _place_threads(threads, wanted, state)
    failed += [f"vCPU {format_ids(ids)} could not be given {why}" for why, ids in declined.items()]
    if failed:
        raise VcpuFailed("; ".join(failed), hint="correct <cputune>, or the rights of this process")
    return messages


def _place_threads(
    threads: QemuThreads | None, wanted: Mapping[int, Placement], now: DomainState
) -> tuple[dict[int, ThreadState], dict[str, list[int]]]:
    """Return what the threads of these vCPUs have afterwards, and why some could not be given their
    placement.
    """
    placed: dict[int, ThreadState] = {}
    failed: dict[str, list[int]] = {}
    for number, placement in wanted.items():
        thread_id = now.vcpus[number].thread_id
        try:
            if thread_id is None or threads is None:
                raise ProcessLookupError(3, "its thread is not known")
            placed[number] = threads.place(thread_id, placement, number)
        except OSError as error:
            failed.setdefault(f"{placement or 'its cgroup'}: {_why(error)}", []).append(number)
    return placed, failed


async def _widen(threads: QemuThreads, nodes: Sequence[int]) -> Widened | None:
    """Widen the emulator's cpuset.mems; wait for another process that does the same. Raises
    OSError.
    """
    deadline = time.monotonic() + _WIDEN_SECONDS
    while True:
        try:
            return threads.widen(nodes)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(_WIDEN_PAUSE)


def _no_group(ids: Iterable[int], error: OSError) -> Refusal:
    denied = error.errno in (errno.EACCES, errno.EPERM)
    reason = catalogue.CGROUP_DENIED if denied else catalogue.NO_CGROUP
    return reason(sorted(ids), why=_why(error))


def _why(error: OSError) -> str:
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text


def _plugged(plan: Plan) -> list[int]:
    return [number for entity in (*plan.awaited, *plan.plugs) for number in entity.ids]


#: Seconds to wait for another process that plugs at the same time, and between two tries.
_WIDEN_SECONDS: Final = 10.0
_WIDEN_PAUSE: Final = 0.01
#: Reported under single-threaded TCG.
_SHARED = "nothing to place: QEMU runs every vCPU on one thread (-accel tcg,thread=single)"


def _came(before: DomainState, now: DomainState, plan: Plan) -> Iterable[int]:
    """Yield the vCPUs that have a new thread, including those of the plan's unplugs that were
    undone.
    """
    for entity in (*plan.awaited, *plan.plugs, *plan.unplugs):
        for number in entity.ids:
            then, vcpu = before.vcpus[number], now.vcpus[number]
            if vcpu.enabled and not (then.enabled and then.thread_id == vcpu.thread_id):
                yield number
