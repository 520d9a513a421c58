"""Whole calls by libvirt's API on a scripted domain: what libvirtd, and its other clients, do not do on demand."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from contextlib import asynccontextmanager

import libvirt
import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from qmpvcpu.core.request import Request
from qmpvcpu.domain.change import change
from qmpvcpu.domain.libvirt import XmlReader
from qmpvcpu.domain.link import open_link
from qmpvcpu.domain.listen import Hub
from qmpvcpu.libvirt.api import ApiMonitor
from qmpvcpu.libvirt.connection import Connection
from qmpvcpu.ports import CommandError

pytestmark = [pytest.mark.qemu, pytest.mark.xdist_group("libvirt")]

NO_SLOT = "unable to execute QEMU command 'device_del': acpi: device unplug request for not supported device type"
SO = "invalid argument: vcpu '{}' is already in requested state"
LOCKED = (
    "Timed out during operation: cannot acquire state change lock (held by monitor=remoteDispatchDomainSetVcpu)"
)
GIVEN_UP = "Timed out during operation: vcpu unplug request timed out."


class ScriptedGuest:
    """`libvirt.connection.Guest` of 16 vCPUs: one call at a time, as libvirtd has it."""

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

    def is_held_now(self):
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
            return f"<vcpu id='{number}' enabled='{enabled}' hotpluggable='{'yes' if number else 'no'}'/>"

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


async def opened(guest, before=None):
    async def opener(address):
        monitor = ApiMonitor(guest)
        monitor.start(asyncio.get_running_loop())
        return monitor

    async def reads(monitor, name):
        reader = XmlReader(monitor, name)
        return reader, await reader.full()

    return await open_link("web1", ["libvirt"], opener, Hub(), asyncio.Lock(), before, reads)


@pytest.fixture
async def connection(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path))
    connection = Connection("test:///default")
    await connection.open()
    yield connection
    await connection.close()


@asynccontextmanager
async def linked(guest, before=None):
    link = await opened(guest, before)
    try:
        yield link
    finally:
        await link.close()


def enable(*ids, **options):
    return Request(ids, VcpuFlag.ENABLE | VcpuFlag.LIVE, **options)


def disable(*ids, **options):
    return Request(ids, VcpuFlag.DISABLE | VcpuFlag.LIVE, **options)


async def test_asked_is_not_before_the_thread_has_connected(connection):
    guest = ScriptedGuest(connection, {0, 7})
    guest.connects = 1.2
    async with linked(guest) as link:
        outcome = await change(link, disable(7, wait=False))
        assert (7, False) in guest.calls and outcome.outcome in ("requested", "applied")
        assert outcome.seconds > 1


async def test_an_error_that_comes_late_ends_the_unplug(connection):
    guest = ScriptedGuest(connection, {0, 7})
    guest.seconds = 0.8
    guest.errors[False, 7] = "VIR_ERR_INTERNAL_ERROR", NO_SLOT
    async with linked(guest) as link:
        with pytest.raises(qmpvcpu.VcpuRejected, match="not supported device type"):
            await change(link, disable(7, timeout=10))
        assert link.ledger.firsts == frozenset()
        assert (await change(link, enable(7))).changed is False


async def test_behind_a_plug_that_fails_no_other_is_made(connection):
    guest = ScriptedGuest(connection, {0, 1})
    guest.errors[True, 5] = "VIR_ERR_INTERNAL_ERROR", "no memory"
    async with linked(guest) as link:
        with pytest.raises(qmpvcpu.VcpuFailed, match="vCPU 5: no memory") as caught:
            await change(link, enable(*range(5, 15)))
    assert caught.value.changed_ids == () and guest.plugged == {0, 1}
    # One more may be on its way before anybody has heard of it.
    assert sum(on for _, on in guest.calls) <= 2


async def test_nor_does_each_wait_for_a_lock_that_somebody_holds(connection):
    guest = ScriptedGuest(connection, {0, 1})
    guest.seconds = 0.5
    guest.errors = {(True, number): ("VIR_ERR_OPERATION_TIMEOUT", LOCKED) for number in range(5, 15)}
    async with linked(guest) as link:
        with pytest.raises(qmpvcpu.VcpuFailed, match="state change lock"):
            await change(link, enable(*range(5, 15), timeout=1))
    assert len(guest.calls) <= 2


@pytest.mark.parametrize("end", ["alone", "fails", "cancelled"])
async def test_what_another_client_has_plugged_is_not_ours_to_undo(connection, end):
    guest = ScriptedGuest(connection, {0, 1})
    async with linked(guest) as link:
        guest.plugged.add(5)
        match end:
            case "alone":
                outcome = await change(link, enable(5, 6))
                assert (outcome.outcome, outcome.changed_ids) == ("applied", (6,))
            case "fails":
                guest.errors[True, 6] = "VIR_ERR_INTERNAL_ERROR", "no memory"
                with pytest.raises(qmpvcpu.VcpuFailed) as caught:
                    await change(link, enable(5, 6))
                assert (caught.value.changed_ids, caught.value.undone) == ((), ())
            case _:
                task = asyncio.create_task(change(link, enable(*range(5, 13))))
                while len(guest.calls) < 3:
                    await asyncio.sleep(0.001)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() and guest.plugged == {0, 1, 5}
    assert 5 in guest.plugged and (5, False) not in guest.calls


async def test_what_was_pending_in_another_run_of_the_guest_is_not_so_in_this_one(connection):
    guest = ScriptedGuest(connection, {0, 7})
    guest.ejects = False
    async with linked(guest) as link:
        assert (await change(link, disable(7, timeout=0.5))).outcome == "pending"
        again = ScriptedGuest(connection, {0, 7})
        async with linked(again, link) as other:
            assert other.ledger.firsts == frozenset()
        again.run_id = guest.run_id
        async with linked(again, link) as other:
            assert other.ledger.firsts == {7}


async def test_left_while_it_connects_anew_it_stays_left(monkeypatch):
    keep = libvirt.open("test:///default")
    found = keep.lookupByName("test")
    found.destroy()
    closing, original = asyncio.Event(), Connection.close

    async def slow(self):
        closing.set()
        await original(self)
        await asyncio.sleep(0.1)

    try:
        async with qmpvcpu.connect("test", uri="test:///default") as domain:
            found.create()
            with monkeypatch.context() as patched:
                patched.setattr(Connection, "close", slow)
                task = asyncio.create_task(domain.state())
                await closing.wait()
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            await task
        assert domain._connection is None
        assert not [one for one in threading.enumerate() if "queries" in one.name or "changes" in one.name]
    finally:
        keep.close()
