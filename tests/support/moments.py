"""Moments of a call at which a test steps in: to do something there, to end this process, or to
answer instead.

A moment is a point that a user can describe, whatever function stands there.
"""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from qmpvcpu.core.migration.who_runs import Destination
from qmpvcpu.domain import definition as persistent
from qmpvcpu.domain import placement as place
from qmpvcpu.domain import run
from qmpvcpu.domain.hotplug import Hotplug
from qmpvcpu.domain.migration import Migration, phases, sides
from qmpvcpu.host.affinity import QemuThreads
from qmpvcpu.host.savefile import Saving

_MOMENTS: dict[str, tuple[Any, str]] = {
    "there is room for the groups": (place.ThreadPlacement, "room"),
    "QEMU plugs": (Hotplug, "run"),
    "QEMU is done": (run, "_wait_groups_removed"),
    "the definition is written": (persistent.ConfigChange, "commit"),
    "a thread is placed": (QemuThreads, "place"),
    "the guest goes into the file": (sides, "send_to_file"),
    "the file is synced": (Saving, "sync"),
    "the file is sealed": (Saving, "seal"),
    "a second QEMU reads the file": (Migration, "read_saved"),
    "the file gets its name": (Saving, "finish"),
    "the destination is prepared": (Migration, "prepare"),
    "the guest goes to the destination": (sides, "send"),
    "the destination has all": (phases, "arrive"),
    "the destination runs": (sides, "let_run"),
    "the source ends": (sides, "end"),
}
Act = Callable[[], Any]


@contextmanager
def around(moment: str, *, before: Act | None = None, after: Act | None = None) -> Iterator[None]:
    """Do something before that moment's step, and after it. A function may be a coroutine function."""
    where, name = _MOMENTS[moment]
    step = getattr(where, name)

    if inspect.iscoroutinefunction(step):

        async def hooked(*given: Any, **more: Any) -> Any:
            await _do(before)
            found = await step(*given, **more)
            await _do(after)
            return found

    else:

        def hooked(*given: Any, **more: Any) -> Any:
            if before is not None:
                before()
            found = step(*given, **more)
            if after is not None:
                after()
            return found

    with patch.object(where, name, hooked):
        yield


def before(moment: str, act: Act) -> Any:
    return around(moment, before=act)


def die(moment: str, *, after: bool = False) -> None:
    """From now on this process ends at that moment, at once, with exit code 9."""
    # Kept, or its end would take it back.
    _kept.append(around(moment, **{"after" if after else "before": lambda: os._exit(9)}))
    _kept[-1].__enter__()


def interrupt(moment: str) -> None:
    """From now on somebody presses Ctrl-C at that moment."""
    _kept.append(around(moment, before=lambda: os.kill(os.getpid(), signal.SIGINT)))
    _kept[-1].__enter__()


_kept: list[Any] = []


@contextmanager
def destination_cannot_be_told() -> Iterator[None]:
    """The destination is let run, and does not answer."""

    async def unknown(link: Any, cookie: Any) -> Any:
        await link.monitor.cont()
        return Destination.UNKNOWN, "no answer"

    with patch.object(sides, "let_run", unknown):
        yield


async def _do(act: Act | None) -> None:
    if act is not None:
        found = act()
        if inspect.isawaitable(found):
            await found
