"""Numbering, joining and checking of inventories that hypothesis makes."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.core.inventory import (
    LEVELS,
    BootFacts,
    InconsistentReplies,
    build_state,
    parse_cpus_fast,
    parse_hotpluggable_cpus,
    parse_topology,
    parse_version,
    refresh_state,
)
from qmpvcpu.core.model import QemuVersion
from qmpvcpu.errors import VcpuConnectionError

BOOT = BootFacts("d", "x86_64", "pc-q35-10.0", False, QemuVersion(10, 0, 2), None)
PPC = replace(BOOT, arch="ppc64", machine="pseries-10.0")
S390 = replace(BOOT, arch="s390x", machine="s390-ccw-virtio-10.0")


@st.composite
def machines(draw):
    """(boot, slots reply, fast reply, expected): what QEMU would say of some machine with some CPUs plugged."""
    kind = draw(st.sampled_from(["x86", "ppc64", "s390x"]))
    count = st.integers(1, 3)
    if kind == "x86":
        levels = ["socket-id", "die-id", "module-id", "core-id", "thread-id"]
        levels = [lv for lv in levels if lv not in draw(st.sets(st.sampled_from(["die-id", "module-id"])))]
        places = [dict(zip(levels, p, strict=True)) for p in product(*(range(draw(count)) for _ in levels))]
        per, boot = 1, BOOT
        if draw(st.booleans()):
            node_of = {n: draw(st.integers(0, 3)) for n in range(3)}
            places = [p | {"node-id": node_of[p["socket-id"]]} for p in places]
    elif kind == "ppc64":
        per, boot = draw(st.sampled_from([1, 2, 4, 8])), PPC
        places = [{"core-id": n * per, "node-id": draw(st.integers(0, 1))} for n in range(draw(st.integers(1, 6)))]
    else:
        per, boot = 1, S390
        levels = draw(st.sampled_from([["core-id"], ["drawer-id", "book-id", "socket-id", "core-id"]]))
        ranges = [range(draw(count)) for _ in levels[:-1]]
        places = [dict(zip(levels[:-1], p, strict=True)) for p in product(*ranges)]
        cores = draw(count)
        places = [p | {"core-id": n * cores + c} for n, p in enumerate(places) for c in range(cores)]
    if draw(st.booleans()):
        places = [p | {"x-future-id": n, "x-name": "kept"} for n, p in enumerate(places)]
    rng = random.Random(draw(st.integers(0, 2**32)))
    others = list(range(1, len(places)))
    rng.shuffle(others)
    plugged = [0, *others[: draw(st.integers(0, len(others)))]]
    rng.shuffle(plugged)
    paths = {
        n: rng.choice([f"/machine/unattached/device[{n * 3}]", f"/machine/peripheral/vcpu{n * per}"])
        for n in plugged
    }
    slots = [
        {"props": p, "vcpus-count": per, "type": "t"} | ({"qom-path": paths[n]} if n in paths else {})
        for n, p in enumerate(places)
    ]
    rng.shuffle(slots)
    shared = draw(st.booleans())
    fast = []
    for n in plugged:
        for thread in range(per):
            path = f"{paths[n]}/thread[{thread}]" if kind == "ppc64" else paths[n]
            cpu = {"cpu-index": n * per + thread, "qom-path": path, "target": boot.arch}
            cpu["thread-id"] = 77 if shared else 1000 + n * per + thread
            if draw(st.booleans()):
                cpu["props"] = rng.choice(places)  # never to be joined by
            fast.append(cpu)
    return boot, slots, fast, (places, per, plugged, paths, shared)


def state_of(boot, slots, fast):
    return build_state(boot, parse_hotpluggable_cpus(slots), parse_cpus_fast(fast))


@given(machines())
def test_every_vcpu_is_what_qemu_says_of_its_slot(machine):
    boot, slots, fast, (places, per, plugged, paths, shared) = machine
    state = state_of(boot, slots, fast)
    order = {n: rank for rank, n in enumerate(plugged, 1)}
    assert [vcpu.id for vcpu in state.vcpus] == list(range(len(places) * per))
    for vcpu in state.vcpus:
        n = vcpu.id // per
        assert vcpu.props == places[n]
        assert dict(vcpu.props) == places[n]
        assert vcpu.entity == tuple(range(n * per, n * per + per))
        assert vcpu.node == places[n].get("node-id")
        assert vcpu.enabled == (n in paths)
        assert vcpu.order == order.get(n)
        can_unplug = boot.arch != "s390x" and n != 0
        assert vcpu.hotpluggable == (can_unplug if vcpu.enabled else True)
        if not vcpu.enabled or (shared and len(fast) > 1):
            assert vcpu.thread_id is None
        else:
            assert vcpu.thread_id == (77 if shared else 1000 + vcpu.id)
        thread = f"/thread[{vcpu.id % per}]" if boot.arch == "ppc64" else ""
        assert vcpu.qom_path == (paths[n] + thread if vcpu.enabled else None)
    assert [e.device_id for e in state.entities] == [f"vcpu{n * per}" for n in range(len(places))]


@given(machines())
def test_a_plug_seen_by_the_fast_query_alone_gives_the_same_state_as_both(machine):
    boot, slots, fast, (places, per, plugged, _, _) = machine
    state = state_of(boot, slots, fast)
    empty = [entity for entity in state.entities if not entity.plugged]
    for entity in empty[:1]:
        path = f"/machine/peripheral/{entity.device_id}"
        more = [
            {
                "cpu-index": number,
                "qom-path": f"{path}/thread[{k}]" if boot.arch == "ppc64" else path,
                "thread-id": 5000 + number,
            }
            for k, number in enumerate(entity.ids)
        ]
        full_slots = [slot | ({"qom-path": path} if slot["props"] == entity.props else {}) for slot in slots]
        if sum("qom-path" in s and s["qom-path"] == path for s in slots):
            return  # an unrelated CPU already sits at this path
        expected = state_of(boot, full_slots, fast + more)
        cpus = parse_cpus_fast(fast + more)
        assert refresh_state(state, boot, cpus) == expected


@given(machines())
def test_a_cpu_at_an_unknown_path_is_an_inconsistency(machine):
    boot, slots, fast, _ = machine
    stranger = {"cpu-index": 9999, "qom-path": "/machine/peripheral/stranger", "thread-id": 9}
    with pytest.raises(InconsistentReplies):
        state_of(boot, slots, [*fast, stranger])
    with pytest.raises(InconsistentReplies):
        refresh_state(state_of(boot, slots, fast), boot, parse_cpus_fast([*fast, stranger]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "props": JSON | st.dictionaries(st.sampled_from([*LEVELS, "node-id", "odd"]), JSON, max_size=4),
        "vcpus-count": JSON,
        "type": JSON,
        "qom-path": JSON,
        "thread-id": JSON,
        "cpu-index": JSON,
    },
)


@given(JSON | st.lists(ROW, max_size=4))
def test_what_cannot_be_a_reply_is_malformed_and_never_another_error(reply):
    for parse in (parse_hotpluggable_cpus, parse_cpus_fast, parse_topology, parse_version):
        try:
            parse(reply)
        except VcpuConnectionError as error:
            assert error.reason == "malformed"
            assert error.hint


SLOT = {"props": {"core-id": 0}, "vcpus-count": 1, "type": "t", "qom-path": "/a"}


@pytest.mark.parametrize(
    "slots",
    [
        [SLOT | {"vcpus-count": True}],
        [SLOT | {"vcpus-count": 0}],
        [SLOT | {"vcpus-count": 10**9}],
        [SLOT | {"type": ""}],
        [SLOT | {"qom-path": 3}],
        [SLOT | {"props": {"core-id": "1"}}],
        [SLOT | {"props": {"core-id": -1}}],
        [SLOT | {"props": {"core-id": [1]}}],
        [SLOT] * 70000,
        [],
    ],
)
def test_malformed_slots(slots):
    with pytest.raises(VcpuConnectionError) as error:
        parse_hotpluggable_cpus(slots)
    assert error.value.reason == "malformed"


def test_two_slots_with_one_address_are_malformed():
    with pytest.raises(VcpuConnectionError, match="two slots"):
        state_of(BOOT, [SLOT, SLOT], [{"cpu-index": 0, "qom-path": "/a", "thread-id": 1}])


def test_more_cpus_at_a_core_than_it_holds_are_malformed():
    fast = [{"cpu-index": n, "qom-path": f"/a/thread[{n}]", "thread-id": n} for n in range(2)]
    with pytest.raises(VcpuConnectionError, match="2 CPUs"):
        state_of(PPC, [SLOT], fast)
