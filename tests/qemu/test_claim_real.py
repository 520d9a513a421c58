"""Defined from a running QEMU, and started again: it is the same machine."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from tests.support import memory, saving, soaking
from tests.support.claims import started_again
from tests.support.commands import cli
from tests.support.monitor import Connection, QmpError, connected
from tests.support.qemus import Qemu, paused, qemu_binary, running
from tests.support.started import folder_of
from tests.support.waiting import until
from tests.support.xml import read

pytestmark = pytest.mark.qemu

PSERIES = "pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken"


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "s"))


def ram(name: str, size: str) -> list[str]:
    return ["-object", f"memory-backend-ram,id={name},size={size}"]


def node(number: int, rest: str) -> list[str]:
    return ["-numa", f"node,nodeid={number}{rest}"]


TWO = [*ram("m0", "64M"), *ram("m1", "64M")]
TWO_NODES = [*node(0, ",memdev=m0,cpus=0-1"), *node(1, ",memdev=m1,cpus=2-3")]
CPUS = "1,sockets=2,cores=2,threads=1,maxcpus=4"

#: Architecture, version, -smp, the rest.
MACHINES: dict[str, tuple[str, str, str, list[str]]] = {
    "model": ("x86_64", "10.0", "1,maxcpus=4", ["-machine", "pc", "-cpu", "Haswell-noTSX"]),
    "feature": (
        "x86_64",
        "11.1",
        "1,maxcpus=4",
        ["-machine", "q35", "-cpu", "qemu64,+x2apic,-svm,phys-bits=38"],
    ),
    "max": ("x86_64", "7.2", "2,maxcpus=4", ["-machine", "q35", "-cpu", "max"]),
    "ids": ("x86_64", "10.0", CPUS, ["-machine", "q35", "-m", "128", *TWO, *TWO_NODES]),
    "swapped": (
        *("x86_64", "11.1", CPUS),
        ["-m", "128", *TWO, *node(0, ",memdev=m1,cpus=0-1"), *node(1, ",memdev=m0,cpus=2-3")],
    ),
    "no-cpus": (
        *("x86_64", "10.0", "2,maxcpus=4"),
        ["-m", "128", *TWO, *node(0, ",memdev=m0,cpus=0-3"), *node(1, ",memdev=m1")],
    ),
    "no-memory": (
        *("x86_64", "10.0", "2,maxcpus=4"),
        ["-m", "64", *ram("a", "64M"), *node(0, ",memdev=a,cpus=0-1"), *node(1, ",cpus=2-3")],
    ),
    "odd-sizes": (
        *("x86_64", "7.2", "2,maxcpus=4"),
        [
            *("-m", "129536k", *ram("x", "66048k"), *ram("y", "63488k")),
            *(*node(0, ",memdev=x,cpus=0-1"), *node(1, ",memdev=y,cpus=2-3")),
        ],
    ),
    "one-block": (
        *("x86_64", "7.2", "2,maxcpus=4"),
        [
            "-machine",
            "pc-i440fx-5.0",
            "-m",
            "128",
            *node(0, ",mem=66048k,cpus=0-1"),
            *node(1, ",mem=65024k,cpus=2-3"),
        ],
    ),
    "whole-id": (
        *("x86_64", "10.0", "1,maxcpus=2"),
        ["-machine", "q35,memory-backend=mine", "-m", "96", *ram("mine", "96M")],
    ),
    "dimm": (
        *("x86_64", "10.0", "2,maxcpus=4"),
        [
            *("-m", "64,slots=4,maxmem=1G", *ram("a", "64M"), *node(0, ",memdev=a,cpus=0-3")),
            *(*ram("d", "128M"), "-device", "pc-dimm,id=stick,memdev=d,slot=2"),
            *(*ram("nameless", "128M"), "-device", "pc-dimm,memdev=nameless"),
        ],
    ),
    "slots-alone": (
        "x86_64",
        "11.1",
        "2,maxcpus=4",
        ["-machine", "q35", "-m", "128,slots=2,maxmem=1G"],
    ),
    "dies": (
        "x86_64",
        "10.0",
        "3,sockets=2,dies=2,cores=2,threads=1,maxcpus=8",
        ["-machine", "q35"],
    ),
    "modules": (
        "x86_64",
        "10.0",
        "2,sockets=2,modules=2,cores=2,threads=1,maxcpus=8",
        ["-machine", "q35"],
    ),
    "distances": (
        *("x86_64", "10.0", CPUS),
        [
            "-m",
            "128",
            *TWO,
            *TWO_NODES,
            "-numa",
            "dist,src=0,dst=1,val=31",
            "-numa",
            "dist,src=1,dst=0,val=22",
        ],
    ),
    "flags": ("x86_64", "10.0", "2,maxcpus=4", ["-machine", "q35,hpet=off,vmport=off,smm=off"]),
    "plain-ppc64": ("ppc64", "11.1", "8,cores=2,threads=8,maxcpus=16", ["-machine", PSERIES]),
    "model-ppc64": (
        "ppc64",
        "10.0",
        "4,cores=2,threads=4,maxcpus=8",
        ["-machine", PSERIES, "-cpu", "power9"],
    ),
    "old-ppc64": (
        "ppc64",
        "7.2",
        "1,cores=2,threads=1,maxcpus=2",
        ["-machine", PSERIES, "-cpu", "power8"],
    ),
    "nodes-ppc64": (
        *("ppc64", "10.0", "2,cores=4,threads=2,maxcpus=8"),
        [
            *("-machine", PSERIES, "-m", "512", *ram("p1", "256M"), *ram("p0", "256M")),
            *(*node(0, ",memdev=p0,cpus=0-3"), *node(1, ",memdev=p1,cpus=4-7")),
        ],
    ),
    "no-memory-ppc64": (
        *("ppc64", "11.1", "2,cores=4,threads=1,maxcpus=4"),
        [
            "-machine",
            PSERIES,
            "-m",
            "256",
            *ram("p", "256M"),
            *node(0, ",memdev=p,cpus=0-1"),
            *node(1, ",cpus=2-3"),
        ],
    ),
    "drawers": (
        *("s390x", "10.0", "2,drawers=2,books=2,sockets=2,cores=2,maxcpus=16"),
        ["-machine", "s390-ccw-virtio", "-m", "130"],
    ),
    "model-s390x": ("s390x", "7.2", "1,maxcpus=4", ["-machine", "s390-ccw-virtio", "-cpu", "max"]),
    "whole-s390x": (
        *("s390x", "11.1", "1,maxcpus=4"),
        ["-machine", "s390-ccw-virtio,memory-backend=z", "-m", "128", *ram("z", "128M")],
    ),
    "plain-loongarch": (
        "loongarch64",
        "10.0",
        "2,sockets=2,cores=2,threads=1,maxcpus=4",
        ["-machine", "virt"],
    ),
    "nodes-loongarch": (
        *("loongarch64", "11.1", "2,sockets=2,cores=2,threads=1,maxcpus=4"),
        [
            *("-machine", "virt", "-m", "1G", *ram("l1", "512M"), *ram("l0", "512M")),
            *(*node(0, ",memdev=l0,cpus=0-1"), *node(1, ",memdev=l1,cpus=2-3")),
        ],
    ),
}


#: With the devices that a machine has by default, or with those that its user has added.
USUAL: dict[str, tuple[str, str, list[str]]] = {
    "defaults-pc": ("x86_64", "10.0", ["-machine", "pc", "-serial", "null"]),
    "defaults-q35": ("x86_64", "7.2", ["-machine", "q35", "-vga", "std"]),
    "defaults-ppc64": ("ppc64", "11.1", ["-machine", PSERIES]),
    "defaults-s390x": ("s390x", "10.0", ["-machine", "s390-ccw-virtio"]),
    "defaults-loongarch": ("loongarch64", "11.1", ["-machine", "virt"]),
    "added": (
        *("x86_64", "11.1"),
        [
            *("-nodefaults", "-machine", "q35", "-drive", "file=DISK,format=raw,if=virtio,id=d0"),
            *(
                "-netdev",
                "user,id=n0",
                "-device",
                "virtio-net-pci,netdev=n0,mac=52:54:00:01:02:03,addr=0x5",
            ),
            *(
                "-object",
                "rng-random,id=r0,filename=/dev/urandom",
                "-device",
                "virtio-rng-pci,rng=r0",
            ),
            *("-chardev", "null,id=c0", "-serial", "chardev:c0", "-vga", "std", "-rtc", "base=utc"),
        ],
    ),
    "bind": (
        *("x86_64", "10.0"),
        [
            *("-nodefaults", "-machine", "q35,memory-backend=m", "-m", "64"),
            "-object",
            '{"qom-type":"memory-backend-ram","id":"m","size":67108864,"host-nodes":[0],"policy":"bind"}',
        ],
    ),
    "nvdimm": (
        *("x86_64", "11.1"),
        [
            *("-nodefaults", "-machine", "q35,nvdimm=on", "-m", "64,slots=2,maxmem=1G"),
            *("-object", "memory-backend-file,id=nv,size=1M,mem-path=DISK,readonly=on,rom=off"),
            *("-device", "nvdimm,memdev=nv,unarmed=on"),
        ],
    ),
    "virtio-mem": (
        *("x86_64", "10.0"),
        [
            *("-nodefaults", "-machine", "q35", "-m", "64,maxmem=2G"),
            *("-object", "memory-backend-ram,id=vm,size=128M"),
            *("-device", "virtio-mem-pci,id=vm0,memdev=vm,requested-size=64M"),
        ],
    ),
    "hand-made": (
        *("x86_64", "7.2"),
        [
            *("-machine", "pc", "-hda", "DISK", "-usb", "-device", "usb-tablet", "-vga", "cirrus"),
            *("-net", "nic,model=e1000", "-net", "user", "-monitor", "null", "-serial", "mon:null"),
            *("-fsdev", "local,id=f,path=.,security_model=none"),
            *("-device", "virtio-9p-pci,fsdev=f,mount_tag=t"),
        ],
    ),
    "agent": (
        *("x86_64", "10.0"),
        [
            *("-nodefaults", "-machine", "pc", "-device", "virtio-serial-pci,id=ports"),
            *("-chardev", "null,id=ga0"),
            *("-device", "virtserialport,bus=ports.0,chardev=ga0,name=org.qemu.guest_agent.0,nr=3"),
        ],
    ),
    "blockdev": (
        *("x86_64", "10.0"),
        [
            *("-nodefaults", "-machine", "q35"),
            *(
                "-blockdev",
                '{"driver":"raw","node-name":"n1","file":{"driver":"file","filename":"DISK"}}',
            ),
            *(
                "-device",
                '{"driver":"virtio-blk-pci","drive":"n1","id":"disk1"}',
                "-device",
                "pcie-root-port,id=rp",
            ),
        ],
    ),
    "pflash": (
        *("x86_64", "10.0"),
        [
            *("-nodefaults", "-machine", "q35,pflash0=code,pflash1=vars"),
            *("-blockdev", "driver=file,filename=DISK,node-name=below,read-only=on"),
            *("-blockdev", "driver=raw,file=below,node-name=code,read-only=on"),
            *("-blockdev", '{"driver":"file","filename":"DISK.vars","node-name":"vars"}'),
        ],
    ),
    "added-s390x": (
        *("s390x", "7.2"),
        [
            "-nodefaults",
            "-machine",
            "s390-ccw-virtio",
            "-device",
            "virtio-rng-ccw,devno=fe.0.0007",
            "-nic",
            "user",
        ],
    ),
}


async def pci(qemu: Qemu) -> list[dict[str, Any]]:
    try:
        buses = await qemu.execute("query-pci")
    except QmpError:
        # s390x of 7.2 has no PCI.
        return []
    return [device for bus in buses for device in bus["devices"]]


async def device_types(qemu: Qemu) -> list[str]:
    found: list[str] = []
    for path in ("peripheral", "peripheral-anon", "unattached"):
        rows = await qemu.execute("qom-list", {"path": f"/machine/{path}"})
        found += [row["type"] for row in rows if row["type"].startswith("child<")]
    return sorted(found)


async def facts(qemu: Qemu) -> dict[str, Any]:
    """What both sides of a migration must have in common; by fresh queries."""
    run = qemu.execute
    slots = await run("query-hotpluggable-cpus")
    memdevs = await run("query-memdev")
    devices = await run("query-memory-devices")
    tree = await qemu.human_monitor_command("info mtree -f")
    ids = {row["id"] for row in memdevs}
    # Views come in any order, and several of them have the same block.
    found = re.findall(r"(0[0-9a-f]{15}-\S+) \(prio -?\d+, ram\): (\S+)", tree)
    blocks = sorted({(where, name) for where, name in found if name in ids})
    return {
        "slots": [
            (row["type"], row["props"], row["vcpus-count"], "qom-path" in row) for row in slots
        ],
        "memdevs": sorted((row["id"], row["size"]) for row in memdevs),
        "numa": await qemu.human_monitor_command("info numa"),
        "blocks": blocks,
        "dimms": [row["data"] for row in devices],
        "pci": [(row["bus"], row["slot"], row["function"], row["id"]) for row in await pci(qemu)],
        "devices": await device_types(qemu),
        "machine": await qemu.qom_get("/machine", "type"),
        "smp": await qemu.qom_get("/machine", "smp"),
        "memory": await qemu.qom_get("/machine", "memory"),
    }


@pytest.mark.parametrize("name", MACHINES)
async def test_what_is_defined_from_a_running_qemu_starts_as_the_same_machine(name):
    arch, version, smp, rest = MACHINES[name]
    machine = () if "-machine" in rest else ("-machine", "q35")
    async with paused(arch, version, smp, rest, machine=machine or ("-machine", rest[1])) as qemu:
        before = await facts(qemu)
        run = await cli("define", "d", "--qmp", qemu.qmp)
        assert run.code == 0, run.stderr
        data = (await cli("dumpxml", "d", "--inactive")).stdout.encode()
    assert "note:" not in run.stdout + run.stderr
    emulator = read(data).emulator
    assert emulator is not None
    assert os.path.samefile(emulator, qemu_binary(version, arch))
    await check_again(data, before)


async def check_again(data: bytes, before: dict[str, Any]) -> None:
    """What `start` would start of this definition is the same machine."""
    async with started_again(data) as again:
        assert await facts(again) == before


@pytest.mark.parametrize("name", USUAL)
async def test_devices_are_those_that_ran(name, tmp_path):
    async with launched(name, tmp_path) as qemu:
        before = await facts(qemu)
        run = await cli("define", "d", "--qmp", qemu.qmp)
        assert (run.code, "note:" in run.stdout + run.stderr) == (0, False)
    await check_again((await cli("dumpxml", "d", "--inactive")).stdout.encode(), before)


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ("<memory unit='KiB'>131072<", "<memory unit='KiB'>262144<", "RAM block 'pc.ram'"),
        (">Haswell-noTSX<", ">qemu64<", "the driver of vCPU 0-3:"),
        ("require' name='x2apic", "disable' name='x2apic", "CPU features: x2apic at the source"),
        (
            "virtio-rng-pci",
            "virtio-balloon-pci",
            "device virtio-rng-pci: 1 at the source, none in the definition",
        ),
    ],
)
async def test_save_refuses_a_definition_of_another_machine_and_the_guest_stays(
    before, after, text, tmp_path
):
    rest = ["-m", "128", "-cpu", "Haswell-noTSX,+x2apic", "-device", "virtio-rng-pci"]
    async with paused("x86_64", "10.0", "1,maxcpus=4", rest) as qemu:
        await cli("define", "d", "--qmp", qemu.qmp)
        file = tmp_path / "d.xml"
        data = (await cli("dumpxml", "d", "--inactive")).stdout.replace('"', "'")
        assert before in data
        file.write_text(data.replace(before, after))
        assert (await cli("define", str(file))).code == 0
        run = await cli("save", "d", str(tmp_path / "saved"))
        doctor = await cli("doctor", "d")
        status = await qemu.execute("query-status")
    assert (run.code, text in run.stderr) == (3, True), run.stderr
    assert (doctor.code, f"differs from its definition: {text}" in doctor.stdout) == (0, True), (
        doctor.stdout
    )
    assert (status["status"], (tmp_path / "saved").exists()) == ("prelaunch", False)


def launched(name: str, folder: Path) -> AbstractAsyncContextManager[Qemu]:
    """The machine of that name, paused; its disks are in `folder`."""
    if name in MACHINES:
        arch, version, smp, rest = MACHINES[name]
        machine = () if "-machine" in rest else ("-machine", "q35")
        return paused(arch, version, smp, rest, machine=machine or ("-machine", rest[1]))
    arch, version, words = USUAL[name]
    (folder / "disk").write_bytes(b"\xa5" * (1 << 20))
    (folder / "disk.vars").write_bytes(bytes(1 << 17))
    arguments = ["-S", "-display", "none", "-smp", "1,maxcpus=4"]
    arguments += [word.replace("DISK", str(folder / "disk")) for word in words]
    return running(qemu_binary(version, arch), arguments)


class Named:
    """The QEMU that `restore` or `migrate` has started under a name."""

    def __init__(self, connection: Connection) -> None:
        self.execute = lambda command, arguments=None: connection.command(
            command, **(arguments or {})
        )

    async def human_monitor_command(self, line: str) -> str:
        return str(await self.execute("human-monitor-command", {"command-line": line}))

    async def qom_get(self, path: str, name: str) -> Any:
        return await self.execute("qom-get", {"path": path, "property": name})


async def check_arrived(name: str, before: dict[str, Any], put: dict[int, bytes]) -> None:
    """What runs under that name is the same machine, and its memory is where it was."""
    async with connected(str(folder_of(name) / "qmp2")) as connection:
        there = Named(connection)
        assert await facts(there) == before
        assert {
            address: await memory.read(there.human_monitor_command, address) for address in put
        } == put


async def memory_names(qemu: Qemu) -> set[str]:
    """Blocks that a guest which has not booted can use: not an nvdimm, nor what a driver has to
    plug first.
    """
    devices = await qemu.execute("query-memory-devices")
    others = {
        row["data"]["memdev"].removeprefix("/objects/") for row in devices if row["type"] != "dimm"
    }
    return {row["id"] for row in await qemu.execute("query-memdev")} - others


#: The first few in the suite, all with `scripts/soak claims`.
TRIPS = dict.fromkeys(["swapped", "no-memory", "dimm", "plain-ppc64", "drawers", *MACHINES, *USUAL])


@pytest.mark.parametrize("name", list(TRIPS)[: soaking.count(5)])
async def test_saved_restored_and_migrated_it_is_the_same_machine_with_its_memory(name, tmp_path):
    file = tmp_path / "saved"
    async with launched(name, tmp_path) as qemu:
        hmp = qemu.human_monitor_command
        before = await facts(qemu)
        names = await memory_names(qemu)
        put = memory.patterns(await memory.blocks(hmp, names))
        assert len(put) >= 2 * len(names) > 0
        await memory.write(hmp, qemu.folder, put)
        assert (await cli("define", "d", "--qmp", qemu.qmp)).code == 0
        async with qmpvcpu.connect("d") as domain:
            await saving.save(domain, file, verify=True, force=True)
    try:
        await saving.restore(file)
        await check_arrived("d", before, put)
        async with qmpvcpu.connect("d") as domain:
            await saving.move(domain, "e", force=True)
        await check_arrived("e", before, put)
    finally:
        for one in ("d", "e"):
            await cli("destroy", one)


async def test_what_a_definition_does_not_hold_is_neither_saved_nor_migrated(tmp_path):
    """A device that came after the start."""
    file = tmp_path / "saved"
    async with paused(
        "x86_64", "10.0", "1,maxcpus=4", ["-m", "64"], machine=("-machine", "pc")
    ) as qemu:
        await qemu.execute("device_add", {"driver": "virtio-rng-pci", "id": "late", "addr": "0x7"})
        run = await cli("define", "d", "--qmp", qemu.qmp)
        assert "virtio-rng-pci" in run.stdout + run.stderr
        texts = []
        async with qmpvcpu.connect("d") as domain:
            for call in (saving.save(domain, file), saving.move(domain, "e")):
                with pytest.raises(qmpvcpu.VcpuRefused) as caught:
                    await call
                texts.append(caught.value.message)
        status = await qemu.execute("query-status")
    assert "device virtio-rng-pci: 1 at the source, none in the definition" in texts[0]
    assert "device virtio-rng-pci: 1 at the source, none at the destination" in texts[1]
    assert (status["status"], file.exists()) == ("prelaunch", False)


@pytest.mark.parametrize(
    ("rest", "text"),
    [
        (["-m", "192"], "memory: 131072 KiB at the source, 196608 KiB at the destination"),
        (["-m", "128", "-device", "virtio-rng-pci"], "device virtio-rng-pci: none at the source"),
    ],
)
async def test_migrate_refuses_another_machine_before_the_first_byte(rest, text):
    async with (
        paused("x86_64", "10.0", "1,maxcpus=4", ["-m", "128"]) as source,
        paused("x86_64", "10.0", "1,maxcpus=4", [*rest, "-incoming", "defer"]) as destination,
    ):
        run = await cli("migrate", source.qmp, destination.qmp)
        states = [await qemu.execute("query-status") for qemu in (source, destination)]
    assert (run.code, text in run.stderr) == (3, True), run.stderr
    assert [state["status"] for state in states] == ["prelaunch", "inmigrate"]


async def test_distances_in_a_definition_are_compared_with_the_guests(tmp_path):
    smp, rest = MACHINES["distances"][2:]
    async with paused("x86_64", "10.0", smp, rest) as qemu:
        assert (await cli("define", "far", "--qmp", qemu.qmp)).code == 0
        data = (await cli("dumpxml", "far", "--inactive")).stdout
        file = tmp_path / "far.xml"
        file.write_text(data.replace("value='31'", "value='30'"))
        await cli("define", str(file))
        save = await cli("save", "far", str(tmp_path / "saved"))
        async with paused("x86_64", "10.0", smp, [*rest[:-2], "-incoming", "defer"]) as other:
            migrate = await cli("migrate", qemu.qmp, other.qmp)
    assert (
        save.code,
        "NUMA nodes 0 and 1: 31 at the source, 30 in the definition" in save.stderr,
    ) == (3, True)
    assert (
        migrate.code,
        "NUMA nodes 1 and 0: 22 at the source, 31 at the destination" in migrate.stderr,
    ) == (
        3,
        True,
    )


async def save_and_move(name: str, file: Path, **options: Any) -> list[str]:
    """Why neither is done."""
    texts = []
    async with qmpvcpu.connect(name) as domain:
        for call in (saving.save(domain, file, **options), saving.move(domain, "e")):
            with pytest.raises(qmpvcpu.VcpuRefused) as caught:
                await call
            texts.append(caught.value.message)
    return texts


async def test_other_disks_than_in_the_definition_are_neither_saved_nor_migrated(tmp_path):
    """A snapshot, another medium, and a definition that was edited."""
    for name in ("b.img", "n.img", "cd.iso", "linked"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    (tmp_path / "link").symlink_to("linked")
    disks = [
        *("-drive", f"file={tmp_path}/b.img,format=raw,if=virtio,id=vd0"),
        *("-blockdev", f"driver=raw,node-name=n1,file.driver=file,file.filename={tmp_path}/n.img"),
        *("-device", "virtio-blk-pci,drive=n1,id=vd1"),
        *(
            "-drive",
            f"file={tmp_path}/link,format=raw,if=virtio,id=vd2",
            "-cdrom",
            f"{tmp_path}/cd.iso",
        ),
    ]
    async with paused("x86_64", "10.0", "1,maxcpus=2", ["-m", "64", *disks]) as qemu:
        assert "note:" not in (await cli("define", "d", "--qmp", qemu.qmp)).stderr
        overlay = {"device": "vd0", "snapshot-file": f"{tmp_path}/ov.qcow2", "format": "qcow2"}
        await qemu.execute("blockdev-snapshot-sync", overlay)
        await qemu.execute("eject", {"device": "ide2-cd0", "force": True})
        file = tmp_path / "d.xml"
        data = (await cli("dumpxml", "d", "--inactive")).stdout
        file.write_text(
            data.replace(f"{tmp_path}/n.img", f"{tmp_path}/b.img").replace("/link,", "/linked,")
        )
        await cli("define", str(file))
        said = (await cli("--json", "doctor", "d")).json["differences"]
        texts = await save_and_move("d", tmp_path / "saved")
        status = await qemu.execute("query-status")
    found = [
        f"disk 'ide2-cd0': no medium at the source, {tmp_path}/cd.iso",
        f"disk 'vd0': {tmp_path}/ov.qcow2 at the source, {tmp_path}/b.img",
        f"disk 'vd1': {tmp_path}/n.img at the source, {tmp_path}/b.img",
    ]
    assert said == [f"{text} in the definition" for text in found]
    assert [text for text in found if f"{text} in the definition" not in texts[0]] == []
    assert (status["status"], (tmp_path / "saved").exists()) == ("prelaunch", False)


@pytest.mark.parametrize("way", ["-snapshot", "snapshot=on"])
async def test_temporary_overlays_are_neither_saved_nor_migrated(way, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    file = tmp_path / "saved"
    drive = f"file={tmp_path}/disk,format=raw,if=virtio,id=vd0"
    more = (
        ["-drive", f"{drive},snapshot=on"]
        if way == "snapshot=on"
        else ["-drive", drive, "-snapshot"]
    )
    async with paused("x86_64", "10.0", "1,maxcpus=2", ["-m", "64", *more]) as qemu:
        async with qmpvcpu.connect(qmp=qemu.qmp) as domain:
            with pytest.raises(qmpvcpu.VcpuRefused, match="disk 'vd0' is a temporary overlay"):
                await saving.save(domain, file)
        await cli("define", "d", "--qmp", qemu.qmp)
        texts = await save_and_move("d", file)
        status = await qemu.execute("query-status")
    assert ["disk 'vd0' is a temporary overlay" in one for one in texts] == [True, True], texts
    assert (status["status"], file.exists()) == ("prelaunch", False)


async def test_memory_that_is_read_only_is_neither_saved_nor_migrated(tmp_path):
    (tmp_path / "memory").write_bytes(b"\xa5" * (1 << 20))
    file = tmp_path / "saved"
    words = ["-m", "64,slots=1,maxmem=1G", "-device", "nvdimm,memdev=nv,unarmed=on", "-object"]
    words += [f"memory-backend-file,id=nv,size=1M,mem-path={tmp_path}/memory,share=on,readonly=on"]
    async with paused(
        "x86_64", "10.0", "1,maxcpus=2", words, machine=("-machine", "q35,nvdimm=on")
    ) as qemu:
        async with qmpvcpu.connect(qmp=qemu.qmp) as domain:
            with pytest.raises(qmpvcpu.VcpuRefused, match="read-only memory: nv"):
                await saving.save(domain, file)
        await cli("define", "d", "--qmp", qemu.qmp)
        texts = await save_and_move("d", file)
        status = await qemu.execute("query-status")
    assert ["read-only memory: nv" in one for one in texts] == [True, True], texts
    assert (status["status"], file.exists()) == ("prelaunch", False)


async def test_disks_whose_folder_is_not_known_are_neither_saved_nor_migrated(tmp_path):
    """A QEMU in the background has left the folder that it was started in."""
    (tmp_path / "d.img").write_bytes(bytes(1 << 20))
    words = [
        "-S",
        "-display",
        "none",
        "-nodefaults",
        "-m",
        "64",
        "-smp",
        "1,maxcpus=2",
        "-daemonize",
    ]
    words += [
        "-drive",
        "file=d.img,format=raw,if=virtio",
        "-pidfile",
        "pid",
        "-qmp",
        "unix:qmp,server=on,wait=off",
    ]
    process = await asyncio.create_subprocess_exec(
        qemu_binary("10.0", "x86_64"), *words, cwd=tmp_path
    )
    assert await process.wait() == 0
    try:
        assert (
            "the folder of the file in"
            in (await cli("define", "d", "--qmp", f"{tmp_path}/qmp")).stderr
        )
        texts = await save_and_move("d", tmp_path / "saved")
        async with qmpvcpu.connect("d") as domain:
            assert domain.run_state == "prelaunch"
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    for text in texts:
        assert (
            "the folder of the file in '-drive file=d.img,format=raw,if=virtio' is not known"
            in text
        )
    assert not (tmp_path / "saved").exists()


async def test_a_network_that_no_second_qemu_can_have_is_not_verified(tmp_path):
    rest = ["-m", "64", "-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0"]
    async with paused("x86_64", "10.0", "1,maxcpus=2", rest) as qemu:
        assert (await cli("define", "d", "--qmp", qemu.qmp)).code == 0
        file = tmp_path / "d.xml"
        data = (await cli("dumpxml", "d", "--inactive")).stdout
        file.write_text(data.replace("user,id=n0", "tap,id=n0,ifname=t0"))
        await cli("define", str(file))
        run = await cli("save", "d", str(tmp_path / "saved"), "--verify")
        status = await qemu.execute("query-status")
    assert (run.code, "save without --verify" in run.stderr) == (3, True), run.stderr
    assert "cannot have the network of '-netdev tap,id=n0,ifname=t0'" in run.stderr
    assert (status["status"], (tmp_path / "saved").exists()) == ("prelaunch", False)


FIRMWARE = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"


async def test_firmware_in_flash_is_started_and_its_guest_gets_no_cpu_that_hangs_it(tmp_path):
    shutil.copy("/usr/share/OVMF/OVMF_VARS_4M.fd", tmp_path / "vars")
    file = tmp_path / "flash.xml"
    file.write_text(f"""<domain type='qemu'><name>flash</name><memory>65536</memory><vcpu current='1'>4</vcpu>
<os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type>
<loader readonly='yes' secure='yes' type='pflash'>{FIRMWARE}</loader><nvram>{tmp_path}/vars</nvram></os>
<features><smm state='on'/></features><devices><emulator>{qemu_binary("10.0", "x86_64")}</emulator></devices>
</domain>""")
    assert (await cli("define", str(file))).code == 0
    try:
        started = await cli("--json", "start", "flash")
        assert (started.code, started.json["messages"]) == (0, []), started.stderr
        doctor = await cli("--json", "doctor", "flash")
        plug = await cli("--json", "setvcpu", "flash", "1", "--enable")
        assert doctor.json["differences"] == []
        assert (plug.code, "OVMF with SMM" in plug.json["error"]["message"]) == (3, True)
    finally:
        await cli("destroy", "flash")


async def test_devices_behind_other_ports_are_another_machine():
    machine = ("-machine", "pc-q35-10.0")
    ports = [
        word
        for name in ("a", "b")
        for word in ("-device", f"pcie-root-port,id={name},chassis={ord(name)}")
    ]

    def words(net, rng):
        return [
            *ports,
            "-device",
            f"virtio-net-pci,bus={net}",
            "-device",
            f"virtio-rng-pci,bus={rng}",
        ]

    async with (
        paused("x86_64", "10.0", "1,maxcpus=4", words("a", "b"), machine=machine) as source,
        paused(
            "x86_64",
            "11.1",
            "1,maxcpus=4",
            [*words("b", "a"), "-incoming", "defer"],
            machine=machine,
        ) as destination,
    ):
        run = await cli("migrate", source.qmp, destination.qmp)
    assert run.code == 3
    assert (
        "device virtio-net-pci behind 'a' at 00.0: 1 at the source, none at the destination"
        in run.stderr
    )


async def test_a_guest_whose_firmware_has_numbered_its_buses_is_not_another_machine(tmp_path):
    port = [
        "-device",
        "pcie-root-port,id=rp,chassis=1,slot=1,addr=2",
        "-device",
        "virtio-rng-pci,bus=rp",
    ]
    words = ["-machine", "q35", "-m", "64", "-nodefaults", "-display", "none", *port]
    async with running(qemu_binary("10.0", "x86_64"), words) as qemu:

        async def lists_what_is_behind():
            return any(one.get("pci_bridge", {}).get("devices") for one in await pci(qemu))

        await until(lists_what_is_behind, "the firmware has numbered the buses", every=0.1)
        defined = await cli("define", "bridged", "--qmp", qemu.qmp)
        doctor = await cli("--json", "doctor", "bridged")
        await cli("undefine", "bridged")
    assert "differs" not in defined.stderr
    assert doctor.json["differences"] == []
