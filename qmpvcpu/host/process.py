"""Which process a guest is: by the threads that QMP lists, checked in /proc.

A socket's peer credentials name who listened, not always QEMU (libvirt passes the socket in): then QEMU must hold
the socket that listens.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from qmpvcpu.ports import Peer

_PROC: Final = Path("/proc")
#: include/uapi/linux/net.h, __SO_ACCEPTCON: it listens.
_ACCEPTS: Final = 1 << 16
#: A zombie has its start time still.
_DEAD: Final = (b"Z", b"X")
#: proc(5), /proc/pid/stat: the 22nd field, and the 20th after the name.
_START: Final = 19


@dataclass(frozen=True, slots=True)
class Process:
    """One process for good: pids come again, but not with the same `start` (clock ticks since `boot`, an id)."""

    pid: int
    start: int
    boot: str

    @property
    def key(self) -> str:
        """A file name."""
        return f"{self.boot}-{self.pid}-{self.start}"


def pid_in(key: str) -> str:
    """The process id in a `Process.key`, to be shown."""
    return key.rpartition("-")[0].rpartition("-")[2]


@cache
def boot_id() -> str:
    """The kernel's id of this boot, its first part; random(4)."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().split("-")[0].strip()


def _start_of(pid: int, *, alive: bool = False) -> int:
    # Of its first thread, which is the same: /proc/PID/stat adds up all threads. The name may hold spaces and
    # brackets: what counts begins after the last one.
    fd = os.open(f"/proc/{pid}/task/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fields = os.read(fd, 4096).rpartition(b")")[2].split()
    finally:
        os.close(fd)
    if alive and fields[0] in _DEAD:
        raise ProcessLookupError(3, "it has ended")
    return int(fields[_START])


def _listens(pid: int, peer: Peer) -> bool:
    """Whether the socket that a monitor is connected to is that process's: it listened itself, or was given the
    socket that listens.
    """
    if peer.path is None or peer.pid == pid:
        # A socket pair, TCP: nothing tells.
        return True
    inodes = set()
    for line in (_PROC / "net/unix").read_bytes().splitlines()[1:]:
        fields = line.split(None, 7)
        if len(fields) == 8 and fields[7] == os.fsencode(peer.path) and int(fields[3], 16) & _ACCEPTS:
            inodes.add(f"socket:[{int(fields[6])}]")
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - names are all we need
            with suppress(FileNotFoundError):
                if os.readlink(f"/proc/{pid}/fd/{name}") in inodes:  # noqa: PTH115
                    return True
    except PermissionError:
        # Another user's: we could do nothing to it.
        return True
    return False


def find_process(thread_ids: Collection[int], peer: Peer | None = None) -> Process | None:
    """The one QEMU on this host that owns all these threads; None where there is none, or it may not be looked at.

    Args:
        thread_ids: Linux thread ids, as `query-cpus-fast` lists them.
        peer: whom the monitor's socket leads to.
    """
    try:
        some = next(iter(thread_ids), None)
        if some is None:
            return None
        status = (_PROC / str(some) / "status").read_text()
        pid = int(status.partition("Tgid:")[2].split(None, 1)[0])
        folder = _PROC / str(pid)
        if not all((folder / "task" / str(thread)).exists() for thread in thread_ids):
            return None
        # A thread of that number on another host, or in another container, is rarely a QEMU's.
        if b"qemu" not in (folder / "cmdline").read_bytes().lower():
            return None
        # A QEMU that a guest has taken over can name the threads of another one.
        if pid in thread_ids or (peer is not None and not _listens(pid, peer)):
            return None
        return process_of(pid)
    except (OSError, ValueError, IndexError):
        return None


def find_by_uuid(uuid: str) -> Process | None:
    """The one QEMU on this host that was started with this `-uuid`, as libvirt starts them; None where none or
    several were.
    """
    found = []
    wanted = f"\0-uuid\0{uuid}\0".lower().encode()
    with suppress(OSError):
        for name in os.listdir(_PROC):  # noqa: PTH208 - names are all we need
            if name.isdigit():
                with suppress(OSError, ValueError, IndexError):
                    line = (_PROC / name / "cmdline").read_bytes().lower()
                    if wanted in line and b"qemu" in line:
                        found.append(process_of(int(name)))
    return found[0] if len(found) == 1 else None


def process_of(pid: int) -> Process:
    """The process that has this pid now. Raises OSError."""
    return Process(pid, _start_of(pid), boot_id())


def command_line_of(process: Process) -> list[str]:
    """The arguments that a process was started with, its program first; nothing where it has ended, may not be
    looked at, or was started by another user (root apart): what that one says of itself would be started with our
    rights.
    """
    try:
        # All of its ids: a program with the setuid bit has the arguments that its caller chose.
        if not _uids(process.pid) <= {0, os.geteuid()}:
            return []
        data = (_PROC / str(process.pid) / "cmdline").read_bytes()
        if _start_of(process.pid) != process.start:
            return []
    except (OSError, ValueError, IndexError):
        return []
    return [os.fsdecode(word) for word in data.removesuffix(b"\0").split(b"\0")] if data else []


def _uids(pid: int) -> set[int]:
    """Real, effective, saved and file system's user ids. Raises OSError, ValueError."""
    text = (_PROC / str(pid) / "status").read_text()
    return {int(word) for word in text.partition("\nUid:")[2].split("\n", 1)[0].split()}


def folder_of(process: Process) -> str | None:
    """The folder that a process runs in; None for one that has gone into the background (it is in `/` then), or
    that may not be looked at.
    """
    try:
        folder = os.readlink(f"/proc/{process.pid}/cwd")  # noqa: PTH115 - one readlink(2)
    except OSError:
        return None
    return folder if folder != "/" else None


def is_alive(key: str) -> bool:
    """Whether the process of this `Process.key` still runs."""
    boot, _, rest = key.partition("-")
    pid, _, start = rest.partition("-")
    try:
        return boot == boot_id() and _start_of(int(pid), alive=True) == int(start)
    except (OSError, ValueError, IndexError):
        return False
