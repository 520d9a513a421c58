"""What kind of file a path leads to, known before it is opened: only regular files are.

A device can act when it is opened, a FIFO waits for its other end, and neither has an end.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

__all__ = ["is_pipe", "kind_of", "look_at", "open_file", "reopen"]

_KINDS: Final = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def kind_of(mode: int) -> str:
    """The kind in a `st_mode`, in words."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


def look_at(path: str | os.PathLike[str], *, follow: bool = True) -> int:
    """A descriptor (O_PATH) of what is there, whatever it is; nothing is opened. Raises OSError."""
    return os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))


def reopen(fd: int, flags: int, path: str | os.PathLike[str]) -> int:
    """Open what `look_at` has found at `path`, without waiting for anybody: O_NONBLOCK.

    Raises:
        OSError: it may not be opened, or is not a regular file.
    """
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, not a regular file", os.fspath(path))
    # The very same file: what the path leads to may have changed.
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def open_file(path: str | os.PathLike[str], flags: int = os.O_RDONLY, *, follow: bool = True) -> int:
    """Open a regular file that is there.

    Raises:
        OSError: it may not be opened, or is not a regular file.
    """
    fd = look_at(path, follow=follow)
    try:
        return reopen(fd, flags, path)
    finally:
        os.close(fd)


def is_pipe(fd: int) -> bool:
    """Whether it is a pipe without a name, as standard input and `<(…)` of a shell are: somebody writes to it."""
    return stat.S_ISFIFO(os.fstat(fd).st_mode) and os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")  # noqa: PTH115
