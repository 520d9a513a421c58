"""QEMU's command line for a guest that boots with exactly the vCPUs of its XML. Pure.

vCPUs that are not hotpluggable are those of -smp, from 0 on. The other enabled ones are plugged in
their order, by `-device` or, while the guest is paused, by `device_add` (as libvirt does).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from qmpvcpu.core.arch import architecture, architecture_of_machine
from qmpvcpu.core.definition import Definition, Dimm, MemoryBackend, NumaCell
from qmpvcpu.core.machine.layout import MachineLayout, MachineSpec, predict_layout
from qmpvcpu.core.machine.numa import NumaNode
from qmpvcpu.core.machine.smp import Smp
from qmpvcpu.core.machine.words import escaped, join_pairs
from qmpvcpu.core.model import LEVELS, DomainState, Props, Topology
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import Refusal, VcpuRefused


class BootStyle(StrEnum):
    """How the vCPUs are plugged that -smp cannot express."""

    DEVICE = "device"
    QMP = "qmp"


@dataclass(frozen=True, slots=True)
class BootArgs:
    """`arguments` of QEMU, and the QMP `commands` to be sent then, in order.

    `started` are the ids of the entities that the guest boots with, in the order in which they are
    plugged.
    """

    arguments: tuple[str, ...]
    started: tuple[int, ...] = ()
    commands: tuple[dict[str, Any], ...] = ()
    messages: tuple[str, ...] = ()

    def to_json(self) -> list[Any]:
        """The list of `boot-args --json`: texts are arguments, objects QMP commands."""
        return [*self.arguments, *self.commands]


def qemu_arch(definition: Definition) -> str:
    """QEMU's target for a domain.

    Raises:
        VcpuRefused: neither its architecture nor its machine type says it.
    """
    if definition.arch:
        return architecture(definition.arch).name
    row = architecture_of_machine(definition.machine or "")
    if row is None:
        raise catalogue.NO_ARCH.error()
    return row.name


_MIB: Final = 1024 * 1024
#: Options of -machine that refer to other options of the command line.
_NAMING: Final = frozenset({"pflash0", "pflash1", "audiodev", "pcspk-audiodev"})


def machine_spec(definition: Definition) -> MachineSpec:
    """The machine that QEMU is asked for.

    Raises:
        VcpuRefused: no QEMU could be that; the text says why.
    """
    arch = qemu_arch(definition)
    topology = definition.topology or Topology(definition.maxcpus, sockets=definition.maxcpus)
    levels = {
        level: getattr(topology, level)
        for level in LEVELS
        if getattr(topology, level) > 1 or level in ("sockets", "cores", "threads")
    }
    smp = Smp(len(_run(definition)), definition.maxcpus, **levels)
    more = definition.options
    machine = definition.machine or architecture(arch).default_machine
    return MachineSpec(
        ",".join(
            filter(
                None, (machine, join_pairs(pair for pair in more.machine if pair[0] not in _NAMING))
            )
        ),
        smp,
        ",".join(filter(None, (definition.cpu, join_pairs(more.cpu)))) if definition.cpu else None,
        definition.accel or "tcg",
        tuple(NumaNode(cell.id, cell.cpus) for cell in definition.nodes),
    )


def located(definition: Definition, state: DomainState) -> DomainState:
    """A definition's state with the props of each slot, as far as they are known without a QEMU."""
    try:
        layout = predict_layout(machine_spec(definition), qemu_arch(definition), assume=True)
    except VcpuRefused:
        return state
    if layout is None or layout.maxcpus != state.maxcpus:
        return state
    props = {number: slot.props for ids, slot in layout.entities() for number in ids}
    return replace(
        state,
        entities=tuple(replace(entity, props=props[entity.id]) for entity in state.entities),
        vcpus=tuple(replace(vcpu, props=props[vcpu.id]) for vcpu in state.vcpus),
    )


def _run(definition: Definition) -> tuple[int, ...]:
    """The vCPUs of -smp: those from 0 on that are enabled and not hotpluggable."""
    end = next(
        (v.id for v in definition.vcpus if not v.enabled or v.hotpluggable), definition.maxcpus
    )
    if not end:
        raise catalogue.BOOT_VCPU_0.error()
    return tuple(range(end))


def boot_args(
    definition: Definition,
    layout: MachineLayout,
    style: BootStyle = BootStyle.DEVICE,
    incoming: str | None = None,
) -> BootArgs:
    """The command line.

    Args:
        definition: the domain.
        layout: of `machine_spec(definition)`.
        style: how the vCPUs are plugged that -smp cannot express.
        incoming: -incoming's argument ("defer", a URI), for the destination of a migration.

    Raises:
        VcpuRefused: there cannot be such a guest; every reason.
    """
    messages = []
    if not definition.options.is_exact:
        given, definition = definition, definition.rounded
        if definition != given:
            unit = architecture(definition.arch).memory_alignment // _MIB
            messages.append(f"memory is rounded up to multiples of {unit} MiB, as libvirt does")
    spec = machine_spec(definition)
    whole = definition.options.backend_of(None)
    naming = [pair for pair in definition.options.machine if pair[0] in _NAMING]
    naming += [("memory-backend", whole.id)] if whole is not None else []
    machine = ",".join(filter(None, (spec.machine, join_pairs(naming))))
    accel = ",".join(filter(None, (spec.accel, join_pairs(definition.options.accel))))
    arguments = ["-machine", machine, "-accel", accel]
    arguments += ["-cpu", spec.cpu] if spec.cpu is not None else []
    arguments += [
        *_memory(definition),
        "-smp",
        str(spec.smp),
        *_numa(definition),
        *_dimms(definition),
    ]
    run = _run(definition)
    plugged, refusals = _plugged(definition, layout, len(run))
    if refusals:
        raise VcpuRefused(refusals)
    commands: list[dict[str, Any]] = []
    for ids, props in plugged:
        device = {"driver": layout.cpu_type, "id": f"vcpu{ids[0]}", **props}
        if style is BootStyle.QMP:
            commands.append({"execute": "device_add", "arguments": device})
        else:
            words = [
                f"{key}={escaped(str(value))}" for key, value in device.items() if key != "driver"
            ]
            arguments += ["-device", ",".join([escaped(str(layout.cpu_type)), *words])]
    if incoming is not None:
        arguments += ["-incoming", incoming]
    elif style is BootStyle.QMP:
        # With -incoming QEMU waits by itself.
        arguments.append("-S")
        commands.append({"execute": "cont"})
    started = [ids for ids, _ in layout.entities() if ids[-1] < len(run)] + [
        ids for ids, _ in plugged
    ]
    return BootArgs(
        tuple(arguments), tuple(ids[0] for ids in started), tuple(commands), tuple(messages)
    )


def _memory(definition: Definition) -> list[str]:
    size = sum(_cell_sizes(definition)) if definition.cells else definition.base_memory
    if size is not None and size <= 0:
        raise catalogue.NO_MEMORY.error()
    words = {} if size is None else {"size": _kib(size)}
    if definition.max_memory is not None:
        words |= {"slots": str(definition.memory_slots)} if definition.memory_slots else {}
        words |= {"maxmem": _kib(definition.max_memory)}
    return ["-m", join_pairs(words.items())] if words else []


def _kib(size: int) -> str:
    return f"{size // 1024}k" if size % 1024 == 0 else f"{size}b"


def _numa(definition: Definition) -> list[str]:
    options = definition.options
    if not definition.cells:
        whole = options.backend_of(None)
        size = definition.base_memory
        return _backend(whole, size) if whole is not None and size is not None else []
    sizes = {
        cell.id: size for cell, size in zip(definition.cells, _cell_sizes(definition), strict=True)
    }
    words = []
    if options.is_one_block:
        whole = options.backend_of(None)
        words += _backend(whole, sum(sizes.values())) if whole is not None else []
        memory = {cell: f"mem={size}b" for cell, size in sizes.items()}
    else:
        # A node without memory has no backend: QEMU refuses one of size 0.
        backends = {
            cell: options.backend_of(cell) or MemoryBackend(f"ram-node{cell}", cell)
            for cell, size in sizes.items()
            if size
        }
        made = [backend for backend in options.backends if backend.cell in backends]
        made += [backend for backend in backends.values() if backend not in made]
        for backend in made:
            assert backend.cell is not None
            words += _backend(backend, sizes[backend.cell])
        memory = {cell: f"memdev={escaped(backend.id)}" for cell, backend in backends.items()}
    nodes = [NumaNode(cell.id, cell.cpus).words(memory.get(cell.id)) for cell in definition.nodes]
    return [
        *words,
        *(word for node in nodes for word in ("-numa", node)),
        *_distances(definition.cells),
    ]


#: The defaults of QEMU and libvirt: the distance of a node to itself, and to another node.
_NEAR, _FAR = 10, 20


def _distances(cells: tuple[NumaCell, ...]) -> list[str]:
    known = {(cell.id, other): value for cell in cells for other, value in cell.distances}
    if not known:
        return []
    words = []
    for one in cells:
        for other in cells:
            # As libvirt writes them: QEMU needs all of them if the two directions of one pair
            # differ.
            both = (one.id, other.id), (other.id, one.id)
            value = next(
                (known[pair] for pair in both if pair in known), _NEAR if one is other else _FAR
            )
            words += ["-numa", f"dist,src={one.id},dst={other.id},val={value}"]
    return words


def _backend(backend: MemoryBackend | Dimm, size: int, name: str | None = None) -> list[str]:
    own = (("qom-type", backend.driver), ("id", name or backend.id or ""), ("size", str(size)))
    return ["-object", join_pairs([*own, *backend.options], "qom-type")]


def _dimms(definition: Definition) -> list[str]:
    words = []
    for number, dimm in enumerate(definition.dimms):
        memdev = dimm.memdev or f"memdimm{number}"
        name = dimm.id or (f"dimm{number}" if dimm.memdev is None else None)
        words += _backend(dimm, dimm.size, memdev)
        values = {
            "driver": "pc-dimm",
            "id": name,
            "memdev": memdev,
            "node": dimm.node,
            "slot": dimm.slot,
            "addr": dimm.address,
        }
        written = ((key, str(value)) for key, value in values.items() if value is not None)
        words += ["-device", join_pairs(written, "driver")]
    return words


def _cell_sizes(definition: Definition) -> list[int]:
    """Bytes of each cell's memory; equal parts of <memory> if no cell has a size."""
    cells = definition.cells
    missing = [cell.id for cell in cells if cell.memory is None]
    if not missing:
        return [cell.memory or 0 for cell in cells]
    alignment = architecture(qemu_arch(definition)).memory_alignment
    part = (definition.base_memory or 0) // len(cells) // alignment * alignment
    if len(missing) < len(cells) or not part:
        raise catalogue.CELL_WITHOUT_MEMORY.error(cells=missing)
    return [part] * len(cells)


def _plugged(
    definition: Definition, layout: MachineLayout, run: int
) -> tuple[list[tuple[tuple[int, ...], Props]], list[Refusal]]:
    """Ids and props of the vCPUs that -smp cannot express, in the order of plugging; and
    refusals.
    """
    refusals: list[Refusal] = []
    if layout.maxcpus != definition.maxcpus:
        return [], [catalogue.TOPOLOGY(maxcpus=layout.maxcpus, defined=definition.maxcpus)]
    wanted = []
    for ids, slot in layout.entities():
        on = [number for number in ids if definition.vcpus[number].enabled]
        if not on or ids[-1] < run:
            continue
        if len(on) < len(ids) or ids[0] < run:
            refusals.append(catalogue.BOOT_PART(ids))
        else:
            order = definition.vcpus[ids[0]].order
            wanted.append((order is None, order or 0, ids, slot.props or Props()))
    if wanted and (not layout.can_plug or layout.cpu_type is None):
        ids = tuple(number for _, _, group, _ in wanted for number in group)
        refusals.append(catalogue.NO_HOTPLUG_AT_BOOT(ids, machine=layout.machine, arch=layout.arch))
    return [(ids, props) for _, _, ids, props in sorted(wanted, key=lambda row: row[:3])], refusals
