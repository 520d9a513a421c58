"""What a review by fresh eyes found, one test each: every one of these failed once."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from qmpvcpu.app.boot import read_definition
from qmpvcpu.app.qemus import find_binaries
from qmpvcpu.core.events import Names, Signal, SignalKind, interpret
from qmpvcpu.core.inventory import (
    BootFacts,
    build_state,
    parse_cpus_fast,
    parse_hotpluggable_cpus,
)
from qmpvcpu.core.model import Entity, Props, QemuVersion
from qmpvcpu.core.transaction import Add, Phase, Poll, Replied, Snapshot, Transaction
from qmpvcpu.errors import VcpuConnectionError, VcpuRefused
from qmpvcpu.qemu.monitor import open_monitor
from tests.unit.fake_qemu import BOOT_PATH, FakeQemu
from tests.unit.fake_qmp import GREETING, answering, serve


@pytest.fixture
def running(tmp_path):
    @asynccontextmanager
    async def start(qemu, **o):
        async with serve(tmp_path, qemu.script) as path, qmpvcpu.connect(path, **o) as d:
            yield d

    return start


def sent(qemu, name, n=1):
    e = asyncio.Event()
    old = qemu.hook

    def hook(c, m):
        if len(qemu.sent(name)) >= n:
            e.set()
        return old(c, m)

    qemu.hook = hook
    return e


B = BootFacts("d", "x86_64", "q35", False, QemuVersion(10, 0), None)


def ent(n, p=True):
    return Entity((n,), "t", Props({"core-id": n}), f"/machine/peripheral/vcpu{n}" if p else None, None, True)


def snap(*n):
    return Snapshot(frozenset(n))


async def test_undo_after_the_first_plug_of_a_single_threaded_tcg_guest_is_not_tried(running):
    q = FakeQemu(kvm=False)
    q.one_thread = True
    q.add_errors = {2: "no"}
    async with running(q) as d:
        with pytest.raises(qmpvcpu.VcpuFailed):
            await d.enable([1, 2])
    assert not q.sent("device_del")


async def test_cancelled_undo_is_waited_for(running):  # fails on Python 3.11.0-3.11.2 only
    q = FakeQemu()
    q.add_errors = {2: "no"}
    q.on_delete = {1: "silence"}
    undoing = sent(q, "device_del")
    async with running(q) as d:
        task = asyncio.create_task(d.enable([1, 2]))
        await undoing.wait()
        task.cancel()
        await asyncio.wait([task], timeout=0.5)
        assert not task.done()
        q.let_go(1)
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_cancelled_call_ends_in_cancelled_error_even_if_qemu_hangs(running):
    q = FakeQemu()
    q.hook = lambda c, m: m["execute"] == "device_add"
    async with running(q, command_timeout=0.5) as d:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await d.enable([1])


async def test_a_lost_connection_names_what_is_pending(running):
    q = FakeQemu(plugged=(1,))
    q.on_delete = {1: "silence"}
    asked = sent(q, "query-cpus-fast", 3)
    async with running(q) as d:
        task = asyncio.create_task(d.disable(1))
        await asked.wait()
        q.connections[0].close()
        with pytest.raises(VcpuConnectionError) as e:
            await task
        assert e.value.pending == d.pending_ids == (1,)


async def test_a_lost_connection_names_what_may_be_changed(running):
    q = FakeQemu()
    q.hook = lambda c, m: m["execute"] == "device_add" and m["arguments"]["socket-id"] == 2 and (c.close() or True)
    async with running(q) as d:
        with pytest.raises(VcpuConnectionError) as e:
            await d.enable([1, 2])
    assert 1 in e.value.changed_ids


async def test_reconnect_to_a_smaller_machine(running):
    q = FakeQemu(plugged=(1, 2, 3))
    q.on_delete = {3: "silence"}
    async with running(q) as d:
        await d.disable(3, wait=False)
        q.slots, q.paths = 2, {0: BOOT_PATH}
        q.connections[0].close()
        await d.reconnect()
        assert d.pending_ids == ()
        await d.vcpus()


async def test_reconnect_settles_pending(running):
    q = FakeQemu(plugged=(1,))
    q.on_delete = {1: "silence"}
    async with running(q) as d:
        await d.disable(1, wait=False)
        q.paths.pop(1)
        q.connections[0].close()
        await d.reconnect()
        assert d.pending_ids == ()


async def test_a_vcpu_that_is_gone_is_not_pending(running):
    q = FakeQemu(plugged=(1,))
    q.on_delete = {1: "silence"}
    async with running(q) as d:
        await d.disable(1, timeout=0)
        await d.vcpus()
        q.let_go(1)
        v = (await d.vcpus())[1]
        assert (v.enabled, v.pending) == (False, False)


def test_nothing_is_plugged_while_undoing():
    x = Transaction([ent(2, False), ent(3, False)], [], [ent(1)])
    x.start()
    x.feed(Replied(2))
    x.feed(Replied(3, "E", "no"))
    x.feed(snap(0, 1, 2))
    x.feed(Replied(2))
    assert not [e for e in x.feed(snap(0)) if isinstance(e, Add)]


def test_nothing_is_plugged_after_a_known_failure():
    x = Transaction([ent(3, False)], [], [ent(1)])
    x.start()
    x.feed(Replied(3, "E", "no"))
    x.feed(snap(0, 1))
    x.feed(Poll())
    assert not [e for e in x.feed(snap(0)) if isinstance(e, Add)]


def test_kept_is_confirmed_by_the_slot():
    x = Transaction([], [], [ent(1)])
    x.start()
    x.feed(Signal(SignalKind.GUEST_REFUSED, 1, "no"))
    x.feed(snap(0))
    assert x.phase is not Phase.DONE or x.result().outcome != "applied"


async def test_async_with_timeout_0_is_requested(running):
    q = FakeQemu(plugged=(1,))
    q.on_delete = {1: "silence"}
    async with running(q) as d:
        assert (await d.disable(1, wait=False, timeout=0)).outcome == "requested"


def test_threads_of_a_machine_without_hotplug():  # real: qemu-system-ppc64 -machine powernv9 -smp 2 -S
    s = build_state(
        B,
        None,
        parse_cpus_fast(
            [
                {"cpu-index": n, "qom-path": f"/machine/chip[0]/core[{n}]/thread[0]", "thread-id": n + 1}
                for n in range(2)
            ]
        ),
    )
    assert len(s.vcpus) == 2


def test_two_slots_with_one_path_are_malformed():
    slots = [{"props": {"core-id": n}, "vcpus-count": 1, "type": "t", "qom-path": "/a"} for n in (0, 1)]
    with pytest.raises(VcpuConnectionError):
        build_state(
            B,
            parse_hotpluggable_cpus(slots),
            parse_cpus_fast([{"cpu-index": 0, "qom-path": "/a", "thread-id": 1}]),
        )


@pytest.mark.parametrize("node", [-5, "1", True])
def test_a_node_that_cannot_be_is_malformed(node):
    with pytest.raises(VcpuConnectionError):
        parse_hotpluggable_cpus([{"props": {"core-id": 0, "node-id": node}, "vcpus-count": 1, "type": "t"}])


@pytest.mark.parametrize("info", [{"source": [3]}, {"source": {}}])
def test_an_ost_event_of_a_wrong_shape_is_no_crash(info):
    interpret("ACPI_DEVICE_OST", {"info": {"slot-type": "CPU", **info}}, Names([ent(1)]))


async def test_a_number_of_5000_digits_is_not_called_32_mib(tmp_path):
    def answer(c, m):
        c.raw(b'{"return": ' + b"9" * 5000 + b"}\r\n")

    async with serve(tmp_path, answering(answer)) as path, open_monitor(path) as m:
        with pytest.raises(VcpuConnectionError) as e:
            await m.query_status()
    assert "MiB" not in str(e.value)


async def test_greeted_but_not_negotiated_is_told_so(tmp_path):
    async def script(c):
        c.send(GREETING)
        await asyncio.Event().wait()

    async with serve(tmp_path, script) as path:
        with pytest.raises(VcpuConnectionError) as e:
            async with open_monitor(path, connect_timeout=0.1):
                pass
    assert "did not greet" not in str(e.value)


@pytest.mark.parametrize("address", ["a\0b", "a..b:80"])
async def test_an_address_that_cannot_be(address):
    with pytest.raises((qmpvcpu.VcpuUsageError, VcpuConnectionError)) as e:
        async with open_monitor(address):
            pass
    assert getattr(e.value, "reason", "") != "not-qmp"


@pytest.mark.parametrize("number", ["5", None, 1.0, True])
async def test_vcpu_checks_its_id_as_enable_does(running, number):
    async with running(FakeQemu()) as d:
        with pytest.raises(qmpvcpu.VcpuError):
            await d.vcpu(number)


@pytest.mark.parametrize("flag", [128])
async def test_unknown_flags_are_refused(running, flag):
    async with running(FakeQemu()) as d:
        with pytest.raises(qmpvcpu.VcpuError) as e:
            await d.vcpu(1, (VcpuFlag.ENABLE | flag) if flag > 0 else flag)
    assert flag > 0 or "unknown" in str(e.value)


async def test_plugged_by_another_client_is_already_enabled(running):
    q = FakeQemu()
    async with running(q) as d:
        q.paths[1] = "/machine/peripheral/other"
        q.add_errors = {1: "CPU[1] with APIC ID 1 exists"}
        o = await d.enable(1)
    assert (o.outcome, o.changed) == ("applied", False)


def test_an_error_message_is_of_bounded_length():
    with pytest.raises(VcpuConnectionError) as e:
        parse_cpus_fast([{"cpu-index": "x" * 10**6}])
    assert len(str(e.value)) < 10**4


@pytest.mark.parametrize("depth", range(900, 1000, 20))
async def test_nesting_near_the_limit_is_malformed(running, depth):
    q = FakeQemu()

    def hook(c, m):
        if m["execute"] == "query-cpus-fast":
            c.raw(
                b'{"return": [{"cpu-index": '
                + b"[" * depth
                + b"]" * depth
                + b'}], "id": '
                + json.dumps(m["id"]).encode()
                + b"}\r\n"
            )
            return True
        return None

    q.hook = hook
    with pytest.raises(VcpuConnectionError):
        async with running(q):
            pass


def test_a_path_entry_that_cannot_be_looked_into_is_passed_over(monkeypatch, tmp_path):
    """Found as an ordinary user with root's PATH: Path.is_file() raises there."""
    monkeypatch.setenv("QMPVCPU_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", f"/{'a' * 5000}")
    assert find_binaries() == []
    with pytest.raises(VcpuRefused, match="there is no file"):
        read_definition(f"/{'a' * 5000}")
