"""QEMUs that were started by name in a state folder of a test's own: which run, and whether
somebody owns each.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from qmpvcpu import ProbeMode, find_layout, parse_smp
from qmpvcpu.app import start as commands
from qmpvcpu.core.machine.layout import MachineSpec
from qmpvcpu.host.runtime import Runtime, runtime_folder


async def start(name: str) -> None:
    """`start`."""
    await commands.start(name)


async def destroy(name: str) -> None:
    """`destroy`."""
    await commands.destroy(name)


async def probe() -> None:
    """`probe --probe always --refresh`."""
    spec = MachineSpec("q35", parse_smp("2,maxcpus=8"))
    await find_layout(spec, arch="x86_64", mode=ProbeMode.ALWAYS, refresh=True)


def running() -> dict[str, int]:
    """Name -> pid, as the next command finds them."""
    found = {}
    with suppress(FileNotFoundError):
        for name in os.listdir(runtime_folder()):
            if not name.startswith(".") and (pid := Runtime(name).pid()) is not None:
                found[name] = pid
    return found


def qemus(folder: Path) -> set[int]:
    """All processes that were given a path in that folder, and have not ended."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes()
            if b"qemu-system" in words.split(b"\0")[0] and os.fsencode(folder) in words:
                found.add(int(process.name))
    return found


def folders() -> set[str]:
    """Names that have a folder for their sockets."""
    with suppress(FileNotFoundError):
        return {path.name for path in runtime_folder().iterdir() if path.is_dir()}
    return set()
