"""All tests while two other processes keep the CPUs busy: a test that counts on time fails here."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from scripts.soaking.soak import TOP, environment


@contextmanager
def load(processes: int = 2) -> Iterator[None]:
    """Processes that do nothing, all the time. The kernel ends them with this one, however it ends."""
    words = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(words) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def busy(runs: int, seed: int) -> int:
    with load():
        for number in range(1, runs + 1):
            began = time.monotonic()
            with subprocess.Popen(
                [TOP / "scripts" / "test", "only"],
                env=environment(None, seed),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as run:
                assert run.stdout is not None
                lines = [line.rstrip() for line in run.stdout]
            ends = [line.strip("= ") for line in lines if re.search(r" in \d", line)] or ["no test"]
            print(
                f"run {number} of {runs}: {ends[-1]}; {time.monotonic() - began:.0f} s", flush=True
            )
            if run.returncode:
                print("\n".join(lines))
                return 1
    return 0
