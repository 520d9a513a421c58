"""The state folder, and files that are replaced as a whole or not at all.

A new version is staged: it is written and synced next to the old one, so that a full disk or a
missing right is found before anything else is done. To commit it is one rename, under a lock of the
folder.
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
#: Bytes that are read in one step.
_CHUNK: Final = 1 << 20
#: How long a pipe may be silent: a user may have to type a password before its writer begins.
_SILENT_SECONDS: Final = 60.0
_LOOK_MS: Final = 100
_INTERRUPTS: Final = frozenset({signal.SIGINT, signal.SIGTERM})
#: In the name of a staged file, this stands between the name of the file and our process id.
_MARK: Final = ".new-"
#: The longest name, in bytes, that leaves room for the prefix and suffix of the staged name.
_LONGEST: Final = 200


class LockTimeout(OSError):
    """Another process held the lock of a folder until the time was up."""


def state_folder() -> Path:
    """The folder of definitions and pending unplugs. It need not exist.

    It is `QMPVCPU_STATE` if that is set, else the system's (root) or the user's (XDG) folder.

    Raises:
        VcpuRefused: another user can write to it.
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
    """Close a descriptor at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def read_file(path: str | os.PathLike[str], limit: int, *, with_pipes: bool = False) -> bytes:
    """Read a regular file, but at most `limit` + 1 bytes of it.

    Args:
        path: a file that the user named.
        limit: bytes.
        with_pipes: also read from a pipe without a name, such as a shell's `<(…)`.

    Raises:
        OSError: it cannot be read, or it is a FIFO, a device or another special file.
    """
    with closing(look_at(path)) as found:
        if with_pipes and is_pipe(found):
            fd = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        else:
            fd = reopen(found, os.O_RDONLY, path)
    with closing(fd):
        return read_stream(fd, limit)


def read_own(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a file in a folder of ours, like `read_file`. Only this user and root can have written
    it.

    Raises:
        NotOurs: another user could have written it.
        OSError: it cannot be read, or is not a regular file. Links are not followed: they may lead
            to anything.
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
    """Read a descriptor to its end, but at most `limit` + 1 bytes.

    The event loop does not run meanwhile, so a signal ends the read.

    Args:
        fd: a descriptor that is open for reading.
        limit: bytes.
        seconds: the longest time without any data.

    Raises:
        OSError: it cannot be read, or there was no data for `seconds`.
        KeyboardInterrupt: SIGINT or SIGTERM came. Its handler, if there is one, was called.
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
            raise TimeoutError(errno.ETIMEDOUT, f"no data came for {seconds:g} s")


class StagedFile:
    """A new version of `path`, in a file next to it. Call `commit()` or `discard()`, once."""

    def __init__(self, path: Path, temporary: Path, *, sync: bool = True) -> None:
        self.path = path
        self._temporary: Path | None = temporary
        self._sync = sync

    def commit(self) -> None:
        """Replace the old version with this one.

        Raises:
            OSError: the old version is unchanged, and this one is discarded.
        """
        assert self._temporary is not None
        try:
            self._temporary.rename(self.path)
        except BaseException:
            self.discard()
            raise
        self._temporary = None
        # The new version is in place even if the folder cannot be synced.
        if self._sync:
            with suppress(OSError):
                sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove it, if it was not committed. Never raises."""
        temporary, self._temporary = self._temporary, None
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def staged_name(path: Path) -> Path:
    """The temporary name for a new version of `path`. `sweep` finds in it the process that made
    it.
    """
    # Shorten any name so that it fits: NAME_MAX of Linux is 255 bytes.
    name = os.fsencode(path.name)[:_LONGEST].decode(errors="ignore")
    return path.with_name(f".{name}{_MARK}{os.getpid()}-{time.monotonic_ns()}")


def stage_file(path: Path, data: bytes, mode: int = 0o600, *, sync: bool = True) -> StagedFile:
    """Write a new version next to `path` and sync it. An existing file keeps its owner and mode.

    Without `sync`, a crash of the host may leave a torn file. Use that for data that is checked
    when it is read, and that can be made once more.

    Raises:
        OSError: it cannot be written there; nothing has changed.
    """
    # Replace the target of a link, so that the link remains.
    path = Path(os.path.realpath(path))
    temporary = staged_name(path)
    staged = StagedFile(path, temporary, sync=sync)
    try:
        fd = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode
        )
        with os.fdopen(fd, "wb") as file:
            # The umask may have removed some of the mode bits.
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
    """Make renames and removals in a folder durable. Some file systems cannot do that, and need
    not.
    """
    with closing(_open_folder(folder)) as fd, suppress(OSError):
        os.fsync(fd)


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


class FileLock:
    """A lock that lasts until `release()`, or until this process ends."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def release(self) -> None:
        """Release the lock. It may be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def try_lock(path: Path) -> FileLock | None:
    """Lock a file that exists only to be locked. Returns None while another process holds the lock.

    Raises:
        OSError: the file cannot be opened or made.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # The umask may have removed some of the mode bits.
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
def locked_folder(
    folder: Path, seconds: float, *, given_up: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Lock a folder against every other process and thread that calls this.

    Args:
        folder: a folder that exists.
        seconds: how long to wait.
        given_up: called while waiting; the wait ends when it returns true.

    Raises:
        LockTimeout: another process held the lock all that time.
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
                    raise LockTimeout(11, "another process has locked it", str(folder)) from None
                time.sleep(_PAUSE)
        sweep(folder)
        yield


def sweep(folder: Path) -> None:
    """Remove the staged files of processes that were killed. Never raises."""
    with suppress(OSError):
        for name in os.listdir(folder):  # noqa: PTH208 - names are all we need
            if name.startswith(".") and _MARK in name:
                pid = name.rpartition(_MARK)[2].split("-")[0]
                if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                    with suppress(OSError):
                        (folder / name).unlink()
