"""Where the threads of vCPUs belong by a domain's XML, on a host that the test plays.

A wish is what one thread is to be given, as `place` has it in a plan:
`{"cpus": "0-1", "scheduler": "fifo:10"}`; empty `cpus` are all that it may have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qmpvcpu import DomainState, Outcome, OutcomeKind, Plan, Refusal, Request, VcpuError
from qmpvcpu.core.engine.messages import Result
from qmpvcpu.core.engine.report import Report
from qmpvcpu.core.planning.live import make_plan
from qmpvcpu.core.rules.placement import (
    HostFacts,
    Placement,
    ThreadState,
    check_placements,
    placements,
    with_threads,
)
from qmpvcpu.domain.placement import ThreadPlacement, place_all
from qmpvcpu.xml.document import read_domain

Wish = dict[str, Any]


@dataclass
class Host:
    """QEMU's threads on one host.

    `online` are host CPUs, `is_owner` is whether we may move QEMU's threads, `realtime` the highest
    priority they may get. `declines` are thread ids that the kernel does not place;
    `has_groups_for_all`: every vCPU has its own cgroup; `no_group` is raised where one is to be
    made. `threads` are those that were not placed here: ids -> CPUs and scheduler.

    In the end `placed` has the wish of each thread by id, `groups` those of vCPUs for which cgroups
    were made, and `removed` the vCPUs whose cgroups were removed.
    """

    online: Collection[int] = range(4)
    is_owner: bool = True
    realtime: int = 99
    declines: Collection[int] = ()
    has_groups_for_all: bool = False
    no_group: OSError | None = None
    threads: Mapping[int, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    placed: dict[int, Wish] = field(default_factory=dict)
    groups: dict[int, Wish] = field(default_factory=dict)
    removed: set[int] = field(default_factory=set)
    #: Threads of QEMU's that are no vCPU's.
    emulator: tuple[int, ...] = (7,)
    main_id: int = 99
    _now: dict[int, ThreadState] = field(default_factory=dict)

    def facts(self, wanted: Iterable[Placement] = ()) -> HostFacts:
        return HostFacts(frozenset(self.online), self.is_owner, self.realtime)

    def look(self, thread_ids: Collection[int]) -> dict[int, ThreadState]:
        untouched = {thread: ThreadState(*given, 1) for thread, given in self.threads.items()}
        return {
            thread: now for thread, now in (untouched | self._now).items() if thread in thread_ids
        }

    def others(self, thread_ids: Collection[int]) -> Collection[int]:
        return self.emulator

    def place(
        self, thread_id: int, placement: Placement, vcpu_id: int | None = None
    ) -> ThreadState:
        if thread_id in self.declines:
            raise OSError(22, "no such CPU in its cpuset")
        self.placed[thread_id] = placement.to_json()
        self._now[thread_id] = ThreadState(placement.cpus or (), placement.scheduler or "other", 1)
        return self._now[thread_id]

    def is_in_group(self, thread_id: int, placement: Placement, vcpu_id: int) -> bool:
        return True

    def has_layout(self) -> bool:
        return self.has_groups_for_all

    def make_groups(self, wanted: Mapping[int, Placement]) -> None:
        if self.no_group is not None:
            raise self.no_group
        self.groups = {vcpu: placement.to_json() for vcpu, placement in wanted.items()}

    def has_groups(self) -> bool:
        return bool(self.groups)

    def remove_groups(self, gone: Collection[int], enabled: Collection[int]) -> Collection[int]:
        self.removed = set(gone)
        return []

    def lay_out(
        self, wanted: Iterable[Placement], emulator: Placement, thread_ids: Collection[int]
    ) -> None:
        pass

    def widen(self, mems: Iterable[int]) -> None:
        return None

    def recover(self) -> None:
        pass


def wishes(xml: bytes | None, ids: Iterable[int]) -> dict[int, Wish]:
    """What the XML says of these vCPUs, without those that it says nothing about. Raises
    VcpuRefused.
    """
    definition = None if xml is None else read_domain(xml)[1]
    return {
        number: placement.to_json() for number, placement in placements(definition, ids).items()
    }


def against(xml: bytes | None, ids: Iterable[int], host: Host | None) -> list[Refusal]:
    """Why that cannot be; `host` None: QEMU's process is not found."""
    definition = None if xml is None else read_domain(xml)[1]
    return check_placements(placements(definition, ids), host.facts() if host is not None else None)


def place_all_of(host: Host | None, xml: bytes, state: DomainState) -> list[str]:
    """Place a guest that starts; what there is to say of it. Raises VcpuRefused, VcpuFailed."""
    return place_all(host, read_domain(xml)[1], state)


def shown(
    state: DomainState, threads: Mapping[int, tuple[tuple[int, ...], str, int]]
) -> DomainState:
    """The state with what threads have: ids -> CPUs, scheduler, where it last ran."""
    return with_threads(state, {thread: ThreadState(*given) for thread, given in threads.items()})


class Change:
    """One change of the running guest: planned and checked, prepared, and after the change
    finished.
    """

    def __init__(
        self, host: Host | None, xml: bytes | None, before: DomainState, request: Request
    ) -> None:
        self._placing = ThreadPlacement(host, None if xml is None else read_domain(xml)[1])
        self._before = before
        self.plan = make_plan(before, request)
        self.checked: Plan = self._placing.check(self.plan, before)

    def prepare(self) -> Plan:
        """Make the cgroups; the plan, with what stands against that."""
        return self._placing.prepare(self.checked)

    def finish(self, now: DomainState, error: VcpuError | None = None) -> Outcome:
        """QEMU has done it, or ended with `error`: what comes of it all. Raises VcpuError."""
        ids = self.plan.targets
        report = Report(ids, self.plan)
        nothing: tuple[int, ...] = ()
        done = Result(OutcomeKind.APPLIED, ids, nothing, nothing, nothing, nothing, nothing, (), ())
        report.hotplugged(done, stopped=None, reset_drops=False)
        if error is not None:
            report.failed(error)
        self._placing.place(self._before, now, self.checked, report)
        return report.end(now, 0.0)
