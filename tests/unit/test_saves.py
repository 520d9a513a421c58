"""What `save` leaves in the state folder: the guest that it has paused, and the definition of what
it saved.
"""

from __future__ import annotations

import os

import pytest

from tests.support import saving
from tests.support.hosts import name_of

DIGEST = "a" * 64


@pytest.fixture
def records(tmp_path):
    return saving.Records(tmp_path / "state")


@pytest.fixture
def made(tmp_path):
    """A file that is being written, under its first name."""
    path = tmp_path / "files" / ".guest.saving"
    path.parent.mkdir()
    path.write_bytes(b"stream")
    return path


def test_a_guest_that_is_paused_is_known_until_it_is_forgotten(records, made):
    assert records.paused() is None
    records.pause(made, runs=True)
    assert records.paused() == (True, False)
    records.forget()
    assert records.paused() is None


@pytest.mark.parametrize("runs", [True, False])
def test_who_paused_it_has_ended(records, made, runs):
    records.pause(made, runs=runs, saver=name_of(start=1))
    assert records.paused() == (runs, True)


def test_the_file_goes_under_whatever_name_it_has(records, made):
    records.pause(made, runs=True)
    last = made.with_name("guest")
    made.rename(last)
    records.remove_file()
    assert os.listdir(made.parent) == []


def test_another_file_of_that_name_stays(records, made):
    records.pause(made, runs=True)
    other = made.with_name("guest")
    other.write_bytes(b"what was there before")
    records.remove_file()
    assert os.listdir(made.parent) == ["guest"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"saver": 1}', '{"saver": "x", "runs": 1, "files": 3, "inode": 4}']
)
def test_a_torn_record_is_none(records, made, text):
    records.pause(made, runs=True)
    records.tear(text)
    assert records.paused() is None


def test_a_guest_that_stays_is_told_from_one_that_is_being_saved(records, made):
    records.pause(made, runs=False)
    assert not records.stays()
    records.stay()
    assert records.stays()


def test_a_definition_is_found_by_its_digest(records):
    records.keep_definition(DIGEST, b"<domain/>")
    assert records.definition(DIGEST) == b"<domain/>"


@pytest.mark.parametrize("digest", [None, "b" * 64, "../" + "a" * 61, "A" * 64, DIGEST + "0"])
def test_of_another_digest_nothing_is_known(records, digest):
    records.keep_definition(DIGEST, b"<domain/>")
    assert records.definition(digest) is None


def test_what_a_process_was_writing_when_it_was_killed_goes_with_the_next_one(
    records, made, tmp_path
):
    records.pause(made, runs=True)
    records.keep_definition(DIGEST, b"<domain/>")
    halves = [
        tmp_path / "state" / folder / f".name.new-{1 << 23}-1" for folder in ("saving", "saved")
    ]
    for half in halves:
        half.write_text("<dom")
    records.pause(made, runs=True)
    records.keep_definition(DIGEST, b"<domain/>")
    assert not [half for half in halves if half.exists()]


def test_where_nothing_can_be_written_nothing_is_known(tmp_path, made):
    (tmp_path / "state").write_text("a file")
    records = saving.Records(tmp_path / "state")
    records.pause(made, runs=True)
    records.keep_definition(DIGEST, b"<domain/>")
    assert (records.paused(), records.definition(DIGEST)) == (None, None)
