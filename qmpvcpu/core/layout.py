"""The vCPUs of a guest that does not run: what is asked of a QEMU, what is known of its program, the answer. Pure.

An answer comes of arithmetic (`predict_layout`) or of a QEMU that was asked (`parse_layout`), now or before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Final

from qmpvcpu.core.inventory import (
    BootFacts,
    build_state,
    never_unplugs,
    parse_cpus_fast,
    parse_hotpluggable_cpus,
    parse_topology,
    parse_version,
)
from qmpvcpu.core.model import QemuVersion, Topology, Vcpu
from qmpvcpu.core.smp import (
    MEASURED,
    NumaCpu,
    NumaNode,
    Prediction,
    Slot,
    Smp,
    compat_version,
    is_known,
    is_proven,
    predict,
)
from qmpvcpu.errors import VcpuConnectionError, VcpuRefused

__all__ = [
    "LayoutSource",
    "MachineLayout",
    "MachineSpec",
    "MachineType",
    "QemuFacts",
    "arch_of_machine",
    "parse_facts",
    "parse_layout",
    "predict_layout",
]


class LayoutSource(StrEnum):
    """Where an answer comes from."""

    PREDICTED = "predicted"
    CACHED = "cached"
    PROBED = "probed"


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """What a QEMU is asked to be. `machine` and `cpu` are the arguments of -machine and -cpu, with their options;
    `accel` is "kvm" or "tcg".
    """

    machine: str
    smp: Smp
    cpu: str | None = None
    accel: str = "tcg"
    nodes: tuple[NumaNode, ...] = ()
    cpus: tuple[NumaCpu, ...] = ()

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
            "nodes": [[node.id, list(node.cpus)] for node in self.nodes],
            "cpus": [str(cpu) for cpu in self.cpus],
        }


@dataclass(frozen=True, slots=True)
class MachineType:
    """One machine of `query-machines`."""

    name: str
    alias: str | None = None
    hotpluggable: bool = False
    default_cpu_type: str | None = None


@dataclass(frozen=True, slots=True)
class QemuFacts:
    """What is true of one QEMU program, whatever it is asked to be."""

    arch: str
    version: QemuVersion
    machines: tuple[MachineType, ...]
    #: Driver of `device_add` by CPU model, of those that were probed.
    cpu_types: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str) -> MachineType | None:
        """A machine by its name or alias."""
        return next((found for found in self.machines if name in (found.name, found.alias)), None)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        version = [self.version.major, self.version.minor, self.version.micro]
        machines = [asdict(machine) for machine in self.machines]
        return {"arch": self.arch, "version": version, "machines": machines, "cpu_types": dict(self.cpu_types)}

    @classmethod
    def from_json(cls, data: Any) -> QemuFacts:
        """Of `to_json()`.

        Raises:
            ValueError, TypeError, KeyError: it is not.
        """
        machines = tuple(MachineType(**row) for row in data["machines"])
        version, cpu_types = QemuVersion(*data["version"]), dict(data["cpu_types"])
        texts = (data["arch"], *(machine.name for machine in machines), *cpu_types, *cpu_types.values())
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
    slots: tuple[Slot, ...]
    source: LayoutSource

    @property
    def maxcpus(self) -> int:
        """How many vCPU ids there are."""
        return sum(slot.vcpus_count for slot in self.slots)

    def entities(self) -> list[tuple[tuple[int, ...], Slot]]:
        """Each slot with its vCPU ids."""
        found = []
        first = 0
        for slot in self.slots:
            found.append((tuple(range(first, first + slot.vcpus_count)), slot))
            first += slot.vcpus_count
        return found

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
        topology = None
        if self.topology is not None:
            topology = asdict(self.topology)
            del topology["x86_apic_limit"]
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
            "topology": topology,
            "vcpus": [vcpu.to_json() for vcpu in self.vcpus()],
        }


# -- a QEMU that was asked ------------------------------------------------------------------------


def parse_facts(replies: Mapping[str, Any]) -> QemuFacts:
    """`query-target` and `query-machines`, checked; by command, as in `parse_layout`.

    Raises:
        VcpuConnectionError: they cannot be QEMU's.
    """
    found = []
    target, machines = replies["query-target"], replies["query-machines"]
    for row in machines if isinstance(machines, list) else []:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise _malformed("query-machines")
        alias, cpu_type = row.get("alias"), row.get("default-cpu-type")
        found.append(
            MachineType(
                row["name"],
                alias if isinstance(alias, str) else None,
                row.get("hotpluggable-cpus") is True,
                cpu_type if isinstance(cpu_type, str) else None,
            )
        )
    arch = target.get("arch") if isinstance(target, dict) else None
    if not isinstance(arch, str) or not found:
        raise _malformed("query-target" if found else "query-machines")
    return QemuFacts(arch, parse_version(replies["greeting"]), tuple(found))


def parse_layout(replies: Mapping[str, Any], source: LayoutSource) -> MachineLayout:
    """The replies of a QEMU that was asked, by command; `query-hotpluggable-cpus` is None where it has no hotplug.

    Raises:
        VcpuConnectionError: they cannot be QEMU's.
    """
    target, machine, kvm = replies["query-target"], replies["type"], replies["query-kvm"]
    arch = target.get("arch") if isinstance(target, dict) else None
    if not isinstance(arch, str) or not isinstance(machine, str):
        raise _malformed("query-target" if isinstance(machine, str) else "qom-get /machine type")
    rows = replies["query-hotpluggable-cpus"]
    hotpluggable = None if rows is None else parse_hotpluggable_cpus(rows)
    boot = BootFacts(
        name="",
        arch=arch,
        machine=machine.removesuffix("-machine"),
        kvm=isinstance(kvm, dict) and kvm.get("enabled") is True,
        version=parse_version(replies["greeting"]),
        topology=parse_topology(replies["smp"]),
    )
    cpus = parse_cpus_fast(replies["query-cpus-fast"], props=hotpluggable is None)
    state = build_state(boot, hotpluggable, cpus)
    entity = state.entities[0] if state.entities else None
    return MachineLayout(
        arch,
        boot.machine,
        boot.version,
        state.accel or "tcg",
        state.can_plug,
        state.can_unplug,
        entity.driver if entity is not None else None,
        boot.topology,
        len(state.enabled_ids),
        tuple(Slot(entity.props, len(entity.ids), entity.plugged) for entity in state.entities),
        source,
    )


def _malformed(command: str) -> VcpuConnectionError:
    return VcpuConnectionError(
        f"what {command} answers cannot be QEMU's", reason="malformed", hint="is this program really a QEMU?"
    )


# -- arithmetic -----------------------------------------------------------------------------------

#: The same from the first of them to the last; ppc64's is not.
_DEFAULT_CPU: Final = {"x86_64": "qemu64", "i386": "qemu32", "s390x": "qemu", "loongarch64": "la464"}
_CPU_SUFFIX: Final = {
    "x86_64": "-x86_64-cpu",
    "i386": "-i386-cpu",
    "s390x": "-s390x-cpu",
    "loongarch64": "-loongarch-cpu",
}
#: Options of a machine that leave its vCPUs alone.
_HARMLESS: Final = ("usb", "smm", "vmport", "hpet", "kernel-irqchip", "graphics", "dump-guest-core", "mem-merge")
_MACHINES: Final = (("pseries", "ppc64"), ("s390-ccw-virtio", "s390x"), ("pc", "x86_64"), ("q35", "x86_64"))


def arch_of_machine(machine: str) -> str | None:
    """The target a machine belongs to, where its name alone says it."""
    name = machine.partition(",")[0]
    return next((arch for word, arch in _MACHINES if name == word or name.startswith(word + "-")), None)


def predict_layout(
    spec: MachineSpec, arch: str, facts: QemuFacts | None = None, *, typed: bool = False, assume: bool = False
) -> MachineLayout | None:
    """The answer without a QEMU; None where arithmetic alone cannot be trusted.

    Args:
        arch: QEMU's target.
        facts: of the program; without, the answer is one that every version gives.
        typed: whether `cpu_type` must be known.
        assume: take a CPU model for one that QEMU has.

    Raises:
        VcpuRefused: QEMU would refuse it; the text says why.
    """
    machine, known = spec.machine_type, None
    if facts is not None:
        known = facts.find(machine)
        if known is None or not known.hotpluggable:
            return None
        machine = known.name
    options = [option.partition("=")[0] for option in spec.machine.split(",")[1:]]
    if not all(option in _HARMLESS or option.startswith("cap-") for option in options):
        return None
    if spec.accel != "tcg" and arch != "x86_64":
        return None
    found = _agreed(spec, arch, machine, facts.version if facts is not None else None)
    if found is None or not found.is_certain:
        return None
    cpu_type = _cpu_type(spec.cpu, arch, known, facts, assume)
    if cpu_type is None and (typed or (spec.cpu is not None and not assume)):
        return None
    return MachineLayout(
        arch,
        machine,
        facts.version if facts is not None else None,
        spec.accel,
        True,
        not never_unplugs(arch),
        cpu_type,
        found.topology,
        found.cpus,
        found.slots,
        LayoutSource.PREDICTED,
    )


def _agreed(spec: MachineSpec, arch: str, machine: str, version: QemuVersion | None) -> Prediction | None:
    """What the versions say that enclose this one, if they say the same."""
    versions: Sequence[QemuVersion] = MEASURED
    if version is None:
        # Those that have a machine of this name.
        versions = [each for each in MEASURED if compat_version(machine, each) <= each]
    elif is_proven(arch, machine, version):
        versions = (version,)
    else:
        below = [measured for measured in MEASURED if measured <= version]
        above = [measured for measured in MEASURED if measured > version]
        if not below or not above:
            return None
        versions = (below[-1], above[0])
    found: list[Prediction] = []
    refused: list[VcpuRefused] = []
    for each in versions:
        if not is_known(arch, machine, each):
            return None
        try:
            found.append(predict(arch, machine, each, spec.smp, spec.nodes, spec.cpus, accel=spec.accel))
        except VcpuRefused as error:
            refused.append(error)
    if refused and not found:
        raise refused[-1]
    if refused or not found or any(other != found[0] for other in found):
        return None
    return found[0]


def _cpu_type(
    cpu: str | None, arch: str, machine: MachineType | None, facts: QemuFacts | None, assume: bool
) -> str | None:
    if cpu is not None:
        model = cpu.partition(",")[0]
        if facts is not None and model in facts.cpu_types:
            return facts.cpu_types[model]
        # On ppc64 names stand for others ("POWER9"), and for which ones differs between versions.
        return model + _CPU_SUFFIX[arch] if assume and arch in _CPU_SUFFIX else None
    found = machine.default_cpu_type if machine is not None else None
    if found is None and arch in _DEFAULT_CPU:
        return _DEFAULT_CPU[arch] + _CPU_SUFFIX[arch]
    return found.replace("-powerpc64-cpu", "-spapr-cpu-core") if found is not None else None
