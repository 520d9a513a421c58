"""CONFIG, and LIVE with CONFIG: when the definition is written, who else may write it, what a
failure leaves.
"""

from __future__ import annotations

import asyncio
import pickle

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from tests.support.fake_qemu import FakeQemu
from tests.support.fake_qmp import serve
from tests.support.home import XML, enabling

CONFIG = VcpuFlag.CONFIG


async def test_live_first_and_the_definition_last(home):
    qemu = FakeQemu()
    seen = []
    qemu.hook = lambda connection, command: seen.append(home.enabled()) and None
    async with home.running(qemu) as domain:
        await domain.enable([1, 3], live=True, config=True)
    assert set(seen) == {(0,)}
    assert home.enabled() == (0, 1, 3)


async def test_the_version_before_is_kept(home):
    async with home.stopped() as domain:
        await domain.enable(1)
    assert (home.folder / "web1.xml~").read_bytes() == XML


async def test_an_outcome_of_both_sides_can_be_pickled(home):
    async with home.running(FakeQemu()) as domain:
        outcome = await domain.enable(1, live=True, config=True)
    assert pickle.loads(pickle.dumps(outcome)) == outcome


async def test_nothing_to_do_leaves_the_file_that_is_there(home):
    async with home.running(FakeQemu()) as domain:
        before = home.path.stat().st_ino
        await domain.disable(1, live=True, config=True)
    assert home.path.stat().st_ino == before


async def test_a_plan_of_both_sides_has_every_refusal_and_writes_nothing(home):
    async with home.running(FakeQemu()) as domain:
        plan = await domain.plan_disable([0, 9], live=True, config=True)
        assert [refusal.code for refusal in plan.refusals] == ["range", "boot-cpu", "config-vcpu-0"]
        assert plan.config.writes is False


async def test_a_write_that_fails_after_live_is_partial_and_says_both(home):
    qemu = FakeQemu()
    moved = home.tmp_path / "moved"

    def hook(connection, command):
        if command["execute"] == "device_add":
            home.folder.rename(moved)

    async with home.running(qemu) as domain:
        qemu.hook = hook
        with pytest.raises(qmpvcpu.VcpuPartial) as caught:
            await domain.enable(1, live=True, config=True)
        qemu.hook = lambda connection, command: None
        moved.rename(home.folder)
        for path in home.leftovers():
            path.unlink()
    error = caught.value
    assert "live, vCPU 1 is changed and stays so" in error.message
    assert "cannot be written: No such file" in error.message
    assert "--config (CONFIG) alone" in error.hint
    assert (error.remaining, error.changed_ids, error.mechanism) == ((1,), (1,), "hotplug")
    assert home.xml == XML


async def test_what_another_process_writes_meanwhile_is_kept(home):
    qemu = FakeQemu()

    def hook(connection, command):
        if command["execute"] == "device_add":
            home.path.write_bytes(enabling(2).replace(b"<!-- kept -->", b"<!-- theirs -->"))

    async with home.running(qemu) as domain:
        qemu.hook = hook
        outcome = await domain.enable(1, live=True, config=True)
    assert (outcome.outcome, home.enabled()) == ("applied", (0, 1, 2))
    assert b"<!-- theirs -->" in home.xml


async def test_what_another_process_has_made_impossible_meanwhile_is_partial(home):
    qemu = FakeQemu()

    def hook(connection, command):
        if command["execute"] == "device_add":
            home.path.write_bytes(b"<domain><name>web1</name><vcpu>1</vcpu></domain>")

    async with home.running(qemu) as domain:
        qemu.hook = hook
        with pytest.raises(qmpvcpu.VcpuPartial, match="vCPU 1 is not in this domain"):
            await domain.enable(1, live=True, config=True)
    assert home.enabled() == (0,)


async def test_a_domain_says_whether_it_runs(home):
    async with home.running(FakeQemu()) as domain:
        assert (domain.is_active, domain.has_definition) == (True, True)
        assert (await domain.state(CONFIG)).active
    async with home.stopped() as domain:
        assert (domain.is_active, domain.has_definition) == (False, True)


async def test_the_vcpus_of_a_domain_that_does_not_run_are_its_definitions(home):
    async with home.stopped() as domain:
        await domain.enable(2)
        assert [vcpu.id for vcpu in await domain.vcpus() if vcpu.enabled] == [0, 2]


async def test_a_domain_that_does_not_run_has_no_events(home):
    async with home.stopped() as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match="not running"):
            async with domain.events():
                pass


@pytest.mark.parametrize("xml", [b"<domain", XML.replace(b">4<", b">2<"), b""])
@pytest.mark.parametrize(
    "call",
    [lambda d: d.enable(1), lambda d: d.vcpu(1), lambda d: d.set_vcpus(2)],
    ids=["enable", "query", "count"],
)
async def test_a_definition_that_does_not_hold_is_told_with_its_place_and_not_overwritten(
    home, xml, call
):
    home.define(xml)
    async with home.stopped() as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match=r"web1.xml': (line|not)"):
            await call(domain)
    assert home.xml == xml


async def test_cancelled_on_the_live_side_the_definition_stays(home):
    home.define(enabling(1))
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete = {1: "silence"}
    asked = qemu.when_sent("device_del")
    async with home.running(qemu) as domain:
        task = asyncio.create_task(domain.disable(1, live=True, config=True))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert home.xml == enabling(1)


@pytest.mark.parametrize("steps", range(0, 40, 2))
async def test_cancelled_at_any_await_the_definition_is_one_of_the_two(home, steps):
    async with home.stopped() as domain:
        task = asyncio.create_task(domain.enable(1, config=True))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert home.enabled() in ((0,), (0, 1))
        # And no lock is left.
        await domain.enable(2, config=True)
    assert 2 in home.enabled()


async def deaf(reader, writer):
    """A server that takes a connection, and says nothing."""
    await reader.read()


async def test_a_socket_that_another_client_holds_does_not_stop_config(home):
    server = await asyncio.start_unix_server(deaf, home.tmp_path / "held")
    home.define(XML, str(home.tmp_path / "held"))
    async with qmpvcpu.connect("web1", config_only=True) as domain:
        assert (await domain.enable(1, config=True)).defined
        assert (await domain.state(CONFIG)).active
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="did not greet"):
            await domain.enable(1)
    server.close()


async def test_a_socket_that_another_client_holds_stops_everything_else(home):
    server = await asyncio.start_unix_server(deaf, home.tmp_path / "held")
    home.define(XML, str(home.tmp_path / "held"))
    with pytest.raises(qmpvcpu.VcpuConnectionError, match="did not greet"):
        async with qmpvcpu.connect("web1", connect_timeout=0.1):
            pass
    server.close()


async def test_an_xml_file_of_its_own_is_changed_in_place_line_ends_and_all(tmp_path):
    path = tmp_path / "d.xml"
    path.write_bytes(XML.replace(b"\n", b"\r\n"))
    async with qmpvcpu.connect(str(path)) as domain:
        await domain.enable(3)
    expected = enabling(3).replace(b" order='1'", b"").replace(b"\n", b"\r\n")
    assert path.read_bytes() == expected
    assert [each.name for each in tmp_path.iterdir()] == ["d.xml"]


async def test_a_definition_is_named_by_its_file_too(tmp_path):
    path = tmp_path / "d.xml"
    path.write_bytes(XML)
    async with qmpvcpu.connect(xml=str(path)) as domain:
        assert (await domain.state()).enabled_ids == (0,)


async def test_without_a_definition_config_is_refused(tmp_path):
    async with serve(tmp_path, FakeQemu().script) as path, qmpvcpu.connect(path) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match="no persistent definition"):
            await domain.set_vcpus(8, maximum=True, config=True)


async def test_what_the_xml_of_a_running_guest_says_besides_states_is_ignored_when_it_is_read(home):
    async with home.running(FakeQemu(plugged=(2,))) as domain:
        full = await domain.dump_xml(dialect="rfc")
        assert (await domain.plan_apply(full, live=True)).steps == []


async def test_the_inactive_xml_is_the_definition_byte_for_byte(home):
    async with home.running(FakeQemu(plugged=(2,))) as domain:
        assert await domain.dump_xml(inactive=True) == XML
    async with home.stopped() as domain:
        assert await domain.dump_xml() == XML


async def test_a_dialect_that_does_not_exist_is_usage(home):
    async with home.stopped() as domain:
        with pytest.raises(qmpvcpu.VcpuUsageError, match="one of rfc, libvirt"):
            await domain.dump_xml(dialect="xen")
