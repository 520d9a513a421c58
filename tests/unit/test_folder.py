"""Folders of throwaway guests: what a killed process leaves is gone with the next one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from qmpvcpu.qemu.folder import throwaway_folder

HOLD = """
from qmpvcpu.qemu.folder import throwaway_folder
with throwaway_folder() as folder:
    (folder / "a file").touch()
    print(folder, flush=True)
    input()
"""


def age(path):
    os.utime(path, (1, 1))


@pytest.fixture
def short():
    """A folder whose path leaves room for sockets, whoever runs the tests."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def test_what_is_held_stays_and_what_was_left_goes(short, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with throwaway_folder() as own:
        assert own.parent == short and own.stat().st_mode & 0o777 == 0o700
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        theirs = short / child.stdout.readline().strip()
        other = short / "qmpvcpu-run-without-a-lock"
        other.mkdir()
        for folder in (own, theirs, other):
            age(folder)
        with throwaway_folder():
            assert own.is_dir() and theirs.is_dir() and other.is_dir()
        child.kill()
        child.wait()
        assert theirs.is_dir()
        with throwaway_folder():
            assert own.is_dir() and not theirs.exists() and other.is_dir()
    assert sorted(path.name for path in short.iterdir()) == [other.name]
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_a_long_path_is_not_for_sockets(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with throwaway_folder() as folder:
        assert len(str(folder)) < 60
