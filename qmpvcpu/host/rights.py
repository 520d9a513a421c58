"""What this process may do on this host: KVM, scheduling, cgroups."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

from qmpvcpu.host.cgroup.hierarchy import hierarchies

#: Bit of CAP_SYS_NICE in /proc/self/status (linux/capability.h).
_CAP_SYS_NICE: Final = 23


def kvm_state() -> tuple[bool, str | None]:
    """Whether /dev/kvm can be used, and why not."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return False, "there is no /dev/kvm"
    except OSError as error:
        return False, f"/dev/kvm: {error.strerror}"
    return True, None


def may_schedule() -> bool:
    """CAP_SYS_NICE: real-time schedulers, and other users' threads. Read once for each user that we are."""
    return _has_sys_nice(os.geteuid())


@cache
def _has_sys_nice(user: int) -> bool:
    return bool(_capabilities("self", "CapEff") >> _CAP_SYS_NICE & 1)


def may_place(pid: int) -> bool:
    """Whether affinity and scheduler of that process's threads are ours to set (sched_setaffinity(2)).

    Raises:
        OSError: there is no such process.
    """
    if may_schedule():
        return True
    # The same user; and nobody may touch who can do more (the kernel's cap_safe_nice).
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
    """`root`, `sys_nice` (`may_schedule`), `cgroup` controllers that are mounted."""
    return {"root": os.geteuid() == 0, "sys_nice": may_schedule(), "cgroup": _cgroups()}


def _cgroups() -> dict[str, list[str]]:
    """Controllers by cgroup version, from the mounts."""
    found: dict[str, set[str]] = {"v1": set(), "v2": set()}
    for one in hierarchies():
        found[f"v{one.version}"].update(one.controllers)
    return {version: sorted(names) for version, names in found.items()}
