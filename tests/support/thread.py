"""An event loop in a thread of its own, for servers beside code that has the main thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

from tests.support.waiting import DEADLINE


class ServerThread:
    """Runs fakes for as long as it is open."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fakes", daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE)

    def enter(self, server: AbstractAsyncContextManager[Any]) -> Any:
        """Start a server; what it yields."""
        return self._run(self._stack.enter_async_context(server))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in that thread, where the fakes live."""

        async def body() -> Any:
            return function(*arguments)

        return self._run(body())

    def leave_all(self) -> None:
        """Stop every server."""
        self._run(self._stack.aclose())

    def close(self) -> None:
        self.leave_all()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE)
        self._loop.close()
