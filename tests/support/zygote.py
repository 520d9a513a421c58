"""A process that has the command line loaded, and forks for each command: a start costs 15 ms in
place of 300.

Each command is a process of its own all the same, with its own descriptors, environment and folder.
What depends on how Python starts (its options, its encoding, signals while it loads) is tested with
`commands.start_cli`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress

from tests.support import effects
from tests.support.measured import measured

_LENGTH = struct.Struct("!I")
#: What most commands load.
_MODULES = (
    *("qmpvcpu.cli.run", "qmpvcpu.cli.commands.counts", "qmpvcpu.cli.commands.vcpus"),
    *("qmpvcpu.cli.commands.boot", "qmpvcpu.cli.commands.migrate", "qmpvcpu.cli.commands.watch"),
    *(
        "qmpvcpu.domain.backends.libvirt",
        "qmpvcpu.domain.pin",
        "qmpvcpu.qemu.monitor",
        "qmpvcpu.qemu.agent",
    ),
    *("qmpvcpu.app.start", "qmpvcpu.app.migrate", "qmpvcpu.app.definitions", "qmpvcpu.app.define"),
    *("qmpvcpu.app.saving", "qmpvcpu.app.doctor", "qmpvcpu.app.libvirt_schema"),
)


class Zygote:
    """The parent's end. Not for several threads."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._pid = os.fork()
            if self._pid == 0:
                ours.close()
                os.dup2(theirs.fileno(), 3)
                os.set_inheritable(3, True)
                os.execv(sys.executable, [sys.executable, "-m", "tests.support.zygote"])
        self._socket = ours

    def close(self) -> None:
        self._socket.close()
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    async def run(
        self, words: tuple[str, ...], more: Mapping[str, str] | None = None
    ) -> tuple[int, bytes, bytes]:
        """One command: its exit code (negative: the signal that ended it), stdout and stderr.
        `more` is for its environment.
        """
        pipes = [os.pipe() for _ in range(3)]
        request = json.dumps([list(words), {**os.environ, **(more or {})}, os.getcwd()]).encode()
        try:
            socket.send_fds(
                self._socket, [_LENGTH.pack(len(request))], [write for _, write in pipes]
            )
            self._socket.sendall(request)
        finally:
            for _, write in pipes:
                os.close(write)
        stdout, stderr, status = await asyncio.gather(*(_read(read) for read, _ in pipes))
        return int(status), stdout, stderr


async def _read(fd: int) -> bytes:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader, loop=loop), os.fdopen(fd, "rb", 0)
    )
    try:
        return await reader.read()
    finally:
        transport.close()


def serve(parent: socket.socket) -> None:
    """Fork for each request, until the parent is gone."""
    for name in _MODULES:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        head, fds, _, _ = socket.recv_fds(parent, _LENGTH.size, 3)
        if not head:
            return
        (length,) = _LENGTH.unpack(head)
        data = b""
        while len(data) < length:
            data += parent.recv(length - len(data))
        if os.fork() == 0:
            parent.close()
            _watch(fds, *json.loads(data))
        for fd in fds:
            os.close(fd)


def _watch(fds: list[int], words: list[str], environment: dict[str, str], folder: str) -> None:
    """Run one command in a child, and say how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    stdout, stderr, status = fds
    pid = os.fork()
    if pid == 0:
        os.close(status)
        _command(stdout, stderr, words, environment, folder)
    os.close(stdout)
    os.close(stderr)
    plan = effects.read_plan(environment)
    if plan is not None and plan.after is not None:
        signal.signal(signal.SIGALRM, lambda *_: effects.act(plan, own=pid))
        signal.setitimer(signal.ITIMER_REAL, plan.after)
    _, how = os.waitpid(pid, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.write(status, str(os.waitstatus_to_exitcode(how)).encode())
    os._exit(0)


def _command(
    stdout: int, stderr: int, words: list[str], environment: dict[str, str], folder: str
) -> None:
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    effects.install_planned()
    sys.argv = ["qmpvcpu", *words]
    code: object = 1
    try:
        from qmpvcpu.cli import main

        with measured():
            code = main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve(socket.socket(fileno=3))
