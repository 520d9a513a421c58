"""A domain of the API: how it is entered and left, what its calls take, and that they queue."""

from __future__ import annotations

import asyncio

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from tests.support.fake_qemu import FakeQemu, error
from tests.support.fake_qmp import answering, serve


async def test_of_several_addresses_the_first_that_answers_is_taken(tmp_path):
    async with serve(tmp_path, FakeQemu().script) as path:
        async with qmpvcpu.connect(qmp=[str(tmp_path / "nowhere"), path]) as domain:
            assert len(await domain.vcpus()) == 4


async def test_where_no_address_answers_that_is_said(tmp_path):
    with pytest.raises(qmpvcpu.VcpuConnectionError, match="no QMP address answers"):
        async with qmpvcpu.connect(qmp=[str(tmp_path / "nowhere"), str(tmp_path / "neither")]):
            pass


async def test_a_domain_is_entered_once(running):
    async with running(FakeQemu()) as domain:
        assert "connected" in repr(domain)
        with pytest.raises(qmpvcpu.VcpuUsageError):
            await domain.__aenter__()


@pytest.mark.parametrize("call", ["vcpus", "enable", "vcpu"])
async def test_outside_a_domain_is_closed(running, call):
    async with running(FakeQemu()) as domain:
        pass
    assert "closed" in repr(domain)
    with pytest.raises(qmpvcpu.VcpuConnectionError) as caught:
        await (domain.vcpus() if call == "vcpus" else getattr(domain, call)(1))
    assert caught.value.reason == "closed"


async def test_a_server_that_knows_no_command_is_not_a_domain(tmp_path):
    script = answering(
        lambda connection, command: error(connection, command, "what?", "CommandNotFound")
    )
    async with serve(tmp_path, script) as path:
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="query-target") as caught:
            async with qmpvcpu.connect(path):
                pass
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
async def test_a_timeout_that_makes_no_sense_is_usage(running, timeout):
    async with running(FakeQemu()) as domain:
        with pytest.raises(qmpvcpu.VcpuUsageError):
            await domain.enable(1, timeout=timeout)


@pytest.mark.parametrize("ids", [[], ["1"], [True], [1.0], "1"])
async def test_ids_that_are_not_integers_are_usage(running, ids):
    async with running(FakeQemu()) as domain:
        with pytest.raises(qmpvcpu.VcpuUsageError):
            await domain.enable(ids)


@pytest.mark.parametrize("number", ["5", None, 1.0, True])
async def test_vcpu_checks_its_id_as_enable_does(running, number):
    async with running(FakeQemu()) as domain:
        with pytest.raises(qmpvcpu.VcpuError):
            await domain.vcpu(number)


async def test_a_flag_that_does_not_exist_is_refused(running):
    async with running(FakeQemu()) as domain:
        with pytest.raises(qmpvcpu.VcpuError):
            await domain.vcpu(1, VcpuFlag.ENABLE | 128)


@pytest.mark.parametrize(
    ("by_flags", "by_name"),
    [
        (
            lambda d: d.vcpu(
                5, VcpuFlag.ENABLE | VcpuFlag.LIVE | VcpuFlag.CORE, timeout=3, atomic=True
            ),
            lambda d: d.enable(5, live=True, core=True, timeout=3, atomic=True),
        ),
        (
            lambda d: d.vcpu(1, VcpuFlag.DISABLE | VcpuFlag.NUMA_NODE, count=2),
            lambda d: d.numa_node(1, VcpuFlag.DISABLE, count=2),
        ),
    ],
)
async def test_the_same_call_by_flags_and_by_name_is_the_same_request(
    running, monkeypatch, by_flags, by_name
):
    made = []

    async def record(request):
        made.append(request)

    async with running(FakeQemu()) as domain:
        monkeypatch.setattr(domain, "request", record)
        await by_flags(domain)
        await by_name(domain)
    assert made[0] == made[1]


async def test_an_option_that_does_not_exist_is_a_usage_error(running):
    async with running(FakeQemu()) as domain:
        with pytest.raises(qmpvcpu.VcpuUsageError, match="has no argument 'sooner'"):
            await domain.enable(5, sooner=True)


async def test_operations_on_one_domain_queue(running):
    qemu = FakeQemu()
    async with running(qemu) as domain:
        done = await asyncio.gather(domain.enable(1), domain.disable(1), domain.enable(1))
    assert [outcome.changed for outcome in done] == [True, True, True]
    assert [name for name, _ in qemu.changes] == ["device_add", "device_del", "device_add"]


async def test_a_result_is_what_the_cli_prints(running):
    async with running(FakeQemu()) as domain:
        outcome = await domain.enable([3, 1])
    assert (outcome.outcome, outcome.changed_ids, outcome.mechanism) == (
        "applied",
        (1, 3),
        "hotplug",
    )
    assert [row.enabled for row in outcome.rows] == [True, True]


async def test_every_refusal_is_in_the_error(running):
    async with running(FakeQemu()) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused) as caught:
            await domain.disable([0, 9])
    assert [refusal.code for refusal in caught.value.refusals] == ["range", "boot-cpu"]


async def test_a_plan_says_what_would_be_sent(running):
    qemu = FakeQemu(plugged=(1,))
    async with running(qemu) as domain:
        plan = await domain.plan_enable([1, 2])
        assert [step["arguments"]["id"] for step in plan.steps] == ["vcpu2"]
        assert (plan.unchanged, (await domain.plan_disable(0)).refusals[0].code) == (
            (1,),
            "boot-cpu",
        )
    assert set(qemu.paths) == {0, 1}


async def test_replies_that_never_agree_end_in_an_error_and_not_in_a_loop(running):
    qemu = FakeQemu(plugged=(1,))
    async with running(qemu) as domain:
        qemu.hook = lambda connection, command: (
            command["execute"] == "query-cpus-fast" and connection.reply(command, []) is None
        )
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="do not agree") as caught:
            await domain.vcpus()
    assert caught.value.hint


async def test_a_lost_connection_fails_calls_until_reconnect(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "close"}
    async with running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="vCPU 1: device_del sent"):
            await domain.disable(1)
        assert domain.pending_ids == (1,)
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            await domain.vcpus()
        qemu.paths.pop(1)
        await domain.reconnect()
        assert not (await domain.vcpus())[1].enabled
        assert domain.pending_ids == ()


@pytest.mark.parametrize(
    "call",
    [
        lambda domain: domain.vcpus(),
        lambda domain: domain.enable(2),
        lambda domain: domain.enable(2, guest=True),
        lambda domain: domain.set_vcpus(3),
        lambda domain: domain.guest_vcpus(),
        lambda domain: domain.set_guest_vcpus([1], False),
        lambda domain: domain.pin(1, "0"),
        lambda domain: domain.plan_enable(2),
        lambda domain: domain.dump_xml(),
        lambda domain: domain.migration.begin(),
    ],
    ids=[
        "vcpus",
        "enable",
        "guest",
        "count",
        "guest_vcpus",
        "set_guest_vcpus",
        "pin",
        "plan",
        "xml",
        "begin",
    ],
)
async def test_where_a_reconnect_failed_each_call_says_that_there_is_no_connection(tmp_path, call):
    qemu = FakeQemu(plugged=(1,))
    agent = tmp_path / "agent"
    async with serve(tmp_path, qemu.script) as path:
        domain = qmpvcpu.connect(path, agent=agent, connect_timeout=1)
        await domain.__aenter__()
        qemu.close()
    try:
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            await domain.reconnect()
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="is not connected"):
            await call(domain)
    finally:
        await domain.__aexit__(None, None, None)


async def test_reconnect_to_a_smaller_machine(running):
    qemu = FakeQemu(plugged=(1, 2, 3))
    qemu.on_delete = {3: "silence"}
    async with running(qemu) as domain:
        await domain.disable(3, wait=False)
        qemu.slots, qemu.paths = 2, {0: qemu.paths[0]}
        qemu.close()
        await domain.reconnect()
        assert domain.pending_ids == ()
        assert len(await domain.vcpus()) == 2


async def test_reconnect_settles_what_was_pending(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    async with running(qemu) as domain:
        await domain.disable(1, wait=False)
        qemu.paths.pop(1)
        qemu.close()
        await domain.reconnect()
        assert domain.pending_ids == ()


async def test_a_lost_connection_names_what_is_pending(running):
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    asked = qemu.when_sent("query-cpus-fast", 3)
    async with running(qemu) as domain:
        task = asyncio.create_task(domain.disable(1))
        await asked.wait()
        qemu.close()
        with pytest.raises(qmpvcpu.VcpuConnectionError) as caught:
            await task
        assert caught.value.pending == domain.pending_ids == (1,)


@pytest.mark.parametrize("depth", range(900, 1000, 20))
async def test_nesting_near_the_limit_is_malformed(running, depth):
    qemu = FakeQemu()

    def hook(connection, command):
        if command["execute"] != "query-cpus-fast":
            return False
        deep = b"[" * depth + b"]" * depth
        connection.raw(
            b'{"return": [{"cpu-index": %b}], "id": "%b"}\r\n' % (deep, command["id"].encode())
        )
        return True

    qemu.hook = hook
    with pytest.raises(qmpvcpu.VcpuConnectionError):
        async with running(qemu):
            pass


async def test_a_domain_of_qemu_serves_neither_config_nor_guest(running):
    async with running(FakeQemu()) as domain:
        for flag in (VcpuFlag.CONFIG, VcpuFlag.GUEST):
            with pytest.raises(qmpvcpu.VcpuRefused):
                await domain.vcpu(1, flag)
