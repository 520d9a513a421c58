"""A child process whose end is noticed through its pidfd.

asyncio of Python 3.11 starts a thread for each child, which takes 2 of the 50 ms of a throwaway
QEMU. A pidfd needs neither a thread nor a signal handler.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Sequence
from typing import IO


class Child:
    """A child process; it must be waited for with `wait()`."""

    def __init__(self, words: Sequence[str], stderr: IO[bytes], descriptors: Sequence[int]) -> None:
        """Start it with /dev/null as stdin and stdout. Raises OSError."""
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
        """Its exit code, or minus the number of the signal that ended it; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self._process.kill()

    async def wait(self) -> int:
        """Wait until it has ended; returns its exit code."""
        await self._ended.wait()
        return self._process.wait()

    def _end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._ended.set()
