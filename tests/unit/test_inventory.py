"""Numbering, joining and checking of inventories that hypothesis makes."""

from __future__ import annotations

import random
from itertools import product
from typing import NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qmpvcpu import VcpuConnectionError
from tests.support.inventory import COMMANDS, Qemu, check_reply

X86 = Qemu()
PPC = Qemu("ppc64", "pseries-10.0")
S390 = Qemu("s390x", "s390-ccw-virtio-10.0")
#: Members of a slot's `props` that say where it is.
LEVELS = (
    "drawer-id",
    "book-id",
    "socket-id",
    "die-id",
    "cluster-id",
    "module-id",
    "core-id",
    "thread-id",
)


#: Many tests look at one fact each.
any_machine = settings(max_examples=15)


class Made(NamedTuple):
    """The replies, and what they were made of: `places` are the slots' props, of `per` vCPUs each;
    `plugged` are numbers of slots in order, at these `paths`.
    """

    qemu: Qemu
    slots: list
    fast: list
    places: list
    per: int
    plugged: list
    paths: dict
    shared: bool

    @property
    def vcpus(self):
        """Each vCPU with the number of its slot."""
        return [
            (vcpu, vcpu.id // self.per) for vcpu in self.qemu.state(self.slots, self.fast).vcpus
        ]


@st.composite
def machines(draw):
    """What QEMU would say of some machine with some CPUs plugged."""
    kind = draw(st.sampled_from(["x86", "ppc64", "s390x"]))
    count = st.integers(1, 3)
    if kind == "x86":
        levels = ["socket-id", "die-id", "module-id", "core-id", "thread-id"]
        levels = [
            lv for lv in levels if lv not in draw(st.sets(st.sampled_from(["die-id", "module-id"])))
        ]
        places = [
            dict(zip(levels, p, strict=True))
            for p in product(*(range(draw(count)) for _ in levels))
        ]
        per, qemu = 1, X86
        if draw(st.booleans()):
            node_of = {n: draw(st.integers(0, 3)) for n in range(3)}
            places = [p | {"node-id": node_of[p["socket-id"]]} for p in places]
    elif kind == "ppc64":
        per, qemu = draw(st.sampled_from([1, 2, 4, 8])), PPC
        places = [
            {"core-id": n * per, "node-id": draw(st.integers(0, 1))}
            for n in range(draw(st.integers(1, 6)))
        ]
    else:
        per, qemu = 1, S390
        levels = draw(
            st.sampled_from([["core-id"], ["drawer-id", "book-id", "socket-id", "core-id"]])
        )
        ranges = [range(draw(count)) for _ in levels[:-1]]
        places = [dict(zip(levels[:-1], p, strict=True)) for p in product(*ranges)]
        cores = draw(count)
        places = [
            p | {"core-id": n * cores + c} for n, p in enumerate(places) for c in range(cores)
        ]
    if draw(st.booleans()):
        places = [p | {"x-future-id": n, "x-name": "kept"} for n, p in enumerate(places)]
    rng = random.Random(draw(st.integers(0, 2**32)))
    others = list(range(1, len(places)))
    rng.shuffle(others)
    plugged = [0, *others[: draw(st.integers(0, len(others)))]]
    rng.shuffle(plugged)
    paths = {
        n: rng.choice(
            [f"/machine/unattached/device[{n * 3}]", f"/machine/peripheral/vcpu{n * per}"]
        )
        for n in plugged
    }
    slots = [
        {"props": p, "vcpus-count": per, "type": "t"}
        | ({"qom-path": paths[n]} if n in paths else {})
        for n, p in enumerate(places)
    ]
    rng.shuffle(slots)
    shared = draw(st.booleans())
    fast = []
    for n in plugged:
        for thread in range(per):
            path = f"{paths[n]}/thread[{thread}]" if kind == "ppc64" else paths[n]
            cpu = {"cpu-index": n * per + thread, "qom-path": path, "target": qemu.arch}
            cpu["thread-id"] = 77 if shared else 1000 + n * per + thread
            if draw(st.booleans()):
                cpu["props"] = rng.choice(places)  # never to be joined by
            fast.append(cpu)
    return Made(qemu, slots, fast, places, per, plugged, paths, shared)


@any_machine
@given(machines())
def test_ids_run_from_0_without_a_gap(machine):
    assert [vcpu.id for vcpu, _ in machine.vcpus] == list(range(len(machine.places) * machine.per))


@any_machine
@given(machines())
def test_props_are_those_of_the_slot(machine):
    for vcpu, n in machine.vcpus:
        assert vcpu.props == machine.places[n]


@any_machine
@given(machines())
def test_props_are_a_mapping_that_a_dict_is_made_of(machine):
    for vcpu, n in machine.vcpus:
        assert dict(vcpu.props) == machine.places[n]


@any_machine
@given(machines())
def test_an_entity_is_all_vcpus_of_its_slot(machine):
    for vcpu, n in machine.vcpus:
        assert vcpu.entity == tuple(range(n * machine.per, n * machine.per + machine.per))


@any_machine
@given(machines())
def test_a_node_is_that_of_the_slot(machine):
    for vcpu, n in machine.vcpus:
        assert vcpu.node == machine.places[n].get("node-id")


@any_machine
@given(machines())
def test_a_vcpu_is_enabled_where_its_slot_has_a_path(machine):
    for vcpu, n in machine.vcpus:
        assert vcpu.enabled == (n in machine.paths)


@any_machine
@given(machines())
def test_the_order_is_that_of_query_cpus_fast(machine):
    order = {n: rank for rank, n in enumerate(machine.plugged, 1)}
    for vcpu, n in machine.vcpus:
        assert vcpu.order == order.get(n)


@any_machine
@given(machines())
def test_what_is_plugged_can_go_unless_it_boots_or_the_machine_never_unplugs(machine):
    for vcpu, n in machine.vcpus:
        assert vcpu.hotpluggable == (not vcpu.enabled or (machine.qemu.arch != "s390x" and n != 0))


@any_machine
@given(machines())
def test_a_thread_id_is_told_of_what_has_its_own(machine):
    for vcpu, _ in machine.vcpus:
        if (machine.shared and len(machine.fast) > 1) or not vcpu.enabled:
            assert vcpu.thread_id is None
        else:
            assert vcpu.thread_id == (77 if machine.shared else 1000 + vcpu.id)


@any_machine
@given(machines())
def test_a_path_is_that_of_the_thread(machine):
    for vcpu, n in machine.vcpus:
        thread = f"/thread[{vcpu.id % machine.per}]" if machine.qemu.arch == "ppc64" else ""
        assert vcpu.qom_path == (machine.paths[n] + thread if vcpu.enabled else None)


@any_machine
@given(machines())
def test_an_entity_is_named_after_its_first_vcpu(machine):
    names = [
        entity.device_id for entity in machine.qemu.state(machine.slots, machine.fast).entities
    ]
    assert names == [f"vcpu{n * machine.per}" for n in range(len(machine.places))]


@given(machines())
def test_a_plug_seen_by_the_fast_query_alone_gives_the_same_state_as_both(machine):
    qemu, slots, fast = machine[:3]
    state = qemu.state(slots, fast)
    entity = next((entity for entity in state.entities if not entity.plugged), None)
    assume(entity is not None)
    path = f"/machine/peripheral/{entity.device_id}"
    # Not where an unrelated CPU already sits at this path.
    assume(path not in [slot.get("qom-path") for slot in slots])
    more = [
        {
            "cpu-index": number,
            "qom-path": f"{path}/thread[{k}]" if qemu.arch == "ppc64" else path,
            "thread-id": 5000 + number,
        }
        for k, number in enumerate(entity.ids)
    ]
    full_slots = [
        slot | ({"qom-path": path} if slot["props"] == entity.props else {}) for slot in slots
    ]
    assert qemu.refreshed(state, fast + more) == qemu.state(full_slots, fast + more)


STRANGER = {"cpu-index": 9999, "qom-path": "/machine/peripheral/stranger", "thread-id": 9}


@given(machines())
def test_a_cpu_at_an_unknown_path_is_an_inconsistency(machine):
    qemu, slots, fast = machine[:3]
    with pytest.raises(VcpuConnectionError, match="do not agree"):
        qemu.state(slots, [*fast, STRANGER])


@given(machines())
def test_a_cpu_that_comes_at_an_unknown_path_is_an_inconsistency(machine):
    qemu, slots, fast = machine[:3]
    state = qemu.state(slots, fast)
    with pytest.raises(VcpuConnectionError, match="do not agree"):
        qemu.refreshed(state, [*fast, STRANGER])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "props": JSON
        | st.dictionaries(st.sampled_from([*LEVELS, "node-id", "odd"]), JSON, max_size=4),
        "vcpus-count": JSON,
        "type": JSON,
        "qom-path": JSON,
        "thread-id": JSON,
        "cpu-index": JSON,
    },
)


@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=50)
@given(reply=JSON | st.lists(ROW, max_size=4))
def test_what_cannot_be_a_reply_is_malformed_and_never_another_error(command, reply):
    try:
        check_reply(command, reply)
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
        check_reply("query-hotpluggable-cpus", slots)
    assert error.value.reason == "malformed"


def test_two_slots_with_one_address_are_malformed():
    with pytest.raises(VcpuConnectionError, match="two slots"):
        X86.state([SLOT, SLOT], [{"cpu-index": 0, "qom-path": "/a", "thread-id": 1}])


def test_more_cpus_at_a_core_than_it_holds_are_malformed():
    fast = [{"cpu-index": n, "qom-path": f"/a/thread[{n}]", "thread-id": n} for n in range(2)]
    with pytest.raises(VcpuConnectionError, match="2 CPUs"):
        PPC.state([SLOT], fast)
