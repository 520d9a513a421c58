"""Find the program that starts a running QEMU: its own file, or the script that called the dynamic
linker for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qmpvcpu.core.machine.command_line import read_command_line
from qmpvcpu.host.owners import check_folder, check_own
from qmpvcpu.host.process import Process

#: How many bytes of a script are searched for the name.
_SCRIPT_BYTES: Final = 64 * 1024
#: How many levels above the program a script may be.
_LEVELS: Final = 6


def startable_program(process: Process, words: Sequence[str]) -> str | None:
    """The program that starts the same QEMU as this process; None if it cannot be found. Never
    raises.

    A QEMU in a folder of its own, with its own libraries, is run through the dynamic linker: its
    file cannot be executed directly. In that case, a script in a folder above starts it, and names
    the file. A program that another user can replace is not accepted.

    Args:
        process: the process of QEMU.
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
        # A package may have replaced the file: the new one has the same name. Any other file of
        # that name is not the program: the process may run in a container.
        is_it = path.endswith(_DELETED) or os.path.samefile(file, path.removesuffix(_DELETED))  # noqa: PTH121
    except OSError:
        return None
    path = path.removesuffix(_DELETED)
    return path if is_it and _runs(path) else None


def _runs(path: str) -> bool:
    """Whether it can be executed, and only we and root can replace it. Never raises."""
    try:
        real = Path(path).resolve(strict=True)
        check_own(str(real), real.stat())
        check_folder(real.parent)
    except (OSError, ValueError):
        return False
    return real.is_file() and os.access(real, os.X_OK)


def _leads_to(script: Path, program: Path) -> bool:
    """Whether it is a script that contains the last two parts of this program's path."""
    if not _runs(str(script)):
        return False
    try:
        with script.open("rb") as file:
            text = os.fsdecode(file.read(_SCRIPT_BYTES))
    except OSError:
        return False
    return text.startswith("#!") and f"/{program.parent.name}/{program.name}" in text
