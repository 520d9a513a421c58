"""Which vCPUs a request means, for made machines; and every version and accelerator for what kills QEMU."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpvcpu.core import checks
from qmpvcpu.core.inventory import BootFacts, CpuInfoFast, HotpluggableCpu, build_state
from qmpvcpu.core.model import Props, QemuVersion, Topology, format_ids
from qmpvcpu.core.plan import make_plan
from qmpvcpu.core.request import Knowledge, Request, parse_ids
from qmpvcpu.errors import VcpuUsageError
from qmpvcpu.flags import VcpuFlag

ENABLE, DISABLE, CORE, NODE = VcpuFlag.ENABLE, VcpuFlag.DISABLE, VcpuFlag.CORE, VcpuFlag.NUMA_NODE


def x86(plugged=(0, 1), *, kvm=False, version=(10, 0), shared=False, sockets=2, cores=2, threads=2):
    """One node a socket."""
    places = [(s, c, t) for s in range(sockets) for c in range(cores) for t in range(threads)]
    slots = [
        HotpluggableCpu(
            "t",
            1,
            Props({"socket-id": s, "core-id": c, "thread-id": t, "node-id": s}),
            f"/machine/peripheral/vcpu{n}" if n in plugged else None,
        )
        for n, (s, c, t) in enumerate(places)
    ]
    fast = [CpuInfoFast(n, f"/machine/peripheral/vcpu{n}", 1 if shared else 100 + n, None) for n in plugged]
    topology = Topology(len(places), sockets=sockets, cores=cores, threads=threads)
    return build_state(BootFacts("d", "x86_64", "q35", kvm, QemuVersion(*version), topology), slots, fast)


def ppc64(plugged=(0,), *, kvm=False, version=(10, 0), cores=4, threads=4):
    """Two cores a node."""
    slots = [
        HotpluggableCpu(
            "t", threads, Props({"core-id": n * threads, "node-id": n // 2}), f"/c{n}" if n in plugged else None
        )
        for n in range(cores)
    ]
    fast = [
        CpuInfoFast(n * threads + k, f"/c{n}/thread[{k}]", 100 + n * threads + k, None)
        for n in plugged
        for k in range(threads)
    ]
    return build_state(BootFacts("d", "ppc64", "pseries", kvm, QemuVersion(*version), None), slots, fast)


def plan(state, ids, flags, known=None, **more):
    return make_plan(state, Request(tuple(ids), flags, **more), known)


def kills(made):
    return [refusal for refusal in made.refusals if refusal.code == "kills-qemu"]


@settings(max_examples=30)
@given(st.sets(st.integers(0, 999999), min_size=1, max_size=30))
def test_an_id_list_written_and_read_is_the_same(ids):
    assert parse_ids(format_ids(ids)) == tuple(sorted(ids))


@given(st.text(alphabet="0123456789-,^ x", max_size=8))
def test_any_text_is_ids_or_a_usage_error_with_a_hint(text):
    try:
        ids = parse_ids(text)
    except VcpuUsageError as error:
        assert error.hint
    else:
        assert ids == tuple(sorted(set(ids)))
        assert ids


PLUGGED = st.sets(st.integers(1, 15)).map(lambda others: {0, *others})


@settings(max_examples=40)
@given(PLUGGED, st.integers(0, 1), st.integers(1, 9), st.booleans())
def test_a_node_gives_its_lowest_disabled_or_highest_enabled_vcpus(plugged, node, count, enable):
    state = x86(plugged, kvm=True, cores=4)
    made = plan(state, [node], (ENABLE if enable else DISABLE) | NODE, count=count)
    members = range(node * 8, node * 8 + 8)
    if enable:
        candidates = [n for n in members if n not in plugged]
    else:
        candidates = [n for n in reversed(members) if n in plugged and n != 0]
    if count > len(candidates):
        assert [refusal.code for refusal in made.refusals] == ["node"]
        assert not (made.plugs or made.unplugs)
    else:
        assert made.targets == tuple(sorted(candidates[:count]))
        assert [entity.first for entity in (made.plugs or made.unplugs)] == sorted(candidates[:count])
        assert not made.refusals


@settings(max_examples=40)
@given(PLUGGED, st.integers(0, 15), st.booleans())
def test_core_moves_both_threads_and_leaves_those_that_are_so_already(plugged, vcpu, enable):
    made = plan(x86(plugged, kvm=True, cores=4), [vcpu], (ENABLE if enable else DISABLE) | CORE)
    core = {vcpu & ~1, vcpu | 1}
    moved = core - plugged if enable else core & plugged
    assert set(made.targets) == core
    assert {entity.first for entity in (made.plugs or made.unplugs)} == moved
    assert set(made.unchanged) == core - moved
    assert [refusal.code for refusal in made.refusals] == (["boot-cpu"] if not enable and 0 in moved else [])


def test_several_cores_of_a_node_on_ppc64_come_whole():
    made = plan(ppc64(kvm=True), [1], ENABLE | NODE | CORE, count=2)
    assert (made.targets, [entity.first for entity in made.plugs]) == (tuple(range(8, 16)), [8, 12])
    made = plan(ppc64((0, 1, 2), kvm=True), [0], DISABLE | NODE | CORE)
    assert made.targets == (4, 5, 6, 7)  # the core of the boot CPU is never chosen


@pytest.mark.parametrize("flags", [ENABLE, DISABLE])
def test_every_split_entity_is_named_with_its_own_siblings(flags):
    state = ppc64((0, 2) if flags & ENABLE else (0, 1, 2, 3), kvm=True)
    made = plan(state, [5, 6, 12], flags)
    assert [(refusal.code, refusal.ids) for refusal in made.refusals] == [("entity", (5, 6)), ("entity", (12,))]
    assert [words in made.refusals[n].message for n, words in enumerate(("4-7", "12-15"))] == [True, True]
    assert all("--core" in refusal.hint for refusal in made.refusals)


def test_no_hotplug_is_told_once_for_all():
    boot = BootFacts("d", "aarch64", "virt", False, QemuVersion(10, 0), Topology(4, cores=4))
    state = build_state(boot, None, [CpuInfoFast(n, f"/{n}", n, None) for n in range(2)])
    for ids, flags in (([2, 3], ENABLE), ([0, 1], DISABLE)):
        (refusal,) = plan(state, ids, flags).refusals
        assert (refusal.code, refusal.libvirt) == ("no-hotplug", "VIR_ERR_OPERATION_UNSUPPORTED")
        assert set(refusal.ids) == set(ids)
    assert plan(state, [0, 1], ENABLE).refusals == ()


@pytest.mark.parametrize(
    ("version", "shared", "kvm", "killed"),
    [
        ((7, 2, 22), False, False, True),
        ((7, 2, 22), True, False, True),
        ((7, 2, 22), False, True, False),
        ((10, 0, 2), False, False, False),
        ((10, 0, 2), True, False, True),
        ((10, 0, 2), True, True, False),
        ((11, 1, 3), False, False, False),
        ((11, 1, 3), True, False, False),
    ],
)
def test_unplug_of_an_x86_cpu_by_version_thread_mode_and_accelerator(version, shared, kvm, killed):
    state = x86(version=version, shared=shared, kvm=kvm)
    assert bool(kills(plan(state, [1], DISABLE))) is killed
    assert (checks.undo_forbidden(state, Knowledge()) is not None) is killed
    assert not kills(plan(state, [1], DISABLE, force=True))


@pytest.mark.parametrize(
    ("version", "kvm", "firmware", "killed"),
    [
        ((7, 2), False, True, True),
        ((10, 0), False, True, True),
        ((10, 0), False, False, False),
        ((10, 0), True, True, False),
        ((11, 1), False, True, False),
    ],
)
def test_unplug_of_a_ppc64_core_while_the_firmware_runs(version, kvm, firmware, killed):
    state, known = ppc64((0, 1), version=version, kvm=kvm), Knowledge(firmware_runs=firmware)
    assert bool(kills(plan(state, range(4, 8), DISABLE, known))) is killed
    assert (checks.undo_forbidden(state, known) is not None) is killed


@pytest.mark.parametrize(
    ("version", "kvm", "x2apic", "killed"),
    [
        ((10, 0), False, None, True),
        ((10, 0), False, False, True),
        ((10, 0), False, True, False),
        ((10, 0), True, None, False),
        ((11, 1), False, None, False),
    ],
)
def test_plug_of_an_apic_id_of_255_or_more(version, kvm, x2apic, killed):
    state = x86((0,), version=version, kvm=kvm, sockets=3, cores=128, threads=1)
    known = Knowledge(x2apic=x2apic)
    assert checks.apic_id(state, state.entities[254]) == 254
    assert not kills(plan(state, [254], ENABLE, known))
    assert bool(kills(plan(state, [255], ENABLE, known))) is killed
    assert bool(kills(plan(state, [254, 300], ENABLE, known))) is killed


@pytest.mark.parametrize(("removed", "killed"), [(0, False), (4, False), (5, True)])
def test_a_plug_that_may_use_up_the_last_tcg_context(removed, killed):
    state = x86((0, 1), version=(11, 1))
    assert bool(kills(plan(state, [4, 5], ENABLE, Knowledge(removals_seen=removed)))) is killed


def test_a_kill_is_told_beside_the_other_reasons_and_force_overrides_only_it():
    state = x86(version=(7, 2))
    made = plan(state, [0, 1, 99], DISABLE)
    assert [refusal.code for refusal in made.refusals] == ["range", "boot-cpu", "kills-qemu"]
    forced = plan(state, [0, 1, 99], DISABLE, force=True)
    assert [refusal.code for refusal in forced.refusals] == ["range", "boot-cpu"]


def test_an_undo_is_forbidden_where_nothing_is_ever_unplugged():
    slots = [HotpluggableCpu("t", 1, Props({"core-id": n}), "/a" if n == 0 else None) for n in range(2)]
    boot = BootFacts("d", "s390x", "s390-ccw-virtio", True, QemuVersion(10, 0), None)
    state = build_state(boot, slots, [CpuInfoFast(0, "/a", 1, None)])
    assert "never unplugs" in checks.undo_forbidden(state, Knowledge())


def test_a_plan_as_json_and_as_lines():
    made = plan(x86((0, 1, 4), kvm=True), [1, 4], DISABLE)
    document = json.loads(json.dumps(made.to_json()))
    assert {"plan", "refusals"} <= set(document)
    assert document["plan"] == [
        {"step": "device_del", "vcpus": [n], "arguments": {"id": f"vcpu{n}"}} for n in (1, 4)
    ]
    assert made.describe() == [f"unplug vCPU {n}: device_del vcpu{n}" for n in (1, 4)]
    assert plan(x86(kvm=True), [0, 1], ENABLE).describe() == ["vCPU 0-1: already enabled"]
    assert plan(x86(kvm=True), [9], ENABLE).to_json()["refusals"] == [
        "vCPU 9 is not in this domain: its ids are 0 to 7"
    ]
