"""Nodes, cores, counts, dry runs and a QEMU that dies at any message, on real machines without a
guest.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from tests.support.commands import cli, start_cli
from tests.support.hosts import qemu_of
from tests.support.processes import send
from tests.support.qemus import group, paused
from tests.support.waiting import deadline, until, within

pytestmark = pytest.mark.qemu

ENABLE, DISABLE, CORE, NODE = VcpuFlag.ENABLE, VcpuFlag.DISABLE, VcpuFlag.CORE, VcpuFlag.NUMA_NODE


def x86_nodes():
    """One socket of 4 cores of 2 threads; cores 0 and 1 are on node 0, the others on node 1."""
    cpus = [
        f"cpu,node-id={n // 2},socket-id=0,core-id={n},thread-id={t}"
        for n in range(4)
        for t in range(2)
    ]
    ram = [
        "-object",
        "memory-backend-ram,id=a,size=64M",
        "-object",
        "memory-backend-ram,id=b,size=64M",
    ]
    nodes = [
        "-m",
        "128",
        *ram,
        "-numa",
        "node,nodeid=0,memdev=a",
        "-numa",
        "node,nodeid=1,memdev=b",
    ]
    return [*nodes, *itertools.chain.from_iterable(("-numa", cpu) for cpu in cpus)]


def spanning(version="10.0"):
    return paused("x86_64", version, "1,sockets=1,cores=4,threads=2,maxcpus=8", x86_nodes())


@pytest.mark.parametrize("version", ["7.2", "10.0", "11.1"])
async def test_a_socket_that_spans_two_nodes_is_filled_by_node(version):
    async with spanning(version) as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        assert (await domain.numa_node(1)).ids == (4, 5, 6, 7)
        assert (await domain.numa_node(1, ENABLE)).changed_ids == (4,)
        assert (await domain.numa_node(1, ENABLE, count=2)).changed_ids == (5, 6)
        assert (await domain.vcpu(0, ENABLE | NODE | CORE)).changed_ids == (1,)
        assert (await domain.vcpu(0, ENABLE | NODE | CORE)).changed_ids == (2, 3)
        with pytest.raises(qmpvcpu.VcpuRefused, match="has 0 disabled vCPUs, 1 requested"):
            await domain.numa_node(0, ENABLE)
        with pytest.raises(qmpvcpu.VcpuRefused, match="nodes are 0-1"):
            await domain.numa_node(2, ENABLE)


async def test_a_machine_without_numa_has_no_node_to_name():
    async with paused("x86_64", "10.0", "1,maxcpus=4") as qemu:
        run = await cli("--json", "setvcpu", qemu.qmp, "0", "--enable", "--numa-node")
    assert (run.code, run.json["outcome"]) == (3, "refused")
    assert "no NUMA nodes" in run.json["error"]["message"]


@pytest.mark.xdist_group("ppc64-11.1")
async def test_whole_cores_of_a_node_on_ppc64():
    nodes = ["-m", "512", "-numa", "node,nodeid=0,memdev=a", "-numa", "node,nodeid=1,memdev=b"]
    nodes += [
        "-object",
        "memory-backend-ram,id=a,size=256M",
        "-object",
        "memory-backend-ram,id=b,size=256M",
    ]
    for core in range(8):
        nodes += ["-numa", f"cpu,node-id={core // 4},core-id={core * 8}"]
    smp = "8,sockets=1,cores=8,threads=8,maxcpus=64"
    async with paused("ppc64", "11.1", smp, nodes) as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match="only together") as refused:
            await domain.numa_node(1, ENABLE)
        assert "--core" in refused.value.hint
        assert (await domain.numa_node(1, ENABLE, core=True)).changed_ids == tuple(range(32, 40))
        assert (await domain.numa_node(1, ENABLE, count=8)).changed_ids == tuple(range(40, 48))
        # An unconfigured core goes at once, and so each of these has its real end.
        assert (await domain.numa_node(1, DISABLE | CORE)).changed_ids == tuple(range(40, 48))
        assert (await domain.set_vcpus(32)).changed_ids == tuple(range(8, 24))
        assert (await domain.set_vcpus(16)).changed_ids == (*range(16, 24), *range(32, 40))
        with pytest.raises(qmpvcpu.VcpuRefused, match="cores of 8") as refused:
            await domain.set_vcpus(12)
        assert refused.value.hint == "request 8 or 16"


async def test_dry_run_names_the_vcpu_of_the_node_and_sends_only_queries(tmp_path):
    log = tmp_path / "qmp.log"
    async with spanning() as qemu:
        words = ["--qmp-log", str(log), "setvcpu", qemu.qmp, "1", "--enable", "--numa-node"]
        text = await cli(*words, "--dry-run")
        plan = await cli("--json", *words, "--dry-run", "--count", "3")
        sent = [json.loads(line)["message"] for line in log.read_text().splitlines()]
        commands = {message["execute"] for message in sent if "execute" in message}
        assert commands and all(
            name.startswith(("query-", "qom-get", "qmp_capabilities")) for name in commands
        )
        done = await cli("--json", *words)
        three = await cli("--json", *words, "--count", "3")
    assert (text.code, "plug vCPU 4: device_add" in text.stdout) == (0, True)
    assert [step["vcpus"] for step in plan.json["plan"]] == [[4], [5], [6]]
    assert (plan.json["vcpus"], plan.json["refusals"]) == ([4, 5, 6], [])
    assert (done.json["vcpus"], done.json["changed_ids"]) == ([4], [4])
    assert three.json["changed_ids"] == [5, 6, 7]


@pytest.mark.parametrize("version", ["7.2", "10.0", "11.1"])
async def test_setvcpus_adds_the_lowest_beside_a_sparse_set(version):
    async with paused("x86_64", version, "1,sockets=8,cores=1,threads=1,maxcpus=8") as qemu:
        await cli("setvcpu", qemu.qmp, "2,5", "--enable")
        dry = await cli("--json", "setvcpus", qemu.qmp, "5", "--dry-run")
        run = await cli("--json", "setvcpus", qemu.qmp, "5", "--live")
        same = await cli("setvcpus", qemu.qmp, "5", "--hotpluggable")
        count = await cli("vcpucount", qemu.qmp, "--active", "--live")
        over = await cli("--json", "setvcpus", qemu.qmp, "9")
        most = await cli("--json", "setvcpus", qemu.qmp, "9", "--maximum")
        none = await cli("--json", "setvcpus", qemu.qmp, "0")
    assert [step["arguments"]["id"] for step in dry.json["plan"]] == ["vcpu1", "vcpu3"]
    assert (run.code, run.json["vcpus"], run.json["changed_ids"]) == (0, [1, 3], [1, 3])
    assert (same.code, same.stdout) == (0, "nothing to do: 5 vCPUs are enabled already\n")
    assert count.stdout == "5\n"
    assert [(r.code, r.json["error"]["libvirt"]) for r in (over, most, none)] == [
        (3, "VIR_ERR_INVALID_ARG"),
        (3, "VIR_ERR_INVALID_ARG"),
        (2, "VIR_ERR_INVALID_ARG"),
    ]


class Killer(qmpvcpu.QmpLog):
    """Kills QEMU right after the n-th message in either direction."""

    def __init__(self, path, pid, number):
        super().__init__(path)
        self.pid, self.left = pid, number

    def write(self, direction, message):
        super().write(direction, message)
        self.left -= 1
        if self.left == 0:
            os.kill(self.pid, signal.SIGKILL)


@pytest.mark.xdist_group("ppc64-11.1")
async def test_a_qemu_killed_between_any_two_messages_ends_the_call_at_the_closed_socket(tmp_path):
    loop = asyncio.get_running_loop()
    for number in itertools.count(1):
        async with paused("ppc64", "11.1", "1,maxcpus=4") as qemu:
            log = Killer(tmp_path / "log", qemu.pid, number)
            began = loop.time()
            try:
                async with qmpvcpu.connect(qemu.qmp, qmp_log=log) as domain:
                    await domain.enable([1, 2])
                    await domain.disable([1, 2])
                    await domain.vcpus()
            except qmpvcpu.VcpuConnectionError as error:
                assert error.outcome.exit_code == 7
            if log.left > 0:
                break
            # The last message may be the last word of all; else no deadline (5, 10 or 30 s) was
            # waited for.
            assert loop.time() - began < 4, number
    assert number > 25


@pytest.mark.parametrize("after", ["qmp_capabilities", "query-hotpluggable-cpus", "device_add"])
async def test_the_command_line_exits_7_when_qemu_is_killed(after, tmp_path):
    log = tmp_path / "log"
    log.touch()
    async with paused("x86_64", "10.0", "1,maxcpus=240") as qemu:
        process = await start_cli(
            "--json", "--qmp-log", str(log), "setvcpu", qemu.qmp, "1-239", "--enable"
        )
        await until(lambda: f'"{after}"' in log.read_text(), "it has sent that", every=0.001)
        os.kill(qemu.pid, signal.SIGKILL)
        stdout, _ = await within(process.communicate(), "it ends")
    assert process.returncode == 7
    assert json.loads(stdout)["outcome"] == "connection"


async def test_cancelled_at_any_await_on_a_real_qemu_leaves_all_or_nothing():
    """ppc64 under -S: an undo works there without a guest."""
    async with (
        paused("ppc64", "11.1", "1,maxcpus=240") as qemu,
        qmpvcpu.connect(qemu.qmp) as domain,
    ):
        done = 0
        for step in range(0, 90, 3):
            ids = [1, 2, 3]
            task = asyncio.create_task(domain.enable(ids))
            for _ in range(step):
                await asyncio.sleep(0)
            task.cancel()
            try:
                await task
                done += 1
            except asyncio.CancelledError:
                pass
            enabled = set((await domain.state()).enabled_ids)
            assert enabled in ({0}, {0, *ids}), step
            assert domain.pending_ids == ()
            if len(enabled) > 1:
                await domain.disable(ids, force=True)
            if done > 2:
                break


@group("x86_64", "11.1")
async def test_watch_tells_plugs_by_anyone_and_ends_when_qemu_does(tmp_path):
    async with paused("x86_64", "11.1", "1,maxcpus=4") as qemu:
        process = await start_cli("watch", "--json", qemu.qmp)
        first = json.loads(await process.stdout.readline())
        assert (first["event"], first["vcpus"]) == ("snapshot", [0])
        slots = await qemu.execute("query-hotpluggable-cpus")
        slot = next(s for s in slots if "qom-path" not in s)
        await qemu.plug(slot["type"], "mine", slot["props"])
        line = json.loads(await process.stdout.readline())
        assert (line["event"], len(line["vcpus"]), set(line)) == (
            "vcpu-added",
            1,
            {"time", "event", "vcpus", "detail"},
        )
        os.kill(qemu.pid, signal.SIGKILL)
        rest, errors = await process.communicate()
    assert (process.returncode, json.loads(rest)["outcome"]) == (7, "connection")
    assert b"Traceback" not in errors


async def test_watch_in_words_ends_quietly_when_interrupted():
    async with paused("x86_64", "10.0", "1,maxcpus=4") as qemu:
        for words, first in (
            ([], b"vCPU 0: enabled (1 of 4 vCPUs enabled)"),
            (["--json"], b'"snapshot"'),
        ):
            process = await start_cli("watch", *words, qemu.qmp)
            assert first in await process.stdout.readline()
            send(process, signal.SIGINT)
            rest, _ = await process.communicate()
            assert (process.returncode, rest) == (130, b"")


@pytest.mark.parametrize(
    "strangers", [[], [os.getpid()]], ids=["its own", "and one of another process"]
)
async def test_the_process_of_a_real_guest_is_found_by_its_threads(strangers):
    async with paused("x86_64", "10.0", "3,maxcpus=4") as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        threads = [vcpu.thread_id for vcpu in await domain.vcpus() if vcpu.enabled]
        assert qemu_of([*threads, *strangers]) == (None if strangers else qemu.pid)


async def test_a_reset_is_told_also_where_who_asked_has_crossed_the_unplug_out(
    tmp_path, monkeypatch
):
    """Two processes hear of it at the same time, and the first one to see it removes the record of
    both.
    """
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path))
    async with paused("x86_64", "11.1", "1,maxcpus=4") as qemu:
        async with qmpvcpu.connect(qemu.qmp) as domain, domain.events(steps=True) as events:
            await domain.enable(2)
            outcome = await domain.disable(2, timeout=0, force=True)
            assert outcome.pending == (2,)
            for path in (tmp_path / "pending").rglob("*"):
                if path.is_file():
                    path.unlink()
            await qemu.execute("system_reset")
            async with deadline("it is told"):
                while (event := await anext(events)).event != "vcpu-removal-failed":
                    pass
    assert (event.vcpus, "reset" in event.detail) == ((2,), True)
