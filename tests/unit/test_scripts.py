"""What scripts/ runs can be run: no linter reads what it imports."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import scripts
from scripts.benchmarks.against import Side

TOP = Path(__file__).parents[2]


def test_every_module_of_scripts_can_be_imported():
    names = [module.name for module in pkgutil.walk_packages(scripts.__path__, "scripts.")]
    names = [name for name in names if not name.endswith("__main__")]
    mains = [f"scripts.{name}.__main__" for name in ("benchmarks", "recording", "soaking")]
    line = f"import {', '.join([*names, *mains])}"
    done = subprocess.run([sys.executable, "-c", line], cwd=TOP, capture_output=True, text=True)
    assert len(names) > 10
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [("-c", "import qmpvcpu"), ("-m", "qmpvcpu")], ids=["-c", "-m"])
def test_a_side_of_the_bench_runs_the_version_of_its_folder(words, tmp_path, monkeypatch):
    """Wherever the bench itself runs: it stands in this tree."""
    monkeypatch.chdir(TOP)
    package = tmp_path / "qmpvcpu"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'seen')!r}, 'w')\n")
    (package / "__main__.py").write_text("")
    Side(tmp_path).run(*words)
    assert (tmp_path / "seen").exists()
