"""Processes of this host, as qmpvcpu tells one from another: pids come again, processes do not."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from qmpvcpu.core.model import format_ids
from qmpvcpu.core.rules.placement import Placement
from qmpvcpu.host.affinity import look, online_cpus, place_thread
from qmpvcpu.host.process import Process, boot_id, find_process, is_alive
from qmpvcpu.host.rights import kvm_state
from qmpvcpu.ports import Peer


def qemu_of(thread_ids: Iterable[int], socket: str | None = None) -> int | None:
    """The pid of the QEMU that these threads are of, and that listens at this socket; None if there
    is none.
    """
    found = find_process(list(thread_ids), None if socket is None else Peer(None, socket))
    return None if found is None else found.pid


def start_of(pid: int) -> int:
    """When it started, in clock ticks since the host's boot: proc(5)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def name_of(pid: int | None = None, start: int | None = None, boot: str | None = None) -> str:
    """The name of a process for good; this process's, but for what is given."""
    pid = os.getpid() if pid is None else pid
    return Process(
        pid, start_of(pid) if start is None else start, boot_id() if boot is None else boot
    ).key


def is_running(name: str) -> bool:
    """Whether the process of that name still runs."""
    return is_alive(name)


def why_no_kvm() -> str | None:
    """None where this host has KVM for us."""
    is_there, why = kvm_state()
    return None if is_there else str(why)


def host_cpus() -> frozenset[int]:
    """The CPUs of this host that are online."""
    return frozenset(online_cpus())


def place(
    pid: int, thread_id: int, cpus: tuple[int, ...], scheduler: str | None = None, *, since: int
) -> None:
    """Give a thread of the process with that pid and start its CPUs. Raises OSError."""
    place_thread(Process(pid, since, boot_id()), thread_id, Placement(cpus, scheduler))


def is_seen(pid: int, thread_id: int) -> bool:
    """Whether the thread is one of that process's."""
    return look(Process(pid, start_of(pid), boot_id()), thread_id) is not None


def cpu_list(cpus: Iterable[int]) -> str:
    """As Linux writes it: `0-3,5`."""
    return format_ids(cpus)
