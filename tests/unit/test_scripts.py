"""What scripts/ runs can be run: no linter reads what it imports."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import scripts

TOP = Path(__file__).parents[2]


def test_every_module_of_scripts_can_be_imported():
    names = [module.name for module in pkgutil.walk_packages(scripts.__path__, "scripts.")]
    names = [name for name in names if not name.endswith("__main__")]
    mains = [f"scripts.{name}.__main__" for name in ("benchmarks", "recording", "soaking")]
    line = f"import {', '.join([*names, *mains])}"
    done = subprocess.run([sys.executable, "-c", line], cwd=TOP, capture_output=True, text=True)
    assert len(names) > 10
    assert done.returncode == 0, done.stderr
