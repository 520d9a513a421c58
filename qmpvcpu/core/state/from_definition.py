"""A definition -> the `DomainState` that the domain would have after its next boot."""

from __future__ import annotations

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.definition import Definition
from qmpvcpu.core.model import DomainState, Entity, Vcpu, format_ids


def state_of(definition: Definition, name: str | None = None, *, active: bool = False) -> DomainState:
    """The state of the guest right after its next boot.

    An entity is hotpluggable if a request may change it, a vCPU if the XML says so.
    """
    size = definition.granularity
    row = architecture(definition.arch)
    entities, vcpus = [], []
    for first in range(0, definition.maxcpus, size):
        ids = tuple(range(first, min(first + size, definition.maxcpus)))
        entities.append(Entity(ids, None, None, None, definition.cell_of(first), hotpluggable=first != 0))
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
