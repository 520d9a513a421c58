"""Which vCPUs a request means, for every machine and set of plugged vCPUs that hypothesis can think
of.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpvcpu import VcpuFlag, VcpuUsageError, parse_ids
from tests.support.states import change_definition, codes, definition, format_ids, plan, ppc64, x86

ENABLE, DISABLE, CORE, NODE = VcpuFlag.ENABLE, VcpuFlag.DISABLE, VcpuFlag.CORE, VcpuFlag.NUMA_NODE
PLUGGED = st.sets(st.integers(1, 15)).map(lambda others: {0, *others})


def moved(made):
    """First ids of what is plugged or unplugged."""
    return [step["vcpus"][0] for step in made.steps]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("5", (5,)),
        ("1-3,7", (1, 2, 3, 7)),
        ("0-7,^2", (0, 1, 3, 4, 5, 6, 7)),
        ("3,3", (3,)),
        ("^1,0-1", (0, 1)),
        ("0-3,^2,2", (0, 1, 2, 3)),
        ("0-3,^1-2,1", (0, 1, 3)),
        ("^0-3,2,^5", (2,)),
    ],
)
def test_id_lists_are_virshs(text, ids):
    assert parse_ids(text) == ids


@pytest.mark.parametrize(
    "text", ["", "a", "3-1", "-1", "1,", "^1", "1,^1", "1-", "9999999", "1;2", "٣"]
)
def test_bad_id_lists_say_what_to_write(text):
    with pytest.raises(VcpuUsageError) as error:
        parse_ids(text)
    assert error.value.hint


def test_a_list_of_ids_is_written_as_ranges():
    assert format_ids(parse_ids("0-3,5,7-8")) == "0-3,5,7-8"


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
        assert ids and ids == tuple(sorted(set(ids)))


@settings(max_examples=40)
@given(PLUGGED, st.integers(0, 1), st.integers(1, 9), st.booleans())
def test_a_node_gives_its_lowest_disabled_or_highest_enabled_vcpus(plugged, node, count, enable):
    made = plan(
        x86(plugged, kvm=True, cores=4), [node], (ENABLE if enable else DISABLE) | NODE, count=count
    )
    members = range(node * 8, node * 8 + 8)
    if enable:
        candidates = [n for n in members if n not in plugged]
    else:
        candidates = [n for n in reversed(members) if n in plugged and n != 0]
    if count > len(candidates):
        assert (codes(made), made.steps) == (["node"], [])
    else:
        assert made.targets == tuple(sorted(candidates[:count]))
        assert (moved(made), made.refusals) == (sorted(candidates[:count]), ())


@settings(max_examples=40)
@given(PLUGGED, st.integers(0, 15), st.booleans())
def test_core_moves_both_threads_and_leaves_those_that_are_so_already(plugged, vcpu, enable):
    made = plan(x86(plugged, kvm=True, cores=4), [vcpu], (ENABLE if enable else DISABLE) | CORE)
    core = {vcpu & ~1, vcpu | 1}
    expected = core - plugged if enable else core & plugged
    assert (set(made.targets), set(made.unchanged)) == (core, core - expected)
    if not enable and 0 in expected:
        assert codes(made) == ["boot-cpu"]
    else:
        assert (set(moved(made)), codes(made)) == (expected, [])


@given(plugged=st.sets(st.integers(1, 7)), total=st.integers(1, 8))
def test_every_count_is_reached_from_every_sparse_set(plugged, total):
    plugged = {0, *plugged}
    made = plan(x86(plugged, kvm=True), [], total=total)
    plugs = [n for step in made.steps if step["step"] == "device_add" for n in step["vcpus"]]
    unplugs = [n for step in made.steps if step["step"] == "device_del" for n in step["vcpus"]]
    assert not (made.refusals or (plugs and unplugs))
    after = (plugged | set(plugs)) - set(unplugs)
    assert (len(after), 0 in after) == (total, True)
    # libvirt's choice: nothing lower was left out, nothing higher left in.
    assert all(n > max(plugs) for n in set(range(8)) - after) if plugs else True
    assert all(n < min(unplugs) for n in after - {0}) if unplugs else True


@given(plugged=st.sets(st.integers(1, 3)), total=st.integers(1, 16))
def test_a_count_moves_whole_cores_only_and_names_what_can_be_had(plugged, total):
    made = plan(ppc64({0, *plugged}, kvm=True), [], total=total)
    if total % 4 == 0:
        difference = sum(
            len(s["vcpus"]) * (1 if s["step"] == "device_add" else -1) for s in made.steps
        )
        assert (len({0, *plugged}) * 4 + difference, made.refusals) == (total, ())
        return
    (refusal,) = made.refusals
    assert refusal.libvirt == "VIR_ERR_CONFIG_UNSUPPORTED"
    below = total // 4 * 4
    if below:
        assert (refusal.hint, "cores of 4" in refusal.message) == (
            f"request {below} or {below + 4}",
            True,
        )
    else:
        assert "at least 4 remain" in refusal.message


@pytest.mark.parametrize(
    ("total", "words"), [(0, "cannot have 0"), (-1, "cannot have -1"), (9, "can have 8")]
)
def test_counts_that_cannot_be_are_refused_with_a_hint(total, words):
    (refusal,) = plan(x86(), [], total=total).refusals
    assert words in refusal.message
    assert (refusal.libvirt, bool(refusal.hint)) == ("VIR_ERR_INVALID_ARG", True)


@pytest.mark.parametrize("number", [-1, 8])
def test_an_id_that_cannot_be_is_out_of_range_live_and_in_the_definition(number):
    assert (
        codes(plan(x86(), [number], ENABLE))
        == codes(change_definition(definition(), [number], ENABLE))
        == ["range"]
    )


@pytest.mark.parametrize("flag", [VcpuFlag.GUEST, VcpuFlag.CONFIG])
def test_no_hotplug_is_planned_for_what_is_not_the_running_guest(flag):
    made = plan(x86((0, 1)), [1], DISABLE | flag)
    assert ([step for step in made.steps if step["step"].startswith("device")], made.refusals) == (
        [],
        (),
    )


@given(
    enabled=st.sets(st.integers(1, 15)),
    ids=st.sets(st.integers(1, 15), min_size=1),
    enable=st.booleans(),
)
def test_a_definition_is_as_asked_or_it_is_refused(enabled, ids, enable):
    run = next(n for n in range(1, 17) if n not in enabled)
    before = definition(16, {0, *enabled}, pluggable=[n for n in enabled if n > run])
    made = change_definition(before, sorted(ids), ENABLE if enable else DISABLE)
    if made.refusals:
        assert (codes(made), made.new) == (["config-order"], before)
    else:
        assert set(made.new.enabled_ids) == ({0, *enabled} | ids if enable else {0, *enabled} - ids)


@given(enabled=st.sets(st.integers(1, 15)), total=st.integers(1, 16))
def test_a_count_in_a_definition_is_reached_and_what_starts_stands_together(enabled, total):
    run = next(n for n in range(1, 17) if n not in enabled)
    before = definition(16, {0, *enabled}, pluggable=[n for n in enabled if n > run])
    new = change_definition(before, [], total=total).new
    assert (len(new.enabled_ids), new.vcpus[0]) == (total, before.vcpus[0])
    fixed = [vcpu.id for vcpu in new.vcpus if vcpu.enabled and not vcpu.hotpluggable]
    assert fixed == list(range(len(fixed)))


@pytest.mark.parametrize(
    ("version", "removed", "killed"),
    [((11, 1), 0, 0), ((11, 1), 4, 0), ((11, 1), 5, 1), ((11, 1), 9, 1)],
)
def test_a_plug_that_may_use_up_the_last_tcg_context_is_refused(version, removed, killed):
    made = plan(x86((0, 1), version=version), [4, 5], ENABLE, removals=removed)
    assert len(codes(made)) == killed


@pytest.mark.parametrize(
    ("state", "ids", "removed", "words"),
    [
        (x86((0, 1), version=(7, 2)), [5], 1, "plug after an unplug"),
        (x86((0, 1), version=(11, 1)), [5], 6, "at least 8 of 8"),
        (ppc64((0, 1), threads=8), range(16, 24), 9, "tcg_register_thread"),
    ],
)
def test_a_plug_after_unplugs_that_kills_qemu_is_refused_unless_forced(state, ids, removed, words):
    made = plan(state, ids, ENABLE, removals=removed)
    assert codes(made) == ["kills-qemu"]
    assert words in made.refusals[0].message
    assert plan(state, ids, ENABLE, removals=removed, force=True).refusals == ()


@pytest.mark.parametrize(("shared", "removed"), [(False, 5), (True, 50)])
def test_a_plug_after_unplugs_is_done_where_it_is_safe_enough(shared, removed):
    assert plan(x86((0, 1), shared=shared), [5], ENABLE, removals=removed).refusals == ()
