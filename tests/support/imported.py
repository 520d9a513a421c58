"""The modules that a command loads: those of qmpvcpu, and the packages of others that are not
Python's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

#: Packages that cost much, and that only some commands need.
_HEAVY = {"lxml", "qemu", "libvirt", "shtab", "asyncio", "ssl", "difflib", "unittest"}
_RUN = """
import sys
from qmpvcpu.cli import main
sys.argv[0] = "qmpvcpu"
code = main()
import json
print(json.dumps([code, list(sys.modules)]), file=sys.stderr)
"""


def imported(words: Sequence[str], environment: dict[str, str]) -> list[str]:
    """What `qmpvcpu WORDS` loads, sorted; it must succeed."""
    python = [sys.executable, "-c", _RUN, *words]
    done = subprocess.run(python, capture_output=True, text=True, env=environment, timeout=60)
    code, names = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr[-2000:]
    return sorted(name for name in names if name.startswith("qmpvcpu.") or name in _HEAVY)
