"""How often a test repeats itself: a sample in the suite, and as often as `scripts/soak` says in a
long run.
"""

from __future__ import annotations

import os

#: Variables of the environment.
COUNT, SEED = "QMPVCPU_SOAK_COUNT", "QMPVCPU_SOAK_SEED"


def count(sample: int) -> int:
    """Repetitions: `sample` in the suite."""
    return int(os.environ.get(COUNT, sample))


def is_long_run() -> bool:
    """Whether it is `scripts/soak` that runs the test."""
    return COUNT in os.environ


def seed(usual: int = 0) -> int:
    """Of random numbers: `usual` in the suite, so that a failure there comes again."""
    return int(os.environ.get(SEED, usual))
