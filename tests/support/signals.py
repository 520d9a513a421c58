"""A command that is sent a signal at some moment of its life."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import Any

from tests.support.commands import Run
from tests.support.processes import send
from tests.support.shells import PROGRAM
from tests.support.waiting import within


async def interrupted_after(
    seconds: float, number: int, *words: str, environment: dict[str, str] | None = None
) -> Run:
    """Run a command, and send it a signal so long after its first line."""
    process = await asyncio.create_subprocess_exec(
        *(PROGRAM, *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | (environment or {}),
    )

    async def send_it() -> None:
        while not _handles_signals(process.pid) and process.returncode is None:
            await asyncio.sleep(0.0005)
        await asyncio.sleep(seconds)
        send(process, number)

    sender = asyncio.create_task(send_it())
    stdout, stderr = await within(process.communicate(), f"{words} ends")
    sender.cancel()
    assert process.returncode is not None
    return Run(process.returncode, stdout.decode(), stderr.decode())


def _handles_signals(pid: int) -> bool:
    """Whether a process handles SIGTERM (proc(5), SigCgt), which the interpreter alone does not."""
    with suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii") as file:
        rows: dict[str, Any] = dict(line.split(":", 1) for line in file)
        return bool(int(rows["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)
    return False
