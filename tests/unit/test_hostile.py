"""Generated answers of a hostile QEMU and a hostile guest agent; `tests.support.judge` says what is
judged.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import soaking
from tests.support.judge import MEMORY


@pytest.mark.parametrize("who", ["qmp", "agent"])
def test_calls_on_a_hostile_server_end_well(who):
    count, seed = soaking.count(600), soaking.seed()
    words = [sys.executable, "-m", "tests.support.judge", who, str(count), str(seed)]
    run = subprocess.run(words, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    figures = json.loads(run.stdout)
    if soaking.is_long_run():
        print("\n" + json.dumps(figures, indent=1))
    assert figures["answers"] >= count
    assert figures["memory at most, MiB"] < MEMORY
    assert figures["tasks left"] == 0
