"""Processes of this host, as qmpvcpu tells one from another: pids come again, processes do not."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from qmpvcpu.host.process import Process, boot_id, find_process, is_alive


def qemu_of(thread_ids: Iterable[int]) -> int | None:
    """The pid of the QEMU that these threads are of; None if there is none."""
    found = find_process(list(thread_ids))
    return None if found is None else found.pid


def start_of(pid: int) -> int:
    """When it started, in clock ticks since the host's boot: proc(5)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def name_of(pid: int | None = None, start: int | None = None, boot: str | None = None) -> str:
    """The name of a process for good; this process's, but for what is given."""
    pid = os.getpid() if pid is None else pid
    return Process(pid, start_of(pid) if start is None else start, boot_id() if boot is None else boot).key


def is_running(name: str) -> bool:
    """Whether the process of that name still runs."""
    return is_alive(name)
