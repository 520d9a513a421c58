"""-smp and -numa arithmetic, where no QEMU is needed to see it."""

from __future__ import annotations

import pytest

from qmpvcpu import VcpuRefused, VcpuUsageError, parse_numa, parse_smp
from tests.support.machines import compute, is_measured, merged

V72, V100, V111 = (7, 2, 22), (10, 0, 2), (11, 1, 3)


def q35(smp, *numa, version=V100, machine="q35"):
    return compute("x86_64", machine, version, smp, numa)


# -- -smp ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "value"),
    [("cpus", 4), ("maxcpus", 8), ("sockets", 2), ("cores", None), ("threads", None)],
)
def test_what_is_written_is_read(member, value):
    assert getattr(parse_smp("4,maxcpus=8,sockets=2"), member) == value


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(
            ("010", 8),
            ("0x10", 16),
            ("0X1f", 31),
            ("+8", 8),
            (" 8", 8),
            ("00", 0),
            ("8,", 8),
            ("3,cpus=8", 8),
        ),
        *(("x,cpus=8", 8), ("-1", -1), ("", None)),
    ],
)
def test_numbers_are_those_of_c_and_the_last_of_a_key_counts(text, number):
    assert parse_smp(text).cpus == number


@pytest.mark.parametrize(
    ("words", "machine", "smp"),
    [
        ([("smp", "2"), ("smp", "maxcpus=4")], "", "2,maxcpus=4"),
        ([("machine", "q35"), ("smp", "2"), ("machine", "smm=off")], "q35,smm=off", "2"),
        ([("machine", "q35"), ("machine", "pc")], "pc", ""),
        ([("machine", "smm=off,type=q35")], "q35,smm=off", ""),
        ([("machine", "q35,mem_merge=off")], "q35,mem-merge=off", ""),
        ([("machine", "q35,smp.cpus=2"), ("smp", "maxcpus=4")], "q35", "2,maxcpus=4"),
        ([("smp", "4"), ("machine", "q35,smp.cpus=2")], "q35", "2"),
        ([("machine", "q35,smp.cpus=2"), ("smp", "4")], "q35", "4"),
        ([("machine", "smm=off"), ("smp", "4")], ",smm=off", "4"),
    ],
)
def test_all_machine_and_smp_are_merged(words, machine, smp):
    assert merged(*words) == (machine, smp)


@pytest.mark.parametrize(
    "text",
    [
        "q35,smm",
        "type=q35,,dumpdtb=x",
        '{"type":"q35"}',
        "q35,smp=4",
        "q35,smp.x=1",
        "q35,=on",
        "help",
    ],
)
def test_what_is_not_a_machine_is_a_usage_error(text):
    with pytest.raises(VcpuUsageError):
        merged(("machine", text))


def test_what_is_read_is_written_in_one_order():
    assert str(parse_smp("cpus=4,threads=2,maxcpus=8")) == "4,maxcpus=8,threads=2"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "x",
            "4,9",
            "4,cpu=9",
            "4,cores=²",
            "4,cores",
            ",",
            "4,,cores=2",
            "=4",
            "4,CORES=2",
            "help",
            "4,?",
        ),
        *(
            "08",
            "0x",
            "8 ",
            "4K",
            "1e1",
            "8.0",
            "0b10",
            "4,cores=",
            "4,cores=99999999999999999999",
            "4,cores.x=1",
        ),
    ],
)
def test_what_is_not_an_smp_is_a_usage_error(text):
    with pytest.raises(VcpuUsageError):
        parse_smp(text)


@pytest.mark.parametrize(
    ("smp", "machine", "counts"),
    [
        ("2,maxcpus=4", "q35", (2, 4, 1, 4, 1)),
        ("2,maxcpus=4", "pc-q35-6.1", (2, 4, 4, 1, 1)),
        ("3,threads=2,maxcpus=4", "q35", (3, 4, 1, 2, 2)),
        ("maxcpus=6,cores=2", "q35", (6, 6, 3, 2, 1)),
        ("sockets=2,cores=2", "q35", (4, 4, 2, 2, 1)),
    ],
)
def test_cores_before_sockets_since_6_2(smp, machine, counts):
    found = q35(smp, machine=machine)
    topology = found.topology
    assert (
        found.cpus,
        topology.maxcpus,
        topology.sockets,
        topology.cores,
        topology.threads,
    ) == counts


# -- slots -----------------------------------------------------------------------------------------

PC = q35("2,sockets=2,dies=2,cores=1,threads=2,maxcpus=8")
PSERIES = compute("ppc64", "pseries", V100, "8,cores=4,threads=8,maxcpus=32")


@pytest.mark.parametrize(
    ("found", "slot", "props"),
    [
        (PC, 5, {"socket-id": 1, "die-id": 0, "core-id": 0, "thread-id": 1}),
        (compute("s390x", "s390-ccw-virtio", V72, "1,maxcpus=2"), 1, {"core-id": 1}),
        (
            compute("s390x", "s390-ccw-virtio", V100, "1,drawers=2,maxcpus=4"),
            3,
            {"drawer-id": 1, "book-id": 0, "socket-id": 0, "core-id": 3},
        ),
    ],
    ids=["pc", "s390x of 7.2", "s390x of 10.0"],
)
def test_the_slots_of_each_machine(found, slot, props):
    assert found.props[slot] == props


def test_a_core_of_ppc64_is_one_slot():
    assert [props["core-id"] for props in PSERIES.props] == [0, 8, 16, 24]


def test_a_core_of_ppc64_has_its_threads():
    assert PSERIES.sizes == [8, 8, 8, 8]


@pytest.mark.parametrize(
    ("found", "plugged"),
    [(PC, [True] * 2 + [False] * 6), (PSERIES, [True, False, False, False])],
    ids=["pc", "ppc64"],
)
def test_qemu_starts_with_the_first_cpus(found, plugged):
    assert found.plugged == plugged


# -- -numa -----------------------------------------------------------------------------------------

WRITTEN = [
    "node,nodeid=1,cpus=0-1,cpus=03,memdev=m1",
    "node,nodeid=0,mem=16",
    "cpu,node-id=1,socket-id=0,core-id=010",
    "dist,src=0,dst=1,val=0x14",
    "hmat-lb,initiator=0,target=1,hierarchy=memory,data-type=access-latency,latency=5",
    "hmat-cache,node-id=0,size=10K,level=1,associativity=direct,policy=none,line=010",
]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (0, "node,nodeid=1,cpus=0-1,cpus=3,memdev=m1"),
        (1, "node,nodeid=0,mem=16"),
        (2, "cpu,node-id=1,socket-id=0,core-id=8"),
        (3, "dist,src=0,dst=1,val=20"),
        (4, WRITTEN[4]),
        (5, "hmat-cache,node-id=0,size=10K,level=1,associativity=direct,policy=none,line=8"),
    ],
)
def test_numa_is_read_and_written_in_order(place, words):
    assert str(parse_numa(WRITTEN)[place]) == words


def test_a_node_without_an_id_has_that_of_its_place():
    assert [node.id for node in parse_numa(["node", "node", "type=node"])] == [0, 1, 2]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "nod",
            "help",
            "Node",
            '{"type":"node"}',
            "nodeid=0",
            "node,nodeid=x",
            "node,cpus=3-1",
            "node,cpu=1",
        ),
        *(
            "node,cpus=0-",
            "node,cpus=-1",
            "node,cpus=08",
            "node,cpus=65536",
            "node,cpus",
            "node,id=x",
            "node,=1",
        ),
        *(
            "node,type=cpu",
            "cpu,socket-id=1",
            "cpu,x=1",
            "dist,src=0,dst=1",
            "dist,src=0,dst=1,val=256",
        ),
        "hmat-lb,initiator=0,target=0,hierarchy=memory,data-type=latency,latency=5",
        "hmat-cache,node-id=0,size=1K,level=1,associativity=direct,policy=none",
    ],
)
def test_what_is_not_a_numa_is_a_usage_error(text):
    with pytest.raises(VcpuUsageError):
        parse_numa([text])


NODES = ("node,nodeid=0", "node,nodeid=1")


@pytest.mark.parametrize(
    ("smp", "numa", "nodes"),
    [
        ("4,sockets=4,maxcpus=4", NODES, [0, 1, 0, 1]),
        ("4", ("node,nodeid=0,cpus=0-1", "node,nodeid=1,cpus=3"), [0, 0, 0, 1]),
        ("4,sockets=2,cores=2", (*NODES, "cpu,node-id=1,socket-id=0"), [1, 1, 0, 0]),
        (
            "4,sockets=2,cores=2",
            (*NODES, "cpu,node-id=1,core-id=1", "cpu,node-id=0,socket-id=0,core-id=0"),
            [0, 1, 0, 1],
        ),
        ("4", (*NODES, "cpu,node-id=1"), [1, 1, 1, 1]),
        ("4", (*NODES, "cpu,node-id=1,core-id=1,drawer-id=7"), [0, 1, 0, 0]),
    ],
    ids=["by socket", "by index", "a socket", "cores", "all", "a drawer is not looked at"],
)
def test_the_nodes_of_slots(smp, numa, nodes):
    assert [props["node-id"] for props in q35(smp, *numa).props] == nodes


@pytest.mark.parametrize(
    ("mem", "version"), [("0x10M", V72), (".5G", V100), ("016m", V72), ("16", V100)]
)
def test_the_memory_of_a_node_is_read_as_its_version_does(mem, version):
    found = q35("2", f"node,mem={mem}", version=version, machine="pc-q35-5.0")
    assert [props["node-id"] for props in found.props] == [0, 0]


@pytest.mark.parametrize(
    ("mem", "version"), [("0x10M", V100), (".5G", V72), ("1.5", V72), ("0", V72), ("x", V100)]
)
def test_the_memory_of_a_node_that_this_version_does_not_read(mem, version):
    with pytest.raises(VcpuRefused):
        q35("2", f"node,mem={mem}", version=version, machine="pc-q35-5.0")


@pytest.mark.parametrize(
    ("smp", "numa"),
    [
        ("4,sockets=2,cores=2", (*NODES, "cpu,node-id=2,socket-id=0")),
        ("4,sockets=2,cores=2", (*NODES, "cpu,node-id=0,die-id=0")),
        ("4,sockets=2,cores=2", (*NODES, "cpu,node-id=0,socket-id=2")),
        ("4,sockets=2,cores=2", (*NODES, "cpu,node-id=0,socket-id=0", "cpu,node-id=1,core-id=0")),
        ("4", ("node,nodeid=0,cpus=0,cpus=9",)),
        ("4", ("node,nodeid=0,cpus=0", "node,nodeid=1,cpus=0")),
        ("4", ("node,nodeid=1",)),
        ("4", ("node,nodeid=0", "node,nodeid=0")),
        ("4", ("cpu,node-id=0,core-id=0", *NODES)),
        ("4", ("node,nodeid=1", "node")),
        ("4", ("node,memdev=m", "node,memdev=m")),
        ("4", ("node,mem=16M",)),
        ("4", (*NODES, "dist,src=0,dst=1,val=9")),
        ("4", (*NODES, "dist,src=0,dst=2,val=20")),
        ("4", (*NODES, "node", "dist,src=0,dst=1,val=20")),
        ("4", (*NODES, "dist,src=0,dst=0,val=11")),
        ("4", (*NODES, WRITTEN[4])),
    ],
)
def test_nodes_that_qemu_refuses(smp, numa):
    with pytest.raises(VcpuRefused):
        q35(smp, *numa)


# -- what QEMU refuses, and what is proven ---------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "machine", "version", "text", "words"),
    [
        (
            "x86_64",
            "q35",
            V100,
            "4,sockets=3,cores=1,threads=1",
            r"sockets \(3\) \* dies \(1\) .* != maxcpus \(4\)",
        ),
        ("x86_64", "q35", V100, "5,maxcpus=4", "greater than smp"),
        ("x86_64", "q35", V100, "0", "greater than zero"),
        ("x86_64", "q35", V100, "-1", "no machine has that many"),
        ("x86_64", "q35", V100, "1,sockets=65536,dies=65536", "QEMU divides by it"),
        ("s390x", "s390-ccw-virtio-8.1", V100, "2,books=2", "books > 1"),
        ("x86_64", "q35", V100, "2,clusters=2", "clusters > 1"),
        ("x86_64", "q35", V72, "2,books=2", "has no books"),
        ("x86_64", "microvm", V100, "2", "not known"),
        ("ppc64", "pseries", V72, "2,threads=2", "TCG cannot"),
        ("ppc64", "pseries", V100, "3,threads=2,maxcpus=4", "multiple of threads"),
        ("ppc64", "pseries", V100, "3,threads=3", "power of 2"),
        ("s390x", "s390-ccw-virtio", V100, "2,threads=2", "more than 1 threads"),
    ],
)
def test_what_qemu_refuses(arch, machine, version, text, words):
    with pytest.raises(VcpuRefused, match=words) as caught:
        compute(arch, machine, version, text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("arch", "machine", "version", "is_proven"),
    [
        ("x86_64", "pc-q35-6.1", V72, True),
        ("ppc64", "pseries", V111, True),
        ("ppc64", "pseries-5.1", V111, False),
        ("x86_64", "pc-q35-7.3", V100, False),
        ("x86_64", "q35", (8, 2), False),
        ("x86_64", "pc-q35-10.0", V72, False),
        ("loongarch64", "virt", V72, False),
        ("aarch64", "virt", V100, False),
    ],
)
def test_what_is_proven(arch, machine, version, is_proven):
    assert is_measured(arch, machine, version) is is_proven


@pytest.mark.parametrize(
    ("smp", "is_certain"),
    [
        ("2,maxcpus=240", True),
        ("2,maxcpus=254,sockets=127,threads=2,cores=1", False),
        # Few CPUs, and ids with gaps: 65 cores take 7 bits.
        ("2,sockets=3,cores=65,threads=1,maxcpus=195", False),
        ("4294967298", True),
    ],
)
def test_sizes_that_every_machine_takes(smp, is_certain):
    assert q35(smp).is_certain is is_certain
