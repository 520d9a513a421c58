"""What arithmetic may answer, and what a QEMU said, read again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qmpvcpu.core.arch import architecture_of_machine
from qmpvcpu.core.layout import (
    LayoutSource,
    MachineSpec,
    MachineType,
    QemuFacts,
    facts_of,
    parse_layout,
    predict_layout,
)
from qmpvcpu.core.model import QemuVersion
from qmpvcpu.core.smp import NumaNode, parse_smp
from qmpvcpu.errors import VcpuConnectionError, VcpuRefused

GREETING = {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}}
FACTS = QemuFacts(
    "x86_64",
    QemuVersion(10, 0, 2),
    {"q35": MachineType("pc-q35-10.0", True, "qemu64-x86_64-cpu"), "microvm": MachineType("microvm")},
)


def spec(machine="q35", smp="2,maxcpus=4", **more):
    return MachineSpec(machine, parse_smp(smp), **more)


def test_a_prediction_knows_names_and_drivers():
    found = predict_layout(spec(nodes=(NumaNode(0, (0, 1)), NumaNode(1, (2, 3)))), "x86_64", FACTS)
    assert (found.machine, found.version, found.cpu_type) == ("pc-q35-10.0", FACTS.version, "qemu64-x86_64-cpu")
    assert [(v.id, v.enabled, v.node, v.order) for v in found.vcpus()] == [
        (0, True, 0, 1),
        (1, True, 0, 2),
        (2, False, 1, None),
        (3, False, 1, None),
    ]
    assert [v.order for v in found.vcpus((0, 3))] == [1, None, None, 2]
    document = json.loads(json.dumps(found.to_json()))
    assert document["source"] == "predicted" and document["maxcpus"] == 4 and len(document["vcpus"]) == 4


def test_without_facts_only_what_every_version_says():
    found = predict_layout(spec(), "x86_64")
    assert found.machine == "q35" and found.version is None and found.cpu_type == "qemu64-x86_64-cpu"
    # 7.2 tells no more than a core-id there, and cannot give TCG threads here.
    assert predict_layout(spec("s390-ccw-virtio"), "s390x") is None
    assert predict_layout(spec("pseries", "2,threads=2,maxcpus=4"), "ppc64") is None
    # 7.2 has no hotplug there.
    assert predict_layout(spec("virt"), "loongarch64") is None
    # What only the newest has, it alone says.
    assert predict_layout(spec("s390-ccw-virtio-11.1"), "s390x").slots[0].props["socket-id"] == 0
    assert predict_layout(spec("pc-q35-12.0"), "x86_64") is None
    with pytest.raises(VcpuRefused, match="hierarchy"):
        predict_layout(spec(smp="3,cores=2"), "x86_64")


def test_between_two_measured_versions_what_both_say():
    between = replace(FACTS, version=QemuVersion(9, 2))
    assert predict_layout(spec(), "x86_64", between).version == QemuVersion(9, 2)
    assert predict_layout(spec(smp="2,sockets=0,maxcpus=4"), "x86_64", between) is None
    assert predict_layout(spec(), "x86_64", replace(FACTS, version=QemuVersion(12, 0))) is None
    assert predict_layout(spec(), "x86_64", replace(FACTS, version=QemuVersion(6, 2))) is None


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (spec("microvm"), "no hotplug"),
        (spec("isapc"), "no rules for it"),
        (spec("pc-q35-2.4"), "perhaps it is gone by now"),
        (spec("q35,strange=on"), "an option that may matter"),
        (spec(cpu="EPYC"), "a model nobody has seen"),
        (spec(smp="2,maxcpus=288"), "a size not every machine takes"),
    ],
)
def test_what_is_left_to_a_qemu(asked, why):
    assert predict_layout(asked, "x86_64", FACTS) is None, why


def test_cpu_models():
    seen = replace(FACTS, cpu_types={"EPYC": "EPYC-v5-x86_64-cpu"})
    assert predict_layout(spec(cpu="EPYC,+svm"), "x86_64", seen).cpu_type == "EPYC-v5-x86_64-cpu"
    assert predict_layout(spec(cpu="EPYC"), "x86_64", assume=True).cpu_type == "EPYC-x86_64-cpu"
    # Its name is known to no rule: enough for the slots, not for a device_add.
    power = spec("pseries", cpu="POWER9")
    assert predict_layout(power, "ppc64", assume=True).cpu_type is None
    assert predict_layout(power, "ppc64", assume=True, typed=True) is None
    assert predict_layout(spec("pseries"), "ppc64", typed=True) is None


def test_the_machine_tells_its_target():
    names = ("q35", "pc-q35-7.2", "pc", "pc-i440fx-10.0", "pseries,cap-cfpc=broken", "s390-ccw-virtio-8.2", "virt")
    found = [architecture_of_machine(name) for name in names]
    assert [row and row.name for row in found] == ["x86_64"] * 4 + ["ppc64", "s390x", None]


def test_facts_are_kept_as_json():
    seen = replace(FACTS, cpu_types={"max": "max-x86_64-cpu"})
    assert QemuFacts.from_json(json.loads(json.dumps(seen.to_json()))) == seen
    good = seen.to_json()
    for bad in (
        None,
        [],
        {},
        good | {"machines": 5},
        good | {"machines": {"q35": [5, True, None]}},
        good | {"machines": {"q35": [1, 2, 3, 4]}},
        good | {"machines": {"q35": ["x", True, 5]}},
        good | {"version": ["a"]},
        good | {"version": ["a", "b"]},
        good | {"cpu_types": {"a": 1}},
        good | {"arch": None},
    ):
        with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
            QemuFacts.from_json(bad)


REPLIES = {
    "greeting": GREETING,
    "query-target": {"arch": "x86_64"},
    "type": "pc-q35-10.0-machine",
    "smp": {"maxcpus": 2, "cpus": 1, "sockets": 1, "cores": 2, "threads": 1},
    "query-hotpluggable-cpus": [
        {"type": "t", "vcpus-count": 1, "props": {"core-id": 1}},
        {"type": "t", "vcpus-count": 1, "props": {"core-id": 0}, "qom-path": "/p/0"},
    ],
    "query-cpus-fast": [{"cpu-index": 0, "qom-path": "/p/0", "thread-id": 7, "target": "x86_64"}],
}


def test_what_a_qemu_said():
    found = parse_layout(REPLIES, "tcg", LayoutSource.CACHED)
    assert (found.machine, found.cpu_type, found.cpus, found.maxcpus) == ("pc-q35-10.0", "t", 1, 2)
    assert found.can_plug and found.can_unplug and found.source == "cached"
    facts = facts_of(spec(), found)
    assert facts.machines == {"q35": MachineType("pc-q35-10.0", True, "t")} and not facts.cpu_types
    more = facts_of(spec(cpu="EPYC,+svm"), found, facts)
    assert more.machines == facts.machines and more.cpu_types == {"EPYC": "t"}
    bare = REPLIES | {"query-hotpluggable-cpus": None}
    found = parse_layout(bare, "tcg", LayoutSource.PROBED)
    assert not found.can_plug and [(slot.props, slot.plugged) for slot in found.slots] == [
        (None, True),
        (None, False),
    ]
    assert not any(vcpu.hotpluggable for vcpu in found.vcpus())


@pytest.mark.parametrize("key", [key for key in REPLIES if key != "smp"])
@pytest.mark.parametrize("value", [None, 5, [], {}, [5], {"arch": 5}])
def test_what_no_qemu_says(key, value):
    replies = REPLIES | {key: value}
    if key == "query-cpus-fast":
        replies["query-hotpluggable-cpus"] = None
        if value == []:
            return  # `-machine none`
    if key == "query-hotpluggable-cpus" and value is None:
        return  # no CPU hotplug
    with pytest.raises(VcpuConnectionError):
        parse_layout(replies, "tcg", LayoutSource.PROBED)
