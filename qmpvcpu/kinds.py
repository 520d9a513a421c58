"""Find out what kind of file a path leads to before it is opened. Only regular files are opened.

A device may act when it is opened, a FIFO waits for its other end, and neither has an end of file.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

_KINDS: Final = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def kind_of(mode: int) -> str:
    """Return the kind of file in a `st_mode`, in words."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


def look_at(path: str | os.PathLike[str], *, follow: bool = True) -> int:
    """Return a descriptor (O_PATH) for any kind of file without opening the file itself. Raises
    OSError.
    """
    return os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))


def reopen(fd: int, flags: int, path: str | os.PathLike[str]) -> int:
    """Open what `look_at` has found at `path`, with O_NONBLOCK, so that it never waits.

    Raises:
        OSError: opening is not allowed, or it is not a regular file.
    """
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, not a regular file", os.fspath(path))
    # Open exactly the same file, because the path may lead to another one now.
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def open_file(
    path: str | os.PathLike[str], flags: int = os.O_RDONLY, *, follow: bool = True
) -> int:
    """Open an existing regular file.

    Raises:
        OSError: opening is not allowed, or it is not a regular file.
    """
    fd = look_at(path, follow=follow)
    try:
        return reopen(fd, flags, path)
    finally:
        os.close(fd)


def is_pipe(fd: int) -> bool:
    """Return whether this is a pipe without a name, as for standard input or a shell's `<(…)`; such
    a pipe has a writer.
    """
    target = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
    return stat.S_ISFIFO(os.fstat(fd).st_mode) and target.startswith("pipe:")
