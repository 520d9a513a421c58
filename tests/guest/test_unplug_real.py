"""Unplug on real Linux guests, to its real end: removed, rejected, pending."""

from __future__ import annotations

import json

import pytest

import qmpvcpu
from tests.support.commands import cli
from tests.support.qemus import matrix
from tests.support.waiting import DEADLINE

pytestmark = pytest.mark.guest

#: In the suite, and in `scripts/soak guests`.
GUESTS = [("x86_64", "11.1"), ("ppc64", "10.0")]
MORE = [("x86_64", "10.0"), ("ppc64", "11.1")]


@matrix(*GUESTS, more=MORE)
async def test_what_is_plugged_appears_in_the_guest_and_what_is_unplugged_goes(arch, version, pool):
    box = await pool.get(arch, version, plugs=2)
    before = len(box.boot_ids)
    ids = ",".join(map(str, box.ids(5)))
    run = await cli("--json", "setvcpu", box.qmp, ids, "--enable")
    assert (run.code, run.json["outcome"]) == (0, "applied")
    await box.guest.wait_online(before + box.core, timeout=DEADLINE)
    run = await cli("--json", "setvcpu", box.qmp, ids, "--disable")
    assert (run.code, run.json["outcome"], run.json["changed_ids"]) == (0, "applied", box.ids(5))
    assert await box.guest.online() == f"0-{before - 1}"
    info = await cli("--json", "vcpuinfo", box.qmp)
    assert [row["state"] for row in info.json["vcpus"]][box.ids(5)[0]] == "disabled"


@matrix(*GUESTS, more=MORE)
async def test_unplugs_of_one_call_are_asked_together_and_all_awaited(
    arch, version, pool, tmp_path
):
    box = await pool.get(arch, version, plugs=6)
    ids = box.ids(3, 4, 7)
    log = tmp_path / "qmp.log"
    async with qmpvcpu.connect(box.qmp, qmp_log=qmpvcpu.QmpLog(log)) as domain:
        await domain.enable(ids)
        await box.guest.wait_online(len(box.boot_ids) + len(ids), timeout=DEADLINE)
        outcome = await domain.disable(ids)
    assert (outcome.outcome, outcome.changed_ids, outcome.pending) == ("applied", tuple(ids), ())
    assert await box.guest.online() == f"0-{len(box.boot_ids) - 1}"
    messages = [json.loads(line)["message"] for line in log.read_text().splitlines()]
    kinds = [message.get("execute") or message.get("event") for message in messages]
    asked = [n for n, kind in enumerate(kinds) if kind == "device_del"]
    # An earlier test's unplug may end with a last event only now.
    ended = [n for n, kind in enumerate(kinds) if kind == "DEVICE_DELETED" and n > asked[0]]
    assert len(asked) == 3
    assert asked[-1] < ended[0]


@matrix(GUESTS[0], more=MORE[:1])
async def test_a_cpu_of_the_start_is_removed_by_its_path_and_comes_back_under_our_id(
    arch, version, pool
):
    box = await pool.get(arch, version, plugs=1)
    async with qmpvcpu.connect(box.qmp) as domain:
        gone = await domain.disable(1)
        assert gone.outcome == "applied"
        assert await box.guest.online() == "0"
        back = await domain.enable(1)
        assert back.vcpu.qom_path == "/machine/peripheral/vcpu1"
        await box.guest.wait_online(2, timeout=DEADLINE)


@matrix(GUESTS[0], more=MORE[:1])
async def test_x86_guest_that_forbids_ejection_is_a_rejection_with_its_reason(arch, version, pool):
    box = await pool.get(arch, version, plugs=1)
    switch = "/sys/firmware/acpi/hotplug/processor/enabled"
    async with qmpvcpu.connect(box.qmp) as domain:
        await domain.enable(9)
        await box.guest.wait_online(len(box.boot_ids) + 1, timeout=DEADLINE)
        await box.guest.shell(f"echo 0 > {switch}")
        try:
            with pytest.raises(qmpvcpu.VcpuRejected, match="eject disabled") as rejected:
                await domain.disable(9)
        finally:
            await box.guest.shell(f"echo 1 > {switch}")
        assert rejected.value.reasons.keys() == {9}
        assert rejected.value.pending == ()
        assert (await domain.vcpu(9)).vcpu.enabled
        # The refusal lost the request; asking again works.
        assert (await domain.disable(9)).changed_ids == (9,)


@matrix(GUESTS[1], more=MORE[1:])
async def test_ppc64_guest_keeps_its_last_online_core(arch, version, pool):
    box = await pool.get(arch, version, plugs=2)
    async with qmpvcpu.connect(box.qmp) as domain:
        await domain.enable(box.ids(1))
        await box.guest.wait_online(4, timeout=DEADLINE)
        await box.guest.shell(
            "for n in 0 1; do echo 0 > /sys/devices/system/cpu/cpu$n/online; done"
        )
        try:
            with pytest.raises(qmpvcpu.VcpuRejected) as rejected:
                await domain.disable(2, core=True)
        finally:
            await box.guest.shell(
                "for n in 0 1; do echo 1 > /sys/devices/system/cpu/cpu$n/online; done"
            )
        assert rejected.value.outcome.exit_code == 4
        assert rejected.value.reasons.keys() == {2}
        run = await domain.disable(2, core=True)
        assert run.outcome == "applied"


@matrix(*GUESTS, more=MORE)
async def test_a_stopped_guest_leaves_it_pending_and_cont_ends_it(arch, version, pool):
    box = await pool.get(arch, version, plugs=2)
    async with qmpvcpu.connect(box.qmp) as domain:
        await domain.enable(box.ids(6))
        await box.guest.wait_online(len(box.boot_ids) + box.core, timeout=DEADLINE)
        await box.guest.qemu.execute("stop")
        try:
            waited = await domain.disable(box.ids(6), timeout=0.3)
            assert (waited.outcome, waited.pending) == ("pending", tuple(box.ids(6)))
            assert any("stopped" in message for message in waited.messages)
            assert all(
                row.pending and row.enabled
                for row in (await domain.state()).vcpus
                if row.id in box.ids(6)
            )
        finally:
            await box.guest.qemu.execute("cont")
        # Asked again while pending: the same unplug, awaited to its end.
        ended = await domain.disable(box.ids(6))
        assert ended.outcome == "applied"
        assert domain.pending_ids == ()


@matrix(*GUESTS, more=MORE)
async def test_enabling_a_vcpu_whose_unplug_is_pending_waits_and_plugs_it_again(
    arch, version, pool
):
    box = await pool.get(arch, version, plugs=4)
    ids = box.ids(2)
    async with qmpvcpu.connect(box.qmp) as domain:
        await domain.enable(ids)
        await box.guest.wait_online(len(box.boot_ids) + box.core, timeout=DEADLINE)
        await box.guest.qemu.execute("stop")
        try:
            assert (await domain.disable(ids, timeout=0)).outcome == "pending"
            assert (await domain.enable(ids, timeout=0.2)).outcome == "pending"
        finally:
            await box.guest.qemu.execute("cont")
        back = await domain.enable(ids)
        assert (back.outcome, domain.pending_ids) == ("applied", ())
        await box.guest.wait_online(len(box.boot_ids) + box.core, timeout=DEADLINE)
        await domain.disable(ids)
