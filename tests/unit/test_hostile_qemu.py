"""A QEMU that means harm: shapes that a person thinks of. `scripts/soak hostile` generates others."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc

import pytest

import qmpvcpu
from qmpvcpu.cli import render
from tests.support.fake_qemu import FakeQemu, error


def change_slots(qemu, slots):
    """What it lists from now on."""
    qemu.machine.slots = dict(enumerate(slots))
    qemu.paths = {n: path for n, path in qemu.paths.items() if n < len(slots)}


def shrunk(slots):
    return slots[:2]


def grown(slots):
    more = [slots[-1] | {"props": slots[-1]["props"] | {"socket-id": 40 + n}} for n in range(4)]
    return [*slots, *more]


@pytest.mark.parametrize("change", [shrunk, grown])
@pytest.mark.parametrize("call", ["enable", "disable", "state", "set_vcpus", "reconnect"])
async def test_a_slot_list_that_changes_between_two_queries(running, change, call):
    qemu = FakeQemu(plugged=(1, 3))
    work = {
        "enable": lambda domain: domain.enable(2),
        "disable": lambda domain: domain.disable(3, timeout=0.1),
        "set_vcpus": lambda domain: domain.set_vcpus(2, timeout=0.1),
    }
    async with running(qemu) as domain:
        change_slots(qemu, change(list(qemu.machine.slots.values())))
        if call == "reconnect":
            # It may be another QEMU by now.
            await domain.reconnect()
            return
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="slots of") as caught:
            await domain.state()
            await work[call](domain)
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("call", ["enable", "disable"])
@pytest.mark.parametrize("change", [shrunk, grown])
async def test_a_slot_list_that_changes_during_a_call(running, change, call):
    qemu = FakeQemu(plugged=(1, 3))
    qemu.on_delete[3] = "gone-silently"

    def hook(connection, command):
        if command["execute"] in ("device_add", "device_del"):
            change_slots(qemu, change(list(qemu.machine.slots.values())))
            qemu.fill(1, "other")  # so that a look at the CPUs alone is not enough
        return False

    qemu.hook = hook
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuError) as caught:
            await (domain.enable(2) if call == "enable" else domain.disable(3, timeout=0.2))
    assert isinstance(caught.value, qmpvcpu.VcpuConnectionError | qmpvcpu.VcpuFailed)


async def test_a_machine_that_lists_its_machine_types_with_an_error(running):
    qemu = FakeQemu()

    def hook(connection, command):
        if command["execute"] in ("query-hotpluggable-cpus", "query-machines"):
            error(connection, command, "no", "CommandNotFound")
            return True
        return False

    qemu.hook = hook
    with pytest.raises(qmpvcpu.VcpuConnectionError, match="query-machines: no"):
        async with running(qemu):
            pass


def ost(**info):
    return {"slot-type": "CPU", "slot": "1", "source": 3, "status": 0, "device": "vcpu1"} | info


@pytest.mark.parametrize(
    "wrong", [{"source": []}, {"status": {}}, {"slot": [], "device": {}}, {"slot-type": []}]
)
async def test_an_event_of_a_wrong_shape_upsets_no_listener(running, wrong):
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    qemu = FakeQemu(plugged=(1,))
    async with running(qemu) as domain:
        info = {key: value for key, value in ost(**wrong).items() if value != {}}
        for each in (info, info | {"device": None}):
            qemu.connections[0].event("ACPI_DEVICE_OST", info=each)
        qemu.connections[0].event(
            "ACPI_DEVICE_OST", info={"slot-type": "CPU", "slot": "1", **wrong}
        )
        await domain.state()
    assert told == []


async def test_events_without_end_take_no_memory(running):
    """Of devices that are no CPU, of threads that no core has, and of names that are long."""
    qemu = FakeQemu(plugged=(1,), kvm=True)

    async def burst(domain):
        for number in range(500):
            qemu.connections[0].event(
                "DEVICE_DELETED", path=f"/machine/peripheral/vcpu1/thread[{number}]"
            )
        for number in range(4):
            path = f"/machine/peripheral/{number}{'x' * 100_000}"
            qemu.connections[0].event("DEVICE_DELETED", path=path, device=path)
            qemu.connections[0].event("ACPI_DEVICE_OST", info=ost(device=path))
            qemu.connections[0].event(
                "DEVICE_UNPLUG_GUEST_ERROR", device="vcpu1", path=path, text=path
            )
        await domain.state()

    async with running(qemu) as domain, domain.events(limit=100_000):
        await burst(domain)
        tracemalloc.start()
        try:
            for _ in range(3):
                await burst(domain)
            gc.collect()
            now, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # 8 MB of names and reasons, and 150 KB of paths, were sent.
    assert now < 250_000


def answering_with(values):
    """Answers to these commands, whatever they are about."""

    def hook(connection, command):
        if command["execute"] in values:
            connection.reply(command, values[command["execute"]])
            return True
        return False

    return hook


async def fails(running, qemu):
    with pytest.raises(qmpvcpu.VcpuConnectionError) as caught:
        async with running(qemu) as domain:
            await domain.picture()
    assert (caught.value.reason, len(caught.value.message) < 1500) == ("malformed", True)


@pytest.mark.parametrize("key", ["sockets", "cores", "threads", "maxcpus"])
async def test_a_topology_of_numbers_of_thousands_of_digits(running, key):
    qemu = FakeQemu()
    qemu.machine.topology[key] = 10**4200
    await fails(running, qemu)


LONG = [
    {"query-target": {"arch": ["x" * 100_000]}},
    {"query-cpus-fast": [{"cpu-index": 0, "thread-id": 1, "qom-path": "x" * 100_000}]},
    {"query-cpus-fast": [{"cpu-index": "9" * 100_000, "thread-id": 1, "qom-path": "x"}]},
    {"qom-list": [{"name": str(n), "type": "int"} for n in range(20_000)]},
]


@pytest.mark.parametrize("values", LONG, ids=["a text", "a path", "a number", "properties"])
async def test_what_is_long_is_cut_in_the_message(running, values):
    qemu = FakeQemu()
    qemu.hook = answering_with(values)
    await fails(running, qemu)


@pytest.mark.parametrize(
    "status", [{"status": "x" * 100_000}, {"status": ["running"]}, {}, "running"]
)
async def test_a_run_state_that_is_none(running, status):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete[1] = "silence"
    qemu.hook = answering_with({"query-status": status})
    async with running(qemu) as domain:
        outcome = await domain.disable(1, timeout=0.1)
        assert len(domain.run_state or "") < 100
    assert (outcome.outcome, len("".join(outcome.messages)) < 1500) == ("pending", True)


async def test_replies_that_never_agree_and_come_late_have_one_deadline(running, monkeypatch):
    """Each of 30 tries could take as long as a command may."""
    monkeypatch.setattr("qmpvcpu.domain.reader._TRY_SECONDS", 0.2)
    qemu, answered = FakeQemu(plugged=(1,)), []

    def hook(connection, command):
        if command["execute"] != "query-cpus-fast":
            return False
        answered.append(command)
        asyncio.get_running_loop().call_later(0.1, connection.reply, command, [])
        return True

    async with running(qemu) as domain:
        qemu.hook = hook
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="do not agree"):
            await domain.state()
    assert len(answered) < 5


@pytest.mark.parametrize("seconds", [1 << 34, 1 << 61, -1, -(1 << 61)])
async def test_the_time_of_an_event_can_be_shown(running, seconds):
    qemu = FakeQemu(plugged=(1,))
    async with running(qemu) as domain, domain.events() as events:
        stamp = {"seconds": seconds, "microseconds": 0}
        data = {"device": "vcpu1", "path": qemu.paths[1]}
        qemu.connections[0].send(
            {"event": "DEVICE_UNPLUG_GUEST_ERROR", "data": data, "timestamp": stamp}
        )
        event = await anext(events)
    assert abs(event.time - time.time()) < 3600
    assert "vCPU 1" in render.event(event)


ROW = {"type": "t", "vcpus-count": 1, "props": {"socket-id": 0}, "qom-path": "/x"}
TEXT = "x" * 5000


@pytest.mark.parametrize(
    "wrong", [{"type": TEXT}, {"qom-path": TEXT}, {"props": {"x": TEXT}}, {"props": {TEXT: 1}}]
)
async def test_a_text_longer_than_any_of_qemus_is_malformed(running, wrong):
    qemu = FakeQemu()
    qemu.hook = answering_with({"query-hotpluggable-cpus": [ROW | wrong]})
    await fails(running, qemu)
