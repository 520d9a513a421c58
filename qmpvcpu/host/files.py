"""Where state is kept, and files that are replaced whole or not at all.

A new version is staged: written and synced beside the old one, so that a full disk or a missing right shows before
anything else is done. Committing it is one rename, under a lock of the folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from qmpvcpu.host.owners import check_own, trusted_folder
from qmpvcpu.kinds import is_pipe, look_at, open_file, reopen

_PAUSE: Final = 0.005
#: Bytes that are read at once.
_CHUNK: Final = 1 << 20
#: How long nothing may come from a pipe: a person may type a password before what is written to it begins.
_SILENT_SECONDS: Final = 60.0
_LOOK_MS: Final = 100
_INTERRUPTS: Final = frozenset({signal.SIGINT, signal.SIGTERM})
#: Between the file's name and our process id in the name of what is staged.
_MARK: Final = ".new-"
#: Bytes of a name that leave room for what stands around it meanwhile.
_LONGEST: Final = 200


class LockTimeout(OSError):
    """Another process held the lock of a folder for all the time there was."""


def state_folder() -> Path:
    """Definitions and pending unplugs: `QMPVCPU_STATE`, else the system's (root) or the user's (XDG) folder.

    It need not exist.

    Raises:
        VcpuRefused: somebody else can write to it.
    """
    return trusted_folder(_state_path(), "state folder")


def _state_path() -> Path:
    if own := os.environ.get("QMPVCPU_STATE"):
        return Path(own)
    if os.geteuid() == 0:
        return Path("/var/lib/qmpvcpu")
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "qmpvcpu"


@contextmanager
def closing(fd: int) -> Iterator[int]:
    """A descriptor, closed at the end."""
    try:
        yield fd
    finally:
        os.close(fd)


def read_file(path: str | os.PathLike[str], limit: int, *, with_pipes: bool = False) -> bytes:
    """A regular file, and of one that has more than `limit` bytes no more than that and one.

    Args:
        path: of a user.
        limit: bytes.
        with_pipes: also what somebody writes to a pipe without a name, such as a shell's `<(…)`.

    Raises:
        OSError: it cannot be read, or is a FIFO, a device or the like.
    """
    with closing(look_at(path)) as found:
        if with_pipes and is_pipe(found):
            fd = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        else:
            fd = reopen(found, os.O_RDONLY, path)
    with closing(fd):
        return read_stream(fd, limit)


def read_own(path: str | os.PathLike[str], limit: int) -> bytes:
    """As `read_file`, a file in a folder of ours: nobody but this user and root can have written it.

    Raises:
        NotOurs: somebody else could.
        OSError: it cannot be read, or is not a regular file: a link may lead to anything.
    """
    text = os.fspath(path)
    folder = os.path.dirname(text)  # noqa: PTH120 - each unplug waits for this
    check_own(folder, os.stat(folder or "."))  # noqa: PTH116
    with closing(look_at(text, follow=False)) as found:
        check_own(text, os.fstat(found), with_group=False)
        fd = reopen(found, os.O_RDONLY, text)
    with closing(fd):
        return read_stream(fd, limit)


def read_stream(fd: int, limit: int, seconds: float = _SILENT_SECONDS) -> bytes:
    """All that comes from a descriptor, and of more than `limit` bytes no more than that and one.

    The event loop does not run meanwhile, so a signal ends this.

    Args:
        fd: open to be read.
        limit: bytes.
        seconds: how long nothing may come.

    Raises:
        OSError: it cannot be read, or nothing came for so long.
        KeyboardInterrupt: SIGINT or SIGTERM came; its handler, if there is one, was called.
    """
    data = bytearray()
    with _held_signals():
        while len(data) <= limit:
            _wait_readable(fd, seconds)
            part = os.read(fd, min(_CHUNK, limit + 1 - len(data)))
            if not part:
                break
            data += part
    return bytes(data)


@contextmanager
def _held_signals() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_readable(fd: int, seconds: float) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + seconds
    while not poll.poll(_LOOK_MS):
        if signal.sigpending() & _INTERRUPTS:
            raise KeyboardInterrupt
        if time.monotonic() >= deadline:
            raise TimeoutError(errno.ETIMEDOUT, f"nothing came for {seconds:g} s")


class StagedFile:
    """A new version that waits beside `path`: `commit()` or `discard()` it, once."""

    def __init__(self, path: Path, temporary: Path, *, sync: bool = True) -> None:
        self.path = path
        self._temporary: Path | None = temporary
        self._sync = sync

    def commit(self) -> None:
        """Put it in the place of the old version, for good.

        Raises:
            OSError: the old version stands, and this one is discarded.
        """
        assert self._temporary is not None
        try:
            self._temporary.rename(self.path)
        except BaseException:
            self.discard()
            raise
        self._temporary = None
        # What cannot be synced now is there all the same.
        if self._sync:
            with suppress(OSError):
                sync_folder(self.path.parent)

    def discard(self) -> None:
        """Take it away, if it was not committed. Never raises."""
        temporary, self._temporary = self._temporary, None
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def staged_name(path: Path) -> Path:
    """The name of what is to become `path`, by which `sweep` knows whether its process still runs."""
    # Whatever the name: NAME_MAX of Linux is 255 bytes.
    name = os.fsencode(path.name)[:_LONGEST].decode(errors="ignore")
    return path.with_name(f".{name}{_MARK}{os.getpid()}-{time.monotonic_ns()}")


def stage_file(path: Path, data: bytes, mode: int = 0o600, *, sync: bool = True) -> StagedFile:
    """Write and sync a new version beside `path`; what is there keeps its owner and mode.

    Without `sync`, a crash of the host may leave a torn file: for what can be checked and made again.

    Raises:
        OSError: it cannot be written there; nothing has changed.
    """
    # Where links lead to, so that a link stays one.
    path = Path(os.path.realpath(path))
    temporary = staged_name(path)
    staged = StagedFile(path, temporary, sync=sync)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        with os.fdopen(fd, "wb") as file:
            # The umask may have left less of it.
            os.fchmod(fd, mode)
            with suppress(FileNotFoundError):
                found = path.stat()
                os.fchmod(fd, stat.S_IMODE(found.st_mode))
                if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
                    with suppress(PermissionError):
                        os.fchown(fd, found.st_uid, found.st_gid)
            file.write(data)
            file.flush()
            if sync:
                os.fsync(fd)
    except BaseException:
        staged.discard()
        raise
    return staged


def sync_folder(folder: Path) -> None:
    """Make renames and removals in it last. Some file systems cannot, and need not."""
    with closing(_open_folder(folder)) as fd, suppress(OSError):
        os.fsync(fd)


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


class FileLock:
    """A lock that is held until `release()`, or until this process ends."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def release(self) -> None:
        """Let go. May be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def try_lock(path: Path) -> FileLock | None:
    """Hold a file that is there for that alone; None while anybody else holds it.

    Raises:
        OSError: it can be neither opened nor made.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # The umask may have left less of it.
        os.fchmod(fd, 0o600)
    except FileExistsError:
        fd = open_file(path, os.O_RDWR, follow=False)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return FileLock(fd)


@contextmanager
def locked_folder(folder: Path, seconds: float, *, given_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold a folder against every other process, and thread, that does so too.

    Args:
        folder: a folder that exists.
        seconds: how long to wait.
        given_up: asked while waiting; true ends it.

    Raises:
        LockTimeout: it was not to be had in that time.
        OSError: there is no such folder.
    """
    with closing(_open_folder(folder)) as fd:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline or given_up():
                    raise LockTimeout(11, "another process holds it", str(folder)) from None
                time.sleep(_PAUSE)
        sweep(folder)
        yield


def sweep(folder: Path) -> None:
    """Remove what a process that was killed had staged. Never raises."""
    with suppress(OSError):
        for name in os.listdir(folder):  # noqa: PTH208 - names are all we need
            if name.startswith(".") and _MARK in name:
                pid = name.rpartition(_MARK)[2].split("-")[0]
                if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                    with suppress(OSError):
                        (folder / name).unlink()
