"""Many points at which something happens to a command, each in a world of its own, some worlds at a
time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from traceback import format_tb
from typing import TypeVar

from tests.support import soaking

W = TypeVar("W")
P = TypeVar("P")
#: Worlds at a time in a long run.
LANES = 3


async def meet_all(
    points: Iterable[P],
    world: Callable[[], AbstractAsyncContextManager[W]],
    meet: Callable[[W, P], Awaitable[None]],
    *,
    lanes: int = LANES,
    keeps: bool = True,
) -> None:
    """Call `meet` for each point. What is wrong fails the test at once, in a long run when all have
    been met.

    Args:
        points: in their order.
        world: makes one; with `keeps` the next point has it too, unless something was wrong.
        meet: raises AssertionError.
        lanes: worlds at a time, in a long run.
        keeps: see `world`.
    """
    left = iter(points)
    wrong: list[str] = []

    async def lane() -> None:
        async with AsyncExitStack() as stack:
            one: W | None = None
            for point in left:
                if one is None:
                    one = await stack.enter_async_context(world())
                try:
                    await meet(one, point)
                except AssertionError as error:
                    if not soaking.is_long_run():
                        raise
                    wrong.append(f"{point}: {error}\n{''.join(format_tb(error.__traceback__))}")
                    print("WRONG", wrong[-1][:4000], flush=True)
                    one = None
                if one is None or not keeps:
                    await stack.aclose()
                    one = None

    await asyncio.gather(*(lane() for _ in range(lanes if soaking.is_long_run() else 1)))
    assert not wrong, f"{len(wrong)} points: " + "\n".join(wrong)[:20000]
