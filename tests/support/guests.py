"""Real Linux guests, with a shell and an agent; those of `Pool` are shared by the tests of one
xdist group.

Every plug under TCG uses up a context of QEMU's for good: a guest of the pool is replaced before
they run out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import qmpvcpu
from qmpvcpu.lab import guest as lab
from tests.support.qemus import Qemu, qemu_binary, running
from tests.support.waiting import DEADLINE, until

#: Sockets that a guest's QEMU has, by name, in its folder.
CHANNELS = lab.CHANNELS


@dataclass(frozen=True)
class Image:
    """A built guest: `folder` has vmlinuz and initrd.cpio.gz, `facts` says how QEMU runs them."""

    _found: lab.GuestImage

    @property
    def folder(self) -> Path:
        return self._found.folder

    @property
    def facts(self) -> dict[str, Any]:
        return self._found.facts


def image_of(name: str) -> Image:
    """The built guest of that name. Raises `qmpvcpu.VcpuRefused`: it is not built."""
    return Image(lab.find_image(name))


class Guest:
    """A Linux that has booted."""

    def __init__(self, guest: lab.BootedGuest) -> None:
        self._guest = guest
        self.qemu = Qemu(guest.qemu)
        #: Path of its agent's socket.
        self.agent = guest.agent

    async def shell(self, command: str, **options: Any) -> str:
        """Run a line of shell; its output. `timeout` in seconds."""
        return await self._guest.shell(command, **options)

    async def online(self) -> str:
        """Its own list of the CPUs that are online."""
        return await self._guest.online()

    async def wait_online(self, count: int, **options: Any) -> str:
        """`online` once there are so many; `timeout` in seconds."""
        return await self._guest.wait_online(count, **options)


class Console(Guest):
    """A Linux that qmpvcpu itself has started: its shell alone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._guest = lab.BootedGuest(None, reader, writer)  # type: ignore[arg-type]


@asynccontextmanager
async def boot(
    image: Image, binary: str, arguments: Sequence[str], *, append: str = ""
) -> AsyncIterator[Guest]:
    """Boot a built guest, and wait until it is up; `append` are more words for its kernel."""
    async with lab.boot(image._found, binary, arguments, append=append) as guest:
        yield Guest(guest)


@asynccontextmanager
async def not_started(image: Image, binary: str, arguments: Sequence[str]) -> AsyncIterator[Qemu]:
    """A QEMU with a guest of this image that waits for `cont`; `attached` is for then."""
    words = [*lab.guest_arguments(image._found), *arguments, "-S"]
    async with running(binary, words, channels=CHANNELS) as qemu:
        yield qemu


@asynccontextmanager
async def incoming(image: Image, binary: str, arguments: Sequence[str]) -> AsyncIterator[Qemu]:
    """The QEMU to which a guest of this image is to migrate."""
    words = [*lab.guest_arguments(image._found), *arguments, "-incoming", "defer"]
    async with running(binary, words, channels=CHANNELS) as qemu:
        yield qemu


@asynccontextmanager
async def attached(qemu: Qemu) -> AsyncIterator[Guest]:
    """The guest that has migrated to this QEMU (`incoming`)."""
    async with lab.attached(qemu._process) as guest:
        yield Guest(guest)


#: A Linux under TCG is up by then also on a busy machine, seconds.
BOOT = 4 * DEADLINE


@dataclass(frozen=True)
class Kind:
    """A shape of Linux guests: `-smp`, `-m`, the image, how many vCPUs may be plugged into one
    before it goes, and more words for its kernel.
    """

    smp: str
    memory: str
    image: str
    budget: int
    append: str = ""


#: The usual ones, by architecture.
KINDS = {
    "x86_64": Kind("2,sockets=2,cores=24,threads=1,maxcpus=48", "512", "x86_64", 40),
    "ppc64": Kind("2,sockets=1,cores=40,threads=2,maxcpus=80", "1024", "ppc64le", 70),
}


async def booted(console: Path, ready: str = "QMPVCPU READY") -> None:
    """Until a guest says on its console, a file, that it is up."""

    def said() -> bool:
        return console.exists() and ready in console.read_text(errors="replace")

    try:
        await until(said, "Linux is up", every=0.1, seconds=BOOT)
    except AssertionError as error:
        raise AssertionError(
            f"{error}; its console: {console.read_text(errors='replace')[-3000:]}"
        ) from None


@dataclass
class Booted:
    arch: str
    version: str
    guest: Guest
    stack: AsyncExitStack
    budget: int
    kind: Kind
    #: A third QMP socket: `guest.qemu.monitor` holds the first, the tests connect to the second.
    third: str = ""
    boot_ids: tuple[int, ...] = field(default=())
    is_touched: bool = False

    @property
    def qmp(self) -> str:
        return self.guest.qemu.qmp

    @property
    def core(self) -> int:
        """vCPUs that one device_add brings."""
        return 2 if self.arch == "ppc64" else 1

    def ids(self, *entities: int) -> list[int]:
        """vCPU ids of the n-th entities."""
        return [entity * self.core + number for entity in entities for number in range(self.core)]

    async def is_as_booted(self) -> bool:
        if self.guest.qemu.has_exited:
            return False
        await self.guest.qemu.execute("cont")
        async with qmpvcpu.connect(self.qmp) as domain:
            is_filled = (await domain.state()).enabled_ids == self.boot_ids
        return is_filled and len(qmpvcpu.parse_ids(await self.guest.online())) == len(self.boot_ids)


class Pool:
    def __init__(self) -> None:
        self.booted: dict[tuple[str, str], Booted] = {}

    async def get(
        self,
        arch: str,
        version: str,
        plugs: int,
        *,
        untouched: bool = False,
        kind: Kind | None = None,
    ) -> Booted:
        """`untouched`: nothing was ever plugged into it; some QEMUs cannot be migrated after an
        unplug.
        """
        key, kind = (arch, version), kind or KINDS[arch]
        kept = self.booted.get(key)
        if kept is not None and (
            kept.kind != kind
            or kept.budget < plugs
            or (untouched and kept.is_touched)
            or not await kept.is_as_booted()
        ):
            await self.drop(key)
            kept = None
        if kept is None:
            for other in list(self.booted):
                await self.drop(other)
            kept = self.booted[key] = await _boot(arch, version, kind)
        kept.budget -= plugs
        kept.is_touched |= not untouched
        return kept

    async def rest(self) -> None:
        """Stop them until the next `get`. One that does not answer goes: no other test is to fail
        with it.
        """
        for key, kept in list(self.booted.items()):
            try:
                if not kept.guest.qemu.has_exited:
                    await kept.guest.qemu.execute("stop")
            except qmpvcpu.VcpuConnectionError as error:
                hangs = error.reason == "timeout"
                if hangs:
                    error.add_note(kept.guest.qemu.threads())
                await self.drop(key)
                if hangs:
                    raise

    async def drop(self, key: tuple[str, str]) -> None:
        await self.booted.pop(key).stack.aclose()


async def _boot(arch: str, version: str, kind: Kind) -> Booted:
    stack = AsyncExitStack()
    third = stack.enter_context(TemporaryDirectory(prefix="qmpvcpu-test-")) + "/third"
    arguments = ["-qmp", f"unix:{third},server=on,wait=off"]
    arguments += ["-accel", "tcg,thread=multi", "-smp", kind.smp, "-m", kind.memory]
    image, binary = image_of(kind.image), qemu_binary(version, arch)
    guest = await stack.enter_async_context(boot(image, binary, arguments, append=kind.append))
    booted = Booted(arch, version, guest, stack, kind.budget, kind, third)
    async with qmpvcpu.connect(booted.qmp) as domain:
        booted.boot_ids = (await domain.state()).enabled_ids
    return booted
