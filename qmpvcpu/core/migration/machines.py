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
from qmpvcpu.core.model import DomainState, Entity, Props, format_ids
from qmpvcpu.core.quirks import Fact, Trigger, quirk
from qmpvcpu.core.rules import checks
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
    "check_cpu_operation",
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

#: Those it cannot: what that means, and what to do.
_RUN_STATES: Final = {
    "shutdown": (": it has shut down, and only a reset lets it run again", "end its QEMU, or reset it first"),
    "guest-panicked": (": its kernel has ended, and would be so again", "end its QEMU, or reset it first"),
    "internal-error": (": QEMU itself cannot go on with it", "look at the log of its QEMU, and reset it"),
    "io-error": (": a disk has failed, and it waits for that", "correct the disk, and let the guest go on first"),
    "inmigrate": (": it waits for a guest", "migrate-cancel ends it"),
    "postmigrate": (
        ": it has been handed over, or a save failed while it was paused, and QEMU takes it only once it has run",
        "migrate-cancel lets it go on here",
    ),
}


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
    if not unknown:
        return []
    text = f"the migration needs what this side does not know: {', '.join(unknown)}"
    return [_refusal("feature", text, (), "bring this side up to date", "VIR_ERR_OPERATION_UNSUPPORTED")]


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
        text = f"vCPU {format_ids(waiting)}: its unplug is pending, and would end on the way"
        hint = "wait for its end (--wait), or enable it again"
        found.append(_refusal("pending", text, tuple(waiting), hint))
    if status.is_active:
        text = f"a migration is under way ({status.status})"
        found.append(_refusal("migrating", text, (), "migrate-cancel ends it"))
    elif run_state not in _MIGRATABLE:
        why, hint = _RUN_STATES.get(run_state or "", ("", "look at it first"))
        text = f"the guest is '{run_state or 'in no state that QEMU tells'}'{why}"
        found.append(_refusal("run-state", text, (), hint))
    hint = "take out what blocks it"
    return found + [_refusal("blocked", f"QEMU cannot migrate it: {why}", (), hint) for why in status.blocked]


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
    facts = checks.facts_after_unplug(removals_seen)
    if len(state.enabled_ids) > 1:
        facts.add(Fact.SEVERAL_VCPUS)
    return [checks.refusal_of(row, state) for row in checks.set_off(state, Trigger.MIGRATE, facts)]


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


def check_cpu_operation(run_state: str | None, status: MigrationStatus) -> list[Refusal]:
    """Why no vCPU can be switched now."""
    if status.is_active and run_state != "inmigrate":
        text = f"the guest is being migrated ({status.status})"
        hint = "wait for its end, or migrate-cancel"
        return [_refusal("migrating", text, (), hint)]
    if run_state == "postmigrate":
        text = "the guest has been migrated away"
        return [_refusal("migrating", text, (), "ask at its destination; migrate-cancel lets it go on here")]
    return []


def check_machine(source: Machine, here: Machine) -> list[Refusal]:
    """Everything in which the destination is another machine, together."""
    found = []

    def differs(code: str, what: str, there: object, now: object, ids: tuple[int, ...] = ()) -> None:
        text = f"{what}: {there} at the source, {now} at the destination"
        found.append(_refusal(code, text, ids, "start the destination as the source was started"))

    for code, what, there, now in (
        ("arch", "architecture", source.arch, here.arch),
        ("machine", "machine type", source.type, here.type),
        ("maxcpus", "maximum of vCPUs", source.maxcpus, here.maxcpus),
        ("topology", "topology", source.topology or "flat", here.topology or "flat"),
    ):
        if there != now:
            differs(code, what, there, now)
    lacking: list[int] = []
    elsewhere: list[int] = []
    others: dict[tuple[str, str, str, str], list[int]] = {}
    for slot in source.slots:
        other = here.by_first.get(slot.ids[0])
        if other is None:
            lacking += slot.ids
            continue
        sizes = f"{len(slot.ids)} vCPUs", f"{len(other.ids)} vCPUs"
        for code, what, there, now in (
            ("entity", "one entity from vCPU {} on is", *sizes),
            ("entity", "vCPU {} is a", slot.driver, other.driver),
            ("node", "NUMA node of vCPU {}", _node(slot), _node(other)),
        ):
            if there != now:
                others.setdefault((code, what, there, now), []).extend(slot.ids)
        elsewhere += slot.ids if other.place != slot.place else ()
    for (code, what, there, now), ids in others.items():
        differs(code, what.format(format_ids(ids)), there, now, tuple(ids))
    for code, ids, text in (
        ("slot", lacking, "the destination has no such slot"),
        ("place", elsewhere, "its slot is another one at the destination (socket, core or thread)"),
    ):
        if ids:
            hint = "start the destination as the source was started"
            found.append(_refusal(code, f"vCPU {format_ids(ids)}: {text}", tuple(ids), hint))
    return found + _check_extra(source, here)


def _node(slot: Slot) -> str:
    return "none" if slot.node is None else str(slot.node)


def _check_extra(source: Machine, here: Machine) -> list[Refusal]:
    extra = sorted(
        n for slot in here.slots if slot.plugged and slot.ids[0] not in source.plugged for n in slot.ids
    )
    if not extra:
        return []
    # 7.2 to 11.1: QEMU takes it without a word, and the guest never sees it.
    text = f"vCPU {format_ids(extra)} is plugged at the destination, and not at the source"
    return [_refusal("extra", text, tuple(extra), "start the destination without it")]


def missing(source: Machine, here: Machine) -> list[Slot]:
    """What is plugged at the source and not yet here, in the order in which it was plugged there."""
    slots = [slot for slot in source.slots if slot.plugged and slot.ids[0] not in here.plugged]
    return sorted(slots, key=lambda slot: (slot.order or 0, slot.ids))


def check_arrived(source: Machine, here: Machine) -> list[Refusal]:
    """Why what has arrived is not the guest that left; also what must hold before the first byte."""
    lost = sorted(n for slot in missing(source, here) for n in slot.ids)
    found = check_machine(source, here)
    if lost:
        text = f"vCPU {format_ids(lost)} is plugged at the source, and not at the destination"
        found.append(_refusal("missing", text, tuple(lost), "migrate-prepare plugs it"))
    return found


def _refusal(
    code: str, text: str, ids: tuple[int, ...], hint: str, libvirt: str = "VIR_ERR_OPERATION_INVALID"
) -> Refusal:
    return Refusal(code, text, ids, hint, libvirt)


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
