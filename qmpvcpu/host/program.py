"""Which program starts a QEMU that runs: the file itself, or the script that called the dynamic linker for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qmpvcpu.core.machine.command_line import read_command_line
from qmpvcpu.host.owners import check_folder, check_own
from qmpvcpu.host.process import Process

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
        check_own(str(real), real.stat())
        check_folder(real.parent)
    except (OSError, ValueError):
        return False
    return real.is_file() and os.access(real, os.X_OK)


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
