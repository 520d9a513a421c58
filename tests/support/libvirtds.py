"""libvirt daemons of the tests' own, with domains in them, and the same guest under libvirt and
under us.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import qmpvcpu
from qmpvcpu.cli.commands.compare import parse_request
from qmpvcpu.cli.commands.vcpus import request_of
from qmpvcpu.lab import libvirtd as module
from qmpvcpu.lab.compare import Comparison, LibvirtSide, OurSide, SideOutcome, our_side
from qmpvcpu.lab.libvirtd import Libvirtd as _Daemon
from qmpvcpu.lab.libvirtd import run_libvirtd


class Libvirtd:
    """A daemon that nobody else uses. It can be ended and started; its guests outlive that."""

    def __init__(self, daemon: _Daemon) -> None:
        self._daemon = daemon
        #: Where it is reached, and where all its files are.
        self.uri: str = daemon.uri
        self.folder: Path = daemon.folder

    @property
    def pid(self) -> int:
        """Of the last one, if none runs."""
        return self._daemon.pid

    @property
    def keeper(self) -> int:
        """The pid of the process that ends everything, should the test be killed."""
        return self._daemon._supervisor._process.pid

    async def wait_for_the_keepers_end(self) -> None:
        await self._daemon._supervisor._listener

    @property
    def running(self) -> bool:
        return self._daemon.running

    async def start(self) -> None:
        await self._daemon.start()

    async def stop(self) -> None:
        await self._daemon.stop()

    async def kill(self) -> None:
        await self._daemon.kill()

    async def restart(self, *, kill: bool = False) -> None:
        await self._daemon.restart(kill=kill)

    def log_position(self) -> int:
        """Where its log ends now."""
        return self._daemon.log_position()

    def qmp_commands(self, since: int = 0) -> list[dict[str, Any]]:
        """What it has sent to QEMUs since its log ended there."""
        return self._daemon.qmp_commands(since)


@asynccontextmanager
async def daemon_of_our_own(
    *, log_qmp: bool = False, patience: float | None = None, beyond_path: bool = True
) -> AsyncIterator[Libvirtd]:
    """A daemon until the end of the body.

    With `log_qmp`, its log has what it sends to QEMUs; `patience` is how long it may take to
    answer, in seconds; `beyond_path` is whether it is also looked for where the system keeps such
    programs.
    """
    with (
        patch.object(
            module, "START_SECONDS", module.START_SECONDS if patience is None else patience
        ),
        patch.object(module, "SBIN", module.SBIN if beyond_path else ""),
    ):
        async with run_libvirtd(log_qmp=log_qmp) as daemon:
            yield Libvirtd(daemon)


class Managed:
    """A domain of libvirt's."""

    def __init__(self, side: LibvirtSide) -> None:
        self._side = side
        self.name: str = side.guest.name

    @property
    def connection(self) -> Any:
        """libvirt-python's connection; its calls block."""
        return self._side.connection.conn

    @property
    def domain(self) -> Any:
        """libvirt-python's domain; its calls block."""
        return self._side.guest.domain

    def is_held(self) -> bool:
        """Whether a client's job holds it. Blocks."""
        return self._side.guest.is_busy()

    async def live_xml(self) -> bytes | None:
        return await self._side.guest.live_xml()

    async def sides(self) -> tuple[bytes | None, bytes | None]:
        """The running domain's XML and its definition; None where there is none."""
        return await self._side.guest.sides()

    def definition(self, *, secure: bool = False) -> bytes:
        """Its definition, `secure` with its passwords. Blocks."""
        return self._side.guest.read_definition(secure=secure)


@asynccontextmanager
async def managed(daemon: Libvirtd, xml: str, *, start: bool = True) -> AsyncIterator[Managed]:
    """A domain of that daemon's, started or not; gone at the end."""
    async with LibvirtSide.run(daemon._daemon, xml.encode(), start=start, log=False) as side:
        yield Managed(side)


# -- one request, two who answer -------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """How a command ended with us and with libvirt, each with outcome, error (libvirt's name for
    it) and message; and in what of live, config and the like they differ.
    """

    ours: SideOutcome
    libvirt: SideOutcome
    differs: tuple[str, ...]


class Pair:
    """The same guest twice: ours, and libvirt's."""

    def __init__(self, ours: OurSide, libvirt: LibvirtSide) -> None:
        self._sides = ours, libvirt

    async def ask(self, words: str) -> Answers:
        """Both, one after the other, with the words of our command line."""
        request = request_of(parse_request(words.split()))
        found = Comparison(*[await side.ask(request) for side in self._sides])
        return Answers(found.ours, found.libvirt, found.differs)


@asynccontextmanager
async def pair(daemon: Libvirtd, xml: str, *, start: bool, api: bool) -> AsyncIterator[Pair]:
    """Both, from the same XML; with `api`, ours is our call on another domain of libvirt's."""
    async with LibvirtSide.run(daemon._daemon, xml.encode(), start=start, log=False) as theirs:
        if not api:
            async with our_side(xml.encode(), start=start) as ours:
                yield Pair(ours, theirs)
            return
        async with managed(daemon, xml.replace("<name>", "<name>our-"), start=start) as other:
            async with qmpvcpu.connect(other.name, uri=daemon.uri) as domain:
                yield Pair(OurSide(domain, Path("/nonexistent")), theirs)
