"""scripts/soak NAME [COUNT] [--seed N]."""

from __future__ import annotations

import argparse
import secrets
import subprocess
import sys

from scripts.soaking.busy import busy
from scripts.soaking.fuzz import fuzz
from scripts.soaking.soak import TOP, Soak, tests
from tests.support.plain_client import PLAIN

#: What goes through a monitor or the engine. `test_fast_client.py` is about the tricks themselves.
PLAIN_TESTS = (
    *(
        "tests/unit/test_monitor.py",
        "tests/unit/test_monitor_anything.py",
        "tests/unit/test_listen.py",
    ),
    *(
        "tests/unit/test_transaction.py",
        "tests/unit/test_transaction_effects.py",
        "tests/unit/test_oracle.py",
    ),
    *("tests/unit/test_unplug.py", "tests/unit/test_cancel.py", "tests/unit/test_domain.py"),
    *("tests/unit/test_cases.py", "tests/unit/test_hostile.py", "tests/qemu/test_setvcpu_real.py"),
    *("tests/qemu/test_recorded_real.py", "tests/qemu/test_leaving_real.py"),
)

#: A new one is a line here, and a test that repeats itself or a function in a file of this package.
SOAKS = {
    "busy": Soak(
        "all tests, COUNT times in a row while both CPUs are busy",
        3,
        busy,
        needs=("qemu", "guests"),
    ),
    "claims": Soak(
        "the first COUNT command lines through save, restore and migrate: the same machine with"
        " its memory",
        40,
        tests("tests/qemu/test_claim_real.py", "-k", "saved_restored_and_migrated"),
        needs=("qemu",),
    ),
    "cancels": Soak(
        "COUNT calls that are cancelled, at each of their awaits and at any time: what is told"
        " afterwards",
        1500,
        tests("tests/qemu/test_cancels_real.py"),
        needs=("qemu",),
    ),
    "counts": Soak(
        "COUNT sequences of requests on random guests, and a fiftieth of it on a real QEMU: how"
        " many vCPUs are"
        " enabled at once and in the end",
        10_000,
        tests("tests/unit/test_count_sequences.py", "tests/qemu/test_counts_real.py"),
        needs=("qemu",),
    ),
    "endurance": Soak(
        "COUNT plugs and unplugs over one connection and a fifth as many connects, watched all the"
        " while: nothing"
        " grows, and every event is told",
        10_000,
        tests("tests/qemu/test_endurance_real.py", "-s"),
        needs=("qemu",),
    ),
    "fight": Soak(
        "COUNT calls of two processes of ours and a bare QMP client that fight over the same vCPUs",
        500,
        tests("tests/qemu/test_fight_real.py"),
        needs=("qemu",),
    ),
    "fuzz": Soak("COUNT generated messages and documents against what reads them", 200_000, fuzz),
    "guests": Soak(
        "the tests of hotplug on Linux guests, on each version of QEMU",
        1,
        tests("tests/guest/test_whole_call_guest.py", "tests/guest/test_unplug_real.py"),
        needs=("qemu", "guests"),
    ),
    "hostile": Soak(
        "COUNT answers of a hostile QEMU, as many of a hostile guest agent, and shapes that a"
        " person thinks of:"
        " each call ends in time and memory, and claims nothing that was not said",
        200_000,
        tests("tests/unit/test_hostile.py", "tests/unit/test_hostile_shapes.py", "-s"),
    ),
    "kills": Soak(
        "a process killed at COUNT random moments while it writes a definition; each command that"
        " changes"
        " something, killed at each of its effects and at COUNT/5 moments; its QEMU killed at"
        " COUNT*3/10",
        1000,
        tests(
            "tests/app/test_kills.py::test_killed_at_random_moments",
            "tests/qemu/test_kills_real.py",
            "-s",
        ),
        needs=("qemu",),
    ),
    "leaks": Soak(
        "each command that starts or ends a QEMU, cancelled at COUNT of its awaits: nothing is"
        " left behind",
        200,
        tests("tests/qemu/test_nothing_left_real.py"),
        needs=("qemu",),
    ),
    "oracle": Soak(
        "COUNT generated requests, answers and moments: the transaction does what that of"
        " `house-0` did",
        20_000,
        tests("tests/unit/test_oracle.py"),
    ),
    "plain": Soak(
        "the tests of monitor and engine without our tricks for speed: COUNT answers of a hostile"
        " QEMU and COUNT"
        " requests of the oracle are among them",
        20_000,
        tests(*PLAIN_TESTS, **{PLAIN: "1"}),
        needs=("qemu",),
    ),
    "signals": Soak(
        "COUNT commands that are sent Ctrl-C or TERM at a random moment: one JSON document and a"
        " true exit code",
        1000,
        tests("tests/unit/test_signals.py", "-k", "any_moment"),
    ),
    "smp": Soak(
        "COUNT generated -machine, -smp and -numa: what we make of them against real QEMUs",
        5000,
        tests("tests/qemu/test_smp_real.py", "-s"),
        needs=("qemu",),
    ),
    "stops": Soak(
        "QEMU stopped at COUNT effects of commands, libvirtd at as many: each command ends by its"
        " deadline",
        100,
        tests("tests/qemu/test_stops_real.py", "-s"),
        needs=("qemu",),
    ),
    "trips": Soak(
        "each Linux guest migrated COUNT times in a row",
        10,
        tests("tests/guest/test_migrate_guest.py::test_round_trips"),
        needs=("qemu", "guests"),
    ),
}


def main() -> int:
    names = "\n".join(
        f"  {name:8} {soak.summary} (COUNT: {soak.count})" for name, soak in SOAKS.items()
    )
    parser = argparse.ArgumentParser(
        prog="scripts/soak", epilog=names, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", choices=SOAKS, help="one of those below")
    parser.add_argument("count", metavar="COUNT", type=int, nargs="?", help="how often")
    parser.add_argument("--seed", type=int, help="the seed that an earlier run printed")
    given = parser.parse_args()
    soak = SOAKS[given.name]
    seed = secrets.randbits(32) if given.seed is None else given.seed
    count = soak.count if given.count is None else given.count
    print(f"soak {given.name} {count} --seed {seed}", flush=True)
    if soak.needs:
        subprocess.run([TOP / "scripts" / "setup", *soak.needs], check=True)
    return 1 if soak.run(count, seed) else 0


if __name__ == "__main__":
    sys.exit(main())
