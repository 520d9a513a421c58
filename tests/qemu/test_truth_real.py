"""What is asked of a real QEMU is what it can do: unplugs that never end, ids that are taken,
stopped guests.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from contextlib import asynccontextmanager

import pytest

import qmpvcpu
from tests.support.commands import cli, start_cli
from tests.support.ejecting import ejecting
from tests.support.hosts import why_no_kvm
from tests.support.moments import around
from tests.support.processes import send
from tests.support.qemus import matrix, paused, qemu_binary, running
from tests.support.waiting import until, within

pytestmark = pytest.mark.qemu

needs_kvm = pytest.mark.skipif(why_no_kvm() is not None, reason=f"KVM: {why_no_kvm()}")
NO_ACPI = ["-machine", "q35,acpi=off"]


@asynccontextmanager
async def started(version, *arguments):
    """An x86_64 machine that executes its firmware, and never gets further."""
    words = [
        "-nodefaults",
        "-display",
        "none",
        "-no-user-config",
        "-smp",
        "2,maxcpus=4",
        *arguments,
    ]
    async with running(qemu_binary(version, "x86_64"), words) as qemu:
        yield qemu


@pytest.mark.parametrize("machine", ["q35,acpi=off", "pc-i440fx-2.6"])
async def test_an_unplug_that_qemu_rejects_for_good_is_refused(machine):
    async with started("10.0", "-machine", machine) as qemu:
        run = await cli("--json", "setvcpu", qemu.qmp, "1", "--disable")
    assert (run.code, [refusal["code"] for refusal in run.json["error"]["refusals"]]) == (
        3,
        ["legacy-hotplug"],
    )


async def test_the_hint_does_not_say_that_waiting_helps():
    async with started("10.0", *NO_ACPI) as qemu:
        run = await cli("--json", "setvcpu", qemu.qmp, "1", "--disable")
    assert "wait" not in run.json["error"]["hint"]


async def test_doctor_says_that_it_cannot_be_unplugged():
    async with started("10.0", *NO_ACPI) as qemu:
        run = await cli("doctor", qemu.qmp)
    assert "cannot: unplug vCPU 1: QEMU rejects every unplug" in run.stdout


async def test_by_force_qemu_itself_rejects_it():
    async with started("10.0", *NO_ACPI) as qemu:
        run = await cli("--json", "setvcpu", qemu.qmp, "1", "--disable", "--force")
    assert (run.code, "not supported device type" in run.json["error"]["message"]) == (8, True)


async def test_a_newer_qemu_takes_it_and_the_reason_why_it_does_not_end_is_told():
    async with started("11.1", *NO_ACPI) as qemu:
        run = await cli("--json", "setvcpu", qemu.qmp, "1", "--disable", "--timeout", "0")
    assert (run.code, any("acpi=off" in text for text in run.json["messages"])) == (5, True)


async def test_a_guest_that_was_never_started_is_asked_and_not_waited_for():
    async with paused("x86_64", "11.1", "2,maxcpus=4") as qemu:
        run = await cli("--json", "setvcpu", qemu.qmp, "1", "--disable")
    assert (run.code, run.json["pending"], run.json["seconds"] < 20) == (5, [1], True)


async def test_a_core_of_ppc64_that_was_never_configured_goes_at_once():
    async with paused("ppc64", "11.1", "2,maxcpus=4") as qemu:
        await cli("setvcpu", qemu.qmp, "2", "--enable")
        run = await cli("--json", "setvcpu", qemu.qmp, "2", "--disable")
    assert (run.code, run.json["outcome"], run.json["changed_ids"]) == (0, "applied", [2])


async def test_a_guest_that_has_shut_down_is_not_said_to_answer_after_cont():
    async with started("11.1", "-machine", "q35", "-action", "shutdown=pause") as qemu:

        async def has_shut_down():
            # What a kernel writes to power the machine off: SLP_EN, once the firmware has put the
            # register there.
            await qemu.execute("human-monitor-command", {"command-line": "o /h 0x604 0x2000"})
            return (await qemu.execute("query-status"))["status"] == "shutdown"

        await until(has_shut_down, "the guest has shut down", every=0.1)
        run = await cli("--json", "setvcpu", qemu.qmp, "1", "--disable")
    words = "QEMU refuses 'cont' until a reset, which drops the request"
    assert any(words in text for text in run.json["messages"])


async def test_a_count_waits_for_the_pending_unplug_instead_of_a_plug_of_another():
    async with started("11.1", "-machine", "q35") as qemu:
        await cli("setvcpus", qemu.qmp, "1", "--timeout", "0")
        run = await cli("--json", "setvcpus", qemu.qmp, "2", "--timeout", "0.5")
    assert (run.code, run.json["pending"], run.json["changed_ids"]) == (5, [1], [])


async def test_a_count_on_both_sides_leaves_the_definition_where_an_unplug_is_pending(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path))
    async with started("11.1", "-machine", "q35") as qemu:
        await cli("define", "d", "--qmp", qemu.qmp)
        await cli("setvcpus", "d", "1", "--live", "--config", "--timeout", "0")
        run = await cli("--json", "setvcpus", "d", "2", "--live", "--config", "--timeout", "0.5")
        assert (run.code, run.json["changed_ids"]) == (5, [])
        assert (await cli("vcpucount", "d", "--config", "--active")).stdout == "2\n"


async def test_doctor_says_what_a_migration_forbids():
    async with paused("x86_64", "10.0", "2,maxcpus=4") as qemu:
        await qemu.execute("migrate-set-parameters", {"max-bandwidth": 1})
        await qemu.execute("migrate", {"uri": "exec:cat > /dev/null"})
        run = await cli("--json", "doctor", qemu.qmp)
    assert [text for text in run.json["can"] if "plug" in text] == []
    assert any(
        text.startswith("plug vCPU 2-3: ") and "migrat" in text for text in run.json["cannot"]
    ), run.stdout
    (kill,) = run.json["kills"]
    assert "can take 2 more plugs before it aborts" in kill


@matrix(("x86_64", "7.2"), ("x86_64", "10.0"), ("x86_64", "11.1"))
async def test_an_id_that_the_cpu_of_another_slot_has_is_not_in_the_way(arch, version):
    async with paused(arch, version, "1,maxcpus=8") as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        slot = (await domain.state()).by_id[1]
        await qemu.plug(slot.driver, "vcpu2", slot.props)
        await domain.state()
        outcome = await domain.enable(range(1, 8))
        assert (outcome.outcome, outcome.changed_ids) == ("applied", tuple(range(2, 8)))
        assert (await domain.state()).vcpus[2].qom_path == "/machine/peripheral/vcpu2-1"


async def test_an_id_that_is_taken_meanwhile_is_not_in_the_way():
    async with paused("x86_64", "10.0", "1,maxcpus=8") as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        slot = (await domain.state()).by_id[1]
        await qemu.plug(slot.driver, "vcpu2", slot.props)
        assert (await domain.enable(range(1, 8))).changed_ids == tuple(range(2, 8))


async def test_an_id_that_another_device_has_is_not_in_the_way():
    extra = ["-device", "virtio-rng-pci,id=vcpu3"]
    async with (
        paused("x86_64", "10.0", "1,maxcpus=8", extra) as qemu,
        qmpvcpu.connect(qemu.qmp) as domain,
    ):
        assert (await domain.enable([2, 3])).changed_ids == (2, 3)
        assert (await domain.state()).vcpus[3].qom_path == "/machine/peripheral/vcpu3-1"


async def test_list_tells_what_runs_and_not_what_is_defined(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path))
    async with paused("x86_64", "10.0", "3,maxcpus=8") as qemu:
        await cli("define", "web1", "--qmp", qemu.qmp)
        await cli("setvcpu", "web1", "5", "--enable", "--live")
        run = await cli("list")
    assert [line.split()[:5] for line in run.stdout.splitlines()[1:]] == [
        ["web1", "paused", "4", "of", "8"]
    ]


@matrix(("x86_64", "10.0"), ("ppc64", "10.0"), ("s390x", "10.0"))
async def test_what_another_client_plugs_meanwhile_does_not_fail_the_rest(arch, version):
    async with paused(arch, version, "1,maxcpus=8") as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        slot = (await domain.state()).by_id[2]
        await qemu.plug(slot.driver, "mine", slot.props)
        outcome = await domain.enable([2, 3])
        assert (outcome.outcome, outcome.changed_ids) == ("applied", (3,))
        assert (await domain.state()).enabled_ids == (0, 2, 3)


# -- what an interrupted call tells ----------------------------------------------------------------

CTRL_C = """
import sys
from tests.support.hosts import why_no_kvm
from tests.support.moments import interrupt
from qmpvcpu.cli import main

interrupt(sys.argv.pop(1))
sys.exit(main())
"""
XML = """<domain type='kvm'><name>d</name><vcpu current='4'>8</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>
"""


async def interrupted(moment, *words):
    """The command line, with a Ctrl-C at that moment: its exit code, and its JSON."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CTRL_C, moment, "--json", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert b"Traceback" not in stderr, stderr.decode()
    return process.returncode, json.loads(stdout)


async def test_ctrl_c_when_the_unplug_has_ended_tells_what_is_gone():
    async with ejecting("4,maxcpus=8", accel="tcg") as qemu:
        code, told = await interrupted("QEMU is done", "setvcpu", qemu.qmp, "2-3", "--disable")
    assert (code, told["changed"], told["changed_ids"], told["pending"]) == (130, True, [2, 3], [])


async def test_a_core_of_ppc64_that_went_at_once_is_told_too():
    async with paused("ppc64", "10.0", "1,maxcpus=4") as qemu:
        await cli("setvcpu", qemu.qmp, "2", "--enable")
        code, told = await interrupted("QEMU is done", "setvcpus", qemu.qmp, "1")
    assert (code, told["changed_ids"], told["pending"]) == (130, [2], [])


async def test_ctrl_c_while_the_guest_is_stopped_tells_what_is_pending():
    async with ejecting("4,maxcpus=8", accel="tcg", monitors=("qmp", "other")) as qemu:
        await qemu.execute("stop")
        words = ["setvcpu", qemu.qmp, "1-2", "--disable", "--timeout", "60"]
        process = await start_cli("--json", *words)
        async with qmpvcpu.connect(str(qemu.folder / "other")) as domain:

            async def is_asked():
                await domain.state()
                return domain.pending_ids == (1, 2)

            await until(is_asked, "QEMU was asked")
        send(process, signal.SIGINT)
        stdout, _ = await process.communicate()
        told = json.loads(stdout)
    assert (process.returncode, told["changed"], told["pending"]) == (130, False, [1, 2])


@pytest.mark.parametrize("moment", ["QEMU is done", "the definition is written"])
async def test_cancelled_on_both_sides_it_tells_what_became_of_the_definition(tmp_path, moment):
    definition = tmp_path / "d.xml"
    definition.write_text(XML)
    async with (
        ejecting("4,maxcpus=8", accel="tcg") as qemu,
        qmpvcpu.connect(qmp=qemu.qmp, xml=str(definition)) as domain,
    ):
        task = asyncio.create_task(domain.disable(3, live=True, config=True))
        with around(moment, before=task.cancel), pytest.raises(asyncio.CancelledError):
            await task
        is_written = definition.read_text() != XML
        assert domain.interrupted == qmpvcpu.Interrupted(
            changed_ids=(3,), definition_written=is_written
        )


# -- what another client plugs and removes within a second -----------------------------------------


async def decided(domain):
    """All that QEMU has told until now is heard when the first reply is there, and the second
    decides on it.
    """
    for _ in range(2):
        await domain.state()


async def come_and_gone(qemu, first, name):
    """Another client plugs that vCPU and removes it; what is told of it, and of a tablet with the
    id of a CPU.
    """
    async with qmpvcpu.connect(qemu.qmp) as domain, domain.events() as events:
        slot = (await domain.state()).by_id[first]
        await qemu.plug(slot.driver, name, slot.props)
        await qemu.execute("device_del", {"id": name})
        told = [await within(anext(events), "it is told")]
        # Whatever else there is to tell comes before what is done next.
        await qemu.plug("usb-tablet", "vcpu2", {})
        await qemu.remove("vcpu2")
        await decided(domain)
        await domain.enable(1)
        while told[-1].event != "vcpu-added" or told[-1].vcpus != (1,):
            told.append(await within(anext(events), "vCPU 1 is told"))
        # A query may just have seen it there.
        seen = any(event.event == "vcpu-added" and event.vcpus == (first,) for event in told)
        return [event.vcpus for event in told if event.event == "vcpu-removed"], seen


USB = ["-device", "qemu-xhci"]


@pytest.mark.parametrize(("name", "ids"), [("vcpu3", (3,)), ("mine", ())])
@pytest.mark.parametrize(
    ("accel", "version"), [pytest.param("kvm", "10.0", marks=needs_kvm), ("tcg", "11.1")]
)
async def test_what_comes_and_goes_between_two_looks_is_told(accel, version, name, ids):
    async with ejecting("1,maxcpus=8", *USB, accel=accel, version=version) as qemu:
        removed, seen = await come_and_gone(qemu, 3, name)
    assert removed == [(3,) if seen else ids]


@matrix(("ppc64", "10.0"), ("ppc64", "11.1"))
async def test_a_core_that_comes_and_goes_between_two_looks_is_told_once(arch, version):
    async with paused(arch, version, "1,maxcpus=8", USB) as qemu:
        removed, _ = await come_and_gone(qemu, 3, "vcpu3")
    assert removed == [(3,)]


# -- contexts of TCG, which QEMU never gives back --------------------------------------------------


async def plugged_and_unplugged(qemu, times):
    """vCPU 1 comes and goes, each time over a connection of its own; what each call said."""
    said = []
    for _ in range(times):
        async with qmpvcpu.connect(qemu.qmp) as domain:
            said += [(await domain.enable(1)).messages, (await domain.disable(1)).messages]
    return said


@asynccontextmanager
async def tcg(arch, version):
    """A machine of four vCPUs, one of which is plugged, that unplugs at once."""
    if arch == "ppc64":
        async with paused(arch, version, "1,maxcpus=4") as qemu:
            yield qemu
    else:
        async with ejecting("1,maxcpus=4", accel="tcg", version=version) as qemu:
            yield qemu


@matrix(("ppc64", "10.0"), ("ppc64", "11.1"), ("x86_64", "10.0"), ("x86_64", "11.1"))
async def test_a_plug_that_is_sure_to_abort_qemu_is_refused_by_any_process(arch, version):
    async with tcg(arch, version) as qemu:
        await plugged_and_unplugged(qemu, 3)
        run = await cli("--json", "setvcpu", qemu.qmp, "1", "--enable")
        assert (run.code, qemu.has_exited) == (3, False)
        assert "at least 4 of 4 are used up" in run.json["error"]["message"]


async def test_a_device_that_is_no_cpu_uses_up_no_context_whatever_its_id():
    async with (
        paused("ppc64", "10.0", "1,maxcpus=4", USB) as qemu,
        qmpvcpu.connect(qemu.qmp) as domain,
    ):
        for name in ("vcpu2", "vcpu3"):
            await qemu.plug("usb-tablet", name, {})
            await qemu.remove(name)
        await decided(domain)
        assert (await domain.enable([2, 3])).changed_ids == (2, 3)


async def test_a_plug_that_is_sure_to_abort_qemu_can_be_forced():
    async with tcg("ppc64", "10.0") as qemu:
        await plugged_and_unplugged(qemu, 3)
        run = await cli("setvcpu", qemu.qmp, "1", "--enable", "--force")
        await qemu.wait()
        assert (run.code, "tcg_register_thread" in qemu.stderr()) == (7, True)


async def test_that_contexts_run_out_is_said_once_for_each_guest():
    async with tcg("ppc64", "10.0") as qemu:
        said = await plugged_and_unplugged(qemu, 2)
    notes = [[text for text in each if "before it aborts" in text] for each in said]
    assert [len(each) for each in notes] == [1, 0, 0, 0]
    assert "this QEMU can take 2 more plugs before it aborts" in notes[0][0]
