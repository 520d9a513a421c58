"""The basic values: vCPU, entity, the state of a domain, an outcome. All frozen.

The terms are those of the design: an *entity* is what one `device_add` creates; *enabled* means
plugged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Final, TypeVar

from qmpvcpu.errors import OutcomeKind

K = TypeVar("K")
T = TypeVar("T")
#: The levels of a topology, outermost first.
LEVELS: Final = ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")


def format_ids(ids: Iterable[int]) -> str:
    """Ids as virsh writes a CPU list: `0-2,5`."""
    runs: list[list[int]] = []
    for number in sorted(set(ids)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def grouped(pairs: Iterable[tuple[K, T]]) -> dict[K, list[T]]:
    """The values of each key, both in the order in which they come."""
    found: dict[K, list[T]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


class Props(Mapping[str, Any]):
    """`CpuInstanceProperties` exactly as QEMU gave them, with every key; immutable and hashable."""

    __slots__ = ("_items",)
    _items: dict[str, Any]

    def __init__(self, items: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        object.__setattr__(self, "_items", dict(items))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("Props are immutable")

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return self._items == (other._items if isinstance(other, Props) else other)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __reduce__(self) -> tuple[type[Props], tuple[dict[str, Any]]]:
        return Props, (dict(self._items),)

    def __repr__(self) -> str:
        return f"Props({self._items!r})"


@dataclass(frozen=True, slots=True, order=True)
class QemuVersion:
    """QEMU's version from the QMP greeting."""

    major: int
    minor: int
    micro: int = 0

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.micro}"


@dataclass(frozen=True, slots=True)
class Topology:
    """`qom-get /machine smp` (QAPI `SMPConfiguration`): counts per parent level; absent levels are
    1.
    """

    maxcpus: int
    drawers: int = 1
    books: int = 1
    sockets: int = 1
    dies: int = 1
    clusters: int = 1
    modules: int = 1
    cores: int = 1
    threads: int = 1
    #: One more than the highest x86 APIC id; computed once, because every plug under TCG reads it.
    x86_apic_limit: int = field(init=False, default=0, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "x86_apic_limit", self.sockets << sum(self.x86_apic_widths))

    @property
    def product(self) -> int:
        """How many vCPUs there is room for."""
        packages = self.drawers * self.books * self.sockets
        return packages * self.dies * self.clusters * self.modules * self.cores * self.threads

    @property
    def x86_apic_widths(self) -> tuple[int, int, int, int]:
        """The bits of thread, core, module and die in an x86 APIC id (QEMU's
        hw/i386/topology.h).
        """

        def bits(count: int) -> int:
            return max(count - 1, 0).bit_length()

        return bits(self.threads), bits(self.cores), bits(self.modules), bits(self.dies)

    def x86_apic_id(self, place: Mapping[str, int]) -> int:
        """The APIC id of a slot with these props (QEMU: hw/i386/topology.h)."""
        threads, cores, modules, dies = self.x86_apic_widths
        found = place.get("socket-id", 0)
        for level, bits in (
            ("die-id", dies),
            ("module-id", modules),
            ("core-id", cores),
            ("thread-id", threads),
        ):
            found = (found << bits) | place.get(level, 0)
        return found

    def to_json(self) -> dict[str, int]:
        """Each count by its name."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}


@dataclass(frozen=True, slots=True)
class Vcpu:
    """One virtual CPU.

    `order` is the rank of its entity in `query-cpus-fast`, None while disabled. `thread_id` is a
    Linux thread id, None if disabled or if all vCPUs share one thread. `online` is the guest's view
    (None: not known). `pending` is true while an unplug is requested and has not ended. `pin` is a
    cpuset string. `logical_id` is the guest's own id of it, `can_offline` whether the guest reports
    that it can take it offline.
    """

    id: int
    enabled: bool
    hotpluggable: bool
    entity: tuple[int, ...]
    props: Props | None = None
    order: int | None = None
    node: int | None = None
    qom_path: str | None = None
    thread_id: int | None = None
    online: bool | None = None
    pending: bool = False
    pin: str | None = None
    scheduler: str | None = None
    logical_id: int | None = None
    can_offline: bool | None = None
    #: The host CPU on which its thread last ran.
    cpu: int | None = None

    @property
    def state(self) -> str:
        """`"enabled"` or `"disabled"`, the words of the domain XML."""
        return "enabled" if self.enabled else "disabled"

    def to_json(self) -> dict[str, Any]:
        """One row of `vcpuinfo --json`."""
        return {
            "id": self.id,
            "state": self.state,
            "hotpluggable": self.hotpluggable,
            "order": self.order,
            "node": self.node,
            "props": None if self.props is None else dict(self.props),
            "entity": list(self.entity),
            "qom_path": self.qom_path,
            "thread_id": self.thread_id,
            "online": self.online,
            "pending": self.pending,
            "pin": self.pin,
            "scheduler": self.scheduler,
            "logical_id": self.logical_id,
            "can_offline": self.can_offline,
            "cpu": self.cpu,
        }


#: The `driver` of entities that libvirt plugs and unplugs.
LIBVIRT_DRIVER: Final = "virDomainSetVcpu"


@dataclass(frozen=True, slots=True)
class Entity:
    """What one `device_add` creates: a thread, a core of several vCPUs, or an s390x cpu.

    `driver` and `props` are the arguments of `device_add`, kept verbatim. `qom_path` is None while
    the slot is empty. `driver` is None if the machine has no CPU hotplug. `suffix` makes its device
    id differ from one that is taken (0: no suffix).
    """

    ids: tuple[int, ...]
    driver: str | None
    props: Props | None
    qom_path: str | None
    node: int | None
    hotpluggable: bool
    suffix: int = 0

    @property
    def id(self) -> int:
        """The entity id, unique in one domain: its first vCPU id."""
        return self.ids[0]

    @property
    def plugged(self) -> bool:
        """Whether QEMU has it."""
        return self.qom_path is not None

    @property
    def device_id(self) -> str:
        """The id for `device_add`: `vcpuN`, N the first vCPU (libvirt's rule too), or `vcpuN-K` if
        that is taken.
        """
        return f"vcpu{self.ids[0]}-{self.suffix}" if self.suffix else f"vcpu{self.ids[0]}"

    @property
    def unplug_name(self) -> str:
        """The id for `device_del`: the device id, or the QOM path of a CPU that was there at the
        start.
        """
        return (self.qom_path or "").removeprefix("/machine/peripheral/")

    @property
    def label(self) -> str:
        """Its name in messages: `vCPU 3`, `vCPUs 8-15`."""
        return f"vCPU{'s' if len(self.ids) > 1 else ''} {format_ids(self.ids)}"


@dataclass(frozen=True, slots=True)
class DomainState:
    """All that is known about one domain's vCPUs at one moment; `core.state.inventory` makes it
    from QMP replies.

    `arch` is QEMU's target name as `query-target` gives it. `accel` is "kvm" or "tcg" (QEMU reports
    only whether KVM is on). `machine` is the versioned machine name. `threads_shared` is None while
    there is only one vCPU. `version` is None in the state of a definition
    (`core.definition.state_of`), and so is all that only a QEMU can report.
    """

    name: str
    arch: str
    machine: str
    accel: str | None
    active: bool
    version: QemuVersion | None
    topology: Topology | None
    can_plug: bool
    can_unplug: bool
    threads_shared: bool | None
    entities: tuple[Entity, ...]
    vcpus: tuple[Vcpu, ...]
    run_state: str | None = None
    by_id: Mapping[int, Entity] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_id", {number: e for e in self.entities for number in e.ids})

    @property
    def qemu(self) -> QemuVersion:
        """The version of the QEMU of this state."""
        assert self.version is not None, "a definition has no QEMU"
        return self.version

    @property
    def maxcpus(self) -> int:
        """How many vCPU ids there are; ids run from 0 to maxcpus-1."""
        return len(self.vcpus)

    @property
    def enabled_ids(self) -> tuple[int, ...]:
        """Ids of the plugged vCPUs, ascending."""
        return tuple(vcpu.id for vcpu in self.vcpus if vcpu.enabled)

    def entities_of(self, ids: Iterable[int]) -> list[Entity]:
        """The entities that have these ids, each once, ascending; unknown ids are ignored."""
        ids = sorted({self.by_id[number].id for number in ids if number in self.by_id})
        return [self.by_id[entity_id] for entity_id in ids]

    def x86_apic_id(self, entity: Entity) -> int | None:
        """The APIC id of a slot, None if the topology is not known."""
        if self.topology is None or entity.props is None:
            return None
        return self.topology.x86_apic_id(entity.props)

    @property
    def nodes(self) -> tuple[int, ...]:
        """NUMA nodes that have a vCPU, ascending; empty on a machine without NUMA."""
        return tuple(sorted({vcpu.node for vcpu in self.vcpus if vcpu.node is not None}))

    def to_json(self) -> dict[str, Any]:
        """The document of `vcpuinfo --json`."""
        return {
            "domain": self.name,
            "arch": self.arch,
            "machine": self.machine,
            "accel": self.accel,
            "active": self.active,
            "vcpus": [vcpu.to_json() for vcpu in self.vcpus],
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verified result of a call; `Domain.vcpu()`, `enable()` and `disable()` return it.

    `ids` is every requested vCPU id, `changed_ids` those that have changed, `pending` those whose
    unplug was requested and has not ended, `pending_online` those that are plugged, but on which
    the guest is not known to run. `rows` are the requested vCPUs as they are now, `seconds` is the
    call's duration.
    """

    outcome: OutcomeKind
    ids: tuple[int, ...]
    rows: tuple[Vcpu, ...] = ()
    changed_ids: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()
    undone: tuple[int, ...] = ()
    mechanism: str | None = None
    messages: tuple[str, ...] = ()
    seconds: float = 0.0
    #: If both sides were requested: the ids that changed in the running guest, and those that
    #: changed in the definition.
    live_changed_ids: tuple[int, ...] = ()
    config_changed_ids: tuple[int, ...] = ()
    #: Whether the definition was written.
    defined: bool = False
    pending_online: tuple[int, ...] = ()
    #: Lines for the user about what already was as requested, in the words of the request.
    already: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything has changed."""
        return bool(self.changed_ids) or self.defined

    @property
    def vcpu(self) -> Vcpu:
        """The only requested vCPU.

        Raises:
            ValueError: the call was about several.
        """
        if len(self.rows) != 1:
            raise ValueError(f"this outcome is about {len(self.rows)} vCPUs, use .rows")
        return self.rows[0]

    def to_json(self) -> dict[str, Any]:
        """The document of `setvcpu --json`."""
        return {
            "outcome": str(self.outcome),
            "changed": self.changed,
            "mechanism": self.mechanism,
            "vcpus": list(self.ids),
            "changed_ids": list(self.changed_ids),
            "pending": list(self.pending),
            "pending_online": list(self.pending_online),
            "undone": list(self.undone),
            "messages": list(self.messages),
            "seconds": round(self.seconds, 6),
            "live_changed_ids": list(self.live_changed_ids),
            "config_changed_ids": list(self.config_changed_ids),
            "defined": self.defined,
        }


class EventKind(StrEnum):
    """What an `Event` reports. The first three are libvirt's words (`virDomainEventID`)."""

    ADDED = "vcpu-added"
    REMOVED = "vcpu-removed"
    REMOVAL_FAILED = "vcpu-removal-failed"
    ONLINE = "vcpu-online"
    OFFLINE = "vcpu-offline"
    UNPLUG_REQUESTED = "unplug-requested"
    EJECTING = "guest-ejecting"

    @property
    def is_step(self) -> bool:
        """Whether it only reports progress of an unplug."""
        return self in (EventKind.UNPLUG_REQUESTED, EventKind.EJECTING)


@dataclass(frozen=True, slots=True)
class Event:
    """A change of a vCPU, made by any program. `time` is in seconds since the epoch, `detail` a
    reason as text.
    """

    time: float
    event: EventKind
    vcpus: tuple[int, ...]
    detail: str | None = None

    def to_json(self) -> dict[str, Any]:
        """One line of `watch --json`."""
        return {
            "time": self.time,
            "event": str(self.event),
            "vcpus": list(self.vcpus),
            "detail": self.detail,
        }
