"""Check who owns a file. A file is ours if only this user and root can change or replace it."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qmpvcpu.core.rules import catalogue

#: The kernel follows at most this many links in one path (path_resolution(7)).
_MOST_LINKS: Final = 40


class NotOurs(PermissionError):
    """Another user owns the file or can write to it; `cure` says what to do."""

    def __init__(self, path: str, why: str, cure: str) -> None:
        super().__init__(errno.EPERM, f"'{path}' {why}", path)
        self.cure = cure


def check_own(
    path: str, found: os.stat_result, *, is_far: bool = False, with_group: bool = True
) -> None:
    """Raise NotOurs if another user can change the file or the folder of this `stat`.

    Args:
        path: its name.
        found: its `stat`.
        is_far: it is a folder further up in the path. There, the sticky bit is enough: another user
            cannot replace what we own in it.
        with_group: a group may have write access if no other user is in it.
    """
    if found.st_uid not in (0, os.geteuid()):
        why = f"belongs to another user ({_name(found.st_uid)})"
        raise NotOurs(path, why, "make your user its owner (chown)")
    if stat.S_ISLNK(found.st_mode) or (is_far and found.st_mode & stat.S_ISVTX):
        return
    is_shared = found.st_mode & stat.S_IWGRP and not (with_group and _is_alone_in(found.st_gid))
    if found.st_mode & stat.S_IWOTH or is_shared:
        raise NotOurs(path, "can be written to by other users", f"`chmod go-w {shlex.quote(path)}`")


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Check a folder and every folder and link on the way to it. The folder need not exist.

    Raises:
        NotOurs: another user can write to it, or can put another folder in its place.
    """
    # The path as it was given, and the path after all links are followed.
    near = (os.path.abspath(folder), os.path.realpath(folder))  # noqa: PTH100
    for one in _way_to(near[0]):
        try:
            found = os.lstat(one)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            # Nothing is there, or we could not read or write it anyway.
            continue
        check_own(one, found, is_far=one not in near)


def _way_to(path: str) -> Iterator[str]:
    """Every folder and link that the kernel visits on the way to a path, and the path itself."""
    at, left, links = "/", path.split("/")[::-1], 0
    yield at
    while left:
        name = left.pop()
        if name in ("", "."):
            continue
        if name == "..":
            at = os.path.dirname(at)  # noqa: PTH120
            continue
        one = os.path.join(at, name)  # noqa: PTH118
        yield one
        try:
            target = os.readlink(one)  # noqa: PTH115
        except OSError:
            at = one
            continue
        links += 1
        if links > _MOST_LINKS:
            return
        left += target.split("/")[::-1]
        if target.startswith("/"):
            at = "/"


def trusted_folder(folder: Path, what: str) -> Path:
    """Return the folder if it is ours.

    Raises:
        VcpuRefused: it is not ours. The text names `what` the folder is for.
    """
    try:
        check_folder(folder)
    except NotOurs as error:
        raise catalogue.FOLDER_NOT_OURS.error(what=what, folder=folder, error=error) from error
    return folder


def make_folder(folder: Path) -> None:
    """Make a folder with mode 0700, and the missing folders above it, whatever the umask is.

    A folder that already exists is checked.

    Raises:
        NotOurs: another user owns the folder, or one on the way to it.
        OSError: it cannot be made.
    """
    check_folder(folder)
    missing = []
    for one in (folder, *folder.parents):
        if os.path.lexists(one):
            break
        missing.append(one)
    for one in reversed(missing):
        try:
            one.mkdir(mode=0o700)
        except FileExistsError:
            # Another process of ours has made it first.
            continue
        one.chmod(0o700)


def _is_alone_in(gid: int) -> bool:
    """Whether a group is root's or has no other member than us. Where each user has a group of
    their own, it often owns the user's files.
    """
    try:
        name, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name in ("root", name) and set(group.gr_mem) <= {"root", name}


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
