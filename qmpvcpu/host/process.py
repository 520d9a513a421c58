"""Find the process of a QEMU from the thread ids that QMP lists, and check them in /proc.

The peer credentials of a socket name the process that called listen(2), which is not always QEMU:
libvirt passes the socket in. In that case, QEMU must have the listening socket open.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from qmpvcpu.ports import Peer

_PROC: Final = Path("/proc")
#: include/uapi/linux/net.h, __SO_ACCEPTCON: the socket listens.
_ACCEPTS: Final = 1 << 16
#: A zombie still has its start time.
_DEAD: Final = (b"Z", b"X")
#: proc(5), /proc/pid/stat: the 22nd field, which is the 20th after the name.
_START: Final = 19
#: proc(5), /proc/pid/status, in KiB: anonymous memory, shared memory, huge pages, and swapped
#: memory.
_MEMORY: Final = re.compile(
    rb"^(?:RssAnon|RssShmem|HugetlbPages|VmSwap):\s+([0-9]+) kB$", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Process:
    """One process, identified for all time: the kernel reuses a pid, but not with the same `start`.

    Attributes:
        pid: the process id.
        start: when it was started, in clock ticks since the boot.
        boot: an id of that boot.
    """

    pid: int
    start: int
    boot: str

    @property
    def key(self) -> str:
        """The process as a file name."""
        return f"{self.boot}-{self.pid}-{self.start}"


def pid_in(key: str) -> str:
    """The process id in a `Process.key`, for messages."""
    return key.rpartition("-")[0].rpartition("-")[2]


@cache
def boot_id() -> str:
    """The first part of the kernel's id of this boot; random(4)."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().split("-")[0].strip()


def _start_of(pid: int, *, alive: bool = False) -> int:
    # Read the first thread's file: it has the same start time, and the kernel adds up all threads
    # for /proc/PID/stat. The name may contain spaces and brackets, so the fields begin after the
    # last bracket.
    fd = os.open(f"/proc/{pid}/task/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fields = os.read(fd, 4096).rpartition(b")")[2].split()
    finally:
        os.close(fd)
    if alive and fields[0] in _DEAD:
        raise ProcessLookupError(3, "it has ended")
    return int(fields[_START])


def _listens(pid: int, peer: Peer) -> bool:
    """Whether the socket that a monitor is connected to belongs to that process: either the process
    called listen(2) itself, or it was given the listening socket.
    """
    if peer.path is None or peer.pid == pid:
        # For a socket pair or TCP, nothing shows who listens.
        return True
    inodes = set()
    for line in (_PROC / "net/unix").read_bytes().splitlines()[1:]:
        fields = line.split(None, 7)
        if (
            len(fields) == 8
            and fields[7] == os.fsencode(peer.path)
            and int(fields[3], 16) & _ACCEPTS
        ):
            inodes.add(f"socket:[{int(fields[6])}]")
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - names are all we need
            with suppress(FileNotFoundError):
                if os.readlink(f"/proc/{pid}/fd/{name}") in inodes:  # noqa: PTH115
                    return True
    except PermissionError:
        # It is another user's process, to which we cannot do anything.
        return True
    return False


def find_process(thread_ids: Collection[int], peer: Peer | None = None) -> Process | None:
    """Find the one QEMU on this host that owns all these threads.

    Returns None if there is no such QEMU, or if we may not look at it.

    Args:
        thread_ids: Linux thread ids, as `query-cpus-fast` lists them.
        peer: the other end of the monitor's socket.
    """
    try:
        some = next(iter(thread_ids), None)
        if some is None:
            return None
        pid = int(
            (_PROC / str(some) / "status").read_text().partition("Tgid:")[2].split(None, 1)[0]
        )
        folder = _PROC / str(pid)
        if not all((folder / "task" / str(thread)).exists() for thread in thread_ids):
            return None
        # If QEMU is on another host or in another container, a thread with that number is rarely a
        # QEMU's.
        if b"qemu" not in (folder / "cmdline").read_bytes().lower():
            return None
        # A QEMU that its guest has taken control of can report the thread ids of another QEMU.
        if pid in thread_ids or (peer is not None and not _listens(pid, peer)):
            return None
        return process_of(pid)
    except (OSError, ValueError, IndexError):
        return None


def find_by_uuid(uuid: str) -> Process | None:
    """Find the one QEMU on this host that was started with this `-uuid`, as libvirt starts them.

    Returns None if there is no such QEMU, or more than one.
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
    """The arguments that a process was started with; the first one is its program.

    Returns an empty list if the process has ended, if we may not look at it, or if a user other
    than us and root started it: that user chose the arguments, and we would start them with our
    rights.
    """
    try:
        # Check all its user ids: the caller of a setuid program chooses its arguments.
        if not _uids(process.pid) <= {0, os.geteuid()}:
            return []
        data = (_PROC / str(process.pid) / "cmdline").read_bytes()
        if _start_of(process.pid) != process.start:
            return []
    except (OSError, ValueError, IndexError):
        return []
    return [os.fsdecode(word) for word in data.removesuffix(b"\0").split(b"\0")] if data else []


def _uids(pid: int) -> set[int]:
    """The real, effective, saved and file system user ids. Raises OSError, ValueError."""
    text = (_PROC / str(pid) / "status").read_text()
    return {int(word) for word in text.partition("\nUid:")[2].split("\n", 1)[0].split()}


def folder_of(process: Process) -> str | None:
    """The folder that a process runs in.

    Returns None if we may not look at it, or if the folder is `/`: a process that has gone into the
    background is there.
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


def memory_in_use(process: Process) -> int | None:
    """Bytes of memory that a process uses, without the files that it has mapped. Never
    raises.
    """
    with suppress(OSError):
        found = _MEMORY.findall((_PROC / str(process.pid) / "status").read_bytes())
        return sum(map(int, found)) << 10 if found else None
    return None
