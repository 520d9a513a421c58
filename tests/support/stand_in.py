"""A process that stands for QEMU's: it has threads for the vCPUs, and holds the socket that
listens.

By these two a QEMU is found among the processes of a host. What it answers is the fake's, in the
test's process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

_THREADS = 40
_PROGRAM = f"""
import socket, sys, threading
ours = socket.socket(fileno=0)
stop = threading.Event()
threads = [threading.Thread(target=stop.wait, daemon=True) for _ in range({_THREADS})]
for thread in threads:
    thread.start()
ours.sendall((" ".join(str(thread.native_id) for thread in threads) + "\\n").encode())
held = []
while True:
    data, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if not data:
        break
    for one in held:
        one.close()
    held = [socket.socket(fileno=fd) for fd in fds]
    ours.sendall(b"1")
"""


class StandIn:
    """Runs until it is closed. `threads` are ids of its threads, without its main one."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, "qemu-stand-in"], stdin=theirs
        )
        theirs.close()
        with self._ours.makefile("r") as lines:
            self.threads = [int(word) for word in lines.readline().split()]

    @property
    def pid(self) -> int:
        return self._process.pid

    def hold(self, listening: int) -> None:
        """Have it hold this listening socket, instead of the one before, with its threads as free
        as we are.
        """
        for thread in self.threads:
            os.sched_setaffinity(thread, os.sched_getaffinity(0))
        socket.send_fds(self._ours, [b"1"], [listening])
        assert self._ours.recv(1) == b"1"

    def close(self) -> None:
        self._ours.close()
        self._process.wait()
