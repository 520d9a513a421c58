"""Write the XML of a guest that has none, from what its QEMU reports."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from qmpvcpu.core.definition import (
    Definition,
    NumaCell,
)
from qmpvcpu.core.machine.command_line import split_cpu
from qmpvcpu.core.machine.devices import Devices
from qmpvcpu.core.model import format_ids
from qmpvcpu.xml.boot_devices import QEMU_NAMESPACE
from qmpvcpu.xml.document import LEVELS_OF_TOPOLOGY, read_domain
from qmpvcpu.xml.metadata import dimm_lines, option_lines, sized
from qmpvcpu.xml.vcpus import write_vcpus


def minimal_domain(definition: Definition, devices: Devices | None = None) -> bytes:
    """A new document for a guest that has none. It contains only what QEMU reports.

    Args:
        definition: the guest's definition.
        devices: its devices, if they are known.
    """
    kind = {"kvm": "kvm", "tcg": "qemu"}.get(definition.accel or "", "qemu")
    space = f" xmlns:qemu='{QEMU_NAMESPACE}'" if devices is not None and devices.arguments else ""
    lines = [f"<domain type='{kind}'{space}>", f"  <name>{escape(definition.name)}</name>"]
    if definition.uuid is not None:
        lines.append(f"  <uuid>{escape(definition.uuid)}</uuid>")
    lines += option_lines(definition, devices)
    if definition.max_memory is not None:
        slots = f" slots='{definition.memory_slots}'" if definition.memory_slots else ""
        size, unit = sized(definition.max_memory)
        lines.append(f"  <maxMemory{slots} unit='{unit}'>{size}</maxMemory>")
    if definition.memory is not None:
        size, unit = sized(definition.memory)
        lines.append(f"  <memory unit='{unit}'>{size}</memory>")
    lines.append(f"  <vcpu>{definition.maxcpus}</vcpu>")
    machine = f" machine={quoteattr(definition.machine)}" if definition.machine else ""
    lines.append(f"  <os><type arch={quoteattr(definition.arch or '')}{machine}>hvm</type></os>")
    lines += _cpu_lines(definition)
    rows = dimm_lines(definition.dimms)
    if definition.emulator is not None:
        rows.append(f"    <emulator>{escape(definition.emulator)}</emulator>")
    if definition.agent is not None:
        rows += [
            "    <channel type='unix'>",
            f"      <source mode='bind' path={quoteattr(definition.agent)}/>",
            "      <target type='virtio' name='org.qemu.guest_agent.0'/>",
            "    </channel>",
        ]
    if rows:
        lines += ["  <devices>", *rows, "  </devices>"]
    if devices is not None and devices.arguments:
        words = [f"    <qemu:arg value={quoteattr(word)}/>" for word in devices.arguments]
        lines += ["  <qemu:commandline>", *words, "  </qemu:commandline>"]
    document, old = read_domain("\n".join([*lines, "</domain>", ""]).encode())
    return write_vcpus(document, old, definition)


def _cpu_lines(definition: Definition) -> list[str]:
    lines = []
    model, features = split_cpu(definition.cpu) if definition.cpu is not None else ("", ())
    mode = {"host": "host-passthrough", "max": "maximum"}.get(model, "custom")
    if model and mode == "custom":
        lines.append(f"    <model fallback='forbid'>{escape(model)}</model>")
    topology = definition.topology
    if topology is not None:
        counts = {level: getattr(topology, level) for level in LEVELS_OF_TOPOLOGY}
        words = "".join(
            f" {level}='{count}'"
            for level, count in counts.items()
            if count > 1 or level in ("sockets", "cores", "threads")
        )
        lines.append(f"    <topology{words}/>")
    lines += [
        f"    <feature policy='{'require' if value == 'on' else 'disable'}'"
        f" name={quoteattr(name)}/>"
        for name, value in features
    ]
    if definition.cells and all(cell.memory is not None for cell in definition.cells):
        lines += [
            "    <numa>",
            *(line for cell in definition.cells for line in _cell_lines(cell)),
            "    </numa>",
        ]
    match = " match='exact'" if mode == "custom" else ""
    head = f"  <cpu mode='{mode}'{match}>" if model else "  <cpu>"
    return [head, *lines, "  </cpu>"] if lines or model else []


def _cell_lines(cell: NumaCell) -> list[str]:
    cpus = f" cpus='{format_ids(cell.cpus)}'" if cell.cpus else ""
    size, unit = sized(cell.memory or 0)
    head = f"      <cell id='{cell.id}'{cpus} memory='{size}' unit='{unit}'"
    if not cell.distances:
        return [f"{head}/>"]
    rows = [f"          <sibling id='{other}' value='{value}'/>" for other, value in cell.distances]
    return [f"{head}>", "        <distances>", *rows, "        </distances>", "      </cell>"]
