"""Which program starts a QEMU that runs: the file itself, or the script that called the dynamic linker for it."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qmpvcpu.core.machine.command_line import read_command_line
from qmpvcpu.host.process import Process

__all__ = ["startable_program"]

#: Bytes of a script that are looked at.
_SCRIPT_BYTES: Final = 64 * 1024
#: How many folders above the program a script may be.
_LEVELS: Final = 6


def startable_program(process: Process, words: Sequence[str]) -> str | None:
    """The program that starts a QEMU such as this process; None where none can be found. Never raises.

    A QEMU of a folder of its own (with its own libraries) is run by a dynamic linker that is called by name: the
    file itself cannot run. What starts is a script above it which names that file. A program that somebody else
    can replace is none.

    Args:
        process: of QEMU.
        words: its command line.
    """
    line = read_command_line(words)
    if not line.is_loaded:
        return _executable(process)
    if line.program is None or not line.program.startswith("/"):
        return None
    program = Path(os.path.normpath(line.program))
    for folder in program.parents[1 : _LEVELS + 1]:
        script = folder / "bin" / program.name
        if script != program and _leads_to(script, program):
            return str(script)
    return None


_DELETED: Final = " (deleted)"


def _executable(process: Process) -> str | None:
    file = f"/proc/{process.pid}/exe"
    try:
        path = os.readlink(file)  # noqa: PTH115 - one readlink(2)
        # A file that a package has replaced is there again under its name. Any other one of that name is not the
        # program: the process may run in a container.
        is_it = path.endswith(_DELETED) or os.path.samefile(file, path.removesuffix(_DELETED))  # noqa: PTH121
    except OSError:
        return None
    path = path.removesuffix(_DELETED)
    return path if is_it and _runs(path) else None


def _runs(path: str) -> bool:
    """Whether it can be executed, and nobody but us and root can put another program there. Never raises."""
    try:
        real = Path(path).resolve(strict=True)
        nearest, *above = real.parents
        owned = _is_ours(real) and _is_ours(nearest) and all(_is_ours(one, is_far=True) for one in above)
    except (OSError, ValueError):
        return False
    return owned and real.is_file() and os.access(real, os.X_OK)


def _is_ours(path: Path, *, is_far: bool = False) -> bool:
    """Whether nobody but us and root can change it; in a folder that is not the program's own the sticky bit is
    enough: what is ours in it stays. Raises OSError.
    """
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()):
        return False
    if is_far and found.st_mode & stat.S_ISVTX:
        return True
    is_open = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _is_alone_in(found.st_gid))
    return not is_open


def _is_alone_in(gid: int) -> bool:
    """Whether a group is root's, or ours alone: where each user has one, it often owns the user's files."""
    try:
        name, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name in ("root", name) and set(group.gr_mem) <= {"root", name}


def _leads_to(script: Path, program: Path) -> bool:
    """Whether it is a script that names this program, by the end of its path."""
    if not _runs(str(script)):
        return False
    try:
        with script.open("rb") as file:
            text = os.fsdecode(file.read(_SCRIPT_BYTES))
    except OSError:
        return False
    return text.startswith("#!") and f"/{program.parent.name}/{program.name}" in text
