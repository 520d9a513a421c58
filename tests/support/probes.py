"""QEMUs that are started only to be asked for their slots."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qmpvcpu import MachineSpec
from qmpvcpu.app.probes import forget_probes
from qmpvcpu.qemu import probe
from qmpvcpu.qemu.launch import QemuProcess
from tests.support.qemus import Qemu


async def ask(binary: str, asked: MachineSpec) -> dict[str, Any]:
    """The replies of that program, for this machine: see `machines.answered`."""
    return await probe.probe_machine(binary, asked, dict)


@contextmanager
def watched() -> Iterator[list[dict[str, Any]]]:
    """What is seen of each such QEMU while it runs: pid, folder and its mode, and what
    /proc/PID/status says.
    """
    seen: list[dict[str, Any]] = []
    run_qemu = probe.run_qemu

    @asynccontextmanager
    async def watching(*given: Any, **more: Any) -> AsyncIterator[QemuProcess]:
        async with run_qemu(*given, **more) as process:
            qemu = Qemu(process)
            status = Path(f"/proc/{qemu.pid}/status").read_text()
            lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            seen.append(
                {
                    "pid": qemu.pid,
                    "folder": qemu.folder,
                    "mode": qemu.folder.stat().st_mode,
                    **lines,
                }
            )
            yield process

    with patch.object(probe, "run_qemu", watching):
        yield seen


def forget() -> int:
    """Empty the cache; how many answers it had."""
    return forget_probes()
