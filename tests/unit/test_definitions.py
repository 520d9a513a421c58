"""Definitions on disk: replaced whole or not at all, by whoever and whatever happens."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress

import pytest

from qmpvcpu.errors import VcpuRefused
from qmpvcpu.host.definitions import Addresses, DefinitionFile, DefinitionFolder, check_name
from qmpvcpu.host.files import LockTimeout, locked_folder, read_file, stage_file

OLD, NEW = b"<domain>old</domain>", b"<domain>new</domain>"
HERE = Addresses(("/run/q1", "host:4444"), "/run/agent")


def never(data):
    raise AssertionError("nobody else has written it")


@pytest.fixture
def folder(tmp_path):
    return DefinitionFolder(tmp_path)


def files(folder):
    return sorted(os.listdir(folder.folder))


def test_what_is_defined_is_found_again_and_nobody_else_reads_it(folder):
    assert folder.names() == []
    assert folder.define("web1", OLD, HERE) is False
    assert (folder.names(), folder.is_defined("web1"), folder.is_defined("web2")) == (["web1"], True, False)
    assert (folder.file("web1").read(), folder.addresses("web1")) == (OLD, HERE)
    assert oct(folder.folder.stat().st_mode & 0o777) == "0o700"
    assert {oct(path.stat().st_mode & 0o777) for path in folder.folder.iterdir()} == {"0o600"}


def test_defined_anew_the_version_before_is_kept(folder):
    folder.define("web1", OLD, HERE)
    assert folder.define("web1", NEW, Addresses()) is True
    assert (folder.file("web1").read(), folder.addresses("web1")) == (NEW, Addresses())
    assert (folder.folder / "web1.xml~").read_bytes() == OLD
    assert files(folder) == ["web1.json", "web1.xml", "web1.xml~"]


@pytest.mark.parametrize("step", range(1, 12))
def test_killed_at_any_rename_the_xml_goes_with_its_own_sockets(folder, step, monkeypatch):
    """The second of two definitions with other sockets, cut off after so many renames."""
    folder.define("web1", OLD, HERE)
    there = Addresses(("/run/q2",))

    class Killed(BaseException):
        pass

    left = step
    rename = type(folder.folder).rename

    def counting(path, target):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(type(folder.folder), "rename", counting)
    with suppress(Killed):
        folder.define("web1", NEW, there)
    monkeypatch.undo()
    assert (folder.file("web1").read(), folder.addresses("web1")) in ((OLD, HERE), (NEW, there))


def test_undefined_its_last_version_stays(folder):
    folder.define("web1", OLD, HERE)
    kept = folder.undefine("web1")
    assert (kept.read_bytes(), folder.names()) == (OLD, [])
    with pytest.raises(VcpuRefused, match="no domain 'web1' is defined") as caught:
        folder.undefine("web1")
    assert caught.value.libvirt == "VIR_ERR_NO_DOMAIN"


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a\nb", "a\0b", "x" * 201, "\udcff"])
def test_names_that_cannot_be(folder, name):
    assert check_name(name).code == "name"
    assert folder.is_defined(name) is False
    with pytest.raises(VcpuRefused, match="no domain can be called"):
        folder.define(name, OLD, HERE)


@pytest.mark.parametrize("name", ["web1", "a b", "ä.xml", "x" * 200, "-x", "a~"])
def test_names_that_can(folder, name):
    folder.define(name, OLD, HERE)
    assert (folder.names(), folder.file(name).read()) == ([name], OLD)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"qmp": 5}', '{"qmp": [5]}', '{"qmp": [], "agent": 1}', "null"]
)
def test_sockets_that_cannot_be_read(folder, content):
    folder.define("web1", OLD, HERE)
    (folder.folder / "web1.json").write_text(content)
    with pytest.raises(VcpuRefused, match="cannot be read") as caught:
        folder.addresses("web1")
    assert "define it again" in caught.value.hint
    folder.define("web1", OLD, HERE)
    assert folder.addresses("web1") == HERE


def test_two_changes_at_once_are_both_in_it(tmp_path):
    path = tmp_path / "d.xml"
    path.write_bytes(b"0")
    store = DefinitionFile(path, keep=False)

    def add(data):
        return str(int(data) + 1).encode()

    def work():
        for _ in range(50):
            before = store.read()
            store.stage(add(before)).commit(before, add)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (store.read(), os.listdir(tmp_path)) == (b"200", ["d.xml"])


def test_a_file_of_a_user_keeps_its_mode_and_its_link_and_gets_no_neighbour(tmp_path):
    (tmp_path / "real").mkdir()
    path = tmp_path / "real" / "d.xml"
    path.write_bytes(OLD)
    path.chmod(0o640)
    link = tmp_path / "d.xml"
    link.symlink_to(path)
    store = DefinitionFile(link, keep=False)
    store.stage(NEW).commit(OLD, never)
    assert (path.read_bytes(), link.is_symlink(), oct(path.stat().st_mode & 0o777)) == (NEW, True, "0o640")
    assert os.listdir(path.parent) == ["d.xml"]


def test_staged_and_discarded_leaves_nothing(tmp_path):
    path = tmp_path / "d.xml"
    path.write_bytes(OLD)
    staged = DefinitionFile(path, keep=True).stage(NEW)
    assert len(os.listdir(tmp_path)) == 2
    staged.discard()
    staged.discard()
    assert (os.listdir(tmp_path), path.read_bytes()) == (["d.xml"], OLD)


def test_what_a_killed_process_had_staged_is_swept_out(tmp_path):
    path = tmp_path / "d.xml"
    path.write_bytes(OLD)
    gone = tmp_path / f".d.xml.new-{2**22 + 1}-5"
    gone.write_bytes(b"half")
    ours = stage_file(tmp_path / "e.xml", b"e")
    DefinitionFile(path, keep=False).stage(NEW).commit(OLD, never)
    assert not gone.exists()
    ours.commit()
    assert sorted(os.listdir(tmp_path)) == ["d.xml", "e.xml"]


def test_a_lock_has_a_deadline_and_a_waiter_that_gives_up_ends(tmp_path):
    with locked_folder(tmp_path, 1):
        with pytest.raises(LockTimeout), locked_folder(tmp_path, 0.02):
            pass
        with pytest.raises(LockTimeout), locked_folder(tmp_path, 60, given_up=lambda: True):
            pass
    with locked_folder(tmp_path, 0):
        pass


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path / "pipe", 10)
    (tmp_path / "big").write_bytes(b"x" * 100)
    assert len(read_file(tmp_path / "big", 10)) == 11


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "definitions").write_text("no folder")
    with pytest.raises(VcpuRefused, match="cannot be written"):
        DefinitionFolder(tmp_path).define("web1", OLD, HERE)


def test_sockets_are_readable_json(folder):
    folder.define("web1", OLD, HERE)
    assert json.loads((folder.folder / "web1.json").read_text()) == {
        "qmp": ["/run/q1", "host:4444"],
        "agent": "/run/agent",
    }
