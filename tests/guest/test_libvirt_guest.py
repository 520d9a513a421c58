"""Real Linux guests under a real libvirtd: its agent, and the end of unplugs that libvirt does not
see.
"""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

import qmpvcpu
from tests.support.commands import cli
from tests.support.guests import booted, image_of
from tests.support.libvirtds import daemon_of_our_own, managed
from tests.support.qemus import qemu_binary
from tests.support.waiting import until

pytestmark = [pytest.mark.guest, pytest.mark.xdist_group("libvirt")]

#: <os>, <features> and <cpu> of a guest, its memory, image, and how many vCPUs.
KINDS = {
    "x86_64": (
        "machine='q35'",
        "<features><acpi/></features><cpu mode='maximum'><topology sockets='2' cores='16'"
        " threads='1'/></cpu>",
        256,
        "x86_64",
        "<vcpu current='2'>32</vcpu>",
    ),
    "ppc64": (
        "machine='pseries'",
        "<features><cfpc value='broken'/><sbbc value='broken'/><ibs value='broken'/></features>"
        "<cpu><topology sockets='1' cores='20' threads='2'/></cpu>",
        1024,
        "ppc64le",
        "<vcpu current='2'>40</vcpu>",
    ),
}


@pytest.fixture(scope="module")
async def daemon():
    async with daemon_of_our_own() as running:
        yield running


@asynccontextmanager
async def linux(daemon, arch, folder, words=""):
    machine, more, memory, image, vcpus = KINDS[arch]
    found = image_of(image)
    console = folder / "console"
    xml = f"""<domain type='qemu'><name>linux1</name><memory unit='MiB'>{memory}</memory>{vcpus}
<os><type arch='{arch}' {machine}>hvm</type><kernel>{found.folder}/vmlinuz</kernel>
<initrd>{found.folder}/initrd.cpio.gz</initrd><cmdline>{found.facts["append"]} {words}</cmdline></os>{more}
<devices><emulator>{qemu_binary("10.0", arch)}</emulator><serial type='file'><source path='{console}'/></serial>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices></domain>"""
    async with managed(daemon, xml) as side:
        await booted(console, found.facts["ready"])
        yield side


async def on(daemon, *words):
    return await cli("-c", daemon.uri, *words, "--json")


async def test_x86_64_where_libvirt_does_not_see_the_end(daemon, tmp_path):
    async with linux(daemon, "x86_64", tmp_path) as side:
        async with qmpvcpu.connect("linux1", uri=daemon.uri) as domain:

            async def seen():
                return (await domain.guest_vcpus()).cpus

            cpus = await until(seen, "the agent answers", every=0.1)
            assert [cpu.logical_id for cpu in cpus] == [0, 1]
        run = await on(daemon, "setvcpu", "linux1", "7", "--enable")
        assert run.code == 0, run.stdout
        cpus = (await on(daemon, "guestvcpus", "linux1")).json["cpus"]
        assert [cpu["online"] for cpu in cpus] == [True, True, True]
        run = await on(daemon, "guestvcpus", "linux1", "--cpulist", "2", "--disable")
        assert run.code == 0 and [cpu["online"] for cpu in run.json["cpus"]] == [
            True,
            True,
            False,
        ], run.stdout
        # An enable of what is plugged and offline brings it online.
        run = await on(daemon, "guestvcpus", "linux1", "--cpulist", "2", "--enable")
        assert run.code == 0, run.stdout
        run = await on(daemon, "setvcpu", "linux1", "7", "--disable")
        assert run.code == 0 and run.json["changed_ids"] == [7], run.stdout
        assert "vCPU 7 was unplugged, and libvirt's XML still has it" in run.json["messages"][-1]
        # libvirt takes it for plugged, and a new process is not misled.
        assert b"<vcpu id='7' enabled='yes'" in await side.live_xml()
        rows = (await on(daemon, "vcpuinfo", "linux1")).json["vcpus"]
        assert rows[7]["state"] == "disabled" and rows[0]["online"] is True
        run = await on(daemon, "setvcpu", "linux1", "7", "--enable")
        assert run.code == 3 and "libvirt did not notice" in run.json["error"]["message"]
        run = await on(daemon, "--via", "monitor", "setvcpu", "linux1", "7", "--enable")
        assert run.code == 0, run.stdout
        # Through the monitor the agent reads files, and each of the guest's CPUs is known.
        run = await on(daemon, "--via", "monitor", "setvcpu", "linux1", "9-10", "--enable")
        assert run.code == 0, run.stdout
        rows = (await on(daemon, "--via", "monitor", "vcpuinfo", "linux1")).json["vcpus"]
        assert [row["id"] for row in rows if row["online"]] == [0, 1, 7, 9, 10]


async def test_x86_64_by_the_api_several_at_once_come_online_in_a_guest_that_leaves_them_offline(
    daemon, tmp_path
):
    async with linux(daemon, "x86_64", tmp_path, "qmpvcpu.selfonline=0"):
        run = await on(daemon, "setvcpu", "linux1", "7,9-10", "--enable")
        assert run.code == 0 and run.json["outcome"] == "applied", run.stdout
        assert not [text for text in run.json["messages"] if "not known" in text]
        cpus = (await on(daemon, "guestvcpus", "linux1")).json["cpus"]
        assert [(cpu["logical_id"], cpu["online"]) for cpu in cpus] == [(n, True) for n in range(5)]
        rows = (await on(daemon, "vcpuinfo", "linux1")).json["vcpus"]
        assert [row["id"] for row in rows if row["online"]] == [0, 1, 7, 9, 10]
        # Which is which nobody knows, so one of them cannot be taken offline by its id; so many of
        # them can.
        run = await on(daemon, "setvcpu", "linux1", "9", "--guest", "--disable")
        assert run.code == 3 and "is not known" in run.json["error"]["message"], run.stdout
        run = await on(daemon, "setvcpus", "linux1", "3", "--guest", "--dry-run")
        assert run.code == 0, run.stdout
        run = await on(daemon, "setvcpus", "linux1", "3", "--guest")
        assert run.code == 0 and run.json["changed_ids"] == [3, 4], run.stdout
        # What somebody has taken offline stays so when more come.
        run = await on(daemon, "setvcpu", "linux1", "12", "--enable")
        assert run.code == 0, run.stdout
        rows = (await on(daemon, "vcpuinfo", "linux1")).json["vcpus"]
        assert {row["online"] for row in rows if row["state"] == "enabled"} == {None}
        run = await on(daemon, "setvcpus", "linux1", "6", "--guest")
        assert run.code == 0 and run.json["changed_ids"] == [3, 4], run.stdout
        assert (await on(daemon, "setvcpus", "linux1", "9", "--guest")).code == 3


async def test_ppc64_cores_come_and_go(daemon, tmp_path):
    async with linux(daemon, "ppc64", tmp_path) as side:
        run = await on(daemon, "setvcpu", "linux1", "6-7,20-21", "--enable", "--live", "--config")
        assert run.code == 0, run.stdout
        run = await on(daemon, "setvcpu", "linux1", "6-7,20-21", "--disable", "--live", "--config")
        assert run.code == 0 and run.json["changed_ids"] == [6, 7, 20, 21], run.stdout
        for xml in await side.sides():
            assert b"current='2'" in xml
        # The guest's last online CPUs are in the core that is to go: it says no, and libvirt fails
        # without a word.
        assert (await on(daemon, "setvcpu", "linux1", "6-7", "--enable")).code == 0
        run = await on(daemon, "guestvcpus", "linux1", "--cpulist", "0-1", "--disable")
        assert run.code == 0, run.stdout
        run = await on(daemon, "setvcpu", "linux1", "6-7", "--disable", "--no-fallback")
        assert run.code == 4, run.stdout
        assert (await on(daemon, "vcpucount", "linux1", "--active", "--live")).json["count"] == 4
