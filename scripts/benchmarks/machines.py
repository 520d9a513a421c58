"""QEMUs to measure on."""

from __future__ import annotations

import subprocess
from contextlib import asynccontextmanager
from pathlib import Path

import qmpvcpu
from qmpvcpu.app.cache import cache_folder
from qmpvcpu.qemu.launch import run_qemu

__all__ = ["eject_firmware", "machine", "slots_of"]


@asynccontextmanager
async def machine(accel: str, smp: str, *more: str):
    arguments = [
        *(more or ["-S"]),
        "-nodefaults",
        "-display",
        "none",
        "-no-user-config",
        "-machine",
        "q35",
        "-cpu",
        "qemu64",
    ]
    arguments += ["-accel", accel, "-smp", smp, "-m", "64"]
    binary = cache_folder() / "qemu" / "10.0" / "bin" / "qemu-system-x86_64"
    async with run_qemu(str(binary), arguments) as qemu:
        yield qemu


def slots_of(state: qmpvcpu.DomainState) -> list[qmpvcpu.Entity]:
    return [entity for entity in state.entities if not entity.plugged]


def eject_firmware(folder: Path) -> Path:
    """The guest that ejects what it is asked to, assembled."""
    image = folder / "eject.bin"
    options = [
        "-m16",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,-Ttext=0,--build-id=none,--oformat=binary",
    ]
    subprocess.run(["gcc", *options, "-o", str(image), "scripts/guest/eject.S"], check=True)
    return image
