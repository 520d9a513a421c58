"""The persistent side of a domain: what its XML says of vCPUs, in one frozen value. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.model import DomainState, Topology

#: More than any machine of QEMU 7.2 to 11.1 takes (x86_64: 4096; libvirt itself: 16384).
MOST_VCPUS: Final = 16384


@dataclass(frozen=True, slots=True)
class VcpuConfig:
    """One vCPU as it will be at the next boot: an element of `<vcpus>`.

    `order` is the rank in which it is plugged, None where nothing is said.
    """

    id: int
    enabled: bool
    hotpluggable: bool
    order: int | None = None


@dataclass(frozen=True, slots=True)
class NumaCell:
    """One `<numa><cell>`: `cpus` are vCPU ids, `memory` is in bytes (0: a node without memory), `distances` are
    pairs of another cell's id and the distance to it.
    """

    id: int
    cpus: tuple[int, ...]
    memory: int | None = None
    distances: tuple[tuple[int, int], ...] = ()


#: Keys and values in the order in which they are written.
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class MemoryBackend:
    """A QEMU memory backend under the id that it has to keep: migration finds RAM blocks by their ids.

    `cell` is the NUMA node whose memory it is, None for that of the whole machine. Its size is that of the node,
    or of the machine. `options` are its others, as of -object.
    """

    id: str
    cell: int | None = None
    driver: str = "memory-backend-ram"
    options: Pairs = ()


@dataclass(frozen=True, slots=True)
class Dimm:
    """One `<memory model='dimm'>`: `size` and `address` are in bytes. `id` and `memdev` are QEMU's ids of the
    device and of its backend; None: they are free. A device that has a `memdev` and no `id` has none in QEMU.
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
    """What of a QEMU that ran libvirt's XML has no place for; it is kept in `<metadata>`.

    `machine`, `accel` and `cpu` are further options of -machine, -accel and -cpu. `backends` stand in the order in
    which QEMU makes them. `is_one_block` is whether the nodes share one block of memory (`-numa node,mem=`).
    `is_exact` is whether sizes of memory are those of a QEMU that ran, and so stay as they are.
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
    """What a domain's XML says of its vCPUs.

    `dialect` is "rfc" or "libvirt", whichever its `<vcpus>` is written in, None without one. `cpuset` is `<vcpu
    cpuset>`, the host CPUs of every vCPU that `pins` (`<vcpupin>`) does not name; `schedulers` has `fifo:10`,
    `batch` and the like. `agent` is the socket path of the guest agent's channel, `accel` "kvm" or "tcg", `cpu`
    what -cpu takes, None for the machine's own. `memory` is all of it at the start, that of `dimms` included;
    `max_memory` and `memory_slots` are `<maxMemory>`. `period` and `quota` (a negative one: no limit) are in
    microseconds and, like `shares`, of each vCPU; `mems` are the host NUMA nodes of `<numatune>`, `cell_mems`
    those of a cell's `<memnode>`, where they bind (mode strict or restrictive).
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
        """The same with sizes of memory that its machine takes, as libvirt rounds them up."""
        unit = architecture(self.arch).memory_alignment
        dimms = tuple(replace(dimm, size=_up(dimm.size, unit)) for dimm in self.dimms)
        return replace(
            self,
            memory=_up(self.base_memory or 0, unit) + sum(dimm.size for dimm in dimms) if self.memory else None,
            max_memory=_up(self.max_memory, unit) if self.max_memory else None,
            dimms=dimms,
            cells=tuple(
                replace(cell, memory=_up(cell.memory, unit) if cell.memory else cell.memory) for cell in self.cells
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
        """How many vCPUs one `device_add` takes on that machine: a core on pseries, else one."""
        return architecture(self.arch).entity_size(self.topology.threads if self.topology is not None else 1)

    @property
    def nodes(self) -> tuple[NumaCell, ...]:
        """The cells with all of their vCPUs: those that no cell names are in the first one, as libvirt has it."""
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
        """The host NUMA nodes that a vCPU's memory is bound to; None: wherever."""
        cell = self.cell_of(vcpu_id)
        return self.cell_mems.get(cell, self.mems) if cell is not None else self.mems

    def switched(self, ids: tuple[int, ...], enabled: bool) -> Definition:
        """The same with these vCPUs on or off, as libvirt does it: hotpluggable then, and no order stays."""
        asked = set(ids)
        return replace(
            self,
            vcpus=tuple(
                VcpuConfig(vcpu.id, enabled, hotpluggable=True) if vcpu.id in asked else replace(vcpu, order=None)
                for vcpu in self.vcpus
            ),
        )


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def definition_of(state: DomainState) -> Definition:
    """What a running guest's XML would say: its own vCPUs, topology and nodes.

    `hotpluggable` is libvirt's: what has a device id can go, and every empty slot can be filled. Behind such a one
    libvirt takes none that cannot go.
    """
    vcpus = tuple(
        VcpuConfig(
            vcpu.id,
            vcpu.enabled,
            hotpluggable=not vcpu.enabled or (vcpu.qom_path or "").startswith("/machine/peripheral/"),
            order=vcpu.order,
        )
        for vcpu in state.vcpus
    )
    first = next((vcpu.id for vcpu in vcpus if vcpu.hotpluggable), len(vcpus))
    vcpus = tuple(replace(vcpu, hotpluggable=vcpu.id >= first) for vcpu in vcpus)
    cells = tuple(NumaCell(node, tuple(v.id for v in state.vcpus if v.node == node)) for node in state.nodes)
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


def default_vcpus(maximum: int, current: int) -> tuple[VcpuConfig, ...]:
    """Without `<vcpus>`: ids 0 to current-1 are enabled and stay, the others can be plugged."""
    return tuple(VcpuConfig(number, number < current, number >= current) for number in range(maximum))


def started_with(vcpus: tuple[VcpuConfig, ...], said: Collection[int] = ()) -> tuple[VcpuConfig, ...]:
    """Where nothing is said of `hotpluggable` (all ids but those in `said`): QEMU starts with the run of enabled
    vCPUs from 0 on, and the others are plugged.
    """
    run = next((vcpu.id for vcpu in vcpus if not vcpu.enabled), len(vcpus))
    return tuple(vcpu if vcpu.id in said else replace(vcpu, hotpluggable=vcpu.id >= run) for vcpu in vcpus)


def contradictions(definition: Definition) -> list[str]:
    """What `<vcpus>` says that the machine cannot be: halves of a core, two of one rank."""
    found = []
    size = definition.granularity
    ranks: dict[int, int] = {}
    for first in range(0, definition.maxcpus, size):
        core = definition.vcpus[first : first + size]
        if any(replace(vcpu, id=first) != core[0] for vcpu in core):
            found.append(f"vCPUs {first}-{first + len(core) - 1} are one core, and differ")
        order = core[0].order
        if order is not None and ranks.setdefault(order, first) != first:
            found.append(f"vCPU {ranks[order]} and {first} have the same order {order}")
    return found
