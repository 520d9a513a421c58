"""Which program is written into a definition: one that nobody else can change, of a process that
nobody else has started.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.claims import arguments_of, program_of

NOBODY = 65534


@pytest.fixture
def program():
    """A program in a folder of its own; called, it starts, and its pid comes back."""
    started = []

    def start(**options):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([start.path, "-u"], **pipes, **options)
        started.append(process)
        # It answers: by then /proc shows what it is.
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"\n"
        return process.pid

    with TemporaryDirectory() as top:
        start.path = Path(top, "above", "bin", "qemu")
        start.path.parent.mkdir(parents=True)
        shutil.copy("/usr/bin/cat", start.path)
        yield start
        for process in started:
            process.kill()
            process.communicate()


def test_a_program_of_our_own_is_written(program):
    assert program_of(program()) == str(program.path)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_program_that_anybody_can_replace_is_not(program, level):
    place = [program.path, *program.path.parents][level]
    place.chmod(0o777)
    assert program_of(program()) is None


def test_a_folder_above_it_may_be_everybodys_with_the_sticky_bit(program):
    program.path.parents[1].chmod(0o1777)
    assert program_of(program()) == str(program.path)


def test_a_program_that_has_been_deleted_is_not(program):
    pid = program()
    program.path.unlink()
    assert program_of(pid) is None


def test_one_that_has_been_replaced_is_the_new_one(program):
    pid = program()
    program.path.unlink()
    shutil.copy("/usr/bin/cat", program.path)
    assert program_of(pid) == str(program.path)


def test_the_arguments_of_our_process_are_read(program):
    assert arguments_of(program()) == [str(program.path), "-u"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o755, 0o4755])
def test_the_arguments_of_another_users_process_are_not_even_with_the_setuid_bit(program, mode):
    for folder in program.path.parents[:3]:
        folder.chmod(0o755)
    program.path.chmod(mode)
    assert arguments_of(program(user=NOBODY)) == []
