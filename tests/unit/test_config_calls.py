"""CONFIG, and LIVE with CONFIG, as whole calls: definitions on a real disk, a scripted QEMU that fails midway."""

from __future__ import annotations

import asyncio
import os
import pickle
from contextlib import asynccontextmanager

import pytest

import qmpvcpu
from qmpvcpu import OutcomeKind, VcpuFlag
from qmpvcpu.host.definitions import Addresses, DefinitionFolder
from tests.unit.fake_qemu import FakeQemu
from tests.unit.fake_qmp import serve
from tests.unit.test_domain_scripted import when_sent

XML = b"""<domain type='kvm'>
  <name>web1</name>
  <!-- kept -->
  <vcpu current='1'>4</vcpu>
  <vcpus>
    <vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>
    <vcpu id='1' enabled='no' hotpluggable='yes'/>
    <vcpu id='2' enabled='no' hotpluggable='yes'/>
    <vcpu id='3' enabled='no' hotpluggable='yes'/>
  </vcpus>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
</domain>
"""


class Home:
    """A state folder with one domain, `web1`, and its scripted QEMU."""

    def __init__(self, tmp_path):
        self.tmp_path = tmp_path
        self.folder = DefinitionFolder(tmp_path / "state")
        self.define(XML)

    def define(self, xml, *qmp):
        self.folder.define("web1", xml, Addresses(qmp))

    @property
    def xml(self):
        return self.folder.file("web1").read()

    @property
    def path(self):
        return self.folder.folder / "web1.xml"

    def leftovers(self):
        return [name for name in os.listdir(self.folder.folder) if name.startswith(".")]

    @asynccontextmanager
    async def running(self, qemu):
        async with serve(self.tmp_path, qemu.script) as path:
            self.define(self.xml, path)
            async with qmpvcpu.connect("web1") as domain:
                yield domain
        assert self.leftovers() == []

    @asynccontextmanager
    async def stopped(self):
        async with qmpvcpu.connect("web1") as domain:
            yield domain
        assert self.leftovers() == []

    def enabled(self):
        from qmpvcpu.xml.domain import read_domain

        return read_domain(self.xml)[1].enabled_ids


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    return Home(tmp_path)


def codes(caught):
    return [refusal.code for refusal in caught.value.refusals]


async def test_live_first_and_the_definition_last(home):
    qemu = FakeQemu()
    seen = []
    qemu.hook = lambda connection, command: seen.append((command["execute"], home.enabled())) and None
    async with home.running(qemu) as domain:
        end = await domain.enable([1, 3], live=True, config=True)
    assert (end.outcome, end.mechanism, end.changed_ids) == (OutcomeKind.APPLIED, "hotplug", (1, 3))
    assert (end.live_changed_ids, end.config_changed_ids, end.defined) == ((1, 3), (1, 3), True)
    assert {enabled for name, enabled in seen} == {(0,)}
    assert home.enabled() == (0, 1, 3)
    assert b"<!-- kept -->" in home.xml
    assert b"current='3'>4<" in home.xml
    assert (home.folder.folder / "web1.xml~").read_bytes() == XML
    assert pickle.loads(pickle.dumps(end)) == end


async def test_nothing_to_do_writes_nothing(home):
    async with home.running(FakeQemu()) as domain:
        before = home.path.stat().st_ino
        end = await domain.disable(1, live=True, config=True)
    assert (end.outcome, end.changed, end.defined, home.path.stat().st_ino) == ("applied", False, False, before)


async def test_each_side_alone_may_be_so_already(home):
    qemu = FakeQemu(plugged=(1,))
    async with home.running(qemu) as domain:
        end = await domain.enable(1, live=True, config=True)
        assert (end.changed_ids, end.live_changed_ids, end.config_changed_ids) == ((1,), (), (1,))
        assert (home.enabled(), qemu.sent("device_add")) == ((0, 1), [])
        qemu.paths.pop(1)
        end = await domain.enable(1, live=True, config=True)
    assert (end.live_changed_ids, end.config_changed_ids, end.defined) == ((1,), (), False)


async def test_what_either_side_has_against_it_is_told_together_and_touches_neither(home):
    qemu = FakeQemu()
    async with home.running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused) as caught:
            await domain.disable([0, 9], live=True, config=True)
        assert codes(caught) == ["range", "boot-cpu", "config-vcpu-0"]
        plan = await domain.plan_disable([0, 9], live=True, config=True)
        assert [refusal.code for refusal in plan.refusals] == codes(caught)
        assert (plan.config.writes, plan.to_json()["diff"]) == (False, [])
    assert (home.xml, qemu.sent("device_del")) == (XML, [])


@pytest.mark.parametrize(
    ("how", "options", "error", "outcome"),
    [
        ("refused", {}, qmpvcpu.VcpuRejected, None),
        ("error", {}, qmpvcpu.VcpuFailed, None),
        ("close", {}, qmpvcpu.VcpuConnectionError, None),
        ("silence", {"timeout": 0.05}, None, "pending"),
        ("silence", {"wait": False}, None, "requested"),
    ],
)
async def test_where_live_is_not_applied_the_definition_stays(home, how, options, error, outcome):
    home.define(XML.replace(b"id='1' enabled='no'", b"id='1' enabled='yes'").replace(b"t='1'>", b"t='2'>"))
    before = home.xml
    qemu = FakeQemu(plugged=(1,))
    qemu.on_delete[1] = how
    async with home.running(qemu) as domain:
        if error is not None:
            with pytest.raises(error) as caught:
                await domain.disable(1, live=True, config=True, **options)
            messages = caught.value.messages
        else:
            end = await domain.disable(1, live=True, config=True, **options)
            assert (end.outcome, end.defined) == (outcome, False)
            messages = end.messages
    assert any("definition" in message for message in messages)
    assert home.xml == before


async def test_a_write_that_fails_after_live_is_partial_and_says_both(home):
    qemu = FakeQemu()
    moved = home.tmp_path / "moved"

    def hook(connection, command):
        if command["execute"] == "device_add":
            home.folder.folder.rename(moved)

    async with home.running(qemu) as domain:
        qemu.hook = hook
        with pytest.raises(qmpvcpu.VcpuPartial) as caught:
            await domain.enable(1, live=True, config=True)
        qemu.hook = lambda connection, command: None
        moved.rename(home.folder.folder)
        for name in home.leftovers():
            (home.folder.folder / name).unlink()
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
            changed = XML.replace(b"id='2' enabled='no'", b"id='2' enabled='yes'").replace(b"t='1'>", b"t='2'>")
            home.path.write_bytes(changed.replace(b"<!-- kept -->", b"<!-- theirs -->"))

    async with home.running(qemu) as domain:
        qemu.hook = hook
        end = await domain.enable(1, live=True, config=True)
    assert (end.outcome, home.enabled()) == ("applied", (0, 1, 2))
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


async def test_current_is_live_if_it_runs_else_config(home):
    async with home.running(FakeQemu()) as domain:
        end = await domain.enable(1)
        assert (end.mechanism, end.defined, home.xml, domain.is_active) == ("hotplug", False, XML, True)
        assert (await domain.vcpu(1)).vcpu.enabled
        assert not (await domain.vcpu(1, VcpuFlag.CONFIG)).vcpu.enabled
        assert (await domain.state(VcpuFlag.CONFIG)).active
    async with home.stopped() as domain:
        assert domain.is_active is False
        end = await domain.enable(2)
        assert (end.mechanism, end.defined, end.changed_ids, home.enabled()) == (None, True, (2,), (0, 2))
        assert (await domain.vcpu(2)).vcpu.state == "enabled"
        assert [vcpu.id for vcpu in await domain.vcpus() if vcpu.enabled] == [0, 2]


async def test_live_on_an_inactive_domain_is_refused_with_what_config_has_against_it(home):
    async with home.stopped() as domain:
        for call in (domain.enable(1, live=True), domain.vcpu(1, VcpuFlag.LIVE), domain.guest_vcpus()):
            with pytest.raises(qmpvcpu.VcpuRefused, match="'web1' is not running") as caught:
                await call
            assert caught.value.libvirt == "VIR_ERR_OPERATION_INVALID"
        with pytest.raises(qmpvcpu.VcpuRefused) as caught:
            await domain.disable([0], live=True, config=True)
        assert codes(caught) == ["inactive", "config-vcpu-0"]
        plan = await domain.plan_disable([0], live=True, config=True)
        assert [refusal.code for refusal in plan.refusals] == ["inactive", "config-vcpu-0"]
        with pytest.raises(qmpvcpu.VcpuRefused, match="not running"):
            async with domain.events():
                pass
    assert home.xml == XML


async def test_without_a_definition_config_is_refused(tmp_path):
    async with serve(tmp_path, FakeQemu().script) as path, qmpvcpu.connect(path) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused) as caught:
            await domain.disable([0, 9], live=True, config=True)
        assert codes(caught) == ["no-definition", "range", "boot-cpu"]
        with pytest.raises(qmpvcpu.VcpuRefused, match="no persistent definition"):
            await domain.set_vcpus(8, maximum=True, config=True)


@pytest.mark.parametrize("xml", [b"<domain", XML.replace(b">4<", b">2<"), b""])
async def test_a_definition_that_does_not_hold_is_told_with_its_place_and_not_overwritten(home, xml):
    home.define(xml)
    async with home.stopped() as domain:
        for call in (domain.enable(1), domain.vcpu(1), domain.set_vcpus(2)):
            with pytest.raises(qmpvcpu.VcpuRefused, match=r"web1.xml': (line|not)"):
                await call
    assert home.xml == xml


async def test_counts_and_the_maximum(home):
    async with home.stopped() as domain:
        assert (await domain.set_vcpus(3)).changed_ids == (1, 2)
        assert home.enabled() == (0, 1, 2)
        end = await domain.set_vcpus(6, maximum=True, config=True)
        assert (end.changed, end.changed_ids, end.defined) == (True, (), True)
        assert b"<vcpu current='3'>6</vcpu>" in home.xml
        assert (await domain.set_vcpus(6, maximum=True, config=True)).changed is False
    async with home.running(FakeQemu()) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused) as caught:
            await domain.set_vcpus(8, maximum=True, config=True, live=True)
        assert "maximum" in codes(caught)
        end = await domain.set_vcpus(2, live=True, config=True)
    assert (end.live_changed_ids, end.config_changed_ids, home.enabled()) == ((1,), (2,), (0, 1))


async def test_a_dry_run_shows_both_sides_and_touches_nothing(home):
    qemu = FakeQemu()
    async with home.running(qemu) as domain:
        plan = await domain.plan_enable(2, live=True, config=True)
    assert [step["step"] for step in plan.steps] == ["device_add", "define"]
    assert plan.steps[1] == {"step": "define", "vcpus": [2], "state": "enabled"}
    assert "+    <vcpu id='2' enabled='yes' hotpluggable='yes'/>" in plan.config.diff
    assert (home.xml, qemu.sent("device_add")) == (XML, [])


async def test_cancelled_on_the_live_side_the_definition_stays(home):
    qemu = FakeQemu(plugged=(1,))
    home.define(XML.replace(b"id='1' enabled='no'", b"id='1' enabled='yes'").replace(b"t='1'>", b"t='2'>"))
    before = home.xml
    qemu.on_delete[1] = "silence"
    asked = when_sent(qemu, "device_del")
    async with home.running(qemu) as domain:
        task = asyncio.create_task(domain.disable(1, live=True, config=True))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert home.xml == before


@pytest.mark.parametrize("steps", range(0, 40, 2))
async def test_cancelled_at_any_await_the_definition_is_one_of_the_two(home, steps):
    async with home.stopped() as domain:
        task = asyncio.create_task(domain.enable(1, config=True))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) if not task.done() else asyncio.timeout(1):
            await task
        assert home.enabled() in ((0,), (0, 1))
        # And nothing is held.
        await domain.enable(2, config=True)
    assert 2 in home.enabled()


async def test_a_socket_that_another_client_holds_does_not_stop_config(home):
    async def deaf(reader, writer):
        await reader.read()

    server = await asyncio.start_unix_server(deaf, home.tmp_path / "held")
    try:
        home.define(XML, str(home.tmp_path / "held"))
        async with qmpvcpu.connect("web1", config_only=True) as domain:
            assert (await domain.enable(1, config=True)).defined
            assert (await domain.state(VcpuFlag.CONFIG)).active
            with pytest.raises(qmpvcpu.VcpuConnectionError, match="did not greet"):
                await domain.enable(1)
        with pytest.raises(qmpvcpu.VcpuConnectionError, match="did not greet"):
            async with qmpvcpu.connect("web1", connect_timeout=0.1):
                pass
    finally:
        server.close()


async def test_an_xml_file_of_its_own_is_changed_in_place(tmp_path):
    path = tmp_path / "d.xml"
    path.write_bytes(XML.replace(b"\n", b"\r\n"))
    async with qmpvcpu.connect(str(path)) as domain:
        assert (domain.is_active, domain.has_definition) == (False, True)
        await domain.enable(3)
    expected = XML.replace(b"id='3' enabled='no'", b"id='3' enabled='yes'").replace(b"t='1'>4", b"t='2'>4")
    assert path.read_bytes() == expected.replace(b" order='1'", b"").replace(b"\n", b"\r\n")
    assert os.listdir(tmp_path) == ["d.xml"]
    async with qmpvcpu.connect(xml=str(path)) as domain:
        assert (await domain.state()).enabled_ids == (0, 3)


RFC = b"<vcpus><vcpu id='0' state='enabled'/><vcpu id='2' state='enabled'/></vcpus>"


async def test_apply_is_one_transaction_and_then_nothing_to_do(home):
    qemu = FakeQemu(plugged=(1,))
    async with home.running(qemu) as domain:
        plan = await domain.plan_apply(RFC, live=True, config=True)
        assert [step["step"] for step in plan.steps] == ["device_add", "device_del", "define"]
        end = await domain.apply(RFC, live=True, config=True)
        assert (end.outcome, end.ids, end.changed_ids, end.config_changed_ids) == (
            "applied",
            (0, 1, 2, 3),
            (1, 2),
            (2,),
        )
        assert (sorted(qemu.paths), home.enabled()) == ([0, 2], (0, 2))
        again = await domain.apply(RFC, live=True, config=True)
        assert (again.outcome, again.changed, again.defined) == ("applied", False, False)
    async with home.stopped() as domain:
        assert (await domain.apply(RFC)).changed is False
        with pytest.raises(qmpvcpu.VcpuRefused, match="not running"):
            await domain.apply(RFC, live=True)


async def test_apply_that_fails_puts_everything_back(home):
    qemu = FakeQemu(plugged=(1,))
    qemu.add_errors[2] = "no memory"
    async with home.running(qemu) as domain:
        with pytest.raises(qmpvcpu.VcpuFailed, match="no memory") as caught:
            await domain.apply(RFC, live=True, config=True)
    assert caught.value.changed_ids == ()
    assert (sorted(qemu.paths), home.xml) == ([0, 1], XML)


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        (b"<vcpus><vcpu id='0' state='enabled'/><vcpu id='9' state='enabled'/></vcpus>", "out of range"),
        (b"<vcpus><vcpu id='1' state='enabled'/></vcpus>", "vCPU 0 is not enabled"),
        (b"<vcpus", "not well-formed"),
        (b"<domain><name>x</name><vcpu>9</vcpu></domain>", "lists 9 vCPUs, and this domain has 4"),
    ],
)
async def test_a_file_that_cannot_be_this_domains(home, xml, words):
    async with home.running(FakeQemu()) as domain:
        with pytest.raises(qmpvcpu.VcpuRefused, match=words):
            await domain.apply(xml, source="f.xml", live=True, config=True)
    assert home.xml == XML


async def test_the_xml_of_a_running_and_of_an_inactive_domain(home):
    tuned = b"""  <cputune>
    <vcpupin vcpu='2' cpuset='1-2'/>
    <vcpusched vcpus='2' scheduler='fifo' priority='10'/>
  </cputune>
  <cpu><numa><cell id='0' cpus='0-1' memory='1'/><cell id='1' cpus='2-3' memory='1'/></numa></cpu>
</domain>
"""
    xml = XML.replace(b"<vcpu current", b"<vcpu cpuset='4-5' current").replace(b"</domain>\n", tuned)
    home.define(xml)
    qemu = FakeQemu(plugged=(2,))
    async with home.running(qemu) as domain:
        live = await domain.dump_xml()
        assert b"current='2'>4<" in live
        assert b"<vcpu id='2' enabled='yes' hotpluggable='yes' order='2'/>" in live
        assert await domain.dump_xml(inactive=True) == xml
        rfc = await domain.dump_xml(dialect="rfc", detail="minimal")
        assert b"<vcpu id='2' state='enabled'/>" in rfc
        cell = await domain.dump_xml(detail="cell")
        assert b"<vcpu id='2' state='enabled' cell='1'/>" in cell
        full = await domain.dump_xml(dialect="rfc")
        assert b"<vcpu id='0' state='enabled' cell='0' pin='4-5'/>" in full
        assert b"<vcpu id='2' state='enabled' cell='1' pin='1-2' scheduler='fifo:10'/>" in full
        # What they are was decided elsewhere: read again, they are ignored.
        assert (await domain.plan_apply(full, live=True)).steps == []
        with pytest.raises(qmpvcpu.VcpuUsageError, match="none of rfc, libvirt"):
            await domain.dump_xml(dialect="xen")
    async with home.stopped() as domain:
        assert await domain.dump_xml() == xml
        assert b"<vcpu id='2' state='disabled'/>" in await domain.dump_xml(dialect="rfc", detail="minimal")
