"""Fixtures of all tests: QEMUs by version, the command line, and the proof that no process is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.app.cache import cache_folder

#: Every process that a test starts inherits this, so a survivor is found wherever it went.
RUN_MARK = f"QMPVCPU_TEST_RUN={uuid.uuid4().hex}"
os.environ[RUN_MARK.split("=")[0]] = RUN_MARK.split("=")[1]

#: Pending unplugs of the tests stay among themselves; the folder goes with the process.
_STATE = tempfile.TemporaryDirectory(prefix="qmpvcpu-test-state-")
os.environ["QMPVCPU_STATE"] = _STATE.name

#: Seconds of the tests of each folder.
_SECONDS: Counter[str] = Counter()
_BEGAN = time.monotonic()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _SECONDS["/".join(report.nodeid.split("/")[:2])] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    each = "".join(f"{folder} {seconds:.0f} s, " for folder, seconds in sorted(_SECONDS.items()))
    terminalreporter.write_line(f"time by folder: {each}in all {time.monotonic() - _BEGAN:.0f} s by the clock")


VERSIONS = ("7.2", "10.0", "11.1")
#: Tests may have a cache of their own, and still these QEMUs.
QEMUS = cache_folder() / "qemu"


def qemu_binary(version: str, arch: str) -> str:
    path = QEMUS / version / "bin" / f"qemu-system-{arch}"
    if not path.exists():
        pytest.fail(f"QEMU {version} for {arch} is not here: scripts/setup qemu")
    return str(path)


def group(arch: str, version: str) -> pytest.MarkDecorator:
    """Tests of one architecture and version run on one xdist worker and share its booted guest."""
    return pytest.mark.xdist_group(f"{arch}-{version}")


def matrix(*cells: tuple[str, str]) -> Any:
    """Parametrize `arch, version`, each cell in its xdist group."""
    return pytest.mark.parametrize(
        ("arch", "version"), [pytest.param(a, v, marks=group(a, v), id=f"{a}-{v}") for a, v in cells]
    )


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


async def cli(*arguments: str, **options: Any) -> Run:
    """Run the command line as a user does; its exit code and output."""
    process = await start_cli(*arguments, **options)
    stdout, stderr = await process.communicate()
    assert process.returncode is not None
    run = Run(process.returncode, stdout.decode(), stderr.decode())
    assert "Traceback" not in run.stderr, run.stderr
    return run


def survivors() -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        with suppress(OSError):
            if RUN_MARK.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(f"{folder.name}: {(folder / 'cmdline').read_bytes()[:200]!r}")
    return found


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left_behind() -> Iterator[None]:
    yield
    assert not survivors()
