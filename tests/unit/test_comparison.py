"""Two machines side by side, and devices without the host behind them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.claims import claim, differences, machine_of, shared_with_the_first, without_the_host

NEW, OLD = (11, 1, 0), (7, 2, 0)

ONE = {
    "version": NEW,
    "memory": 128 << 20,
    "blocks": {"m0": 64 << 20, "m1": 64 << 20, "/rom@etc/acpi/tables": 1 << 21},
    "places": {"m0": 0, "m1": 64 << 20},
    "nodes": {0: 64, 1: 64},
    "machine": {"smm": True, "kvm-type": ""},
    "cpu": {"x2apic": True, "svm": False, "phys-bits": 40},
    "pci": {"0:02.0": "1af4:1005"},
    "added": ("virtio-rng-pci",),
    "types": ("ICH9-SMB", "virtio-rng-pci"),
}


def test_equal_machines_have_no_difference():
    assert differences(ONE, ONE) == []


def test_every_difference_is_named_with_both_sides():
    other = {
        **ONE,
        "memory": 192 << 20,
        "blocks": {**ONE["blocks"], "m1": 128 << 20},
        "nodes": {0: 64, 1: 128},
        "machine": {"smm": False},
        "cpu": {"x2apic": False, "svm": True, "phys-bits": 36},
        "pci": {},
        "types": ("ICH9-SMB",),
        "added": (),
    }
    assert differences(ONE, other) == [
        "memory: 131072 KiB at the source, 196608 KiB here",
        "RAM block 'm1': 65536 KiB at the source, 131072 KiB here",
        "memory of NUMA node 1: 64 MiB at the source, 128 MiB here",
        "PCI device at 0:02.0: 1af4:1005 at the source, none here",
        "device virtio-rng-pci: 1 at the source, none here",
        "-machine smm: on at the source, off here",
        "CPU features: x2apic at the source, svm here",
        "CPU property phys-bits: 40 at the source, 36 here",
    ]


def test_equal_blocks_the_other_way_round_are_a_difference():
    swapped = {**ONE, "places": {"m0": 64 << 20, "m1": 0}}
    assert differences(ONE, swapped) == [
        "address of the RAM block 'm0': 0x0 at the source, 0x4000000 here",
        "address of the RAM block 'm1': 0x4000000 at the source, 0x0 here",
    ]


def test_another_version_calls_its_own_devices_otherwise():
    older = {
        **ONE,
        "version": OLD,
        "blocks": {"m0": 64 << 20, "m1": 64 << 20},
        "cpu": {},
        "machine": {},
        "types": ("ICH9 SMB", "virtio-rng-pci"),
    }
    assert differences(ONE, older) == []
    assert differences(ONE, {**older, "added": (), "types": ("ICH9 SMB",)}) == [
        "device virtio-rng-pci: 1 at the source, none here"
    ]


REPLY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
)


@given(
    st.fixed_dictionaries(
        dict.fromkeys(("memory", "ramblock", "memdevs", "mtree", "numa", "pci", "machine"), REPLY)
    )
)
def test_odd_replies_are_not_there(replies):
    assert machine_of(replies)["cpu"] == {}


def test_blocks_of_7_2_and_of_11_1_are_read():
    head = "              Block Name    PSize              Offset               Used              Total"
    row = "                  pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000"
    for end in ("", "                HVA  RO"), ("", "  0x00007ffb6fa00000  rw"):
        text = f"{head}{end[0]}\n{row}{end[1]}\n"
        assert machine_of({"ramblock": {"human-readable-text": text}})["blocks"] == {"pc.ram": 128 << 20}


def test_what_is_behind_a_bridge_counts_by_its_type_alone():
    """QEMU lists it once firmware has numbered the bus, which a twin never does."""

    def bus(number):
        behind = [{"bus": number, "slot": 0, "function": 0, "id": {"vendor": 0x1AF4, "device": 0x1041}}]
        bridge = {"bus": {"number": 0}, "devices": behind}
        port = {"bus": 0, "slot": 3, "function": 0, "id": {"vendor": 0x1B36, "device": 0xC}, "pci_bridge": bridge}
        return machine_of({"pci": [{"bus": 0, "devices": [port]}]})["pci"]

    assert bus(0) == bus(7) == {"0:03.0": "1b36:000c"}


# -- devices ----------------------------------------------------------------------------------------


def devices(*words, folder=None):
    replies = {"query-memdev": [{"id": "m0", "size": 1 << 20}]}
    return claim(["qemu", *words], replies, driver="qemu64-x86_64-cpu", folder=folder)


def test_monitors_memory_and_cpus_are_no_devices():
    found = devices(
        *("-nodefaults", "-qmp", "chardev:mon", "-chardev", "socket,id=mon,fd=3", "-pidfile", "x"),
        *("-machine", "memory-backend=m0", "-object", "memory-backend-ram,id=m0,size=1M"),
        *("-device", "qemu64-x86_64-cpu,id=v,socket-id=1", "-device", "virtio-rng-pci"),
    )
    assert (found.devices, found.has_defaults, found.has_serial) == (("-device", "virtio-rng-pci"), False, False)
    assert found.left_out == ()


def test_the_agents_port_gets_the_chardev_of_start():
    port = "virtserialport,chardev=ga,name=org.qemu.guest_agent.0,nr=2"
    found = devices("-chardev", "socket,id=ga,path=/x,server=on", "-device", port)
    assert found.devices == ("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0,nr=2")


def test_descriptors_of_the_first_process_are_named():
    found = devices("-netdev", "tap,id=n,fd=9", "-device", "virtio-net-pci,netdev=n", "-frobnicate", "x")
    assert found.left_out == ("-netdev tap,id=n,fd=9", "-frobnicate x")
    assert found.devices[:2] == ("-netdev", "user,id=n")


def test_files_get_their_whole_paths():
    words = ("-drive", "file=a.img,if=virtio", "-cdrom", "b.iso", "-drive", "file=nbd:unix:/s,id=n", "-hda", "/c")
    found = devices(*words, folder="/images")
    assert found.devices == (
        *("-drive", "file=/images/a.img,if=virtio", "-cdrom", "/images/b.iso"),
        *("-drive", "file=nbd:unix:/s,id=n", "-hda", "/c"),
    )
    assert devices(*words).left_out == (
        "the folder of the file in '-drive file=a.img,if=virtio'",
        "the folder of the file in '-cdrom b.iso'",
    )


def test_what_a_second_qemu_would_take_from_the_guest():
    words = (
        "-chardev",
        "socket,id=c,path=/s,server=on",
        "-chardev",
        "null,id=n",
        "-chardev",
        "socket,id=t,port=4,host=h",
    )
    memory = "memory-backend-file,id=m,size=1M,mem-path=/m,share=on"
    found = shared_with_the_first([*words, "-object", memory])
    assert found == ([f"-object {memory}"], ["-chardev socket,id=c,path=/s,server=on"])


def test_a_twin_touches_nothing_of_the_host():
    words = without_the_host(
        [
            *("-drive", "file=/d,,1,if=virtio,id=x,format=raw", "-hda", "/e", "-cdrom", "/f"),
            *("-blockdev", '{"driver":"file","filename":"/g","node-name":"n"}'),
            *("-netdev", "tap,id=t,ifname=tap0", "-nic", "tap,model=e1000,mac=52:54:00:00:00:01"),
            *("-chardev", "socket,path=/h,id=c,server=on", "-serial", "unix:/i,server=on"),
            *("-object", "memory-backend-file,id=m,size=1M,mem-path=/j,share=on"),
        ]
    )
    text = " ".join(words)
    assert not [path for path in ("/d", "/e", "/f", "/g", "/h", "/i", "/j", "tap") if path in text]
    assert "-object memory-backend-ram,id=m,size=1M" in text
    assert "-nic user,model=e1000,mac=52:54:00:00:00:01" in text


@given(st.lists(st.text(max_size=10), max_size=8))
def test_anything_can_be_hollowed(words):
    assert isinstance(without_the_host(words), list)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["-object", "filter-dump,id=f,netdev=n,file=x.pcap"], []),
        (["-object", "input-linux,id=i,evdev=/dev/input/event0"], []),
        (["-object", "iothread,id=t"], ["-object", "iothread,id=t"]),
        (["-object", "rng-random,id=r,filename=/dev/random"], ["-object", "rng-builtin,id=r"]),
        (["-audiodev", "wav,id=a,path=x.wav"], ["-audiodev", "none,id=a"]),
        (["-overcommit", "mem-lock=on"], []),
        (["-icount", "shift=auto,rr=record,rrfile=x"], []),
    ],
)
def test_a_twin_does_nothing_to_files_and_memory_of_the_host(given, kept):
    assert without_the_host(given) == kept
