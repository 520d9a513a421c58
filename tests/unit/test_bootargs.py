"""The command line of a guest, from its XML and the layout of its machine."""

from __future__ import annotations

import pytest

from qmpvcpu import VcpuRefused
from tests.support.machines import boot, memory

#: What was learned of each QEMU 10.0.
KNOWN = {
    "x86_64": {
        "arch": "x86_64",
        "version": [10, 0, 2],
        "machines": {"q35": ["pc-q35-10.0", True, "qemu64-x86_64-cpu"]},
        "cpu_types": {},
    },
    "ppc64": {
        "arch": "ppc64",
        "version": [10, 0, 2],
        "machines": {"pseries": ["pseries-10.0", True, "power10_v2.0-spapr-cpu-core"]},
        "cpu_types": {},
    },
}
NUMA = (
    "<cpu><topology sockets='2' cores='8' threads='1'/><numa>"
    "<cell id='0' cpus='0-6,^3' memory='256' unit='MiB'/>"
    "<cell id='1' cpus='3,7-15' memory='1' unit='GiB'/></numa></cpu>"
)


def domain(vcpu="<vcpu>4</vcpu>", more="", arch="x86_64", machine="q35", kind="qemu"):
    os = f"<os><type arch='{arch}' machine='{machine}'>hvm</type></os>"
    return (
        f"<domain type='{kind}'><name>d</name><memory"
        f" unit='MiB'>512</memory>{vcpu}{os}{more}</domain>"
    )


def listed(first="", **enabled):
    """`listed(_5="yes 2")`: vCPU 0, with `first` among its attributes, and 5 that is hotpluggable,
    of order 2.
    """
    out = [f"<vcpu id='0' enabled='yes' hotpluggable='no'{first}/>"]
    for key, value in enabled.items():
        pluggable, _, order = value.partition(" ")
        order = f" order='{order}'" if order else ""
        out.append(f"<vcpu id='{key[1:]}' enabled='yes' hotpluggable='{pluggable}'{order}/>")
    return f"<vcpu current='{len(out)}'>16</vcpu><vcpus>{''.join(out)}</vcpus>"


def line(xml, **more):
    return boot(xml, KNOWN["ppc64" if "pseries" in xml else "x86_64"], **more)


# -- all there from the start ----------------------------------------------------------------------

PLAIN = domain("<vcpu current='2'>4</vcpu>")


def test_a_plain_guest_needs_four_options():
    assert line(PLAIN).arguments == (
        *("-machine", "q35"),
        *("-accel", "tcg"),
        *("-m", "size=524288k"),
        *("-smp", "2,maxcpus=4,sockets=4,cores=1,threads=1"),
    )


def test_a_plain_guest_starts_with_its_first_vcpus():
    assert line(PLAIN).started == (0, 1)


def test_a_plain_guest_needs_nothing_more():
    found = line(PLAIN)
    assert (found.commands, found.messages) == ((), ())


def test_nodes_have_all_vcpus_the_first_one_those_that_no_cell_names():
    numa = (
        "<cpu><numa><cell id='0' cpus='1' memory='256'/><cell id='1' cpus='2'"
        " memory='256'/></numa></cpu>"
    )
    assert line(domain(more=numa)).values("-numa") == [
        *(
            "node,nodeid=0,cpus=0-1,cpus=3,memdev=ram-node0",
            "node,nodeid=1,cpus=2,memdev=ram-node1",
        ),
    ]


# -- memory ----------------------------------------------------------------------------------------


ODD_CELLS = (
    "<cpu><numa><cell id='0' cpus='0-1' memory='150001' unit='KiB'/>"
    "<cell id='1' cpus='2-3' memory='150001' unit='KiB'/></numa></cpu>"
)
READ = "<metadata><q:machine xmlns:q='urn:qmpvcpu:machine:1' sizes='exact'/></metadata>"


@pytest.mark.parametrize(
    ("xml", "size"),
    [
        (domain().replace(">512<", ">500<"), "size=512000k"),
        (domain(arch="ppc64", machine="pseries").replace(">512<", ">500<"), "size=524288k"),
        (domain(more=ODD_CELLS), "size=301056k"),
        (domain(more=ODD_CELLS + READ), "size=300002k"),
    ],
)
def test_memory_is_rounded_up_as_libvirt_does_unless_a_qemu_has_had_it(xml, size):
    assert line(xml).values("-m") == [size]


def test_that_memory_is_rounded_up_is_told():
    assert line(domain(more=ODD_CELLS)).messages == (
        "memory is rounded up to multiples of 1 MiB, as libvirt does",
    )


# -- some are plugged ------------------------------------------------------------------------------


@pytest.fixture(name="sparse")
def sparse_guest_over_two_nodes():
    return line(domain(listed(" order='1'", _1="no 2", _5="yes 4", _12="yes 3", _2="yes 5"), NUMA))


def test_smp_has_what_is_there_without_a_gap(sparse):
    assert sparse.values("-smp") == ["2,maxcpus=16,sockets=2,cores=8,threads=1"]


def test_the_memory_of_a_numa_guest_is_the_sum_of_its_nodes(sparse):
    assert sparse.values("-m") == ["size=1310720k"]


def test_nodes_name_all_their_vcpus(sparse):
    assert sparse.values("-numa") == [
        "node,nodeid=0,cpus=0-2,cpus=4-6,memdev=ram-node0",
        "node,nodeid=1,cpus=3,cpus=7-15,memdev=ram-node1",
    ]


def test_vcpus_are_plugged_in_their_order(sparse):
    assert sparse.values("-device") == [
        "qemu64-x86_64-cpu,id=vcpu12,thread-id=0,core-id=4,socket-id=1,node-id=1",
        "qemu64-x86_64-cpu,id=vcpu5,thread-id=0,core-id=5,socket-id=0,node-id=0",
        "qemu64-x86_64-cpu,id=vcpu2,thread-id=0,core-id=2,socket-id=0,node-id=0",
    ]


def test_a_sparse_guest_starts_with_those_that_are_plugged_too(sparse):
    assert sparse.started == (0, 1, 12, 5, 2)


SPARSE = domain(listed(_5="yes"))


@pytest.fixture(name="paused")
def guest_that_is_plugged_over_qmp():
    return line(SPARSE, style="qmp")


def test_over_qmp_a_guest_starts_paused(paused):
    assert paused.arguments[-1] == "-S"


def test_over_qmp_there_is_no_device(paused):
    assert paused.values("-device") == []


def test_over_qmp_vcpus_are_plugged_and_then_it_runs(paused):
    device = {
        "driver": "qemu64-x86_64-cpu",
        "id": "vcpu5",
        "socket-id": 5,
        "core-id": 0,
        "thread-id": 0,
    }
    assert paused.commands == ({"execute": "device_add", "arguments": device}, {"execute": "cont"})


def test_the_json_is_arguments_and_then_commands(paused):
    assert paused.json == [*paused.arguments, *paused.commands]


def test_a_guest_that_comes_from_elsewhere_does_not_start_over_qmp():
    found = line(SPARSE, style="qmp", incoming="defer")
    assert [command["execute"] for command in found.commands] == ["device_add"]


@pytest.mark.parametrize(("style", "uri"), [("qmp", "defer"), ("device", "unix:/x")])
def test_a_guest_that_comes_from_elsewhere_waits_for_it(style, uri):
    assert line(SPARSE, style=style, incoming=uri).arguments[-2:] == ("-incoming", uri)


# -- other dialects and machines -------------------------------------------------------------------

RFC = "".join(
    f"<vcpu id='{n}' state='{'enabled' if n in (0, 1, 5) else 'disabled'}'/>" for n in range(8)
)


@pytest.fixture(name="rfc")
def guest_in_the_rfcs_dialect():
    return line(domain(f"<vcpu current='3'>8</vcpu><vcpus>{RFC}</vcpus>"))


def test_the_rfcs_dialect_starts_with_its_run(rfc):
    assert rfc.values("-smp") == ["2,maxcpus=8,sockets=8,cores=1,threads=1"]


def test_the_rfcs_dialect_plugs_the_rest(rfc):
    assert rfc.started == (0, 1, 5)


@pytest.fixture(name="cores")
def guest_with_the_first_and_third_of_four_cores():
    topology = "<cpu><topology sockets='1' cores='4' threads='8'/></cpu>"
    vcpus = "".join(
        f"<vcpu id='{n}' enabled='{'yes' if core in (0, 2) else 'no'}'"
        f" hotpluggable='{'yes' if core else 'no'}'/>"
        for core in range(4)
        for n in range(core * 8, core * 8 + 8)
    )
    cores = f"<vcpu current='16'>32</vcpu><vcpus>{vcpus}</vcpus>"
    return line(domain(cores, topology, "ppc64le", "pseries"))


def test_smp_has_whole_cores(cores):
    assert cores.values("-smp") == ["8,maxcpus=32,sockets=1,cores=4,threads=8"]


def test_a_core_is_plugged_at_a_time(cores):
    assert cores.values("-device") == ["power10_v2.0-spapr-cpu-core,id=vcpu16,core-id=16,node-id=0"]


@pytest.mark.parametrize(
    ("cpu", "kind", "wanted"),
    [
        ("<cpu mode='host-passthrough'/>", "kvm", ["host"]),
        ("<cpu mode='host-model'/>", "qemu", ["max"]),
        ("<cpu mode='maximum'/>", "kvm", ["max"]),
        (
            "<cpu mode='custom'><model fallback='allow'>EPYC</model><feature policy='disable'"
            " name='svm'/></cpu>",
            "qemu",
            ["EPYC,svm=off"],
        ),
        (
            "<cpu><model>qemu64</model><feature name='x2apic'/><feature policy='optional'"
            " name='y'/></cpu>",
            "qemu",
            ["qemu64,x2apic=on"],
        ),
        ("<cpu><topology sockets='4' cores='1' threads='1'/></cpu>", "qemu", []),
    ],
)
def test_cpu_models(cpu, kind, wanted):
    assert line(domain(more=cpu, kind=kind)).values("-cpu") == wanted


@pytest.mark.parametrize(("kind", "accel"), [("kvm", "kvm"), ("qemu", "tcg")])
def test_the_kind_of_a_domain_is_its_accelerator(kind, accel):
    assert line(domain(kind=kind)).values("-accel") == [accel]


# -- memory ----------------------------------------------------------------------------------------


def cells(first="", second=""):
    return f"<cpu><numa><cell cpus='0-1'{first}/><cell cpus='2-3'{second}/></numa></cpu>"


def test_nodes_that_do_not_say_share_the_memory():
    assert line(domain(more=cells())).values("-object") == [
        f"memory-backend-ram,id=ram-node{node},size={256 << 20}" for node in (0, 1)
    ]


def test_a_node_without_memory_where_another_says_its_own_is_refused():
    with pytest.raises(VcpuRefused, match="cell 1 has no memory"):
        line(domain(more=cells(" memory='1024'")))


def test_nodes_without_memory_in_a_domain_without_any_are_refused():
    with pytest.raises(VcpuRefused, match="cell 0-1 has no memory"):
        line(domain(more=cells()).replace("<memory unit='MiB'>512</memory>", ""))


@pytest.mark.parametrize(
    "text", ["<memory unit='furlong'>1</memory>", "<memory>-1</memory>", "<memory>x</memory>"]
)
def test_sizes_that_are_none(text):
    with pytest.raises(VcpuRefused, match="memory"):
        memory(f"<domain><name>d</name>{text}</domain>")


@pytest.mark.parametrize(
    ("unit", "factor"),
    [
        ("b", 1),
        ("KB", 1000),
        ("KiB", 1024),
        ("k", 1024),
        ("MB", 10**6),
        ("G", 1 << 30),
        ("TiB", 1 << 40),
    ],
)
def test_units_are_libvirts(unit, factor):
    assert memory(f"<domain><name>d</name><memory unit='{unit}'>3</memory></domain>") == 3 * factor


# -- what cannot boot ------------------------------------------------------------------------------


def test_half_a_core_cannot_boot_where_the_machine_says_that_it_is_one():
    half = domain(listed(_1="yes"), arch="ppc64", machine="pseries")
    topology = "<cpu><topology sockets='1' cores='8' threads='2'/></cpu>"
    whole = domain("<vcpu>16</vcpu>", topology, "ppc64", "pseries")
    with pytest.raises(VcpuRefused, match="0-1 are one core"):
        line(half, machine_of=whole)


def test_more_vcpus_than_the_machine_has_cannot_boot():
    with pytest.raises(VcpuRefused, match="room for 4"):
        line(domain("<vcpu>5</vcpu>"), machine_of=domain("<vcpu>4</vcpu>"))
