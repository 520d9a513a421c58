"""The command line as a shell starts it: with redirections, limits and an environment of its own."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from typing import Any

from tests.support.commands import Run

#: As a user types it.
PROGRAM = os.path.join(os.path.dirname(sys.executable), "qmpvcpu")

#: What no user should ever see.
NOISE = (
    "Traceback",
    "Exception ignored",
    "internal error",
    "a bug of",
    "Fatal Python error",
    "never retrieved",
)


async def shell(words: str, *arguments: str, **environment: str) -> Run:
    """Run a line of bash; `qmpvcpu` in it is the program of this tree, `$1` … are the arguments."""
    text = f'set -o pipefail; qmpvcpu() {{ {shlex.quote(PROGRAM)} "$@"; }}; {words}'
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", text, "bash", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | environment,
    )
    stdout, stderr = await process.communicate()
    assert process.returncode is not None
    run = Run(
        process.returncode,
        stdout.decode(errors="surrogateescape"),
        stderr.decode(errors="surrogateescape"),
    )
    assert not noise(run.stderr), run.stderr
    return run


def noise(text: str) -> list[Any]:
    """What of it no user should see."""
    return [word for word in NOISE if word in text]
