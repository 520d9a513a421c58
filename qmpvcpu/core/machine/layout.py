"""The vCPUs of a machine that does not run: the machine, what is known about QEMU's program, the
layout. Pure.

A layout comes from arithmetic (`predict_layout`) or from a QEMU that was probed (`parse_layout`),
now or before.
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
from qmpvcpu.core.machine.versions import MEASURED, enclosing, has_machine, newest_type
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
    """Where a layout comes from."""

    PREDICTED = "predicted"
    CACHED = "cached"
    PROBED = "probed"


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A machine that a QEMU can be started as. `machine` and `cpu` are the arguments of -machine
    and -cpu, with their options; `accel` is "kvm" or "tcg", `numa` every -numa, in order.
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
        """As plain JSON data; equal for equal machines."""
        return {
            "machine": self.machine,
            "smp": str(self.smp),
            "cpu": self.cpu,
            "accel": self.accel,
            "numa": [str(option) for option in self.numa],
        }


@dataclass(frozen=True, slots=True)
class MachineType:
    """What a QEMU reports about a machine type: its own name for it, and the driver of its default
    CPUs.
    """

    name: str
    hotpluggable: bool = False
    cpu_type: str | None = None


@dataclass(frozen=True, slots=True)
class QemuFacts:
    """What probes have shown about one QEMU program, whatever machine it is.

    `machines` is by the requested name, `cpu_types` are drivers of `device_add` by CPU model.
    """

    arch: str
    version: QemuVersion
    machines: Mapping[str, MachineType] = field(default_factory=dict)
    cpu_types: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        machines = {
            name: [seen.name, seen.hotpluggable, seen.cpu_type]
            for name, seen in self.machines.items()
        }
        return {
            "arch": self.arch,
            "version": [self.version.major, self.version.minor, self.version.micro],
            "machines": machines,
            "cpu_types": dict(self.cpu_types),
        }

    def are_of(self, layout: MachineLayout) -> bool:
        """Whether the program that gave this layout is the same QEMU."""
        return (self.arch, self.version) == (layout.arch, layout.version)

    @classmethod
    def from_json(cls, data: Any) -> QemuFacts:
        """Read what `to_json()` gave.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: the data are something else.
        """
        version, cpu_types = QemuVersion(*data["version"]), dict(data["cpu_types"])
        machines = {name: MachineType(*seen) for name, seen in data["machines"].items()}
        texts = [
            data["arch"],
            *(seen.name for seen in machines.values()),
            *cpu_types,
            *cpu_types.values(),
        ]
        texts += [seen.cpu_type for seen in machines.values() if seen.cpu_type is not None]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("texts were expected")
        if not all(type(number) is int for number in (version.major, version.minor, version.micro)):
            raise TypeError("a version was expected")
        return cls(data["arch"], version, machines, cpu_types)


@dataclass(frozen=True, slots=True)
class MachineLayout:
    """The vCPUs of a machine: `slots` in the order of vCPU ids, `cpus` of them there from the
    start.

    `machine` is QEMU's own name for it; `version` is None if it did not matter. `cpu_type` is the
    driver of `device_add`, None if that is not known or the machine has no CPU hotplug.
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
        entity_ids = accumulate((slot.vcpus_count for slot in self.slots), initial=0)
        return [
            (tuple(range(n, n + slot.vcpus_count)), slot)
            for n, slot in zip(entity_ids, self.slots, strict=False)
        ]

    def vcpus(self, started: Sequence[int] | None = None) -> list[Vcpu]:
        """A row for each vCPU, as it is at the start.

        Args:
            started: ids of the entities that are plugged then, in the order of plugging; None:
                those of -smp.
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
            rows += [
                Vcpu(n, is_there, hotpluggable, ids, slot.props, order.get(ids[0]), node)
                for n in ids
            ]
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


# -- a QEMU that was probed -----------------------------------------------------------------------


def facts_of(
    spec: MachineSpec, layout: MachineLayout, before: QemuFacts | None = None
) -> QemuFacts:
    """What is known about a program after this probe, with what was known `before`."""
    assert layout.version is not None, "it was probed"
    known = before or QemuFacts(layout.arch, layout.version)
    default = (
        known.machines[spec.machine_type].cpu_type if spec.machine_type in known.machines else None
    )
    models = {}
    if spec.cpu is None:
        default = layout.cpu_type or default
    elif layout.cpu_type is not None:
        models = {spec.cpu.partition(",")[0]: layout.cpu_type}
    machines = {spec.machine_type: MachineType(layout.machine, layout.can_plug, default)}
    return QemuFacts(
        layout.arch, layout.version, {**known.machines, **machines}, {**known.cpu_types, **models}
    )


def parse_layout(replies: Mapping[str, Any], accel: str, source: LayoutSource) -> MachineLayout:
    """The layout from a probed QEMU's replies, by command.

    `query-hotpluggable-cpus` is None if it has no hotplug, and only then there is
    `query-cpus-fast`.

    Raises:
        VcpuConnectionError: a reply cannot be QEMU's.
    """
    target, machine = replies["query-target"], replies["type"]
    arch = target.get("arch") if isinstance(target, dict) else None
    if not isinstance(arch, str) or not isinstance(machine, str):
        command = "query-target" if isinstance(machine, str) else "qom-get /machine type"
        raise VcpuConnectionError(
            f"the reply to {command} cannot be QEMU's",
            reason="malformed",
            hint="check that this program is a QEMU",
        )
    topology = parse_topology(replies["smp"])
    can_plug = replies["query-hotpluggable-cpus"] is not None
    can_unplug = can_plug and architecture(arch).can_unplug
    if can_plug:
        entities = entities_of_slots(
            parse_hotpluggable_cpus(replies["query-hotpluggable-cpus"]), can_unplug
        )
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

#: Options of a machine that do not change its vCPUs, and their values; None: on or off.
_HARMLESS: Final[Mapping[str, Sequence[str] | None]] = {
    "usb": None,
    "graphics": None,
    "dump-guest-core": None,
    "mem-merge": None,
    "kernel-irqchip": ("on", "off", "split"),
}
_HARMLESS_ON_PC: Final = {
    "hpet": None,
    "smm": ("on", "off", "auto"),
    "vmport": ("on", "off", "auto"),
}
_HARMLESS_ON_PSERIES: Final = dict.fromkeys(
    ("cap-cfpc", "cap-sbbc", "cap-ibs"), ("broken", "workaround")
) | dict.fromkeys(
    ("cap-htm", "cap-nested-hv", "cap-large-decr", "cap-vsx", "cap-dfp", "cap-ccf-assist"), ("off",)
)


def predict_layout(
    spec: MachineSpec,
    arch: str,
    facts: QemuFacts | None = None,
    *,
    typed: bool = False,
    assume: bool = False,
    unseen: bool = False,
) -> MachineLayout | None:
    """The layout without a QEMU; None if arithmetic alone cannot be trusted.

    Args:
        spec: the machine.
        arch: QEMU's target.
        facts: of the program; without them, the layout must be the same in every version.
        typed: whether `cpu_type` must be known.
        assume: assume that QEMU has the CPU model.
        unseen: there is a program of an unknown version: assume only what every version has.

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
    """Whether this QEMU certainly has the machine type; without facts, whether all versions have it
    (`unseen`), or any.

    Raises:
        VcpuRefused: it certainly does not.
    """
    if facts is None:
        found = [has_machine(version, machine) for version in MEASURED]
        return all(found) if unseen else any(found)
    answer = has_machine(facts.version, machine)
    if answer is False:
        newest = newest_type(facts.version, machine)
        if newest is None:
            raise catalogue.NO_MACHINE_TYPE.error(version=facts.version, arch=arch, machine=machine)
        raise catalogue.OLD_MACHINE_TYPE.error(
            version=facts.version, arch=arch, machine=machine, newest=newest
        )
    return answer is True


def _options(spec: MachineSpec, row: Architecture) -> dict[str, bool] | None:
    """Whether each switch of the machine is on; None if an option may change its vCPUs.

    Raises:
        VcpuRefused: a value that no machine takes.
    """
    harmless = {
        **_HARMLESS,
        **({"hmat": None} if row.has_numa else {}),
        **(_HARMLESS_ON_PC if row.has_apic else {}),
        **(_HARMLESS_ON_PSERIES if row.entity is EntityKind.CORE else {}),
    }
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
    spec: MachineSpec,
    arch: str,
    machine: str,
    version: QemuVersion | None,
    options: Mapping[str, bool],
) -> Prediction | None:
    """The prediction of the measured versions around this one, if they agree."""
    versions: Sequence[QemuVersion]
    if version is None:
        versions = [each for each in MEASURED if has_machine(each, machine)]
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


#: CPU models, without features, that every QEMU has whose vCPUs are computed.
_EVERYWHERE: Final = ("max",)
_UNDER_KVM: Final = ("max", "host")


def _cpu_type(
    spec: MachineSpec,
    row: Architecture,
    machine: MachineType | None,
    facts: QemuFacts | None,
    assume: bool,
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
