"""QEMU's own deadlock at an unplug (`ppc64-tcg-unplug-deadlock` in docs/qemu-facts.md), known by its threads."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from tests.support import processes

#: No thread of a QEMU that works waits so long for the end of another, seconds.
_LONG: Final = 2.0
#: futex(2) on x86_64, and what pthread_join(3) does with it: the word has the number of the thread that is to end.
_FUTEX: Final = "202"
_JOIN: Final = "0x109"


class QemuDeadlocked(Exception):
    """The QEMU of this test waits for itself; the test says nothing about us, and is run once more."""


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
                if words[0] == _FUTEX and words[2] == _JOIN and int(words[3], 16) in threads - {thread}:
                    found.add((int(process.name), thread, int(words[3], 16)))
    return found


def _threads(process: Path) -> set[int]:
    with suppress(OSError):
        return {int(task.name) for task in (process / "task").iterdir()}
    return set()
