"""The cgroups of this host, v1 and v2, as the kernel tells them. A hierarchy is named by a
controller; v2: "".
"""

from __future__ import annotations

from pathlib import Path

from qmpvcpu.host.cgroup.hierarchy import V2, find_groups, groups_of, hierarchies


def of_thread(pid: int, thread_id: int) -> dict[str, str]:
    """The groups of a thread, by controller."""
    return groups_of(Path(f"/proc/{pid}/task/{thread_id}/cgroup").read_text())


def folder_of(pid: int, controller: str) -> Path | None:
    """The folder of the group that a process is in; None where this host has no such hierarchy."""
    for group in find_groups(Path(f"/proc/{pid}/cgroup").read_text(), hierarchies()):
        if (controller == "" and group.version == V2) or controller in group.hierarchy.controllers:
            return group.folder
    return None


def mounts(*controllers: str) -> list[Path]:
    """Where hierarchies are mounted: those of any of these controllers, or all."""
    return [
        one.mount
        for one in hierarchies()
        if not controllers or set(controllers) & set(one.controllers)
    ]
