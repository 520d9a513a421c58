"""What is planned and what is refused, for machines made by hand."""

from __future__ import annotations

import pytest

from qmpvcpu.core.checks import apic_id
from qmpvcpu.core.inventory import BootFacts, CpuInfoFast, HotpluggableCpu, build_state
from qmpvcpu.core.model import Props, QemuVersion, Topology, format_ids
from qmpvcpu.core.plan import make_plan
from qmpvcpu.core.request import Knowledge, Request, parse_ids
from qmpvcpu.errors import VcpuUsageError
from qmpvcpu.flags import VcpuFlag

ENABLE, DISABLE, CORE, NODE = VcpuFlag.ENABLE, VcpuFlag.DISABLE, VcpuFlag.CORE, VcpuFlag.NUMA_NODE


def machine(arch="x86_64", plugged=(0, 1), kvm=True, version=(10, 0), shared=False, nodes=True, cores=4, slots=8):
    """x86: 2 sockets x 2 cores x 2 threads, one node a socket. ppc64: cores of 8. s390x: flat."""
    entities = []
    for n in range(cores if arch == "ppc64" else slots):
        if arch == "ppc64":
            props, per = {"core-id": n * 8, "node-id": n // 2}, 8
        elif arch == "s390x":
            props, per = {"core-id": n}, 1
        else:
            props, per = {"socket-id": n // 4, "core-id": n // 2 % 2, "thread-id": n % 2}, 1
            if nodes:
                props["node-id"] = n // 4
        path = f"/machine/unattached/device[{n}]" if n in plugged else None
        entities.append(HotpluggableCpu("t-cpu", per, Props(props), path))
    fast = [
        CpuInfoFast(n * e.vcpus_count + k, e.qom_path + (f"/thread[{k}]" if arch == "ppc64" else ""), 1, None)
        for n, e in enumerate(entities)
        if e.qom_path
        for k in range(e.vcpus_count)
    ]
    if not shared:
        fast = [CpuInfoFast(c.cpu_index, c.qom_path, 100 + c.cpu_index, None) for c in fast]
    topology = Topology(maxcpus=8, sockets=2, cores=2, threads=2)
    boot = BootFacts("d", arch, "m", kvm, QemuVersion(*version), topology)
    return build_state(boot, entities, fast)


def plan(state, ids, flags, known=None, **more):
    return make_plan(state, Request(tuple(ids), flags, **more), known)


def codes(made):
    return [refusal.code for refusal in made.refusals]


@pytest.mark.parametrize(
    ("text", "ids"), [("5", (5,)), ("1-3,7", (1, 2, 3, 7)), ("0-7,^2", (0, 1, 3, 4, 5, 6, 7)), ("3,3", (3,))]
)
def test_id_lists_are_virshs(text, ids):
    assert parse_ids(text) == ids


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1,", "^1", "1,^1", "1-", "9999999", "1;2", "٣"])
def test_bad_id_lists_say_what_to_write(text):
    with pytest.raises(VcpuUsageError) as error:
        parse_ids(text)
    assert error.value.hint


def test_format_ids_is_the_inverse():
    assert format_ids(parse_ids("0-3,5,7-8")) == "0-3,5,7-8"


def test_a_plug_keeps_props_verbatim():
    made = plan(machine(), [5], ENABLE)
    assert made.steps == [
        {
            "step": "device_add",
            "vcpus": [5],
            "arguments": {
                "driver": "t-cpu",
                "id": "vcpu5",
                "socket-id": 1,
                "core-id": 0,
                "thread-id": 1,
                "node-id": 1,
            },
        }
    ]
    assert made.describe()[0].startswith("plug vCPU 5: device_add t-cpu,id=vcpu5")


def test_a_cpu_of_the_start_is_unplugged_by_its_path():
    assert plan(machine(), [1], DISABLE).steps[0]["arguments"] == {"id": "/machine/unattached/device[1]"}


def test_what_is_so_already_is_unchanged_and_no_refusal():
    made = plan(machine(), [0, 1, 5], ENABLE)
    assert (made.unchanged, [e.first for e in made.plugs], made.refusals) == ((0, 1), [5], ())
    assert plan(machine("ppc64"), [3], ENABLE).refusals == ()
    assert plan(machine("s390x"), [5], DISABLE).refusals == ()


def test_all_reasons_come_together():
    made = plan(machine("ppc64"), [0, 9, 16, 99], ENABLE | DISABLE | VcpuFlag.GUEST | CORE)
    assert codes(made) == ["flags", "flags", "range"]
    made = plan(machine("ppc64"), [0, 9, 99], DISABLE)
    assert codes(made) == ["range", "entity", "entity", "boot-cpu"]


def test_a_part_of_a_core_names_the_siblings_and_core():
    refusal = plan(machine("ppc64"), [17], ENABLE).refusals[0]
    assert (refusal.code, refusal.ids, refusal.libvirt) == ("entity", (17,), "VIR_ERR_INVALID_ARG")
    assert "16-23" in refusal.message
    assert "--core" in refusal.hint


def test_core_means_an_entity_on_ppc64_and_all_threads_on_x86():
    assert plan(machine("ppc64"), [17], ENABLE | CORE).targets == tuple(range(16, 24))
    assert plan(machine(), [5], ENABLE | CORE).targets == (4, 5)
    assert plan(machine("s390x"), [5], ENABLE | CORE).targets == (5,)


@pytest.mark.parametrize(
    ("arch", "ids", "flags", "code", "libvirt"),
    [
        ("x86_64", [0], DISABLE, "boot-cpu", "VIR_ERR_OPERATION_UNSUPPORTED"),
        ("s390x", [1], DISABLE, "no-unplug", "VIR_ERR_OPERATION_UNSUPPORTED"),
        ("x86_64", [8], ENABLE, "range", "VIR_ERR_INVALID_ARG"),
        ("x86_64", [-1], ENABLE, "range", "VIR_ERR_INVALID_ARG"),
        ("x86_64", [5], ENABLE | VcpuFlag.GUEST | VcpuFlag.CONFIG, "flags", "VIR_ERR_INVALID_ARG"),
    ],
)
def test_refusals(arch, ids, flags, code, libvirt):
    refusal = plan(machine(arch), ids, flags).refusals[0]
    assert (refusal.code, refusal.libvirt, refusal.forceable) == (code, libvirt, False)


def test_a_query_is_for_live_or_for_config():
    assert codes(plan(machine(), [1], VcpuFlag.LIVE | VcpuFlag.CONFIG)) == ["flags"]


def test_nodes():
    state = machine()
    assert plan(state, [1], ENABLE | NODE).targets == (4,)
    assert plan(state, [1], ENABLE | NODE, count=3).targets == (4, 5, 6)
    assert plan(state, [0], DISABLE | NODE).targets == (1,)
    assert plan(state, [1], NODE).targets == (4, 5, 6, 7)
    assert plan(state, [1], ENABLE | NODE | CORE).targets == (4, 5)
    assert plan(state, [1], ENABLE | NODE | CORE, count=2).targets == (4, 5, 6, 7)
    for ids, flags, more in (
        ([7], ENABLE | NODE, {}),  # unknown
        ([1], DISABLE | NODE, {}),  # empty
        ([1], ENABLE | NODE, {"count": 5}),
        ([0, 1], ENABLE | NODE, {}),
    ):
        assert codes(plan(state, ids, flags, **more)) == ["node"]
    assert codes(plan(machine(plugged=range(8)), [1], ENABLE | NODE)) == ["node"]  # full
    assert "no NUMA" in plan(machine(nodes=False), [0], ENABLE | NODE).refusals[0].message
    assert codes(plan(state, [3], ENABLE, count=2)) == ["count"]


def test_a_nodes_core_on_ppc64():
    assert plan(machine("ppc64", plugged=(0,)), [1], ENABLE | NODE | CORE).targets == tuple(range(16, 24))
    assert codes(plan(machine("ppc64", plugged=(0,)), [1], ENABLE | NODE)) == ["entity"]


@pytest.mark.parametrize(
    ("options", "ids", "flags", "known", "words"),
    [
        ({"version": (7, 2)}, [1], DISABLE, Knowledge(), "crashes after the unplug"),
        ({"version": (7, 2)}, [5], ENABLE, Knowledge(removals_seen=1), "plug after an unplug"),
        ({"version": (7, 2), "shared": True}, [1], DISABLE, Knowledge(), "qemu_thread_join"),
        ({"version": (10, 0), "shared": True}, [1], DISABLE, Knowledge(), "qemu_thread_join"),
        ({"version": (11, 1)}, [5], ENABLE, Knowledge(removals_seen=6), "at least 8 of 8"),
        ({"arch": "ppc64", "version": (10, 0)}, range(8, 16), DISABLE, Knowledge(firmware_runs=True), "firmware"),
        ({"arch": "ppc64"}, range(16, 24), ENABLE, Knowledge(removals_seen=9), "tcg_register_thread"),
    ],
)
def test_what_kills_qemu_under_tcg_is_refused_unless_forced_and_fine_under_kvm(options, ids, flags, known, words):
    made = plan(machine(kvm=False, **options), ids, flags, known)
    kills = [refusal for refusal in made.refusals if refusal.code == "kills-qemu"]
    assert any(words in kill.message for kill in kills)
    assert all(kill.forceable and "--force" in kill.hint for kill in kills)
    forced = plan(machine(kvm=False, **options), ids, flags, known, force=True)
    assert (codes(forced), any("forced: " in message for message in forced.messages)) == ([], True)
    assert codes(plan(machine(kvm=True, **options), ids, flags, known)) == []


@pytest.mark.parametrize(
    ("options", "flags", "known"),
    [
        ({"version": (11, 1), "shared": True}, DISABLE, Knowledge()),
        ({"version": (10, 0)}, DISABLE, Knowledge()),
        ({"version": (10, 0)}, ENABLE, Knowledge(removals_seen=5)),
        ({"version": (10, 0), "shared": True}, ENABLE, Knowledge(removals_seen=50)),
    ],
)
def test_what_is_safe_enough_under_tcg_is_done(options, flags, known):
    assert codes(plan(machine(kvm=False, **options), [1 if flags & DISABLE else 5], flags, known)) == []


def test_under_tcg_a_change_is_never_called_safe():
    assert "TCG" in plan(machine(kvm=False), [5], ENABLE).messages[0]
    assert plan(machine(kvm=True), [5], ENABLE).messages == ()


def test_apic_ids_have_a_power_of_two_for_each_level():
    """QEMU 10.0: -smp sockets=2,dies=3,modules=2,cores=3,threads=2 gives widths 1, 2, 1, 2."""
    topology = Topology(maxcpus=72, sockets=2, dies=3, modules=2, cores=3, threads=2)
    boot = BootFacts("d", "x86_64", "m", False, QemuVersion(10, 0), topology)
    props = Props({"socket-id": 1, "die-id": 2, "module-id": 1, "core-id": 2, "thread-id": 1})
    first = HotpluggableCpu("t", 1, Props({"socket-id": 0}), "/a")
    state = build_state(boot, [HotpluggableCpu("t", 1, props, None), first], [CpuInfoFast(0, "/a", 1, None)])
    assert apic_id(state, state.entities[1]) == 1 << 6 | 2 << 4 | 1 << 3 | 2 << 1 | 1


def test_a_pending_unplug_is_awaited_before_the_plug():
    made = plan(machine(), [1], ENABLE, Knowledge(pending=frozenset({1})))
    assert [step["step"] for step in made.steps] == ["await-unplug", "device_add"]
    assert made.unchanged == ()
