"""QEMU's own command line, read as QEMU reads it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.core.definition import Definition, Dimm, NumaCell, VcpuConfig
from qmpvcpu.core.machine.command_line import (
    CommandLineNode,
    MemorySize,
    join_pairs,
    parse_size,
    read_command_line,
    split_cpu,
    split_pairs,
)
from qmpvcpu.core.machine.described import agrees, described, machine_facts

MIB = 1 << 20


def read(*words):
    return read_command_line(["/usr/bin/qemu-system-x86_64", *words])


@pytest.mark.parametrize(
    ("text", "unit", "size"),
    [
        ("64M", 1, 64 * MIB),
        ("128", MIB, 128 * MIB),
        ("128", 1, 128),
        ("1.5G", 1, 3 << 29),
        ("1.5", MIB, 3 << 19),
        ("66048k", 1, 66048 << 10),
        ("0x4000000", 1, 64 * MIB),
        ("7b", MIB, 7),
        ("2t", 1, 2 << 40),
        ("1.5b", 1, None),
        ("", 1, None),
        ("x", 1, None),
        ("-1", 1, None),
        (None, 1, None),
    ],
)
def test_sizes_are_qemus(text, unit, size):
    assert parse_size(text, unit) == size


def test_a_comma_in_a_value_is_doubled_and_a_bare_word_is_on():
    assert split_pairs("file=a,,b,readonly", "x") == (("file", "a,b"), ("readonly", "on"))
    assert split_pairs("virtio-rng-pci,id=r", "driver") == (("driver", "virtio-rng-pci"), ("id", "r"))
    assert join_pairs([("driver", "a,b"), ("id", "c,d")], "driver") == "a,,b,id=c,,d"


@given(st.lists(st.tuples(st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True), st.text(max_size=9)), max_size=5))
def test_what_is_joined_is_split_again(pairs):
    assert split_pairs(join_pairs(pairs)) == tuple(pairs)


def test_machine_options_and_memory_of_all_their_options():
    found = read("-M", "q35,accel=kvm:tcg,smm=off", "--machine", "hpet=off", "-m", "1G", "-m", "slots=2,maxmem=4G")
    assert found.machine_options == (("smm", "off"), ("hpet", "off"))
    assert found.memory == MemorySize(1 << 30, 2, 4 << 30)


def test_json_arguments_and_flags():
    found = read(
        "-nodefaults", "-object", '{"qom-type":"memory-backend-ram","id":"m","size":67108864,"share":true}', "-S"
    )
    (backend,) = found.backends
    assert (backend.get("id"), backend.get("size"), backend.get("share")) == ("m", "67108864", "on")
    assert found.has("nodefaults") and found.has("S")


def test_nodes_without_an_id_have_that_of_their_place():
    found = read(
        "-numa", "node,memdev=m1,cpus=0-1", "-numa", "node,nodeid=1,mem=64", "-numa", "dist,src=0,dst=1,val=31"
    )
    assert found.nodes == (CommandLineNode(0, "m1"), CommandLineNode(1, None, 64 * MIB))
    assert found.distances == ((0, 1, 31),)


def test_the_program_behind_a_dynamic_linker_is_found():
    words = [
        "/r/lib/ld-linux-x86-64.so.2",
        "--argv0",
        "qemu",
        "--library-path",
        "/r/lib",
        "/r/usr/bin/qemu-system-x86_64",
    ]
    found = read_command_line([*words, "-S"])
    assert (found.program, found.is_loaded, found.has("S")) == ("/r/usr/bin/qemu-system-x86_64", True, True)


def test_properties_with_a_sign_count_last():
    assert split_cpu("qemu64,+svm,svm=off,phys-bits=40,-x2apic,enforce") == (
        "qemu64",
        (("svm", "on"), ("phys-bits", "40"), ("enforce", "on"), ("x2apic", "off")),
    )


@given(st.lists(st.text(max_size=12), max_size=12))
def test_nothing_raises(words):
    found = read_command_line(words)
    assert found.nodes is not None and found.memory is not None and found.machine_options is not None


def test_what_cannot_be_read_is_named():
    assert read("-device", "{not json").unread == ("-device {not json",)
    assert read("-device").unread == ("-device",)


# -- the definition made of it ------------------------------------------------------------------------


FOUND = Definition(
    "d",
    tuple(VcpuConfig(number, number == 0, number > 0) for number in range(4)),
    accel="tcg",
    arch="x86_64",
    machine="pc-q35-10.0",
    cells=(NumaCell(0, (0, 1)), NumaCell(1, (2, 3))),
)


def replies(*memdevs, **more):
    rows = [{"id": name, "size": size} for name, size in memdevs]
    return machine_facts({"query-memdev": rows, "query-memory-size-summary": {"base-memory": 128 * MIB}, **more})


def test_a_command_line_with_other_backends_is_not_this_qemus():
    line = read("-object", "memory-backend-ram,id=m0,size=1M")
    assert agrees(line, replies(("m0", MIB)))
    assert not agrees(line, replies(("m1", MIB)))


def test_without_a_command_line_the_order_of_addresses_tells_the_backends():
    tree = "".join(
        f"  00000000{n:08x}-00000000{n + 1:08x} (prio 0, ram): {name}\n"
        for n, name in ((0, "m1"), (1, "pc.bios"), (4, "m0"))
    )
    facts = replies(
        ("m0", 64 * MIB),
        ("m1", 64 * MIB - 4096),
        **{"info numa": "2 nodes\nnode 0 size: 63 MB\nnode 1 size: 64 MB\n", "info mtree -f": tree},
    )
    found = described(FOUND, "Haswell-noTSX-x86_64-cpu", facts, None)
    assert [(b.id, b.cell) for b in found.definition.options.backends] == [("m1", 0), ("m0", 1)]
    assert [cell.memory for cell in found.definition.cells] == [64 * MIB - 4096, 64 * MIB]
    assert found.definition.cpu == "Haswell-noTSX"


@pytest.mark.parametrize(
    ("driver", "model"),
    [
        ("power9_v2.0-spapr-cpu-core", "power9_v2.0"),
        ("host-x86_64-cpu", "host"),
        ("max-x86_64-cpu", "max"),
        ("x", None),
    ],
)
def test_the_model_is_cut_from_the_type_where_qmp_does_not_know_it(driver, model):
    assert described(FOUND, driver, replies(), None).definition.cpu == model


def test_what_was_plugged_is_a_device_and_not_a_nodes_own_memory():
    data = {"id": "s", "memdev": "/objects/d", "size": 128 * MIB, "node": 0, "slot": 1, "addr": 1 << 32}
    facts = replies(
        ("m", 64 * MIB),
        ("d", 128 * MIB),
        **{"query-memory-devices": [{"type": "dimm", "data": data}], "memory": {"max-size": 1 << 30, "slots": 2}},
    )
    found = described(FOUND, None, facts, read("-numa", "node,memdev=m")).definition
    assert [cell.memory for cell in found.cells] == [64 * MIB]
    assert found.dimms == (Dimm(128 * MIB, 0, 1, 1 << 32, "s", "d"),)
    assert (found.memory, found.base_memory, found.max_memory, found.memory_slots) == (
        256 * MIB,
        128 * MIB,
        1 << 30,
        2,
    )


def test_what_no_definition_holds_is_named():
    data = {"id": "v", "memdev": "/objects/d", "size": 1}
    facts = replies(("d", 1), **{"query-memory-devices": [{"type": "virtio-mem", "data": data}]})
    line = read("-machine", "q35,confidential-guest-support=sev0", "-mem-path", "/dev/hugepages")
    assert described(FOUND, None, facts, line).left_out == (
        "the memory device virtio-mem 'v'",
        "-mem-path",
        "-machine confidential-guest-support=sev0",
    )
