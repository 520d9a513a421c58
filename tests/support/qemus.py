"""Real QEMUs, by version and architecture."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.app.cache import cache_folder
from qmpvcpu.ports import CommandError, MonitorEvent
from qmpvcpu.qemu.launch import QemuProcess, run_qemu
from tests.support import known_ends
from tests.support.monitor import QmpError
from tests.support.soaking import is_long_run
from tests.support.waiting import DEADLINE, within

VERSIONS = ("7.2", "10.0", "11.1")
#: Tests may have a cache of their own, and still these QEMUs.
QEMUS = cache_folder() / "qemu"
MACHINES = {
    "x86_64": ["-machine", "q35"],
    "ppc64": ["-machine", "pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken"],
    "s390x": ["-machine", "s390-ccw-virtio"],
    "loongarch64": ["-machine", "virt"],
    "aarch64": ["-machine", "virt", "-cpu", "cortex-a57"],
    "riscv64": ["-machine", "virt"],
}


def qemu_binary(version: str, arch: str) -> str:
    path = QEMUS / version / "bin" / f"qemu-system-{arch}"
    if not path.exists():
        pytest.fail(f"QEMU {version} for {arch} is not here: scripts/setup qemu")
    return str(path)


def group(arch: str, version: str) -> pytest.MarkDecorator:
    """Tests of one architecture and version run on one xdist worker and share its booted guest."""
    return pytest.mark.xdist_group(f"{arch}-{version}")


def matrix(*cells: tuple[str, str], more: Sequence[tuple[str, str]] = ()) -> Any:
    """Parametrize `arch, version`, each cell in its xdist group; those of `more` in a long run
    only.
    """
    chosen = (*cells, *more) if is_long_run() else cells
    return pytest.mark.parametrize(
        ("arch", "version"),
        [pytest.param(a, v, marks=group(a, v), id=f"{a}-{v}") for a, v in chosen],
    )


class Qemu:
    """A running QEMU. The test has its first QMP socket; the others are free."""

    def __init__(self, process: QemuProcess) -> None:
        self._process = process
        #: Gone when it has ended.
        self.folder: Path = process.folder
        self.command = process.command
        #: As QEMU calls it.
        self.arch = Path(self.command[0]).name.removeprefix("qemu-system-")
        known_ends.note(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def qmp(self) -> str:
        """Path of its second QMP socket."""
        return self._process.qmp

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """A QMP command; its reply. Raises QmpError."""
        try:
            return await self._process.monitor.execute(command, arguments)
        except CommandError as error:
            raise QmpError(error.error_class, error.text) from None

    async def human_monitor_command(self, line: str) -> str:
        """A command of the human monitor; its text."""
        return str(await self.execute("human-monitor-command", {"command-line": line}))

    async def qom_get(self, path: str, name: str) -> Any:
        """A property of an object."""
        return await self.execute("qom-get", {"path": path, "property": name})

    async def plug(self, driver: str, device: str, props: Mapping[str, Any]) -> None:
        """`device_add`, as another client does it."""
        await self.execute("device_add", {**props, "driver": driver, "id": device})

    async def remove(self, device: str) -> None:
        """`device_del`, as another client does it, until QEMU tells that the device is gone."""
        gone = asyncio.Event()

        def hear(event: MonitorEvent | Exception) -> None:
            if not isinstance(event, MonitorEvent) or event.name != "DEVICE_DELETED":
                return
            if event.data.get("device") == device:
                gone.set()

        with self._process.monitor.listen(hear):
            await self.execute("device_del", {"id": device})
            await within(gone.wait(), f"'{device}' is gone")

    def kill(self) -> None:
        self._process.kill()

    @property
    def exit_code(self) -> int | None:
        """Of a signal minus its number; None while it runs."""
        return self._process.process.returncode

    @property
    def has_exited(self) -> bool:
        return self.exit_code is not None

    async def wait(self) -> None:
        """Until it has exited."""
        await self._process.process.wait()

    def stderr(self) -> str:
        return self._process.stderr()

    def threads(self) -> str:
        """What each of its threads does: for the report on a QEMU that does not answer."""
        debugger = shutil.which("gdb")
        if debugger is None:
            tasks = Path(f"/proc/{self.pid}/task").iterdir()
            return "\n".join(
                f"{t.name} {(t / 'comm').read_text().strip()}: {(t / 'wchan').read_text()}"
                for t in tasks
            )
        words = [debugger, "-p", str(self.pid), "-batch", "-ex", "thread apply all backtrace 16"]
        return subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE).stdout[
            -20_000:
        ]


@asynccontextmanager
async def running(
    binary: str,
    arguments: Sequence[str],
    *,
    channels: Sequence[str] = (),
    monitors: Sequence[str] = ("qmp",),
) -> AsyncIterator[Qemu]:
    """Run it until the end of the body; `channels` are further socket chardevs, `monitors` its
    other QMP sockets: each listens in `folder` under its name.
    """
    async with run_qemu(binary, arguments, channels=channels, monitors=monitors) as process:
        yield Qemu(process)


@asynccontextmanager
async def paused(
    arch: str,
    version: str,
    smp: str,
    extra: Sequence[str] = (),
    *,
    accel: str = "tcg",
    machine: Sequence[str] = (),
) -> AsyncIterator[Qemu]:
    arguments = [
        "-S",
        "-nodefaults",
        "-display",
        "none",
        "-no-user-config",
        "-accel",
        accel,
        "-smp",
        smp,
    ]
    arguments += [*(machine or MACHINES[arch]), *extra]
    async with running(qemu_binary(version, arch), arguments) as qemu:
        yield qemu
