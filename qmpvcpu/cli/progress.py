"""Progress of slow operations on stderr, if it is a terminal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Final

from qmpvcpu.cli import render

if TYPE_CHECKING:
    from qmpvcpu.cli.output import Output
    from qmpvcpu.core.migration.status import MigrationStatus, Progress

#: Seconds before the first progress is shown.
_PATIENCE: Final = 1.0
#: Seconds between two updates of the progress of a transfer.
_TICK: Final = 0.2


@asynccontextmanager
async def waiting(output: Output, what: str, limit: float | None = None) -> AsyncIterator[None]:
    """While the body runs for more than a second, show a line that counts the seconds up to
    `limit`; then erase it.
    """
    if not output.shows_progress:
        yield
        return
    ticker = asyncio.create_task(_tick(output, what, limit))
    try:
        yield
    finally:
        ticker.cancel()
        with suppress(asyncio.CancelledError):
            await ticker


async def _tick(output: Output, what: str, limit: float | None) -> None:
    seconds = 0
    try:
        while True:
            await asyncio.sleep(_PATIENCE)
            seconds += 1
            text = f"{seconds} of {limit:g} s" if limit is not None else f"{seconds} s"
            output.progress(f"\r{what}: {text} ")
    finally:
        if seconds:
            output.progress("\r\x1b[K")


@contextmanager
def transfer(output: Output) -> Iterator[Progress | None]:
    """Show bytes, percent and downtime on one line of a terminal, and erase the line at the end."""
    if not output.shows_progress:
        yield None
        return
    last = 0.0

    def show(status: MigrationStatus) -> None:
        nonlocal last
        if (now := time.monotonic()) >= last + _TICK:
            last = now
            output.progress(f"\r\x1b[Kmigrating: {render.status(status)} ")

    try:
        yield show
    finally:
        output.progress("\r\x1b[K")
