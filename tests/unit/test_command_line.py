"""QEMU's own command line, read as QEMU reads it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.claims import argument, can_be_of, claim, words_of

MIB = 1 << 20
PROGRAM = "/usr/bin/qemu-system-x86_64"


def read(*words):
    return words_of([PROGRAM, *words])


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("maxmem=64M", 64 * MIB),
        ("size=128", 128 * MIB),
        ("maxmem=128", 128),
        ("maxmem=1.5G", 3 << 29),
        ("size=1.5", 3 << 19),
        ("maxmem=66048k", 66048 << 10),
        ("maxmem=0x4000000", 64 * MIB),
        ("size=7b", 7),
        ("maxmem=2t", 2 << 40),
        ("maxmem= +2k", 2048),
        ("maxmem=.5M", 1 << 19),
        ("maxmem=0x1b", 27),
        ("maxmem=0x10M", None),
        ("maxmem=16e", None),
        ("maxmem=1.5b", None),
        ("maxmem=", None),
        ("maxmem=x", None),
        ("maxmem=-1", None),
        ("slots=1", None),
    ],
)
def test_sizes_are_qemus(words, size):
    whole, _, maximum = read("-m", words).memory
    assert (whole if words.startswith("size=") else maximum) == size


def test_a_comma_in_a_value_is_doubled_and_a_bare_word_is_on():
    assert read("-drive", "file=a,,b,readonly").options == (
        ("drive", (("file", "a,b"), ("readonly", "on"))),
    )
    assert read("-device", "virtio-rng-pci,id=r").options == (
        ("device", (("driver", "virtio-rng-pci"), ("id", "r"))),
    )
    assert argument([("driver", "a,b"), ("id", "c,d")], "driver") == "a,,b,id=c,,d"


@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True), st.text(max_size=9)),
        max_size=5,
    )
)
def test_what_is_joined_is_split_again(pairs):
    assert read("-drive", argument(pairs)).options == (("drive", tuple(pairs)),)


def test_machine_options_and_memory_of_all_their_options():
    found = read(
        "-M",
        "q35,accel=kvm:tcg,smm=off",
        "--machine",
        "hpet=off",
        "-m",
        "1G",
        "-m",
        "slots=2,maxmem=4G",
    )
    assert found.machine == (("smm", "off"), ("hpet", "off"))
    assert found.memory == (1 << 30, 2, 4 << 30)


def test_json_arguments_and_flags():
    found = read(
        "-nodefaults",
        "-object",
        '{"qom-type":"memory-backend-ram","id":"m","size":67108864,"share":true}',
        "-S",
    )
    (backend,) = found.backends
    assert (backend["id"], backend["size"], backend["share"]) == ("m", "67108864", "on")
    assert [name for name, _ in found.options] == ["nodefaults", "object", "S"]


def test_nodes_without_an_id_have_that_of_their_place():
    found = read(
        "-numa",
        "node,memdev=m1,cpus=0-1",
        "-numa",
        "node,nodeid=01,mem=0x40",
        "-numa",
        "dist,src=0,dst=1,val=31",
    )
    assert found.nodes == ((0, "m1", None), (1, None, 64 * MIB))
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
    found = words_of([*words, "-S"])
    assert (found.program, found.is_loaded) == ("/r/usr/bin/qemu-system-x86_64", True)
    assert found.options == (("S", ()),)


def test_properties_with_a_sign_count_last():
    assert read("-cpu", "qemu64,+svm,svm=off,phys-bits=40,-x2apic,enforce").cpu == (
        "qemu64",
        (("svm", "on"), ("phys-bits", "40"), ("enforce", "on"), ("x2apic", "off")),
    )


@given(st.lists(st.text(max_size=12), max_size=12))
def test_nothing_raises(words):
    found = words_of(words)
    assert found.nodes is not None and found.memory is not None and found.machine is not None


def test_what_cannot_be_read_is_named():
    assert read("-device", "{not json").unread == ("-device {not json",)
    assert read("-device").unread == ("-device",)


# -- the definition made of it ---------------------------------------------------------------------


def replies(*memdevs, **more):
    rows = [{"id": name, "size": size} for name, size in memdevs]
    return {"query-memdev": rows, "query-memory-size-summary": {"base-memory": 128 * MIB}, **more}


def test_a_command_line_with_other_backends_is_not_this_qemus():
    words = [PROGRAM, "-object", "memory-backend-ram,id=m0,size=1M"]
    assert can_be_of(words, replies(("m0", MIB)))
    assert not can_be_of(words, replies(("m1", MIB)))


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
    found = claim(None, facts, driver="Haswell-noTSX-x86_64-cpu").definition
    assert [(row["id"], row["cell"]) for row in found["options"]["backends"]] == [
        ("m1", 0),
        ("m0", 1),
    ]
    assert [cell["memory"] for cell in found["cells"]] == [64 * MIB - 4096, 64 * MIB]
    assert found["cpu"] == "Haswell-noTSX"


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
    assert claim(None, replies(), driver=driver).definition["cpu"] == model


def test_what_was_plugged_is_a_device_and_not_a_nodes_own_memory():
    data = {
        "id": "s",
        "memdev": "/objects/d",
        "size": 128 * MIB,
        "node": 0,
        "slot": 1,
        "addr": 1 << 32,
    }
    facts = replies(
        ("m", 64 * MIB),
        ("d", 128 * MIB),
        **{
            "query-memory-devices": [{"type": "dimm", "data": data}],
            "memory": {"max-size": 1 << 30, "slots": 2},
        },
    )
    found = claim([PROGRAM, "-numa", "node,memdev=m"], facts).definition
    assert [cell["memory"] for cell in found["cells"]] == [64 * MIB]
    assert found["dimms"] == (
        {
            "size": 128 * MIB,
            "node": 0,
            "slot": 1,
            "address": 1 << 32,
            "id": "s",
            "memdev": "d",
            "driver": "memory-backend-ram",
            "options": (),
        },
    )
    assert (found["memory"], found["base_memory"]) == (256 * MIB, 128 * MIB)
    assert (found["max_memory"], found["memory_slots"]) == (1 << 30, 2)


def test_what_no_definition_holds_is_named():
    data = {"id": "v", "memdev": "/objects/d", "size": 1}
    facts = replies(("d", 1), **{"query-memory-devices": [{"type": "virtio-mem", "data": data}]})
    words = [
        PROGRAM,
        "-machine",
        "q35,confidential-guest-support=sev0",
        "-mem-path",
        "/dev/hugepages",
    ]
    assert claim(words, facts).left_out == (
        "the memory device virtio-mem 'v'",
        "-mem-path",
        "-machine confidential-guest-support=sev0",
    )


def test_lists_of_an_object_stand_under_one_key():
    text = (
        '{"qom-type": "memory-backend-ram", "id": "m", "size": 1, "host-nodes": [0, 2],'
        ' "policy": "bind"}'
    )
    (backend,) = claim([PROGRAM, "-object", text, "-machine", "memory-backend=m"], {}).definition[
        "options"
    ]["backends"]
    assert backend["options"] == (("host-nodes", "0"), ("host-nodes", "2"), ("policy", "bind"))
