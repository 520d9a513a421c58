"""`setvcpu` on real, paused QEMUs: plugging, refusing, undoing, and losing the connection."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import stat

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from tests.support.commands import cli, start_cli
from tests.support.ejecting import ejecting
from tests.support.processes import send
from tests.support.qemus import VERSIONS, matrix, paused
from tests.support.waiting import until

pytestmark = pytest.mark.qemu

X86_8 = "2,sockets=2,cores=2,threads=2,maxcpus=8"
PPC_8 = "8,sockets=1,cores=4,threads=8,maxcpus=32"

OUTCOME_KEYS = {
    *(
        "outcome",
        "changed",
        "mechanism",
        "vcpus",
        "changed_ids",
        "pending",
        "undone",
        "messages",
        "seconds",
    ),
    *("pending_online", "live_changed_ids", "config_changed_ids", "defined"),
}


@matrix(*((arch, version) for arch in ("x86_64", "ppc64", "s390x") for version in VERSIONS))
async def test_plug_by_id(arch, version):
    async with paused(arch, version, "2,maxcpus=6") as qemu:
        run = await cli("--json", "setvcpu", qemu.qmp, "4,2", "--enable")
        again = await cli("--json", "setvcpu", qemu.qmp, "4", "--enable")
        info = await cli("--json", "vcpuinfo", qemu.qmp)
        query = await cli("--json", "setvcpu", qemu.qmp, "4")
    assert (run.code, set(run.json)) == (0, OUTCOME_KEYS)
    assert run.json | {"seconds": 0, "messages": []} == {
        "outcome": "applied",
        "changed": True,
        "mechanism": "hotplug",
        "vcpus": [2, 4],
        "changed_ids": [2, 4],
        "pending": [],
        "pending_online": [],
        "undone": [],
        "messages": [],
        "seconds": 0,
        "live_changed_ids": [],
        "config_changed_ids": [],
        "defined": False,
    }
    assert (again.code, again.json["outcome"], again.json["changed"]) == (0, "applied", False)
    rows = info.json["vcpus"]
    assert [row["id"] for row in rows if row["state"] == "enabled"] == [0, 1, 2, 4]
    thread = "/thread[0]" if arch == "ppc64" else ""
    assert rows[4]["qom_path"] == f"/machine/peripheral/vcpu4{thread}"
    assert query.json["vcpus"] == [rows[4]]


@matrix(("loongarch64", "10.0"), ("loongarch64", "11.1"))
async def test_plug_on_loongarch64(arch, version):
    async with paused(
        arch, version, "1,sockets=1,cores=4,threads=1,maxcpus=4", ["-m", "1024"]
    ) as qemu:
        async with qmpvcpu.connect(qemu.qmp) as domain:
            outcome = await domain.enable([2, 3])
    assert outcome.changed_ids == (2, 3)


@matrix(("ppc64", "10.0"), ("ppc64", "11.1"))
async def test_a_part_of_a_core_is_refused_and_core_takes_it_whole(arch, version):
    async with paused(arch, version, PPC_8) as qemu:
        part = await cli("--json", "setvcpu", qemu.qmp, "8", "--enable")
        text = await cli("setvcpu", qemu.qmp, "8", "--enable")
        whole = await cli("--json", "setvcpu", qemu.qmp, "8", "--enable", "--core")
        info = await cli("--json", "vcpuinfo", qemu.qmp)
        listed = await cli("--json", "setvcpu", qemu.qmp, "16-23", "--enable")
    assert (part.code, part.json["outcome"]) == (3, "refused")
    assert "8-15" in part.json["error"]["message"]
    assert "8-15" in text.stderr
    assert "--core" in text.stderr
    assert "--core" in part.json["error"]["hint"]
    assert (whole.code, whole.json["changed_ids"]) == (0, list(range(8, 16)))
    assert [r["id"] for r in info.json["vcpus"] if r["state"] == "enabled"] == list(range(16))
    assert listed.code == 0


async def test_core_on_x86_takes_all_threads_of_the_core():
    async with paused("x86_64", "10.0", X86_8) as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        outcome = await domain.enable(5, core=True)
        assert outcome.changed_ids == (4, 5)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("8", "--enable"), 3, "ids are 0 to 7"),
        (("0", "--disable"), 3, "boot CPU"),
        (("3", "--enable", "--disable"), 3, "exclude each other"),
        (("3", "--enable", "--guest"), 3, "guest agent"),
        (("3", "--enable", "--config"), 3, "persistent definition"),
        (("7", "--enable", "--numa-node"), 3, "NUMA"),
        (("x", "--enable"), 2, "not a vCPU id"),
        (("3-1", "--enable"), 2, "backwards"),
        (("3", "--enable", "--timeout", "-1"), 2, "seconds"),
        (("3", "--enabel"), 2, "--enabel"),
    ],
)
async def test_bad_requests_touch_nothing_and_say_why(arguments, code, words, tmp_path):
    log = tmp_path / "qmp.log"
    async with paused("x86_64", "10.0", X86_8) as qemu:
        run = await cli("--json", "--qmp-log", str(log), "setvcpu", qemu.qmp, *arguments)
        human = await cli("setvcpu", qemu.qmp, *arguments)
    assert run.code == human.code == code
    assert words in run.json["error"]["message"]
    assert run.json["error"]["hint"]
    assert words in human.stderr
    assert not human.stdout
    if log.exists():
        assert "device_" not in log.read_text()


async def test_all_refusals_are_reported_together():
    async with paused("ppc64", "10.0", PPC_8) as qemu:
        run = await cli("--json", "setvcpu", qemu.qmp, "8,99", "--enable")
    codes = [refusal["code"] for refusal in run.json["error"]["refusals"]]
    assert codes == ["range", "entity"]


@matrix(*(("s390x", version) for version in VERSIONS))
async def test_s390x_never_unplugs(arch, version):
    async with paused(arch, version, "2,maxcpus=3") as qemu:
        run = await cli("--json", "setvcpu", qemu.qmp, "1", "--disable")
    assert (run.code, run.json["error"]["libvirt"]) == (3, "VIR_ERR_OPERATION_UNSUPPORTED")
    assert "never unplug" in run.json["error"]["message"]


@pytest.mark.parametrize(
    ("version", "accel", "words"),
    [
        ("7.2", "tcg", "crashes"),
        *((version, "tcg,thread=single", "aborts") for version in VERSIONS),
    ],
)
async def test_an_unplug_that_is_known_to_kill_qemu_is_refused(version, accel, words):
    async with paused("x86_64", version, "2,maxcpus=4", accel=accel) as qemu:
        run = await cli("--json", "setvcpu", qemu.qmp, "1", "--disable")
        doctor = await cli("doctor", qemu.qmp)
    assert run.code == 3
    assert words in run.json["error"]["message"]
    assert "--force" in run.json["error"]["hint"]
    assert "KILLS QEMU" in doctor.stdout


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_forced_unplug_on_one_thread_ends_qemu_once_the_guest_ejects_the_cpu(version):
    """A guest that never ejects shows nothing of it."""
    async with ejecting("1,maxcpus=2", accel="tcg,thread=single", version=version) as qemu:
        async with qmpvcpu.connect(qemu.qmp) as domain:
            await domain.enable(1)
            with pytest.raises(qmpvcpu.VcpuConnectionError):
                await domain.disable(1, force=True)
        await qemu.wait()
        assert "qemu_thread_join" in qemu.stderr()


@matrix(*(("ppc64", version) for version in VERSIONS))
async def test_an_unplug_of_a_core_on_one_thread_is_refused_and_forced_hangs_qemu(arch, version):
    async with paused(arch, version, "1,maxcpus=2", accel="tcg,thread=single") as qemu:
        async with qmpvcpu.connect(qemu.qmp, command_timeout=1) as domain:
            await domain.enable(1)
            with pytest.raises(qmpvcpu.VcpuRefused, match="hangs for good"):
                await domain.disable(1)
            with pytest.raises(qmpvcpu.VcpuConnectionError, match="did not answer 'device_del'"):
                await domain.disable(1, force=True)
        assert not qemu.has_exited
        qemu.kill()


async def test_apic_id_255_without_x2apic_is_refused_and_with_it_plugged():
    smp = "1,sockets=300,cores=1,threads=1,maxcpus=300"
    async with paused("x86_64", "10.0", smp, ["-cpu", "qemu64,-x2apic"]) as qemu:
        async with qmpvcpu.connect(qemu.qmp) as domain:
            with pytest.raises(qmpvcpu.VcpuRefused, match="APIC id"):
                await domain.enable(280)
            assert (await domain.enable(100)).changed
    async with (
        paused("x86_64", "10.0", smp, ["-cpu", "max"]) as qemu,
        qmpvcpu.connect(qemu.qmp) as domain,
    ):
        assert (await domain.enable(280)).changed


async def test_a_cpu_that_runs_out_of_tcg_contexts_is_refused_before_qemu_aborts():
    async with paused("ppc64", "10.0", "1,maxcpus=4") as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        for _ in range(3):
            await domain.enable(1)
            assert (await domain.disable(1)).changed
        with pytest.raises(qmpvcpu.VcpuRefused, match="at least 4 of 4 are used up") as refused:
            await domain.enable(1)
        assert refused.value.refusals[0].forceable
        assert not qemu.has_exited
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            await domain.enable(1, force=True)
        await qemu.wait()
        assert "tcg_register_thread" in qemu.stderr()


async def test_dry_run_says_the_steps_and_does_nothing(tmp_path):
    log = tmp_path / "qmp.log"
    async with paused("ppc64", "10.0", PPC_8) as qemu:
        plan = await cli(
            "--json",
            "setvcpu",
            qemu.qmp,
            "8",
            "--enable",
            "--core",
            "--dry-run",
            "--qmp-log",
            str(log),
        )
        text = await cli("setvcpu", qemu.qmp, "8", "--enable", "--core", "--dry-run")
        bad = await cli("--json", "setvcpu", qemu.qmp, "8", "--enable", "--dry-run")
        count = await cli("vcpucount", qemu.qmp, "--live")
    assert (plan.code, plan.json["refusals"]) == (0, [])
    assert [step["step"] for step in plan.json["plan"]] == ["device_add"]
    assert "device_add" in text.stdout
    assert (bad.code, len(bad.json["refusals"])) == (3, 1)
    sent = [json.loads(line) for line in log.read_text().splitlines()]
    asked = {line["message"]["execute"] for line in sent if line["direction"] == "send"}
    assert not {"device_add", "device_del"} & asked
    assert stat.S_IMODE(os.stat(log).st_mode) == 0o600
    assert count.stdout.strip() == "8"


async def test_a_failing_plug_undoes_the_others_where_that_is_possible():
    """ppc64 before the guest runs gives an unconfigured core back at once."""
    async with paused("ppc64", "10.0", PPC_8) as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        await _take_id(qemu, "vcpu24")
        with pytest.raises(qmpvcpu.VcpuFailed, match="Duplicate device ID") as failed:
            await domain.enable(range(8, 32))
        assert failed.value.outcome == "failed"
        assert failed.value.undone == tuple(range(8, 24))
        assert failed.value.changed_ids == ()
        assert (failed.value.qmp_class, failed.value.qmp_text) == (
            "GenericError",
            "Duplicate device ID 'vcpu24-3'",
        )
        assert (await domain.state()).enabled_ids == tuple(range(8))


async def test_a_failing_plug_that_cannot_be_undone_is_partial_and_names_what_stays():
    async with paused("s390x", "10.0", "1,maxcpus=8") as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        await _take_id(qemu, "vcpu5")
        with pytest.raises(qmpvcpu.VcpuPartial) as partial:
            await domain.enable([3, 4, 5])
        assert (partial.value.remaining, partial.value.changed_ids) == ((3, 4), (3, 4))
        assert "never unplugs" in str(partial.value)
        assert (await domain.state()).enabled_ids == (0, 3, 4)


async def _take_id(qemu, device_id):
    """Other devices get the id that qmpvcpu will want, and every one that it tries instead."""
    driver = "virtio-rng-ccw" if "s390x" in qemu.command[0] else "virtio-rng-pci"
    for taken in (device_id, *(f"{device_id}-{suffix}" for suffix in (1, 2, 3))):
        await qemu.execute("device_add", {"driver": driver, "id": taken})


async def test_a_slot_another_client_filled_is_seen_before_anything_is_claimed():
    async with paused("x86_64", "10.0", X86_8) as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        slots = (await domain.state()).by_id
        await qemu.plug(slots[6].driver, "mine", slots[6].props)
        once = await domain.enable(6)
        assert (once.outcome, once.changed, once.vcpu.qom_path) == (
            "applied",
            False,
            "/machine/peripheral/mine",
        )
        # In a batch, too: only what is not there yet is plugged.
        await domain.state()
        await qemu.plug(slots[7].driver, "mine too", slots[7].props)
        both = await domain.enable([5, 7])
        assert (both.outcome, both.changed_ids) == ("applied", (5,))


async def test_numa_node_takes_the_lowest_disabled_vcpus_of_the_node():
    nodes = ["-m", "256", "-numa", "node,nodeid=0,memdev=a", "-numa", "node,nodeid=1,memdev=b"]
    nodes += [
        "-object",
        "memory-backend-ram,id=a,size=128M",
        "-object",
        "memory-backend-ram,id=b,size=128M",
    ]
    nodes += ["-numa", "cpu,node-id=0,socket-id=0", "-numa", "cpu,node-id=1,socket-id=1"]
    async with paused("x86_64", "10.0", X86_8, nodes) as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        one = await domain.vcpu(1, VcpuFlag.ENABLE | VcpuFlag.NUMA_NODE)
        two = await domain.vcpu(1, VcpuFlag.ENABLE | VcpuFlag.NUMA_NODE, count=2)
        listed = await domain.vcpu(1, VcpuFlag.NUMA_NODE)
        with pytest.raises(qmpvcpu.VcpuRefused, match="has 1 disabled vCPUs, 2 requested"):
            await domain.vcpu(1, VcpuFlag.ENABLE | VcpuFlag.NUMA_NODE, count=2)
    assert (one.changed_ids, two.changed_ids, listed.ids) == ((4,), (5, 6), (4, 5, 6, 7))


async def test_a_second_client_is_told_that_the_socket_is_taken():
    async with paused("x86_64", "10.0", X86_8) as qemu, qmpvcpu.connect(qemu.qmp) as _:
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="did not greet") as error:
            async with qmpvcpu.connect(qemu.qmp, connect_timeout=0.3):
                pass
        assert (error.value.reason, "takes one at a time" in error.value.hint) == (
            "no-greeting",
            True,
        )
        # The first address that is free is taken.
        async with paused("x86_64", "10.0", X86_8) as other:
            both = qmpvcpu.connect("web", qmp=[qemu.qmp, other.qmp], connect_timeout=2)
            async with both as domain:
                assert (await domain.state()).maxcpus == 8


async def test_a_killed_qemu_ends_the_call_at_once():
    async with (
        paused("x86_64", "10.0", "1,maxcpus=200") as qemu,
        qmpvcpu.connect(qemu.qmp) as domain,
    ):
        call = asyncio.create_task(domain.enable(range(1, 200), timeout=600))

        async def plugged():
            return call.done() or len(await qemu.execute("query-cpus-fast")) >= 20

        await until(plugged, "many are plugged", every=0)
        os.kill(qemu.pid, signal.SIGKILL)
        with pytest.raises(
            qmpvcpu.VcpuConnectionError, match="when the connection was lost"
        ) as error:
            await call
        assert error.value.reason == "closed"  # not "timeout", after 10 or 600 s
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            await domain.vcpus()


async def test_reconnect_reads_the_state_anew():
    async with paused("x86_64", "10.0", X86_8) as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        await domain.enable(7)
        await domain.reconnect()
        assert (await domain.vcpu(7)).vcpu.enabled


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_interrupted_while_the_guest_is_silent_says_what_is_pending(tmp_path, number, code):
    log = tmp_path / "log"

    def is_asked():
        lines = log.read_text().splitlines() if log.exists() else []
        asked = next((n for n, line in enumerate(lines) if "device_del" in line), len(lines))
        return any('"return": {}' in line for line in lines[asked:])

    async with paused("ppc64", "10.0", "2,maxcpus=4") as qemu:
        await qemu.execute("cont")
        process = await start_cli(
            "--json", "setvcpu", qemu.qmp, "1", "--disable", "--force", "--qmp-log", str(log)
        )
        await until(is_asked, "QEMU took the unplug")
        send(process, number)
        stdout, _ = await process.communicate()
    assert process.returncode == code
    document = json.loads(stdout)
    assert document["pending"] == [1]
    assert "still pending" in document["error"]["message"]


async def test_async_returns_once_qemu_took_the_request():
    async with paused("ppc64", "10.0", "2,maxcpus=4") as qemu:
        await qemu.execute("cont")
        run = await cli("--json", "setvcpu", qemu.qmp, "1", "--disable", "--force", "--async")
        pending = await cli(
            "--json", "setvcpu", qemu.qmp, "1", "--disable", "--force", "--timeout", "0.2"
        )
    assert (run.code, run.json["outcome"], run.json["pending"]) == (0, "requested", [1])
    assert (pending.code, pending.json["outcome"], pending.json["pending"]) == (5, "pending", [1])


async def test_a_qemu_that_dies_as_we_leave_leaves_no_exception_behind(caplog):
    """qemu.qmp's disconnect, cancelled by our close, left one that asyncio logs whenever it is
    collected.
    """
    async with paused("x86_64", "10.0", "1,maxcpus=8") as qemu:
        async with qmpvcpu.connect(qmp=qemu.qmp):
            os.kill(qemu.pid, signal.SIGKILL)
            # The end of the file is there before our loop looks again, so it closes while qemu.qmp
            # disconnects.
            os.waitid(os.P_PID, qemu.pid, os.WEXITED | os.WNOWAIT)
        gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
