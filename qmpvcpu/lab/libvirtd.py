"""A throwaway libvirtd of our own, for the tests, the benchmark and `qmpvcpu compare`.

There are two processes: a supervisor (`supervisor`) and the libvirtd that it starts.

The folders of root's libvirtd are fixed, so the supervisor mounts its own folders over them, in a
mount namespace of its own. The folders of an ordinary user's libvirtd follow XDG_*. The system's
libvirt is neither used nor changed.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote

from qmpvcpu.aio import finish
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import VcpuFailed, VcpuUsageError

#: Seconds to wait for a daemon to start, for a daemon to end, and for the supervisor to clean up.
START_SECONDS: Final = 20.0
STOP_SECONDS: Final = 20.0
CLOSE_SECONDS: Final = 20.0
#: The longest path of a folder for temporary files that leaves room for the names of a guest's
#: sockets (108 bytes).
ROOM: Final = 20
#: How many characters of the daemon's log an error contains.
LOG_END: Final = 2000

#: Debian has libvirtd in a folder that is not in an ordinary user's PATH.
SBIN: Final = "/usr/local/sbin:/usr/sbin:/sbin"

#: A call that every client may send to the daemon, REMOTE_PROC_AUTH_LIST (libvirt's
#: remote_protocol.x): length, program, version, procedure, type, serial, status. The daemon answers
#: only when all drivers have started.
PING: Final = struct.pack(">7I", 28, 0x20008086, 1, 66, 0, 0, 0)

SENT: Final = "QEMU_MONITOR_SEND_MSG: "


class Libvirtd:
    """A running daemon of our own.

    Attributes:
        folder: contains all its files.
        uri: the URI for libvirt-python and virsh of the same user.
        log: its log file.
    """

    def __init__(self, folder: Path, *, log_qmp: bool, supervisor: _Supervisor) -> None:
        self.folder: Final = folder
        self.log: Final = folder / "log"
        system = os.geteuid() == 0
        self._socket = (
            folder / "libvirt-sock" if system else folder / "run" / "libvirt" / "libvirt-sock"
        )
        kind, path = "system" if system else "session", quote(os.fspath(self._socket))
        self.uri: Final = f"qemu+unix:///{kind}?socket={path}"
        self._log_qmp = log_qmp
        self._supervisor = supervisor

    @property
    def pid(self) -> int:
        """The daemon's process id; if none runs, that of the last one."""
        return self._supervisor.pid

    @property
    def running(self) -> bool:
        """Whether the daemon runs."""
        return self._supervisor.ended is not None and not self._supervisor.ended.done()

    async def start(self) -> None:
        """Start the daemon, with its existing state, and wait until it answers.

        Raises:
            VcpuFailed: it ended, or did not answer in START_SECONDS; the message has the end of its
                log.
            VcpuRefused: it cannot have a mount namespace of its own.
        """
        if self.running:
            raise VcpuUsageError("libvirtd is running already")
        try:
            async with asyncio.timeout(START_SECONDS):
                if reason := await asyncio.shield(self._supervisor.ready):
                    raise catalogue.NO_MOUNTS.error(why=reason)
                ended = self._supervisor.start()
                while not await _answers(self._socket):
                    if ended.done():
                        code = ended.result()
                        raise self._failed(f"libvirtd ended as it started ({_how(code)})", code)
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise self._failed(f"libvirtd did not answer in {START_SECONDS:.0f} s") from None

    async def stop(self) -> None:
        """Send SIGTERM to the daemon and wait until it has ended. Its guests continue to run, and
        its state stays.

        Raises:
            VcpuFailed: it has not ended in STOP_SECONDS.
        """
        await self._end("term")

    async def kill(self) -> None:
        """Send SIGKILL to the daemon and wait until it has ended. Its guests continue to run, and
        its state stays.
        """
        await self._end("kill")

    async def restart(self, *, kill: bool = False) -> None:
        """End the daemon (SIGTERM, or SIGKILL with `kill`), start another one with its state, and
        wait until that answers.
        """
        await (self.kill() if kill else self.stop())
        await self.start()

    def log_position(self) -> int:
        """The size of the log in bytes: a `since` for `qmp_commands`."""
        return self.log.stat().st_size if self.log.exists() else 0

    def qmp_commands(self, since: int = 0) -> list[dict[str, Any]]:
        """Every QMP command that libvirt sent to a monitor after log position `since`, in order.

        They include the commands to QEMUs that it starts to query their capabilities. Needs
        `log_qmp=True`.
        """
        if not self._log_qmp:
            raise VcpuUsageError(
                "QMP commands are not in the log", hint="run_libvirtd(log_qmp=True)"
            )
        return _sent_commands(_read_from(self.log, since))

    def log_end(self) -> str:
        """The end of what the daemon wrote to its log and to stderr."""
        parts = self._supervisor.stderr_end(), _read_from(self.log, -LOG_END).strip()
        return "\n".join(part for part in parts if part)

    async def _end(self, word: str) -> None:
        if not self.running:
            return
        ended = self._supervisor.signal(word)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await asyncio.shield(ended)
        except TimeoutError:
            raise self._failed(
                f"libvirtd did not end in {STOP_SECONDS:.0f} s after SIG{word.upper()}"
            ) from None

    def _failed(self, what: str, code: int | None = None) -> VcpuFailed:
        end = self.log_end()
        return VcpuFailed(
            f"{what}: {end}" if end else what, exit_code=code, hint=catalogue.NO_LIBVIRTD.hint
        )


@asynccontextmanager
async def run_libvirtd(*, log_qmp: bool = False) -> AsyncIterator[Libvirtd]:
    """Run a libvirtd that nobody else uses. Afterwards, it and its guests, mounts and files are
    removed.

    As root it is a system daemon, else the user's session daemon. With `log_qmp`, libvirt logs
    every QMP message, which makes it slower.

    Raises:
        VcpuRefused: libvirtd is not installed, or cannot have a mount namespace of its own.
        VcpuFailed: it does not start.
    """
    program = shutil.which("libvirtd", path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}")
    if program is None:
        raise catalogue.NO_LIBVIRTD.error()
    # The supervisor makes the folder, so that it also removes it if we are killed at any time.
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) >= ROOM:
        base = "/tmp"  # noqa: S108
    folder = Path(base, f"qmpvcpu-{secrets.token_hex(4)}")
    supervisor = await _Supervisor.open(folder, program, log_qmp)
    daemon = Libvirtd(folder, log_qmp=log_qmp, supervisor=supervisor)
    try:
        await daemon.start()
        yield daemon
    finally:
        await finish(supervisor.close())


class _Supervisor:
    """Our end of the socket to the supervisor. We send `start`, `term` and `kill`; it sends the
    daemon's pid and exit code.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        stderr: IO[bytes],
        folder: Path,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.pid = 0
        #: The exit code of the daemon that was started last; None if the supervisor ended before
        #: it.
        self.ended: asyncio.Future[int | None] | None = None
        #: Set once: None if the supervisor is ready to start a daemon, else the reason why it is
        #: not.
        self.ready: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        #: The supervisor's mount namespace, as /proc names it; empty if it has none of its own.
        self.namespace = ""
        self._process = process
        self._stderr = stderr
        self._folder = folder
        self._reader = reader
        self._writer = writer
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def open(cls, folder: Path, program: str, log_qmp: bool) -> _Supervisor:
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            stderr = tempfile.TemporaryFile()  # noqa: SIM115
            try:
                process = _spawn_supervisor(folder, program, log_qmp, theirs, stderr)
            except BaseException:
                writer.close()
                stderr.close()
                raise
        return cls(process, stderr, folder, reader, writer)

    def stderr_end(self) -> str:
        """The end of what the supervisor and the daemon wrote to stderr."""
        size = os.fstat(self._stderr.fileno()).st_size
        return (
            os.pread(self._stderr.fileno(), LOG_END, max(0, size - LOG_END))
            .decode(errors="replace")
            .strip()
        )

    def start(self) -> asyncio.Future[int | None]:
        self.ended = asyncio.get_running_loop().create_future()
        if self._listener.done():
            self.ended.set_result(None)
        self._writer.write(b"start\n")
        return self.ended

    def signal(self, word: str) -> asyncio.Future[int | None]:
        assert self.ended is not None
        self._writer.write(word.encode() + b"\n")
        return self.ended

    async def close(self) -> None:
        """Make the supervisor clean up and end. Raises VcpuFailed if it has not ended in
        CLOSE_SECONDS.
        """
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                if self._writer.can_write_eof() and not self._writer.is_closing():
                    self._writer.write_eof()
                await self._listener
                await asyncio.to_thread(self._process.wait, CLOSE_SECONDS)
        except (TimeoutError, subprocess.TimeoutExpired):
            raise VcpuFailed(
                f"processes of the libvirtd in '{self._folder}' do not end",
                hint=f"see `ps --ppid {self._process.pid}`",
            ) from None
        finally:
            self._writer.close()
            self._stderr.close()
        if (
            self._folder.exists()
        ):  # the supervisor was killed, and the kernel has killed the daemon with it
            _kill_strays(self._folder, self.namespace)
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _listen(self) -> None:
        with suppress(ConnectionError):
            while line := await self._reader.readline():
                word, _, rest = line.decode(errors="replace").strip().partition(" ")
                if word == "ready":
                    self.namespace = rest
                    self.ready.set_result(None)
                elif word == "refused":
                    self.ready.set_result(rest)
                elif word == "started":
                    self.pid = int(rest)
                elif word == "ended" and self.ended is not None and not self.ended.done():
                    self.ended.set_result(int(rest))
        if not self.ready.done():
            self.ready.set_result(None)
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(None)


def _spawn_supervisor(
    folder: Path, program: str, log_qmp: bool, sock: socket.socket, stderr: IO[bytes]
) -> subprocess.Popen[bytes]:
    package = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            "qmpvcpu.lab.supervisor",
            str(os.getpid()),
            str(folder),
            program,
            "qmp" if log_qmp else "",
        ],
        env=os.environ | {"PYTHONPATH": str(package)},
        cwd="/",
        stdin=sock.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,  # Ctrl-C must reach only us
    )


async def _answers(path: Path) -> bool:
    """Whether a libvirtd answers at this socket; it listens long before it answers."""
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    try:
        writer.write(PING)
        return len(await reader.readexactly(len(PING))) == len(PING)
    except (OSError, EOFError):
        return False
    finally:
        writer.close()


def _how(code: int | None) -> str:
    if code is None:
        return "its supervisor has ended"
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _read_from(path: Path, position: int) -> str:
    """The text of a file from a position in bytes; a negative one counts from the end. Empty if it
    cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size + position) if position < 0 else position)
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _sent_commands(log: str) -> list[dict[str, Any]]:
    decoder = json.JSONDecoder()
    commands = []
    for line in log.splitlines():
        _, found, rest = line.partition(SENT)
        if found:
            with suppress(ValueError):
                message, _ = decoder.raw_decode(rest, rest.index("{"))
                commands.append(message)
    return commands


def _kill_strays(folder: Path, namespace: str) -> None:
    """Send SIGKILL to all processes in that mount namespace. Without one, to the QEMUs with files
    in the folder.
    """
    files = os.fsencode(folder / "etc" / "libvirt" / "qemu" / "lib") + b"/"
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if namespace:
                ours = str((entry / "ns" / "mnt").readlink()) == namespace
            else:
                ours = files in (entry / "cmdline").read_bytes()
            if ours:
                os.kill(int(entry.name), signal.SIGKILL)
