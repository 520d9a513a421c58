"""Generated agent answers, QMP messages and domain XML against what reads them.

Each ends in a result or a clear error, in bounded time and memory. hypothesis shows the first that
does not at its smallest.
"""

from __future__ import annotations

import resource
import time

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from scripts.soaking.targets import TARGETS, feed

#: How much more memory the whole run may take at its peak, MiB.
MEMORY = 300


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(examples: int, seed: int) -> int:
    """As many messages in all, as many to each target; figures on stdout."""
    for name, (strategy, _) in TARGETS.items():
        count = [0]
        before, began = peak(), time.monotonic()

        @seeded(seed)
        @settings(
            max_examples=examples // len(TARGETS),
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def one(message: object) -> None:
            count[0] += 1  # noqa: B023
            feed(name, message)  # noqa: B023

        one()
        grown = peak() - before
        print(
            f"{name}: {count[0]} messages, {time.monotonic() - began:.0f} s, memory +{grown:.0f}"
            " MiB",
            flush=True,
        )
        if grown > MEMORY:
            print(f"{name}: more than {MEMORY} MiB")
            return 1
    return 0
