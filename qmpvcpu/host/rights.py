"""What this process may do on this host: KVM, scheduling, cgroups."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

__all__ = ["kvm_state", "rights"]

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


def rights() -> dict[str, Any]:
    """`root`, `sys_nice` (real-time schedulers, other users' threads), `cgroup` controllers that are mounted."""
    capabilities = 0
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                capabilities = int(line.split()[1], 16)
    return {
        "root": os.geteuid() == 0,
        "sys_nice": bool(capabilities >> _CAP_SYS_NICE & 1),
        "cgroup": _cgroups(),
    }


def _cgroups() -> dict[str, list[str]]:
    """Controllers by cgroup version, from the mounts."""
    found: dict[str, list[str]] = {"v1": [], "v2": []}
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            _, _, tail = line.partition(" - ")
            kind, _, options = [*tail.split(" "), "", "", ""][:3]
            if kind == "cgroup":
                found["v1"] += [word for word in options.split(",") if word in ("cpuset", "cpu", "cpuacct")]
            elif kind == "cgroup2":
                with suppress(OSError):
                    found["v2"] += (Path(line.split(" ")[4]) / "cgroup.controllers").read_text().split()
    return {version: sorted(set(names)) for version, names in found.items()}
