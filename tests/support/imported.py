"""The modules that a command loads: those of qmpvcpu, and the packages of others that are not Python's own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence

_LINE = re.compile(r"import time: +\d+ \| +\d+ \| +(\S+)$", re.MULTILINE)
#: Packages that cost much, and that only some commands need.
_HEAVY = {"lxml", "qemu", "libvirt", "shtab", "asyncio", "ssl", "difflib", "unittest"}


def imported(words: Sequence[str], environment: dict[str, str]) -> list[str]:
    """What `qmpvcpu WORDS` loads, sorted; it must succeed."""
    python = [sys.executable, "-X", "importtime", "-m", "qmpvcpu", *words]
    done = subprocess.run(python, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    names = set(_LINE.findall(done.stderr))
    return sorted(name for name in names if name.startswith("qmpvcpu.") or name in _HEAVY)
