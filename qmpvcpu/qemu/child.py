"""A process of our own that is waited for through its pidfd.

asyncio of Python 3.11 starts a thread for each child, which costs 2 ms of a throwaway QEMU's 50; this needs
neither that nor a signal handler.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Sequence
from typing import IO


class Child:
    """A running process, until `wait()` has returned."""

    def __init__(self, words: Sequence[str], stderr: IO[bytes], descriptors: Sequence[int]) -> None:
        """Start it, with nothing on stdin and stdout. Raises OSError."""
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=descriptors,
        )
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._end)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, below 0 the signal that ended it; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self._process.kill()

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        await self._ended.wait()
        return self._process.wait()

    def _end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._ended.set()
