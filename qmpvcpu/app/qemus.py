"""Which QEMUs this host has: those on the PATH, and those that `scripts/fetch-qemu` has put into
the cache.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qmpvcpu.app.cache import cache_folder
from qmpvcpu.core.arch import X86_64, examined, programs_of
from qmpvcpu.core.model import QemuVersion
from qmpvcpu.core.quirks import quirk
from qmpvcpu.core.state.inventory import objects_of, parse_version
from qmpvcpu.errors import VcpuError
from qmpvcpu.ports import CommandError
from qmpvcpu.qemu.launch import run_qemu

#: What the test guests of `qmpvcpu demo` run on.
DEMO_ARCH: Final = X86_64.name
#: The arguments of a QEMU that is only queried.
NO_MACHINE: Final = ("-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S")
_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class QemuBinary:
    """What is known of one QEMU program. `hotplug`: machine types with CPU hotplug; `error`: why it
    does not run.
    """

    path: str
    arch: str
    version: QemuVersion | None = None
    hotplug: tuple[str, ...] = ()
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "path": self.path,
            "arch": self.arch,
            "version": str(self.version) if self.version else None,
            "hotpluggable_machines": list(self.hotplug),
            "error": self.error,
        }


def find_binaries(arch: str | None = None) -> list[tuple[str, str]]:
    """Find (path, target) of every qemu-system-* of the targets that `doctor` lists, or that run
    guests of an architecture, its own target first. Of each target those on the PATH come first,
    then the cache by version.
    """
    if arch is not None:
        return [found for target in programs_of(arch) for found in _binaries((target,))]
    return _binaries([row.name for row in examined()])


def _binaries(targets: Sequence[str]) -> list[tuple[str, str]]:
    folders = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    folders += sorted(
        (cache_folder() / "qemu").glob("[0-9]*/bin"),
        key=lambda folder: [int(n) for n in re.findall(r"\d+", folder.parent.name)],
    )
    found: dict[str, tuple[str, str]] = {}
    for folder in folders:
        for target in targets:
            path = folder / f"qemu-system-{target}"
            if is_program(path):
                found.setdefault(str(path.resolve()), (str(path), target))
    return list(found.values())


def is_program(path: str | Path) -> bool:
    """Whether this is a file that can be run."""
    # Not Path.is_file(): that raises where a folder of the PATH may not be entered.
    return os.path.isfile(path) and os.access(path, os.X_OK)  # noqa: PTH113


def path_of(emulator: str) -> str | None:
    """The path of a QEMU that is named with or without its folder; None where there is none."""
    path = emulator if "/" in emulator else shutil.which(emulator)
    return path if path is not None and is_program(path) else None


async def examine(path: str, arch: str) -> QemuBinary:
    """Start a QEMU without a machine and query it; never raises for a QEMU that does not run."""
    try:
        async with run_qemu(path, NO_MACHINE) as qemu:
            version = parse_version(qemu.monitor.greeting)
            machines = await qemu.monitor.query_machines()
    except (VcpuError, CommandError) as error:
        return QemuBinary(path, arch, error=str(error))
    names = (
        str(row.get("name")) for row in objects_of(machines) if row.get("hotpluggable-cpus") is True
    )
    return QemuBinary(path, arch, version, tuple(sorted(names)))


async def find_emulator(arch: str, version: QemuVersion | None) -> str | None:
    """The QEMU of a target on this host that can take in a guest of this version: of the same
    version, else the oldest newer one, else any. None where there is none.
    """
    found = find_binaries(arch)
    if version is None or len(found) < 2:
        return found[0][0] if found else None
    wanted = (version.major, version.minor)
    known = [
        ((one.version.major, one.version.minor), one.path)
        for one in await examine_all(found)
        if one.version is not None
    ]
    taking = [one for one in known if one[0] >= wanted]
    return min(taking)[1] if taking else found[0][0]


def survives_unplug(qemu: QemuBinary) -> bool:
    """Whether this QEMU is known to survive the unplug of a CPU under TCG."""
    return qemu.version is not None and not quirk("x86-tcg-unplug").affects(
        qemu.arch, "tcg", qemu.version
    )


async def examine_all(binaries: Iterable[tuple[str, str]]) -> list[QemuBinary]:
    """Examine several QEMUs, a few at a time."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(path: str, arch: str) -> QemuBinary:
        async with gate:
            return await examine(path, arch)

    return await asyncio.gather(*(one(path, arch) for path, arch in binaries))
