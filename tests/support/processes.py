"""Processes of this test run, which are found wherever they went."""

from __future__ import annotations

import os
import uuid
from asyncio.subprocess import Process
from contextlib import suppress
from pathlib import Path

#: Every process that a test starts inherits this.
RUN_MARK = f"QMPVCPU_TEST_RUN={uuid.uuid4().hex}"


def mark() -> None:
    """From now on what this process starts is found."""
    name, _, value = RUN_MARK.partition("=")
    os.environ[name] = value


def send(process: Process, number: int) -> None:
    """Send a process of asyncio's a signal, if it still runs.

    Its own `send_signal` reaps a process that has just ended; asyncio then reports exit code 255
    (Python 3.11).
    """
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def of_this_run() -> list[Path]:
    """Their folders in /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        with suppress(OSError):
            if RUN_MARK.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder)
    return found


def survivors() -> list[str]:
    found = []
    for folder in of_this_run():
        with suppress(OSError):
            found.append(f"{folder.name}: {(folder / 'cmdline').read_bytes()[:200]!r}")
    return found
