"""What this process may do on this host: KVM, scheduling, cgroups; and the disk and memory it may
use.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

from qmpvcpu.host.cgroup.hierarchy import hierarchies

#: The bit of CAP_SYS_NICE in /proc/self/status (linux/capability.h).
_CAP_SYS_NICE: Final = 23
_AVAILABLE: Final = re.compile(rb"^MemAvailable:\s+([0-9]+) kB$", re.MULTILINE)


def kvm_state() -> tuple[bool, str | None]:
    """Whether /dev/kvm can be used; if it cannot, the reason."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return False, "there is no /dev/kvm"
    except OSError as error:
        return False, f"/dev/kvm: {error.strerror}"
    return True, None


def may_schedule() -> bool:
    """Whether we have CAP_SYS_NICE, for real-time schedulers and for threads of other users.

    It is read once for each user id that this process takes.
    """
    return _has_sys_nice(os.geteuid())


@cache
def _has_sys_nice(user: int) -> bool:
    return bool(_capabilities("self", "CapEff") >> _CAP_SYS_NICE & 1)


def may_place(pid: int) -> bool:
    """Whether we may set the affinity and scheduler of that process's threads
    (sched_setaffinity(2)).

    Raises:
        OSError: there is no such process.
    """
    if may_schedule():
        return True
    # It must be the same user. Also, the kernel refuses if the other process has more capabilities
    # than we have (its function cap_safe_nice).
    if Path(f"/proc/{pid}").stat().st_uid != os.geteuid():
        return False
    return not _capabilities(str(pid), "CapPrm") & ~_capabilities("self", "CapPrm")


def _capabilities(pid: str, which: str) -> int:
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{which}:"):
                return int(line.split()[1], 16)
    return 0


def rights() -> dict[str, Any]:
    """The rights of this process: `root`, `sys_nice` (`may_schedule`), and the `cgroup` controllers
    that are mounted.
    """
    return {"root": os.geteuid() == 0, "sys_nice": may_schedule(), "cgroup": _cgroups()}


def _cgroups() -> dict[str, list[str]]:
    """The mounted controllers by cgroup version."""
    found: dict[str, set[str]] = {"v1": set(), "v2": set()}
    for one in hierarchies():
        found[f"v{one.version}"].update(one.controllers)
    return {version: sorted(names) for version, names in found.items()}


def free_disk(folder: Path) -> int | None:
    """Bytes that we can write to the file system of a folder. Never raises."""
    with suppress(OSError):
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize
    return None


def free_memory() -> int | None:
    """Bytes that a new process can have without swapping; proc(5), /proc/meminfo.
    Never raises.
    """
    with suppress(OSError):
        match = _AVAILABLE.search(Path("/proc/meminfo").read_bytes())
        return int(match[1]) << 10 if match is not None else None
    return None
