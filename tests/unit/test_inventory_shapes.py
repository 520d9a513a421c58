"""Inventories of every level, of machines without hotplug, and replies that are wrong in one place only."""

from __future__ import annotations

import pickle
from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpvcpu.core.inventory import (
    LEVELS,
    MAX_VCPUS,
    BootFacts,
    InconsistentReplies,
    build_state,
    parse_cpus_fast,
    parse_hotpluggable_cpus,
    parse_topology,
    parse_version,
    refresh_state,
)
from qmpvcpu.core.model import QemuVersion, Topology
from qmpvcpu.errors import VcpuConnectionError

BOOT = BootFacts("d", "x86_64", "pc-q35-10.0", True, QemuVersion(10, 0, 2), Topology(8, cores=8))
S390 = BootFacts("d", "s390x", "s390-ccw-virtio-10.0", True, QemuVersion(10, 0, 2), None)
ARM = BootFacts("d", "aarch64", "virt-10.0", False, QemuVersion(10, 0, 2), Topology(4, cores=4))


def slot(path=None, count=1, **props):
    props = {key.replace("_", "-"): value for key, value in props.items()}
    return {"props": props, "vcpus-count": count, "type": "t"} | ({"qom-path": path} if path else {})


def cpu(path, number=0, thread=None, **more):
    return {"cpu-index": number, "qom-path": path, "thread-id": 100 + number if thread is None else thread} | more


def state_of(slots, cpus, boot=BOOT, pending=()):
    return build_state(
        boot, None if slots is None else parse_hotpluggable_cpus(slots), parse_cpus_fast(cpus), pending=pending
    )


@pytest.mark.parametrize(("outer", "inner"), list(pairwise(LEVELS)))
def test_an_outer_level_counts_before_an_inner_one(outer, inner):
    places = [{outer: a, inner: b} for a in (0, 1) for b in (0, 1)]
    for shuffled in permutations(places):
        state = state_of([slot("/a" if p == places[0] else None, **p) for p in shuffled], [cpu("/a")])
        assert [vcpu.props for vcpu in state.vcpus] == places


def test_an_absent_level_counts_as_zero_and_the_node_does_not_count():
    slots = [slot(core_id=1, node_id=0), slot("/a", node_id=1), slot(core_id=2, node_id=-0)]
    state = state_of(slots, [cpu("/a")])
    assert [vcpu.props.get("core-id", 0) for vcpu in state.vcpus] == [0, 1, 2]
    assert [vcpu.node for vcpu in state.vcpus] == [1, 0, 0]


def test_a_machine_without_hotplug_has_its_cpus_and_ids_that_can_never_be():
    fast = [cpu(f"/machine/unattached/device[{n}]", n, props={"core-id": n}) for n in (1, 0)]
    state = state_of(None, fast, ARM)
    assert (state.can_plug, state.can_unplug, state.maxcpus) == (False, False, 4)
    assert [vcpu.enabled for vcpu in state.vcpus] == [True, True, False, False]
    assert [vcpu.order for vcpu in state.vcpus] == [2, 1, None, None]
    assert not any(vcpu.hotpluggable for vcpu in state.vcpus)
    assert refresh_state(state, ARM, parse_cpus_fast(fast)) == state


def test_a_machine_without_any_cpu_has_no_vcpu():
    assert state_of(None, [], BootFacts("d", "x86_64", "none", False, QemuVersion(10, 0), None)).vcpus == ()


def test_threads_of_a_core_are_told_apart_by_their_number_not_by_their_place():
    cpus = [cpu(f"/c/thread[{n}]", n) for n in (10, 2, 0, 11, 1, 3, 4, 5, 6, 7, 8, 9)]
    boot = BootFacts("d", "ppc64", "pseries-10.0", True, QemuVersion(10, 0), None)
    state = state_of([slot("/c", 12, core_id=0)], cpus, boot)
    assert [vcpu.thread_id for vcpu in state.vcpus] == [100 + n for n in range(12)]
    assert {vcpu.order for vcpu in state.vcpus} == {1}


def test_one_vcpu_alone_does_not_show_whether_threads_are_shared():
    slots = [slot("/a", core_id=0), slot("/b", core_id=1)]
    assert state_of([slots[0]], [cpu("/a")]).threads_shared is None
    assert state_of(slots, [cpu("/a"), cpu("/b", 1)]).threads_shared is False
    shared = state_of(slots, [cpu("/a", thread=7), cpu("/b", 1, thread=7)])
    assert (shared.threads_shared, [vcpu.thread_id for vcpu in shared.vcpus]) == (True, [None, None])


def test_pending_is_told_of_every_sibling():
    boot = BootFacts("d", "ppc64", "pseries-10.0", True, QemuVersion(10, 0), None)
    slots = [slot("/a", 2, core_id=0), slot("/b", 2, core_id=2)]
    cpus = [cpu(f"/{c}/thread[{n}]", n) for c in "ab" for n in range(2)]
    state = state_of(slots, cpus, boot, pending=(2,))
    assert [vcpu.pending for vcpu in state.vcpus] == [False, False, True, True]
    again = refresh_state(state, boot, parse_cpus_fast(cpus))
    assert not any(vcpu.pending for vcpu in again.vcpus)


def test_a_removal_seen_by_the_fast_query_alone_empties_the_slot_and_moves_the_order_up():
    slots = [slot(f"/machine/peripheral/vcpu{n}", core_id=n) for n in range(3)]
    cpus = [cpu(f"/machine/peripheral/vcpu{n}", n) for n in range(3)]
    state = state_of(slots, cpus)
    fresh = refresh_state(state, BOOT, parse_cpus_fast([cpus[0], cpus[2]]))
    assert fresh == state_of([slots[0], slot(core_id=1), slots[2]], [cpus[0], cpus[2]])
    assert [vcpu.order for vcpu in fresh.vcpus] == [1, None, 2]
    assert fresh.vcpus[1].hotpluggable


def test_what_was_plugged_on_s390x_is_not_hotpluggable():
    state = state_of([slot("/a", core_id=0), slot(core_id=1)], [cpu("/a")], S390)
    fresh = refresh_state(state, S390, parse_cpus_fast([cpu("/a"), cpu("/machine/peripheral/vcpu1", 1)]))
    assert [vcpu.hotpluggable for vcpu in state.vcpus] == [False, True]
    assert [vcpu.hotpluggable for vcpu in fresh.vcpus] == [False, False]


@pytest.mark.parametrize(
    ("slots", "cpus"),
    [
        ([slot("/a", core_id=0), slot("/b", core_id=1)], [cpu("/a")]),  # gone from the second
        ([slot("/a", core_id=0), slot(core_id=1)], [cpu("/a"), cpu("/b", 1)]),  # came in the second
        ([slot("/a", core_id=0)], [cpu("/x")]),  # moved
        ([slot("/a", core_id=0)], []),
    ],
)
def test_replies_of_two_moments_are_inconsistent_and_say_to_try_again(slots, cpus):
    with pytest.raises(InconsistentReplies) as caught:
        state_of(slots, cpus)
    assert "try again" in caught.value.hint


WRONG_PATHS = [0, "", [], {}, True]
WRONG_NUMBERS = [None, True, -1, 1.0, "1", [], float("nan")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("cpu-index", value) for value in WRONG_NUMBERS),
        *(("thread-id", value) for value in WRONG_NUMBERS),
        *(("qom-path", value) for value in [None, *WRONG_PATHS]),
        *(("props", value) for value in (1, [], "x", {"core-id": None}, {"core-id": 1.0}, {"thread-id": True})),
    ],
)
def test_one_wrong_member_of_query_cpus_fast_is_malformed(key, value):
    with pytest.raises(VcpuConnectionError, match=key) as caught:
        parse_cpus_fast([cpu("/a"), cpu("/b", 1) | {key: value}])
    assert caught.value.reason == "malformed"
    missing = {k: v for k, v in cpu("/b", 1).items() if k != key}
    if key != "props":
        with pytest.raises(VcpuConnectionError, match=key):
            parse_cpus_fast([missing])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("vcpus-count", value) for value in [0, *WRONG_NUMBERS]),
        *(("type", value) for value in [None, *WRONG_PATHS]),
        *(("qom-path", value) for value in WRONG_PATHS),
        *(("props", value) for value in (None, 1, [], "x", *({level: "0"} for level in LEVELS))),
        *(("props", value) for value in ({"new-id": []}, {"new-id": {}})),
    ],
)
def test_one_wrong_member_of_query_hotpluggable_cpus_is_malformed(key, value):
    with pytest.raises(VcpuConnectionError, match=key) as caught:
        parse_hotpluggable_cpus([slot(core_id=0), slot(core_id=1) | {key: value}])
    assert caught.value.reason == "malformed"


def test_more_vcpus_than_any_machine_has_are_malformed_and_the_limit_is_not():
    assert len(parse_hotpluggable_cpus([slot(count=MAX_VCPUS, core_id=0)])) == 1
    for slots in ([slot(count=MAX_VCPUS + 1)], [slot(count=MAX_VCPUS, core_id=0), slot(core_id=1)]):
        with pytest.raises(VcpuConnectionError, match="more than"):
            parse_hotpluggable_cpus(slots)


def test_two_cpus_at_one_path_are_malformed():
    with pytest.raises(VcpuConnectionError, match="one qom-path"):
        parse_cpus_fast([cpu("/a"), cpu("/a", 1)])


@pytest.mark.parametrize("wrong", [True, 0, -1, "8", 8.0, None, MAX_VCPUS + 1])
def test_a_topology_that_cannot_be_is_malformed(wrong):
    with pytest.raises(VcpuConnectionError, match="maxcpus"):
        parse_topology({"maxcpus": wrong})


def test_a_topology_has_one_of_every_level_that_is_absent():
    reply = {"maxcpus": 8, "sockets": 2, "cores": 4, "cpus": 3}
    assert parse_topology(reply) == Topology(maxcpus=8, sockets=2, cores=4)
    assert parse_topology(None) is parse_topology({"sockets": 2}) is None


def test_versions_compare_as_numbers():
    def version(*numbers):
        return parse_version({"version": {"qemu": dict(zip(("major", "minor", "micro"), numbers, strict=True))}})

    assert version(7, 2, 22) < version(10, 0, 2) < version(10, 1, 0) < version(11, 0, 0)
    assert str(version(10, 0, 2)) == "10.0.2"


SCALAR = st.integers() | st.text(max_size=4) | st.booleans()


@settings(max_examples=25)
@given(st.dictionaries(st.text(min_size=1, max_size=6).filter(lambda key: not key.endswith("-id")), SCALAR))
def test_props_that_are_not_known_go_through_unchanged_and_survive_a_pickle(extra):
    state = state_of([slot("/a", core_id=0) | {"props": {**extra, "core-id": 0}}], [cpu("/a")])
    assert dict(state.entities[0].props) == {**extra, "core-id": 0}
    again = pickle.loads(pickle.dumps(state))
    assert (again, hash(again)) == (state, hash(state))
    assert again.by_id[0] == state.entities[0]
