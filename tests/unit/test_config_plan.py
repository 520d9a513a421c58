"""CONFIG as a pure decision: what a request makes of a definition, and why not. The rules are libvirt's."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.core.config import plan_config, state_of
from qmpvcpu.core.definition import Definition, NumaCell, VcpuConfig, contradictions, default_vcpus, definition_of
from qmpvcpu.core.model import Topology
from qmpvcpu.core.request import Listed, Request
from qmpvcpu.flags import VcpuFlag
from tests.unit.test_counts import x86

ENABLE, DISABLE, CORE, NODE = VcpuFlag.ENABLE, VcpuFlag.DISABLE, VcpuFlag.CORE, VcpuFlag.NUMA_NODE


def definition(maximum=8, enabled=(0, 1), pluggable=(), dialect="libvirt", **fields):
    vcpus = tuple(VcpuConfig(n, n in enabled, n in pluggable or n not in enabled) for n in range(maximum))
    return Definition("d", vcpus, dialect=dialect, **fields)


def ppc64(**fields):
    return definition(
        32, range(8), arch="ppc64le", machine="pseries-10.0", topology=Topology(32, cores=4, threads=8), **fields
    )


def codes(plan):
    return [refusal.code for refusal in plan.refusals]


def test_a_switched_vcpu_is_hotpluggable_and_the_order_goes():
    before = Definition(
        "d", (VcpuConfig(0, True, False, 1), VcpuConfig(1, True, True, 2), VcpuConfig(2, False, True))
    )
    plan = plan_config(before, Request((2,), ENABLE | VcpuFlag.CONFIG))
    assert (plan.targets, plan.changed, plan.unchanged, plan.writes) == ((2,), (2,), (), True)
    assert plan.new.vcpus == (VcpuConfig(0, True, False), VcpuConfig(1, True, True), VcpuConfig(2, True, True))


def test_what_is_so_already_writes_nothing_and_keeps_the_order():
    before = Definition("d", (VcpuConfig(0, True, False, 1), VcpuConfig(1, True, True, 2)))
    plan = plan_config(before, Request((1,), ENABLE | VcpuFlag.CONFIG))
    assert (plan.writes, plan.unchanged, plan.new) == (False, (1,), before)
    assert plan.steps == []


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Request((0,), DISABLE), "config-vcpu-0"),
        (Request((8,), ENABLE), "range"),
        (Request((-1,), ENABLE), "range"),
        (Request((2,), ENABLE, count=2), "count"),
        (Request((0,), ENABLE | NODE), "node"),
        (Request((), total=9), "count"),
        (Request((), total=0), "count"),
        (Request((), total=20000, maximum=True), "maximum"),
    ],
)
def test_what_a_definition_refuses(request_, code):
    plan = plan_config(definition(), request_)
    assert codes(plan) == [code]
    assert (plan.writes, plan.steps) == (False, [])


def test_every_reason_at_once():
    plan = plan_config(definition(), Request((0, 9), DISABLE))
    assert codes(plan) == ["range", "config-vcpu-0"]


def test_those_that_start_together_stay_together():
    before = definition(enabled=(0, 1, 2, 3))
    assert codes(plan_config(before, Request((2,), DISABLE))) == ["config-order"]
    assert plan_config(before, Request((2, 3), DISABLE)).new.enabled_ids == (0, 1)
    assert plan_config(before, Request((3,), DISABLE)).new.enabled_ids == (0, 1, 2)
    # One that is plugged later stands in nobody's way.
    assert plan_config(definition(enabled=(0, 1, 5), pluggable=(5,)), Request((1,), DISABLE)).refusals == ()
    # The RFC's dialect does not say which ones are started with.
    assert plan_config(definition(enabled=(0, 1, 2), dialect="rfc"), Request((1,), DISABLE)).refusals == ()


def test_whole_cores_on_pseries():
    part = plan_config(ppc64(), Request((9,), ENABLE))
    assert codes(part) == ["entity"]
    assert "vCPUs 8-15" in part.refusals[0].message
    assert plan_config(ppc64(), Request((9,), ENABLE | CORE)).changed == tuple(range(8, 16))
    assert codes(plan_config(ppc64(), Request((3,), DISABLE | CORE))) == ["config-vcpu-0"]
    assert codes(plan_config(ppc64(), Request((), total=12))) == ["count"]
    assert plan_config(ppc64(), Request((), total=24)).new.enabled_ids == tuple(range(24))


def test_cores_and_nodes_by_the_definitions_own_numbers():
    before = definition(
        topology=Topology(8, sockets=2, cores=2, threads=2),
        cells=(NumaCell(0, (0, 1, 2, 3)), NumaCell(1, (4, 5, 6, 7))),
        arch="x86_64",
    )
    assert plan_config(before, Request((5,), ENABLE | CORE)).changed == (4, 5)
    assert plan_config(before, Request((1,), ENABLE | NODE)).changed == (4,)
    assert plan_config(before, Request((1,), ENABLE | NODE, count=3)).changed == (4, 5, 6)
    assert plan_config(before, Request((0,), ENABLE | NODE | CORE)).changed == (2, 3)
    assert codes(plan_config(before, Request((1,), DISABLE | NODE))) == ["node"]


def test_ids_that_the_running_guest_has_chosen():
    plan = plan_config(definition(), Request((1,), ENABLE | NODE | VcpuFlag.LIVE | VcpuFlag.CONFIG), (4, 5))
    assert (plan.targets, plan.changed) == ((4, 5), (4, 5))


def test_a_count_adds_the_lowest_and_removes_the_highest():
    grown = plan_config(definition(enabled=(0, 1)), Request((), total=4)).new
    assert [(v.enabled, v.hotpluggable) for v in grown.vcpus[:5]] == [(True, False)] * 4 + [(False, True)]
    grown = plan_config(definition(enabled=(0, 1)), Request((), total=4, hotpluggable=True)).new
    assert [v.hotpluggable for v in grown.vcpus[:4]] == [False, False, True, True]
    # Behind one that can be unplugged, what is added must be so too (libvirt's rule).
    grown = plan_config(definition(enabled=(0, 2), pluggable=(2,)), Request((), total=4)).new
    assert [(v.enabled, v.hotpluggable) for v in grown.vcpus[:4]] == [
        (True, False),
        (True, False),
        (True, True),
        (True, True),
    ]
    shrunk = plan_config(definition(enabled=(0, 1, 5), pluggable=(5,)), Request((), total=2))
    assert (shrunk.new.enabled_ids, shrunk.changed) == ((0, 1), (5,))


def test_the_maximum():
    grown = plan_config(definition(4), Request((), total=6, maximum=True))
    assert (grown.new.maxcpus, grown.new.enabled_ids, grown.changed) == (6, (0, 1), ())
    assert grown.steps == [{"step": "set-maximum", "vcpus": [], "maximum": 6}]
    cut = plan_config(definition(8, enabled=(0, 1, 7), pluggable=(7,)), Request((), total=4, maximum=True))
    assert (cut.new.maxcpus, cut.changed) == (4, (7,))
    assert cut.messages == ("vCPU 7 was enabled in the definition, and is gone",)
    both = definition(topology=Topology(8, sockets=8), cells=(NumaCell(0, tuple(range(8))),))
    assert codes(plan_config(both, Request((), total=4, maximum=True))) == ["maximum", "maximum"]
    assert plan_config(both, Request((), total=8, maximum=True)).refusals == ()


def test_what_a_file_lists():
    listed = definition(enabled=(0, 5), pluggable=(5,)).vcpus
    plan = plan_config(definition(), Request((), listed=Listed(listed, exact=True, place="f.xml")))
    assert (plan.changed, plan.new.vcpus) == ((1, 5), listed)
    again = plan_config(plan.new, Request((), listed=Listed(listed, exact=True)))
    assert not again.writes
    # In the RFC's dialect only the state counts.
    rfc = definition(enabled=(0, 1), dialect="rfc")
    plan = plan_config(rfc, Request((), listed=Listed(listed, exact=True)))
    assert plan.new.enabled_ids == (0, 5)
    assert not plan_config(plan.new, Request((), listed=Listed(listed, exact=True))).writes
    assert codes(plan_config(definition(4), Request((), listed=Listed(listed, exact=True)))) == ["listed"]
    half = tuple(replace(vcpu, enabled=vcpu.id < 9) for vcpu in ppc64().vcpus)
    assert codes(plan_config(ppc64(), Request((), listed=Listed(half, exact=True)))) == ["entity"]


def test_a_definition_in_the_words_of_a_state():
    before = definition(
        enabled=(0, 1, 5),
        pluggable=(5,),
        arch="x86_64",
        machine="q35",
        accel="tcg",
        pins={1: (2, 3)},
        cpuset=(0,),
        schedulers={5: "fifo:10"},
        cells=(NumaCell(1, tuple(range(8))),),
    )
    state = state_of(before, "web1")
    assert (state.name, state.arch, state.machine, state.accel, state.active, state.version) == (
        "web1",
        "x86_64",
        "q35",
        "tcg",
        False,
        None,
    )
    assert state.enabled_ids == (0, 1, 5)
    assert [state.vcpus[n].pin for n in (0, 1)] == ["0", "2-3"]
    assert (state.vcpus[5].scheduler, state.vcpus[5].node) == ("fifo:10", 1)
    # The boot CPU alone can never go.
    assert [vcpu.hotpluggable for vcpu in state.vcpus] == [False] + [True] * 7


def test_a_running_guest_in_the_words_of_a_definition():
    state = x86({0, 3})
    boot = replace(state.vcpus[0], qom_path="/machine/unattached/device[0]")
    found = definition_of(replace(state, vcpus=(boot, *state.vcpus[1:])))
    assert found.enabled_ids == (0, 3)
    # libvirt's word: what has no device id of its own cannot go.
    assert [vcpu.hotpluggable for vcpu in found.vcpus[:4]] == [False, True, True, True]


def test_contradictions():
    twice = definition(enabled=(0, 1, 2), pluggable=(1, 2))
    twice = replace(twice, vcpus=tuple(replace(v, order=2) if v.id in (1, 2) else v for v in twice.vcpus))
    assert contradictions(twice) == ["vCPU 1 and 2 have the same order 2"]
    half = replace(ppc64(), vcpus=tuple(replace(vcpu, enabled=vcpu.id < 9) for vcpu in ppc64().vcpus))
    assert contradictions(half) == ["vCPUs 8-15 are one core, and differ"]


@given(
    enabled=st.sets(st.integers(1, 15)),
    ids=st.sets(st.integers(1, 15), min_size=1),
    total=st.integers(1, 16),
    enable=st.booleans(),
)
def test_whatever_is_asked_the_result_is_as_asked_or_refused(enabled, ids, total, enable):
    run = 1
    while run in enabled:
        run += 1
    before = definition(16, {0, *enabled}, pluggable=[n for n in enabled if n > run])
    plan = plan_config(before, Request(tuple(sorted(ids)), ENABLE if enable else DISABLE))
    if plan.refusals:
        assert codes(plan) == ["config-order"]
        assert plan.new == before
    else:
        assert set(plan.new.enabled_ids) == ({0, *enabled} | ids if enable else {0, *enabled} - ids)
    counted = plan_config(before, Request((), total=total))
    assert len(counted.new.enabled_ids) == total
    assert counted.new.vcpus[0] == before.vcpus[0]
    # What cannot be unplugged stands together at the start.
    fixed = [vcpu.id for vcpu in counted.new.vcpus if vcpu.enabled and not vcpu.hotpluggable]
    assert fixed == list(range(len(fixed)))


def test_defaults():
    assert default_vcpus(3, 2) == (
        VcpuConfig(0, True, False),
        VcpuConfig(1, True, False),
        VcpuConfig(2, False, True),
    )
