"""Boot the tiny Linux guest that `scripts/build-guest` makes, and run commands in its shell.

The shell is connected to a virtio port of the guest. One line is one command; the shell sends its
output, and then a line with its exit status. So we see the guest's own view, without an agent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qmpvcpu.app.cache import cache_folder
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import VcpuFailed
from qmpvcpu.qemu.launch import QemuProcess, run_qemu

_EXIT = "QMPVCPU-EXIT "


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A built guest. `folder` contains vmlinuz, initrd.cpio.gz and guest.json, whose content is
    `facts`.
    """

    folder: Path
    facts: dict[str, Any] = field(hash=False)

    @property
    def qemu(self) -> str:
        """The name of the QEMU program that runs it, for example `qemu-system-x86_64`."""
        return str(self.facts["qemu"])


def find_image(arch: str) -> GuestImage:
    """The built guest for an architecture ("x86_64", "ppc64le").

    Raises:
        VcpuRefused: it is not built.
    """
    folder = cache_folder() / "guests" / arch
    try:
        facts = json.loads((folder / "guest.json").read_text())
    except (OSError, ValueError):
        raise catalogue.NO_GUEST.error(arch=arch, folder=folder) from None
    return GuestImage(folder, facts)


class BootedGuest:
    """A guest that has booted; `qemu` is its process."""

    def __init__(
        self, qemu: QemuProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.qemu = qemu
        self._reader = reader
        self._writer = writer

    @property
    def agent(self) -> str:
        """The path of the guest agent's socket. The socket takes one client at a time."""
        return str(self.qemu.folder / "agent")

    async def shell(self, command: str, *, timeout: float = 30.0) -> str:
        """Run one line of shell in the guest, and return its output.

        Raises:
            VcpuFailed: its exit status is not 0, or the guest does not answer within `timeout`
                seconds.
        """
        self._writer.write(command.encode() + b"\n")
        lines: list[str] = []
        try:
            async with asyncio.timeout(timeout):
                while True:
                    raw = await self._reader.readline()
                    if not raw:
                        raise VcpuFailed("the guest's shell has ended", hint="look at its QEMU")
                    line = raw.decode(errors="replace").rstrip("\r\n")
                    if line.startswith(_EXIT):
                        break
                    lines.append(line)
        except TimeoutError as error:
            raise VcpuFailed(f"the guest did not run '{command}' within {timeout:g} s") from error
        output = "\n".join(lines)
        if line != _EXIT + "0":
            raise VcpuFailed(
                f"'{command}' failed in the guest ({line}): {output}", hint="look at its kernel log"
            )
        return output

    async def online(self) -> str:
        """The guest's own /sys/devices/system/cpu/online: a CPU list with its logical ids."""
        return await self.shell("cat /sys/devices/system/cpu/online")

    async def wait_online(self, count: int, *, timeout: float = 30.0) -> str:
        """Wait until the guest has exactly `count` CPUs online, and return its CPU list.

        The loop runs in the guest, so we send one command only.
        """
        return await self.shell(
            f"n=0; while [ $(grep -c ^processor /proc/cpuinfo) != {count} ]; do n=$((n+1));"
            f" [ $n -gt {int(timeout * 10)} ] && exit 1; usleep 100000; done;"
            " cat /sys/devices/system/cpu/online",
            timeout=timeout + 10,
        )


@asynccontextmanager
async def boot(
    image: GuestImage,
    binary: str,
    arguments: Sequence[str],
    *,
    append: str = "",
    timeout: float = 120.0,
) -> AsyncIterator[BootedGuest]:
    """Boot the guest and wait until it is ready. At the end its QEMU is killed.

    Args:
        image: the built guest.
        binary: the QEMU program.
        arguments: -smp, -m, -numa and the like.
        append: more words for the kernel's command line (`qmpvcpu.selfonline=0` …).
        timeout: seconds for the guest to become ready.

    Raises:
        VcpuFailed: QEMU exited, or the guest was not ready in time; the message ends with its
            console.
    """
    command = [*guest_arguments(image, append), *arguments]
    async with run_qemu(binary, [*command, "-S"], channels=CHANNELS) as qemu:
        console, console_writer = await asyncio.open_unix_connection(qemu.folder / "console")
        lines: list[str] = []
        try:
            await qemu.monitor.cont()
            async with _shell(qemu) as guest:
                await _ready(console, image.facts["ready"], lines, timeout)
                async with _flowing(console, lines):
                    yield guest
        finally:
            console_writer.close()


#: The sockets of a guest's QEMU, by the names of their chardevs.
CHANNELS: Final = ("console", "shell", "agent")


def guest_arguments(image: GuestImage, append: str = "") -> list[str]:
    """QEMU's arguments for a guest, except -smp and -m; `append` has more words for the kernel's
    command line.
    """
    facts = image.facts
    command = ["-machine", facts["machine"], "-nodefaults", "-display", "none", "-no-user-config"]
    command += ["-cpu", facts["cpu"]] if facts["cpu"] else []
    command += [
        "-kernel",
        str(image.folder / "vmlinuz"),
        "-initrd",
        str(image.folder / "initrd.cpio.gz"),
    ]
    command += ["-append", f"{facts['append']} {append}".strip(), "-serial", "chardev:console"]
    command += facts["qemu_args"]
    for channel in ("shell", "agent"):
        command += ["-device", f"{facts['serial_device']},chardev={channel},name={facts[channel]}"]
    return command


@asynccontextmanager
async def attached(qemu: QemuProcess) -> AsyncIterator[BootedGuest]:
    """Attach to a guest that already runs, because it has migrated to this QEMU, which has its
    `CHANNELS`.
    """
    console, console_writer = await asyncio.open_unix_connection(qemu.folder / "console")
    try:
        async with _flowing(console, []), _shell(qemu) as guest:
            yield guest
    finally:
        console_writer.close()


@asynccontextmanager
async def _shell(qemu: QemuProcess) -> AsyncIterator[BootedGuest]:
    reader, writer = await asyncio.open_unix_connection(qemu.folder / "shell")
    try:
        yield BootedGuest(qemu, reader, writer)
    finally:
        writer.close()


@asynccontextmanager
async def _flowing(console: asyncio.StreamReader, lines: list[str]) -> AsyncIterator[None]:
    """Read the console all the time, since a guest blocks if nobody reads its console."""
    drain = asyncio.create_task(_drain(console, lines))
    try:
        yield
    finally:
        drain.cancel()
        with suppress(asyncio.CancelledError):
            await drain


async def _ready(
    console: asyncio.StreamReader, word: str, lines: list[str], timeout: float
) -> None:
    try:
        async with asyncio.timeout(timeout):
            while line := await console.readline():
                lines.append(line.decode(errors="replace").rstrip())
                if word in lines[-1]:
                    return
    except TimeoutError:
        pass
    tail = "\n".join(lines[-15:])
    raise VcpuFailed(
        f"the guest is not ready after {timeout:g} s; its console:\n{tail}",
        hint="look at its console",
    )


async def _drain(console: asyncio.StreamReader, lines: list[str]) -> None:
    """Read the console, and keep its last 200 lines."""
    while line := await console.readline():
        lines.append(line.decode(errors="replace").rstrip())
        del lines[:-200]
