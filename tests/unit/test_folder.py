"""Folders of throwaway guests: what a killed process has left is removed when the next folder is
made.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.support.throwaway import age, held_in, made_in


@pytest.fixture
def base():
    """A folder whose path leaves room for sockets, wherever the tests run."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def theirs(base):
    """A folder that another process holds."""
    with held_in(base) as holder:
        age(holder.folder)
        yield holder


def make_another(base):
    with made_in(base):
        pass


def test_it_is_in_the_folder_of_temporary_files(base):
    with made_in(base) as folder:
        assert folder.parent == base


def test_nobody_else_enters_it(base):
    with made_in(base) as folder:
        assert oct(folder.stat().st_mode & 0o777) == "0o700"


def test_left_it_is_gone(base):
    make_another(base)
    assert os.listdir(base) == []


def test_what_this_process_holds_stays(base):
    with made_in(base) as folder:
        age(folder)
        make_another(base)
        assert folder.is_dir()


def test_what_another_process_holds_stays(base, theirs):
    make_another(base)
    assert theirs.folder.is_dir()


def test_a_killed_process_leaves_its_folder(theirs):
    theirs.kill()
    assert theirs.folder.is_dir()


def test_what_a_killed_process_has_left_goes_with_the_next(base, theirs):
    theirs.kill()
    age(theirs.folder)
    make_another(base)
    assert not theirs.folder.exists()


def test_what_looks_like_one_and_was_never_held_stays(base, theirs):
    other = base / (theirs.folder.name + "-other")
    other.mkdir()
    age(other)
    make_another(base)
    assert other.is_dir()


def test_a_long_path_is_not_for_sockets(tmp_path):
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    with made_in(deep) as folder:
        assert len(str(folder)) < 60
