"""Inventories of every level, of machines without hotplug, and replies that are wrong in one place
only.
"""

from __future__ import annotations

import pickle
from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpvcpu import Topology, VcpuConnectionError
from tests.support.inventory import Qemu, check_reply, topology_of, version_of

X86 = Qemu(kvm=True, smp={"maxcpus": 8, "cores": 8})
PPC = Qemu("ppc64", "pseries-10.0", kvm=True)
S390 = Qemu("s390x", "s390-ccw-virtio-10.0", kvm=True)
ARM = Qemu("aarch64", "virt-10.0", smp={"maxcpus": 4, "cores": 4})
#: From the outside in.
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
#: More vCPUs than any machine has are nonsense.
MOST = 65536


def slot(path=None, count=1, **props):
    props = {key.replace("_", "-"): value for key, value in props.items()}
    return {"props": props, "vcpus-count": count, "type": "t"} | (
        {"qom-path": path} if path else {}
    )


def cpu(path, number=0, thread=None, **more):
    return {
        "cpu-index": number,
        "qom-path": path,
        "thread-id": 100 + number if thread is None else thread,
    } | more


@pytest.mark.parametrize(("outer", "inner"), list(pairwise(LEVELS)))
def test_an_outer_level_counts_before_an_inner_one(outer, inner):
    places = [{outer: a, inner: b} for a in (0, 1) for b in (0, 1)]
    for shuffled in permutations(places):
        state = X86.state(
            [slot("/a" if p == places[0] else None, **p) for p in shuffled], [cpu("/a")]
        )
        assert [vcpu.props for vcpu in state.vcpus] == places


WITHOUT_A_LEVEL = [slot(core_id=1, node_id=0), slot("/a", node_id=1), slot(core_id=2, node_id=-0)]


def test_an_absent_level_counts_as_zero():
    state = X86.state(WITHOUT_A_LEVEL, [cpu("/a")])
    assert [vcpu.props.get("core-id", 0) for vcpu in state.vcpus] == [0, 1, 2]


def test_the_node_does_not_count():
    state = X86.state(WITHOUT_A_LEVEL, [cpu("/a")])
    assert [vcpu.node for vcpu in state.vcpus] == [1, 0, 0]


NO_HOTPLUG = [cpu(f"/machine/unattached/device[{n}]", n, props={"core-id": n}) for n in (1, 0)]


@pytest.fixture(name="fixed")
def machine_without_hotplug():
    return ARM.state(None, NO_HOTPLUG)


def test_a_machine_without_hotplug_plugs_and_unplugs_nothing(fixed):
    assert (fixed.can_plug, fixed.can_unplug) == (False, False)


def test_a_machine_without_hotplug_has_its_cpus_and_ids_that_can_never_be(fixed):
    assert [vcpu.enabled for vcpu in fixed.vcpus] == [True, True, False, False]


def test_cpus_of_a_machine_without_hotplug_have_their_order(fixed):
    assert [vcpu.order for vcpu in fixed.vcpus] == [2, 1, None, None]


def test_no_vcpu_of_a_machine_without_hotplug_is_hotpluggable(fixed):
    assert not any(vcpu.hotpluggable for vcpu in fixed.vcpus)


def test_a_later_look_at_a_machine_without_hotplug_shows_the_same(fixed):
    assert ARM.refreshed(fixed, NO_HOTPLUG) == fixed


def test_a_machine_without_any_cpu_has_no_vcpu():
    assert Qemu(machine="none").state(None, []).vcpus == ()


@pytest.fixture(name="core")
def core_of_twelve_threads():
    cpus = [cpu(f"/c/thread[{n}]", n) for n in (10, 2, 0, 11, 1, 3, 4, 5, 6, 7, 8, 9)]
    return PPC.state([slot("/c", 12, core_id=0)], cpus)


def test_threads_of_a_core_are_told_apart_by_their_number_not_by_their_place(core):
    assert [vcpu.thread_id for vcpu in core.vcpus] == [100 + n for n in range(12)]


def test_threads_of_a_core_have_one_order(core):
    assert {vcpu.order for vcpu in core.vcpus} == {1}


TWO = [slot("/a", core_id=0), slot("/b", core_id=1)]


@pytest.mark.parametrize(
    ("slots", "cpus", "shared"),
    [
        (TWO[:1], [cpu("/a")], None),
        (TWO, [cpu("/a"), cpu("/b", 1)], False),
        (TWO, [cpu("/a", thread=7), cpu("/b", 1, thread=7)], True),
    ],
    ids=["one alone does not show it", "two threads", "one thread"],
)
def test_whether_vcpus_share_a_thread(slots, cpus, shared):
    assert X86.state(slots, cpus).threads_shared is shared


def test_a_shared_thread_is_told_of_no_vcpu():
    state = X86.state(TWO, [cpu("/a", thread=7), cpu("/b", 1, thread=7)])
    assert [vcpu.thread_id for vcpu in state.vcpus] == [None, None]


CORES = [slot("/a", 2, core_id=0), slot("/b", 2, core_id=2)]
THREADS = [cpu(f"/{c}/thread[{n}]", n) for c in "ab" for n in range(2)]


def test_pending_is_told_of_every_sibling():
    state = PPC.state(CORES, THREADS, pending=(2,))
    assert [vcpu.pending for vcpu in state.vcpus] == [False, False, True, True]


def test_a_later_look_keeps_nothing_pending():
    again = PPC.refreshed(PPC.state(CORES, THREADS, pending=(2,)), THREADS)
    assert not any(vcpu.pending for vcpu in again.vcpus)


@pytest.fixture(name="one_gone")
def after_a_removal_seen_by_the_fast_query_alone():
    """Of three the middle one is gone: the state, and what both queries would have given."""
    slots = [slot(f"/machine/peripheral/vcpu{n}", core_id=n) for n in range(3)]
    cpus = [cpu(f"/machine/peripheral/vcpu{n}", n) for n in range(3)]
    left = [cpus[0], cpus[2]]
    return X86.refreshed(X86.state(slots, cpus), left), X86.state(
        [slots[0], slot(core_id=1), slots[2]], left
    )


def test_a_removal_seen_by_the_fast_query_alone_gives_the_same_state_as_both(one_gone):
    assert one_gone[0] == one_gone[1]


def test_a_removal_moves_the_order_up(one_gone):
    assert [vcpu.order for vcpu in one_gone[0].vcpus] == [1, None, 2]


def test_what_was_removed_can_be_plugged_again(one_gone):
    assert one_gone[0].vcpus[1].hotpluggable


def test_on_s390x_an_empty_slot_is_hotpluggable():
    state = S390.state([slot("/a", core_id=0), slot(core_id=1)], [cpu("/a")])
    assert [vcpu.hotpluggable for vcpu in state.vcpus] == [False, True]


def test_what_was_plugged_on_s390x_is_not_hotpluggable():
    state = S390.state([slot("/a", core_id=0), slot(core_id=1)], [cpu("/a")])
    fresh = S390.refreshed(state, [cpu("/a"), cpu("/machine/peripheral/vcpu1", 1)])
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
    with pytest.raises(VcpuConnectionError) as caught:
        X86.state(slots, cpus)
    assert "try again" in caught.value.hint


WRONG_PATHS = [0, "", [], {}, True]
WRONG_NUMBERS = [None, True, -1, 1.0, "1", [], float("nan")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("cpu-index", value) for value in WRONG_NUMBERS),
        *(("thread-id", value) for value in WRONG_NUMBERS),
        *(("qom-path", value) for value in [None, *WRONG_PATHS]),
        *(
            ("props", value)
            for value in (1, [], "x", {"core-id": None}, {"core-id": 1.0}, {"thread-id": True})
        ),
    ],
)
def test_one_wrong_member_of_query_cpus_fast_is_malformed(key, value):
    with pytest.raises(VcpuConnectionError, match=key) as caught:
        check_reply("query-cpus-fast", [cpu("/a"), cpu("/b", 1) | {key: value}])
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("key", ["cpu-index", "thread-id", "qom-path"])
def test_one_missing_member_of_query_cpus_fast_is_malformed(key):
    missing = {k: v for k, v in cpu("/b", 1).items() if k != key}
    with pytest.raises(VcpuConnectionError, match=key):
        check_reply("query-cpus-fast", [missing])


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
        check_reply("query-hotpluggable-cpus", [slot(core_id=0), slot(core_id=1) | {key: value}])
    assert caught.value.reason == "malformed"


def test_as_many_vcpus_as_a_machine_can_have_are_read():
    assert X86.state([slot("/a", MOST, core_id=0)], [cpu("/a")]).maxcpus == MOST


@pytest.mark.parametrize(
    "slots", [[slot(count=MOST + 1)], [slot(count=MOST, core_id=0), slot(core_id=1)]]
)
def test_more_vcpus_than_any_machine_has_are_malformed(slots):
    with pytest.raises(VcpuConnectionError, match="more than"):
        check_reply("query-hotpluggable-cpus", slots)


def test_two_cpus_at_one_path_are_malformed():
    with pytest.raises(VcpuConnectionError, match="the same qom-path"):
        check_reply("query-cpus-fast", [cpu("/a"), cpu("/a", 1)])


@pytest.mark.parametrize("wrong", [True, 0, -1, "8", 8.0, None, MOST + 1])
def test_a_topology_that_cannot_be_is_malformed(wrong):
    with pytest.raises(VcpuConnectionError, match="maxcpus"):
        topology_of({"maxcpus": wrong})


def test_a_topology_has_one_of_every_level_that_is_absent():
    reply = {"maxcpus": 8, "sockets": 2, "cores": 4, "cpus": 3}
    assert topology_of(reply) == Topology(maxcpus=8, sockets=2, cores=4)


@pytest.mark.parametrize("reply", [None, {"sockets": 2}])
def test_a_machine_that_does_not_tell_its_size_has_no_topology(reply):
    assert topology_of(reply) is None


def version(*numbers):
    return version_of(
        {"version": {"qemu": dict(zip(("major", "minor", "micro"), numbers, strict=True))}}
    )


def test_versions_compare_as_numbers():
    assert version(7, 2, 22) < version(10, 0, 2) < version(10, 1, 0) < version(11, 0, 0)


def test_a_version_is_written_with_its_three_numbers():
    assert str(version(10, 0, 2)) == "10.0.2"


SCALAR = st.integers() | st.text(max_size=4) | st.booleans()


ODD_PROPS = st.dictionaries(
    st.text(min_size=1, max_size=6).filter(lambda key: not key.endswith("-id")), SCALAR
)


def with_props(extra):
    return X86.state([slot("/a", core_id=0) | {"props": {**extra, "core-id": 0}}], [cpu("/a")])


@settings(max_examples=25)
@given(ODD_PROPS)
def test_props_that_are_not_known_go_through_unchanged(extra):
    assert dict(with_props(extra).entities[0].props) == {**extra, "core-id": 0}


@settings(max_examples=25)
@given(ODD_PROPS)
def test_a_state_survives_a_pickle(extra):
    state = with_props(extra)
    again = pickle.loads(pickle.dumps(state))
    assert (again, hash(again)) == (state, hash(state))


def test_a_state_that_was_pickled_finds_its_entities_by_id():
    state = with_props({})
    assert pickle.loads(pickle.dumps(state)).by_id[0] == state.entities[0]


def test_threads_of_a_machine_without_hotplug_are_vcpus_of_their_own():
    """Seen with qemu-system-ppc64 -machine powernv9 -smp 2."""
    cpus = [cpu(f"/machine/chip[0]/core[{n}]/thread[0]", n) for n in range(2)]
    assert len(S390.state(None, cpus).vcpus) == 2


def test_two_slots_with_one_path_are_malformed():
    with pytest.raises(VcpuConnectionError):
        check_reply("query-hotpluggable-cpus", [slot("/a", core_id=n) for n in (0, 1)])


@pytest.mark.parametrize("node", [-5, "1", True])
def test_a_node_that_cannot_be_is_malformed(node):
    with pytest.raises(VcpuConnectionError):
        check_reply("query-hotpluggable-cpus", [slot(core_id=0, node_id=node)])


def test_the_message_about_a_long_value_is_short():
    with pytest.raises(VcpuConnectionError) as error:
        check_reply("query-cpus-fast", [cpu("/a", "x" * 10**6, 1)])
    assert len(str(error.value)) < 10**4
