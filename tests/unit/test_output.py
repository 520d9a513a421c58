"""The end of output: closed, full, without a reader or not UTF-8, stdout and stderr never change
the exit code.
"""

from __future__ import annotations

import json
import os
from contextlib import asynccontextmanager

import pytest

from tests.support.cli import run_main
from tests.support.commands import start_cli
from tests.support.fake_qemu import FakeQemu
from tests.support.fake_qmp import serve
from tests.support.shells import shell
from tests.support.waiting import within

LOST = [
    ">/dev/full",
    ">&-",
    "2>&-",
    "2>/dev/full",
    ">&- 2>&-",
    ">/dev/full 2>/dev/full",
    "<&- >&- 2>&-",
    "| head -0",
]


@pytest.fixture
async def guest(tmp_path):
    qemu = FakeQemu()
    async with serve(tmp_path, qemu.script) as path:
        qemu.path = path
        yield qemu


@pytest.mark.parametrize("redirection", LOST)
async def test_a_plug_that_cannot_be_told_is_done_and_exits_with_its_own_code(guest, redirection):
    run = await shell(f'qmpvcpu setvcpu "$1" 2 --enable {redirection}', guest.path)
    assert (run.code, guest.plugged_ids) == (0, [0, 2])


@pytest.mark.parametrize("redirection", LOST)
async def test_a_plug_that_fails_exits_with_its_own_code(guest, redirection):
    guest.add_errors = {2: "no room"}
    run = await shell(f'qmpvcpu --json setvcpu "$1" 2 --enable {redirection}', guest.path)
    assert (run.code, guest.plugged_ids) == (8, [0])


@pytest.mark.parametrize(
    ("redirection", "why"), [(">/dev/full", "No space left on device"), (">&-", "it is closed")]
)
async def test_stderr_says_what_stdout_could_not_take(guest, redirection, why):
    run = await shell(f'qmpvcpu vcpuinfo "$1" {redirection}', guest.path)
    assert run.stderr.endswith(
        f"qmpvcpu: cannot write to stdout: {why}; the exit code is 0 all the same\n"
    )


async def test_a_reader_that_left_is_not_worth_a_line(guest):
    assert "stdout" not in (await shell('qmpvcpu vcpuinfo "$1" | head -0', guest.path)).stderr


@pytest.mark.parametrize("words", ["--help", "--version", "completion bash", "list"])
async def test_a_full_disk_is_told_whatever_was_asked(words):
    run = await shell(f"qmpvcpu {words} >/dev/full")
    assert (run.code, "No space left on device" in run.stderr) == (0, True)


async def test_a_watch_ends_when_its_reader_leaves(guest):
    run = await within(
        shell('qmpvcpu watch "$1" | head -n 1', guest.path), "the first line is there"
    )
    assert (run.stdout.count("\n"), run.stderr) == (1, "")


async def test_a_watch_that_nobody_can_read_ends(guest):
    run = await within(shell('qmpvcpu watch "$1" >/dev/full', guest.path), "it ends")
    assert (run.code, "No space left on device" in run.stderr) == (2, True)


ASCII = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("environment", ASCII, ids=["ascii", "C"])
async def test_a_name_that_the_terminal_cannot_show_is_escaped(environment):
    run = await shell("qmpvcpu vcpuinfo /nowhere/$'Zürich \\xff'", **environment)
    assert (run.code, run.stderr.isascii(), "rich" in run.stderr) == (7, True, True)


async def test_a_name_that_is_not_utf_8_is_escaped():
    run = await shell("qmpvcpu vcpuinfo /nowhere/$'\\xff\\xfe'")
    assert (run.code, r"/nowhere/\udcff\udcfe" in run.stderr) == (7, True)


async def test_json_is_ascii_and_keeps_the_name():
    run = await shell("qmpvcpu --json vcpuinfo /nowhere/$'Zürich \\xff'", LC_ALL="C")
    assert (
        run.stdout.isascii(),
        "Zürich \udcff" in json.loads(run.stdout)["error"]["message"],
    ) == (True, True)


@pytest.mark.parametrize(
    "words", [["--help"], ["setvcpu", "--help"], ["completion", "bash"], ["--version"], []]
)
def test_json_is_one_document_whatever_is_asked(words):
    assert run_main([*words, "--json"]).json


async def test_qemus_socket_never_becomes_our_stderr(guest):
    """With 2 closed the next file that is opened would be 2, and what libraries write there would
    go to QEMU.
    """
    run = await shell('qmpvcpu --debug vcpuinfo "$1" <&- 2>&-', guest.path)
    assert run.code == 0


# -- text of others --------------------------------------------------------------------------------

NASTY = {
    "colour": "a\x1b[31mb",
    "title": "\x1b]0;owned\x07",
    "c1": "\x9b31m",
    "newline": "a\nqmpvcpu: all is well",
    "return": "a\rqmpvcpu: all is well",
    "bidi": "a\u202eb\u2066",
    "surrogate": "\udc80",
    "backspace": "aaa\b\b\b",
    "nul": "\0",
    "separator": "\u2028",
    "long": "x" * 100_000,
}


@asynccontextmanager
async def saying(tmp_path, text):
    """A QEMU that refuses to plug with these words."""
    qemu = FakeQemu()
    qemu.add_errors = {2: text}
    async with serve(tmp_path, qemu.script) as path:
        yield path


@pytest.mark.parametrize("name", NASTY)
async def test_qemus_words_do_nothing_to_a_terminal(tmp_path, name):
    async with saying(tmp_path, f"no {NASTY[name]}") as path:
        run = await shell('qmpvcpu setvcpu "$1" 2 --enable', path)
    lines = run.stderr.splitlines()
    assert lines[0].startswith("qmpvcpu: failed: vCPU 2: no ")
    assert all(line.isprintable() and len(line) <= 4000 for line in lines)


@pytest.mark.parametrize("name", ["colour", "newline", "surrogate", "nul"])
async def test_json_keeps_qemus_words(tmp_path, name):
    async with saying(tmp_path, NASTY[name]) as path:
        run = await shell('qmpvcpu --json setvcpu "$1" 2 --enable', path)
    assert run.json["error"]["qmp_text"] == NASTY[name]


async def test_the_debug_log_does_nothing_to_a_terminal(tmp_path):
    async with saying(tmp_path, NASTY["colour"]) as path:
        process = await start_cli("--debug", "setvcpu", path, "2", "--enable")
        _, stderr = await process.communicate()
    assert (b"Traceback" in stderr, b"\x1b" in stderr) == (True, False)


async def test_names_in_a_definition_do_nothing_to_a_terminal(tmp_path):
    path = tmp_path / "d.xml"
    path.write_text(
        "<domain><name>a&#x9b;31m\u202e</name><vcpu>2</vcpu></domain>", encoding="utf-8"
    )
    run = await shell('qmpvcpu vcpuinfo "$1"; qmpvcpu dumpxml "$1" --inactive >&2', str(path))
    assert all(line.isprintable() for line in run.stdout.splitlines())


async def test_what_others_named_our_files_does_nothing_to_a_terminal(tmp_path):
    os.mkfifo(tmp_path / "a\x1b[2Jb")
    run = await shell('qmpvcpu vcpuinfo "$1"', str(tmp_path / "a\x1b[2Jb"))
    assert (run.code != 0, run.stderr.replace("\n", "").isprintable()) == (True, True)
