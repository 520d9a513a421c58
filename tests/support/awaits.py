"""A call that is cancelled: at the n-th of its awaits, where it lets the event loop go on, or at
some time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any


class _Stepped:
    """Awaits a coroutine, and cancels its task when that waits for the `at`-th time."""

    def __init__(self, work: Coroutine[Any, Any, Any], at: int) -> None:
        self._work = work
        self._at = at
        self.awaits = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        step, given = self._work.send, None
        while True:
            try:
                waits_for = step(given)
            except StopIteration as end:
                return end.value
            self.awaits += 1
            if self.awaits == self._at:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            try:
                step, given = self._work.send, (yield waits_for)
            except BaseException as error:
                step, given = self._work.throw, error  # type: ignore[assignment]


async def cancelled_at(work: Coroutine[Any, Any, Any], number: int) -> Any:
    """Carry it out, cancelled at that await (from 1); what it returns, if it came to its end
    before.

    Raises CancelledError, and what the call raises.
    """
    return await asyncio.create_task(_run(_Stepped(work, number)))


async def awaits_of(work: Coroutine[Any, Any, Any]) -> int:
    """Carry it out; how many awaits it has."""
    stepped = _Stepped(work, 0)
    await asyncio.create_task(_run(stepped))
    return stepped.awaits


async def cancelled_after(work: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """The same, cancelled at that time."""
    task = asyncio.create_task(work)
    timer = asyncio.get_running_loop().call_later(seconds, task.cancel)
    try:
        return await task
    finally:
        timer.cancel()


async def _run(stepped: _Stepped) -> Any:
    return await stepped
