"""The cookie of a migration: what the destination must know, and why it cannot take the guest.
Pure.

The cookie is libvirt's `<qemu-migration>` (src/qemu/qemu_migration_cookie.c), the feature
`cpu-hotplug` and its condition are libvirt's too (qemuDomainVcpuHotplugIsInOrder in
qemu_migration.c).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from qmpvcpu.core.definition import Definition
from qmpvcpu.core.machine.comparison import Picture
from qmpvcpu.core.model import LEVELS, DomainState, Props
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.catalogue import Reason
from qmpvcpu.errors import Refusal, VcpuRefused

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
    counts = [(level, getattr(topology, level)) for level in LEVELS] if topology is not None else []
    return Machine(
        state.arch,
        state.machine,
        state.maxcpus,
        ",".join(f"{level}={count}" for level, count in counts if count > 1),
        tuple(
            Slot(
                entity.ids,
                entity.driver or "",
                entity.props or Props(),
                entity.plugged,
                state.vcpus[entity.id].order,
            )
            for entity in state.entities
        ),
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
    inactive = (
        [(vcpu.enabled, vcpu.order) for vcpu in persistent.vcpus] if persistent is not None else []
    )
    return frozenset() if is_in_order(live) and is_in_order(inactive) else frozenset({CPU_HOTPLUG})


def check_features(cookie: Cookie) -> list[Refusal]:
    """Refuse features that this side does not know."""
    unknown = sorted(cookie.features - _KNOWN)
    return [catalogue.COOKIE_FEATURES(features=", ".join(unknown))] if unknown else []


# -- source and destination ------------------------------------------------------------------------

_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"
#: A reason, the value at the source, and the value at the destination.
_Row = tuple[Reason, object, object]


def check_machine(source: Machine, destination: Machine) -> list[Refusal]:
    """Every difference between the machines of source and destination."""
    rows: tuple[_Row, ...] = (
        (catalogue.OTHER_ARCH, source.arch, destination.arch),
        (catalogue.OTHER_MACHINE_TYPE, source.type, destination.type),
        (catalogue.OTHER_MAXCPUS, source.maxcpus, destination.maxcpus),
        (catalogue.OTHER_TOPOLOGY, source.topology or "flat", destination.topology or "flat"),
    )
    extra = sorted(
        number
        for slot in destination.slots
        if slot.plugged and slot.ids[0] not in source.plugged
        for number in slot.ids
    )
    return [
        *(reason(there=there, now=now) for reason, there, now in rows if there != now),
        *_check_slots(source, destination),
        # 7.2 to 11.1: QEMU accepts it silently, and the guest never sees that CPU.
        *([catalogue.EXTRA(extra)] if extra else []),
    ]


def _check_slots(source: Machine, destination: Machine) -> list[Refusal]:
    """One refusal for all vCPUs that differ in the same way."""
    lacking: list[int] = []
    elsewhere: list[int] = []
    others: dict[_Row, list[int]] = {}
    for slot in source.slots:
        other = destination.by_id.get(slot.ids[0])
        if other is None:
            lacking += slot.ids
            continue
        rows: tuple[_Row, ...] = (
            (catalogue.OTHER_ENTITY, len(slot.ids), len(other.ids)),
            (catalogue.OTHER_DRIVER, slot.driver, other.driver),
            (catalogue.OTHER_NODE, _node(slot), _node(other)),
        )
        for row in rows:
            if row[1] != row[2]:
                others.setdefault(row, []).extend(slot.ids)
        elsewhere += slot.ids if other.place != slot.place else ()
    found = [reason(ids, there=there, now=now) for (reason, there, now), ids in others.items()]
    found += [catalogue.NO_SUCH_SLOT(lacking)] if lacking else []
    return found + ([catalogue.OTHER_PLACE(elsewhere)] if elsewhere else [])


def _node(slot: Slot) -> str:
    return "none" if slot.node is None else str(slot.node)


def check_uri(uri: str) -> None:
    """Raises VcpuRefused for an address of QEMU's that has no way back, or that runs a program."""
    if not uri.startswith(("unix:", "tcp:", "fd:")):
        raise catalogue.NO_WAY.error(uri=uri)


def missing(source: Machine, destination: Machine) -> list[Slot]:
    """The slots that are plugged at the source, but not yet at the destination, in the source's
    plug order.
    """
    return sorted(
        (slot for slot in source.slots if slot.plugged and slot.ids[0] not in destination.plugged),
        key=lambda slot: (slot.order or 0, slot.ids),
    )


def check_arrived(source: Machine, destination: Machine) -> list[Refusal]:
    """How the destination's machine differs from the source's, before the first byte or after the
    last.
    """
    lost = sorted(n for slot in missing(source, destination) for n in slot.ids)
    return check_machine(source, destination) + ([catalogue.MISSING(lost)] if lost else [])


def check_same(source: Machine | None, state: DomainState) -> None:
    """Raises VcpuRefused: the guest has changed since its cookie was made."""
    refusals = check_arrived(source, machine_of(state)) if source is not None else []
    if refusals:
        raise VcpuRefused(
            [
                replace(one, ids=(), hint="begin again: the guest has changed since migrate-begin")
                for one in refusals
            ]
        )


def check_destination(
    cookie: Cookie,
    definition: Definition | None,
    state: DomainState,
    run_state: str | None,
    uuid: object,
) -> list[Refusal]:
    """Every reason why a destination cannot be prepared.

    Args:
        cookie: of the guest.
        definition: from the cookie's XML, which is all there is if another tool made the cookie.
        state: of the destination.
        run_state: of the destination, QAPI's RunState.
        uuid: of the destination, the reply of `query-uuid`.
    """
    found = check_features(cookie)
    if run_state == "running":
        found.append(catalogue.RUNS_ALREADY(name=state.name))
    elif run_state != "inmigrate":
        found.append(catalogue.DOES_NOT_WAIT(name=state.name, state=run_state))
    there = uuid.get("UUID") if isinstance(uuid, dict) else None
    if cookie.uuid is not None and there not in (None, _NO_UUID, cookie.uuid):
        found.append(catalogue.OTHER_UUID(uuid=cookie.uuid, there=there))
    if cookie.machine is not None:
        found += check_machine(cookie.machine, machine_of(state))
    elif definition is not None:
        rows: tuple[_Row, ...] = (
            (catalogue.OTHER_MAXIMUM, definition.maxcpus, state.maxcpus),
            (catalogue.OTHER_VCPUS, definition.enabled_ids, state.enabled_ids),
        )
        found += [reason(there=there, now=now) for reason, there, now in rows if there != now]
    return found
