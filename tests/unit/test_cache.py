"""Answers on disk: what is torn, foreign or unreadable is not there, and nothing is an error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.cache import Cache, are_one_program, name_of, sight
from tests.support.store import ROOT, in_child


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "c")


@pytest.fixture
def full(cache):
    """With one answer, `a`."""
    cache.put("a", {"x": [1, None, "é"]})
    return cache


def names(cache):
    return sorted(path.name for path in cache.folder.iterdir())


# -- put and got -----------------------------------------------------------------------------------


def test_what_was_not_put_is_not_got(cache):
    assert cache.get("a") is None


def test_what_is_put_is_got(full):
    assert full.get("a") == {"x": [1, None, "é"]}


def test_what_is_put_last_is_got(full):
    full.put("a", 2)
    assert full.get("a") == 2


def test_clearing_tells_how_many_there_were(full):
    assert [full.clear(), full.clear()] == [1, 0]


def test_what_is_cleared_is_not_got(full):
    full.clear()
    assert full.get("a") is None


def test_a_torn_file_is_not_there(full):
    path = full.folder / "a"
    whole = path.read_bytes()
    found = []
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        found.append(full.get("a"))
    assert set(found) == {None}


def test_a_file_with_a_changed_byte_is_not_there(full):
    path = full.folder / "a"
    whole = path.read_bytes()
    found = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found.append(full.get("a"))
    assert set(found) == {None}


@pytest.fixture
def blocked(cache):
    """With a folder in the place of `a`."""
    (cache.folder / "a").mkdir(parents=True)
    return cache


def test_what_is_not_a_file_is_not_there(blocked):
    assert blocked.get("a") is None


def test_what_cannot_be_put_is_no_error(blocked):
    blocked.put("a", 1)
    assert blocked.get("a") is None


@pytest.fixture
def crowded(cache):
    """Nine answers where eight are kept; `k0` is the oldest and was used last."""
    for number in range(8):
        cache.put(f"k{number}", number)
        os.utime(cache.folder / f"k{number}", (number, number))
    cache.get("k0")
    cache.put("new", 9)
    return cache


def test_no_more_are_kept_than_there_may_be(crowded):
    assert len(names(crowded)) == 6


def test_what_was_used_or_put_last_stays(crowded):
    assert {"k0", "new"} <= set(names(crowded))


def test_what_was_not_used_goes_first(crowded):
    assert not {"k1", "k2"} & set(names(crowded))


PUT = """
import sys
from pathlib import Path
from tests.support.cache import Cache
from tests.support.disk import die_at_rename
die_at_rename(1)
Cache(Path(sys.argv[1])).put("a", 2)
"""


@pytest.fixture
def killed(full):
    """A process was killed while it put another answer."""
    assert in_child(PUT, full.folder) == 9
    return full


def test_a_writer_that_was_killed_changes_no_answer(killed):
    assert killed.get("a") == {"x": [1, None, "é"]}


def test_a_writer_that_was_killed_leaves_nothing_for_long(killed):
    killed.put("b", 2)
    assert names(killed) == ["a", "b"]


# -- locks -----------------------------------------------------------------------------------------

LOCK = """
import sys
from pathlib import Path
from tests.support.cache import Cache
with Cache(Path(sys.argv[1])).locked("x") as is_ours:
    print(is_ours)
"""


def locked_by_another(cache):
    """What another process finds when it wants the lock `x`."""
    command = [sys.executable, "-c", LOCK, str(cache.folder)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize(("name", "is_ours"), [("x", False), ("y", True)])
def test_a_lock_is_held_once(cache, name, is_ours):
    with cache.locked("x"), cache.locked(name) as found:
        assert found is is_ours


def test_a_lock_that_was_let_go_is_to_be_had(cache):
    with cache.locked("x"):
        pass
    with cache.locked("x") as is_ours:
        assert is_ours


def test_a_lock_holds_against_other_processes(cache):
    with cache.locked("x"):
        assert locked_by_another(cache) == "False"


def test_another_process_gets_a_lock_that_nobody_holds(cache):
    assert locked_by_another(cache) == "True"


# -- a folder that cannot be -----------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path):
    """Below a file."""
    (tmp_path / "file").write_text("")
    return Cache(tmp_path / "file" / "c")


def test_putting_where_no_folder_can_be_is_no_error(nowhere):
    nowhere.put("a", 1)
    assert nowhere.get("a") is None


def test_clearing_where_no_folder_can_be_is_no_error(nowhere):
    assert nowhere.clear() == 0


def test_where_no_folder_can_be_there_are_no_locks(nowhere):
    with pytest.raises(OSError, match="Not a directory"), nowhere.locked("a"):
        pass


# -- what an answer is of --------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "qemu"
    path.write_text("one")
    return path


def test_a_program_is_the_file_that_a_link_leads_to(program, tmp_path):
    (tmp_path / "link").symlink_to(program)
    assert are_one_program(sight(program), sight(tmp_path / "link"))


def test_a_program_that_was_written_again_is_another(program):
    before = sight(program)
    written = program.stat().st_mtime_ns
    program.write_text("two")
    os.utime(program, ns=(0, written + 1))  # however coarse the clock of the filesystem is
    assert not are_one_program(before, sight(program))


def test_the_order_of_keys_makes_no_other_name():
    assert name_of("a", {"b": 1, "a": 2}) == name_of("a", {"a": 2, "b": 1})


def test_other_data_have_another_name():
    assert name_of("a", {"a": 2, "b": 1}) != name_of("a", {"a": 1, "b": 2})
