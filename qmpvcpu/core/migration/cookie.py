"""The cookie of a migration: what the destination must know about the guest. Pure.

The cookie is libvirt's `<qemu-migration>` (src/qemu/qemu_migration_cookie.c), the feature
`cpu-hotplug` and its condition are libvirt's too (qemuDomainVcpuHotplugIsInOrder in
qemu_migration.c).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from qmpvcpu.core.definition import Definition
from qmpvcpu.core.machine.comparison import Picture
from qmpvcpu.core.model import DomainState, Entity, Props
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import Refusal

#: libvirt's name of the feature that a reader needs for a guest whose vCPU ids have gaps.
CPU_HOTPLUG: Final = "cpu-hotplug"
_KNOWN: Final = frozenset({CPU_HOTPLUG})


@dataclass(frozen=True, slots=True)
class Slot:
    """One entity of a machine: what `device_add` needs to fill it, and whether it is filled."""

    ids: tuple[int, ...]
    driver: str
    props: Props
    plugged: bool
    order: int | None = None

    @property
    def node(self) -> int | None:
        """Its NUMA node, if the machine has any."""
        node = self.props.get("node-id")
        return node if type(node) is int else None

    @property
    def place(self) -> dict[str, Any]:
        """Its props without the node."""
        return {key: value for key, value in self.props.items() if key != "node-id"}


@dataclass(frozen=True, slots=True)
class Machine:
    """What must be the same in the QEMUs of both sides. `topology` is `sockets=2,cores=4,…`."""

    arch: str
    type: str
    maxcpus: int
    topology: str
    slots: tuple[Slot, ...]

    @property
    def plugged(self) -> frozenset[int]:
        """The ids of the plugged entities."""
        return frozenset(slot.ids[0] for slot in self.slots if slot.plugged)

    @property
    def by_id(self) -> dict[int, Slot]:
        """Slots by entity id."""
        return {slot.ids[0]: slot for slot in self.slots}


@dataclass(frozen=True, slots=True)
class Cookie:
    """What the source tells the destination about the guest.

    `xml` is the running guest's domain XML, `persistent` its definition if that moves too.
    `features` are names that a reader must know. `machine` is None if another tool made the cookie.
    `runs` is whether the guest ran, and `is_described` whether `xml` was made from QEMU's replies,
    and so does not have all of its hardware. `number` identifies this migration, 32 hexadecimal
    digits: by it the sides know which of them has the guest. `pending` are the ids of the entities
    whose unplug was pending. `picture` is what the source's QEMU reported of its machine; None: it
    was not queried.
    """

    name: str
    uuid: str | None
    xml: bytes
    persistent: bytes | None = None
    features: frozenset[str] = frozenset()
    machine: Machine | None = None
    runs: bool = True
    is_described: bool = False
    number: str | None = None
    pending: tuple[int, ...] = ()
    picture: Picture | None = field(default=None, hash=False)


def machine_of(state: DomainState) -> Machine:
    """The `Machine` of a running guest."""
    topology = state.topology
    levels = ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")
    counts = [(level, getattr(topology, level)) for level in levels] if topology is not None else []
    return Machine(
        state.arch,
        state.machine,
        state.maxcpus,
        ",".join(f"{level}={count}" for level, count in counts if count > 1),
        tuple(_slot(state, entity) for entity in state.entities),
    )


def _slot(state: DomainState, entity: Entity) -> Slot:
    return Slot(
        entity.ids,
        entity.driver or "",
        entity.props or Props(),
        entity.plugged,
        state.vcpus[entity.ids[0]].order,
    )


def is_in_order(vcpus: Iterable[tuple[bool, int | None]]) -> bool:
    """libvirt's condition: the enabled vCPUs are 0 to n-1, and their order does not decrease.

    Args:
        vcpus: of each id, whether it is enabled and its order.
    """
    listed = list(vcpus)
    seen = before = 0
    for enabled, order in listed:
        if not enabled or (order or 0) < before:
            break
        before = max(before, order or 0)
        seen += 1
    return seen == sum(enabled for enabled, _ in listed)


def features_of(state: DomainState, persistent: Definition | None) -> frozenset[str]:
    """What a reader of this guest's cookie must know; `persistent` is its definition if that moves
    too.
    """
    live = [(vcpu.enabled, vcpu.order) for vcpu in state.vcpus]
    inactive = [(vcpu.enabled, vcpu.order) for vcpu in persistent.vcpus] if persistent is not None else []
    return frozenset() if is_in_order(live) and is_in_order(inactive) else frozenset({CPU_HOTPLUG})


def check_features(cookie: Cookie) -> list[Refusal]:
    """Refuse features that this side does not know."""
    unknown = sorted(cookie.features - _KNOWN)
    return [catalogue.COOKIE_FEATURES(features=", ".join(unknown))] if unknown else []
