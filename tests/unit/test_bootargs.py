"""The command line of a guest, from its XML and the layout of its machine."""

from __future__ import annotations

import pytest

from qmpvcpu.core.bootargs import BootStyle, boot_args, machine_spec, qemu_arch
from qmpvcpu.core.layout import MachineType, QemuFacts, predict_layout
from qmpvcpu.core.model import QemuVersion
from qmpvcpu.errors import VcpuRefused
from qmpvcpu.xml.domain import read_domain

FACTS = {
    "x86_64": QemuFacts(
        "x86_64", QemuVersion(10, 0, 2), {"q35": MachineType("pc-q35-10.0", True, "qemu64-x86_64-cpu")}
    ),
    "ppc64": QemuFacts(
        "ppc64",
        QemuVersion(10, 0, 2),
        {"pseries": MachineType("pseries-10.0", True, "power10_v2.0-spapr-cpu-core")},
    ),
}
NUMA = (
    "<cpu><topology sockets='2' cores='8' threads='1'/><numa>"
    "<cell id='0' cpus='0-6,^3' memory='256' unit='MiB'/>"
    "<cell id='1' cpus='3,7-15' memory='1' unit='GiB'/></numa></cpu>"
)


def domain(vcpu="<vcpu>4</vcpu>", more="", arch="x86_64", machine="q35", kind="qemu"):
    os = f"<os><type arch='{arch}' machine='{machine}'>hvm</type></os>"
    text = f"<domain type='{kind}'><name>d</name><memory unit='MiB'>512</memory>{vcpu}{os}{more}</domain>"
    return read_domain(text.encode())[1]


def rows(dialect="libvirt", **enabled):
    """`rows(_5="yes 2")`: vCPU 0, and 5 that is hotpluggable, of order 2."""
    out = ["<vcpu id='0' enabled='yes' hotpluggable='no'/>"]
    for key, value in enabled.items():
        pluggable, _, order = value.partition(" ")
        order = f" order='{order}'" if order else ""
        out.append(f"<vcpu id='{key[1:]}' enabled='yes' hotpluggable='{pluggable}'{order}/>")
    return f"<vcpu current='{len(out)}'>16</vcpu><vcpus>{''.join(out)}</vcpus>"


def line(definition, style=BootStyle.DEVICE, incoming=None):
    arch = qemu_arch(definition)
    layout = predict_layout(machine_spec(definition), arch, FACTS.get(arch), assume=True)
    return boot_args(definition, layout, style, incoming)


def pairs(args):
    return list(zip(args.arguments[::2], args.arguments[1::2], strict=True))


def test_plain():
    found = line(domain("<vcpu current='2'>4</vcpu>"))
    assert pairs(found) == [
        ("-machine", "q35"),
        ("-accel", "tcg"),
        ("-m", "size=524288k"),
        ("-smp", "2,maxcpus=4,sockets=4,cores=1,threads=1"),
    ]
    assert found.started == (0, 1) and not found.commands and not found.messages


def test_sparse_over_two_nodes_in_its_order():
    found = line(domain(rows(_1="no", _5="yes 4", _12="yes 3", _2="yes"), NUMA))
    words = pairs(found)
    assert ("-smp", "2,maxcpus=16,sockets=2,cores=8,threads=1") in words
    # The size is the nodes' sum.
    assert ("-m", "size=1310720k") in words
    assert [value for key, value in words if key == "-numa"] == [
        "node,nodeid=0,cpus=0-2,cpus=4-6,memdev=ram-node0",
        "node,nodeid=1,cpus=3,cpus=7-15,memdev=ram-node1",
    ]
    assert [value for key, value in words if key == "-device"] == [
        "qemu64-x86_64-cpu,id=vcpu12,thread-id=0,core-id=4,socket-id=1,node-id=1",
        "qemu64-x86_64-cpu,id=vcpu5,thread-id=0,core-id=5,socket-id=0,node-id=0",
        # No order: after those that have one.
        "qemu64-x86_64-cpu,id=vcpu2,thread-id=0,core-id=2,socket-id=0,node-id=0",
    ]
    assert found.started == (0, 1, 12, 5, 2)


def test_qmp_style_and_incoming():
    sparse = domain(rows(_5="yes"))
    found = line(sparse, BootStyle.QMP)
    assert found.arguments[-1] == "-S" and "-device" not in found.arguments
    assert [step["execute"] for step in found.commands] == ["device_add", "cont"]
    device = found.commands[0]["arguments"]
    assert device == {"driver": "qemu64-x86_64-cpu", "id": "vcpu5", "socket-id": 5, "core-id": 0, "thread-id": 0}
    assert found.to_json() == [*found.arguments, *found.commands]
    found = line(sparse, BootStyle.QMP, "defer")
    assert found.arguments[-2:] == ("-incoming", "defer") and [s["execute"] for s in found.commands] == [
        "device_add"
    ]
    assert line(sparse, incoming="unix:/x").arguments[-2:] == ("-incoming", "unix:/x")


def test_the_rfcs_dialect_starts_with_its_run():
    vcpus = "".join(f"<vcpu id='{n}' state='{'enabled' if n in (0, 1, 5) else 'disabled'}'/>" for n in range(8))
    found = line(domain(f"<vcpu current='3'>8</vcpu><vcpus>{vcpus}</vcpus>"))
    assert ("-smp", "2,maxcpus=8,sockets=8,cores=1,threads=1") in pairs(found)
    assert found.started == (0, 1, 5)


def test_a_core_at_a_time():
    topology = "<cpu><topology sockets='1' cores='4' threads='8'/></cpu>"
    vcpus = "".join(
        f"<vcpu id='{n}' enabled='{'yes' if core in (0, 2) else 'no'}' hotpluggable='{'yes' if core else 'no'}'/>"
        for core in range(4)
        for n in range(core * 8, core * 8 + 8)
    )
    cores = f"<vcpu current='16'>32</vcpu><vcpus>{vcpus}</vcpus>"
    found = line(domain(cores, topology, "ppc64le", "pseries"))
    assert ("-smp", "8,maxcpus=32,sockets=1,cores=4,threads=8") in pairs(found)
    assert found.arguments[-1] == "power10_v2.0-spapr-cpu-core,id=vcpu16,core-id=16,node-id=0"


def test_what_stands_behind_a_gap_is_plugged_and_said():
    found = line(domain(rows(_3="no")))
    assert found.started == (0, 3) and "vCPU 3" in found.messages[0]


@pytest.mark.parametrize(
    ("cpu", "kind", "wanted"),
    [
        ("<cpu mode='host-passthrough'/>", "kvm", "host"),
        ("<cpu mode='host-model'/>", "qemu", "max"),
        ("<cpu mode='maximum'/>", "kvm", "max"),
        (
            "<cpu mode='custom'><model fallback='allow'>EPYC</model><feature policy='disable' name='svm'/></cpu>",
            "qemu",
            "EPYC,svm=off",
        ),
        (
            "<cpu><model>qemu64</model><feature name='x2apic'/><feature policy='optional' name='y'/></cpu>",
            "qemu",
            "qemu64,x2apic=on",
        ),
        ("<cpu><topology sockets='4' cores='1' threads='1'/></cpu>", "qemu", None),
    ],
)
def test_cpu_models(cpu, kind, wanted):
    found = domain(more=cpu, kind=kind)
    assert found.cpu == wanted and machine_spec(found).accel == ("kvm" if kind == "kvm" else "tcg")


def test_memory_of_nodes():
    def cells(first, second):
        return f"<cpu><numa><cell cpus='0-1'{first}/><cell cpus='2-3'{second}/></numa></cpu>"

    found = line(domain(more=cells("", "")))
    assert [value for key, value in pairs(found) if key == "-object"] == [
        f"memory-backend-ram,id=ram-node{node},size={256 << 20}" for node in (0, 1)
    ]
    for bad in (cells(" memory='1024'", ""),):
        with pytest.raises(VcpuRefused, match="cell 1 has no memory"):
            line(domain(more=bad))
    with pytest.raises(VcpuRefused, match="cell 0-1 has no memory"):
        line(
            read_domain(
                b"<domain><name>d</name><vcpu>4</vcpu><os><type arch='x86_64' machine='q35'/></os>"
                + cells("", "").encode()
                + b"</domain>"
            )[1]
        )


@pytest.mark.parametrize(
    "text", ["<memory unit='furlong'>1</memory>", "<memory>-1</memory>", "<memory>x</memory>"]
)
def test_sizes_that_are_none(text):
    with pytest.raises(VcpuRefused, match="memory"):
        read_domain(f"<domain><name>d</name>{text}</domain>".encode())


def test_units_are_libvirts():
    for unit, factor in (
        ("b", 1),
        ("KB", 1000),
        ("KiB", 1024),
        ("k", 1024),
        ("MB", 10**6),
        ("G", 1 << 30),
        ("TiB", 1 << 40),
    ):
        found = read_domain(f"<domain><name>d</name><memory unit='{unit}'>3</memory></domain>".encode())[1]
        assert found.memory == 3 * factor


def test_what_cannot_boot():
    with pytest.raises(VcpuRefused, match="names no architecture"):
        qemu_arch(read_domain(b"<domain><name>d</name></domain>")[1])
    # Half a core, where the machine says that it is one.
    core = domain(rows(_1="yes"), arch="ppc64", machine="pseries")
    whole = domain(
        "<vcpu>16</vcpu>", "<cpu><topology sockets='1' cores='8' threads='2'/></cpu>", "ppc64", "pseries"
    )
    layout = predict_layout(machine_spec(whole), "ppc64", FACTS["ppc64"])
    with pytest.raises(VcpuRefused, match="0-1 are one core"):
        boot_args(core, layout)
    few = predict_layout(machine_spec(domain("<vcpu>4</vcpu>")), "x86_64")
    with pytest.raises(VcpuRefused, match="room for 4"):
        boot_args(domain("<vcpu>5</vcpu>"), few)
