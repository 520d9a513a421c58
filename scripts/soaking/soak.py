"""What a soak is, and the kind that most are: one test of the suite, with another count and seed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.soaking import COUNT, SEED

TOP = Path(__file__).parents[2]


@dataclass(frozen=True)
class Soak:
    summary: str
    #: How much of it, where the command line does not say.
    count: int
    #: Count and seed -> exit code.
    run: Callable[[int, int], int]
    #: Words of scripts/setup.
    needs: tuple[str, ...] = ()


def environment(count: int | None, seed: int) -> dict[str, str]:
    """What tests read their count and their seed from; sets have one order for each seed."""
    given = os.environ | {"PYTHONHASHSEED": str(seed % 2**32)}
    return given if count is None else given | {COUNT: str(count), SEED: str(seed)}


def tests(*targets: str, **more: str) -> Callable[[int, int], int]:
    """A soak of these tests, which ask `tests.support.soaking` how often; `more`: for their
    environment.
    """

    def run(count: int, seed: int) -> int:
        # One test is as long as the count makes it.
        words = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "0", *targets]
        return subprocess.run(words, cwd=TOP, env=environment(count, seed) | more).returncode

    return run
