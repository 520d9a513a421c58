"""scripts/fuzz [EXAMPLES]: as many messages in all, as many to each target; figures on stdout."""

from __future__ import annotations

import resource
import sys
import time

from hypothesis import HealthCheck, Phase, given, settings

from scripts.fuzzing.targets import TARGETS, feed

#: How much more memory the whole run may take at its peak, MiB.
MEMORY = 300


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    examples = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    for name, (strategy, _) in TARGETS.items():
        count = [0]
        before, began = peak(), time.monotonic()

        @settings(
            max_examples=examples // len(TARGETS),
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def fuzz(message: object) -> None:
            count[0] += 1  # noqa: B023
            feed(name, message)  # noqa: B023

        fuzz()
        grown = peak() - before
        print(
            f"{name}: {count[0]} messages, {time.monotonic() - began:.0f} s, memory +{grown:.0f} MiB", flush=True
        )
        if grown > MEMORY:
            print(f"{name}: more than {MEMORY} MiB")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
