"""The whole call on real Linux guests: together, rejected, pending across processes, reset,
retried, atomic, watched.
"""

from __future__ import annotations

import json
import signal
from contextlib import asynccontextmanager

import pytest

import qmpvcpu
from tests.support.commands import cli, start_cli
from tests.support.processes import send
from tests.support.qemus import matrix
from tests.support.waiting import DEADLINE, deadline, until

pytestmark = pytest.mark.guest

#: In the suite, and in `scripts/soak guests`.
GUESTS = [("x86_64", "11.1"), ("ppc64", "10.0")]
MORE = [("x86_64", "10.0"), ("ppc64", "11.1")]


def has_answer(log, command):
    """Whether QEMU has answered that command, by the lines of --qmp-log."""
    messages = [
        json.loads(line)["message"] for line in log.read_text().rpartition("\n")[0].splitlines()
    ]
    asked = [one["id"] for one in messages if one.get("execute") == command]
    return any("return" in one and one.get("id") in asked for one in messages)


EJECT = "/sys/firmware/acpi/hotplug/processor/enabled"


async def plug(box, ids):
    async with qmpvcpu.connect(box.qmp) as domain:
        await domain.enable(ids)
    await box.guest.wait_online(len(box.boot_ids) + len(ids), timeout=DEADLINE)


def csv(ids):
    return ",".join(map(str, ids))


@asynccontextmanager
async def stopped(box):
    await box.guest.qemu.execute("stop")
    try:
        yield
    finally:
        await box.guest.qemu.execute("cont")


@asynccontextmanager
async def watch(box, *words):
    """`watch --json` on the third QMP socket; yields a function that reads lines until one is of
    this event.
    """
    process = await start_cli("watch", "--json", box.third)
    lines = []

    async def read(*events):
        async with deadline(f"one of {events}"):
            while not lines or lines[-1]["event"] not in events:
                lines.append(json.loads(await process.stdout.readline()))
        return lines.pop()

    read.lines = lines
    assert (await read("snapshot"))["vcpus"]
    try:
        yield read
    finally:
        send(process, signal.SIGINT)
        await process.communicate()


@matrix(*GUESTS, more=MORE)
async def test_six_in_one_call_are_all_asked_before_the_first_one_ends(
    arch, version, pool, tmp_path
):
    box = await pool.get(arch, version, plugs=6)
    ids = box.ids(3, 4, 5, 6, 7, 8)
    await plug(box, ids)
    log = tmp_path / "qmp.log"
    run = await cli("--json", "--qmp-log", str(log), "setvcpu", box.qmp, csv(ids), "--disable")
    assert (run.code, run.json["outcome"], run.json["changed_ids"]) == (0, "applied", ids)
    messages = [json.loads(line)["message"] for line in log.read_text().splitlines()]
    kinds = [message.get("execute") or message.get("event") for message in messages]
    asked = [n for n, kind in enumerate(kinds) if kind == "device_del"]
    ended = [n for n, kind in enumerate(kinds) if kind == "DEVICE_DELETED" and n > asked[0]]
    assert len(asked) == 6
    assert asked[-1] < ended[0]
    assert await box.guest.online() == f"0-{len(box.boot_ids) - 1}"


@matrix(*GUESTS, more=MORE)
async def test_a_batch_whose_last_id_another_client_took_is_undone(arch, version, pool):
    box = await pool.get(arch, version, plugs=4)
    # Other devices have the id that is ours to give, and every one that is tried instead.
    taken = [f"vcpu{box.ids(5)[0]}{suffix}" for suffix in ("", "-1", "-2", "-3")]
    for device in taken:
        await box.guest.qemu.execute("device_add", {"driver": "virtserialport", "id": device})
    async with qmpvcpu.connect(box.qmp) as domain:
        with pytest.raises(qmpvcpu.VcpuFailed, match="Duplicate device ID") as failed:
            await domain.enable(box.ids(3, 4, 5), timeout=DEADLINE)
        assert failed.value.outcome == "failed"
        assert failed.value.undone == tuple(box.ids(3, 4))
        assert (await domain.state()).enabled_ids == box.boot_ids
    for device in taken:
        await box.guest.qemu.execute("device_del", {"id": device})


@matrix(GUESTS[0], more=MORE[:1])
async def test_eject_disabled_gives_exit_4_and_a_retry_cures_it(arch, version, pool):
    box = await pool.get(arch, version, plugs=1)
    await plug(box, [9])
    await box.guest.shell(f"echo 0 > {EJECT}")
    try:
        run = await cli("--json", "setvcpu", box.qmp, "9", "--disable", "--no-fallback")
        assert (run.code, run.json["outcome"], run.json["pending"]) == (4, "rejected", [])
        assert "eject disabled" in run.json["error"]["message"]
        async with watch(box) as read:
            again = await start_cli("--json", "setvcpu", box.qmp, "9", "--disable", "--retry", "50")
            await read("vcpu-removal-failed")
    finally:
        await box.guest.shell(f"echo 1 > {EJECT}")
    stdout, _ = await again.communicate()
    assert (again.returncode, json.loads(stdout)["changed_ids"]) == (0, [9])


@matrix(GUESTS[1], more=MORE[1:])
async def test_the_last_online_core_is_refused_and_atomic_takes_the_other_one_back(
    arch, version, pool
):
    box = await pool.get(arch, version, plugs=3)
    ids = box.ids(1, 2)
    await plug(box, ids)
    await box.guest.shell("for n in 0 1; do echo 0 > /sys/devices/system/cpu/cpu$n/online; done")
    try:
        run = await cli(
            "--json", "setvcpu", box.qmp, csv(ids), "--disable", "--atomic", "--no-fallback"
        )
    finally:
        await box.guest.shell(
            "for n in 0 1; do echo 1 > /sys/devices/system/cpu/cpu$n/online; done"
        )
    assert (run.code, run.json["outcome"], run.json["changed_ids"]) == (4, "rejected", [])
    assert run.json["undone"] in (box.ids(1), box.ids(2))
    # Linux 6.1 leaves the threads that it had offlined before it refused as they are.
    await box.guest.wait_online(5, timeout=DEADLINE)
    async with qmpvcpu.connect(box.qmp) as domain:
        assert (await domain.state()).enabled_ids == tuple(box.ids(0, 1, 2))
        assert (await domain.disable(ids)).changed_ids == tuple(ids)


@matrix(*GUESTS, more=MORE)
async def test_pending_for_the_next_process_and_watched_to_its_end(arch, version, pool):
    box = await pool.get(arch, version, plugs=2)
    ids = box.ids(6)
    await plug(box, ids)
    async with watch(box) as read:
        async with stopped(box):
            run = await cli("--json", "setvcpu", box.qmp, csv(ids), "--disable", "--timeout", "0.3")
            assert (run.code, run.json["outcome"], run.json["pending"]) == (5, "pending", ids)
            assert any("stopped" in message for message in run.json["messages"])
            info = await cli("--json", "vcpuinfo", box.qmp)
            assert [row["id"] for row in info.json["vcpus"] if row["pending"]] == ids
            back = await cli("--json", "setvcpu", box.qmp, csv(ids), "--enable", "--timeout", "0.3")
            assert (back.code, back.json["outcome"], back.json["changed"]) == (5, "pending", False)
            assert (await read("unplug-requested"))["vcpus"] == ids[:1]
        removed = await read("vcpu-removed")
        assert removed["vcpus"] == ids[:1]
    info = await cli("--json", "vcpuinfo", box.qmp)
    assert [(r["state"], r["pending"]) for r in info.json["vcpus"] if r["id"] in ids] == [
        ("disabled", False)
    ] * box.core


@matrix(*GUESTS, more=MORE)
async def test_what_ended_while_nobody_listened_the_next_process_finds(arch, version, pool):
    box = await pool.get(arch, version, plugs=1)
    ids = box.ids(7)
    await plug(box, ids)
    async with stopped(box):
        assert (await cli("setvcpu", box.qmp, csv(ids), "--disable", "--timeout", "0")).code == 5
    await box.guest.wait_online(len(box.boot_ids), timeout=DEADLINE)

    async def is_gone():
        return len(await box.guest.qemu.execute("query-cpus-fast")) == len(box.boot_ids)

    await until(is_gone, "QEMU has removed it")
    async with watch(box) as read:
        line = await read("vcpu-removed")
    assert (line["vcpus"], line["detail"]) == (ids[:1], "it was removed while nobody listened")


@matrix(GUESTS[0], more=MORE[:1])
async def test_a_reset_of_the_stopped_guest_drops_the_request_and_that_is_told(
    arch, version, pool, tmp_path
):
    box = await pool.get(arch, version, plugs=1)
    await plug(box, [6])
    async with watch(box) as read:
        await box.guest.qemu.execute("stop")
        log = tmp_path / "qmp"
        words = (
            "--json",
            "--qmp-log",
            str(log),
            "setvcpu",
            box.qmp,
            "6",
            "--disable",
            "--timeout",
            "60",
        )
        waiting = await start_cli(*words)
        await read("unplug-requested")
        await until(lambda: has_answer(log, "device_del"), "QEMU has taken the request")
        await box.guest.qemu.execute("system_reset")
        line = await read("vcpu-removal-failed")
        stdout, _ = await waiting.communicate()
        info = await cli("--json", "vcpuinfo", box.qmp)
    # It has been reset under its shell: the next test boots another.
    await pool.drop((arch, version))
    document = json.loads(stdout)
    assert (waiting.returncode, document["outcome"], document["pending"]) == (4, "rejected", [])
    assert "reset" in document["error"]["message"]
    assert (line["vcpus"], "reset" in line["detail"]) == ([6], True)
    assert [(r["state"], r["pending"]) for r in info.json["vcpus"] if r["id"] == 6] == [
        ("enabled", False)
    ]


@matrix(*GUESTS, more=MORE)
async def test_set_vcpus_up_and_down_beside_a_sparse_set(arch, version, pool):
    box = await pool.get(arch, version, plugs=5)
    before = len(box.boot_ids)
    await plug(box, box.ids(9))
    up = await cli("--json", "setvcpus", box.qmp, str(before + 3 * box.core))
    await box.guest.wait_online(before + 3 * box.core, timeout=DEADLINE)
    first = before // box.core
    assert (up.code, up.json["changed_ids"]) == (0, box.ids(first, first + 1))
    down = await cli("--json", "setvcpus", box.qmp, str(before + box.core))
    assert (down.code, down.json["changed_ids"]) == (0, box.ids(first + 1, 9))
    assert (await cli("--json", "setvcpus", box.qmp, str(before))).json["changed_ids"] == box.ids(
        first
    )


@matrix(*GUESTS, more=MORE)
async def test_events_of_a_real_guest_in_their_order(arch, version, pool):
    box = await pool.get(arch, version, plugs=1)
    ids = box.ids(5)
    async with qmpvcpu.connect(box.qmp) as domain, domain.events(steps=True) as events:
        await domain.enable(ids)
        await box.guest.wait_online(len(box.boot_ids) + box.core, timeout=DEADLINE)
        await domain.disable(ids)
        seen = []
        async with deadline("all are removed"):
            while len([e for e in seen if e.event == "vcpu-removed"]) < box.core:
                seen.append(await anext(events))
    mine = [(str(e.event), e.vcpus[0]) for e in seen if e.vcpus[0] == ids[0]]
    words = [
        "vcpu-added",
        "unplug-requested",
        *(["guest-ejecting"] if arch == "x86_64" else []),
        "vcpu-removed",
    ]
    assert mine == [(word, ids[0]) for word in words]
