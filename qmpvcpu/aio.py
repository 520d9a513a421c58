"""How a cancel is put off: work that must not stop in the middle is finished first, then CancelledError goes on.

The work runs in a task of its own, which nobody has cancelled. So `asyncio.timeout` works in it in every Python
(before 3.11.3 it does not in a task that is being cancelled), and the caller's own count of cancels stays as it
is: by that `asyncio.timeout` and `asyncio.TaskGroup` around the call tell whose cancel it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

__all__ = ["finish", "wind_up"]

T = TypeVar("T")

#: Work that was left before its end. The event loop alone would let it be collected as garbage.
_LEFT: Final[set[asyncio.Future[Any]]] = set()


async def finish(
    work: Awaitable[T],
    *,
    within: float | None = None,
    on_cancel: Callable[[], object] = lambda: None,
    discard: Callable[[T], object] = lambda _: None,
) -> T:
    """Await `work` to its end, however often the caller is cancelled.

    Args:
        work: a coroutine, or a task or future that is the caller's own.
        within: seconds that the work has after a first cancel. Then, or at a second cancel, it is cancelled and
            left. None: the work is always awaited to its end.
        on_cancel: called at the first cancel, while the work goes on.
        discard: called with the value of the work if the caller, being cancelled, does not get it; must not raise.

    Returns:
        What the work returns.

    Raises:
        CancelledError: the caller was cancelled, once the work has ended; its cause is the work's own error, if it
            failed.
        Exception: the work's own.
    """
    task = asyncio.ensure_future(work)
    cancelled = await _cancelled_before_end(task)
    if cancelled is None:
        return task.result()
    on_cancel()
    if within is not None:
        await _cancelled_before_end(task, within)
        if not task.done():
            _leave(task, discard)
            raise cancelled
    while not task.done():
        await _cancelled_before_end(task)
    failure = None if task.cancelled() else task.exception()
    if failure is None and not task.cancelled():
        discard(task.result())
    raise cancelled from failure


async def wind_up(work: Coroutine[Any, Any, object]) -> BaseException | None:
    """After the caller was cancelled: await what is still to be done. A further cancel is passed on to it.

    Returns:
        Why it did not come to its end, for `raise cancelled from …`: its own error, or CancelledError.
    """
    task = asyncio.create_task(work)
    while not task.done():
        if await _cancelled_before_end(task) is not None:
            task.cancel()
    try:
        task.result()
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the caller raises it
        return error
    return None


async def _cancelled_before_end(
    task: asyncio.Future[Any], seconds: float | None = None
) -> asyncio.CancelledError | None:
    """Wait until it has ended, `seconds` have passed, or the caller is cancelled: that error."""
    try:
        await asyncio.wait((task,), timeout=seconds)
    except asyncio.CancelledError as error:
        return error
    return None


def _leave(task: asyncio.Future[T], discard: Callable[[T], object]) -> None:
    """Cancel it, and await it no longer."""

    def ended(task: asyncio.Future[T]) -> None:
        _LEFT.discard(task)
        # Its error is looked at here, so that asyncio does not log it as never retrieved.
        if not task.cancelled() and task.exception() is None:
            discard(task.result())

    _LEFT.add(task)
    task.add_done_callback(ended)
    task.cancel()
