"""The persistent definition of a domain: the vCPUs of its XML, as one frozen value. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.model import DomainState, Entity, Topology, Vcpu, format_ids

#: More than any machine of QEMU 7.2 to 11.1 supports (x86_64: 4096; libvirt itself: 16384).
MOST_VCPUS: Final = 16384


@dataclass(frozen=True, slots=True)
class VcpuConfig:
    """One vCPU as it will be at the next boot: an element of `<vcpus>`.

    `order` is its rank in the order of plugging, None if it has none.
    """

    id: int
    enabled: bool
    hotpluggable: bool
    order: int | None = None


@dataclass(frozen=True, slots=True)
class NumaCell:
    """One `<numa><cell>`: `cpus` are vCPU ids, `memory` is in bytes (0: a node without memory),
    `distances` are pairs of another cell's id and the distance to it.
    """

    id: int
    cpus: tuple[int, ...]
    memory: int | None = None
    distances: tuple[tuple[int, int], ...] = ()


#: Keys and values in the order in which they are written.
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class MemoryBackend:
    """A QEMU memory backend with the id that it must keep: migration finds RAM blocks by their ids.

    `cell` is the NUMA node whose memory it is, None for the whole machine. Its size is that of the
    node, or of the machine. `options` are the other options of -object.
    """

    id: str
    cell: int | None = None
    driver: str = "memory-backend-ram"
    options: Pairs = ()


@dataclass(frozen=True, slots=True)
class Dimm:
    """One `<memory model='dimm'>`: `size` and `address` are in bytes. `id` and `memdev` are QEMU's
    ids of the device and of its backend; None: any id. A device with a `memdev` but without an `id`
    has no id in QEMU.
    """

    size: int
    node: int | None = None
    slot: int | None = None
    address: int | None = None
    id: str | None = None
    memdev: str | None = None
    driver: str = "memory-backend-ram"
    options: Pairs = ()


@dataclass(frozen=True, slots=True)
class QemuOptions:
    """Options of a running QEMU for which libvirt's XML has no element; they are stored in
    `<metadata>`.

    `machine`, `accel` and `cpu` are further options of -machine, -accel and -cpu. `backends` are in
    the order in which QEMU makes them. `is_one_block` is whether the nodes share one block of
    memory (`-numa node,mem=`). `is_exact` is whether memory sizes were read from a running QEMU,
    and so are not rounded.
    """

    machine: Pairs = ()
    accel: Pairs = ()
    cpu: Pairs = ()
    backends: tuple[MemoryBackend, ...] = ()
    is_one_block: bool = False
    is_exact: bool = False

    def backend_of(self, cell: int | None) -> MemoryBackend | None:
        """The backend of a node, or of the whole machine."""
        return next((backend for backend in self.backends if backend.cell == cell), None)


@dataclass(frozen=True, slots=True)
class Definition:
    """The vCPUs of a domain's XML, and what they need.

    `dialect` is that of `<vcpus>`, "rfc" or "libvirt", None without one. `cpuset` is `<vcpu
    cpuset>`, the host CPUs of every vCPU that `pins` (`<vcpupin>`) does not name; `schedulers` has
    `fifo:10`, `batch` and the like. `agent` is the socket path of the guest agent's channel,
    `accel` is "kvm" or "tcg", `cpu` the argument of -cpu, None for the machine's default. `memory`
    is all memory at the start, with `dimms`; `max_memory` and `memory_slots` are `<maxMemory>`.
    `period` and `quota` (a negative one: no limit) are in microseconds and, like `shares`, for each
    vCPU; `mems` are the host NUMA nodes of `<numatune>`, `cell_mems` those of a cell's `<memnode>`,
    if they bind (mode strict or restrictive).
    """

    name: str
    vcpus: tuple[VcpuConfig, ...]
    accel: str | None = None
    uuid: str | None = None
    arch: str | None = None
    machine: str | None = None
    emulator: str | None = None
    dialect: str | None = None
    cpuset: tuple[int, ...] | None = None
    topology: Topology | None = None
    cells: tuple[NumaCell, ...] = ()
    pins: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    schedulers: Mapping[int, str] = field(default_factory=dict)
    emulator_pin: tuple[int, ...] | None = None
    period: int | None = None
    quota: int | None = None
    shares: int | None = None
    mems: tuple[int, ...] | None = None
    cell_mems: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    agent: str | None = None
    #: In bytes.
    memory: int | None = None
    cpu: str | None = None
    max_memory: int | None = None
    memory_slots: int | None = None
    dimms: tuple[Dimm, ...] = ()
    options: QemuOptions = field(default_factory=QemuOptions)

    @property
    def base_memory(self) -> int | None:
        """Bytes of `-m`: the memory without that of memory devices."""
        return None if self.memory is None else self.memory - sum(dimm.size for dimm in self.dimms)

    @property
    def rounded(self) -> Definition:
        """The same with memory sizes that its machine supports, rounded up as libvirt does."""
        unit = architecture(self.arch).memory_alignment
        dimms = tuple(replace(dimm, size=_up(dimm.size, unit)) for dimm in self.dimms)
        return replace(
            self,
            memory=_up(self.base_memory or 0, unit) + sum(dimm.size for dimm in dimms)
            if self.memory
            else None,
            max_memory=_up(self.max_memory, unit) if self.max_memory else None,
            dimms=dimms,
            cells=tuple(
                replace(cell, memory=_up(cell.memory, unit) if cell.memory else cell.memory)
                for cell in self.cells
            ),
        )

    @property
    def maxcpus(self) -> int:
        """How many vCPU ids there are."""
        return len(self.vcpus)

    @property
    def enabled_ids(self) -> tuple[int, ...]:
        """Ids of the vCPUs that the guest boots with, ascending."""
        return tuple(vcpu.id for vcpu in self.vcpus if vcpu.enabled)

    @property
    def granularity(self) -> int:
        """How many vCPUs one `device_add` plugs on that machine: a core on pseries, else one."""
        return architecture(self.arch).entity_size(
            self.topology.threads if self.topology is not None else 1
        )

    @property
    def nodes(self) -> tuple[NumaCell, ...]:
        """The cells with all of their vCPUs: those that no cell names are in the first one, as in
        libvirt.
        """
        named = {number for cell in self.cells for number in cell.cpus}
        rest = [number for number in range(self.maxcpus) if number not in named]
        if not rest or not self.cells:
            return self.cells
        first = self.cells[0]
        return (replace(first, cpus=tuple(sorted((*first.cpus, *rest)))), *self.cells[1:])

    def cell_of(self, vcpu_id: int) -> int | None:
        """The NUMA node of a vCPU; None without NUMA."""
        if not self.cells:
            return None
        return next((cell.id for cell in self.cells if vcpu_id in cell.cpus), self.cells[0].id)

    def mems_of(self, vcpu_id: int) -> tuple[int, ...] | None:
        """The host NUMA nodes that a vCPU's memory is bound to; None: any."""
        cell = self.cell_of(vcpu_id)
        return self.cell_mems.get(cell, self.mems) if cell is not None else self.mems

    def switched(self, ids: tuple[int, ...], enabled: bool) -> Definition:
        """The same with these vCPUs enabled or disabled, as libvirt does it: they become
        hotpluggable, and no vCPU keeps an order.
        """
        requested = set(ids)
        return replace(
            self,
            vcpus=tuple(
                VcpuConfig(vcpu.id, enabled, hotpluggable=True)
                if vcpu.id in requested
                else replace(vcpu, order=None)
                for vcpu in self.vcpus
            ),
        )


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def definition_of(state: DomainState) -> Definition:
    """The definition that describes a running guest: its vCPUs, topology and nodes.

    `hotpluggable` is libvirt's: a CPU with a device id can be unplugged, and every empty slot can
    be filled. After the first hotpluggable vCPU libvirt accepts only hotpluggable ones.
    """
    vcpus = tuple(
        VcpuConfig(
            vcpu.id,
            vcpu.enabled,
            hotpluggable=not vcpu.enabled
            or (vcpu.qom_path or "").startswith("/machine/peripheral/"),
            order=vcpu.order,
        )
        for vcpu in state.vcpus
    )
    first = next((vcpu.id for vcpu in vcpus if vcpu.hotpluggable), len(vcpus))
    vcpus = tuple(replace(vcpu, hotpluggable=vcpu.id >= first) for vcpu in vcpus)
    cells = tuple(
        NumaCell(node, tuple(v.id for v in state.vcpus if v.node == node)) for node in state.nodes
    )
    topology = state.topology
    return Definition(
        state.name,
        vcpus,
        accel=state.accel,
        arch=state.arch,
        machine=state.machine,
        topology=topology if topology is not None and topology.product == state.maxcpus else None,
        cells=cells,
    )


def state_of(
    definition: Definition, name: str | None = None, *, active: bool = False
) -> DomainState:
    """The state of the guest right after its next boot.

    An entity is hotpluggable if a request may change it, a vCPU if the XML says so.
    """
    size = definition.granularity
    row = architecture(definition.arch)
    entities, vcpus = [], []
    for first in range(0, definition.maxcpus, size):
        ids = tuple(range(first, min(first + size, definition.maxcpus)))
        entities.append(
            Entity(ids, None, None, None, definition.cell_of(first), hotpluggable=first != 0)
        )
        for number in ids:
            config = definition.vcpus[number]
            pin = definition.pins.get(number, definition.cpuset)
            vcpus.append(
                Vcpu(
                    number,
                    config.enabled,
                    config.hotpluggable,
                    ids,
                    order=config.order if config.enabled else None,
                    node=definition.cell_of(number),
                    pin=format_ids(pin) if pin else None,
                    scheduler=definition.schedulers.get(number),
                )
            )
    return DomainState(
        name or definition.name,
        definition.arch or "",
        definition.machine or "",
        definition.accel,
        active=active,
        version=None,
        topology=definition.topology,
        can_plug=row.can_plug,
        can_unplug=row.can_unplug,
        threads_shared=None,
        entities=tuple(entities),
        vcpus=tuple(vcpus),
    )


def default_vcpus(maximum: int, current: int) -> tuple[VcpuConfig, ...]:
    """The vCPUs without `<vcpus>`: ids 0 to current-1 are enabled and not hotpluggable, the others
    can be plugged.
    """
    return tuple(
        VcpuConfig(number, number < current, number >= current) for number in range(maximum)
    )


def started_with(
    vcpus: tuple[VcpuConfig, ...], given: Collection[int] = ()
) -> tuple[VcpuConfig, ...]:
    """The vCPUs with `hotpluggable` filled in for those that do not have it (all ids except
    `given`): QEMU starts with the enabled vCPUs from 0 to the first gap, and the others are
    plugged.
    """
    run = next((vcpu.id for vcpu in vcpus if not vcpu.enabled), len(vcpus))
    return tuple(
        vcpu if vcpu.id in given else replace(vcpu, hotpluggable=vcpu.id >= run) for vcpu in vcpus
    )


def contradictions(definition: Definition) -> list[str]:
    """What cannot be in `<vcpus>`: a core whose vCPUs differ, and the same order twice."""
    found = []
    size = definition.granularity
    ranks: dict[int, int] = {}
    for first in range(0, definition.maxcpus, size):
        core = definition.vcpus[first : first + size]
        if any(replace(vcpu, id=first) != core[0] for vcpu in core):
            found.append(f"vCPUs {first}-{first + len(core) - 1} are one core, but differ")
        order = core[0].order
        if order is not None and ranks.setdefault(order, first) != first:
            found.append(f"vCPU {ranks[order]} and {first} have the same order {order}")
    return found
