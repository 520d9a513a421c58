"""QEMUs of the project's cache and Debian's own, by the machine types that they have."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from qmpvcpu.app.cache import cache_folder
from qmpvcpu.core.arch import architecture

#: The first of them that has the machine is asked. 10.0 is what libvirt 11.3 was tested with.
VERSIONS = ("10.0", "7.2", "11.1")


@cache
def machines(program: str) -> dict[str, bool]:
    """Machine types of a QEMU."""
    shown = subprocess.run(
        [program, "-machine", "help"], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[0]: True for line in shown.splitlines()[1:]}


@cache
def emulator(arch: str | None, machine: str | None) -> str | None:
    """The QEMU that has this machine of libvirt's architecture; None where none has."""
    name = f"qemu-system-{architecture(arch).name}"
    folders = [cache_folder() / "qemu" / version / "bin" for version in VERSIONS]
    for program in (folder / name for folder in (*folders, Path("/usr/bin"))):
        if program.exists() and (machine is None or machine in machines(str(program))):
            return str(program)
    return None


@cache
def distributions(arch: str) -> str | None:
    """Debian's own QEMU of one of libvirt's architectures, as libvirtd runs it."""
    path = Path("/usr/bin") / f"qemu-system-{architecture(arch).name}"
    return str(path) if path.exists() else None
