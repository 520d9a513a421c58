"""The state of a running guest from its live XML alone, without asking its QEMU. Pure.

libvirt numbers vCPUs as we do: slot by slot, in the order of socket, core and thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from qmpvcpu.core.arch import EntityKind, architecture
from qmpvcpu.core.definition import Definition, state_of
from qmpvcpu.core.model import LIBVIRT_DRIVER, DomainState, Props, QemuVersion, Topology
from qmpvcpu.core.state.events import PERIPHERAL

#: libvirt does not report the path of a CPU that was there at the start.
_UNNAMED: Final = "/machine/unattached/"


def running_state(
    definition: Definition,
    name: str,
    version: QemuVersion,
    run_state: str | None,
    removed: Iterable[int] = (),
    pending: Iterable[int] = (),
) -> DomainState:
    """The state of a running guest.

    Args:
        definition: of its live XML.
        name: of the domain.
        version: of its QEMU, or the oldest that it may have.
        run_state: QAPI RunState.
        gone: vCPU ids that the XML lists as enabled, but whose threads have ended.
        pending: ids of the entities whose unplug was requested and has not ended.
    """
    base = state_of(definition, name, active=True)
    removed_ids, pending_ids = frozenset(removed), frozenset(pending)
    entities, vcpus = [], []
    for entity in base.entities:
        config = definition.vcpus[entity.id]
        plugged = config.enabled and entity.id not in removed_ids
        # libvirt takes such a vCPU for plugged, and so cannot plug it.
        can_come, can_go = (
            base.can_plug and entity.id not in removed_ids,
            base.can_unplug and config.hotpluggable,
        )
        pluggable = can_go if plugged else can_come
        path = (
            (PERIPHERAL if config.hotpluggable else _UNNAMED) + entity.device_id
            if plugged
            else None
        )
        props = _props(base, entity.id, entity.node)
        entities.append(
            replace(
                entity,
                driver=LIBVIRT_DRIVER if base.can_plug else None,
                props=props,
                qom_path=path,
                hotpluggable=pluggable,
            )
        )
        vcpus += [
            replace(
                base.vcpus[number],
                enabled=plugged,
                hotpluggable=pluggable,
                props=props,
                order=base.vcpus[number].order if plugged else None,
                qom_path=path if plugged and config.hotpluggable else None,
                pending=entity.id in pending_ids,
            )
            for number in entity.ids
        ]
    return replace(
        base, version=version, run_state=run_state, entities=tuple(entities), vcpus=tuple(vcpus)
    )


def _props(state: DomainState, first: int, node: int | None) -> Props:
    """The props of a slot, as QEMU would report them."""
    topology = state.topology or Topology(state.maxcpus, sockets=state.maxcpus)
    place = {} if node is None else {"node-id": node}
    if architecture(state.arch).entity is not EntityKind.THREAD:
        return Props({"core-id": first} | place)
    levels = (
        ("thread-id", topology.threads, True),
        ("core-id", topology.cores, True),
        ("module-id", topology.modules, topology.modules > 1),
        ("die-id", topology.dies, topology.dies > 1),
    )
    found = {}
    for name, count, is_listed in levels:
        first, rest = divmod(first, count)
        if is_listed:
            found[name] = rest
    return Props({"socket-id": first} | dict(reversed(found.items())) | place)
