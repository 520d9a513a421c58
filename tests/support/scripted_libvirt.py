"""A domain of libvirt's that the test plays: what libvirtd, and its other clients, do not do on
demand.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from unittest.mock import patch

from qmpvcpu import Outcome, Request, VcpuFlag
from qmpvcpu.domain.backends.libvirt import XmlReader
from qmpvcpu.domain.event_bus import EventBus
from qmpvcpu.domain.run import Scope, run
from qmpvcpu.domain.session import Session, open_session
from qmpvcpu.libvirt.calls import Connection
from qmpvcpu.libvirt.monitor import ApiMonitor
from qmpvcpu.ports import CommandError

SO = "invalid argument: vcpu '{}' is already in requested state"
GIVEN_UP = "Timed out during operation: vcpu unplug request timed out."


@asynccontextmanager
async def libvirt_of_our_own() -> AsyncIterator[Connection]:
    """A connection to libvirt's test driver."""
    connection = Connection("test:///default")
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()


class ScriptedGuest:
    """`libvirt.calls.LibvirtGuest` of 16 vCPUs: one call at a time, as libvirtd has it."""

    name = "web1"
    uuid = "00000000-0000-0000-0000-000000000001"
    _runs = itertools.count(1)

    def __init__(self, connection, plugged):
        self.connection = connection
        self.plugged = set(plugged)
        self.calls = []
        #: (enable, vCPU id) -> code and text of libvirt's error.
        self.errors = {}
        self.seconds = 0.02
        #: Seconds that the thread which changes things takes to connect.
        self.connects = 0.0
        self.ejects = True
        self.run_id = next(self._runs)

    def flags(self, **options):
        return 1

    def is_busy(self):
        time.sleep(self.connects)
        return False

    def watch(self, loop, told, monitor=None):
        return lambda: None

    async def run_state(self):
        return "running"

    async def without_threads(self, ids):
        return frozenset()

    async def live_xml(self):
        def row(number):
            enabled = "yes" if number in self.plugged else "no"
            return (
                f"<vcpu id='{number}' enabled='{enabled}'"
                f" hotpluggable='{'yes' if number else 'no'}'/>"
            )

        rows = "".join(map(row, range(16)))
        return (
            f"<domain type='kvm'><name>web1</name><memory unit='MiB'>128</memory>"
            f"<vcpu current='{len(self.plugged)}'>16</vcpu><vcpus>{rows}</vcpus>"
            "<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>"
            "<cpu><topology sockets='2' cores='4' threads='2'/></cpu></domain>"
        ).encode()

    def set_vcpu(self, ids, enable, flags):
        (number,) = ids

        def work():
            self.calls.append((number, enable))
            time.sleep(self.seconds)
            if error := self.errors.get((enable, number)):
                raise CommandError("virDomainSetVcpu", *error)
            if (number in self.plugged) == enable:
                raise CommandError("virDomainSetVcpu", "VIR_ERR_INVALID_ARG", SO.format(number))
            if not enable and not self.ejects:
                raise CommandError("virDomainSetVcpu", "VIR_ERR_OPERATION_TIMEOUT", GIVEN_UP)
            (self.plugged.add if enable else self.plugged.discard)(number)

        return work


class Client:
    """One that changes vCPUs of such a domain, by libvirt's API."""

    def __init__(self, link: Session) -> None:
        self.session = link

    async def enable(self, *ids: int, **options: Any) -> Outcome:
        return await run(
            Scope(self.session), Request(ids, VcpuFlag.ENABLE | VcpuFlag.LIVE, **options)
        )

    async def disable(self, *ids: int, **options: Any) -> Outcome:
        return await run(
            Scope(self.session), Request(ids, VcpuFlag.DISABLE | VcpuFlag.LIVE, **options)
        )

    @property
    def pending_ids(self) -> frozenset[int]:
        return self.session.pending_unplugs.entity_ids


@asynccontextmanager
async def client_of(guest: ScriptedGuest, before: Client | None = None) -> AsyncIterator[Client]:
    """A client of that domain; `before` is one whose connection was lost, and which it replaces."""

    async def opener(address: str) -> ApiMonitor:
        monitor = ApiMonitor(guest)
        monitor.start(asyncio.get_running_loop())
        return monitor

    async def reads(monitor: Any, name: str) -> Any:
        reader = XmlReader(monitor, name)
        return reader, await reader.full()

    earlier = None if before is None else before.session
    link = await open_session(
        "web1", ["libvirt"], opener, EventBus(), asyncio.Lock(), earlier, reads
    )
    try:
        yield Client(link)
    finally:
        await link.close()


@contextmanager
def slow_to_close(seconds: float) -> Iterator[asyncio.Event]:
    """Every connection to libvirt takes so long to close; set once one has begun."""
    closing, close = asyncio.Event(), Connection.close

    async def slow(self: Connection) -> None:
        closing.set()
        await close(self)
        await asyncio.sleep(seconds)

    with patch.object(Connection, "close", slow):
        yield closing
