"""Definitions and real QEMU processes, by the command line: define, both sides at once, dumpxml,
apply.
"""

from __future__ import annotations

import asyncio
import json
import os
from xml.etree import ElementTree

import pytest

from tests.support.commands import cli, start_cli
from tests.support.qemus import paused
from tests.support.xml import errors_in_libvirts_schema

pytestmark = pytest.mark.qemu

NODES = (
    *("-m", "256", "-uuid", "c7a5fdbd-edaf-9455-926a-d65c16db1809"),
    *(
        "-object",
        "memory-backend-ram,id=m0,size=128M",
        "-object",
        "memory-backend-ram,id=m1,size=128M",
    ),
    *("-numa", "node,nodeid=0,cpus=0-3,memdev=m0", "-numa", "node,nodeid=1,cpus=4-7,memdev=m1"),
)
SMP = "2,sockets=2,cores=2,threads=2,maxcpus=8"


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    return tmp_path / "state" / "definitions"


def listed(xml, key):
    """What `<vcpus>` says: ids whose attribute says yes."""
    root = ElementTree.fromstring(xml)
    on = {
        int(row.attrib["id"]) for row in root.find("vcpus") if row.attrib[key] in ("yes", "enabled")
    }
    assert int(root.find("vcpu").attrib.get("current", root.find("vcpu").text)) == len(on)
    return on


async def test_both_sides_of_a_sparse_set_agree_with_a_fresh_query(state):
    async with paused("x86_64", "10.0", SMP, NODES) as qemu:
        run = await cli("define", "web1", "--qmp", qemu.qmp, "--json")
        assert (run.code, run.json["domain"], run.json["replaced"]) == (0, "web1", False)
        run = await cli("setvcpu", "web1", "5", "--enable", "--live", "--config", "--json")
        assert (run.code, run.json["changed_ids"], run.json["config_changed_ids"]) == (0, [5], [5])
        cpus = await qemu.execute("query-cpus-fast")
        assert len(cpus) == 3
        for words in ((), ("--inactive",)):
            for dialect, key in (("libvirt", "enabled"), ("rfc", "state")):
                run = await cli("dumpxml", "web1", *words, "--dialect", dialect)
                assert listed(run.stdout, key) == {0, 1, 5}
        rows = (await cli("vcpuinfo", "web1", "--config", "--json")).json
        assert [row["id"] for row in rows["vcpus"] if row["state"] == "enabled"] == [0, 1, 5]
        assert (rows["active"], rows["vcpus"][5]["node"]) == (True, 1)
        run = await cli("vcpucount", "web1", "--json")
        assert (run.json["maximum"], run.json["current"]) == (
            {"live": 8, "config": 8},
            {"live": 3, "config": 3},
        )
        run = await cli("list", "--json")
        assert [(row["name"], row["state"], row["current"]) for row in run.json["domains"]] == [
            ("web1", "paused", 3)
        ]
    run = await cli("list")
    assert "web1  shut off  3 of 8" in run.stdout
    run = await cli("setvcpu", "web1", "6", "--enable", "--live")
    assert (run.code, "'web1' is not running" in run.stderr) == (3, True)
    run = await cli("setvcpu", "web1", "6", "--enable")
    assert (run.code, run.stdout) == (0, "vCPU 6: enabled in the definition\n")
    run = await cli("vcpucount", "web1")
    assert run.stdout == "maximum  config  8\ncurrent  config  4\n"
    assert [
        (await cli("vcpucount", "web1", *words)).stdout
        for words in ((), ("--active",), ("--maximum",))
    ][1:] == [
        "4\n",
        "8\n",
    ]


async def test_the_minimal_definition_is_truthful(state):
    async with paused("x86_64", "10.0", SMP, NODES) as qemu:
        assert (
            await cli("define", "web1", "--qmp", qemu.qmp, "--agent", "/run/web1.agent")
        ).code == 0
        binary = os.path.realpath(f"/proc/{qemu.pid}/exe")
    root = ElementTree.fromstring((state / "web1.xml").read_bytes())
    assert (root.attrib["type"], root.findtext("name")) == ("qemu", "web1")
    assert root.findtext("uuid") == "c7a5fdbd-edaf-9455-926a-d65c16db1809"
    assert (root.findtext("memory"), root.findtext("vcpu")) == (str(256 * 1024), "8")
    assert root.find("os/type").attrib == {"arch": "x86_64", "machine": "pc-q35-10.0"}
    assert root.find("cpu/topology").attrib == {"sockets": "2", "cores": "2", "threads": "2"}
    cells = [(cell.attrib["cpus"], cell.attrib["memory"]) for cell in root.find("cpu/numa")]
    assert cells == [("0-3", str(128 * 1024)), ("4-7", str(128 * 1024))]
    emulator = root.findtext("devices/emulator")
    assert "qemu" in os.path.basename(emulator)
    assert os.path.exists(emulator)
    assert emulator == binary or "qemu" not in os.path.basename(binary)
    assert root.find("devices/channel/source").attrib["path"] == "/run/web1.agent"


async def test_a_bare_socket_has_an_xml_too(state):
    async with paused("x86_64", "10.0", SMP, (*NODES, "-name", "given")) as qemu:
        named = await cli("dumpxml", qemu.qmp, "--dialect", "libvirt")
        run = await cli("dumpxml", qemu.qmp, "--inactive")
    assert ElementTree.fromstring(named.stdout).findtext("name") == "given"
    assert (named.code, named.stderr, listed(named.stdout, "enabled")) == (0, "", {0, 1})
    assert (run.code, "no persistent definition" in run.stderr) == (3, True)
    async with paused("x86_64", "10.0", SMP, NODES) as qemu:
        unnamed = await cli("dumpxml", qemu.qmp)
    assert ElementTree.fromstring(unnamed.stdout).findtext("name") == "qmp"


@pytest.mark.parametrize(
    ("arch", "smp", "ids"),
    [("ppc64", "8,cores=4,threads=8,maxcpus=32", "16-23"), ("s390x", "1,maxcpus=4", "2")],
)
async def test_other_machines(state, arch, smp, ids):
    async with paused(arch, "10.0", smp) as qemu:
        assert (await cli("define", "d", "--qmp", qemu.qmp)).code == 0
        run = await cli("setvcpu", "d", ids, "--enable", "--live", "--config", "--json")
        assert run.json["outcome"] == "applied"
        live = await cli("dumpxml", "d", "--dialect", "libvirt")
        config = await cli("dumpxml", "d", "--inactive")
    assert listed(live.stdout, "enabled") == listed(config.stdout, "enabled")
    # libvirt's own schema has nothing against it.
    assert errors_in_libvirts_schema(live.stdout.encode()) == []
    assert "note: libvirt's schema" not in live.stderr
    # pseries has a node of its own making, which nobody has asked for.
    assert "<numa>" not in config.stdout
    if arch == "ppc64":
        run = await cli("setvcpu", "d", "16", "--disable", "--config")
        assert (run.code, "vCPUs 16-23" in run.stderr) == (3, True)


async def test_apply_makes_both_what_a_file_says(state, tmp_path):
    file = tmp_path / "wanted.xml"
    file.write_text(
        "<vcpus><vcpu id='0' state='enabled'/><vcpu id='1' state='enabled'/><vcpu id='6'"
        " state='enabled'/></vcpus>"
    )
    async with paused("x86_64", "10.0", SMP, NODES) as qemu:
        await cli("define", "web1", "--qmp", qemu.qmp)
        plan = await cli("apply", "web1", str(file), "--live", "--config", "--dry-run")
        assert plan.code == 0
        assert "plug vCPU 6: device_add qemu64-x86_64-cpu,id=vcpu6" in plan.stdout
        assert "+    <vcpu id='6' enabled='yes' hotpluggable='yes'/>" in plan.stdout
        assert len(await qemu.execute("query-cpus-fast")) == 2
        run = await cli("apply", "web1", str(file), "--live", "--config", "--json")
        assert (run.code, run.json["changed_ids"], run.json["defined"]) == (0, [6], True)
        again = await cli("apply", "web1", str(file), "--live", "--config", "--json")
        assert (again.code, again.json["changed"]) == (0, False)
        run = await cli("apply", "web1", str(tmp_path / "none.xml"))
        assert (run.code, "there is no file" in run.stderr) == (3, True)


async def test_define_by_a_file_and_under_another_name(state, tmp_path):
    file = tmp_path / "d.xml"
    file.write_text("<domain><name>one</name><vcpu>4</vcpu></domain>")
    assert (await cli("define", str(file))).stdout.startswith("one: defined (")
    assert (state / "one.xml").read_bytes() == file.read_bytes()
    run = await cli("define", "two", "--xml", str(file), "--qmp", "q.sock", "--json")
    assert (run.code, run.json["qmp"]) == (0, [os.path.abspath("q.sock")])
    assert b"<name>two</name>" in (state / "two.xml").read_bytes()
    assert "is 'one': the domain is defined as" in run.stderr
    assert (await cli("define", str(file), "--json")).json["replaced"] is True
    assert (await cli("undefine", "one")).code == 0
    run = await cli("undefine", "one", "--json")
    assert (run.code, run.json["error"]["libvirt"]) == (3, "VIR_ERR_NO_DOMAIN")
    for words, code in (
        (("define", "nowhere"), 3),
        (("define", "three", "--agent", "/a"), 2),
        (("define", "a/b", "--xml", str(file)), 2),
        (("define", "..", "--xml", str(file)), 3),
        (("define", "x", "--qmp", "fd:3"), 2),
        (("define", "x", "--qmp", str(tmp_path / "none")), 7),
    ):
        run = await cli(*words)
        assert (run.code, bool(run.stderr)) == (code, True), words
    assert (await cli("setvcpus", "two", "2")).code == 0
    assert (await cli("setvcpus", "two", "8", "--maximum")).code == 3
    assert (await cli("setvcpus", "two", "8", "--maximum", "--config")).code == 0
    assert b"<vcpu current='2'>8</vcpu>" in (state / "two.xml").read_bytes()


async def test_many_processes_at_once_lose_nothing(state, tmp_path):
    """Each enables one vCPU in the definition; eight at a time."""
    file = tmp_path / "d.xml"
    file.write_text("<domain><name>d</name><vcpu current='1'>33</vcpu></domain>")
    assert (await cli("define", str(file))).code == 0
    gate = asyncio.Semaphore(8)

    async def enable(number):
        async with gate:
            process = await start_cli("setvcpu", "d", str(number), "--enable", "--config", "--json")
            stdout, _ = await process.communicate()
            return json.loads(stdout)["outcome"]

    ends = await asyncio.gather(*(enable(number) for number in range(1, 33)))
    assert set(ends) == {"applied"}
    run = await cli("dumpxml", "d")
    assert listed(run.stdout, "enabled") == set(range(33))
