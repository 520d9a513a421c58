"""What arithmetic may answer, and what a QEMU said, read again."""

from __future__ import annotations

import json

import pytest

from qmpvcpu import VcpuConnectionError, VcpuRefused
from tests.support.machines import answered, learned, predicted, read_from_cache, spec

#: What was learned of a QEMU 10.0.
KNOWN = {
    "arch": "x86_64",
    "version": [10, 0, 2],
    "machines": {
        "q35": ["pc-q35-10.0", True, "qemu64-x86_64-cpu"],
        "microvm": ["microvm", False, None],
    },
    "cpu_types": {},
}


def q35(smp="2,maxcpus=4", **more):
    return spec("q35", smp, **more)


# -- a prediction ----------------------------------------------------------------------------------


@pytest.fixture(name="numa")
def machine_of_two_nodes():
    return predicted(q35(numa=["node,nodeid=0,cpus=0-1", "node,nodeid=1,cpus=2-3"]), known=KNOWN)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("machine", "pc-q35-10.0"),
        ("version", "10.0.2"),
        ("cpu_type", "qemu64-x86_64-cpu"),
        ("source", "predicted"),
    ],
)
def test_a_prediction_knows_names_and_drivers(numa, member, value):
    assert str(getattr(numa, member)) == value


def test_a_prediction_has_a_row_for_each_vcpu(numa):
    assert [(v.id, v.enabled, v.node, v.order) for v in numa.vcpus()] == [
        (0, True, 0, 1),
        (1, True, 0, 2),
        (2, False, 1, None),
        (3, False, 1, None),
    ]


def test_a_row_says_whether_the_guest_that_starts_has_it(numa):
    assert [vcpu.order for vcpu in numa.vcpus((0, 3))] == [1, None, None, 2]


def test_the_document_of_a_prediction_is_json(numa):
    document = json.loads(json.dumps(numa.to_json()))
    assert (document["source"], document["maxcpus"], len(document["vcpus"])) == ("predicted", 4, 4)


@pytest.mark.parametrize(
    ("member", "value"), [("machine", "q35"), ("version", None), ("cpu_type", "qemu64-x86_64-cpu")]
)
def test_without_a_qemu_names_are_those_of_every_version(member, value):
    assert getattr(predicted(q35()), member) == value


@pytest.mark.parametrize(
    ("asked", "arch", "why"),
    [
        (spec("s390-ccw-virtio", "2,maxcpus=4"), "s390x", "7.2 tells no more than a core-id there"),
        (spec("pseries", "2,threads=2,maxcpus=4"), "ppc64", "7.2 cannot give TCG threads there"),
        (spec("virt", "2,maxcpus=4"), "loongarch64", "7.2 has no hotplug there"),
        (spec("pc-q35-12.0", "2,maxcpus=4"), "x86_64", "no version that was measured has it"),
    ],
)
def test_without_a_qemu_only_what_every_version_says(asked, arch, why):
    assert predicted(asked, arch) is None, why


def test_what_only_the_newest_has_it_alone_says():
    found = predicted(spec("s390-ccw-virtio-11.1", "2,maxcpus=4"), "s390x")
    assert found.slots[0].props["socket-id"] == 0


def test_what_every_version_refuses_is_refused():
    with pytest.raises(VcpuRefused, match="hierarchy"):
        predicted(q35("3,cores=2"))


@pytest.mark.parametrize(
    ("version", "smp", "is_known"),
    [
        ([9, 2, 0], "2,maxcpus=4", True),
        ([9, 2, 0], "2,sockets=0,maxcpus=4", False),
        ([12, 0, 0], "2,maxcpus=4", False),
        ([6, 2, 0], "2,maxcpus=4", False),
    ],
    ids=["both say the same", "they differ", "newer than all", "older than all"],
)
def test_between_two_measured_versions_what_both_say(version, smp, is_known):
    assert (predicted(q35(smp), known=KNOWN | {"version": version}) is not None) is is_known


def test_a_prediction_between_two_versions_is_of_the_qemu_that_was_asked_for():
    assert str(predicted(q35(), known=KNOWN | {"version": [9, 2, 0]}).version) == "9.2.0"


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (spec("microvm", "2,maxcpus=4"), "no hotplug"),
        (spec("isapc", "2,maxcpus=4"), "no rules for it"),
        (spec("q35,smm=maybe", "2,maxcpus=4"), "a value that may be one"),
        (spec("pc-q35-4.0.1", "2,maxcpus=4"), "a name of another kind"),
        (spec("q35,strange=on", "2,maxcpus=4"), "an option that may matter"),
        (q35(cpu="EPYC"), "a model that was not seen"),
        (q35("2,maxcpus=288"), "a size not every machine takes"),
    ],
)
def test_what_is_left_to_a_qemu(asked, why):
    assert predicted(asked, known=KNOWN) is None, why


@pytest.mark.parametrize(
    ("version", "machine", "newest"),
    [
        ([7, 2, 22], "pc-q35-9.9", "pc-q35-7.2"),
        ([7, 2, 22], "pc-q35-8.0", "pc-q35-7.2"),
        ([10, 0, 2], "pc-q35-10.1", "pc-q35-10.0"),
        ([10, 0, 2], "pc-i440fx-2.3", "pc-i440fx-10.0"),
        ([11, 1, 3], "pc-q35-5.1", "pc-q35-11.1"),
        # Between two that were measured: not yet there, or gone already.
        ([9, 2, 0], "pc-q35-10.0", None),
        ([9, 2, 0], "pc-q35-9.3", None),
    ],
)
def test_a_machine_type_that_this_qemu_has_not_is_refused(version, machine, newest):
    with pytest.raises(
        VcpuRefused, match=f"QEMU {version[0]}.{version[1]}.{version[2]} for x86_64 .*'{machine}'"
    ) as caught:
        predicted(spec(machine, "2,maxcpus=4"), known=KNOWN | {"version": version})
    assert newest is None or newest in caught.value.hint


@pytest.mark.parametrize(
    ("version", "machine", "is_known"),
    [
        ([10, 0, 2], "pc-q35-2.4", True),
        ([10, 0, 2], "pc-q35-10.0", True),
        ([9, 2, 0], "pc-q35-9.2", True),
        ([9, 2, 0], "pc-q35-5.2", True),
        # QEMU drops old types, and nobody has seen when.
        ([10, 1, 0], "pc-q35-4.2", False),
        ([12, 0, 0], "pc-q35-11.1", False),
        # A developer's build on the way to 10.1.
        ([10, 0, 50], "pc-q35-10.1", False),
        ([10, 0, 50], "pc-q35-10.0", True),
    ],
)
def test_a_machine_type_is_predicted_where_it_is_surely_there(version, machine, is_known):
    found = predicted(spec(machine, "2,cores=2,maxcpus=4"), known=KNOWN | {"version": version})
    assert (found is not None) is is_known


@pytest.mark.parametrize(
    ("machine", "is_known"), [("pc-q35-7.0", True), ("pc-q35-8.0", False), ("q35", True)]
)
def test_of_a_qemu_whose_version_is_not_known_only_what_all_have(machine, is_known):
    assert (predicted(spec(machine, "2,maxcpus=4"), unseen=True) is not None) is is_known


def test_a_switch_of_the_machine_takes_a_truth_value():
    with pytest.raises(VcpuRefused, match="usb='perhaps'"):
        predicted(spec("q35,usb=perhaps", "2,maxcpus=4"), known=KNOWN)


@pytest.mark.parametrize(
    ("cpu", "known", "assume", "driver"),
    [
        (
            "EPYC,+svm",
            KNOWN | {"cpu_types": {"EPYC": "EPYC-v5-x86_64-cpu"}},
            False,
            "EPYC-v5-x86_64-cpu",
        ),
        ("EPYC", None, True, "EPYC-x86_64-cpu"),
    ],
    ids=["seen", "assumed"],
)
def test_the_driver_of_a_cpu_model(cpu, known, assume, driver):
    assert predicted(q35(cpu=cpu), known=known, assume=assume).cpu_type == driver


@pytest.mark.parametrize(
    ("cpu", "accel", "driver"),
    [
        ("max", "tcg", "max-x86_64-cpu"),
        ("max", "kvm", "max-x86_64-cpu"),
        ("host", "kvm", "host-x86_64-cpu"),
        ("host", "tcg", None),
        ("max,svm=on", "tcg", None),
    ],
)
def test_models_that_every_qemu_has_need_not_be_asked_for(cpu, accel, driver):
    found = predicted(q35(cpu=cpu, accel=accel))
    assert (found and found.cpu_type) == driver


def test_without_the_driver_of_a_cpu_model_the_slots_are_known():
    found = predicted(spec("pseries", "2,maxcpus=4", cpu="POWER9"), "ppc64", assume=True)
    assert (found.cpu_type, found.maxcpus) == (None, 4)


@pytest.mark.parametrize("cpu", ["POWER9", None])
def test_without_the_driver_nothing_is_predicted_for_a_device_add(cpu):
    assert (
        predicted(
            spec("pseries", "2,maxcpus=4", cpu=cpu), "ppc64", assume=cpu is not None, typed=True
        )
        is None
    )


# -- what is kept ----------------------------------------------------------------------------------

KEPT = KNOWN | {"cpu_types": {"max": "max-x86_64-cpu"}}


def test_what_was_learned_is_kept_as_json():
    assert read_from_cache(json.loads(json.dumps(KEPT))) == KEPT


@pytest.mark.parametrize(
    "kept",
    [
        None,
        [],
        {},
        KEPT | {"machines": 5},
        KEPT | {"machines": {"q35": [5, True, None]}},
        KEPT | {"machines": {"q35": [1, 2, 3, 4]}},
        KEPT | {"machines": {"q35": ["x", True, 5]}},
        KEPT | {"version": ["a"]},
        KEPT | {"version": ["a", "b"]},
        KEPT | {"cpu_types": {"a": 1}},
        KEPT | {"arch": None},
    ],
)
def test_what_is_kept_and_damaged_is_found_out(kept):
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        read_from_cache(kept)


# -- what a QEMU said ------------------------------------------------------------------------------

REPLIES = {
    "greeting": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}},
    "query-target": {"arch": "x86_64"},
    "type": "pc-q35-10.0-machine",
    "smp": {"maxcpus": 2, "cpus": 1, "sockets": 1, "cores": 2, "threads": 1},
    "query-hotpluggable-cpus": [
        {"type": "t", "vcpus-count": 1, "props": {"core-id": 1}},
        {"type": "t", "vcpus-count": 1, "props": {"core-id": 0}, "qom-path": "/p/0"},
    ],
    "query-cpus-fast": [{"cpu-index": 0, "qom-path": "/p/0", "thread-id": 7, "target": "x86_64"}],
}


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("machine", "pc-q35-10.0"),
        ("cpu_type", "t"),
        ("cpus", 1),
        ("maxcpus", 2),
        ("can_plug", True),
        ("can_unplug", True),
        ("source", "cached"),
    ],
)
def test_what_a_qemu_said(member, value):
    assert getattr(answered(REPLIES, source="cached"), member) == value


def test_an_answer_teaches_the_name_of_a_machine_and_its_driver():
    found = learned(q35(), answered(REPLIES))
    assert found == KNOWN | {"machines": {"q35": ["pc-q35-10.0", True, "t"]}}


def test_an_answer_about_a_cpu_model_adds_its_driver():
    before = learned(q35(), answered(REPLIES))
    found = learned(q35(cpu="EPYC,+svm"), answered(REPLIES), before)
    assert found == before | {"cpu_types": {"EPYC": "t"}}


@pytest.fixture(name="fixed")
def machine_without_hotplug():
    return answered(REPLIES | {"query-hotpluggable-cpus": None})


def test_a_machine_without_hotplug_plugs_nothing(fixed):
    assert not fixed.can_plug


def test_a_machine_without_hotplug_has_room_of_which_it_says_nothing(fixed):
    assert [(slot.props, slot.plugged) for slot in fixed.slots] == [(None, True), (None, False)]


def test_no_vcpu_of_a_machine_without_hotplug_is_hotpluggable(fixed):
    assert not any(vcpu.hotpluggable for vcpu in fixed.vcpus())


NONSENSE = [None, 5, [], {}, [5], {"arch": 5}]
#: `-machine none` has no CPU; without CPU hotplug there is no list of slots.
POSSIBLE = [("query-cpus-fast", []), ("query-hotpluggable-cpus", None)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in REPLIES
        for value in NONSENSE
        # A machine need not tell its topology.
        if key != "smp" and (key, value) not in POSSIBLE
    ],
)
def test_what_no_qemu_says(key, value):
    replies = REPLIES | {key: value}
    if key == "query-cpus-fast":
        replies["query-hotpluggable-cpus"] = None
    with pytest.raises(VcpuConnectionError):
        answered(replies)
