"""The mounted cgroup hierarchies, and the groups that a thread is in. The kernel is the only
source.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

V1: Final = 1
V2: Final = 2
#: The controllers that groups of vCPUs are made for. libvirt also makes groups for cpuacct, which
#: counts and does not limit.
CONTROLLERS: Final = ("cpuset", "cpu", "cpuacct")
_MOUNTS: Final = "/proc/self/mountinfo"
_CHUNK: Final = 1 << 16
#: proc_pid_mountinfo(5): space, tab, newline and backslash are written as octal numbers.
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mount of a cgroup hierarchy.

    Attributes:
        version: 1 or 2.
        mount: the mount point.
        root: the name of the group at the mount point, as the kernel names groups to this process.
        controllers: those of `CONTROLLERS` that are bound to it (v1), or that its root group had
            when the mounts were read (v2).
        is_writable: whether it is mounted read-write.
    """

    version: int
    mount: Path
    root: str
    controllers: tuple[str, ...]
    is_writable: bool

    def folder(self, name: str) -> Path | None:
        """The folder of the group with this name; None if it is not below this mount."""
        if name == self.root:
            return self.mount
        start = self.root.rstrip("/") + "/"
        # The kernel writes "/.." for a group that is outside of our cgroup namespace.
        if not name.startswith(start) or ".." in name.split("/"):
            return None
        return self.mount / name.removeprefix(start)


@dataclass(frozen=True, slots=True)
class Group:
    """One group: its name as the kernel reports it, and its folder."""

    hierarchy: Hierarchy
    name: str
    folder: Path

    @property
    def version(self) -> int:
        """The cgroup version: 1 or 2."""
        return self.hierarchy.version

    @property
    def parent(self) -> Group:
        """The group above this one."""
        return Group(self.hierarchy, self.name.rpartition("/")[0] or "/", self.folder.parent)

    def child(self, name: str) -> Group:
        """A group inside this one. It need not exist."""
        return Group(self.hierarchy, f"{self.name.rstrip('/')}/{name}", self.folder / name)


def hierarchies(mountinfo: str = _MOUNTS) -> tuple[Hierarchy, ...]:
    """Every cgroup mount that this process sees. Never raises."""
    with suppress(OSError):
        return _parse_mounts(read_text(mountinfo))
    return ()


@lru_cache(maxsize=4)
def _parse_mounts(text: str) -> tuple[Hierarchy, ...]:
    found = []
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        fields, kind = head.split(" "), tail.split(" ")
        if kind[0] not in ("cgroup", "cgroup2") or len(fields) < 6 or len(kind) < 3:
            continue
        mount, root = Path(_plain(fields[4])), _plain(fields[3])
        parts = kind[2].split(",")
        version = V2 if kind[0] == "cgroup2" else V1
        has = words(mount / "cgroup.controllers") if version == V2 else parts
        writable = "rw" in parts and "rw" in fields[5].split(",")
        found.append(
            Hierarchy(
                version, mount, root, tuple(name for name in CONTROLLERS if name in has), writable
            )
        )
    return tuple(found)


def groups_of(text: str) -> dict[str, str]:
    """Parse /proc/PID/cgroup or /proc/PID/task/TID/cgroup.

    Returns the name of the group by controller; the key "" stands for the v2 hierarchy.
    """
    found = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        names, _, group = rest.partition(":")
        # The kernel adds this to the name of a group that was removed.
        group = group.removesuffix(" (deleted)")
        found.update(dict.fromkeys(names.split(",") if number != "0" else [""], group))
    return found


def find_groups(text: str, mounts: Iterable[Hierarchy]) -> list[Group]:
    """The groups in the output of `groups_of`: one for each v1 hierarchy that has one of
    `CONTROLLERS`, and one for v2.
    """
    names = groups_of(text)
    found: dict[str, Group] = {}
    # The same hierarchy may be mounted twice: prefer the writable mount. A controller that v1 has
    # is not in v2.
    for mount in sorted(mounts, key=lambda one: (one.version, not one.is_writable)):
        key = "" if mount.version == V2 else next(iter(mount.controllers), None)
        name = names.get(key) if key is not None else None
        folder = mount.folder(name) if name is not None else None
        if (
            key is not None
            and name is not None
            and folder is not None
            and os.access(folder, os.F_OK)
        ):
            found.setdefault(key, Group(mount, name, folder))
    return list(found.values())


def cpu_list(text: str) -> frozenset[int]:
    """Parse the kernel's list format for CPUs or nodes, such as `0-3,7`. Raises ValueError."""
    found: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        low, _, high = part.partition("-")
        found.update(range(int(low), int(high or low) + 1))
    return frozenset(found)


def read_text(path: Path | str) -> str:
    """Read a file of the kernel. Bytes that are not UTF-8 are kept as surrogates.

    Every plug calls this, so it does not create a file object.

    Raises:
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = part = os.read(fd, _CHUNK)
        while part:
            part = os.read(fd, _CHUNK)
            data += part
    finally:
        os.close(fd)
    return data.decode(errors="surrogateescape")


def words(path: Path) -> list[str]:
    """The words in a control file; an empty list if it does not exist or cannot be read."""
    with suppress(OSError):
        return path.read_text().split()
    return []


def put(path: Path, value: str) -> None:
    """Write a value to a control file, and check that the file has it. Raises OSError."""
    write(path, value)
    found = path.read_text().strip()
    if found == value:
        return
    with suppress(ValueError):
        if path.name.startswith("cpuset.") and cpu_list(found) == cpu_list(value):
            return
    raise OSError(errno.EINVAL, f"it has '{found}' instead of '{value}'", str(path))


def write(path: Path, value: str) -> None:
    """Write to a control file that exists; a file is never created. Raises OSError."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _plain(word: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), word)
