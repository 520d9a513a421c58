"""Fixtures of all tests: a state folder of their own, and the proof that no process is left behind."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator

import pytest

from tests.support import commands, processes
from tests.support.known_ends import KnownEnd, known_end

processes.mark()

#: Pending unplugs of the tests stay among themselves; the folder goes with the process.
_STATE = tempfile.TemporaryDirectory(prefix="qmpvcpu-test-state-")
os.environ["QMPVCPU_STATE"] = _STATE.name

#: As on a user's machine, a command that the tests run compiles no module that an earlier one has
#: compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

#: Seconds of the tests of each folder.
_SECONDS: Counter[str] = Counter()
_BEGAN = time.monotonic()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _SECONDS["/".join(report.nodeid.split("/")[:2])] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    each = "".join(f"{folder} {seconds:.0f} s, " for folder, seconds in sorted(_SECONDS.items()))
    terminalreporter.write_line(
        f"time by folder: {each}in all {time.monotonic() - _BEGAN:.0f} s by the clock"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=KnownEnd.__name__))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """A test that failed because its QEMU has a known defect is run once more, and the summary says
    so.
    """
    try:
        return (yield)
    except BaseException as error:
        if (end := known_end()) is None:
            raise
        raise KnownEnd(end) from error


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left_behind() -> Iterator[None]:
    yield
    commands.end()
    assert not processes.survivors()
