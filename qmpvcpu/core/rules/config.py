"""Why a definition cannot take a change; the rules are those of libvirt's qemu driver."""

from __future__ import annotations

from collections.abc import Sequence

from qmpvcpu.core.definition import MOST_VCPUS, Definition
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import Refusal


def check_total(definition: Definition, total: int) -> list[Refusal]:
    """Why it cannot have this number of vCPUs."""
    if 1 <= total <= definition.maxcpus:
        return []
    return [catalogue.OVER_DEFINED_MAXIMUM(total=total, most=definition.maxcpus)]


def check_maximum(definition: Definition, maximum: int) -> list[Refusal]:
    """Why it cannot have this number of vCPU ids (`qemuDomainSetVcpusMax`)."""
    found = []
    if not 1 <= maximum <= MOST_VCPUS:
        found.append(catalogue.MAXIMUM(maximum=maximum, most=MOST_VCPUS))
    topology = definition.topology
    if topology is not None and maximum != definition.maxcpus:
        found.append(catalogue.MAXIMUM_OF_TOPOLOGY(made=topology.maxcpus, maximum=maximum))
    return found + [
        catalogue.MAXIMUM_OF_CELL(lost, cell=cell.id)
        for cell in definition.nodes
        if (lost := [number for number in cell.cpus if number >= maximum])
    ]


def check_order(definition: Definition, changed: Sequence[int]) -> list[Refusal]:
    """QEMU starts with the vCPUs from 0 to some id: none of them can be disabled while a later one
    of them stays enabled.
    """
    if not changed or definition.dialect == "rfc":
        # That dialect does not say with which ones QEMU starts: it follows from which are enabled.
        return []
    behind = [
        vcpu.id
        for vcpu in definition.vcpus[min(changed) + 1 :]
        if vcpu.enabled and not vcpu.hotpluggable and vcpu.id not in changed
    ]
    return [catalogue.CONFIG_ORDER(changed, behind=behind)] if behind else []
