"""Two machines side by side, and devices without the host behind them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.claims import (
    claim,
    differences,
    disks_behind,
    in_an_unknown_folder,
    machine_of,
    missed,
    not_verifiable,
    only_one_can_have,
    shared_with_the_first,
    without_the_host,
)

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


NUMA = ("-numa", "node,nodeid=0,cpus=0-1", "-numa", "node,nodeid=1,cpus=2-3")
LATENCY = "hmat-lb,initiator=0,target=1,hierarchy=memory,data-type=access-latency,latency=10"


def of_line(*words):
    return {**machine_of({}, ["qemu", *NUMA, *words]), "version": NEW}


def test_distances_are_those_of_the_command_lines():
    there = of_line("-numa", "dist,src=0,dst=1,val=31")
    assert differences(there, there) == []
    assert (
        differences(
            there, of_line("-numa", "dist,src=0,dst=1,val=31", "-numa", "dist,src=1,dst=0,val=31")
        )
        == []
    )
    assert differences(
        there, of_line("-numa", "dist,src=0,dst=1,val=31", "-numa", "dist,src=1,dst=0,val=22")
    ) == ["distance of NUMA nodes 1 and 0: 31 at the source, 22 here"]
    assert differences(there, of_line()) == [
        "distance of NUMA nodes 0 and 1: 31 at the source, none here",
        "distance of NUMA nodes 1 and 0: 31 at the source, none here",
    ]


def test_distances_that_qemu_takes_by_itself_need_not_be_written():
    written = ("dist,src=0,dst=1,val=20", "dist,src=1,dst=1,val=10")
    assert (
        differences(of_line(), of_line(*(word for text in written for word in ("-numa", text))))
        == []
    )


def test_without_a_command_line_nothing_is_said_of_distances():
    assert (
        differences(of_line("-numa", "dist,src=0,dst=1,val=31"), {**machine_of({}), "version": NEW})
        == []
    )


def test_attributes_of_memory_are_those_of_the_command_lines():
    assert differences(of_line("-numa", LATENCY), of_line()) == [
        f"-numa {LATENCY}: 1 at the source, none here"
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


def with_disks(**disks):
    return {**ONE, "disks": disks}


def test_disks_are_compared_by_their_drives():
    there = with_disks(
        vd0=("/ov", "qcow2"), vd1=("/a", "raw"), cd=("", ""), same=("/s", "raw"), net=("nbd:x", "")
    )
    here = with_disks(
        vd0=("/b", "raw"),
        vd1=("/a", "qcow2"),
        cd=("/c", ""),
        same=("/s", ""),
        net=("nbd://x", "raw"),
    )
    assert differences(there, here) == [
        "disk 'cd': no medium at the source, /c here",
        "disk 'vd0': /ov at the source, /b here",
        "disk 'vd1': /a as raw at the source, /a as qcow2 here",
    ]
    assert differences(there, {**here, "disks": None}) == []


def test_drives_of_other_names_are_compared_by_their_files():
    here = with_disks(disk0=("/a", "raw"), disk1=("/other", "raw"), empty=("", ""))
    assert differences(with_disks(a=("/a", "raw"), b=("/b", "raw")), here) == [
        "disk 'b': /b at the source, none here",
        "disk 'disk1': none at the source, /other here",
    ]


def test_drives_are_read_as_qemu_tells_of_them():
    overlay = (
        '{"driver": "qcow2", "backing": {"driver": "raw"}, "file": {"driver": "file",'
        ' "filename": "/o"}}'
    )
    rows = [
        {"device": "vd0", "inserted": {"file": f"json:{overlay}", "drv": "qcow2"}},
        {
            "device": "",
            "qdev": "/machine/peripheral/d1/virtio-backend",
            "inserted": {"file": "/x", "drv": "raw"},
        },
        {"device": "cd", "removable": True},
        {"device": "odd", "inserted": {"file": "json:[", "drv": 1}},
    ]
    disks = {"vd0": ("/o", "qcow2"), "d1": ("/x", "raw"), "cd": ("", ""), "odd": ("json:[", "")}
    assert machine_of({"block": rows})["disks"] == disks
    assert machine_of({"block": None})["disks"] is None


REPLY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
)


@given(
    st.fixed_dictionaries(
        dict.fromkeys(
            ("memory", "ramblock", "memdevs", "mtree", "numa", "pci", "machine", "block"), REPLY
        )
    )
)
def test_odd_replies_are_not_there(replies):
    assert machine_of(replies)["cpu"] == {}


def test_blocks_of_7_2_and_of_11_1_are_read():
    head = (
        "              Block Name    PSize              Offset               Used             "
        " Total"
    )
    row = (
        "                  pc.ram    4 KiB  0x0000000000000000 0x0000000008000000"
        " 0x0000000008000000"
    )
    for end in ("", "                HVA  RO"), ("", "  0x00007ffb6fa00000  rw"):
        text = f"{head}{end[0]}\n{row}{end[1]}\n"
        assert machine_of({"ramblock": {"human-readable-text": text}})["blocks"] == {
            "pc.ram": 128 << 20
        }


def test_what_is_behind_a_bridge_counts_by_its_type_alone():
    """QEMU lists it once firmware has numbered the bus, which a twin never does."""

    def bus(number):
        behind = [
            {"bus": number, "slot": 0, "function": 0, "id": {"vendor": 0x1AF4, "device": 0x1041}}
        ]
        bridge = {"bus": {"number": 0}, "devices": behind}
        port = {
            "bus": 0,
            "slot": 3,
            "function": 0,
            "id": {"vendor": 0x1B36, "device": 0xC},
            "pci_bridge": bridge,
        }
        return machine_of({"pci": [{"bus": 0, "devices": [port]}]})["pci"]

    assert bus(0) == bus(7) == {"0:03.0": "1b36:000c"}


# -- devices ---------------------------------------------------------------------------------------


def devices(*words, folder=None):
    replies = {"query-memdev": [{"id": "m0", "size": 1 << 20}]}
    return claim(["qemu", *words], replies, driver="qemu64-x86_64-cpu", folder=folder)


def test_monitors_memory_and_cpus_are_no_devices():
    found = devices(
        *("-nodefaults", "-qmp", "chardev:mon", "-chardev", "socket,id=mon,fd=3", "-pidfile", "x"),
        *("-machine", "memory-backend=m0", "-object", "memory-backend-ram,id=m0,size=1M"),
        *("-device", "qemu64-x86_64-cpu,id=v,socket-id=1", "-device", "virtio-rng-pci"),
    )
    assert (found.devices, found.has_defaults, found.has_serial) == (
        ("-device", "virtio-rng-pci"),
        False,
        False,
    )
    assert found.left_out == ()


def test_the_agents_port_gets_the_chardev_of_start():
    port = "virtserialport,chardev=ga,name=org.qemu.guest_agent.0,nr=2"
    found = devices("-chardev", "socket,id=ga,path=/x,server=on", "-device", port)
    assert found.devices == (
        "-device",
        "virtserialport,chardev=agent,name=org.qemu.guest_agent.0,nr=2",
    )


def test_a_chardev_of_a_monitor_and_of_a_device_stays():
    words = ("-chardev", "null,id=m,mux=on", "-mon", "chardev=m", "-device", "isa-serial,chardev=m")
    assert devices(*words).devices == (
        "-chardev",
        "null,id=m,mux=on",
        "-device",
        "isa-serial,chardev=m",
    )


@pytest.mark.parametrize(
    "text",
    [
        "tap,id=n,fds=9:10",
        "stream,id=n,addr.type=fd,addr.str=9",
        "dgram,id=n,local.type=fd,local.str=9",
        '{"type": "stream", "id": "n", "addr": {"type": "fd", "str": "9"}}',
    ],
)
def test_every_way_to_hand_a_descriptor_over_is_named(text):
    found = devices("-netdev", text)
    assert found.left_out == (f"-netdev {text}",)
    assert found.devices == ("-netdev", "user,id=n")


def test_descriptors_of_the_first_process_are_named():
    found = devices(
        "-netdev", "tap,id=n,fd=9", "-device", "virtio-net-pci,netdev=n", "-frobnicate", "x"
    )
    assert found.left_out == ("-netdev tap,id=n,fd=9", "-frobnicate x")
    assert found.devices[:2] == ("-netdev", "user,id=n")


def test_files_get_their_whole_paths():
    words = (
        "-drive",
        "file=a.img,if=virtio",
        "-cdrom",
        "b.iso",
        "-drive",
        "file=nbd:unix:/s,id=n",
        "-hda",
        "/c",
    )
    assert devices("-drive", "file=./a:b.img", folder="/images").devices == (
        "-drive",
        "file=/images/./a:b.img",
    )
    stream = "stream,id=n,addr.type=unix,addr.path=s"
    assert devices("-netdev", stream, folder="/run").devices[1].endswith("addr.path=/run/s")
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
    assert "-object memory-backend-memfd,id=m,size=1M" in text
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
        (
            ["-object", "memory-backend-ram,id=m,size=1M,prealloc=on"],
            ["-object", "memory-backend-ram,id=m,size=1M"],
        ),
        (["-object", "rng-random,id=r,filename=/dev/random"], ["-object", "rng-builtin,id=r"]),
        (["-audiodev", "wav,id=a,path=x.wav"], ["-audiodev", "none,id=a"]),
        (["-overcommit", "mem-lock=on"], []),
        (["-icount", "shift=auto,rr=record,rrfile=x"], []),
        (
            ["-object", "cryptodev-vhost-user,id=c,chardev=x"],
            ["-object", "cryptodev-backend-builtin,id=c"],
        ),
        (["-audio", "wav,model=hda,path=x.wav"], ["-audio", "none,model=hda"]),
        (["-fsdev", "proxy,id=f,socket=/s"], ["-fsdev", "synth,id=f"]),
        (
            ["-virtfs", "local,path=/x,mount_tag=t,security_model=none"],
            ["-virtfs", "synth,mount_tag=t"],
        ),
        (["-qmp", "unix:/s,server=on", "-monitor", "stdio", "-mon", "chardev=m"], []),
        (["-vnc", ":1", "-spice", "port=5900", "-display", "gtk"], ["-display", "none"]),
        (["-pidfile", "/p", "-D", "/l", "-daemonize", "-snapshot", "-gdb", "tcp::1234", "-s"], []),
        (["-trace", "file=/t", "-plugin", "x.so", "-incoming", "unix:/s", "-frobnicate", "x"], []),
        (["-device", "usb-tablet,pcap=/x,id=u"], ["-device", "usb-tablet,id=u"]),
        (["-machine", "virt,dumpdtb=/x,usb=on"], ["-machine", "virt,usb=on"]),
        (["-nographic"], ["-machine", "graphics=off"]),
    ],
)
def test_a_twin_does_nothing_to_files_and_memory_of_the_host(given, kept):
    assert without_the_host(given) == kept


def test_what_one_qemu_alone_can_have_is_named():
    words = [
        "-device",
        "vfio-pci,host=01:00.0",
        "-device",
        "scsi-block,drive=d",
        "-device",
        "virtio-rng-pci",
    ]
    assert only_one_can_have([*words, "-readconfig", "more.cfg"]) == [
        "-device vfio-pci,host=01:00.0",
        "-device scsi-block,drive=d",
        "-readconfig more.cfg",
    ]


def test_a_twin_tells_which_disk_is_behind_which_drive():
    words = [
        *(
            "-drive",
            "file=/d,,1,if=virtio,format=raw",
            "-hda",
            "/e",
            "-drive",
            "if=ide,media=cdrom",
        ),
        *("-blockdev", '{"driver":"file","filename":"/g","node-name":"below"}'),
        *(
            "-blockdev",
            "driver=qcow2,file=below,node-name=top",
            "-drive",
            "driver=null-co,if=none,id=n",
        ),
        *("-drive", "if=pflash,file=/f"),
    ]
    assert disks_behind(words) == {
        "node0": ("/d,1", "raw"),
        "node1": ("/e", ""),
        "node2": ("", ""),
        "below": ("/g", "file"),
        "top": ("/g", "qcow2"),
        "node5": ("null-co:", "null-co"),
    }
    made = without_the_host(words)
    assert [f"node-name=node{number}" in " ".join(made) for number in (0, 1, 2, 5, 6)] == [
        True
    ] * 4 + [False]


@given(
    st.lists(
        st.sampled_from(
            ["-blockdev", "-drive", "driver=raw,file=a,node-name=a", "file=", "{", "-hda"]
        )
    )
)
def test_anything_can_be_looked_at_for_disks(words):
    assert isinstance(disks_behind(words), dict)
    assert isinstance(missed(["qemu", *words], words), list)


@pytest.mark.parametrize(
    ("started", "defined", "found"),
    [
        (["-snapshot"], ["-snapshot"], ["-snapshot"]),
        (["-readconfig", "x.cfg"], [], ["-readconfig x.cfg"]),
        (["-readconfig", "x.cfg"], ["-readconfig", "x.cfg"], []),
        (["-netdev", "tap,id=n,fd=3"], ["-netdev", "user,id=n"], ["-netdev tap,id=n,fd=3"]),
        (["-netdev", "tap,id=n,fd=3"], ["-netdev", "tap,id=n,ifname=t"], []),
        (["-machine", "q35,kernel=/k"], [], ["-machine kernel=/k"]),
        (["-machine", "q35,kernel=/k"], ["-machine", "kernel=/k"], []),
        (
            [
                "-chardev",
                "socket,id=c,fd=3",
                "-vnc",
                ":1",
                "-loadvm",
                "x",
                "-display",
                "none",
                "-mem-prealloc",
            ],
            [],
            [],
        ),
    ],
)
def test_what_the_guest_would_miss_of_its_command_line(started, defined, found):
    assert missed(["qemu", *started], defined) == found


def test_disks_without_a_whole_path_are_named():
    words = [
        "-drive",
        "file=d.img,format=raw",
        "-hda",
        "/e",
        "-cdrom",
        "nbd:x",
        "-chardev",
        "file,id=c,path=log",
    ]
    assert in_an_unknown_folder(words) == ["-drive file=d.img,format=raw"]


def test_networks_with_offloads_are_not_verified():
    tap, net = ("-netdev", "tap,id=t"), "virtio-net-pci,netdev=t"
    assert not_verifiable([*tap, "-device", net]) == ["-netdev tap,id=t"]
    assert not_verifiable([*tap, "-device", "e1000,netdev=t", "-nic", "tap,model=e1000"]) == []
    assert not_verifiable(["-netdev", "user,id=t", "-device", net]) == []
    assert not_verifiable(["-nic", "tap,ifname=x"]) == ["-nic tap,ifname=x"]
