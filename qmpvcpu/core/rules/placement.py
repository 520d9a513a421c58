"""Where a vCPU's thread should run by the domain's XML, and whether this host allows it. Pure.

The names are those of libvirt's `<cputune>` (`vcpupin`, else `<vcpu cpuset>`, `vcpusched`,
`period`, `quota`, `shares`) and `<numatune>` (`memory`, `memnode`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from qmpvcpu.core.definition import Definition
from qmpvcpu.core.model import DomainState, Vcpu, format_ids, grouped
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.request import check_range
from qmpvcpu.errors import Refusal

#: sched(7): policies with a priority, 1 to 99.
REAL_TIME: Final = ("fifo", "rr")
_V2: Final = 2
#: cgroup-v2.rst, cpu.weight; libvirt writes `<shares>` there as it is.
_MOST_WEIGHT: Final = 10000
#: v1's cpu.shares: the kernel clamps values outside of its range.
_MOST_SHARES: Final = 262144
_PIN: Final = "name host CPUs that it may use; vcpupin --config keeps them for another host"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Placement:
    """The settings of one thread; None leaves a setting as it is.

    `cpus` are host CPUs (an empty tuple: all that it may use) and `scheduler` is `fifo:10`, `batch`
    … The others are set by its cgroup: `mems` are host NUMA nodes, `period` and `quota`
    microseconds of CPU time (a negative quota: no limit), `shares` is its weight, usually 1024.
    """

    cpus: tuple[int, ...] | None = None
    scheduler: str | None = None
    mems: tuple[int, ...] | None = None
    period: int | None = None
    quota: int | None = None
    shares: int | None = None

    @property
    def policy(self) -> str | None:
        """The scheduler without its priority."""
        return self.scheduler.partition(":")[0] if self.scheduler is not None else None

    @property
    def priority(self) -> int:
        """sched_priority; 0 if the policy has no priority."""
        return int(self.scheduler.partition(":")[2] or 0) if self.scheduler is not None else 0

    @property
    def controllers(self) -> tuple[str, ...]:
        """The cgroup controllers that it needs; affinity alone needs none."""
        tuned = (self.period, self.quota, self.shares) != (None, None, None)
        return (*(("cpuset",) if self.mems is not None else ()), *(("cpu",) if tuned else ()))

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON data: `cpus` and `mems` as the kernel writes lists."""
        lists = {"cpus": self.cpus, "mems": self.mems}
        values = {
            "scheduler": self.scheduler,
            "period": self.period,
            "quota": self.quota,
            "shares": self.shares,
        }
        return {
            **{name: format_ids(value) for name, value in lists.items() if value is not None},
            **{name: value for name, value in values.items() if value is not None},
        }

    def __bool__(self) -> bool:
        return self != Placement()

    def __str__(self) -> str:
        words = (
            []
            if self.cpus is None
            else [f"CPU {format_ids(self.cpus)}" if self.cpus else "every CPU"]
        )
        words += [self.scheduler] if self.scheduler is not None else []
        words += [f"memory of node {format_ids(self.mems)}"] if self.mems is not None else []
        for name, value in (
            ("period", self.period),
            ("quota", self.quota),
            ("shares", self.shares),
        ):
            words += [f"{name} {value}"] if value is not None else []
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class ThreadState:
    """On which host CPUs a thread may run, its scheduler, and the CPU on which it last ran."""

    cpus: tuple[int, ...]
    scheduler: str
    last_cpu: int | None


@dataclass(frozen=True, slots=True)
class Control:
    """What a cgroup controller of QEMU's group allows for the groups of vCPUs.

    Attributes:
        version: 1 or 2; 0 without the controller.
        path: the group in which the groups of vCPUs are made.
        trouble: why they cannot be made.
        denied: whether that is for want of a permission.
        cpus, mems: all that cpuset lets a vCPU use in there; None where it does not say.
        is_layout: QEMU is in an `emulator` group as libvirt makes it, so every vCPU has its own.
        gives_real_time: a real-time thread may be in QEMU's group.
        splits_real_time: each group needs a real-time budget of its own.
    """

    version: int = 0
    path: str = ""
    trouble: str | None = None
    denied: bool = False
    cpus: frozenset[int] | None = None
    mems: frozenset[int] | None = None
    is_layout: bool = False
    gives_real_time: bool = True
    splits_real_time: bool = False


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What this process may do with QEMU's threads. `online` are host CPUs, `realtime` is the
    highest real-time priority that QEMU's threads may get (0: none), `controls` has the cgroup
    controllers `cpuset` and `cpu`.
    """

    online: frozenset[int]
    is_owner: bool
    realtime: int
    controls: Mapping[str, Control] = field(default_factory=dict)


def placements(definition: Definition | None, ids: Iterable[int]) -> dict[int, Placement]:
    """The XML's settings for these vCPUs; a vCPU without any is left out."""
    if definition is None:
        return {}
    # A new thread inherits the CPUs of the one that makes it.
    is_pinned = definition.cpuset is None and definition.emulator_pin is not None
    everywhere = () if is_pinned else definition.cpuset
    found = {
        number: Placement(
            definition.pins.get(number, everywhere),
            definition.schedulers.get(number),
            definition.mems_of(number),
            definition.period,
            definition.quota,
            definition.shares,
        )
        for number in ids
    }
    return {number: placement for number, placement in found.items() if placement}


def emulator_placement(definition: Definition) -> Placement:
    """The XML's settings for QEMU's other threads: `<emulatorpin>`, else `<vcpu cpuset>`."""
    cpus = definition.emulator_pin if definition.emulator_pin is not None else definition.cpuset
    return Placement(cpus, mems=definition.mems)


def check_emulator(emulator: Placement, facts: HostFacts | None) -> list[Refusal]:
    """Every reason why QEMU's other threads cannot be placed."""
    if facts is None or not facts.is_owner:
        # The refusals of the vCPUs say that already, or there is nothing to do.
        return []
    return [
        replace(
            one,
            ids=(),
            message=one.message.replace("vCPU 0", "the emulator").replace("vcpupin", "emulatorpin"),
        )
        for one in check_placements({0: emulator} if emulator else {}, facts)
    ]


def check_placements(wanted: Mapping[int, Placement], facts: HostFacts | None) -> list[Refusal]:
    """Every reason why these threads cannot be placed, before they exist.

    Args:
        wanted: by vCPU id.
        facts: of this host; None where QEMU's process is not on it.
    """
    if not wanted:
        return []
    ids = tuple(sorted(wanted))
    if facts is None:
        return [catalogue.PLACE_ELSEWHERE(ids)]
    found: list[Refusal] = []
    moved = {n: p for n, p in wanted.items() if p.cpus is not None or p.scheduler is not None}
    if moved and not facts.is_owner:
        found.append(catalogue.PLACE_NOT_OWNER(moved))
    cpuset = facts.controls.get("cpuset", Control())
    for cpus, ids in _groups(wanted, lambda p: p.cpus):
        found += _within(
            ids, cpus, "pinned to host CPU", facts.online, cpuset.cpus, cpuset.path, "<vcpupin>"
        )
    for mems, ids in _groups(wanted, lambda p: p.mems):
        found += _within(
            ids, mems, "bound to host NUMA node", None, cpuset.mems, cpuset.path, "<numatune>"
        )
    for name in ("cpuset", "cpu"):
        ids = tuple(n for n in sorted(wanted) if name in wanted[n].controllers)
        control = facts.controls.get(
            name, Control(trouble=f"no cgroup with the {name} controller is mounted on this host")
        )
        if ids and control.trouble is not None:
            word = "<numatune>" if name == "cpuset" else "<period>, <quota> or <shares>"
            reason = catalogue.CONTROLLER_DENIED if control.denied else catalogue.NO_CONTROLLER
            found.append(reason(ids, element=word, trouble=control.trouble))
    cpu = facts.controls.get("cpu", Control())
    least, most = (1, _MOST_WEIGHT) if cpu.version == _V2 else (2, _MOST_SHARES)
    found += [
        catalogue.SHARES(ids, shares=shares, least=least, most=most)
        for shares, ids in _groups(wanted, lambda p: p.shares)
        if not least <= shares <= most
    ]
    return found + _real_time(wanted, facts, cpu)


def check_thread(state: DomainState, vcpu_id: int) -> list[Refusal]:
    """Why a vCPU has no thread of its own that could be pinned."""
    if found := check_range(state, (vcpu_id,)):
        return found
    if not state.vcpus[vcpu_id].enabled:
        return [catalogue.NO_THREAD((vcpu_id,))]
    return [catalogue.SHARED_THREAD((vcpu_id,))] if state.threads_shared else []


def check_thread_cpus(vcpu_id: int, wanted: Placement, facts: HostFacts | None) -> list[Refusal]:
    """`check_placements` for a vCPU that a user pins, whatever its XML says."""
    return [
        replace(one, hint=_PIN) if one.libvirt == catalogue.PLACE_OFFLINE.libvirt else one
        for one in check_placements({vcpu_id: wanted}, facts)
    ]


def _groups(
    wanted: Mapping[int, Placement], get: Callable[[Placement], T | None]
) -> list[tuple[T, tuple[int, ...]]]:
    """Each value that `get` gives, with the vCPUs that have it."""
    found = grouped((get(wanted[number]), number) for number in sorted(wanted))
    return [(value, tuple(ids)) for value, ids in found.items() if value is not None]


def _within(
    ids: tuple[int, ...],
    wanted: tuple[int, ...],
    how: str,
    online: frozenset[int] | None,
    allowed: frozenset[int] | None,
    path: str,
    element: str,
) -> list[Refusal]:
    """Refuse host CPUs or nodes that are not there, or may not be used."""
    if online is not None and (missing := [number for number in wanted if number not in online]):
        return [
            catalogue.PLACE_OFFLINE(
                ids, how=how, missing=missing, there=sorted(online), element=element
            )
        ]
    if allowed is not None and (missing := [number for number in wanted if number not in allowed]):
        return [
            catalogue.PLACE_OUTSIDE(
                ids, how=how, missing=missing, path=path, there=sorted(allowed), element=element
            )
        ]
    return []


def _real_time(wanted: Mapping[int, Placement], facts: HostFacts, cpu: Control) -> list[Refusal]:
    found = []
    for scheduler, ids in _groups(wanted, lambda p: p.scheduler):
        one = Placement(scheduler=scheduler)
        if one.policy not in REAL_TIME:
            continue
        if not 1 <= one.priority <= 99:
            found.append(catalogue.PRIORITY(ids, scheduler=scheduler))
        elif one.priority > facts.realtime:
            found.append(catalogue.REAL_TIME_DENIED(ids, scheduler=scheduler, most=facts.realtime))
        elif not cpu.gives_real_time:
            found.append(catalogue.NO_REAL_TIME(ids, scheduler=scheduler, path=cpu.path))
        elif cpu.splits_real_time and any("cpu" in wanted[n].controllers for n in ids):
            found.append(catalogue.REAL_TIME_SPLIT(ids, scheduler=scheduler))
    return found


def is_unplaced(placement: Placement, thread: ThreadState, main: ThreadState) -> bool:
    """Whether nobody has placed a thread yet: it has what QEMU's main thread has, and should have
    something else.

    What somebody else has set since is left alone.
    """
    is_loose = thread.cpus == main.cpus and bool(placement.cpus) and thread.cpus != placement.cpus
    is_plain = thread.scheduler == main.scheduler and placement.scheduler not in (
        None,
        thread.scheduler,
    )
    return is_loose or is_plain


def with_thread(vcpu: Vcpu, thread: ThreadState) -> Vcpu:
    """The vCPU with the settings of its thread."""
    return replace(
        vcpu, pin=format_ids(thread.cpus), scheduler=thread.scheduler, cpu=thread.last_cpu
    )


def with_threads(state: DomainState, threads: Mapping[int, ThreadState]) -> DomainState:
    """The state with the settings of its vCPUs' threads, which are given by thread id."""
    if not threads:
        return state
    found = [
        (vcpu, threads.get(vcpu.thread_id) if vcpu.thread_id is not None else None)
        for vcpu in state.vcpus
    ]
    return replace(
        state,
        vcpus=tuple(
            with_thread(vcpu, thread) if thread is not None else vcpu for vcpu, thread in found
        ),
    )
