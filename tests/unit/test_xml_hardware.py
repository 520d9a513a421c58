"""What of a domain's XML is started, and what is named or refused."""

from __future__ import annotations

import pytest

from qmpvcpu.core.bootargs import boot_args, machine_spec
from qmpvcpu.core.definition import Dimm, MemoryBackend, NumaCell
from qmpvcpu.core.hardware import GivenDevices, hardware_args
from qmpvcpu.core.layout import predict_layout
from qmpvcpu.core.machine.devices import Devices
from qmpvcpu.errors import VcpuRefused
from qmpvcpu.xml.domain import minimal_domain, read_domain
from qmpvcpu.xml.hardware import read_hardware

MIB = 1 << 20


def document(inner, head=""):
    text = f"<domain type='qemu'{head}><name>d</name><vcpu>2</vcpu>"
    return read_domain(f"{text}<os><type arch='x86_64' machine='q35'>hvm</type></os>{inner}</domain>".encode())


def line(definition):
    layout = predict_layout(machine_spec(definition), "x86_64", assume=True)
    return boot_args(definition, layout).arguments


def test_a_guest_that_is_to_be_protected_is_not_started_without():
    with pytest.raises(VcpuRefused, match="launchSecurity type='sev'"):
        read_hardware(document("<launchSecurity type='sev'><policy>1</policy></launchSecurity>")[0])


def test_what_the_guest_would_notice_is_named():
    inner = (
        "<iothreads>2</iothreads><features><acpi/><hyperv><relaxed state='on'/></hyperv></features>"
        "<cpu><maxphysaddr mode='emulate' bits='40'/></cpu><clock offset='localtime'/>"
        "<devices><iommu model='intel'/></devices>"
    )
    assert read_hardware(document(inner)[0]).left_out == (
        *("iothreads", "cpu/maxphysaddr", "clock offset='localtime'", "hyperv", "iommu"),
    )


CELLS = "<cell id='0' cpus='0' memory='65536'/><cell id='1' cpus='1' memory='0'/>"


def test_a_node_without_memory_has_no_backend():
    words = line(document(f"<cpu><numa>{CELLS}</numa></cpu>")[1])
    assert "node,nodeid=1,cpus=1" in words
    assert not [word for word in words if "size=0" in word]


def test_distances_are_started_and_all_of_them_are_there():
    cells = (
        "<cell id='0' cpus='0' memory='1024'><distances><sibling id='1' value='31'/></distances></cell>"
        "<cell id='1' cpus='1' memory='1024'/>"
    )
    words = line(document(f"<cpu><numa>{cells}</numa></cpu>")[1])
    assert [word for word in words if word.startswith("dist")] == [
        *("dist,src=0,dst=0,val=10", "dist,src=0,dst=1,val=31", "dist,src=1,dst=1,val=10"),
    ]


SPACE = "xmlns:q='urn:qmpvcpu:machine:1'"


@pytest.mark.parametrize(
    "inner",
    [
        "<q:option of='machine' name='dumpdtb' value='x'/>",
        "<q:option of='machine' name='a,b' value='x'/>",
        "<q:option of='machine' name='hpet' value='off,dumpdtb=x'/>",
        "<q:option of='shell' name='a' value='x'/>",
        "<q:memory id='a,size=1' cell='0'/>",
        "<q:memory id='a' type='rng-random'/>",
        "<q:dimm of='0' id='a' memdev='b,c' type='memory-backend-ram'/>",
    ],
)
def test_metadata_says_nothing_else_than_it_may(inner):
    with pytest.raises(VcpuRefused):
        document(f"<metadata><q:machine {SPACE}>{inner}</q:machine></metadata>")


def test_what_is_written_is_read_again():
    from dataclasses import replace

    from qmpvcpu.core.definition import QemuOptions

    definition = replace(
        document("")[1],
        memory=192 * MIB,
        max_memory=1 << 30,
        memory_slots=4,
        cpu="Haswell-noTSX,x2apic=on,svm=off",
        cells=(NumaCell(0, (0, 1), 64 * MIB - 512, ((1, 31),)), NumaCell(1, (), 0)),
        dimms=(Dimm(128 * MIB, 1, 2, 1 << 32, "stick", "d", "memory-backend-ram", (("prealloc", "on"),)),),
        options=QemuOptions(
            (("smm", "off"),),
            (("thread", "multi"),),
            (("phys-bits", "40"),),
            (MemoryBackend("m", 0, "memory-backend-memfd", (("share", "on"),)),),
        ),
    )
    devices = Devices(("-device", "virtio-rng-pci,id='<&>\""), has_defaults=True, has_serial=False)
    found, again = read_domain(minimal_domain(definition, devices))
    assert replace(again, vcpus=definition.vcpus, topology=None, dialect=None) == replace(
        definition, topology=None
    )
    hardware = read_hardware(found)
    assert (hardware.arguments, hardware.given) == (devices.arguments, GivenDevices(True, False))
    words = hardware_args(hardware, "x86_64", console="/c", agent="agent")
    assert words == ["-no-user-config", "-display", "none", *devices.arguments]
