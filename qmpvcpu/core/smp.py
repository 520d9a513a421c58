"""What `query-hotpluggable-cpus` will say, without asking: QEMU's own arithmetic of -smp and -numa. Pure.

Source: `machine_parse_smp_config` (hw/core/machine-smp.c), each machine's `possible_cpu_arch_ids` and
`get_default_cpu_node_id`. Held against QEMU 7.2, 10.0 and 11.1 (tests/qemu/test_smp_real.py); what those do not
prove (`is_proven`, `Prediction.is_certain`) is to be probed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qmpvcpu.core.arch import Architecture, EntityKind, architecture
from qmpvcpu.core.machine.versions import Feature, compat_version, has, is_measured, takes_machine
from qmpvcpu.core.model import Props, QemuVersion, Topology, format_ids
from qmpvcpu.errors import Refusal, VcpuRefused, VcpuUsageError

__all__ = [
    "LEVELS",
    "NumaCpu",
    "NumaNode",
    "Prediction",
    "Slot",
    "Smp",
    "is_known",
    "is_proven",
    "parse_numa",
    "parse_smp",
    "predict",
]

#: -smp's levels, outermost first.
LEVELS: Final = ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")
#: More than any machine has.
_MOST: Final = 65536


@dataclass(frozen=True, slots=True)
class Smp:
    """-smp as written; None is not written."""

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
        for key in ("maxcpus", *LEVELS):
            value = getattr(self, key)
            if value is not None:
                words.append(f"{key}={value}")
        return ",".join(words)


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One `-numa node`: its id, and the CPU indexes that it names (`cpus=`)."""

    id: int
    cpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NumaCpu:
    """One `-numa cpu`: every slot that has these props is on that node."""

    node: int
    props: Props

    def __str__(self) -> str:
        return ",".join([f"cpu,node-id={self.node}", *(f"{key}={value}" for key, value in self.props.items())])


@dataclass(frozen=True, slots=True)
class Slot:
    """One entry of `query-hotpluggable-cpus`; `plugged` is whether QEMU starts with it.

    `props` is None where a machine without CPU hotplug has room and says nothing of it.
    """

    props: Props | None
    vcpus_count: int
    plugged: bool


@dataclass(frozen=True, slots=True)
class Prediction:
    """A machine that was not started: `slots` in the order of vCPU ids.

    `is_certain` is false for sizes that not every machine of its kind takes.
    """

    topology: Topology
    cpus: int
    slots: tuple[Slot, ...]
    is_certain: bool


@dataclass(frozen=True, slots=True)
class _Machine:
    row: Architecture
    #: The version whose rules it keeps: of its name, else QEMU's.
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


def parse_smp(text: str) -> Smp:
    """`4,maxcpus=8,sockets=2`: the argument of -smp.

    Raises:
        VcpuUsageError: QEMU would not read it either.
    """
    found: dict[str, int] = {}
    for position, part in enumerate(text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            key, value = ("cpus", key) if position == 0 else (key, "")
        if key not in ("cpus", "maxcpus", *LEVELS):
            raise VcpuUsageError(f"-smp has no '{key}'", hint=f"it has cpus, maxcpus, {', '.join(LEVELS)}")
        if not (value.isascii() and value.isdigit() and len(value) < 10):
            raise VcpuUsageError(f"-smp {key} '{value[:40]}' is no number", hint="write 4,maxcpus=8,cores=8")
        found[key] = int(value)
    return Smp(**found)


_NUMA_LIMIT: Final = 128
_NUMA_PROPS: Final = (
    "drawer-id",
    "book-id",
    "socket-id",
    "die-id",
    "cluster-id",
    "module-id",
    "core-id",
    "thread-id",
)
#: What else -numa says does not move a vCPU.
_NUMA_OTHERS: Final = ("dist", "hmat-lb", "hmat-cache")


def parse_numa(options: Sequence[str]) -> tuple[tuple[NumaNode, ...], tuple[NumaCpu, ...]]:
    """`node,nodeid=0,cpus=0-3` and `cpu,node-id=0,socket-id=1`: the arguments of -numa, in order.

    Raises:
        VcpuUsageError: QEMU would not read it either.
    """
    nodes: list[NumaNode] = []
    cpus: list[NumaCpu] = []
    for text in options:
        kind, *parts = text.split(",")
        kind = kind.removeprefix("type=")
        pairs = [(key, value) for key, _, value in (part.partition("=") for part in parts)]
        if kind == "node":
            nodes.append(_node(text, pairs, len(nodes)))
        elif kind == "cpu":
            values = {key: _number(text, value) for key, value in pairs}
            odd = [key for key in values if key not in (*_NUMA_PROPS, "node-id")]
            if odd or "node-id" not in values or len(values) < 2:
                raise _bad_numa(text)
            cpus.append(NumaCpu(values.pop("node-id"), Props(values)))
        elif kind not in _NUMA_OTHERS:
            raise _bad_numa(text)
    return tuple(nodes), tuple(cpus)


def _node(text: str, pairs: Sequence[tuple[str, str]], position: int) -> NumaNode:
    number = position
    cpus: list[int] = []
    for key, value in pairs:
        if key == "nodeid":
            number = _number(text, value)
        elif key == "cpus":
            low, _, high = value.partition("-")
            first, last = _number(text, low), _number(text, high or low)
            if not first <= last < _MOST:
                raise _bad_numa(text)
            cpus += range(first, last + 1)
        elif key not in ("mem", "memdev", "initiator"):
            raise _bad_numa(text)
    return NumaNode(number, tuple(cpus))


def _number(text: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 7):
        raise _bad_numa(text)
    return int(value)


def _bad_numa(text: str) -> VcpuUsageError:
    return VcpuUsageError(
        f"-numa '{text[:80]}' is not understood", hint="write node,nodeid=0,cpus=0-3 or cpu,node-id=0,socket-id=1"
    )


def is_known(arch: str, machine: str, version: QemuVersion) -> bool:
    """Whether there are rules for this machine of a QEMU of this version."""
    row = architecture(arch)
    return row.computes(machine) and (row.hotplug_since is None or has(version, row.hotplug_since))


def is_proven(arch: str, machine: str, version: QemuVersion) -> bool:
    """Whether they have been compared with real QEMUs of this version."""
    return is_known(arch, machine, version) and takes_machine(version, machine) and is_measured(version)


def predict(
    arch: str,
    machine: str,
    version: QemuVersion,
    smp: Smp,
    nodes: Sequence[NumaNode] = (),
    cpus: Sequence[NumaCpu] = (),
    *,
    accel: str = "tcg",
) -> Prediction:
    """The slots of a machine.

    Args:
        arch: QEMU's target, "x86_64", "ppc64", "s390x", "loongarch64".
        machine: a machine type, versioned or not.
        version: QEMU's.
        smp: -smp as written.
        nodes: -numa node, in order.
        cpus: -numa cpu, in order.
        accel: "kvm" or "tcg".

    Raises:
        VcpuRefused: QEMU refuses it; the text says why.
    """
    facts = _facts(arch, machine, version)
    topology, plugged = _complete(smp, facts)
    _check_machine(topology, plugged, facts, accel)
    units = _units(topology, facts)
    placed = _nodes(units, topology, nodes, cpus, facts)
    size = facts.size(topology)
    slots = tuple(
        Slot(Props(props if node is None else {**props, "node-id": node}), size, number * size < plugged)
        for number, (props, node) in enumerate(zip(units, placed, strict=True))
    )
    is_certain = topology.maxcpus <= facts.row.most_computed
    if facts.row.has_apic:
        is_certain &= _last_apic_id(topology) < _APIC_IDS
    return Prediction(topology, plugged, slots, is_certain)


#: An APIC id of 255 and more needs x2apic, and more than TCG of 7.2 has.
_APIC_IDS: Final = 255


def _last_apic_id(topology: Topology) -> int:
    threads, cores, modules, dies = topology.x86_apic_widths
    found = topology.sockets - 1
    for bits, count in (
        (dies, topology.dies),
        (modules, topology.modules),
        (cores, topology.cores),
        (threads, topology.threads),
    ):
        found = (found << bits) + count - 1
    return found


def _facts(arch: str, machine: str, version: QemuVersion) -> _Machine:
    row = architecture(arch)
    if not row.computes(machine):
        raise _refused(f"what '{machine}' ({arch}) makes of -smp is not known", "probe it (--probe always)")
    known = tuple(level for level in LEVELS if level not in _LEVEL_SINCE or has(version, _LEVEL_SINCE[level]))
    levels = tuple(level for level in row.levels if level in known)
    return _Machine(row, compat_version(machine, version), version, levels, known)


#: Levels that came to -smp later than the others.
_LEVEL_SINCE: Final = {
    "drawers": Feature.DRAWERS_AND_BOOKS,
    "books": Feature.DRAWERS_AND_BOOKS,
    "modules": Feature.MODULES,
}


def _complete(smp: Smp, facts: _Machine) -> tuple[Topology, int]:
    """Fill in what is not written, and check the whole, as QEMU does."""
    given = {key: getattr(smp, key) for key in ("cpus", "maxcpus", *LEVELS)}
    for level in LEVELS:
        if given[level] is not None and level not in facts.known:
            raise _refused(f"this QEMU's -smp has no {level}", f"leave out {level}")
    if has(facts.qemu, Feature.NO_ZERO_LEVELS) and 0 in given.values():
        raise _refused("CPU topology parameters must be greater than zero", "leave out what is 0")
    for level in LEVELS:
        if (given[level] or 1) > 1 and level not in facts.levels:
            raise _refused(f"{level} > 1 is not supported by this machine's CPU topology", f"leave out {level}")
    counts = {level: given[level] or 0 for level in LEVELS}
    for level in LEVELS:
        if level not in ("sockets", "cores", "threads"):
            counts[level] = counts[level] or 1
    cpus, maxcpus = given["cpus"] or 0, given["maxcpus"] or 0
    if not cpus and not maxcpus:
        for level in ("sockets", "cores", "threads"):
            counts[level] = counts[level] or 1
    else:
        maxcpus = maxcpus or cpus
        first, second = "sockets", "cores"
        if has(facts.compat, Feature.CORES_FIRST):
            first, second = second, first
        if not counts[first]:
            counts[second] = counts[second] or 1
            counts["threads"] = counts["threads"] or 1
            counts[first] = maxcpus // _product(counts, first)
        elif not counts[second]:
            counts["threads"] = counts["threads"] or 1
            counts[second] = maxcpus // _product(counts, second)
        counts["threads"] = counts["threads"] or maxcpus // _product(counts, "threads")
    total = _product(counts)
    maxcpus = maxcpus or total
    cpus = cpus or maxcpus
    words = " * ".join(f"{level} ({counts[level]})" for level in facts.levels)
    if total != maxcpus:
        raise _refused(
            f"product of the hierarchy must match maxcpus: {words} != maxcpus ({maxcpus})",
            "write levels whose product is maxcpus, or leave one out",
        )
    if maxcpus < cpus:
        raise _refused(
            f"maxcpus must be equal to or greater than smp: {words} == maxcpus ({maxcpus}) < smp_cpus ({cpus})",
            "raise maxcpus",
        )
    return Topology(maxcpus, **counts), cpus


def _product(counts: Mapping[str, int], without: str = "") -> int:
    product = 1
    for level, count in counts.items():
        product *= count if level != without else 1
    return product


def _check_machine(topology: Topology, cpus: int, facts: _Machine, accel: str) -> None:
    threads = topology.threads
    if facts.row.entity is EntityKind.CPU and threads > 1 and has(facts.compat, Feature.S390X_ONE_THREAD):
        raise _refused("S390 does not support more than 1 threads", "leave out threads")
    if not facts.has_cores or threads == 1:
        return
    if accel == "tcg" and not has(facts.qemu, Feature.PSERIES_TCG_THREADS):
        raise _refused(
            "TCG cannot support more than 1 thread/core on a pseries machine", "leave out threads, or use QEMU 8.2"
        )
    if threads & (threads - 1) or threads > 8:
        raise _refused(
            f"pseries cannot have {threads} threads/core: it must be a power of 2, 8 at most", "take 1, 2, 4 or 8"
        )
    if cpus % threads:
        raise _refused(f"smp_cpus ({cpus}) must be multiple of threads ({threads})", "start with whole cores")


def _units(topology: Topology, facts: _Machine) -> list[dict[str, Any]]:
    """The props of every slot but its node, in the order of vCPU ids."""
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


_PROPS: Final = {
    "drawers": "drawer-id",
    "books": "book-id",
    "sockets": "socket-id",
    "dies": "die-id",
    "modules": "module-id",
    "cores": "core-id",
    "threads": "thread-id",
}


def _nodes(
    units: Sequence[Mapping[str, Any]],
    topology: Topology,
    nodes: Sequence[NumaNode],
    cpus: Sequence[NumaCpu],
    facts: _Machine,
) -> list[int | None]:
    """The NUMA node of every slot."""
    if not nodes and not cpus:
        return [0 if facts.row.has_node_always else None] * len(units)
    if not facts.row.has_numa:
        raise _refused("NUMA is not supported by this machine type", "leave out -numa")
    if sorted(node.id for node in nodes) != list(range(len(nodes))):
        ids = format_ids(node.id for node in nodes)
        raise _refused(f"NUMA node ids must run from 0 without a gap, each once: {ids}", "number them 0, 1, …")
    if len(nodes) > _NUMA_LIMIT:
        raise _refused(f"{len(nodes)} NUMA nodes are more than QEMU's {_NUMA_LIMIT}", "have fewer nodes")
    size = facts.size(topology)
    named: dict[int, int] = {}

    def assign(slot: int, node: int, what: str) -> None:
        if named.setdefault(slot, node) != node:
            raise _refused(
                f"{what} is already assigned to node-id: {named[slot]}",
                "give each CPU, and the whole of a pseries core, to one node",
            )

    for node in nodes:
        for cpu in node.cpus:
            if cpu >= topology.maxcpus:
                raise _refused(
                    f"CPU index ({cpu}) should be smaller than maxcpus ({topology.maxcpus})", "correct cpus="
                )
            assign(cpu // size, node.id, f"CPU {cpu}")
    for given in cpus:
        if given.node >= len(nodes):
            raise _refused(f"node-id={given.node} is not defined with -numa node", "name a node that is there")
        for key in given.props:
            if key not in units[0]:
                raise _refused(f"-numa {given}: {key} is not supported by this machine", f"leave out {key}")
        found = [number for number, props in enumerate(units) if given.props.items() <= props.items()]
        if not found:
            raise _refused(f"-numa {given}: no vCPU is there", "correct its ids")
        for number in found:
            assign(number, given.node, f"-numa {given}: CPU {number * size}")
    if named:
        # What nobody names falls to node 0.
        return [named.get(number, 0) for number in range(len(units))]
    if facts.has_cores:
        return [number // topology.cores % len(nodes) for number in range(len(units))]
    return [props["socket-id"] % len(nodes) for props in units]


def _refused(message: str, hint: str) -> VcpuRefused:
    return VcpuRefused([Refusal("smp", message, (), hint, "VIR_ERR_CONFIG_UNSUPPORTED")])
