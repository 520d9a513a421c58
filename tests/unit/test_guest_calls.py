"""Whole calls with a scripted agent: what real guests do not do on demand."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from qmpvcpu.domain.guest import Guest
from tests.unit.fake_agent import FakeAgent, serve_agent
from tests.unit.fake_qemu import FakeQemu
from tests.unit.fake_qmp import serve
from tests.unit.test_selection_and_kills import ppc64

GUEST = VcpuFlag.GUEST


class Box:
    """A scripted QEMU and its guest: the CPU of vCPU n is the guest's n, unless a test says otherwise."""

    def __init__(self, plugged=(1,), **options):
        self.qemu = FakeQemu(plugged=plugged, **options)
        self.agent = FakeAgent(dict.fromkeys((0, *plugged), True))
        self.agent.answers["guest-get-vcpus"] = self.list
        #: Whether a plugged CPU appears in the guest, and how.
        self.appears = True
        self.as_online = False

    def list(self, command):
        for slot in self.qemu.paths if self.appears else ():
            self.agent.online.setdefault(slot, self.as_online)
        for gone in set(self.agent.online) - set(self.qemu.paths):
            del self.agent.online[gone]
        text = "".join(f"processor: {n}\napicid: {n}\n\n" for n, on in self.agent.online.items() if on)
        self.agent.files = {"/proc/cpuinfo": text.encode()}
        for n in self.agent.online:
            self.agent.files[f"/sys/devices/system/cpu/cpu{n}/firmware_node/path"] = b"\\_SB_.CPUS.C%03X\n" % n
        return json.dumps(self.agent.answer("guest-get-vcpus", {}) | {"id": command["id"]}).encode() + b"\n"


@pytest.fixture
def started(tmp_path):
    @asynccontextmanager
    async def start(box):
        async with serve(tmp_path, box.qemu.script) as qmp, serve_agent(tmp_path, box.agent) as agent:
            async with qmpvcpu.connect(qmp, agent=agent) as domain:
                yield domain

    return start


def disabled(command):
    text = f"Command {command['execute']} has been disabled: the command is not allowed"
    return json.dumps({"error": {"class": "CommandNotFound", "desc": text}, "id": command["id"]}).encode() + b"\n"


async def test_what_the_guest_leaves_offline_is_taken_online_and_seen(started):
    box = Box()
    async with started(box) as domain:
        outcome = await domain.enable([2, 3])
    assert (outcome.outcome, outcome.mechanism, outcome.messages) == ("applied", "hotplug", ())
    assert [(row.online, row.logical_id) for row in outcome.rows] == [(True, 2), (True, 3)]
    assert box.agent.online == {0: True, 1: True, 2: True, 3: True}


async def test_a_cpu_that_never_comes_to_the_guest_is_not_called_enabled(started):
    box = Box()
    box.appears = False
    async with started(box) as domain:
        outcome = await domain.enable(2, timeout=0.2)
    assert (outcome.outcome, outcome.pending, outcome.changed_ids) == ("pending", (2,), (2,))
    assert any("the guest does not run on it" in message for message in outcome.messages)


async def test_an_agent_that_says_yes_and_does_nothing_is_not_believed(started):
    box = Box()
    box.agent.set = lambda wanted: {"return": len(wanted)}
    async with started(box) as domain:
        outcome = await domain.enable(2, timeout=0.2)
        assert outcome.outcome == "pending"
        with pytest.raises(qmpvcpu.VcpuRejected):
            await domain.vcpu(1, GUEST | VcpuFlag.DISABLE)


async def test_plugged_and_offline_is_not_enabled_already(started):
    box = Box(plugged=(1, 2))
    box.agent.online[2] = False
    async with started(box) as domain:
        plan = await domain.plan_enable([1, 2])
        assert plan.steps == [{"step": "guest-set-vcpus", "vcpus": [2], "online": True}]
        outcome = await domain.enable([1, 2])
    assert (outcome.mechanism, outcome.changed_ids) == ("agent", (2,))
    assert not box.qemu.sent("device_add")


async def test_an_agent_that_may_not_switch_is_refused_with_the_cure(started):
    box = Box()
    box.agent.answers["guest-set-vcpus"] = disabled
    async with started(box) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match="has been disabled") as caught:
            await domain.vcpu(1, GUEST | VcpuFlag.DISABLE)
    assert (caught.value.refusals[0].code, "qemu-ga" in caught.value.hint) == ("agent-disabled", True)


async def test_without_files_ids_are_assumed_only_where_they_cannot_be_others(started):
    box = Box(plugged=(1,))
    box.agent.answers["guest-file-open"] = disabled
    async with started(box) as domain:
        assert (await domain.guest_vcpus()).assumed
        assert (await domain.vcpu(1, GUEST | VcpuFlag.DISABLE)).changed_ids == (1,)
    sparse = Box(plugged=(2,))
    sparse.agent.answers["guest-file-open"] = disabled
    async with started(sparse) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match="is not known"):
            await domain.vcpu(2, GUEST | VcpuFlag.DISABLE)
        # By the guest's own id it can be done.
        assert (await domain.set_guest_vcpus(2, False)).changed_ids == (2,)
        with pytest.raises(qmpvcpu.VcpuRefused, match="has no CPU 7"):
            await domain.set_guest_vcpus([2, 7], True)


@pytest.mark.parametrize("others", [VcpuFlag.CURRENT, VcpuFlag.LIVE])
@pytest.mark.parametrize("switch", [VcpuFlag.ENABLE, VcpuFlag.DISABLE])
@pytest.mark.parametrize("lit", [True, False])
async def test_guest_never_plugs_or_unplugs(started, others, switch, lit):
    box = Box(plugged=(1, 2))
    box.agent.online[2] = lit
    async with started(box) as domain:
        outcome = await domain.vcpu(2, GUEST | others | switch)
        with suppress(qmpvcpu.VcpuRefused):
            await domain.vcpu(3, GUEST | others | switch)
        count = await domain.set_vcpus(2, guest=True, live=bool(others))
    assert outcome.outcome == count.outcome == "applied"
    assert not box.qemu.sent("device_add")
    assert not box.qemu.sent("device_del")


async def test_files_blocked_and_two_plugged_nobody_knows_which_is_which(started):
    box = Box(plugged=(3, 2, 1))
    box.agent.answers["guest-file-open"] = disabled
    async with started(box) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match="is not known"):
            await domain.vcpu(2, GUEST | VcpuFlag.DISABLE)
        with pytest.raises(qmpvcpu.VcpuRefused, match="cannot be counted out"):
            await domain.set_vcpus(2, guest=True)
    assert all(box.agent.online.values())


async def test_what_is_assumed_is_said(started):
    box = Box(plugged=(1,))
    box.agent.answers["guest-file-open"] = disabled
    async with started(box) as domain:
        outcome = await domain.vcpu(1, GUEST | VcpuFlag.DISABLE)
    assert any("is assumed" in message for message in outcome.messages)


async def test_where_nothing_tells_which_it_is_enable_says_so_and_does_not_wait(started):
    box = Box(plugged=(1, 2))
    box.agent.online[1] = False
    box.agent.answers["guest-file-open"] = disabled
    async with started(box) as domain:
        outcome = await domain.enable(3, timeout=20)
    assert (outcome.outcome, outcome.vcpu.online, outcome.seconds < 10) == ("applied", None, True)
    assert any("2 of 4 are online" in message for message in outcome.messages)
    assert box.agent.online == {0: True, 1: False, 2: True, 3: False}


async def test_whichever_is_which_all_are_online_where_as_many_are_as_are_plugged(started):
    box = Box(plugged=(1,))
    box.as_online = True
    box.agent.answers["guest-file-open"] = disabled
    async with started(box) as domain:
        outcome = await domain.enable(3, timeout=20)
        assert (outcome.outcome, outcome.vcpu.online, outcome.messages) == ("applied", True, ())
        assert [row.online for row in await domain.vcpus()] == [True, True, None, True]
        assert (await domain.vcpu(3, GUEST | VcpuFlag.ENABLE)).changed is False
        with pytest.raises(qmpvcpu.VcpuRefused, match="is not known"):
            await domain.vcpu(3, GUEST | VcpuFlag.DISABLE)


@pytest.mark.parametrize("by_itself", [True, False])
async def test_whichever_is_which_those_that_came_are_taken_online(started, by_itself):
    box = Box(plugged=(1, 2), slots=6)
    box.agent.online[1], box.as_online = False, by_itself
    box.agent.answers["guest-file-open"] = disabled
    async with started(box) as domain:
        # From here on it is known that nothing tells its CPUs apart.
        assert (await domain.guest_vcpus()).assumed
        outcome = await domain.enable([3, 5], timeout=20)
    assert (outcome.outcome, outcome.messages, outcome.seconds < 10) == ("applied", (), True)
    assert [row.online for row in outcome.rows] == [True, True]
    # What somebody had taken offline before stays so.
    assert box.agent.online == {0: True, 1: False, 2: True, 3: True, 5: True}


async def test_whichever_is_which_one_that_does_not_come_is_missed(started):
    box = Box(plugged=(1, 2), slots=6)
    box.agent.online[1] = False
    box.agent.answers["guest-file-open"] = disabled
    async with started(box) as domain:
        assert (await domain.guest_vcpus()).assumed
        box.appears = False
        outcome = await domain.enable(3, timeout=0.3)
        assert (outcome.outcome, outcome.pending) == ("pending", (3,))
        box.appears, box.agent.set = True, lambda wanted: {"error": {"class": "GenericError", "desc": "not today"}}
        outcome = await domain.enable(4, timeout=0.3)
    assert (outcome.outcome, outcome.pending) == ("pending", (4,))
    assert any("not today" in message for message in outcome.messages)


async def test_a_guest_whose_agent_may_not_online_is_not_called_enabled(started):
    box = Box()
    box.agent.answers["guest-set-vcpus"] = disabled
    async with started(box) as domain:
        outcome = await domain.enable(2, timeout=0.5)
    assert (outcome.outcome, outcome.pending, outcome.vcpu.online) == ("pending", (2,), False)
    assert any("has been disabled" in message for message in outcome.messages)
    assert outcome.seconds > 0.4


async def test_one_is_onlined_and_one_never_comes(started):
    box = Box(plugged=(1, 2))
    box.agent.online[2] = False
    async with started(box) as domain:
        await domain.vcpus()
        box.appears = False
        outcome = await domain.enable([2, 3], timeout=0.3)
    assert (outcome.outcome, outcome.changed_ids, outcome.pending) == ("pending", (2, 3), (3,))


async def test_one_is_refused_and_one_is_silent(started):
    box = Box(plugged=(1, 2))
    box.qemu.on_delete = {1: "refused", 2: "ignored"}
    async with started(box) as domain:
        outcome = await domain.disable([1, 2], timeout=0.3)
        assert (outcome.outcome, outcome.changed_ids, outcome.pending) == ("pending", (1,), (2,))
        assert domain.pending_ids == (2,)


async def test_atomic_takes_nothing_offline_that_it_put_back(started):
    box = Box(plugged=(1, 2), kvm=True)
    box.qemu.on_delete = {1: "refused"}
    async with started(box) as domain:
        with pytest.raises(qmpvcpu.VcpuError) as caught:
            await domain.disable([1, 2], atomic=True, timeout=2)
    assert (caught.value.outcome, caught.value.undone) == ("rejected", (2,))
    assert sorted(box.qemu.paths) == [0, 1, 2]
    assert box.agent.online[1]


@pytest.mark.parametrize("wait", [True, False])
async def test_what_only_the_agent_can_do_is_done_though_the_rest_is_pending(started, wait):
    box = Box(plugged=(1, 2))
    box.agent.fixed = set()
    box.qemu.on_delete = {2: "ignored"}
    async with started(box) as domain:
        outcome = await domain.disable([0, 2], timeout=0.3, wait=wait)
    assert (outcome.outcome, outcome.pending) == ("pending" if wait else "requested", (2,))
    assert (outcome.changed_ids, box.agent.online[0]) == ((0,), False)


async def test_an_agent_that_fails_after_an_unplug_does_not_hide_it(started):
    box = Box(plugged=(1, 2))
    box.agent.fixed = set()
    box.agent.answers["guest-set-vcpus"] = disabled
    async with started(box) as domain:
        with pytest.raises(qmpvcpu.VcpuPartial, match="vCPU 2 stays changed") as caught:
            await domain.disable([0, 2])
    assert (caught.value.ids, caught.value.changed_ids, caught.value.remaining) == ((0, 2), (2,), (2,))

    box = Box(plugged=(1, 2))
    box.qemu.on_delete = {1: "refused"}
    box.agent.answers["guest-set-vcpus"] = disabled
    async with started(box) as domain:
        with pytest.raises(qmpvcpu.VcpuRejected) as caught:
            await domain.disable([1, 2])
    assert (caught.value.changed_ids, caught.value.ids) == ((2,), (1, 2))

    box = Box(plugged=(1,))
    box.qemu.on_delete = {1: "refused"}
    box.agent.answers["guest-set-vcpus"] = disabled
    async with started(box) as domain:
        with pytest.raises(qmpvcpu.VcpuRejected) as caught:
            await domain.disable(1)
    assert (caught.value.reasons.keys(), caught.value.changed_ids) == ({1}, ())
    assert any("has been disabled" in message for message in caught.value.messages)

    box = Box(plugged=(1, 2))
    box.agent.fixed = set()
    box.agent.answers["guest-set-vcpus"] = lambda command: b"garbage\n"
    async with started(box) as domain:
        with pytest.raises(qmpvcpu.VcpuConnectionError) as caught:
            await domain.disable([0, 2])
    assert (caught.value.ids, caught.value.changed_ids) == ((0, 2), (2,))
    assert any("is not known" in message for message in caught.value.messages)


async def test_without_fallback_what_is_plugged_and_offline_is_left_so(started):
    box = Box(plugged=(1, 2))
    box.agent.online[2] = False
    async with started(box) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match="only the guest agent can change"):
            await domain.enable(2, fallback=False)
        assert (await domain.enable(1, fallback=False)).changed is False
    assert box.agent.online[2] is False


async def test_an_agent_that_answers_again_is_heard_at_once(started):
    box = Box(plugged=(1,))
    answer = box.agent.answers["guest-get-vcpus"]
    lost = iter([True])
    box.agent.answers["guest-get-vcpus"] = lambda command: None if next(lost, False) else answer(command)
    async with started(box) as domain:
        domain._guest._agent._timeout = 0.3
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="was restarted"):
            await domain.vcpu(1, GUEST)
        row = (await domain.vcpu(1, GUEST)).vcpu
    assert (row.online, row.can_offline) == (True, True)


async def test_an_agents_error_is_not_a_command_that_is_not_allowed(started):
    box = Box()
    box.agent.answers["guest-get-vcpus"] = lambda command: (
        json.dumps({"error": {"class": "GenericError", "desc": "open: EMFILE"}, "id": command["id"]}).encode()
        + b"\n"
    )
    async with started(box) as domain:
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="EMFILE"):
            await domain.guest_vcpus()


async def test_two_views_at_once_and_one_cancelled_know_how_far_cores_lie_apart():
    state = ppc64((0, 2))
    physical = [0, 1, 2, 3, 16, 17, 18, 19]

    class Eight:
        address = "x"
        reads_files = True

        async def get_vcpus(self):
            return [{"logical-id": n, "online": True, "can-offline": True} for n in range(8)]

        async def read_files(self, limits):
            return [b"0-7\n", *(b"%d\n" % n for n in physical)]

    class Monitor:
        async def query_chardev(self):
            return []

        async def qom_get(self, path, name):
            await asyncio.sleep(0.01)
            return 8

    guest = Guest(Eight(), Monitor(), lambda events: None)
    task = asyncio.create_task(guest.view(state))
    await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.wait([task])
    for view in await asyncio.gather(guest.view(state), guest.view(state)):
        assert {vcpu: cpu.logical_id for vcpu, cpu in view.by_vcpu.items()} == {
            **{n: n for n in range(4)},
            **{8 + n: 4 + n for n in range(4)},
        }


async def test_enabling_what_cannot_be_plugged_never_falls_back(started):
    box = Box()
    box.qemu.add_errors = {2: "no"}
    async with started(box) as domain:
        with pytest.raises(qmpvcpu.VcpuFailed):
            await domain.enable(2)
    assert not [name for name, _ in box.agent.commands if name == "guest-set-vcpus"]


async def test_the_boot_cpu_that_the_guest_keeps_too_is_refused_with_both_reasons(started):
    box = Box()
    async with started(box) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused) as caught:
            await domain.disable([0, 1])
    assert [refusal.code for refusal in caught.value.refusals] == ["boot-cpu", "guest-fixed"]
    assert not box.qemu.sent("device_del")


async def test_a_guest_that_rejects_takes_it_offline_instead_unless_told_not_to(started):
    box = Box(plugged=(1, 2))
    box.qemu.on_delete = {1: "refused"}
    async with started(box) as domain:
        with pytest.raises(qmpvcpu.VcpuRejected):
            await domain.disable(1, fallback=False)
        outcome = await domain.disable([1, 2])
    assert (outcome.outcome, outcome.mechanism, outcome.changed_ids) == ("applied", "agent", (1, 2))
    assert any("still plugged" in message for message in outcome.messages)
    assert (1 in box.qemu.paths, box.agent.online[1]) == (True, False)


async def test_counts_through_the_agent(started):
    box = Box(plugged=(1, 2, 3))
    async with started(box) as domain:
        assert (await domain.set_vcpus(2, guest=True)).changed_ids == (2, 3)
        assert (await domain.set_vcpus(3, guest=True)).changed_ids == (2,)
        for count in (0, 5):
            with pytest.raises(qmpvcpu.VcpuRefused, match=r"give 1 to 4|has 4"):
                await domain.set_vcpus(count, guest=True)


async def test_an_agent_that_is_not_there_costs_one_deadline_and_is_told(started, monkeypatch):
    monkeypatch.setattr("qmpvcpu.qemu.agent.AGENT_TIMEOUT", 0.2)
    box = Box()
    box.agent.answers["guest-sync-delimited"] = lambda command: None
    async with started(box) as domain:
        domain._guest._agent._timeout = 0.2
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(5):
            assert [row.online for row in await domain.vcpus()] == [None] * 4
        assert loop.time() - began < 1
        assert domain.agent_trouble.reason == "no-agent"
        outcome = await domain.enable(2)
        assert (outcome.outcome, outcome.vcpu.online) == ("applied", None)
        assert any("not known" in message for message in outcome.messages)
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            await domain.vcpu(1, GUEST)


async def test_what_comes_online_and_goes_in_the_guest_is_told_whoever_does_it(started):
    box = Box(plugged=(1, 2))
    async with started(box) as domain, domain.events() as events:
        await domain.vcpus()
        box.agent.online[2] = False
        async with asyncio.timeout(5):
            first = await anext(events)
            await domain.enable(3)
            others = [await anext(events) for _ in range(2)]
    assert (str(first.event), first.vcpus) == ("vcpu-offline", (2,))
    assert [(str(event.event), event.vcpus) for event in others] == [("vcpu-added", (3,)), ("vcpu-online", (3,))]


async def test_without_an_agent_one_line_says_that_nobody_looked(tmp_path):
    qemu = FakeQemu()
    async with serve(tmp_path, qemu.script) as path, qmpvcpu.connect(path) as domain:
        outcome = await domain.enable(2)
        assert (outcome.vcpu.online, len(outcome.messages)) == (None, 1)
        assert "no guest agent is known" in outcome.messages[0]
        assert (await domain.enable(2)).messages == ()


async def test_over_tcp(tmp_path):
    box = Box()
    server = await asyncio.start_server(box.agent.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with serve(tmp_path, box.qemu.script) as qmp:
        async with qmpvcpu.connect(qmp, agent=f"127.0.0.1:{port}") as domain:
            assert (await domain.vcpu(1)).vcpu.online
    server.close()


@pytest.mark.parametrize("other", [VcpuFlag.NUMA_NODE, VcpuFlag.CONFIG, VcpuFlag.CORE])
async def test_guest_excludes_what_the_agent_cannot_tell(started, other):
    box = Box()
    async with started(box) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match="exclude each other"):
            await domain.vcpu(1, GUEST | other | VcpuFlag.DISABLE)
    assert not box.agent.commands


@pytest.mark.parametrize("steps", range(0, 80, 8))
async def test_cancelled_in_the_guest_the_domain_stays_usable(started, steps):
    box = Box()
    async with started(box) as domain:
        task = asyncio.create_task(domain.enable(2))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert (await domain.enable(2)).outcome == "applied"
        assert (await domain.vcpu(2)).vcpu.online is True
