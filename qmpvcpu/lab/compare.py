"""`compare`: run one request on a guest of ours and on the same guest under libvirt, and compare
the results.

libvirt is a throwaway daemon of our own. It is called by its API, like virsh calls it. Its log
shows what it sends to QEMU.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qmpvcpu.app.boot import check_program, command_line
from qmpvcpu.core.definition import Definition
from qmpvcpu.core.machine.boot_arguments import qemu_arch
from qmpvcpu.core.machine.hardware import hardware_args
from qmpvcpu.core.model import format_ids
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain import Domain
from qmpvcpu.domain.connect import connect
from qmpvcpu.errors import VcpuConnectionError, VcpuError, VcpuRefused
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.lab.libvirtd import Libvirtd, run_libvirtd
from qmpvcpu.libvirt.calls import Connection, LibvirtGuest, open_connection
from qmpvcpu.ports import CommandError
from qmpvcpu.qemu.launch import run_qemu, throwaway_folder
from qmpvcpu.qemu.qmp_log import QmpLog
from qmpvcpu.xml.boot_devices import read_hardware
from qmpvcpu.xml.document import read_domain
from qmpvcpu.xml.vcpus import vcpus_lines, write_vcpus

#: Seconds for libvirt to start a guest: if it does not know the QEMU, it queries its capabilities
#: first.
_START_SECONDS: Final = 60.0
_AGENT: Final = "agent"


@dataclass(frozen=True, slots=True)
class SideOutcome:
    """The result of one request on one side.

    Attributes:
        outcome: our outcome; for libvirt "applied", "failed", or "none" if it has no such call.
        error: the name of a libvirt error; None without an error.
        message: the text of the error, or other messages.
        seconds: the duration of the call.
        commands: the QMP commands that it sent.
        live: the running guest's `<vcpu>` and `<vcpus>` afterwards, as lines in libvirt's dialect;
            None if it does not run.
        config: the same of its definition; None if there is none.
        live_ids: ids of the enabled vCPUs in `live`.
        config_ids: ids of the enabled vCPUs in `config`.
    """

    outcome: str
    error: str | None
    message: str | None
    seconds: float
    commands: tuple[Mapping[str, Any], ...]
    live: tuple[str, ...] | None
    config: tuple[str, ...] | None
    live_ids: tuple[int, ...] = ()
    config_ids: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "outcome": self.outcome,
            "error": self.error,
            "message": self.message,
            "seconds": round(self.seconds, 6),
            "commands": list(self.commands),
            "live": None if self.live is None else list(self.live),
            "config": None if self.config is None else list(self.config),
            "live_vcpus": list(self.live_ids),
            "config_vcpus": list(self.config_ids),
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results of one request on both sides."""

    ours: SideOutcome
    libvirt: SideOutcome

    @property
    def differs(self) -> tuple[str, ...]:
        """The names of the parts that differ: "outcome" (only without an error), "error", "live",
        "config".
        """
        live, theirs = self.ours.live, self.libvirt.live
        if live is not None and theirs is not None and not any("order=" in row for row in theirs):
            # libvirt queries the order with the first plug, and does not know it before.
            live = tuple(re.sub(r" order='\d+'", "", row) for row in live)
        has_error = self.ours.error is not None or self.libvirt.error is not None
        ends = ("", "") if has_error else (self.ours.outcome, self.libvirt.outcome)
        pairs = (
            ("outcome", *ends),
            ("error", self.ours.error, self.libvirt.error),
            ("live", live, self.libvirt.live),
            ("config", self.ours.config, self.libvirt.config),
        )
        return tuple(word for word, one, other in pairs if one != other)

    def to_json(self) -> dict[str, Any]:
        """The document of `compare --json`."""
        return {
            "outcome": "queried",
            "ours": self.ours.to_json(),
            "libvirt": self.libvirt.to_json(),
            "differs": list(self.differs),
        }


def _shown(xml: bytes | None) -> tuple[tuple[str, ...] | None, tuple[int, ...]]:
    if xml is None:
        return None, ()
    definition = read_domain(xml, running=True)[1]
    ids = definition.enabled_ids
    return (
        f"<vcpu current='{len(ids)}'>{definition.maxcpus}</vcpu>",
        *vcpus_lines(definition, "libvirt"),
    ), ids


class OurSide:
    """A guest of ours; if it runs, `second_qmp` is the path of a second QMP socket of it."""

    def __init__(self, domain: Domain, log: Path, second_qmp: str | None = None) -> None:
        self.domain = domain
        self.second_qmp = second_qmp
        self._log = log

    async def ask(self, request: Request) -> SideOutcome:
        """Run a request."""
        mark = self._log.stat().st_size if self._log.exists() else 0
        error: VcpuError | None = None
        outcome = ""
        messages: tuple[str, ...] = ()
        began = time.monotonic()
        try:
            end = await self.domain.request(request)
            outcome, messages = str(end.outcome), end.messages
        except VcpuError as raised:
            error = raised
        seconds = time.monotonic() - began
        commands = tuple(_sent(self._log, mark))
        (live, live_ids), (config, config_ids) = map(_shown, await self._sides())
        return SideOutcome(
            str(error.outcome) if error is not None else outcome,
            None if error is None else error.libvirt,
            error.message if error is not None else "; ".join(messages) or None,
            seconds,
            commands,
            live,
            config,
            live_ids,
            config_ids,
        )

    async def _sides(self) -> tuple[bytes | None, bytes | None]:
        live = await self.domain.dump_xml(dialect="libvirt") if self.domain.is_active else None
        return live, await self.domain.dump_xml(inactive=True, dialect="libvirt")


def _sent(log: Path, mark: int) -> list[Mapping[str, Any]]:
    found = []
    with suppress(FileNotFoundError), log.open("rb") as file:
        file.seek(mark)
        for line in file:
            row = json.loads(line)
            if row["direction"] == "send" and "execute" in row["message"]:
                found.append(_without_id(row["message"]))
    return found


def _without_id(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in message.items() if key in ("execute", "arguments")}


@asynccontextmanager
async def our_side(xml: bytes, *, start: bool = True, log: bool = True) -> AsyncIterator[OurSide]:
    """Make a guest with this XML; at the end it is removed.

    Args:
        xml: the domain's XML.
        start: whether it is started.
        log: whether the messages to QEMU are recorded.

    Raises:
        VcpuRefused: such a guest cannot be started.
        VcpuFailed, VcpuConnectionError: its QEMU does not start.
    """
    document, definition = read_domain(xml)
    with throwaway_folder() as folder:
        file, sent = folder / "domain.xml", folder / "qmp"
        file.write_bytes(xml)
        if not start:
            async with connect(str(file)) as domain:
                yield OurSide(domain, sent)
            return
        check_program(definition)
        line = await command_line(definition)
        if line.probe.emulator is None:
            raise catalogue.NO_PROGRAM_TO_COMPARE.error(messages="; ".join(line.probe.messages))
        words = ["-S", *line.args.arguments]
        words += hardware_args(
            read_hardware(document),
            qemu_arch(definition),
            console=str(folder / "console"),
            agent=_AGENT,
        )
        async with run_qemu(
            line.probe.emulator, words, channels=(_AGENT,), monitors=("qmp", "second")
        ) as qemu:
            await qemu.monitor.cont()
            agent = str(qemu.folder / _AGENT) if definition.agent is not None else None
            qmp_log = QmpLog(sent) if log else None
            try:
                async with connect(
                    qmp=qemu.qmp, agent=agent, xml=str(file), qmp_log=qmp_log
                ) as domain:
                    yield OurSide(domain, sent, str(qemu.folder / "second"))
            finally:
                if qmp_log is not None:
                    qmp_log.close()


class LibvirtSide:
    """The same guest under libvirt, which is called like virsh calls it."""

    def __init__(
        self, daemon: Libvirtd | None, connection: Connection, guest: LibvirtGuest
    ) -> None:
        self._daemon = daemon
        self.connection = connection
        self.guest = guest

    @classmethod
    @asynccontextmanager
    async def run(
        cls, daemon: Libvirtd, xml: bytes, *, start: bool = True, log: bool = True
    ) -> AsyncIterator[LibvirtSide]:
        """Define a domain and start it; at the end it is destroyed and undefined.

        Args:
            daemon: a daemon of `run_libvirtd`.
            xml: the domain's XML.
            start: whether it is started.
            log: whether the QMP commands are read from the daemon's log.

        Raises:
            VcpuRefused: libvirt does not accept or start it.
        """
        async with open_connection(daemon.uri) as connection:
            conn, library = connection.conn, connection.library

            def begin() -> Any:
                found = conn.defineXML(xml.decode())
                try:
                    if start:
                        found.create()
                except library.libvirtError:
                    found.undefine()
                    raise
                return found

            def end() -> None:
                with suppress(library.libvirtError):
                    if domain.isActive():
                        domain.destroy()
                with suppress(library.libvirtError):
                    domain.undefine()

            try:
                domain = await connection.change("virDomainCreate", begin, _START_SECONDS)
            except CommandError as error:
                raise VcpuRefused(
                    [
                        replace(
                            catalogue.LIBVIRT_NOT_STARTED(error=error.text),
                            libvirt=error.error_class,
                        )
                    ]
                ) from error
            try:
                yield cls(daemon if log else None, connection, LibvirtGuest(connection, domain))
            finally:
                with suppress(CommandError, VcpuConnectionError):
                    await connection.change("virDomainDestroy", end)

    async def ask(self, request: Request) -> SideOutcome:
        """Run a request with libvirt's own call."""
        call = self.call_of(request)
        mark = self._daemon.log_position() if self._daemon is not None else 0
        error: CommandError | VcpuConnectionError | None = None
        began = time.monotonic()
        if call is not None:
            try:
                await self.connection.change("the call", call)
            except (CommandError, VcpuConnectionError) as raised:
                error = raised
        seconds = time.monotonic() - began
        commands = (
            tuple(_without_id(one) for one in self._daemon.qmp_commands(mark))
            if self._daemon
            else ()
        )
        (live, live_ids), (config, config_ids) = map(_shown, await self.guest.sides())
        name = (
            error.error_class
            if isinstance(error, CommandError)
            else error.libvirt
            if error
            else None
        )
        text = error.text if isinstance(error, CommandError) else error.message if error else None
        if call is None:
            text = "libvirt has no call for this"
        outcome = "none" if call is None else "applied" if error is None else "failed"
        return SideOutcome(
            outcome, name, text, seconds, commands, live, config, live_ids, config_ids
        )

    def call_of(self, request: Request) -> Callable[[], object] | None:
        """The call that virsh would make for a request; None if libvirt has no such call."""
        guest, library = self.guest, self.connection.library
        if request.is_query or request.listed is not None:
            return None
        if request.has(VcpuFlag.NUMA_NODE) or request.has(VcpuFlag.CORE):
            return None
        impact = guest.flags(live=request.has(VcpuFlag.LIVE), config=request.has(VcpuFlag.CONFIG))
        if request.total is not None:
            more = library.VIR_DOMAIN_VCPU_GUEST if request.has(VcpuFlag.GUEST) else 0
            more |= guest.count_flags(request.maximum, request.hotpluggable)
            return guest.set_vcpus(request.total, impact | more)
        if request.has(VcpuFlag.GUEST):
            return lambda: guest.domain.setGuestVcpus(format_ids(request.ids), int(request.enable))
        return guest.set_vcpu(request.ids, request.enable, impact)


def _for_libvirt(xml: bytes, definition: Definition) -> bytes:
    """Write `<vcpus>` in libvirt's dialect, because libvirt does not accept the RFC's."""
    if definition.dialect != "rfc":
        return xml
    document, old = read_domain(xml)
    return write_vcpus(document, old, replace(old, dialect="libvirt"))


async def compare(
    xml: bytes, requests: Sequence[Request], *, start: bool = True
) -> list[Comparison]:
    """Run requests, one after the other, on both sides.

    Args:
        xml: the domain's XML; its `<emulator>` is started twice.
        requests: the requests.
        start: whether the guests are started; if not, they are shut off on both sides.

    Raises:
        VcpuRefused: one of the guests cannot be started, or libvirt is not installed.
        VcpuError: QEMU or libvirt does not start.
    """
    definition = read_domain(xml)[1]
    async with (
        our_side(xml, start=start) as ours,
        run_libvirtd(log_qmp=True) as daemon,
        LibvirtSide.run(daemon, _for_libvirt(xml, definition), start=start) as theirs,
    ):
        return [
            Comparison(await ours.ask(request), await theirs.ask(request)) for request in requests
        ]
