"""What `vcpuinfo` says of real QEMUs: ids, places, nodes, entities, order."""

from __future__ import annotations

import pytest

import qmpvcpu
from tests.support.commands import cli
from tests.support.qemus import VERSIONS, matrix, paused

pytestmark = pytest.mark.qemu

TWO_NODES = [
    *(
        "-m",
        "256",
        "-object",
        "memory-backend-ram,id=a,size=128M",
        "-object",
        "memory-backend-ram,id=b,size=128M",
    ),
    *("-numa", "node,nodeid=0,memdev=a", "-numa", "node,nodeid=1,memdev=b"),
]
CPU_NODES = ["-numa", "cpu,node-id=0,socket-id=0", "-numa", "cpu,node-id=1,socket-id=1"]


@matrix(*(("x86_64", version) for version in VERSIONS))
async def test_x86_ids_go_by_socket_core_thread_and_nodes_are_right(arch, version):
    async with paused(
        arch, version, "2,sockets=2,cores=2,threads=2,maxcpus=8", TWO_NODES + CPU_NODES
    ) as qemu:
        run = await cli("--json", "vcpuinfo", qemu.qmp)
    assert run.code == 0
    info = run.json
    assert (info["arch"], info["accel"], info["active"]) == ("x86_64", "tcg", True)
    assert info["machine"] == f"pc-q35-{version}"
    rows = info["vcpus"]
    places = [
        (row["props"]["socket-id"], row["props"]["core-id"], row["props"]["thread-id"])
        for row in rows
    ]
    assert [row["id"] for row in rows] == list(range(8))
    assert places == sorted(places)
    assert [row["node"] for row in rows] == [0] * 4 + [1] * 4
    assert [row["state"] for row in rows] == ["enabled"] * 2 + ["disabled"] * 6
    assert [row["order"] for row in rows] == [1, 2] + [None] * 6
    assert [row["hotpluggable"] for row in rows] == [False] + [True] * 7
    assert [row["entity"] for row in rows] == [[number] for number in range(8)]
    assert all(isinstance(row["thread_id"], int) for row in rows[:2])
    assert set(rows[0]) == {
        *(
            "id",
            "state",
            "hotpluggable",
            "order",
            "node",
            "props",
            "entity",
            "qom_path",
            "thread_id",
            "online",
        ),
        *("pending", "pin", "scheduler", "cpu", "logical_id", "can_offline"),
    }


@matrix(("x86_64", "7.2"), ("x86_64", "10.0"))
async def test_x86_dies_come_between_socket_and_core(arch, version):
    async with paused(arch, version, "1,sockets=2,dies=2,cores=2,threads=1,maxcpus=8") as qemu:
        async with qmpvcpu.connect(qemu.qmp) as domain:
            props = [vcpu.props for vcpu in await domain.vcpus()]
    assert [(p["socket-id"], p["die-id"], p["core-id"]) for p in props] == [
        (s, d, c) for s in range(2) for d in range(2) for c in range(2)
    ]


@matrix(("x86_64", "10.0"), ("x86_64", "11.1"))
async def test_x86_modules_come_between_die_and_core(arch, version):
    smp = "1,sockets=1,dies=2,modules=2,cores=2,threads=1,maxcpus=8"
    async with paused(arch, version, smp) as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        props = [vcpu.props for vcpu in await domain.vcpus()]
    assert [(p["die-id"], p["module-id"], p["core-id"]) for p in props] == [
        (d, m, c) for d in range(2) for m in range(2) for c in range(2)
    ]


@matrix(*(("ppc64", version) for version in VERSIONS))
async def test_ppc64_with_one_thread_has_an_entity_per_vcpu(arch, version):
    async with paused(arch, version, "2,maxcpus=4") as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        vcpus = await domain.vcpus()
    assert [vcpu.entity for vcpu in vcpus] == [(n,) for n in range(4)]
    assert [vcpu.props["core-id"] for vcpu in vcpus] == [0, 1, 2, 3]
    assert [vcpu.node for vcpu in vcpus] == [0] * 4
    assert [vcpu.enabled for vcpu in vcpus] == [True, True, False, False]


@matrix(("ppc64", "10.0"), ("ppc64", "11.1"))
async def test_ppc64_cores_of_eight_are_one_entity(arch, version):
    smp = "8,sockets=1,cores=4,threads=8,maxcpus=32"
    async with paused(arch, version, smp) as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        vcpus = await domain.vcpus()
    assert len(vcpus) == 32
    assert vcpus[13].entity == tuple(range(8, 16))
    assert vcpus[13].props == {"core-id": 8, "node-id": 0}
    assert {vcpu.order for vcpu in vcpus[:8]} == {1}
    assert len({vcpu.thread_id for vcpu in vcpus[:8]}) == 8
    assert [vcpu.qom_path.rsplit("/", 1)[1] for vcpu in vcpus[:8]] == [
        f"thread[{n}]" for n in range(8)
    ]


@matrix(*(("s390x", version) for version in VERSIONS))
async def test_s390x_flat(arch, version):
    async with paused(arch, version, "2,maxcpus=5") as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        vcpus = await domain.vcpus()
    assert [vcpu.props["core-id"] for vcpu in vcpus] == [0, 1, 2, 3, 4]
    assert [vcpu.hotpluggable for vcpu in vcpus] == [False, False, True, True, True]
    assert {vcpu.node for vcpu in vcpus} == {None}


@matrix(("s390x", "10.0"), ("s390x", "11.1"))
async def test_s390x_with_drawers_and_books(arch, version):
    smp = "1,drawers=2,books=2,sockets=2,cores=2,maxcpus=16"
    async with paused(arch, version, smp) as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        props = [vcpu.props for vcpu in await domain.vcpus()]
    places = [(p["drawer-id"], p["book-id"], p["socket-id"], p["core-id"]) for p in props]
    assert places == sorted(places)
    assert [place[:3] for place in places[::2]] == [
        (d, b, s) for d in (0, 1) for b in (0, 1) for s in (0, 1)
    ]


@matrix(("loongarch64", "10.0"), ("loongarch64", "11.1"))
async def test_loongarch64(arch, version):
    smp = "1,sockets=2,cores=2,threads=2,maxcpus=8"
    async with (
        paused(arch, version, smp, ["-m", "1024"]) as qemu,
        qmpvcpu.connect(qemu.qmp) as domain,
    ):
        props = [vcpu.props for vcpu in await domain.vcpus()]
    assert [(p["socket-id"], p["core-id"], p["thread-id"]) for p in props] == [
        (s, c, t) for s in range(2) for c in range(2) for t in range(2)
    ]


NO_HOTPLUG = [
    ("aarch64", "7.2", "4,sockets=1,clusters=2,cores=2,threads=1", ()),
    ("aarch64", "10.0", "3,maxcpus=4", ()),
    ("riscv64", "7.2", "2", ()),
    ("riscv64", "11.1", "2", ()),
    ("x86_64", "7.2", "2", ("-machine", "microvm")),
    ("x86_64", "10.0", "2", ("-machine", "microvm")),
]


@pytest.mark.parametrize(("arch", "version", "smp", "machine"), NO_HOTPLUG)
async def test_a_machine_without_hotplug_lists_its_vcpus_and_says_so(arch, version, smp, machine):
    async with paused(arch, version, smp, machine=machine) as qemu:
        info = await cli("--json", "vcpuinfo", qemu.qmp)
        text = await cli("vcpuinfo", qemu.qmp)
        enabled = [row for row in info.json["vcpus"] if row["state"] == "enabled"]
        plug = await cli("--json", "setvcpu", qemu.qmp, str(len(enabled) - 1), "--disable")
    assert info.code == 0
    assert len(enabled) == int(smp.split(",")[0])
    assert not any(row["hotpluggable"] for row in info.json["vcpus"])
    assert "this machine has no CPU hotplug" in text.stdout
    assert plug.code == 3
    assert "this machine has no CPU hotplug" in plug.json["error"]["message"]
    assert plug.json["error"]["libvirt"] == "VIR_ERR_OPERATION_UNSUPPORTED"


async def test_without_hotplug_ids_up_to_maxcpus_are_listed_as_disabled():
    async with (
        paused("aarch64", "10.0", "3,maxcpus=4") as qemu,
        qmpvcpu.connect(qemu.qmp) as domain,
    ):
        vcpus = await domain.vcpus()
        assert [vcpu.enabled for vcpu in vcpus] == [True, True, True, False]
        with pytest.raises(qmpvcpu.VcpuRefused, match="no CPU hotplug"):
            await domain.enable(3)


async def test_machine_none_has_no_enabled_vcpu_and_is_no_error():
    async with paused("x86_64", "10.0", "1", machine=["-machine", "none"]) as qemu:
        run = await cli("--json", "vcpuinfo", qemu.qmp)
        text = await cli("vcpuinfo", qemu.qmp)
    assert (run.code, text.code) == (0, 0)
    assert [row["state"] for row in run.json["vcpus"]] == ["disabled"]


async def test_threads_that_are_shared_are_not_reported_as_a_vcpus_own():
    async with paused("x86_64", "10.0", "3,maxcpus=4", accel="tcg,thread=single") as qemu:
        async with qmpvcpu.connect(qemu.qmp) as domain:
            state = await domain.state()
    assert state.threads_shared is True
    assert [vcpu.thread_id for vcpu in state.vcpus] == [None] * 4


async def test_four_hundred_slots_fit_into_a_reply():
    smp = "2,sockets=4,cores=50,threads=2,maxcpus=400"
    async with (
        paused("x86_64", "10.0", smp, ["-cpu", "max"]) as qemu,
        qmpvcpu.connect(qemu.qmp) as domain,
    ):
        assert len(await domain.vcpus()) == 400
        outcome = await domain.enable(range(390, 400))
    assert outcome.changed_ids == tuple(range(390, 400))


async def test_order_follows_plugging_and_not_ids():
    async with paused("x86_64", "10.0", "1,maxcpus=8") as qemu, qmpvcpu.connect(qemu.qmp) as domain:
        for vcpu_id in (6, 2, 5):
            await domain.enable(vcpu_id)
        orders = {vcpu.id: vcpu.order for vcpu in await domain.vcpus() if vcpu.enabled}
    assert orders == {0: 1, 6: 2, 2: 3, 5: 4}
