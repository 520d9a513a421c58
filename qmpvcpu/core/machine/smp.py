"""Predict `query-hotpluggable-cpus` with QEMU's own arithmetic for -machine and -smp. Pure.

Source: `machine_parse_smp_config` (hw/core/machine-smp.c), each machine's `possible_cpu_arch_ids`
and `get_default_cpu_node_id`. Compared with QEMU 7.2, 10.0 and 11.1 (tests/qemu/test_smp_real.py);
a case outside of that comparison (`is_proven`, `Prediction.is_certain`) must be probed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from qmpvcpu.core.arch import Architecture, EntityKind, architecture
from qmpvcpu.core.arguments import checked
from qmpvcpu.core.machine.numa import NumaMachine, NumaOption, nodes_of_slots
from qmpvcpu.core.machine.versions import (
    Feature,
    compat_version,
    has,
    has_hotplug,
    has_machine,
    is_measured,
)
from qmpvcpu.core.machine.words import join_pairs, parse_keyval, parse_number, refuse_smp
from qmpvcpu.core.model import LEVELS, Props, QemuVersion, Topology
from qmpvcpu.errors import VcpuUsageError

#: More than any machine has.
_MOST: Final = 65535
#: QEMU reads 64 bits, and computes with 32.
_WORD: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Smp:
    """-smp as written; None for a key that is not written."""

    cpus: int | None = None
    maxcpus: int | None = None
    drawers: int | None = None
    books: int | None = None
    sockets: int | None = None
    dies: int | None = None
    clusters: int | None = None
    modules: int | None = None
    cores: int | None = None
    threads: int | None = None

    def __str__(self) -> str:
        words = [] if self.cpus is None else [str(self.cpus)]
        counts = {key: getattr(self, key) for key in ("maxcpus", *LEVELS)}
        return ",".join(
            [*words, *(f"{key}={count}" for key, count in counts.items() if count is not None)]
        )


@dataclass(frozen=True, slots=True)
class MachineSlot:
    """One entry of `query-hotpluggable-cpus`; `plugged` is whether QEMU starts with it.

    `props` is None for an empty place of a machine without CPU hotplug, which QEMU does not report.
    """

    props: Props | None
    vcpus_count: int
    plugged: bool


@dataclass(frozen=True, slots=True)
class Prediction:
    """A machine that was not started: `slots` in the order of vCPU ids.

    `is_certain` is false for sizes that not every such machine supports.
    """

    topology: Topology
    cpus: int
    slots: tuple[MachineSlot, ...]
    is_certain: bool


@dataclass(frozen=True, slots=True)
class _Machine:
    row: Architecture
    #: The version whose rules it follows: that of its name, else QEMU's.
    compat: QemuVersion
    qemu: QemuVersion
    levels: tuple[str, ...]
    known: tuple[str, ...]

    @property
    def has_cores(self) -> bool:
        """Whether a slot is a whole core."""
        return self.row.entity is EntityKind.CORE

    def size(self, topology: Topology) -> int:
        """vCPUs of one slot."""
        return self.row.entity_size(topology.threads)


_MACHINE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


def parse_machine(words: Iterable[tuple[str, str]]) -> tuple[str, Smp]:
    """All -machine and -smp of a command line, merged: the last value of a key counts.

    Args:
        words: "machine" or "smp", and its argument, in order.

    Returns:
        The machine with its options (",smm=off" where no type is named), and -smp.

    Raises:
        VcpuUsageError: QEMU would refuse to read it too.
    """
    merged: dict[str, str] = {}
    for option, text in words:
        if option == "smp":
            merged |= {f"smp.{key}": value for key, value in parse_keyval(option, text, "cpus")}
        else:
            merged |= {
                key.replace("_", "-"): value for key, value in parse_keyval(option, text, "type")
            }
    name = merged.pop("type", "")
    if name and not _MACHINE_NAME.fullmatch(name):
        raise VcpuUsageError(f"'{name[:40]}' is not a machine type", hint="write q35, pseries …")
    counts = {
        key.removeprefix("smp."): merged.pop(key) for key in list(merged) if key.startswith("smp.")
    }
    if "smp" in merged:
        raise VcpuUsageError(
            "-machine has smp=, which has keys of its own", hint="write -smp 4,maxcpus=8"
        )
    found: dict[str, int] = {}
    for key, text in counts.items():
        if key not in ("cpus", "maxcpus", *LEVELS):
            raise VcpuUsageError(
                f"-smp has no '{key[:40]}'", hint=f"it has cpus, maxcpus, {', '.join(LEVELS)}"
            )
        value = parse_number(text)
        if value is None:
            raise VcpuUsageError(
                f"-smp {key} '{text[:40]}' is not a number as QEMU reads it",
                hint="write 8, 0x8 or, as C's octal, 010; 08 is not a number",
            )
        found[key] = value
    return join_pairs((("type", name), *merged.items()), "type"), Smp(**found)


@checked
def parse_smp(text: str) -> Smp:
    """`4,maxcpus=8,sockets=2`: the argument of -smp.

    Raises:
        VcpuUsageError: QEMU would refuse to read it too.
    """
    return parse_machine([("smp", text)])[1]


def is_known(arch: str, machine: str, version: QemuVersion) -> bool:
    """Whether there are rules for this machine of a QEMU of this version."""
    return architecture(arch).computes(machine) and has_hotplug(version, machine)


def is_proven(arch: str, machine: str, version: QemuVersion) -> bool:
    """Whether these rules have been compared with real QEMUs of this version."""
    return (
        is_known(arch, machine, version)
        and has_machine(version, machine) is True
        and is_measured(version)
    )


def predict(
    arch: str,
    machine: str,
    version: QemuVersion,
    smp: Smp,
    numa: Sequence[NumaOption] = (),
    *,
    accel: str = "tcg",
    has_hmat: bool = False,
) -> Prediction:
    """The slots of a machine.

    Args:
        arch: QEMU's target, "x86_64", "ppc64", "s390x", "loongarch64".
        machine: a machine type, versioned or not.
        version: QEMU's.
        smp: -smp as written.
        numa: every -numa, in order.
        accel: "kvm" or "tcg".
        has_hmat: `-machine hmat=on`.

    Raises:
        VcpuRefused: QEMU refuses it; the text says why.
    """
    facts = _facts(arch, machine, version)
    topology, plugged = _complete(smp, facts)
    _check_machine(topology, plugged, facts, accel)
    units = _units(topology, facts)
    placed = _nodes(units, topology, numa, facts, has_hmat=has_hmat)
    size = facts.size(topology)
    slots = tuple(
        MachineSlot(
            Props(props if node is None else {**props, "node-id": node}),
            size,
            number * size < plugged,
        )
        for number, (props, node) in enumerate(zip(units, placed, strict=True))
    )
    is_certain = topology.maxcpus <= facts.row.most_computed
    if facts.row.has_apic:
        last = {_PROPS[level]: getattr(topology, level) - 1 for level in LEVELS}
        # A higher one needs x2apic, which TCG of 7.2 does not have.
        is_certain &= topology.x86_apic_id(last) < 255
    if facts.has_cores and accel == "tcg":
        is_certain &= has(facts.compat, Feature.PSERIES_WITHOUT_HTM)
    return Prediction(topology, plugged, slots, is_certain)


def _facts(arch: str, machine: str, version: QemuVersion) -> _Machine:
    row = architecture(arch)
    refuse_smp(
        not row.computes(machine),
        f"how '{machine}' ({arch}) reads -smp is not known",
        "probe it (--probe always)",
    )
    known = tuple(
        level for level in LEVELS if level not in _LEVEL_SINCE or has(version, _LEVEL_SINCE[level])
    )
    levels = tuple(level for level in row.levels if level in known)
    return _Machine(row, compat_version(machine, version), version, levels, known)


#: Levels that not every version of -smp has.
_LEVEL_SINCE: Final = {
    "drawers": Feature.DRAWERS_AND_BOOKS,
    "books": Feature.DRAWERS_AND_BOOKS,
    "modules": Feature.MODULES,
}


def _complete(smp: Smp, facts: _Machine) -> tuple[Topology, int]:
    """Fill in the levels that are not written, and check the result, as QEMU does."""
    given = {key: getattr(smp, key) for key in ("cpus", "maxcpus", *LEVELS)}
    _check_levels(given, facts)
    counted = {key: (value or 0) & _WORD for key, value in given.items()}
    counts = {level: counted[level] or 1 for level in LEVELS}
    maxcpus = counted["maxcpus"] or counted["cpus"]
    solved = (
        ("cores", "sockets") if has(facts.compat, Feature.CORES_FIRST) else ("sockets", "cores")
    )
    unknown = next((level for level in (*solved, "threads") if not counted[level]), None)
    if unknown is not None and maxcpus:
        rest = _product(counts, unknown)
        refuse_smp(
            not rest,
            "the product of the levels is 0 in 32 bits: QEMU divides by it, and dies",
            "correct the levels",
        )
        counts[unknown] = maxcpus // rest
    total = _product(counts)
    maxcpus = maxcpus or total
    cpus = counted["cpus"] or maxcpus
    words = " * ".join(f"{level} ({counts[level]})" for level in facts.levels)
    refuse_smp(
        total != maxcpus,
        f"product of the hierarchy must match maxcpus: {words} != maxcpus ({maxcpus})",
        "write levels whose product is maxcpus, or leave one out",
    )
    refuse_smp(
        maxcpus < cpus,
        f"maxcpus must be equal to or greater than smp: {words} == maxcpus ({maxcpus}) < smp_cpus"
        f" ({cpus})",
        "raise maxcpus",
    )
    refuse_smp(
        maxcpus > _MOST, f"invalid SMP CPUs {maxcpus}: no machine has that many", "lower maxcpus"
    )
    return Topology(maxcpus, **counts), cpus


def _check_levels(given: Mapping[str, int | None], facts: _Machine) -> None:
    """Whether this QEMU knows the levels that are written, and this machine can have more than one
    of each.
    """
    for level in LEVELS:
        refuse_smp(
            given[level] is not None and level not in facts.known,
            f"this QEMU's -smp has no {level}",
            f"leave out {level}",
        )
    is_new = has(facts.qemu, Feature.NO_ZERO_LEVELS)
    refuse_smp(
        is_new and 0 in given.values(),
        "CPU topology parameters must be greater than zero",
        "leave out what is 0",
    )
    for level in LEVELS:
        is_old = level in ("drawers", "books") and not has(facts.compat, Feature.DRAWERS_AND_BOOKS)
        count = (given[level] or 0) & (~0 if is_new else _WORD)
        refuse_smp(
            count > 1 and (is_old or level not in facts.levels),
            f"{level} > 1 is not supported by this machine's CPU topology",
            f"leave out {level}",
        )


def _product(counts: Mapping[str, int], without: str = "") -> int:
    return prod(count for level, count in counts.items() if level != without) & _WORD


def _check_machine(topology: Topology, cpus: int, facts: _Machine, accel: str) -> None:
    threads = topology.threads
    if threads == 1:
        return
    refuse_smp(
        facts.row.entity is EntityKind.CPU and has(facts.compat, Feature.S390X_ONE_THREAD),
        "S390 does not support more than 1 threads",
        "leave out threads",
    )
    if facts.has_cores:
        refuse_smp(
            accel == "tcg" and not has(facts.qemu, Feature.PSERIES_TCG_THREADS),
            "TCG cannot support more than 1 thread/core on a pseries machine",
            "leave out threads, or use QEMU 8.2",
        )
        refuse_smp(
            bool(threads & (threads - 1)) or threads > 8,
            f"pseries cannot have {threads} threads/core: it must be a power of 2, 8 at most",
            "take 1, 2, 4 or 8",
        )
        refuse_smp(
            bool(cpus % threads),
            f"smp_cpus ({cpus}) must be multiple of threads ({threads})",
            "start with whole cores",
        )


def _units(topology: Topology, facts: _Machine) -> list[dict[str, Any]]:
    """The props of every slot except its node, in the order of vCPU ids."""
    if facts.has_cores:
        return [{"core-id": first} for first in range(0, topology.maxcpus, topology.threads)]
    counts_through = facts.row.entity is EntityKind.CPU
    if counts_through and "books" not in facts.known:
        return [{"core-id": number} for number in range(topology.maxcpus)]
    units = []
    for number in range(topology.maxcpus):
        rest, props = number, {}
        for level in reversed(facts.levels):
            if counts_through and level == "threads":
                continue
            count = getattr(topology, level)
            rest, place = divmod(rest, count)
            if level not in ("dies", "modules") or count > 1:
                props[_PROPS[level]] = place
        if counts_through:
            props["core-id"] = number
        units.append(props)
    return units


_PROPS: Final = {level: f"{level.removesuffix('s')}-id" for level in LEVELS}


def _nodes(
    units: Sequence[Mapping[str, Any]],
    topology: Topology,
    numa: Sequence[NumaOption],
    facts: _Machine,
    *,
    has_hmat: bool,
) -> Sequence[int | None]:
    """The NUMA node of every slot."""
    if not numa:
        return [0 if facts.row.has_node_always else None] * len(units)
    refuse_smp(
        not facts.row.has_numa, "NUMA is not supported by this machine type", "leave out -numa"
    )

    def defaults(nodes: int) -> list[int]:
        if facts.has_cores:
            return [number // topology.cores % nodes for number in range(len(units))]
        return [props["socket-id"] % nodes for props in units]

    levels = {_PROPS[level] for level in facts.known}
    takes_mem = facts.row.has_numa_mem or not has(facts.compat, Feature.NO_NUMA_MEM)
    return nodes_of_slots(
        numa,
        NumaMachine(
            units,
            facts.size(topology),
            defaults,
            levels,
            takes_mem,
            has_hmat,
            has(facts.qemu, Feature.STRICT_SIZES),
        ),
    )
