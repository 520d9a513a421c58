"""What a migration stream lists of its machine: read from any bytes, and compared."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import streams

BLOCKS = {"pc.ram": 64 << 20, "0000:00:01.0/vga.vram": 16 << 20, "/rom@etc/acpi/tables": 128 << 10}
DEVICES = [{"name": "timer", "instance_id": 0, "fields": []}, {"name": "cpu", "instance_id": 3}]
GOOD = streams.written(BLOCKS, DEVICES)

names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=60
).filter(lambda name: len(name.encode()) < 256)


def test_blocks_devices_and_machine_are_read():
    assert streams.read(GOOD) == streams.table(BLOCKS, [("timer", 0), ("cpu", 3)])


@given(
    st.dictionaries(
        names, st.integers(1, 1 << 40).map(lambda pages: pages * 1024), min_size=1, max_size=8
    ),
    st.dictionaries(st.tuples(names, st.integers(0, 1 << 31)), st.none(), max_size=8),
    st.binary(max_size=300),
)
def test_whatever_is_listed_is_read(blocks, sections, between):
    devices = [{"name": name, "instance_id": number} for name, number in sections]
    found = streams.read(streams.written(blocks, devices, between=between))
    assert found == streams.table(blocks, [key for key in sections if key[0] != "globalstate"])


@given(st.binary(max_size=400), st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(head, tail):
    for begin in (head, GOOD[:30] + head, GOOD[:60] + head):
        for end in (tail, tail + GOOD[-90:], b"\6\0\0\0\1" + tail):
            try:
                streams.read(begin, end)
            except streams.StreamError as error:
                assert str(error)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 7))
def test_a_flipped_bit_is_read_or_refused(at, bit):
    data = bytearray(GOOD)
    data[at] ^= 1 << bit
    try:
        streams.read(bytes(data))
    except streams.StreamError as error:
        assert str(error)


@pytest.mark.parametrize("length", range(0, len(GOOD), 7))
def test_what_is_cut_short_is_refused(length):
    with pytest.raises(streams.StreamError):
        streams.read(GOOD[:length] + b"x")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"LIBVIRT" + GOOD, "does not begin"),
        (GOOD[:8] + b"\7\xff\xff\xff\xff" + GOOD[13:], "the length of its machine"),
        (streams.written({"a": 1 << 20}, ()).replace(b"\3ram", b"\3rom"), "no list of RAM blocks"),
        (streams.written({"a": 1 << 20}, [{"name": "x"}]), "without a name"),
        (streams.written({"a": 1 << 20}, [*DEVICES, *DEVICES]), "has a device twice"),
        (GOOD.replace(b"pc.ram\0\0\0\0\4", b"pc.ram\0\0\1\0\4"), "does not add up"),
        (GOOD[:-1] + b"]", "cannot be read"),
    ],
)
def test_what_is_not_a_stream_says_why(data, words):
    with pytest.raises(streams.StreamError, match=words):
        streams.read(data)


def test_deep_json_is_refused():
    text = b"[" * 100_000
    with pytest.raises(streams.StreamError):
        streams.read(GOOD, b"\0\6" + len(text).to_bytes(4, "big") + text)


def test_an_old_machine_type_lists_no_devices():
    assert streams.read(streams.written(BLOCKS, None)).sections is None


def test_a_stream_without_its_machine_is_read():
    assert streams.read(streams.written(BLOCKS, DEVICES, machine=None)).machine is None


ONE = streams.table(
    {"pc.ram": 64 << 20, "/rom@x": 4096}, [("cpu", 0), ("0000:00:05.0/virtio-rng", 0)]
)


@pytest.mark.parametrize(
    ("here", "texts"),
    [
        (ONE, []),
        # QEMU gives firmware's tables another size as it reads them.
        (streams.table({**ONE.blocks, "/rom@x": 8192}, ONE.sections), []),
        (
            streams.table({**ONE.blocks, "pc.ram": 96 << 20}, ONE.sections),
            ["RAM block 'pc.ram': 65536 KiB at the source, 98304 KiB in the definition"],
        ),
        (
            streams.table({"pc.ram": 64 << 20}, ONE.sections),
            ["RAM block '/rom@x': 4 KiB at the source, none in the definition"],
        ),
        (
            streams.table(ONE.blocks, [("cpu", 0), ("0000:00:06.0/virtio-rng", 0)]),
            [
                "device state '0000:00:05.0/virtio-rng' (instance 0) is only at the source",
                "device state '0000:00:06.0/virtio-rng' (instance 0) is only in the definition",
            ],
        ),
        (streams.table(ONE.blocks, None), ["only one side has a list of devices"]),
        (
            streams.table(ONE.blocks, ONE.sections, "pc-q35-7.2"),
            ["machine type: pc-q35-10.0 at the source, pc-q35-7.2 in the definition"],
        ),
        (streams.table(ONE.blocks, ONE.sections, None), []),
    ],
)
def test_every_difference_is_named(here, texts):
    assert streams.differences(ONE, here) == texts


def test_the_run_state_is_no_difference():
    row = {"name": "globalstate", "instance_id": 0}
    assert streams.read(streams.written(BLOCKS, [*DEVICES, row])) == streams.read(GOOD)


def test_the_mark_may_stand_in_the_length():
    empty = len(json.dumps({"page_size": 4096, "devices": [{"name": "", "instance_id": 0}]}))
    device = {"name": "x" * (0x0606 - empty), "instance_id": 0}
    data = streams.written(BLOCKS, [device])
    assert b"\6\0\0\6\6{" in data and streams.read(data).sections == {(device["name"], 0)}
