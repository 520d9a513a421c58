"""How much disk and memory this host has for a saved guest, and how much a guest uses. No function
raises.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final

from qmpvcpu.host.process import Process

#: proc(5), /proc/PID/status, in KiB: anonymous memory, shared memory, huge pages, and swapped
#: memory.
_OWN: Final = re.compile(rb"^(?:RssAnon|RssShmem|HugetlbPages|VmSwap):\s+([0-9]+) kB$", re.MULTILINE)
_AVAILABLE: Final = re.compile(rb"^MemAvailable:\s+([0-9]+) kB$", re.MULTILINE)


def free_disk(folder: Path) -> int | None:
    """Bytes that we can write to the file system of a folder."""
    with suppress(OSError):
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize
    return None


def free_memory() -> int | None:
    """Bytes that a new process can have without swapping; proc(5), /proc/meminfo."""
    with suppress(OSError):
        match = _AVAILABLE.search(Path("/proc/meminfo").read_bytes())
        return int(match[1]) << 10 if match is not None else None
    return None


def memory_in_use(process: Process) -> int | None:
    """Bytes of memory that a process uses, without the files that it has mapped."""
    with suppress(OSError):
        found = _OWN.findall(Path(f"/proc/{process.pid}/status").read_bytes())
        return sum(map(int, found)) << 10 if found else None
    return None
