"""Read and set the affinity and scheduler of QEMU's threads, and read them back.

A thread is changed only while it belongs to the same process (pid and start time): the kernel
reuses thread ids for any process.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from qmpvcpu.core.model import format_ids
from qmpvcpu.core.rules.placement import Control, HostFacts, Placement, ThreadState
from qmpvcpu.host.cgroup.groups import VcpuGroups
from qmpvcpu.host.cgroup.hierarchy import cpu_list, read_text
from qmpvcpu.host.process import Process, is_alive
from qmpvcpu.host.rights import may_place, may_schedule

_PROC: Final = Path("/proc")
#: sched.h
_POLICIES: Final = {
    "other": os.SCHED_OTHER,
    "fifo": os.SCHED_FIFO,
    "rr": os.SCHED_RR,
    "batch": os.SCHED_BATCH,
    "idle": os.SCHED_IDLE,
}
_NAMES: Final = {number: name for name, number in _POLICIES.items()}
#: proc(5), /proc/pid/stat: the 39th field, which is the 37th after the name.
_LAST_CPU: Final = 36
#: The kernel adds this flag to the policy of a thread whose children get the default one
#: (sched(7)).
_RESET_ON_FORK: Final = 0x40000000


def online_cpus() -> frozenset[int]:
    """Host CPUs that are online."""
    with suppress(OSError, ValueError):
        return cpu_list(read_text("/sys/devices/system/cpu/online"))
    return frozenset(os.sched_getaffinity(0))


def _host_facts(process: Process, controls: Mapping[str, Control]) -> HostFacts | None:
    """What we may do with the threads of this QEMU; None if it has ended since it was found."""
    try:
        is_owner, nice = may_place(process.pid), may_schedule()
        realtime = 99
        if not nice:
            realtime = 0
            with suppress(OSError, ValueError):
                limit = resource.prlimit(process.pid, resource.RLIMIT_RTPRIO)[0]
                realtime = 99 if limit == resource.RLIM_INFINITY else min(limit, 99)
    except OSError:
        return None
    return HostFacts(online_cpus(), is_owner, realtime, controls)


def look(process: Process, thread_id: int) -> ThreadState | None:
    """The state of one thread; None if it does not belong to this process, or if we may not look at
    it.
    """
    try:
        stat = read_text(f"/proc/{process.pid}/task/{thread_id}/stat")
        cpus = tuple(sorted(os.sched_getaffinity(thread_id)))
        policy = os.sched_getscheduler(thread_id) & ~_RESET_ON_FORK
        priority = os.sched_getparam(thread_id).sched_priority
    except OSError:
        return None
    name = _NAMES.get(policy, str(policy))
    fields = stat.rpartition(")")[2].split()
    return ThreadState(
        cpus,
        f"{name}:{priority}" if priority else name,
        int(fields[_LAST_CPU]) if len(fields) > _LAST_CPU and fields[_LAST_CPU].isdigit() else None,
    )


def other_threads(process: Process, thread_ids: Collection[int]) -> list[int]:
    """Threads of QEMU that do not run a vCPU; libvirt calls them the emulator."""
    with suppress(OSError):
        found = [int(name) for name in os.listdir(_PROC / str(process.pid) / "task")]  # noqa: PTH208
        return [number for number in found if number not in thread_ids]
    return []


def place_thread(process: Process, thread_id: int, placement: Placement) -> ThreadState:
    """Set the CPUs and the scheduler of one thread, and read both back.

    An empty set of CPUs stands for all that are online.

    Raises:
        OSError: the thread no longer belongs to this process, the kernel refused, or the values
            read back differ.
    """
    check_thread(process, thread_id)
    if placement.cpus is not None:
        os.sched_setaffinity(thread_id, placement.cpus or online_cpus())
    if placement.policy is not None:
        os.sched_setscheduler(
            thread_id, _POLICIES[placement.policy], os.sched_param(placement.priority)
        )
    found = look(process, thread_id)
    if found is None:
        raise ProcessLookupError(3, "the thread has ended")
    if placement.cpus and found.cpus != placement.cpus:
        raise OSError(
            22, f"it may run on CPU {format_ids(found.cpus)}, not on {format_ids(placement.cpus)}"
        )
    if placement.scheduler is not None and found.scheduler != placement.scheduler:
        raise OSError(22, f"its scheduler is {found.scheduler}, not {placement.scheduler}")
    return found


def check_thread(process: Process, thread_id: int) -> None:
    """Check that a thread belongs to this process, since the kernel reuses thread ids.

    Raises:
        ProcessLookupError: it does not belong to this process any more.
    """
    if not is_alive(process.key):
        raise ProcessLookupError(3, f"QEMU's process {process.pid} has ended")
    if not os.access(f"/proc/{process.pid}/task/{thread_id}", os.F_OK):
        raise ProcessLookupError(3, f"thread {thread_id} is not QEMU's")


class QemuThreads(VcpuGroups):
    """The threads of one QEMU on this host, and their cgroups."""

    def facts(self, wanted: Iterable[Placement]) -> HostFacts | None:
        """Which of these placements we may do with the threads; None if QEMU has ended."""
        with suppress(OSError):
            return _host_facts(self._process, self.controls(wanted))
        return None

    def look(self, thread_ids: Collection[int]) -> dict[int, ThreadState]:
        """The state of each of these threads that exists."""
        found = {number: look(self._process, number) for number in thread_ids}
        return {number: state for number, state in found.items() if state is not None}

    def others(self, thread_ids: Collection[int]) -> list[int]:
        """Threads of this QEMU that do not run a vCPU (`other_threads`)."""
        return other_threads(self._process, thread_ids)

    def place(
        self, thread_id: int, placement: Placement, vcpu_id: int | None = None
    ) -> ThreadState:
        """Move the thread into the cgroups made for this vCPU, then call `place_thread`.

        Without `vcpu_id`, the group that the thread is in gets the CPUs of the placement.
        """
        if vcpu_id is None:
            check_thread(self._process, thread_id)
            if placement.cpus is not None:
                self.follow(thread_id, placement.cpus or online_cpus())
        elif self.has_made(vcpu_id):
            check_thread(self._process, thread_id)
            self.enter(vcpu_id, thread_id, placement)
        return place_thread(self._process, thread_id, placement)

    @property
    def main_id(self) -> int:
        """Thread id of QEMU's main thread."""
        return self._process.pid

    def is_in_group(self, thread_id: int, placement: Placement, vcpu_id: int) -> bool:
        """Whether the thread is in its groups (`VcpuGroups.is_in_place`); true if the thread has
        ended.
        """
        with suppress(OSError):
            return self.is_in_place(vcpu_id, thread_id, placement)
        return True
