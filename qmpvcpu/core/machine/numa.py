"""-numa: its words, and the node that each slot is on. Pure.

QEMU reads -numa in order: a node must be defined before other options name it. Sources:
hw/core/numa.c, qapi/opts-visitor.c, `machine_set_cpu_numa_node` and `machine_numa_finish_cpu_init`
(hw/core/machine.c). Compared with QEMU 7.2, 10.0 and 11.1 (tests/qemu/test_smp_real.py).

The memory of nodes is not checked: a `memdev=` is assumed to exist, and -m to be the sum of all
nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, permutations
from typing import Any, Final

from qmpvcpu.core.arguments import checked
from qmpvcpu.core.machine.words import (
    parse_number,
    parse_range,
    parse_size,
    parse_unsigned,
    refuse_smp,
    split_pairs,
)
from qmpvcpu.core.model import Props, format_ids
from qmpvcpu.errors import VcpuUsageError

_MOST_NODES: Final = 128
_NEAREST: Final = 10
_MIB: Final = 1024 * 1024
_CACHE_LEVELS: Final = 3
#: Hints that several checks of -numa share.
_HMAT: Final = "write -machine …,hmat=on"
_NODE_FIRST: Final = "write -numa node,… first"
_NUMBER: Final = "number them 0, 1, …"


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One `-numa node`: its id, and the CPU indexes that it names (`cpus=`); `mem` is a size as
    written.
    """

    id: int
    cpus: tuple[int, ...] = ()
    memdev: str | None = None
    mem: str | None = None
    initiator: int | None = None

    def words(self, memory: str | None) -> str:
        """The argument, with this `memdev=…` or `mem=…`."""
        named = [f"cpus={ids}" for ids in format_ids(self.cpus).split(",") if ids]
        more = [] if self.initiator is None else [f"initiator={self.initiator}"]
        return ",".join(
            ["node", f"nodeid={self.id}", *named, *more, *([memory] if memory is not None else [])]
        )

    def __str__(self) -> str:
        if self.mem is not None:
            return self.words(f"mem={self.mem}")
        return self.words(None if self.memdev is None else f"memdev={self.memdev}")


@dataclass(frozen=True, slots=True)
class NumaCpu:
    """One `-numa cpu`: every slot that has these props is on that node."""

    node: int
    props: Props

    def __str__(self) -> str:
        return ",".join(
            [f"cpu,node-id={self.node}", *(f"{key}={value}" for key, value in self.props.items())]
        )


@dataclass(frozen=True, slots=True)
class NumaDistance:
    """One `-numa dist`."""

    source: int
    destination: int
    value: int

    def __str__(self) -> str:
        return f"dist,src={self.source},dst={self.destination},val={self.value}"


@dataclass(frozen=True, slots=True)
class NumaLatency:
    """One `-numa hmat-lb`: a latency or a bandwidth (a size as written) between two nodes."""

    initiator: int
    target: int
    hierarchy: str
    data_type: str
    latency: int | None = None
    bandwidth: str | None = None

    def __str__(self) -> str:
        words = (
            f"hmat-lb,initiator={self.initiator},target={self.target},hierarchy={self.hierarchy}"
        )
        given = {"latency": self.latency, "bandwidth": self.bandwidth}
        more = [f",{key}={value}" for key, value in given.items() if value is not None]
        return "".join([words, f",data-type={self.data_type}", *more])


@dataclass(frozen=True, slots=True)
class NumaCache:
    """One `-numa hmat-cache`; `size` is as written."""

    node: int
    size: str
    level: int
    associativity: str
    policy: str
    line: int

    def __str__(self) -> str:
        return (
            f"hmat-cache,node-id={self.node},size={self.size},level={self.level}"
            f",associativity={self.associativity},policy={self.policy},line={self.line}"
        )


NumaOption = NumaNode | NumaCpu | NumaDistance | NumaLatency | NumaCache

# -- words -----------------------------------------------------------------------------------------


def _one_of(*words: str) -> Callable[[str], str | None]:
    return lambda text: text if text in words else None


_U8, _U16, _U32 = (partial(parse_unsigned, bits=bits) for bits in (8, 16, 32))
_BANDWIDTHS: Final = ("access-bandwidth", "read-bandwidth", "write-bandwidth")
_PROPS: Final = (
    "drawer-id",
    "book-id",
    "socket-id",
    "die-id",
    "cluster-id",
    "module-id",
    "core-id",
    "thread-id",
)
#: Keys of each type, and the functions that read their values.
_KEYS: Final[Mapping[str, Mapping[str, Callable[[str], Any]]]] = {
    "node": {"nodeid": _U16, "cpus": parse_range, "mem": str, "memdev": str, "initiator": _U16},
    "cpu": dict.fromkeys(("node-id", *_PROPS), parse_number),
    "dist": {"src": _U16, "dst": _U16, "val": _U8},
    "hmat-lb": {
        "initiator": _U16,
        "target": _U16,
        "hierarchy": _one_of("memory", "first-level", "second-level", "third-level"),
        "data-type": _one_of("access-latency", "read-latency", "write-latency", *_BANDWIDTHS),
        "latency": parse_unsigned,
        "bandwidth": str,
    },
    "hmat-cache": {
        "node-id": _U32,
        "size": str,
        "level": _U8,
        "associativity": _one_of("none", "direct", "complex"),
        "policy": _one_of("none", "write-back", "write-through"),
        "line": _U16,
    },
}
_OPTIONAL: Final = {"node": (*_KEYS["node"],), "cpu": _PROPS, "hmat-lb": ("latency", "bandwidth")}


@checked
def parse_numa(options: Sequence[str]) -> tuple[NumaOption, ...]:
    """`node,nodeid=0,cpus=0-3`, `cpu,node-id=0,socket-id=1`, `dist,…`: the arguments of -numa, in
    order.

    Raises:
        VcpuUsageError: QEMU would refuse to read it too.
    """
    found: list[NumaOption] = []
    for text in options:
        found.append(_parse(text, sum(isinstance(option, NumaNode) for option in found)))
    return tuple(found)


def _parse(text: str, position: int) -> NumaOption:
    pairs = split_pairs(text, "type")
    # The last value of a key counts, except that `cpus` is a list.
    last = dict(pairs)
    kind = last.pop("type", None)
    if kind is None or kind not in _KEYS:
        raise _bad(
            text, "its type is missing" if kind is None else f"there is no type '{kind[:40]}'"
        )
    values = {key: _value(text, kind, key, value) for key, value in last.items()}
    if lacking := [
        key for key in _KEYS[kind] if key not in values and key not in _OPTIONAL.get(kind, ())
    ]:
        raise _bad(text, f"parameter '{lacking[0]}' is missing")
    if kind == "node":
        values.setdefault("nodeid", position)
        values["cpus"] = [
            cpu for key, value in pairs if key == "cpus" for cpu in _value(text, kind, key, value)
        ]
    return _MAKE[kind](values)


def _value(text: str, kind: str, key: str, value: str) -> Any:
    read = _KEYS[kind].get(key)
    if read is None:
        raise _bad(text, f"invalid parameter '{key[:40]}'")
    found = read(value)
    if found is None:
        raise _bad(text, f"parameter '{key}' does not accept value '{value[:40]}'")
    return found


#: Makes an option from the values of its keys, by type.
_MAKE: Final[Mapping[str, Callable[[dict[str, Any]], NumaOption]]] = {
    "node": lambda v: NumaNode(
        v["nodeid"], tuple(v["cpus"]), v.get("memdev"), v.get("mem"), v.get("initiator")
    ),
    "cpu": lambda v: NumaCpu(v.pop("node-id"), Props(v)),
    "dist": lambda v: NumaDistance(v["src"], v["dst"], v["val"]),
    "hmat-lb": lambda v: NumaLatency(**{key.replace("-", "_"): value for key, value in v.items()}),
    "hmat-cache": lambda v: NumaCache(node=v.pop("node-id"), **v),
}


def _bad(text: str, why: str) -> VcpuUsageError:
    return VcpuUsageError(
        f"-numa '{text[:80]}': {why}",
        hint="write node,nodeid=0,cpus=0-3 or cpu,node-id=0,socket-id=1; numbers are C's: 010 is 8",
    )


# -- nodes -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NumaMachine:
    """The machine to which -numa is applied.

    Attributes:
        units: the props of every slot except its node, in the order of vCPU ids.
        size: vCPUs of one slot.
        defaults: gives the default node of every slot, by the number of nodes.
        props: keys that this QEMU's `-numa cpu` knows.
        takes_mem: whether it takes `-numa node,mem=`.
        has_hmat: `-machine hmat=on`.
        has_strict_sizes: see `parse_size`.
    """

    units: Sequence[Mapping[str, Any]]
    size: int
    defaults: Callable[[int], Sequence[int]]
    props: Collection[str] = _PROPS
    takes_mem: bool = False
    has_hmat: bool = False
    has_strict_sizes: bool = True


@dataclass(slots=True)
class _Table:
    """Latencies or bandwidths of one kind (`HMAT_LB_Info`)."""

    pairs: set[tuple[int, int]] = field(default_factory=set)
    base: int = 0
    bits: int = 0


@dataclass(slots=True)
class _State:
    """The options that QEMU has read so far."""

    machine: NumaMachine
    nodes: dict[int, NumaNode] = field(default_factory=dict)
    #: Slot -> node.
    slots: dict[int, int] = field(default_factory=dict)
    initiators: dict[int, int] = field(default_factory=dict)
    distances: dict[tuple[int, int], int] = field(default_factory=dict)
    tables: dict[tuple[str, str], _Table] = field(default_factory=dict)
    #: (node, whether it is a bandwidth) of each known attribute.
    attributes: set[tuple[int, bool]] = field(default_factory=set)
    #: (node, level) -> bytes.
    caches: dict[tuple[int, int], int] = field(default_factory=dict)

    def assign(self, slot: int, node: int, what: object) -> None:
        there = self.slots.setdefault(slot, node)
        refuse_smp(
            there != node,
            f"{what}: CPU {slot * self.machine.size} is already assigned to node-id: {there}",
            "give each CPU, and the whole of a pseries core, to one node",
        )
        if self.machine.has_hmat:
            initiator = self.initiators.setdefault(node, node)
            refuse_smp(
                initiator != node,
                f"the initiator of CPU NUMA node {node} should be itself (got {initiator})",
                "leave out initiator= of nodes with CPUs",
            )

    @property
    def with_cpus(self) -> set[int]:
        return set(self.slots.values())


def nodes_of_slots(numa: Iterable[NumaOption], machine: NumaMachine) -> list[int]:
    """The node of every slot.

    Raises:
        VcpuRefused: QEMU refuses it; the text says why.
    """
    state = _State(machine)
    for option in numa:
        refuse_smp(
            isinstance(option, NumaLatency | NumaCache) and not machine.has_hmat,
            f"-numa {option}: HMAT is disabled",
            _HMAT,
        )
        _ADD[type(option)](state, option)
    _check_nodes(state)
    _check_distances(state)
    # As soon as any option names a slot, all unnamed slots are on node 0.
    defaults = [0] * len(machine.units) if state.slots else machine.defaults(len(state.nodes))
    for slot, default in enumerate(defaults):
        if slot not in state.slots:
            state.assign(slot, default, "-numa")
    for node, initiator in state.initiators.items():
        refuse_smp(
            initiator not in state.with_cpus,
            f"the initiator of NUMA node {node}, {initiator}, has no CPUs",
            "name another one",
        )
    return [state.slots[slot] for slot in range(len(machine.units))]


def _add_node(state: _State, node: NumaNode) -> None:
    machine = state.machine
    words, most = f"-numa {node}", _MOST_NODES - 1
    refuse_smp(
        node.id > most, f"NUMA node {node.id} is more than QEMU's {most}", "have fewer nodes"
    )
    refuse_smp(node.id in state.nodes, f"duplicate NUMA nodeid: {node.id}", _NUMBER)
    if node.initiator is not None:
        refuse_smp(not machine.has_hmat, f"{words}: HMAT is disabled", _HMAT)
        refuse_smp(node.initiator > most, f"{words}: initiator expects 0 to {most}", "name a node")
        state.initiators[node.id] = node.initiator
    maxcpus = len(machine.units) * machine.size
    for cpu in node.cpus:
        refuse_smp(
            cpu >= maxcpus,
            f"CPU index ({cpu}) should be smaller than maxcpus ({maxcpus})",
            "correct cpus=",
        )
        state.assign(cpu // machine.size, node.id, words)
    if node.mem is not None:
        refuse_smp(
            not machine.takes_mem,
            "this machine type does not take -numa node,mem=",
            "use memdev= instead",
        )
        # QEMU reads it twice: as bytes, and then, without a suffix, as MiB.
        refuse_smp(
            parse_size(node.mem, is_strict=machine.has_strict_sizes) is None,
            f"{words}: mem expects a size",
            "write 512M",
        )
    state.nodes[node.id] = node
    nodes = state.nodes.values()
    refuse_smp(
        any(one.mem is not None for one in nodes) and any(one.memdev is not None for one in nodes),
        "-numa with mem= and with memdev=: QEMU takes one or the other",
        "use memdev= only",
    )


def _add_cpu(state: _State, cpu: NumaCpu) -> None:
    units = state.machine.units
    refuse_smp(
        cpu.node not in state.nodes,
        f"-numa {cpu}: node {cpu.node} is not defined before it",
        _NODE_FIRST,
    )
    for key in cpu.props:
        refuse_smp(
            # QEMU accepts drawers and books on every machine, and ignores them.
            key not in state.machine.props or key not in (*units[0], "drawer-id", "book-id"),
            f"-numa {cpu}: {key} is not supported by this machine",
            f"leave out {key}",
        )
    wanted = {key: value for key, value in cpu.props.items() if key in units[0]}
    found = [slot for slot, props in enumerate(units) if wanted.items() <= props.items()]
    refuse_smp(not found, f"-numa {cpu}: no vCPU is there", "correct its ids")
    for slot in found:
        state.assign(slot, cpu.node, f"-numa {cpu}")


def _add_distance(state: _State, distance: NumaDistance) -> None:
    refuse_smp(
        not {distance.source, distance.destination} <= state.nodes.keys(),
        f"-numa {distance}: a node is not defined before it",
        _NODE_FIRST,
    )
    is_local = distance.source == distance.destination
    refuse_smp(
        distance.value < _NEAREST or (is_local and distance.value != _NEAREST),
        f"-numa {distance}: a distance is {_NEAREST} (to itself) or more",
        "correct val=",
    )
    state.distances[distance.source, distance.destination] = distance.value


def _add_latency(state: _State, given: NumaLatency) -> None:
    # A node that does not exist has no CPUs.
    refuse_smp(
        given.initiator not in state.with_cpus,
        f"-numa {given}: initiator {given.initiator} has no CPUs so far",
        "name its CPUs before",
    )
    refuse_smp(
        given.target not in state.nodes,
        f"-numa {given}: node {given.target} is not defined before it",
        _NODE_FIRST,
    )
    is_bandwidth = given.data_type in _BANDWIDTHS
    has_one = (given.latency is None, given.bandwidth is None) == (is_bandwidth, not is_bandwidth)
    name = "bandwidth" if is_bandwidth else "latency"
    refuse_smp(
        not has_one,
        f"-numa {given}: {given.data_type} takes {name}=, and nothing else",
        f"write {name}=…",
    )
    value = given.latency
    if given.bandwidth is not None:
        value = parse_size(given.bandwidth, is_strict=state.machine.has_strict_sizes)
    refuse_smp(
        value is None or (is_bandwidth and value % _MIB > 0),
        f"-numa {given}: bandwidth expects a size in whole MiB",
        "write bandwidth=200M",
    )
    assert value is not None
    table = state.tables.setdefault((given.hierarchy, given.data_type), _Table())
    refuse_smp(
        (given.initiator, given.target) in table.pairs,
        f"-numa {given}: duplicate configuration",
        "leave one of them out",
    )
    table.pairs.add((given.initiator, given.target))
    if value:
        (_compress_bandwidth if is_bandwidth else _compress_latency)(table, value, given)
        state.attributes.add((given.target, is_bandwidth))


#: A compressed latency or bandwidth has 16 bits.
_MOST_COMPRESSED: Final = 0xFFFF


def _compress_latency(table: _Table, value: int, given: NumaLatency) -> None:
    base = 1
    while value % (base * 10) == 0:
        base *= 10
    # As in QEMU, the quotient uses the earlier base; the first value has none, and passes.
    most = max(table.bits, value // table.base) if table.base else 0
    _check_range(most < _MOST_COMPRESSED, given)
    table.base, table.bits = min(table.base or base, base), most


def _compress_bandwidth(table: _Table, value: int, given: NumaLatency) -> None:
    bits = table.bits | value
    base = bits & -bits
    is_narrow = bits.bit_length() - (base.bit_length() - 1) <= 16
    _check_range(is_narrow and value // base < _MOST_COMPRESSED, given)
    table.base, table.bits = base, bits


def _check_range(is_narrow: bool, given: NumaLatency) -> None:
    refuse_smp(
        not is_narrow,
        f"-numa {given}: it differs too much from those before",
        "correct it: ACPI has 16 bits for it",
    )


def _add_cache(state: _State, cache: NumaCache) -> None:
    size = parse_size(cache.size, is_strict=state.machine.has_strict_sizes)
    below, above = (state.caches.get((cache.node, cache.level + step)) for step in (-1, 1))
    checks = (
        (size is None, "size expects a size"),
        (cache.node >= len(state.nodes), f"node {cache.node} is not defined before it"),
        (
            not {(cache.node, False), (cache.node, True)} <= state.attributes,
            f"latency and bandwidth of node {cache.node} are not given before it",
        ),
        (not 1 <= cache.level <= _CACHE_LEVELS, f"level expects 1 to {_CACHE_LEVELS}"),
        ((cache.node, cache.level) in state.caches, "duplicate configuration"),
        (cache.level > 1 and below is None, f"level {cache.level - 1} is not given before it"),
        (
            size is not None and below is not None and size <= below,
            "it is not larger than the level below",
        ),
        (
            size is not None and above is not None and size >= above,
            "it is not smaller than the level above",
        ),
    )
    for is_wrong, why in checks:
        refuse_smp(is_wrong, f"-numa {cache}: {why}", "correct it, or leave it out")
    assert size is not None
    state.caches[cache.node, cache.level] = size


#: The function that applies an option, by its class.
_ADD: Final[Mapping[type, Callable[[_State, Any], None]]] = {
    NumaNode: _add_node,
    NumaCpu: _add_cpu,
    NumaDistance: _add_distance,
    NumaLatency: _add_latency,
    NumaCache: _add_cache,
}


def _check_nodes(state: _State) -> None:
    ids = sorted(state.nodes)
    refuse_smp(
        ids != list(range(len(ids))) or not ids,
        f"NUMA node ids must run from 0 without a gap: {format_ids(ids)}",
        _NUMBER,
    )
    memdevs = [node.memdev for node in state.nodes.values() if node.memdev is not None]
    refuse_smp(
        len(set(memdevs)) < len(memdevs),
        "two nodes have the same memdev=",
        "give each node its own",
    )
    is_strict = state.machine.has_strict_sizes
    sizes = [
        parse_size(node.mem, is_strict=is_strict)
        for node in state.nodes.values()
        if node.mem is not None
    ]
    refuse_smp(bool(sizes) and not any(sizes), "the NUMA nodes have no memory", "correct mem=")


def _check_distances(state: _State) -> None:
    """One direction is enough, unless the two of one pair differ: then every pair needs both."""
    known = state.distances
    if not known:
        return
    for one, other in combinations(sorted(state.nodes), 2):
        refuse_smp(
            not {(one, other), (other, one)} & known.keys(),
            f"the distance between node {one} and {other} is missing",
            "write -numa dist for it",
        )
    refuse_smp(
        any(known.get((other, one), value) != value for (one, other), value in known.items())
        and any(pair not in known for pair in permutations(state.nodes, 2)),
        "a pair of nodes has two distances that differ, and another pair has only one",
        "write -numa dist for both directions of all",
    )
