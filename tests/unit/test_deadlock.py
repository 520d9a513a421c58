"""A QEMU that waits for itself is known by one thread that waits for the end of another."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.deadlock import deadlocked
from tests.support.waiting import until

THREAD = """
import ctypes, time
libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
libc.pthread_create(ctypes.byref(thread), None, libc.pause, None)
print(flush=True)
{}
"""


@pytest.fixture
def process():
    """One with a second thread that does not end; what the first does is up to the test."""
    found = []

    def start(line):
        words = [sys.executable, "-c", THREAD.format(line)]
        found.append(subprocess.Popen(words, stdout=subprocess.PIPE))
        found[0].stdout.readline()
        return found[0].pid

    yield start
    found[0].kill()
    found[0].communicate()


async def test_a_thread_that_waits_for_the_end_of_another_is_found(process):
    pid = process("libc.pthread_join(thread, None)")
    await until(lambda: deadlocked() == [pid], "it waits")


def test_threads_that_wait_for_something_else_are_not(process):
    process("time.sleep(999)")
    assert deadlocked() == []
