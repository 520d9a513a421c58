"""Answers on disk: what is torn, foreign or unreadable is not there, and nothing is an error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qmpvcpu.host.cache import FileCache, key_of, program_of


@pytest.fixture
def cache(tmp_path):
    return FileCache(tmp_path / "c", keep=8)


def test_what_is_put_is_got(cache):
    assert cache.get("a") is None
    cache.put("a", {"x": [1, None, "é"]})
    assert cache.get("a") == {"x": [1, None, "é"]}
    cache.put("a", 2)
    assert cache.get("a") == 2
    assert cache.clear() == 1 and cache.get("a") is None and cache.clear() == 0


def test_every_torn_or_changed_byte_is_seen(cache):
    cache.put("a", {"answer": 42})
    path = cache.folder / "a"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert cache.get("a") is None
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert cache.get("a") is None
    path.unlink()
    path.mkdir()
    assert cache.get("a") is None
    cache.put("a", 1)


def test_who_was_not_used_goes_first(cache):
    for number in range(8):
        cache.put(f"k{number}", number)
        os.utime(cache.folder / f"k{number}", (number, number))
    assert cache.get("k0") == 0
    cache.put("new", 9)
    left = {path.name for path in cache.folder.iterdir()}
    assert len(left) == 6 and {"k0", "new"} <= left and not {"k1", "k2"} & left


def test_a_writer_that_was_killed_leaves_nothing_for_long(cache):
    cache.put("a", 1)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (cache.folder / f".a.new-{gone.stdout.strip()}-1").write_bytes(b"half")
    cache.put("b", 2)
    assert sorted(path.name for path in cache.folder.iterdir()) == ["a", "b"]


def test_locks(cache):
    held = cache.try_lock("x")
    assert held is not None and cache.try_lock("x") is None
    other = cache.try_lock("y")
    assert other is not None
    held.release()
    held.release()
    again = cache.try_lock("x")
    assert again is not None
    script = "import sys; from pathlib import Path; from qmpvcpu.host.cache import FileCache\n"
    script += "print(FileCache(Path(sys.argv[1])).try_lock('x') is None)"
    found = subprocess.run([sys.executable, "-c", script, str(cache.folder)], capture_output=True, text=True)
    assert found.stdout == "True\n", found.stderr
    again.release()
    other.release()


def test_a_folder_that_cannot_be_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    cache = FileCache(tmp_path / "file" / "c")
    cache.put("a", 1)
    assert cache.get("a") is None and cache.clear() == 0
    with pytest.raises(OSError):
        cache.try_lock("a")


def test_a_program_is_its_file(tmp_path):
    path = tmp_path / "qemu"
    path.write_text("one")
    first = program_of(str(path))
    (tmp_path / "link").symlink_to(path)
    assert program_of(str(tmp_path / "link")) == first
    path.write_text("two")
    os.utime(path, ns=(0, first.mtime_ns + 1))  # however coarse the clock of the filesystem is
    assert program_of(str(path)) != first
    assert key_of("a", {"b": 1, "a": 2}) == key_of("a", {"a": 2, "b": 1}) != key_of("a", {"a": 1, "b": 2})
