"""What of a domain's XML is started, and what is named or refused."""

from __future__ import annotations

import pytest

from qmpvcpu import VcpuRefused
from tests.support.claims import claim, claimed_by, hardware
from tests.support.machines import boot

MIB = 1 << 20


def document(inner):
    text = "<domain type='qemu'><name>d</name><vcpu>2</vcpu>"
    return f"{text}<os><type arch='x86_64' machine='q35'>hvm</type></os>{inner}</domain>"


def test_a_guest_that_is_to_be_protected_is_not_started_without():
    with pytest.raises(VcpuRefused, match="launchSecurity type='sev'"):
        hardware(
            document("<launchSecurity type='sev'><policy>1</policy></launchSecurity>").encode()
        )


def test_what_the_guest_would_notice_is_named():
    inner = (
        "<iothreads>2</iothreads><features><acpi/><hyperv><relaxed state='on'/></hyperv></features>"
        "<cpu><maxphysaddr mode='emulate' bits='40'/></cpu><clock offset='localtime'/>"
        "<devices><iommu model='intel'/></devices>"
    )
    assert hardware(document(inner).encode()).left_out == (
        *("iothreads", "cpu/maxphysaddr", "clock offset='localtime'", "hyperv", "iommu"),
    )


CELLS = "<cell id='0' cpus='0' memory='65536'/><cell id='1' cpus='1' memory='0'/>"


def test_a_node_without_memory_has_no_backend():
    words = boot(document(f"<cpu><numa>{CELLS}</numa></cpu>")).arguments
    assert "node,nodeid=1,cpus=1" in words
    assert not [word for word in words if "size=0" in word]


def test_distances_are_started_and_all_of_them_are_there():
    cells = (
        "<cell id='0' cpus='0' memory='1024'><distances><sibling id='1'"
        " value='31'/></distances></cell>"
        "<cell id='1' cpus='1' memory='1024'/>"
    )
    words = boot(document(f"<cpu><numa>{cells}</numa></cpu>")).arguments
    assert [word for word in words if word.startswith("dist")] == [
        *("dist,src=0,dst=0,val=10", "dist,src=0,dst=1,val=31"),
        *("dist,src=1,dst=0,val=31", "dist,src=1,dst=1,val=10"),
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
        claimed_by(
            document(f"<metadata><q:machine {SPACE}>{inner}</q:machine></metadata>").encode()
        )


def test_what_is_written_is_read_again():
    """A definition with everything that it can say of a machine."""
    words = [
        *("qemu", "-machine", "q35,smm=off", "-accel", "tcg,thread=multi"),
        *("-cpu", "Haswell-noTSX,x2apic=on,svm=off,phys-bits=40"),
        *("-object", "memory-backend-memfd,id=m,size=67108352b,share=on"),
        *("-numa", "node,nodeid=0,memdev=m", "-numa", "node,nodeid=1", "-numa", "node,nodeid=2"),
        *(
            "-numa",
            "dist,src=0,dst=1,val=31",
            "-object",
            "memory-backend-ram,id=d,size=128M,prealloc=on",
        ),
    ]
    stick = {
        "id": "stick",
        "memdev": "/objects/d",
        "size": 128 * MIB,
        "node": 1,
        "slot": 2,
        "addr": 1 << 32,
    }
    replies = {
        "query-memdev": [{"id": "m", "size": 64 * MIB - 512}, {"id": "d", "size": 128 * MIB}],
        "query-memory-size-summary": {"base-memory": 64 * MIB},
        "query-memory-devices": [{"type": "dimm", "data": stick}],
        "memory": {"max-size": 1 << 30, "slots": 4},
    }
    made = claim(words, replies)
    said = made.definition
    assert (said["cpu"], said["memory"], said["max_memory"], said["memory_slots"]) == (
        *("Haswell-noTSX,x2apic=on,svm=off", 192 * MIB, 1 << 30, 4),
    )
    assert [(cell["cpus"], cell["memory"], cell["distances"]) for cell in said["cells"]] == [
        *(((0, 1), 64 * MIB - 512, ((1, 31),)), ((2, 3), 0, ()), ((), 0, ())),
    ]
    (dimm,) = said["dimms"]
    assert dimm == {
        "size": 128 * MIB,
        "node": 1,
        "slot": 2,
        "address": 1 << 32,
        "id": "stick",
        "memdev": "d",
        "driver": "memory-backend-ram",
        "options": (("prealloc", "on"),),
    }
    backend = {
        "id": "m",
        "cell": 0,
        "driver": "memory-backend-memfd",
        "options": (("share", "on"),),
    }
    assert said["options"] == {
        "machine": (("smm", "off"),),
        "accel": (("thread", "multi"),),
        "cpu": (("phys-bits", "40"),),
        "backends": (backend,),
        "is_one_block": False,
        "is_exact": True,
    }
    assert claimed_by(made.xml) == said


def test_a_memory_device_without_an_id_keeps_its_backend():
    replies = {
        "query-memdev": [{"id": "d", "size": 128 * MIB}],
        "query-memory-devices": [
            {"type": "dimm", "data": {"memdev": "/objects/d", "size": 128 * MIB, "slot": 0}}
        ],
        "query-memory-size-summary": {"base-memory": 64 * MIB},
        "memory": {"max-size": 1 << 30, "slots": 4},
    }
    made = claim(
        ["qemu", "-object", "memory-backend-ram,id=d,size=128M", "-device", "pc-dimm,memdev=d"],
        replies,
    )
    (dimm,) = made.definition["dimms"]
    assert (dimm["id"], dimm["memdev"]) == (None, "d")
    assert claimed_by(made.xml)["dimms"] == (dimm,)


def test_another_memory_device_without_an_id_is_one_of_the_devices():
    replies = {"query-memory-devices": [{"type": "nvdimm", "data": {"memdev": "/objects/m"}}]}
    words = ["-object", "memory-backend-ram,id=m,size=1M", "-device", "nvdimm,memdev=m"]
    assert claim(["qemu", *words], replies).left_out == ()


def test_devices_that_are_written_are_started_again():
    words = ["-device", "virtio-rng-pci,id='<&>\"", "-serial", "none"]
    made = claim(["qemu", *words], {})
    assert (made.devices, made.has_defaults, made.has_serial) == (tuple(words), True, False)
    assert hardware(made.xml).arguments == ["-no-user-config", "-display", "none", *words]


def started(os, features=""):
    """What `start` makes of firmware, without what it gives every guest; and what it leaves out."""
    xml = (
        "<domain><name>d</name><vcpu>1</vcpu><os><type"
        f" arch='x86_64'>hvm</type>{os}</os>{features}</domain>"
    )
    found = hardware(xml.encode())
    words = found.arguments[found.arguments.index("chardev:console") + 1 :]
    return words[: words.index("-device")], found.left_out


def test_firmware_in_flash_is_started_with_its_variables():
    secure = "<loader readonly='yes' secure='yes' type='pflash'>/c,1</loader><nvram>/v</nvram>"
    assert started(secure, "<features><smm state='on'/></features>") == (
        [
            *("-machine", "smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on"),
            *("-drive", "if=pflash,unit=0,file=/c,,1,format=raw,readonly=on"),
            *("-drive", "if=pflash,unit=1,file=/v,format=raw"),
        ],
        (),
    )


def test_flash_has_the_format_that_is_written():
    file = "<nvram type='file' format='qcow2'><source file='/v'/></nvram>"
    assert started(f"<loader readonly='yes' type='pflash' format='qcow2'>/c</loader>{file}")[0] == [
        *("-drive", "if=pflash,unit=0,file=/c,format=qcow2,readonly=on"),
        *("-drive", "if=pflash,unit=1,file=/v,format=qcow2"),
    ]


def test_a_rom_is_firmware_without_a_flash_chip():
    assert started("<loader type='rom'>/c</loader>") == (["-bios", "/c"], ())


@pytest.mark.parametrize(
    ("os", "left_out"),
    [
        ("<loader type='pflash'>/c</loader><nvram/>", ("os/nvram",)),
        (
            "<loader type='pflash'>/c</loader><nvram template='/t'>/v</nvram>",
            ("os/nvram template",),
        ),
        ("<loader type='rom'>/c</loader><nvram>/v</nvram>", ("os/nvram",)),
    ],
)
def test_variables_that_are_not_started_are_named(os, left_out):
    assert started(os)[1] == left_out


def test_firmware_that_is_named_is_not_left_out():
    assert started("<loader type='pflash'>/c</loader>")[1] == ()
    xml = (
        "<domain><name>d</name><vcpu>1</vcpu><os firmware='efi'><type"
        " arch='x86_64'>hvm</type>{}</os></domain>"
    )
    assert hardware(xml.format("").encode()).left_out == ("os firmware='efi'",)
    assert hardware(xml.format("<loader type='pflash'>/c</loader>").encode()).left_out == ()


def test_memory_may_have_a_maximum_without_slots():
    replies = {"query-memory-size-summary": {"base-memory": 64 * MIB}, "memory": {"size": 64 * MIB}}
    made = claim(["qemu", "-m", "64,maxmem=1G"], replies)
    assert (made.definition["max_memory"], made.definition["memory_slots"]) == (1 << 30, None)
    assert claimed_by(made.xml) == made.definition


def test_a_memory_device_of_the_command_line_is_among_the_devices():
    replies = {"query-memory-devices": [{"type": "nvdimm", "data": {"id": "nv"}}]}
    words = ["-object", "memory-backend-ram,id=m,size=1M", "-device", "nvdimm,id=nv,memdev=m"]
    assert claim(["qemu", *words], replies).left_out == ()
    assert claim(["qemu"], replies).left_out == ("the memory device nvdimm 'nv'",)


def test_paths_of_memory_may_have_commas_and_machine_options_are_named():
    backend = ["-object", "memory-backend-file,id=m,size=1M,mem-path=/a,,b"]
    words = ["-machine", "q35,memory-backend=m,x-odd=c,,d", *backend]
    made = claim(["qemu", *words], {"query-memdev": [{"id": "m", "size": MIB}]})
    assert made.left_out == ("-machine x-odd=c,d",)
    assert claimed_by(made.xml)["options"]["backends"][0]["options"] == (("mem-path", "/a,b"),)


def test_attributes_of_memory_are_named():
    hmat = "hmat-lb,initiator=0,target=0,hierarchy=memory,data-type=access-latency,latency=5"
    made = claim(["qemu", "-numa", "node,nodeid=0,initiator=0", "-numa", hmat], {})
    assert made.left_out == ("-numa node,nodeid=0,initiator=0", f"-numa {hmat}")
