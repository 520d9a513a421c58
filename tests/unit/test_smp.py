"""-smp and -numa arithmetic, where no QEMU is needed to see it."""

from __future__ import annotations

import pytest

from qmpvcpu.core.model import Props, QemuVersion
from qmpvcpu.core.smp import NumaCpu, NumaNode, Smp, is_proven, parse_numa, parse_smp, predict
from qmpvcpu.errors import VcpuRefused, VcpuUsageError

V72, V100, V111 = QemuVersion(7, 2, 22), QemuVersion(10, 0, 2), QemuVersion(11, 1, 3)


def q35(text, version=V100, machine="q35", nodes=()):
    return predict("x86_64", machine, version, parse_smp(text), nodes)


def counts(found):
    topology = found.topology
    return found.cpus, topology.maxcpus, topology.sockets, topology.cores, topology.threads


def test_what_is_written_is_read_and_written_again():
    assert parse_smp("4,maxcpus=8,sockets=2") == Smp(4, 8, sockets=2)
    assert str(parse_smp("cpus=4,threads=2,maxcpus=8")) == "4,maxcpus=8,threads=2"
    for text in ("", "x", "4,9", "4,cpu=9", "4,cores=-1", "4,cores=²", "4,cores=9999999999", "4,cores"):
        with pytest.raises(VcpuUsageError):
            parse_smp(text)


def test_cores_before_sockets_since_6_2():
    assert counts(q35("2,maxcpus=4")) == (2, 4, 1, 4, 1)
    assert counts(q35("2,maxcpus=4", machine="pc-q35-6.1")) == (2, 4, 4, 1, 1)
    assert counts(q35("3,threads=2,maxcpus=4")) == (3, 4, 1, 2, 2)
    assert counts(q35("maxcpus=6,cores=2")) == (6, 6, 3, 2, 1)
    assert counts(q35("sockets=2,cores=2")) == (4, 4, 2, 2, 1)


def test_the_slots_of_each_machine():
    slots = q35("2,sockets=2,dies=2,cores=1,threads=2,maxcpus=8").slots
    assert slots[5].props == {"socket-id": 1, "die-id": 0, "core-id": 0, "thread-id": 1}
    assert [slot.plugged for slot in slots] == [True] * 2 + [False] * 6
    slots = predict("ppc64", "pseries", V100, parse_smp("8,cores=4,threads=8,maxcpus=32")).slots
    assert [(slot.props["core-id"], slot.vcpus_count, slot.plugged) for slot in slots] == [
        (0, 8, True),
        (8, 8, False),
        (16, 8, False),
        (24, 8, False),
    ]
    assert predict("s390x", "s390-ccw-virtio", V72, parse_smp("1,maxcpus=2")).slots[1].props == {"core-id": 1}
    props = predict("s390x", "s390-ccw-virtio", V100, parse_smp("1,drawers=2,maxcpus=4")).slots[3].props
    assert props == {"drawer-id": 1, "book-id": 0, "socket-id": 0, "core-id": 3}


def test_numa_as_it_is_written():
    nodes, cpus = parse_numa(
        [
            "node,nodeid=1,cpus=0-1,cpus=3,memdev=m1",
            "node",
            "cpu,node-id=1,socket-id=0,core-id=2",
            "dist,src=0,dst=1",
        ]
    )
    assert nodes == (NumaNode(1, (0, 1, 3)), NumaNode(1))
    assert cpus == (NumaCpu(1, Props({"socket-id": 0, "core-id": 2})),)
    assert str(cpus[0]) == "cpu,node-id=1,socket-id=0,core-id=2"
    for text in (
        "",
        "nod",
        "node,nodeid=x",
        "node,cpus=3-1",
        "node,cpu=1",
        "cpu,socket-id=1",
        "cpu,node-id=0",
        "cpu,x=1",
    ):
        with pytest.raises(VcpuUsageError):
            parse_numa([text])


def test_cpus_named_by_props():
    nodes = (NumaNode(0), NumaNode(1))

    def found(*cpus):
        slots = predict("x86_64", "q35", V100, parse_smp("4,sockets=2,cores=2"), nodes, cpus).slots
        return [slot.props["node-id"] for slot in slots]

    assert found(NumaCpu(1, Props({"socket-id": 0}))) == [1, 1, 0, 0]
    assert found(NumaCpu(1, Props({"core-id": 1})), NumaCpu(0, Props({"socket-id": 0, "core-id": 0}))) == [
        0,
        1,
        0,
        1,
    ]
    for bad in (
        (NumaCpu(2, Props({"socket-id": 0})),),
        (NumaCpu(0, Props({"die-id": 0})),),
        (NumaCpu(0, Props({"socket-id": 2})),),
        (NumaCpu(0, Props({"socket-id": 0})), NumaCpu(1, Props({"core-id": 0}))),
    ):
        with pytest.raises(VcpuRefused):
            found(*bad)


def test_nodes():
    two = (NumaNode(0), NumaNode(1))
    assert [s.props["node-id"] for s in q35("4,sockets=4,maxcpus=4", nodes=two).slots] == [0, 1, 0, 1]
    named = (NumaNode(0, (0, 1)), NumaNode(1, (3,)))
    assert [s.props["node-id"] for s in q35("4", nodes=named).slots] == [0, 0, 0, 1]
    for nodes in (
        (NumaNode(0, (0, 9)),),
        (NumaNode(0, (0,)), NumaNode(1, (0,))),
        (NumaNode(1),),
        (NumaNode(0), NumaNode(0)),
    ):
        with pytest.raises(VcpuRefused):
            q35("4", nodes=nodes)


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
        predict(arch, machine, version, parse_smp(text))
    assert caught.value.hint


def test_what_is_proven():
    assert is_proven("x86_64", "pc-q35-6.1", V72)
    assert is_proven("ppc64", "pseries", V111)
    assert not is_proven("x86_64", "q35", QemuVersion(8, 2))
    assert not is_proven("x86_64", "pc-q35-10.0", V72)
    assert not is_proven("loongarch64", "virt", V72)
    assert not is_proven("aarch64", "virt", V100)
    assert q35("2,maxcpus=240").is_certain
    assert not q35("2,maxcpus=254,sockets=127,threads=2,cores=1").is_certain
    # Few CPUs, and ids with gaps: 65 cores take 7 bits.
    assert not q35("2,sockets=3,cores=65,threads=1,maxcpus=195").is_certain
