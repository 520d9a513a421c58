"""A saved guest on disk: one bit flipped anywhere, or cut short anywhere, it is refused."""

from __future__ import annotations

import fcntl
import os
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpvcpu import VcpuRefused
from tests.support import saving, streams

COOKIE = b"<qemu-migration/>" * 40
STREAM = streams.written(
    {"pc.ram": 1 << 20}, [{"name": "cpu", "instance_id": 0}], between=os.urandom(3000)
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The path of one that is whole."""
    path = tmp_path_factory.mktemp("saved") / "guest"
    made = saving.File(path, COOKIE)
    os.write(made.fd, STREAM)
    made.finish()
    return path


@pytest.fixture(scope="module")
def data(saved):
    return saved.read_bytes()


def check_refused(path, data, words="is damaged|is not a saved guest|is incomplete|in format"):
    path.write_bytes(data)
    with pytest.raises(VcpuRefused, match=words):
        saving.content(path)


def test_it_is_read_as_it_was_written(saved):
    assert saving.content(saved) == (COOKIE, STREAM[:1024])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused(place, bit, data, tmp_path):
    at = place % len(data)
    flipped = bytearray(data)
    flipped[at] ^= 1 << bit
    check_refused(tmp_path / "flipped", bytes(flipped))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "is not a saved guest"),
        (lambda data: b"LibvirtQemudSave" + data[16:], "is not a saved guest"),
        (lambda data: data[:19] + b"\3" + data[20:], "format 3"),
        (lambda data: data[:23] + b"\0" + data[24:], "is incomplete"),
        (lambda data: data[:4096], "its header does not match it"),
        (lambda data: data[:24] + b"\xff" * 8 + data[32:], "its header does not match it"),
        (lambda data: data[:72] + b"<" * 40 + data[112:], "its SHA-256 digest differs"),
    ],
)
def test_what_is_not_a_saved_guest_says_why(change, words, data, tmp_path):
    check_refused(tmp_path / "bad", change(data), words)


def test_every_flipped_bit_of_its_header_is_refused(data, tmp_path):
    for place in range(72 * 8):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        check_refused(tmp_path / "flipped", bytes(flipped))


@pytest.mark.parametrize("where", [0, 39, 40, 71, 72, 500, 4095, 4096, 4097, -1])
def test_what_is_cut_short_is_refused(where, data, tmp_path):
    check_refused(tmp_path / "short", data[:where])


def test_what_has_grown_is_refused(data, tmp_path):
    check_refused(tmp_path / "long", data + b"\0", "its SHA-256 digest differs")


def test_the_cookie_is_the_one_whose_digest_was_checked(data, tmp_path):
    path = tmp_path / "swapped"
    path.write_bytes(data)

    def swap():
        with path.open("r+b") as file:
            file.seek(72)
            file.write(b"<" * len(COOKIE))

    assert saving.content(path, swap)[0] == COOKIE
    check_refused(path, path.read_bytes(), "its SHA-256 digest differs")


def test_the_first_format_has_no_digest_and_is_read(data, tmp_path):
    path = tmp_path / "old"
    path.write_bytes(saving.of_the_first_format(data))
    assert saving.content(path) == (COOKIE, STREAM[:1024])


def test_a_fifo_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(VcpuRefused, match="a FIFO, not a regular file"):
        saving.content(tmp_path / "fifo")


def test_a_disk_that_a_guest_uses_is_not_replaced(tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(b"disk")
    with disk.open("rb") as used:
        # QEMU's lock of an image that it writes to (block/file-posix.c).
        lock = struct.pack("hhqqi0q", fcntl.F_RDLCK, os.SEEK_SET, 101, 1, 0)
        fcntl.fcntl(used, fcntl.F_OFD_SETLK, lock)
        with pytest.raises(OSError, match="another process has locked it"):
            saving.File(disk, COOKIE)
    assert os.listdir(tmp_path) == ["disk"] and disk.read_bytes() == b"disk"
    # One that no guest uses any more can be replaced.
    saving.File(disk, COOKIE).discard()


#: Pids end at 4194304.
NOBODY = "4999999-1"


def left_by_nobody(made):
    """The name that it has where the process that made it was killed."""
    return made.temporary.with_name(
        f"{made.temporary.name.rpartition('-')[0].rpartition('-')[0]}-{NOBODY}"
    )


@pytest.mark.parametrize(
    "name",
    ["guest[1]", "a*", "what?", "a\\b", "x" * 255, "x" + "\u00e4" * 127],
    ids=["brackets", "star", "mark", "backslash", "long", "long-utf8"],
)
def test_what_a_killed_save_left_is_swept_whatever_its_name(name, tmp_path):
    made = saving.File(tmp_path / name, COOKIE)
    left = left_by_nobody(made)
    made.discard()
    left.touch()
    made = saving.File(tmp_path / name, COOKIE)
    os.write(made.fd, STREAM)
    made.finish()
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("a*", "ab"),
        ("a?", "ab"),
        ("[ab]", "a"),
        ("a", "a.saving-5"),
        ("x" * 255, "x" * 254),
        ("a", "A"),
    ],
    ids=["star", "mark", "brackets", "made", "long", "case"],
)
def test_what_another_file_left_stays(name, other, tmp_path):
    made = saving.File(tmp_path / other, COOKIE)
    left = left_by_nobody(made)
    made.discard()
    left.touch()
    plain = tmp_path / NOBODY
    plain.touch()
    saving.File(tmp_path / name, COOKIE).discard()
    assert left.exists() and plain.exists()
