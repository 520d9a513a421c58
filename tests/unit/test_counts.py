"""`set_vcpus`: which vCPUs make a count, beside sparse sets, whole cores and pending unplugs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.core.pending import mark
from qmpvcpu.core.plan import make_plan
from qmpvcpu.core.request import Knowledge, Request
from qmpvcpu.flags import VcpuFlag
from tests.unit.test_selection_and_kills import ppc64, x86


def count(state, total, pending=()):
    known = Knowledge(pending=frozenset(pending))
    return make_plan(mark(state, known.pending), Request((), total=total), known)


def moved(plan):
    return [n for e in plan.plugs for n in e.ids], [n for e in plan.unplugs for n in e.ids]


@pytest.mark.parametrize(
    ("plugged", "total", "plugs", "unplugs"),
    [
        ({0, 1}, 4, [2, 3], []),
        ({0, 5}, 4, [1, 2], []),
        ({0, 1, 3, 6}, 2, [], [3, 6]),
        ({0, 1, 3, 6}, 1, [], [1, 3, 6]),
        ({0, 1}, 2, [], []),
        ({0}, 8, [1, 2, 3, 4, 5, 6, 7], []),
    ],
)
def test_the_lowest_are_added_and_the_highest_removed(plugged, total, plugs, unplugs):
    assert moved(count(x86(plugged), total)) == (plugs, unplugs)


@given(plugged=st.sets(st.integers(1, 7)), total=st.integers(1, 8))
def test_every_count_is_reached_from_every_sparse_set(plugged, total):
    plugged = {0, *plugged}
    plan = count(x86(plugged), total)
    plugs, unplugs = moved(plan)
    assert not plan.refusals
    assert not (plugs and unplugs)
    after = (plugged | set(plugs)) - set(unplugs)
    assert (len(after), 0 in after) == (total, True)
    # libvirt's choice: nothing lower was left out, nothing higher left in.
    assert all(n > max(plugs) for n in set(range(8)) - after) if plugs else True
    assert all(n < min(unplugs) for n in after - {0}) if unplugs else True


@given(plugged=st.sets(st.integers(1, 3)), total=st.integers(1, 16))
def test_whole_cores_only_and_the_text_names_what_can_be_had(plugged, total):
    plan = count(ppc64({0, *plugged}), total)
    if total % 4:
        assert [refusal.libvirt for refusal in plan.refusals] == ["VIR_ERR_CONFIG_UNSUPPORTED"]
        below = total // 4 * 4
        if below:
            assert plan.refusals[0].hint == f"ask for {below} or {below + 4}"
            assert "cores of 4" in plan.refusals[0].message
        else:
            assert "4 is the fewest" in plan.refusals[0].message
    else:
        plugs, unplugs = moved(plan)
        assert (len({0, *plugged}) * 4 + len(plugs) - len(unplugs), plan.refusals) == (total, ())


@pytest.mark.parametrize(("total", "words"), [(0, "cannot have 0"), (-1, "cannot have -1"), (9, "can have 8")])
def test_counts_that_cannot_be(total, words):
    (refusal,) = count(x86(), total).refusals
    assert words in refusal.message
    assert (refusal.libvirt, bool(refusal.hint)) == ("VIR_ERR_INVALID_ARG", True)


def test_what_is_leaving_counts_as_gone():
    state = x86({0, 1, 2, 3})
    # 2 will go: three are wanted, and three will be. It is only waited for.
    assert moved(count(state, 3, {2})) == ([], [2])
    assert moved(count(state, 2, {2})) == ([], [2, 3])
    # A free slot is sooner there than one that has yet to be emptied.
    plan = count(state, 4, {2})
    assert (moved(plan), plan.awaited) == (([4], []), ())
    full = count(x86(set(range(8))), 8, {2})
    assert [entity.first for entity in full.awaited] == [2]


def test_a_machine_that_never_unplugs_says_so():
    from tests.unit.test_plan import machine

    plan = make_plan(machine("s390x", plugged=(0, 1, 2)), Request((), total=1))
    assert [refusal.code for refusal in plan.refusals] == ["no-unplug"]


def test_a_kill_is_refused_for_counts_too():
    plan = make_plan(x86({0, 1, 2}, version=(7, 2)), Request((), total=1))
    assert [refusal.code for refusal in plan.refusals] == ["kills-qemu"]


def test_nothing_to_do_is_said():
    plan = count(x86({0, 1}), 2)
    assert (plan.describe(), plan.steps, plan.targets) == (["2 vCPUs are enabled already"], [], ())


def test_a_node_never_counts_a_vcpu_that_is_leaving():
    state = mark(x86({0, 1, 2, 3}, sockets=2), {3})
    flags = VcpuFlag.DISABLE | VcpuFlag.NUMA_NODE
    assert make_plan(state, Request((0,), flags), Knowledge(pending=frozenset({3}))).targets == (2,)
    flags = VcpuFlag.ENABLE | VcpuFlag.NUMA_NODE
    plan = make_plan(state, Request((0,), flags), Knowledge(pending=frozenset({3})))
    assert ([e.first for e in plan.awaited], plan.refusals) == ([3], ())


@pytest.mark.parametrize("flag", [VcpuFlag.GUEST, VcpuFlag.CONFIG])
def test_no_hotplug_is_planned_for_what_is_not_the_running_guest(flag):
    plan = make_plan(x86({0, 1}), Request((1,), VcpuFlag.DISABLE | flag))
    assert (plan.unplugs, plan.refusals) == ((), ())
