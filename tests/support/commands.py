"""The command line, run as a user does, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.support.zygote import Zygote


@dataclass
class Run:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


async def start_cli(*arguments: str, **options: Any) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "qmpvcpu",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        **options,
    )


@cache
def _zygote() -> Zygote:
    return Zygote()


def end() -> None:
    """End what is there for the commands to come."""
    if _zygote.cache_info().currsize:
        _zygote().close()
        _zygote.cache_clear()


async def cli(*arguments: str, **options: Any) -> Run:
    """Run the command line as a user does; its exit code and output. Without `options` it is
    forked.
    """
    if options:
        process = await start_cli(*arguments, **options)
        stdout, stderr = await process.communicate()
        assert process.returncode is not None
        code = process.returncode
    else:
        code, stdout, stderr = await _zygote().run(arguments)
    return _checked(code, stdout, stderr)


async def cli_in(environment: Mapping[str, str], *arguments: str) -> Run:
    """`cli` with these variables in its environment too."""
    return _checked(*await _zygote().run(arguments, environment))


def _checked(code: int, stdout: bytes, stderr: bytes) -> Run:
    run = Run(code, stdout.decode(), stderr.decode())
    assert "Traceback" not in run.stderr, run.stderr
    return run
