"""Files that a user names, or that lie in our folders: what they are, whose they are, and what we
make of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.support import saving, streams
from tests.support.commands import cli, start_cli
from tests.support.home import XML
from tests.support.processes import send
from tests.support.store import fallback_folder
from tests.support.waiting import until, within

#: A user that we are not.
OTHER = 4711
KINDS = {
    "a FIFO": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "a socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "a character device": lambda path: path.symlink_to("/dev/zero"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of this test, where state is kept in `state`."""
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    (tmp_path / "d.xml").write_bytes(XML)
    return tmp_path


# -- kinds -----------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(
    "words",
    [
        ("restore", "F"),
        ("--qmp-log", "F", "vcpuinfo", "D"),
        ("define", "./F"),
        ("define", "web2", "--xml", "F"),
        ("apply", "D", "F"),
        ("probe", "F"),
        ("boot-args", "F"),
        ("migrate-prepare", "F"),
        ("migrate-finish", "web1", "F"),
    ],
    ids=" ".join,
)
async def test_only_a_regular_file_is_opened(words, kind, own):
    KINDS[kind](own / "F")
    paths = {"F": str(own / "F"), "./F": str(own / "F"), "D": str(own / "d.xml")}
    run = await cli(*(paths.get(word, word) for word in words))
    assert (run.code in (2, 3), f"it is {kind}, not a regular file" in run.stderr) == (
        True,
        True,
    ), run.stderr


@kinds
async def test_only_a_regular_file_of_the_state_folder_is_opened(kind, own):
    await cli("define", str(own / "d.xml"))
    for name in ("web1.xml", "web1.json"):
        path = own / "state" / "definitions" / name
        kept = path.read_bytes()
        path.unlink()
        KINDS[kind](path)
        run = await cli("vcpuinfo", "web1")
        what = "a symbolic link" if path.is_symlink() else kind
        assert (run.code != 0, f"it is {what}, not a regular file" in run.stderr) == (True, True), (
            run.stderr
        )
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        path.write_bytes(kept)


@pytest.mark.parametrize(
    "words", [("define",), ("define", "web1", "--xml"), ("probe",), ("boot-args",)], ids=" ".join
)
async def test_what_a_shell_writes_to_a_pipe_is_read(words, own):
    end, begin = os.pipe()
    os.write(begin, XML)
    os.close(begin)
    process = await start_cli(*words, f"/dev/fd/{end}", pass_fds=[end])
    os.close(end)
    _, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "words", [("migrate-finish", "web1"), ("define", "web1", "--xml")], ids=lambda words: words[0]
)
async def test_a_pipe_that_nobody_writes_to_is_left_at_a_signal(words, number, own):
    end, begin = os.pipe()
    process = await start_cli(*words, f"/dev/fd/{end}", "--json", pass_fds=[end])
    status = Path(f"/proc/{process.pid}/status")
    mask = 1 << (number - 1)

    def is_reading() -> bool:
        return bool(int(status.read_text().partition("SigBlk:")[2].split()[0], 16) & mask)

    try:
        await until(is_reading, "it reads")
        send(process, number)
        stdout, stderr = await within(process.communicate(), "it ends")
    finally:
        os.close(begin)
        os.close(end)
    assert (process.returncode, json.loads(stdout)["outcome"]) == (128 + number, "failed"), stderr


async def test_a_cookie_of_gigabytes_is_refused(own):
    (own / "huge").touch()
    os.truncate(own / "huge", 1 << 40)
    run = await cli("migrate-prepare", str(own / "huge"))
    assert (run.code, "has more than" in run.stderr) == (3, True)


# -- modes and owners ------------------------------------------------------------------------------


def modes(folder: Path) -> set[tuple[bool, str]]:
    return {
        (path.is_dir(), oct(path.stat().st_mode & 0o7777)) for path in (folder, *folder.rglob("*"))
    }


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
async def test_modes_are_ours_whatever_the_umask(umask, own):
    run = await cli("define", str(own / "d.xml"), umask=umask)
    assert (run.code, modes(own / "state")) == (0, {(True, "0o700"), (False, "0o600")})


@pytest.mark.parametrize("umask", [0o000, 0o777])
async def test_a_log_is_private_whatever_the_umask(umask, own):
    await cli("--qmp-log", str(own / "log"), "vcpuinfo", str(own / "d.xml"), umask=umask)
    assert oct((own / "log").stat().st_mode & 0o7777) == "0o600"


def give_away(path: Path) -> None:
    os.chown(path, OTHER, OTHER)


def let_all_write(path: Path) -> None:
    path.chmod(0o777)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(give_away, "belongs to another user"), (let_all_write, "can be written to by other users")],
)
@pytest.mark.parametrize("where", ["state", "state/definitions", "."])
async def test_a_state_folder_of_others_is_refused(where, spoil, words, own):
    await cli("define", str(own / "d.xml"))
    spoil(own / where)
    for command in (["list"], ["vcpuinfo", "web1"], ["define", str(own / "d.xml")]):
        run = await cli(*command)
        assert (run.code, words in run.stderr + run.stdout) == (3, True), run


async def test_a_state_folder_behind_a_link_of_others_is_refused(own, monkeypatch):
    """The one that is named is ours, and so is where it leads."""
    (own / "theirs").mkdir()
    (own / "theirs" / "link").symlink_to(own / "state")
    (own / "ours").symlink_to(own / "theirs" / "link")
    monkeypatch.setenv("QMPVCPU_STATE", str(own / "ours"))
    assert (await cli("list")).code == 0
    give_away(own / "theirs")
    run = await cli("list")
    assert (run.code, f"'{own / 'theirs'}' belongs to another user" in run.stderr) == (3, True), run


@pytest.mark.parametrize("spoil", [give_away, let_all_write])
async def test_a_cache_of_others_is_refused(spoil, own, monkeypatch):
    monkeypatch.setenv("QMPVCPU_CACHE", str(own / "cache"))
    (own / "cache").mkdir()
    spoil(own / "cache")
    run = await cli("probe", str(own / "d.xml"))
    assert (run.code, "cache folder" in run.stderr) == (3, True)


async def test_a_run_folder_that_another_user_has_planted_is_refused(own, monkeypatch):
    """Where the paths of sockets would be too long it is one of the folder of temporary files."""
    state = own / ("s" * 100)
    monkeypatch.setenv("QMPVCPU_STATE", str(state))
    monkeypatch.setenv("TMPDIR", str(own / "tmp"))
    (own / "tmp").mkdir()
    (own / "tmp").chmod(0o1777)
    await cli("define", str(own / "d.xml"))
    folder = fallback_folder("web1", state, own / "tmp")
    folder.mkdir()
    words = ("sh", "-c", "read line", str(folder / "pid"))
    victim = await asyncio.create_subprocess_exec(*words, stdin=asyncio.subprocess.PIPE)
    (folder / "pid").write_text(f"{victim.pid}\n")
    give_away(folder)
    try:
        for command in ("vcpuinfo", "destroy", "start", "undefine"):
            run = await cli(command, "web1")
            assert (run.code, "belongs to another user" in run.stderr) == (3, True), run
        listed = await cli("list", "--json")
        assert listed.json["domains"][0]["pid"] is None
        assert victim.returncode is None
        assert folder.is_dir()
    finally:
        victim.kill()
        await victim.wait()


# -- names, addresses, encodings, saved files ------------------------------------------------------


@pytest.mark.parametrize("name", [".hidden", "%2Ehidden", "100%", "x" * 247, "a b", "...", "ä,b"])
async def test_a_name_is_never_a_path(name, own):
    await cli("define", str(own / "d.xml"))
    await cli("define", "--xml", str(own / "d.xml"), "--", name)
    assert {row["name"] for row in (await cli("list", "--json")).json["domains"]} == {"web1", name}


@pytest.mark.parametrize("name", [".", "..", "  ", "a\nb", "a\x1bb"])
async def test_what_is_not_a_name_is_refused(name, own):
    run = await cli("define", name, "--xml", str(own / "d.xml"))
    assert (run.code, "is not a domain name" in run.stderr) == (3, True)


@pytest.mark.parametrize(
    ("given", "qmp", "agent"),
    [
        ((), ["/run/q1", "/run/q2"], "/run/a1"),
        (("--agent", "/run/a2"), ["/run/q1", "/run/q2"], "/run/a2"),
        (("--qmp", "/run/q3"), ["/run/q3"], None),
    ],
    ids=["neither", "agent", "qmp"],
)
@pytest.mark.parametrize("by_name", [True, False])
async def test_a_new_xml_keeps_the_addresses(by_name, given, qmp, agent, own):
    path = str(own / "d.xml")
    await cli(
        "define",
        "web1",
        "--xml",
        path,
        "--qmp",
        "/run/q1",
        "--qmp",
        "/run/q2",
        "--agent",
        "/run/a1",
    )
    again = ["web1", "--xml", path] if by_name else [path]
    run = await cli("define", *again, *given, "--json")
    assert (run.json["qmp"], run.json["agent"]) == (qmp, agent)
    is_told = "it was reached at /run/q1, /run/q2 until now" in run.stdout
    assert is_told == ("--qmp" in given), run.stdout


@pytest.mark.parametrize(
    "encoding", ["utf-32", "utf-32-le", "utf-32-be", "utf-16", "utf-16-be", "utf-8-sig"]
)
async def test_a_document_in_another_encoding_is_read(encoding, own):
    (own / "other.xml").write_bytes(XML.decode().encode(encoding))
    run = await cli("vcpucount", str(own / "other.xml"), "--maximum")
    assert (run.code, run.stdout) == (0, "4\n"), run.stderr


@pytest.mark.parametrize(
    "encoding", ["cp037", "utf-7", "idna", "punycode", "big5", "base64", "undefined"]
)
async def test_a_document_in_an_odd_encoding_is_refused(encoding, own):
    text = f"<?xml version='1.0' encoding='{encoding}'?>".encode() + XML
    data = text.decode().encode("cp037") if encoding == "cp037" else text
    (own / "other.xml").write_bytes(data)
    assert (await cli("vcpuinfo", str(own / "other.xml"))).code == 3


@pytest.mark.parametrize("where", ["header", "digest", "cookie", "padding", "stream", "end"])
@pytest.mark.parametrize("cut", [False, True], ids=["flipped", "cut"])
async def test_a_saved_file_that_was_damaged_is_refused(where, cut, own):
    cookie = b"<qemu-migration/>" * 40
    stream = streams.written(
        {"pc.ram": 1 << 20}, [{"name": "cpu", "instance_id": 0}], between=bytes(3000)
    )
    made = saving.File(own / "guest", cookie)
    os.write(made.fd, stream)
    made.finish()
    data = bytearray((own / "guest").read_bytes())
    places = {
        "header": 20,
        "digest": 50,
        "cookie": 300,
        "padding": 4000,
        "stream": 5000,
        "end": len(data) - 1,
    }
    if cut:
        del data[places[where] :]
    else:
        data[places[where]] ^= 1
    (own / "guest").write_bytes(data)
    run = await cli("restore", str(own / "guest"))
    assert run.code == 3, run.stderr
