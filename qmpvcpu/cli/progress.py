"""Progress on stderr, for what takes long, on a terminal only."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

__all__ = ["waiting"]

#: What ends sooner needs no progress, seconds.
_PATIENCE: Final = 1.0


@asynccontextmanager
async def waiting(what: str, limit: float | None = None) -> AsyncIterator[None]:
    """While the body takes more than a second, one line that counts the seconds of `limit`; then it is wiped."""
    if not sys.stderr.isatty():
        yield
        return
    ticker = asyncio.create_task(_tick(what, limit))
    try:
        yield
    finally:
        ticker.cancel()
        with suppress(asyncio.CancelledError):
            await ticker


async def _tick(what: str, limit: float | None) -> None:
    seconds = 0
    try:
        while True:
            await asyncio.sleep(_PATIENCE)
            seconds += 1
            text = f"{seconds} of {limit:g} s" if limit is not None else f"{seconds} s"
            print(f"\r{what}: {text} ", end="", file=sys.stderr, flush=True)
    finally:
        if seconds:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
