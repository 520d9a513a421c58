"""Whole calls by libvirt's API on a scripted domain: what libvirtd, and its other clients, do not
do on demand.
"""

from __future__ import annotations

import asyncio
import threading

import libvirt
import pytest

import qmpvcpu
from tests.support.scripted_libvirt import (
    ScriptedGuest,
    client_of,
    libvirt_of_our_own,
    slow_to_close,
)

pytestmark = [pytest.mark.qemu, pytest.mark.xdist_group("libvirt")]

NO_SLOT = (
    "unable to execute QEMU command 'device_del': acpi: device unplug request for not"
    " supported device type"
)
LOCKED = (
    "Timed out during operation: cannot acquire state change lock (held by"
    " monitor=remoteDispatchDomainSetVcpu)"
)


@pytest.fixture
async def connection(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path))
    async with libvirt_of_our_own() as connection:
        yield connection


async def test_asked_is_not_before_the_thread_has_connected(connection):
    guest = ScriptedGuest(connection, {0, 7})
    guest.connects = 1.2
    async with client_of(guest) as client:
        outcome = await client.disable(7, wait=False)
        assert (7, False) in guest.calls and outcome.outcome in ("requested", "applied")
        assert outcome.seconds > 1


async def test_an_error_that_comes_late_ends_the_unplug(connection):
    guest = ScriptedGuest(connection, {0, 7})
    guest.seconds = 0.8
    guest.errors[False, 7] = "VIR_ERR_INTERNAL_ERROR", NO_SLOT
    async with client_of(guest) as client:
        with pytest.raises(qmpvcpu.VcpuRejected, match="not supported device type"):
            await client.disable(7, timeout=10)
        assert client.pending_ids == frozenset()
        assert (await client.enable(7)).changed is False


async def test_behind_a_plug_that_fails_no_other_is_made(connection):
    guest = ScriptedGuest(connection, {0, 1})
    guest.errors[True, 5] = "VIR_ERR_INTERNAL_ERROR", "no memory"
    async with client_of(guest) as client:
        with pytest.raises(qmpvcpu.VcpuFailed, match="vCPU 5: no memory") as caught:
            await client.enable(*range(5, 15))
    assert caught.value.changed_ids == () and guest.plugged == {0, 1}
    # One more may be on its way before anybody has heard of it.
    assert sum(on for _, on in guest.calls) <= 2


async def test_nor_does_each_wait_for_a_lock_that_somebody_holds(connection):
    guest = ScriptedGuest(connection, {0, 1})
    guest.seconds = 0.5
    guest.errors = {
        (True, number): ("VIR_ERR_OPERATION_TIMEOUT", LOCKED) for number in range(5, 15)
    }
    async with client_of(guest) as client:
        with pytest.raises(qmpvcpu.VcpuFailed, match="state change lock"):
            await client.enable(*range(5, 15), timeout=1)
    assert len(guest.calls) <= 2


@pytest.mark.parametrize("end", ["alone", "fails", "cancelled"])
async def test_what_another_client_has_plugged_is_not_ours_to_undo(connection, end):
    guest = ScriptedGuest(connection, {0, 1})
    async with client_of(guest) as client:
        guest.plugged.add(5)
        match end:
            case "alone":
                outcome = await client.enable(5, 6)
                assert (outcome.outcome, outcome.changed_ids) == ("applied", (6,))
            case "fails":
                guest.errors[True, 6] = "VIR_ERR_INTERNAL_ERROR", "no memory"
                with pytest.raises(qmpvcpu.VcpuFailed) as caught:
                    await client.enable(5, 6)
                assert (caught.value.changed_ids, caught.value.undone) == ((), ())
            case _:
                task = asyncio.create_task(client.enable(*range(5, 13)))
                while len(guest.calls) < 3:
                    await asyncio.sleep(0.001)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() and guest.plugged == {0, 1, 5}
    assert 5 in guest.plugged and (5, False) not in guest.calls


async def test_what_was_pending_in_another_run_of_the_guest_is_not_so_in_this_one(connection):
    guest = ScriptedGuest(connection, {0, 7})
    guest.ejects = False
    async with client_of(guest) as client:
        assert (await client.disable(7, timeout=0.5)).outcome == "pending"
        again = ScriptedGuest(connection, {0, 7})
        async with client_of(again, client) as other:
            assert other.pending_ids == frozenset()
        again.run_id = guest.run_id
        async with client_of(again, client) as other:
            assert other.pending_ids == {7}


async def test_left_while_it_connects_anew_it_stays_left():
    keep = libvirt.open("test:///default")
    found = keep.lookupByName("test")
    found.destroy()
    try:
        async with qmpvcpu.connect("test", uri="test:///default") as domain:
            found.create()
            with slow_to_close(0.1) as closing:
                task = asyncio.create_task(domain.state())
                await closing.wait()
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            await task
        assert not [
            one for one in threading.enumerate() if "queries" in one.name or "changes" in one.name
        ]
    finally:
        keep.close()
