"""A QEMU that waits for itself is known by one thread that waits for the end of another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.support.known_ends import deadlocked, known_end
from tests.support.qemus import paused
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


@pytest.mark.qemu
@pytest.mark.parametrize(("arch", "is_known"), [("ppc64", True), ("s390x", False)])
async def test_a_qemu_that_crashed_is_one_for_ppc64_alone(arch, is_known):
    async with paused(arch, "10.0", "1,maxcpus=2") as qemu:
        assert known_end() is None
        os.kill(qemu.pid, signal.SIGSEGV)
        await qemu.wait()
        assert (known_end() is not None) == is_known
