"""Starts a QEMU: one that ends with us (`run_qemu`), or one that goes on (`launch_qemu`).

We open the listening socket and pass it to QEMU as a descriptor, so nothing has to be polled: we
connect at once, and then QEMU greets when it is ready, or its exit closes the socket.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from qmpvcpu.aio import finish
from qmpvcpu.errors import VcpuConnectionError, VcpuFailed
from qmpvcpu.qemu.monitor import QmpMonitor, connect_monitor

#: Most bytes of QEMU's stderr that an error keeps.
_STDERR_KEPT: Final = 4000
#: Seconds that a QEMU that has closed its socket gets to exit.
EXIT_SECONDS: Final = 3.0
#: PR_SET_PDEATHSIG has no effect if the parent had ended before: QEMU is not started under another
#: parent.
_UNLESS_ORPHANED: Final = ("/bin/sh", "-c", 'test "$PPID" = "$0" && exec "$@"')

_PREFIX: Final = "qmpvcpu-run-"
#: A file that is locked while the folder is in use; the kernel unlocks it when the process ends.
_LOCK: Final = ".lock"
#: Seconds: a younger folder may not be locked yet.
_YOUNG: Final = 60.0
#: Most bytes of the path, so that a socket's name fits behind it: sun_path has 108 bytes, unix(7).
_LONGEST: Final = 70


class Child:
    """A child process, whose end is noticed through its pidfd; it must be waited for with `wait()`.

    asyncio of Python 3.11 starts a thread for each child, which takes 2 of the 50 ms of a throwaway
    QEMU. A pidfd needs neither a thread nor a signal handler.
    """

    def __init__(self, words: Sequence[str], stderr: IO[bytes], descriptors: Sequence[int]) -> None:
        """Start it with /dev/null as stdin and stdout. Raises OSError."""
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=descriptors,
        )
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._end)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the number of the signal that ended it; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self._process.kill()

    async def wait(self) -> int:
        """Wait until it has ended; returns its exit code."""
        await self._ended.wait()
        return self._process.wait()

    async def wait_at_most(self, seconds: float) -> None:
        """Wait until it has ended, or so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    def _end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._ended.set()


class QemuProcess:
    """A running QEMU; `folder` has mode 0700 and is removed at the end."""

    def __init__(
        self, process: Child, command: Sequence[str], folder: Path, monitor: QmpMonitor
    ) -> None:
        self.process = process
        self.command = tuple(command)
        self.folder = folder
        #: Our own monitor on its first QMP socket.
        self.monitor = monitor

    @property
    def pid(self) -> int:
        """The process id of QEMU itself."""
        return self.process.pid

    @property
    def qmp(self) -> str:
        """Path of its second QMP socket, free for others."""
        return str(self.folder / "qmp")

    def kill(self) -> None:
        """Send SIGKILL, without waiting: leaving `run_qemu` waits for the end of QEMU."""
        self.process.kill()

    def stderr(self) -> str:
        """The end of what QEMU wrote to stderr."""
        return _read_end(self.folder / "stderr")


@asynccontextmanager
async def run_qemu(
    binary: str,
    arguments: Sequence[str],
    *,
    channels: Sequence[str] = (),
    monitors: Sequence[str] = ("qmp",),
    start_timeout: float = 20.0,
) -> AsyncIterator[QemuProcess]:
    """Run `binary` with `arguments` and QMP sockets; at the end it is killed and reaped.

    If we are killed, the kernel kills QEMU as well (PR_SET_PDEATHSIG, set by util-linux's setpriv);
    if we are killed before that is set, QEMU does not start.

    Args:
        channels: names of further socket chardevs, which `arguments` may use; each listens at
            `folder/NAME`.
        monitors: names of its QMP sockets besides our own.
        start_timeout: seconds until it must greet.

    Raises:
        VcpuFailed: it exited; the message has its exit code and stderr.
        VcpuConnectionError: it runs and does not greet.
    """
    process: Child | None = None
    try:
        with throwaway_folder() as folder:
            # Not a socket to connect to: a QEMU that starts may greet twice, or lose a command
            # (qemu-facts.md).
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    process, command = _start(binary, arguments, folder, theirs, monitors, channels)
                monitor = await _connect(process, command, folder, ours, start_timeout)
            try:
                qemu = QemuProcess(process, command, folder, monitor)
                try:
                    yield qemu
                except Exception as error:
                    # Another connection may have noticed the end of QEMU first.
                    if monitor.is_lost or (
                        isinstance(error, VcpuConnectionError) and error.reason == "closed"
                    ):
                        error.add_note(await _last_words(qemu))
                    raise
                finally:
                    await finish(monitor.close())
            finally:
                # It ends while its folder is removed.
                process.kill()
    finally:
        if process is not None:
            await _end(process)


async def _connect(
    process: Child, command: Sequence[str], folder: Path, sock: socket.socket, timeout: float
) -> QmpMonitor:
    """Our own monitor. Raises what `run_qemu` raises."""
    try:
        return await connect_monitor(f"fd:{sock.fileno()}", connect_timeout=timeout)
    except VcpuConnectionError as error:
        if error.reason not in ("no-greeting", "malformed"):
            await process.wait_at_most(EXIT_SECONDS)
        if process.returncode is not None:
            raise _exited(command, process.returncode, _read_end(folder / "stderr")) from error
        raise VcpuConnectionError(
            f"{command[0]} runs, and its monitor is of no use: {error.message}",
            reason=error.reason,
            libvirt=error.libvirt,
            hint="check that it is a QEMU: start it by hand with -machine none -S -qmp stdio",
        ) from error


async def _last_words(qemu: QemuProcess) -> str:
    """How a QEMU ended that has closed its monitor, and what it wrote to stderr."""
    await qemu.process.wait_at_most(EXIT_SECONDS)
    code = qemu.process.returncode
    end = "closed its monitor and still runs" if code is None else f"exited with code {code}"
    return f"{qemu.command[0]} {end}: {qemu.stderr() or 'nothing on stderr'}"


def _start(
    binary: str,
    arguments: Sequence[str],
    folder: Path,
    monitor: socket.socket,
    monitors: Sequence[str],
    channels: Sequence[str],
) -> tuple[Child, list[str]]:
    with ExitStack() as ours:
        descriptors = [monitor.fileno()]
        own = ["-chardev", f"socket,id=own,fd={monitor.fileno()}", "-qmp", "chardev:own"]
        command = [binary, *own, *arguments]
        for name in (*monitors, *channels):
            chardev, sock = _listen(folder, name)
            descriptors.append(ours.enter_context(sock).fileno())
            # In front: a device can use only a chardev that comes before it.
            command[1:1] = chardev if name in channels else [*chardev, "-qmp", f"chardev:{name}"]
        stderr = ours.enter_context((folder / "stderr").open("wb"))
        setpriv = shutil.which("setpriv")
        prefix = (
            [setpriv, "--pdeathsig", "KILL", "--", *_UNLESS_ORPHANED, str(os.getpid())]
            if setpriv
            else []
        )
        process = _spawn([*prefix, *command], command, stderr, descriptors)
    return process, command


async def launch_qemu(
    binary: str,
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    *,
    monitors: Sequence[str],
    channels: Sequence[str],
    timeout: float,
) -> None:
    """Start a QEMU that goes into the background once it has set up its machine, and outlives us.

    It writes its pid to `folder/pid`, and its stderr to `log`. The command line, and what QEMU
    writes before it opens the log, are in `folder/command`. The log of the previous start is kept
    as `LOG.1`.

    Args:
        monitors: names of its QMP sockets in `folder`.
        channels: names of further socket chardevs there, which `arguments` may use.
        timeout: seconds until it must have set up its machine.

    Raises:
        VcpuFailed: it exited; the message has its exit code and stderr.
        VcpuConnectionError: it has not set up its machine in time; it may still run.
    """
    _rotate(log)
    with ExitStack() as ours:
        descriptors = []
        command = [binary]
        for name in (*monitors, *channels):
            chardev, sock = _listen(folder, name)
            descriptors.append(ours.enter_context(sock).fileno())
            command += chardev if name in channels else [*chardev, "-qmp", f"chardev:{name}"]
        # In the background stderr is /dev/null, unless QEMU writes a log (7.2 to 11.1): then stderr
        # is that log, from early on. "strace" turns the log on, and writes nothing to it.
        command += [*arguments, "-daemonize", "-pidfile", str(folder / "pid")]
        # By descriptor: in a name QEMU replaces %d by its pid, and refuses any other %.
        log_fd = os.open(
            log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        ours.callback(os.close, log_fd)
        os.fchmod(log_fd, 0o600)
        descriptors.append(log_fd)
        command += ["-D", f"/proc/self/fd/{log_fd}", "-d", "strace", "-msg", "timestamp=on"]
        stderr = ours.enter_context((folder / "command").open("ab"))
        os.fchmod(stderr.fileno(), 0o600)
        stderr.write(f"{shlex.join(command)}\n".encode(errors="replace"))
        stderr.flush()
        early = stderr.tell()
        process = _spawn(command, command, stderr, descriptors)
    try:
        async with asyncio.timeout(timeout):
            code = await process.wait()
    except TimeoutError as error:
        raise VcpuConnectionError(
            f"QEMU did not set up its machine within {timeout:g} s",
            reason="timeout",
            hint=f"look at {log}",
        ) from error
    finally:
        await _end(process)
    if code != 0:
        raise _exited(command, code, _read_end(folder / "command", early) + _read_end(log))


def _rotate(log: Path) -> None:
    with suppress(FileNotFoundError):
        log.rename(log.with_name(log.name + ".1"))


def _listen(folder: Path, name: str) -> tuple[list[str], socket.socket]:
    """The arguments of a chardev, and the listening socket that it takes over: nothing has to be
    polled.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(str(folder / name))
        sock.listen(8)
    except BaseException:
        sock.close()
        raise
    return ["-chardev", f"socket,id={name},fd={sock.fileno()},server=on,wait=off"], sock


def _spawn(
    words: Sequence[str], command: Sequence[str], stderr: IO[bytes], descriptors: Sequence[int]
) -> Child:
    try:
        return Child(words, stderr, descriptors)
    except OSError as error:
        raise VcpuFailed(
            f"cannot start '{command[0]}': {error.strerror}",
            hint="name a QEMU that `qmpvcpu doctor` lists",
        ) from error


def _read_end(path: Path, start: int = 0) -> str:
    """The end of a file, without its first `start` bytes."""
    with suppress(OSError):
        return path.read_bytes()[start:][-_STDERR_KEPT:].decode(errors="replace").strip()
    return ""


def _exited(command: Sequence[str], code: int, words: str) -> VcpuFailed:
    return VcpuFailed(
        f"{os.path.basename(command[0])} exited with code {code}" + (f": {words}" if words else ""),  # noqa: PTH119
        qmp_text=words or None,
        exit_code=code,
        hint="look at its command line: " + " ".join(command),
    )


async def _end(process: Child) -> None:
    """Kill and reap a child."""
    process.kill()
    await finish(process.wait())


# -- folders of throwaway guests: what a kill has left is removed when the next one is made --------


@contextmanager
def throwaway_folder() -> Iterator[Path]:
    """A new folder with mode 0700 and a short path, until the end of the body."""
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) >= _LONGEST:
        base = Path("/tmp")  # noqa: S108 - a folder in it, made by mkdtemp
    _sweep(base)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=base) as name:
        # The umask may have removed some of these bits.
        Path(name).chmod(0o700)
        fd = os.open(Path(name) / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(fd)


def _sweep(base: Path) -> None:
    """Remove the folders of processes that were killed. Never raises."""
    with suppress(OSError), os.scandir(base) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX):
                with suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    is_ours = found.st_uid == os.geteuid() and entry.is_dir(follow_symlinks=False)
                    if is_ours and time.time() - found.st_mtime > _YOUNG:
                        _remove_unheld(Path(entry.path))


def _remove_unheld(folder: Path) -> None:
    fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(fd)
