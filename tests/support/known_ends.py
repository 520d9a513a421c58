"""Two defects that end a ppc64 QEMU now and then at an unplug, on a busy host: what only they look
like.

They are `ppc64-tcg-unplug-deadlock` and `ppc64-tcg-unplug-race` in docs/qemu-facts.md.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from tests.support import processes

if TYPE_CHECKING:
    from tests.support.qemus import Qemu

#: No thread of a QEMU that works waits so long for the end of another, seconds.
_LONG: Final = 2.0
#: futex(2) on x86_64, and what pthread_join(3) does with it: the word has the number of the thread
#: that is to end.
_FUTEX: Final = "202"
_JOIN: Final = "0x109"


#: It finds its memory damaged, or does not.
_CRASHES: Final = (-signal.SIGABRT, -signal.SIGSEGV)
_QEMUS: WeakSet[Qemu] = WeakSet()


class KnownEnd(Exception):
    """The QEMU of this test has ended by a defect that nobody can avoid: the test is run once more."""


def note(qemu: Qemu) -> None:
    """This one is looked at as long as somebody has it."""
    _QEMUS.add(qemu)


def known_end() -> str | None:
    """How a QEMU of this test run has ended, if a known defect did it; one that waits for itself is
    killed.
    """
    for pid in deadlocked():
        os.kill(pid, signal.SIGKILL)
        return f"a thread of process {pid} waited for another that does not end"
    for qemu in _QEMUS:
        if qemu.arch == "ppc64" and qemu.exit_code in _CRASHES:
            return f"QEMU ended with code {qemu.exit_code}: {qemu.stderr()}"
    return None


def deadlocked() -> list[int]:
    """The processes of this test run in which one thread waits for another that does not end."""
    joins = _joins()
    if joins:
        time.sleep(_LONG)
        joins &= _joins()
    return sorted({pid for pid, _, _ in joins})


def _joins() -> set[tuple[int, int, int]]:
    """(process, thread, thread that it waits for) of each pthread_join."""
    found = set()
    for process in processes.of_this_run():
        threads = _threads(process)
        for thread in threads:
            with suppress(OSError):
                words = (process / "task" / str(thread) / "syscall").read_text().split()
                if (
                    words[0] == _FUTEX
                    and words[2] == _JOIN
                    and int(words[3], 16) in threads - {thread}
                ):
                    found.add((int(process.name), thread, int(words[3], 16)))
    return found


def _threads(process: Path) -> set[int]:
    with suppress(OSError):
        return {int(task.name) for task in (process / "task").iterdir()}
    return set()
