"""What a process holds that somebody has to give back: tasks, descriptors, children, files of a
folder.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.waiting import until


def held(*folders: Path) -> Counter[str]:
    """Each as a word, with how many there are; the task that asks is not counted."""
    found: Counter[str] = Counter()
    current = asyncio.current_task()
    found["tasks"] = sum(task is not current and not task.done() for task in asyncio.all_tasks())
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that lists them
            continue
        found[target.partition(":[")[0]] += 1
    pid = os.getpid()
    found["children"] = len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    for folder in folders:
        found.update(
            str(path.relative_to(folder.parent)) for path in folder.rglob("*") if path.is_file()
        )
    return found


@asynccontextmanager
async def nothing_left(*folders: Path) -> AsyncIterator[None]:
    """What the body has opened is closed again in a moment: asyncio closes a transport in the
    loop's next turn.
    """
    before = held(*folders)
    yield
    await until(
        lambda: held(*folders) <= before, "nothing is left behind: " + str(held(*folders) - before)
    )
