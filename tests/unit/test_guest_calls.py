"""Calls with an agent that depend on what this connection has seen before, on time, or on several
at once.
"""

from __future__ import annotations

import asyncio
import json

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from tests.support.commands import cli
from tests.support.fake_agent import serve_agent
from tests.support.fake_guest import FakeGuest
from tests.support.fake_qemu import FakeQemu
from tests.support.fake_qmp import serve
from tests.support.recordings import recording
from tests.support.seams import set_agent_deadline
from tests.support.waiting import deadline, until

GUEST = VcpuFlag.GUEST


def blind_guest(**options):
    """Six slots, vCPUs 1 and 2 plugged, 1 offline; nothing tells its CPUs apart."""
    guest = FakeGuest(FakeQemu(6, plugged=(1, 2)), offline=(1,))
    guest.disabled = {"guest-file-open"}
    for name, value in options.items():
        setattr(guest, name, value)
    return guest


async def test_rows_tell_which_cpu_of_the_guest_each_vcpu_is(with_guest):
    guest = FakeGuest(FakeQemu(plugged=(1,)))
    async with with_guest(guest) as domain:
        outcome = await domain.enable([2, 3])
    assert [(row.online, row.logical_id) for row in outcome.rows] == [(True, 2), (True, 3)]


async def test_a_list_from_before_is_not_reported_where_the_last_one_cannot_be_read(with_guest):
    guest = FakeGuest(FakeQemu(plugged=(1, 2)), offline=(1,))
    lists = 0

    def answer(command):
        nonlocal lists
        names = [name for name, _ in guest.commands]
        lists += "guest-set-vcpus" in names
        # The first after the switch verifies it, and the second tells which vCPUs they are.
        reply = {"return": []} if lists > 2 else guest.answer(command["execute"], {})
        return json.dumps(reply | {"id": command.get("id")}).encode() + b"\n"

    guest.answers["guest-get-vcpus"] = answer
    async with with_guest(guest) as domain:
        outcome = await domain.enable([1, 3], timeout=0.5)
    assert (outcome.changed_ids, lists > 2) == ((1, 3), True)
    assert [row.online for row in outcome.rows] == [None, None]


@pytest.mark.parametrize("by_itself", [True, False])
async def test_whichever_is_which_those_that_came_are_taken_online(with_guest, by_itself):
    guest = blind_guest(as_online=by_itself)
    async with with_guest(guest) as domain:
        # From here on it is known that nothing tells its CPUs apart.
        assert (await domain.guest_vcpus()).assumed
        outcome = await domain.enable([3, 5], timeout=60)
    assert (outcome.outcome, outcome.messages, outcome.seconds < 30) == ("applied", (), True)
    assert [row.online for row in outcome.rows] == [True, True]
    # What somebody had taken offline before stays so.
    assert guest.online == {0: True, 1: False, 2: True, 3: True, 5: True}


async def test_whichever_is_which_one_that_does_not_come_is_missed(with_guest):
    guest = blind_guest()
    async with with_guest(guest) as domain:
        await domain.guest_vcpus()
        guest.appears = False
        outcome = await domain.enable(3, timeout=0.3)
    assert (outcome.outcome, outcome.pending_online) == ("pending", (3,))


async def test_whichever_is_which_one_that_does_not_come_online_is_missed(with_guest):
    guest = blind_guest()
    async with with_guest(guest) as domain:
        await domain.guest_vcpus()
        guest.errors = {"guest-set-vcpus": "not today"}
        outcome = await domain.enable(4, timeout=0.3)
    assert (outcome.outcome, outcome.pending_online) == ("pending", (4,))
    assert any("not today" in message for message in outcome.messages)


async def test_a_guest_whose_agent_may_not_online_is_waited_for_up_to_the_deadline(with_guest):
    guest = FakeGuest(FakeQemu(plugged=(1,)))
    guest.disabled = {"guest-set-vcpus"}
    async with with_guest(guest) as domain:
        outcome = await domain.enable(2, timeout=0.5)
    assert (outcome.outcome, outcome.vcpu.online) == ("pending", False)
    assert outcome.seconds > 0.4


async def test_an_agent_that_answers_again_is_heard_at_once(with_guest):
    guest = FakeGuest(FakeQemu(plugged=(1,)))
    guest.silent = {"guest-get-vcpus"}
    async with with_guest(guest) as domain:
        set_agent_deadline(domain, 1)
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            await domain.vcpu(1, GUEST)
        guest.silent = set()
        row = (await domain.vcpu(1, GUEST)).vcpu
    assert (row.online, row.can_offline) == (True, True)


async def test_an_agent_that_loses_one_answer_was_restarted(with_guest):
    guest = FakeGuest(FakeQemu(plugged=(1,)))
    answer = guest.line
    lost = iter([True])

    async def line(data, writer):
        if b"guest-get-vcpus" in data and next(lost, False):
            return
        await answer(data, writer)

    guest.line = line
    async with with_guest(guest) as domain:
        set_agent_deadline(domain, 1)
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="was restarted"):
            await domain.vcpu(1, GUEST)
        assert (await domain.vcpu(1, GUEST)).vcpu.online


async def test_two_views_at_once_and_one_cancelled_know_how_far_cores_lie_apart(with_guest):
    machine = recording("ppc64-10.0/pseries-nodes")
    machine.replies["qom-get /machine vsmt"] = {"return": 8}
    guest = FakeGuest(FakeQemu(machine=machine, plugged=(8,)))
    asked = guest.qemu.when_sent("qom-get", 3)  # type and smp while it connects, then vsmt
    async with with_guest(guest) as domain:
        task = asyncio.create_task(domain.guest_vcpus())
        await asked.wait()
        task.cancel()
        await asyncio.wait([task])
        for view in await asyncio.gather(domain.guest_vcpus(), domain.guest_vcpus()):
            assert {vcpu: cpu.logical_id for vcpu, cpu in view.by_vcpu.items()} == {
                n: n for n in (0, 1, 2, 3, 8, 9, 10, 11)
            }


async def test_an_agent_that_is_not_there_costs_one_deadline_and_is_told(with_guest):
    guest = FakeGuest(FakeQemu(plugged=(1,)))
    guest.silent = {"guest-sync-delimited"}
    async with with_guest(guest) as domain:
        set_agent_deadline(domain, 0.2)
        for _ in range(5):
            assert [row.online for row in await domain.vcpus()] == [None] * 4
        # Whoever has not answered once is not asked again and again.
        assert len([name for name, _ in guest.commands if name == "guest-sync-delimited"]) < 5
        assert domain.agent_trouble.reason == "no-agent"


async def test_without_the_agents_answer_a_plug_is_applied_and_says_that_nobody_looked(with_guest):
    guest = FakeGuest(FakeQemu(plugged=(1,)))
    guest.silent = {"guest-sync-delimited"}
    async with with_guest(guest) as domain:
        set_agent_deadline(domain, 0.2)
        outcome = await domain.enable(2)
        assert (outcome.outcome, outcome.vcpu.online) == ("applied", None)
        assert any("not known" in message for message in outcome.messages)
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            await domain.vcpu(1, GUEST)


async def test_what_goes_offline_in_the_guest_is_told_whoever_does_it(with_guest):
    guest = FakeGuest(FakeQemu(plugged=(1, 2)))
    async with with_guest(guest) as domain, domain.events() as events:
        await domain.vcpus()
        guest.online[2] = False
        async with deadline("an event"):
            event = await anext(events)
    assert (str(event.event), event.vcpus) == ("vcpu-offline", (2,))


async def test_what_is_plugged_and_comes_online_is_told_as_both(with_guest):
    guest = FakeGuest(FakeQemu(plugged=(1, 2)))
    async with with_guest(guest) as domain, domain.events() as events:
        await domain.vcpus()
        await domain.enable(3)
        async with deadline("two events"):
            told = [await anext(events) for _ in range(2)]
    assert [(str(event.event), event.vcpus) for event in told] == [
        ("vcpu-added", (3,)),
        ("vcpu-online", (3,)),
    ]


async def test_without_an_agent_one_line_says_once_that_nobody_looked(running):
    async with running(FakeQemu()) as domain:
        outcome = await domain.enable(2)
        assert (outcome.vcpu.online, len(outcome.messages)) == (None, 1)
        assert "no guest agent is known" in outcome.messages[0]
        assert (await domain.enable(2)).messages == ()


async def test_an_agent_over_tcp(tmp_path):
    guest = FakeGuest(FakeQemu(plugged=(1,)))
    server = await asyncio.start_server(guest.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with serve(tmp_path, guest.qemu.script) as qmp:
        async with qmpvcpu.connect(qmp, agent=f"127.0.0.1:{port}") as domain:
            assert (await domain.vcpu(1)).vcpu.online
    server.close()


async def test_a_call_whose_flags_contradict_asks_the_agent_nothing(with_guest):
    guest = FakeGuest(FakeQemu(plugged=(1,)))
    async with with_guest(guest) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match="exclude each other"):
            await domain.vcpu(1, GUEST | VcpuFlag.CORE | VcpuFlag.DISABLE)
    assert not guest.commands


async def test_a_pending_unplug_is_kept_where_the_guest_refuses_another(with_guest):
    guest = FakeGuest(FakeQemu(plugged=(1, 2)))
    guest.qemu.on_delete = {1: "refused", 2: "silence"}
    async with with_guest(guest) as domain:
        await domain.disable([1, 2], timeout=0)
        await until(lambda: domain.pending_ids == (2,), "the guest's refusal is heard")
        guest.qemu.let_go(2)
        await until(lambda: domain.pending_ids == (), "nothing is pending")


@pytest.mark.parametrize("count", [0, 5])
async def test_a_count_that_the_guest_cannot_have_is_refused(with_guest, count):
    async with with_guest(FakeGuest(FakeQemu(plugged=(1, 2, 3)))) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match=r"give 1 to 4|4 are plugged"):
            await domain.set_vcpus(count, guest=True)


async def silent_after_the_plug(with_guest, **impact):
    """The agent answers until QEMU has taken the device_add; never again."""
    guest = FakeGuest(FakeQemu(plugged=(1,)))

    def hush(connection, command):
        if command["execute"] == "device_add":
            guest.silent = {"guest-sync-delimited", "guest-get-vcpus"}

    guest.qemu.hook = hush
    async with with_guest(guest) as domain:
        set_agent_deadline(domain, 1)
        return await domain.enable(2, **impact)


async def test_an_agent_that_falls_silent_after_a_plug_is_not_applied(with_guest):
    outcome = await silent_after_the_plug(with_guest)
    assert (outcome.outcome, outcome.pending_online, outcome.pending) == ("pending", (2,), ())


async def test_a_vcpu_whose_guest_is_silent_is_changed(with_guest):
    assert (await silent_after_the_plug(with_guest)).changed_ids == (2,)


async def test_an_agent_that_never_answered_is_not_waited_for(with_guest):
    guest = FakeGuest(FakeQemu(plugged=(1,)))
    guest.silent = {"guest-sync-delimited", "guest-get-vcpus"}
    async with with_guest(guest) as domain:
        set_agent_deadline(domain, 1)
        outcome = await domain.enable(2)
    assert (outcome.outcome, outcome.pending_online) == ("applied", ())


async def test_an_agent_that_is_slow_each_time_is_given_up_after_one_deadline(with_guest):
    """Each of its answers comes within the agent's own deadline of 5 s: together they were half a
    minute.
    """
    guest = FakeGuest(FakeQemu(plugged=(1,)))
    guest.pause = 4.5
    async with with_guest(guest) as domain:
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="too slow"):
            async with asyncio.timeout(15):
                await domain.set_guest_vcpus([1], False)
    assert "guest-set-vcpus" not in [name for name, _ in guest.commands]


async def test_a_switch_that_was_verified_is_applied_though_the_agent_then_goes(tmp_path):
    async def switch(fails_at):
        """What was said, and how often `guest-get-vcpus` was asked, which from that time on is not
        answered.
        """
        guest = FakeGuest(FakeQemu(plugged=(1,)))
        looks, look = [], guest.look

        def counted():
            looks.append(True)
            if len(looks) >= fails_at:
                guest.silent.add("guest-get-vcpus")
            look()

        guest.look = counted
        async with serve(tmp_path, guest.qemu.script) as qmp, serve_agent(tmp_path, guest) as agent:
            words = ("guestvcpus", qmp, "--agent", agent, "--cpulist", "1", "--disable", "--json")
            return await cli(*words), len(looks)

    done, often = await switch(99)
    assert (done.code, done.json["changed_ids"], len(done.json["cpus"])) == (0, [1], 2)
    done, _ = await switch(often - 1)
    assert (done.code, done.json["changed_ids"], done.json["cpus"]) == (0, [1], [])
    assert "what the guest's CPUs are now is not known" in done.stderr
