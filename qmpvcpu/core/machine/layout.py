"""The vCPUs of a guest that does not run: what is asked of a QEMU, what is known of its program, the answer. Pure.

An answer comes of arithmetic (`predict_layout`) or of a QEMU that was asked (`parse_layout`), now or before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import Any, Final

from qmpvcpu.core.arch import Architecture, EntityKind, architecture
from qmpvcpu.core.machine.numa import NumaOption
from qmpvcpu.core.machine.smp import MachineSlot, Prediction, Smp, is_known, is_proven, predict
from qmpvcpu.core.machine.versions import MEASURED, enclosing, has_machine, measured_with, newest_type
from qmpvcpu.core.machine.words import parse_switch, split_pairs
from qmpvcpu.core.model import QemuVersion, Topology, Vcpu
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.state.inventory import (
    entities_of_slots,
    entities_without_slots,
    parse_cpus_fast,
    parse_hotpluggable_cpus,
    parse_topology,
    parse_version,
)
from qmpvcpu.errors import VcpuConnectionError, VcpuRefused


class LayoutSource(StrEnum):
    """Where an answer comes from."""

    PREDICTED = "predicted"
    CACHED = "cached"
    PROBED = "probed"


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """What a QEMU is asked to be. `machine` and `cpu` are the arguments of -machine and -cpu, with their options;
    `accel` is "kvm" or "tcg", `numa` every -numa, in order.
    """

    machine: str
    smp: Smp
    cpu: str | None = None
    accel: str = "tcg"
    numa: tuple[NumaOption, ...] = ()

    @property
    def machine_type(self) -> str:
        """The machine without its options."""
        return self.machine.partition(",")[0]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; equal for what is equal."""
        return {
            "machine": self.machine,
            "smp": str(self.smp),
            "cpu": self.cpu,
            "accel": self.accel,
            "numa": [str(option) for option in self.numa],
        }


@dataclass(frozen=True, slots=True)
class MachineType:
    """What a QEMU makes of the name of a machine: its own name for it, and the driver of its default CPUs."""

    name: str
    hotpluggable: bool = False
    cpu_type: str | None = None


@dataclass(frozen=True, slots=True)
class QemuFacts:
    """What has been seen of one QEMU program, and holds whatever else it is asked to be.

    `machines` is by the name that was asked, `cpu_types` are drivers of `device_add` by CPU model.
    """

    arch: str
    version: QemuVersion
    machines: Mapping[str, MachineType] = field(default_factory=dict)
    cpu_types: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        machines = {name: [seen.name, seen.hotpluggable, seen.cpu_type] for name, seen in self.machines.items()}
        version = [self.version.major, self.version.minor, self.version.micro]
        return {"arch": self.arch, "version": version, "machines": machines, "cpu_types": dict(self.cpu_types)}

    def are_of(self, layout: MachineLayout) -> bool:
        """Whether the program that gave this layout is the same QEMU."""
        return (self.arch, self.version) == (layout.arch, layout.version)

    @classmethod
    def from_json(cls, data: Any) -> QemuFacts:
        """Of `to_json()`.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is not.
        """
        version, cpu_types = QemuVersion(*data["version"]), dict(data["cpu_types"])
        machines = {name: MachineType(*seen) for name, seen in data["machines"].items()}
        texts = [data["arch"], *(seen.name for seen in machines.values()), *cpu_types, *cpu_types.values()]
        texts += [seen.cpu_type for seen in machines.values() if seen.cpu_type is not None]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("texts were expected")
        if not all(type(number) is int for number in (version.major, version.minor, version.micro)):
            raise TypeError("a version was expected")
        return cls(data["arch"], version, machines, cpu_types)


@dataclass(frozen=True, slots=True)
class MachineLayout:
    """The vCPUs of a machine: `slots` in the order of vCPU ids, `cpus` of them there from the start.

    `machine` is QEMU's own name for it, `version` None where it did not matter. `cpu_type` is the driver of
    `device_add`, None where that is not known or a machine has no CPU hotplug.
    """

    arch: str
    machine: str
    version: QemuVersion | None
    accel: str
    can_plug: bool
    can_unplug: bool
    cpu_type: str | None
    topology: Topology | None
    cpus: int
    slots: tuple[MachineSlot, ...]
    source: LayoutSource

    @property
    def maxcpus(self) -> int:
        """How many vCPU ids there are."""
        return sum(slot.vcpus_count for slot in self.slots)

    def entities(self) -> list[tuple[tuple[int, ...], MachineSlot]]:
        """Each slot with its vCPU ids."""
        firsts = accumulate((slot.vcpus_count for slot in self.slots), initial=0)
        return [(tuple(range(n, n + slot.vcpus_count)), slot) for n, slot in zip(firsts, self.slots, strict=False)]

    def vcpus(self, started: Sequence[int] | None = None) -> list[Vcpu]:
        """A row for each, as it is at the start.

        Args:
            started: first ids of the entities that are there then, in the order in which they come; else those of
                -smp.
        """
        found = self.entities()
        if started is None:
            started = [ids[0] for ids, slot in found if slot.plugged]
        order = {first: rank for rank, first in enumerate(started, 1)}
        rows = []
        for ids, slot in found:
            is_there = ids[0] in order
            node = slot.props.get("node-id") if slot.props is not None else None
            hotpluggable = self.can_plug and (not is_there or (self.can_unplug and ids[0] != 0))
            rows += [Vcpu(n, is_there, hotpluggable, ids, slot.props, order.get(ids[0]), node) for n in ids]
        return rows

    def to_json(self) -> dict[str, Any]:
        """The document of `probe --json`."""
        return {
            "source": str(self.source),
            "arch": self.arch,
            "machine": self.machine,
            "version": str(self.version) if self.version is not None else None,
            "accel": self.accel,
            "can_plug": self.can_plug,
            "can_unplug": self.can_unplug,
            "cpu_type": self.cpu_type,
            "maxcpus": self.maxcpus,
            "cpus": self.cpus,
            "topology": self.topology.to_json() if self.topology is not None else None,
            "vcpus": [vcpu.to_json() for vcpu in self.vcpus()],
        }


# -- a QEMU that was asked ------------------------------------------------------------------------


def facts_of(spec: MachineSpec, layout: MachineLayout, before: QemuFacts | None = None) -> QemuFacts:
    """What a probed layout teaches of its program, besides what was known `before`."""
    assert layout.version is not None, "it was probed"
    known = before or QemuFacts(layout.arch, layout.version)
    default = known.machines[spec.machine_type].cpu_type if spec.machine_type in known.machines else None
    models = {}
    if spec.cpu is None:
        default = layout.cpu_type or default
    elif layout.cpu_type is not None:
        models = {spec.cpu.partition(",")[0]: layout.cpu_type}
    machines = {spec.machine_type: MachineType(layout.machine, layout.can_plug, default)}
    return QemuFacts(layout.arch, layout.version, {**known.machines, **machines}, {**known.cpu_types, **models})


def parse_layout(replies: Mapping[str, Any], accel: str, source: LayoutSource) -> MachineLayout:
    """The replies of a QEMU that was asked, by command.

    `query-hotpluggable-cpus` is None where it has no hotplug, and only then there is `query-cpus-fast`.

    Raises:
        VcpuConnectionError: they cannot be QEMU's.
    """
    target, machine = replies["query-target"], replies["type"]
    arch = target.get("arch") if isinstance(target, dict) else None
    if not isinstance(arch, str) or not isinstance(machine, str):
        command = "query-target" if isinstance(machine, str) else "qom-get /machine type"
        raise VcpuConnectionError(
            f"what {command} answers cannot be QEMU's", reason="malformed", hint="is this program really a QEMU?"
        )
    topology = parse_topology(replies["smp"])
    can_plug = replies["query-hotpluggable-cpus"] is not None
    can_unplug = can_plug and architecture(arch).can_unplug
    if can_plug:
        entities = entities_of_slots(parse_hotpluggable_cpus(replies["query-hotpluggable-cpus"]), can_unplug)
    else:
        entities = entities_without_slots(parse_cpus_fast(replies["query-cpus-fast"]), topology)
    return MachineLayout(
        arch,
        machine.removesuffix("-machine"),
        parse_version(replies["greeting"]),
        accel,
        can_plug,
        can_unplug,
        entities[0].driver if entities else None,
        topology,
        sum(len(entity.ids) for entity in entities if entity.plugged),
        tuple(MachineSlot(entity.props, len(entity.ids), entity.plugged) for entity in entities),
        source,
    )


# -- arithmetic -----------------------------------------------------------------------------------

#: Options of a machine that leave its vCPUs alone, and what they take; None is a truth value.
_HARMLESS: Final[Mapping[str, Sequence[str] | None]] = {
    "usb": None,
    "graphics": None,
    "dump-guest-core": None,
    "mem-merge": None,
    "kernel-irqchip": ("on", "off", "split"),
}
_HARMLESS_WITH_NUMA: Final = {"hmat": None}
_HARMLESS_ON_PC: Final = {"hpet": None, "smm": ("on", "off", "auto"), "vmport": ("on", "off", "auto")}
_HARMLESS_ON_PSERIES: Final = dict.fromkeys(
    ("cap-cfpc", "cap-sbbc", "cap-ibs"), ("broken", "workaround")
) | dict.fromkeys(("cap-htm", "cap-nested-hv", "cap-large-decr", "cap-vsx", "cap-dfp", "cap-ccf-assist"), ("off",))


def predict_layout(
    spec: MachineSpec,
    arch: str,
    facts: QemuFacts | None = None,
    *,
    typed: bool = False,
    assume: bool = False,
    unseen: bool = False,
) -> MachineLayout | None:
    """The answer without a QEMU; None where arithmetic alone cannot be trusted.

    Args:
        arch: QEMU's target.
        facts: of the program; without, the answer is one that every version gives.
        typed: whether `cpu_type` must be known.
        assume: take a CPU model for one that QEMU has.
        unseen: there is a program, and its version is not known: only what every version has.

    Raises:
        VcpuRefused: QEMU would refuse it; the text says why.
    """
    row = architecture(arch)
    if facts is not None and facts.arch != row.name:
        return None
    known = facts.machines.get(spec.machine_type) if facts is not None else None
    if known is not None:
        machine, is_computed = known.name, known.hotpluggable
    else:
        machine = spec.machine_type
        is_computed = row.computes(machine) and _has_machine(machine, arch, facts, unseen=unseen)
    if not is_computed or (spec.accel != "tcg" and not row.computed_under_kvm):
        return None
    options = _options(spec, row)
    if options is None:
        return None
    found = _agreed(spec, arch, machine, facts.version if facts is not None else None, options)
    if found is None or not found.is_certain:
        return None
    cpu_type = _cpu_type(spec, row, known, facts, assume)
    if cpu_type is None and (typed or (spec.cpu is not None and not assume)):
        return None
    return MachineLayout(
        arch,
        machine,
        facts.version if facts is not None else None,
        spec.accel,
        True,
        row.can_unplug,
        cpu_type,
        found.topology,
        found.cpus,
        found.slots,
        LayoutSource.PREDICTED,
    )


def _has_machine(machine: str, arch: str, facts: QemuFacts | None, *, unseen: bool) -> bool:
    """Whether this QEMU surely has the machine type; without facts, whether all have it, or any.

    Raises:
        VcpuRefused: it surely has not.
    """
    if facts is None:
        found = [has_machine(version, machine) for version in MEASURED]
        return all(found) if unseen else any(found)
    answer = has_machine(facts.version, machine)
    if answer is False:
        newest = newest_type(facts.version, machine)
        if newest is None:
            raise catalogue.NO_MACHINE_TYPE.error(version=facts.version, arch=arch, machine=machine)
        raise catalogue.OLD_MACHINE_TYPE.error(version=facts.version, arch=arch, machine=machine, newest=newest)
    return answer is True


def _options(spec: MachineSpec, row: Architecture) -> dict[str, bool] | None:
    """Whether each switch of the machine is on; None where there is an option that may change its vCPUs.

    Raises:
        VcpuRefused: a value that no machine takes.
    """
    harmless = dict(_HARMLESS)
    harmless |= _HARMLESS_WITH_NUMA if row.has_numa else {}
    harmless |= _HARMLESS_ON_PC if row.has_apic else {}
    harmless |= _HARMLESS_ON_PSERIES if row.entity is EntityKind.CORE else {}
    switches = {}
    for key, value in split_pairs(spec.machine, "type")[1:]:
        values = harmless.get(key, ())
        if values is not None:
            if value not in values:
                return None
            continue
        switch = parse_switch(value)
        if switch is None:
            raise catalogue.MACHINE_SWITCH.error(key=key, value=value[:40])
        switches[key] = switch
    return switches


def _agreed(
    spec: MachineSpec, arch: str, machine: str, version: QemuVersion | None, options: Mapping[str, bool]
) -> Prediction | None:
    """What the versions say that enclose this one, if they say the same."""
    versions: Sequence[QemuVersion]
    if version is None:
        versions = measured_with(machine)
    elif is_proven(arch, machine, version):
        versions = (version,)
    else:
        versions = enclosing(version)
    found: list[Prediction] = []
    refused: list[VcpuRefused] = []
    for each in versions:
        if not is_known(arch, machine, each):
            return None
        try:
            found.append(
                predict(
                    arch,
                    machine,
                    each,
                    spec.smp,
                    spec.numa,
                    accel=spec.accel,
                    has_hmat=options.get("hmat", False),
                )
            )
        except VcpuRefused as error:
            refused.append(error)
    if refused and not found:
        raise refused[-1]
    if refused or not found or any(other != found[0] for other in found):
        return None
    return found[0]


#: CPU models that every QEMU has whose vCPUs are computed, without features, which not every one has.
_EVERYWHERE: Final = ("max",)
_UNDER_KVM: Final = ("max", "host")


def _cpu_type(
    spec: MachineSpec, row: Architecture, machine: MachineType | None, facts: QemuFacts | None, assume: bool
) -> str | None:
    cpu, accel = spec.cpu, spec.accel
    if cpu is not None:
        model = cpu.partition(",")[0]
        if facts is not None and model in facts.cpu_types:
            return facts.cpu_types[model]
        is_known = assume or cpu in (_EVERYWHERE if accel == "tcg" else _UNDER_KVM)
        return model + row.cpu_suffix if is_known and row.cpu_suffix is not None else None
    if machine is not None and machine.cpu_type is not None:
        return machine.cpu_type
    return row.default_cpu + row.cpu_suffix if row.default_cpu and row.cpu_suffix else None
