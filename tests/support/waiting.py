"""A test waits for a condition, never for a duration. Its only clock is a generous deadline."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

#: Seconds. Only a failing test waits this long, so it is generous.
DEADLINE = 60


async def until(
    condition: Callable[[], Any], what: str, *, every: float = 0.01, seconds: float = DEADLINE
) -> Any:
    """Ask `condition` (a function or a coroutine function) until its answer is true, and return
    that answer.

    `every=0` asks at each turn of the event loop. After `seconds` the test fails with `what` and
    the last answer.
    """
    end = time.monotonic() + seconds
    while True:
        answer = condition()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < end, f"not within {seconds} s: {what}; last seen: {answer!r}"
        await asyncio.sleep(every)


def until_blocking(condition: Callable[[], Any], what: str, *, seconds: float = DEADLINE) -> Any:
    """`until` for code without an event loop."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}; last seen: {answer!r}"
        time.sleep(0.01)
    return answer


@asynccontextmanager
async def deadline(what: str, seconds: float = DEADLINE) -> AsyncIterator[None]:
    """The body ends within `seconds`, or the test fails with `what`."""
    clock = asyncio.timeout(seconds)
    try:
        async with clock:
            yield
    except TimeoutError as error:
        if not clock.expired():
            raise
        raise AssertionError(f"not within {seconds} s: {what}") from error


async def within(awaitable: Awaitable[Any], what: str, seconds: float = DEADLINE) -> Any:
    """The result of `awaitable`, which comes within `seconds`, or the test fails with `what`."""
    async with deadline(what, seconds):
        return await awaitable
