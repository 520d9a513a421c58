"""Definitions on disk: each is replaced whole or not at all, whoever writes and whatever happens."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from qmpvcpu import VcpuRefused
from tests.support import xml
from tests.support.store import Busy, Definitions, XmlFile, in_child, locked, why_not_a_name

OLD, NEW = b"<domain>old</domain>", b"<domain>new</domain>"
SOCKETS = (("/run/q1", "host:4444"), "/run/agent")
OTHERS = (("/run/q2",), None)
NO_SOCKETS = ((), None)


@pytest.fixture
def empty(tmp_path):
    return Definitions(tmp_path)


@pytest.fixture
def store(empty):
    """With `web1` in it."""
    empty.define("web1", OLD, *SOCKETS)
    return empty


@pytest.fixture
def path(tmp_path):
    """A user's file."""
    path = tmp_path / "d.xml"
    path.write_bytes(OLD)
    return path


def mode(path):
    return oct(path.stat().st_mode & 0o777)


# -- define ----------------------------------------------------------------------------------------


def test_before_the_first_definition_there_is_none(empty):
    assert empty.names() == []


def test_what_is_defined_is_listed(store):
    assert store.names() == ["web1"]


@pytest.mark.parametrize(("name", "is_defined"), [("web1", True), ("web2", False)])
def test_whether_a_name_is_defined(store, name, is_defined):
    assert store.is_defined(name) is is_defined


def test_the_xml_is_found_again(store):
    assert store.xml("web1") == OLD


def test_the_sockets_are_found_again(store):
    assert store.sockets("web1") == SOCKETS


def test_sockets_are_readable_json(store):
    assert json.loads((store.folder / "web1.json").read_text()) == {
        "qmp": ["/run/q1", "host:4444"],
        "agent": "/run/agent",
    }


def test_nobody_else_enters_the_folder(store):
    assert mode(store.folder) == "0o700"


def test_nobody_else_reads_the_files(store):
    assert {mode(path) for path in store.folder.iterdir()} == {"0o600"}


def test_define_tells_a_new_name_from_one_that_was_there(empty):
    assert [empty.define("web1", xml, *SOCKETS) for xml in (OLD, NEW)] == [False, True]


@pytest.fixture
def redefined(store):
    store.define("web1", NEW, *NO_SOCKETS)
    return store


def test_a_second_definition_counts(redefined):
    assert redefined.xml("web1") == NEW


def test_a_second_definition_has_its_own_sockets(redefined):
    assert redefined.sockets("web1") == NO_SOCKETS


def test_the_version_before_is_kept(redefined):
    assert (redefined.folder / "web1.xml~").read_bytes() == OLD


def test_a_second_definition_leaves_no_other_file(redefined):
    assert sorted(os.listdir(redefined.folder)) == ["web1.json", "web1.xml", "web1.xml~"]


REDEFINE = """
import sys
from pathlib import Path
from tests.support.disk import die_at_rename
from tests.support.store import Definitions
die_at_rename(int(sys.argv[2]))
Definitions(Path(sys.argv[1])).define("web1", b"<domain>new</domain>", ("/run/q2",))
"""


@pytest.mark.parametrize("number", range(1, 8))
def test_killed_at_any_rename_the_xml_goes_with_its_own_sockets(store, number):
    """The second of two definitions, with other sockets."""
    in_child(REDEFINE, store.folder.parent, number)
    assert (store.xml("web1"), store.sockets("web1")) in ((OLD, SOCKETS), (NEW, OTHERS))


def test_it_takes_no_more_renames_than_are_tried_above(store):
    assert in_child(REDEFINE, store.folder.parent, 8) == 0


def test_the_first_rename_kills(store):
    assert in_child(REDEFINE, store.folder.parent, 1) == 9


# -- undefine --------------------------------------------------------------------------------------


def test_undefined_its_last_version_stays(store):
    assert store.undefine("web1").read_bytes() == OLD


def test_what_is_undefined_is_no_longer_listed(store):
    store.undefine("web1")
    assert store.names() == []


@pytest.fixture
def half_undefined(store):
    """As a process has left it that was killed when it had taken the XML away."""
    (store.folder / "web1.xml").rename(store.folder / "web1.xml~")
    return store


def test_the_sockets_of_what_is_half_undefined_do_not_count(half_undefined):
    assert half_undefined.sockets("web1") == NO_SOCKETS


def test_what_is_half_undefined_is_undefined_once_more(half_undefined):
    with pytest.raises(VcpuRefused, match="no domain 'web1' is defined"):
        half_undefined.undefine("web1")
    assert os.listdir(half_undefined.folder) == ["web1.xml~"]


def test_what_is_not_defined_cannot_be_undefined(empty):
    with pytest.raises(VcpuRefused, match="no domain 'web1' is defined") as caught:
        empty.undefine("web1")
    assert caught.value.libvirt == "VIR_ERR_NO_DOMAIN"


# -- names -----------------------------------------------------------------------------------------

BAD_NAMES = ["", "  ", ".", "a/b", "/", "..", "../x", "a\nb", "a\0b", "a\x9bb", "x" * 248, "\udcff"]
GOOD_NAMES = [
    "web1",
    "a b",
    "ä.xml",
    "x" * 247,
    "ä" * 123,
    "-x",
    "a~",
    ".x",
    "...",
    "100%",
    "x%dy",
    "%2Ex",
    "%25",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_of_a_name_that_cannot_be_it_is_said_why(name):
    assert "is not a domain name" in (why_not_a_name(name) or "")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_cannot_be_is_not_defined(empty, name):
    assert empty.is_defined(name) is False


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_cannot_be(empty, name):
    with pytest.raises(VcpuRefused, match="is not a domain name") as caught:
        empty.define(name, OLD)
    assert [refusal.code for refusal in caught.value.refusals] == ["name"]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_names_that_can(empty, name):
    empty.define(name, OLD)
    assert (empty.names(), empty.xml(name)) == ([name], OLD)


# -- what cannot be read or written ----------------------------------------------------------------

GARBAGE = ["", "[]", "{", '{"qmp": 5}', '{"qmp": [5]}', '{"qmp": [], "agent": 1}', "null"]


@pytest.mark.parametrize("content", GARBAGE)
def test_sockets_that_cannot_be_read(store, content):
    (store.folder / "web1.json").write_text(content)
    with pytest.raises(VcpuRefused, match="cannot be read") as caught:
        store.sockets("web1")
    assert "define it again" in caught.value.hint


@pytest.mark.parametrize("content", GARBAGE)
def test_sockets_that_cannot_be_read_are_defined_again(store, content):
    (store.folder / "web1.json").write_text(content)
    store.define("web1", OLD, *SOCKETS)
    assert store.sockets("web1") == SOCKETS


def test_a_folder_that_cannot_be_written_is_told(empty):
    empty.folder.write_text("not a folder")
    with pytest.raises(VcpuRefused, match="cannot be written"):
        empty.define("web1", OLD)


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VcpuRefused, match="not a regular file"):
        XmlFile(tmp_path / "pipe").read()


def test_of_a_huge_file_only_as_much_is_read_as_tells_that(path):
    os.truncate(path, 1 << 36)
    with pytest.raises(VcpuRefused, match="has more than"):
        xml.read(XmlFile(path).read())


# -- a user's own file -----------------------------------------------------------------------------


def test_two_changes_at_once_are_both_in_it(path):
    path.write_bytes(b"0")
    file = XmlFile(path)

    def work():
        for _ in range(50):
            file.change(lambda data: str(int(data) + 1).encode())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (file.read(), os.listdir(path.parent)) == (b"200", ["d.xml"])


@pytest.fixture
def changed(tmp_path):
    """The path of a file that was changed by a link to it."""
    path = tmp_path / "real" / "d.xml"
    path.parent.mkdir()
    path.write_bytes(OLD)
    path.chmod(0o640)
    (tmp_path / "d.xml").symlink_to(path)
    XmlFile(tmp_path / "d.xml").change(lambda _: NEW)
    return path


def test_a_link_is_followed(changed):
    assert changed.read_bytes() == NEW


def test_a_link_stays_one(changed):
    assert (changed.parent.parent / "d.xml").is_symlink()


def test_a_file_of_a_user_keeps_its_mode(changed):
    assert mode(changed) == "0o640"


def test_a_file_of_a_user_gets_no_neighbour(changed):
    assert os.listdir(changed.parent) == ["d.xml"]


def test_what_is_staged_does_not_count(path):
    XmlFile(path).stage(NEW)
    assert path.read_bytes() == OLD


def test_what_is_committed_counts(path):
    XmlFile(path).stage(NEW).commit(OLD)
    assert path.read_bytes() == NEW


def test_staged_and_discarded_leaves_nothing(path):
    staged = XmlFile(path).stage(NEW)
    staged.discard()
    assert (os.listdir(path.parent), path.read_bytes()) == (["d.xml"], OLD)


def test_discarded_twice_is_discarded(path):
    staged = XmlFile(path).stage(NEW)
    staged.discard()
    staged.discard()
    assert os.listdir(path.parent) == ["d.xml"]


STAGE = """
import os, signal, sys
from pathlib import Path
from tests.support.store import XmlFile
XmlFile(Path(sys.argv[1])).stage(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(path):
    """What a killed process has left staged for `path`."""
    assert in_child(STAGE, path) == -signal.SIGKILL
    (left,) = set(os.listdir(path.parent)) - {"d.xml"}
    return path.with_name(left)


def test_what_a_killed_process_had_staged_is_swept_out(path, killed):
    XmlFile(path).change(lambda _: NEW)
    assert not killed.exists()


def test_what_a_living_process_has_staged_stays(path, tmp_path):
    other = Path(tmp_path / "e.xml")
    other.write_bytes(OLD)
    staged = XmlFile(other).stage(NEW)
    XmlFile(path).change(lambda _: NEW)
    staged.commit(OLD)
    assert other.read_bytes() == NEW


# -- the lock of a folder --------------------------------------------------------------------------


def test_a_lock_has_a_deadline(tmp_path):
    with locked(tmp_path, 1), pytest.raises(Busy), locked(tmp_path, 0.02):
        pass


def test_a_waiter_that_gives_up_ends(tmp_path):
    with locked(tmp_path, 1), pytest.raises(Busy), locked(tmp_path, 600, given_up=lambda: True):
        pass


def test_a_lock_that_was_left_is_to_be_had_at_once(tmp_path):
    with locked(tmp_path, 0):
        pass
    with locked(tmp_path, 0):
        pass
