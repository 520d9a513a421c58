"""Delay a cancel: work that must not stop in the middle is finished first, and then CancelledError
continues.

The work runs in its own task, which is not cancelled. So `asyncio.timeout` works in it in every
Python version (before 3.11.3 it does not work in a task that is being cancelled), and the caller's
count of cancels does not change. `asyncio.timeout` and `asyncio.TaskGroup` around the call need
this count to know whose cancel it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

#: Tasks that were left before they finished. The event loop alone would let them be
#: garbage-collected.
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
        work: a coroutine, or a task or future that only the caller uses.
        within: seconds that the work has after the first cancel. After that, or at a second cancel,
            the work is cancelled and not awaited any more. None: the work is always awaited to its
            end.
        on_cancel: called at the first cancel, while the work continues.
        discard: called with the value of the work if the caller was cancelled and does not get it;
            must not raise.

    Returns:
        What the work returns.

    Raises:
        CancelledError: the caller was cancelled. It is raised when the work has ended; its cause is
            the error of the work, if that failed.
        Exception: the error of the work.
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
    """Await the remaining work after the caller was cancelled. A further cancel is passed on to the
    work.

    Returns:
        Why the work did not finish, for `raise cancelled from …`: its own error, or CancelledError.
        None if it finished.
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
    """Wait until the task has ended or `seconds` have passed. If the caller is cancelled first,
    return that error.
    """
    try:
        await asyncio.wait((task,), timeout=seconds)
    except asyncio.CancelledError as error:
        return error
    return None


def _leave(task: asyncio.Future[T], discard: Callable[[T], object]) -> None:
    """Cancel the task without awaiting it."""

    def ended(task: asyncio.Future[T]) -> None:
        _LEFT.discard(task)
        # Retrieve the error, so that asyncio does not log it as never retrieved.
        if not task.cancelled() and task.exception() is None:
            discard(task.result())

    _LEFT.add(task)
    task.add_done_callback(ended)
    task.cancel()
