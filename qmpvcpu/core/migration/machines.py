"""What goes with a guest that migrates, whether the other side can take it, and which side runs it in the end.

Pure. The cookie is libvirt's `<qemu-migration>` (src/qemu/qemu_migration_cookie.c), the feature `cpu-hotplug` and
its condition are libvirt's too (qemuDomainVcpuHotplugIsInOrder in qemu_migration.c).

Who runs the guest is decided here and nowhere else: the destination never starts by itself (`stop` while it
waits), so it runs only when we say `cont`, and we say that only when the source has handed everything over, or is
dead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.definition import Definition
from qmpvcpu.core.machine.comparison import Picture
from qmpvcpu.core.model import DomainState, Entity, Props
from qmpvcpu.core.quirks import Fact, Trigger, facts_after_unplug, quirk, set_off
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.catalogue import Reason
from qmpvcpu.core.rules.hotplug import refusal_of
from qmpvcpu.core.state.guest_view import GuestView
from qmpvcpu.errors import Refusal

__all__ = [
    "CPU_HOTPLUG",
    "ONE_CPU",
    "Cookie",
    "Destination",
    "Machine",
    "MigrationStatus",
    "Slot",
    "Source",
    "Step",
    "address_of",
    "check_arrived",
    "check_features",
    "check_hangs",
    "check_machine",
    "check_one_cpu",
    "check_source",
    "cpus_but_first",
    "features_of",
    "is_in_order",
    "last_words",
    "machine_of",
    "missing",
    "needs_one_cpu",
    "next_step",
    "parse_status",
]

#: libvirt's name of what a reader must know to take a sparse guest.
CPU_HOTPLUG: Final = "cpu-hotplug"
_KNOWN: Final = frozenset({CPU_HOTPLUG})
#: QAPI MigrationStatus: what goes on, and how it ends.
_ENDED: Final = frozenset({"completed", "failed", "cancelled"})
_IDLE: Final = frozenset({*_ENDED, "none", ""})
#: QAPI RunState: a source can be migrated from these.
_MIGRATABLE: Final = frozenset({"running", "paused", "prelaunch", "suspended", "watchdog", "debug"})


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
    """What of a QEMU both sides must agree on. `topology` is told as `sockets=2,cores=4,…`."""

    arch: str
    type: str
    maxcpus: int
    topology: str
    slots: tuple[Slot, ...]

    @property
    def plugged(self) -> frozenset[int]:
        """First vCPU ids of what is plugged."""
        return frozenset(slot.ids[0] for slot in self.slots if slot.plugged)

    @property
    def by_first(self) -> dict[int, Slot]:
        """Slots by first vCPU id."""
        return {slot.ids[0]: slot for slot in self.slots}


@dataclass(frozen=True, slots=True)
class Cookie:
    """What goes with the guest.

    `xml` is the running guest's domain XML, `persistent` its definition where that goes too. `features` are names
    that a reader must know. `machine` is None where another tool made it. `runs` is whether the guest ran, and
    `is_described` whether `xml` was made of what QEMU tells, and so does not say all of its hardware. `number` is
    of this one handing over, 32 hexadecimal digits: by it the sides know which of them has the guest. `pending`
    are the first vCPU ids of entities whose unplug was pending. `picture` is what the source's QEMU told of its
    machine; None where it was not asked.
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
    """What both sides must agree on, of a running guest."""
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
    """What a reader of this guest's cookie must know; `persistent` is its definition where that goes too."""
    live = [(vcpu.enabled, vcpu.order) for vcpu in state.vcpus]
    inactive = [(vcpu.enabled, vcpu.order) for vcpu in persistent.vcpus] if persistent is not None else []
    return frozenset() if is_in_order(live) and is_in_order(inactive) else frozenset({CPU_HOTPLUG})


def check_features(cookie: Cookie) -> list[Refusal]:
    """Features that we do not know, by name."""
    unknown = sorted(cookie.features - _KNOWN)
    return [catalogue.COOKIE_FEATURES(features=", ".join(unknown))] if unknown else []


def check_source(
    state: DomainState,
    run_state: str | None,
    status: MigrationStatus,
    pending: Iterable[int],
    *,
    is_paused: bool = False,
) -> list[Refusal]:
    """Why a guest cannot be migrated now; `is_paused`: it is paused on the way, and nothing ends there."""
    found = []
    waiting = sorted(number for first in pending for number in state.by_id[first].ids)
    if is_paused and architecture(state.arch).saves_unplug:
        waiting = []
    if waiting:
        found.append(catalogue.PENDING(waiting))
    if status.is_active:
        found.append(catalogue.UNDER_WAY(status=status.status))
    elif run_state not in _MIGRATABLE:
        found.append(_of_run_state(run_state))
    return found + [catalogue.BLOCKED(why=why) for why in status.blocked]


def _of_run_state(run_state: str | None) -> Refusal:
    reason = {
        "shutdown": catalogue.SHUT_DOWN,
        "guest-panicked": catalogue.PANICKED,
        "internal-error": catalogue.INTERNAL_ERROR,
        "io-error": catalogue.IO_ERROR,
        "inmigrate": catalogue.WAITS_FOR_A_GUEST,
        "postmigrate": catalogue.WAS_HANDED_OVER,
    }.get(run_state or "", catalogue.RUN_STATE)
    return reason(state=run_state or "in no state that QEMU tells")


#: A defect that the agents of both sides can do something about (`needs_one_cpu`).
_ONE_CPU: Final = quirk("ppc64-tcg-one-cpu")
#: The code of its refusal.
ONE_CPU: Final = _ONE_CPU.code


def check_hangs(state: DomainState, removals_seen: int) -> list[Refusal]:
    """Migrations that are known to hang, or to lose the guest; forceable. Those whose code is `ONE_CPU` do not,
    while the guest has only its first CPU online.
    """
    if state.version is None:
        return []
    facts = facts_after_unplug(removals_seen)
    if len(state.enabled_ids) > 1:
        facts.add(Fact.SEVERAL_VCPUS)
    return [refusal_of(row, state) for row in set_off(state, Trigger.MIGRATE, facts)]


def needs_one_cpu(state: DomainState) -> bool:
    """Whether a Linux gets over a migration only with just its first CPU online.

    QEMU does not migrate that RTAS started the others; a CPU that comes online is started afresh.
    """
    return any(refusal.code == ONE_CPU for refusal in check_hangs(state, 0))


def check_one_cpu(view: GuestView) -> str | None:
    """Why a guest cannot be left with just its first CPU; None where it can, as far as it tells."""
    if not any(cpu.online for cpu in view.cpus if cpu.logical_id == _FIRST_CPU):
        return f"its CPU {_FIRST_CPU} is offline"
    if view.vcpu_of(_FIRST_CPU) not in (None, 0):
        # After a kexec.
        return f"its CPU {_FIRST_CPU} is vCPU {view.vcpu_of(_FIRST_CPU)}, and not the one that QEMU boots"
    return None


def cpus_but_first(view: GuestView) -> tuple[int, ...]:
    """The guest's numbers of the CPUs that are online, but of its first; it keeps them over a migration."""
    return tuple(cpu.logical_id for cpu in view.cpus if cpu.online and cpu.logical_id != _FIRST_CPU)


#: Linux starts on it, and so does QEMU.
_FIRST_CPU: Final = 0


def check_machine(source: Machine, here: Machine) -> list[Refusal]:
    """Everything in which the destination is another machine, together."""
    rows: tuple[tuple[Reason, object, object], ...] = (
        (catalogue.OTHER_ARCH, source.arch, here.arch),
        (catalogue.OTHER_MACHINE_TYPE, source.type, here.type),
        (catalogue.OTHER_MAXCPUS, source.maxcpus, here.maxcpus),
        (catalogue.OTHER_TOPOLOGY, source.topology or "flat", here.topology or "flat"),
    )
    found = [reason(there=there, now=now) for reason, there, now in rows if there != now]
    lacking: list[int] = []
    elsewhere: list[int] = []
    others: dict[tuple[Reason, object, object], list[int]] = {}
    for slot in source.slots:
        other = here.by_first.get(slot.ids[0])
        if other is None:
            lacking += slot.ids
            continue
        rows = (
            (catalogue.OTHER_ENTITY, len(slot.ids), len(other.ids)),
            (catalogue.OTHER_DRIVER, slot.driver, other.driver),
            (catalogue.OTHER_NODE, _node(slot), _node(other)),
        )
        for reason, there, now in rows:
            if there != now:
                others.setdefault((reason, there, now), []).extend(slot.ids)
        elsewhere += slot.ids if other.place != slot.place else ()
    found += [reason(ids, there=there, now=now) for (reason, there, now), ids in others.items()]
    found += [catalogue.NO_SUCH_SLOT(lacking)] if lacking else []
    found += [catalogue.OTHER_PLACE(elsewhere)] if elsewhere else []
    return found + _check_extra(source, here)


def _node(slot: Slot) -> str:
    return "none" if slot.node is None else str(slot.node)


def _check_extra(source: Machine, here: Machine) -> list[Refusal]:
    extra = sorted(
        n for slot in here.slots if slot.plugged and slot.ids[0] not in source.plugged for n in slot.ids
    )
    # 7.2 to 11.1: QEMU takes it without a word, and the guest never sees it.
    return [catalogue.EXTRA(extra)] if extra else []


def missing(source: Machine, here: Machine) -> list[Slot]:
    """What is plugged at the source and not yet here, in the order in which it was plugged there."""
    slots = [slot for slot in source.slots if slot.plugged and slot.ids[0] not in here.plugged]
    return sorted(slots, key=lambda slot: (slot.order or 0, slot.ids))


def check_arrived(source: Machine, here: Machine) -> list[Refusal]:
    """Why what has arrived is not the guest that left; also what must hold before the first byte."""
    lost = sorted(n for slot in missing(source, here) for n in slot.ids)
    return check_machine(source, here) + ([catalogue.MISSING(lost)] if lost else [])


# -- what QEMU tells ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MigrationStatus:
    """`query-migrate`. Bytes, and milliseconds for `downtime` and `total_time`; None what is not told."""

    status: str = "none"
    transferred: int | None = None
    remaining: int | None = None
    total: int | None = None
    downtime: int | None = None
    total_time: int | None = None
    error: str | None = None
    blocked: tuple[str, ...] = ()
    addresses: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    @property
    def under_way(self) -> str | None:
        """The status of a migration that has begun and not ended."""
        return self.status if self.is_active else None

    @property
    def is_active(self) -> bool:
        """Whether it goes on."""
        return self.status not in _IDLE

    @property
    def is_incoming(self) -> bool:
        """Whether this side has taken in a guest, all of it: only a source counts bytes."""
        return self.status == "completed" and self.total is None

    @property
    def has_ended(self) -> bool:
        """Whether one has ended, in whatever way."""
        return self.status in _ENDED

    @property
    def percent(self) -> int | None:
        """How much of the memory has been there once, 0 to 100."""
        if not self.total or self.remaining is None:
            return None
        return max(0, min(100, 100 - 100 * self.remaining // self.total))


def parse_status(reply: object) -> MigrationStatus:
    """A reply to `query-migrate`; what is not of its form is not told."""
    if not isinstance(reply, dict):
        return MigrationStatus()
    memory = reply.get("ram")
    ram: Mapping[str, Any] = memory if isinstance(memory, dict) else {}
    addresses, blocked = reply.get("socket-address"), reply.get("blocked-reasons")
    return MigrationStatus(
        str(reply.get("status") or "none")[:40],
        _count(ram.get("transferred")),
        _count(ram.get("remaining")),
        _count(ram.get("total")),
        _count(reply.get("downtime", reply.get("expected-downtime"))),
        _count(reply.get("total-time")),
        str(reply["error-desc"])[:1000] if "error-desc" in reply else None,
        tuple(str(why)[:1000] for why in blocked[:20]) if isinstance(blocked, list) else (),
        tuple(one for one in addresses[:20] if isinstance(one, dict)) if isinstance(addresses, list) else (),
    )


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def last_words(log: str, most: int = 400) -> str:
    """The end of what a QEMU said on stderr or in its log, on one line and printable; "" where it said nothing."""
    lines = [_TIME.sub("", line.strip()) for line in log.splitlines()]
    said = [line for line in lines if line and _DAEMON not in line]
    text = "; ".join(said[-_LAST_LINES:])
    return "".join(char if char.isprintable() else " " for char in text)[-most:]


#: How QEMU's log (-msg timestamp=on) and its traces begin a line, and its note of a signal.
_TIME: Final = re.compile(r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z ")
_DAEMON: Final = "terminating on signal"
_LAST_LINES: Final = 4


def address_of(status: MigrationStatus, host: str | None) -> str | None:
    """Where a destination listens, as a URI for the source; None where it does not.

    Args:
        host: how the source reaches the destination, for one that listens everywhere.
    """
    for one in status.addresses:
        if one.get("type") == "unix" and isinstance(one.get("path"), str):
            return f"unix:{one['path']}"
        if one.get("type") == "inet":
            name, port = str(one.get("host", "")), str(one.get("port", ""))
            if name in ("0.0.0.0", "::", ""):  # noqa: S104 - that is what we look for
                name = host or "127.0.0.1"
            return f"tcp:[{name}]:{port}" if ":" in name else f"tcp:{name}:{port}"
    return None


# -- who runs it ----------------------------------------------------------------------------------


class Source(StrEnum):
    """How the handing over ended at the source."""

    COMPLETED = "completed"
    #: It keeps the guest: failed, cancelled.
    KEPT = "kept"
    #: Its QEMU has ended.
    DEAD = "dead"
    #: It does not answer, and may run.
    UNKNOWN = "unknown"


class Destination(StrEnum):
    """What is at the destination, which has not been told to run."""

    #: All of the guest, paused, with the source's vCPUs.
    WHOLE = "whole"
    #: Not all of it.
    BROKEN = "broken"
    #: All of a guest, and not what left; or it cannot be let run.
    OTHER = "other"
    #: Its QEMU has ended, or cannot be reached; it does not run by itself.
    GONE = "gone"
    #: It was told to run, and does.
    RUNNING = "running"
    #: It was told to run, and did not answer; its QEMU has ended.
    DIED = "died"
    #: It was told to run, and did not answer; it may run.
    UNKNOWN = "unknown"


class Step(StrEnum):
    """What to do next."""

    START_DESTINATION = "start-destination"
    #: End the destination, then let the source go on.
    GO_BACK = "go-back"
    #: End the source: the guest runs at the destination.
    END_SOURCE = "end-source"
    #: Touch neither: nobody can tell whether the other side runs.
    LEAVE = "leave"
    #: End the destination; there is no source that could go on.
    GIVE_UP = "give-up"


#: Every pair; what is not here cannot be.
_STEPS: Final[Mapping[tuple[Source, Destination], Step]] = {
    (Source.COMPLETED, Destination.WHOLE): Step.START_DESTINATION,
    (Source.COMPLETED, Destination.BROKEN): Step.GO_BACK,
    (Source.COMPLETED, Destination.OTHER): Step.GO_BACK,
    (Source.COMPLETED, Destination.GONE): Step.GO_BACK,
    (Source.COMPLETED, Destination.RUNNING): Step.END_SOURCE,
    # libvirt resumes the source as well when the destination's start was not confirmed and it is gone.
    (Source.COMPLETED, Destination.DIED): Step.GO_BACK,
    (Source.COMPLETED, Destination.UNKNOWN): Step.LEAVE,
    (Source.KEPT, Destination.WHOLE): Step.GO_BACK,
    (Source.KEPT, Destination.BROKEN): Step.GO_BACK,
    (Source.KEPT, Destination.OTHER): Step.GO_BACK,
    (Source.KEPT, Destination.GONE): Step.GO_BACK,
    (Source.DEAD, Destination.WHOLE): Step.START_DESTINATION,
    (Source.DEAD, Destination.BROKEN): Step.GIVE_UP,
    # It is the only copy.
    (Source.DEAD, Destination.OTHER): Step.LEAVE,
    (Source.DEAD, Destination.GONE): Step.GIVE_UP,
    (Source.DEAD, Destination.RUNNING): Step.END_SOURCE,
    (Source.DEAD, Destination.DIED): Step.GIVE_UP,
    (Source.DEAD, Destination.UNKNOWN): Step.LEAVE,
    (Source.UNKNOWN, Destination.WHOLE): Step.LEAVE,
    (Source.UNKNOWN, Destination.BROKEN): Step.GIVE_UP,
    (Source.UNKNOWN, Destination.OTHER): Step.LEAVE,
    (Source.UNKNOWN, Destination.DIED): Step.GIVE_UP,
    (Source.UNKNOWN, Destination.UNKNOWN): Step.LEAVE,
    (Source.UNKNOWN, Destination.GONE): Step.GIVE_UP,
}


def next_step(source: Source, destination: Destination) -> Step:
    """Which side is to run the guest, or what must happen first."""
    return _STEPS[source, destination]
