"""An x86_64 machine whose guest only ejects the CPUs that it is asked to: unplugs end within
milliseconds.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.monitor import QmpError
from tests.support.qemus import Qemu, qemu_binary, running
from tests.support.waiting import until


def firmware(folder: Path) -> str:
    """The image of that guest."""
    image = folder / "eject.bin"
    options = [
        "-m16",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,-Ttext=0,--build-id=none,--oformat=binary",
    ]
    subprocess.run(["gcc", *options, "-o", str(image), "scripts/guest/eject.S"], check=True)
    return str(image)


@asynccontextmanager
async def ejecting(
    smp: str,
    *extra: str,
    accel: str = "kvm",
    version: str = "10.0",
    monitors: Sequence[str] = ("qmp",),
) -> AsyncIterator[Qemu]:
    """It runs, and has taken over CPU hotplug. Under KVM it takes any number of plugs."""
    with TemporaryDirectory() as folder:
        words = [
            "-nodefaults",
            "-display",
            "none",
            "-no-user-config",
            "-machine",
            "q35",
            "-cpu",
            "qemu64",
        ]
        words += ["-accel", accel, "-smp", smp, "-m", "64", "-bios", firmware(Path(folder)), *extra]
        async with running(qemu_binary(version, "x86_64"), words, monitors=monitors) as qemu:

            async def ejects() -> bool:
                return not await qemu.qom_get("/machine/acpi-device", "cpu-hotplug-legacy")

            # 11.1 has no such property: it takes every unplug.
            with suppress(QmpError):
                await until(ejects, "the guest has taken over CPU hotplug")
            yield qemu
