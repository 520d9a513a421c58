"""QMP events of CPUs -> signals: what happened to which entity; two states -> what changed between. Pure.

Sources: QAPI `DEVICE_DELETED`, `DEVICE_UNPLUG_GUEST_ERROR`, `ACPI_DEVICE_OST`; the codes of OST are those of the
ACPI specification, "_OST (OSPM Status Indication)".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, TypeGuard

from qmpvcpu.core.model import DomainState, Entity, Event, EventKind

#: Events that say something about a CPU, or make what was read before doubtful.
CPU_EVENTS: Final = frozenset(
    {"ACPI_DEVICE_OST", "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "RESET", "SHUTDOWN"}
)

_EJECT_SOURCES: Final = frozenset({3, 0x103})
_EJECTING: Final = 0x84

_OST_WORDS: Final = {
    1: "the guest failed to eject it (early in its boot, or an error in its kernel)",
    2: "the guest does not know this kind of request",
    0x80: "the guest does not allow it to be ejected (eject disabled)",
    0x81: "the guest says that it is in use by an application",
    0x82: "the guest says that it is busy",
    0x83: "the guest says that something it depends on is busy or cannot be ejected",
}


class SignalKind(Enum):
    """What an event says of an entity."""

    #: It, or what goes with it, is gone.
    DELETED = "deleted"
    EJECTING = "ejecting"
    GUEST_REFUSED = "guest-refused"
    #: Something ended or changed; only a fresh query tells what.
    LOOK_AGAIN = "look-again"
    #: The machine was reset: x86 drops every unplug it was asked for.
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class Signal:
    """One event, understood. `first` is the entity's first vCPU id, None where no entity is meant."""

    kind: SignalKind
    first: int | None = None
    reason: str | None = None


class Names:
    """How QEMU's events name these entities: by QOM path, and by the x86 slot number."""

    __slots__ = ("_by_first", "_by_path")

    def __init__(self, entities: Iterable[Entity]) -> None:
        self._by_path: dict[str, Entity] = {}
        self._by_first: dict[str, Entity] = {}
        for entity in entities:
            # A slot that was empty when this was planned gets our own device id.
            self._by_path[entity.qom_path or PERIPHERAL + entity.device_id] = entity
            self._by_first[str(entity.first)] = entity

    def add(self, entity: Entity) -> None:
        """The entity has another device id than before."""
        self._by_path[PERIPHERAL + entity.device_id] = entity

    def of(self, data: Mapping[str, Any]) -> Entity | None:
        """The entity that `device` or `path` of an event means, by id or by the exact path."""
        path, device = data.get("path"), data.get("device")
        found = self._by_path.get(path) if isinstance(path, str) else None
        if found is None and isinstance(device, str):
            found = self._by_path.get(PERIPHERAL + device)
        return found

    def of_lapic(self, path: object) -> Entity | None:
        """The x86 CPU whose local APIC this is. It goes with its CPU, once the slot is empty; under TCG no event
        of the CPU's own comes (7.2 to 11.1).
        """
        if not isinstance(path, str) or not path.endswith(_LAPIC):
            return None
        return self._by_path.get(path.removesuffix(_LAPIC))

    def of_slot(self, slot: object) -> Entity | None:
        """The entity of an ACPI slot: its index in QEMU's list of possible CPUs, which on x86 is the vCPU id."""
        return self._by_first.get(str(slot))


PERIPHERAL: Final = "/machine/peripheral/"
_LAPIC: Final = "/lapic"


def interpret(event: str, data: Mapping[str, Any], names: Names) -> Signal | None:
    """What an event says, about which of these entities; None where it says nothing about CPUs."""
    if event == "DEVICE_DELETED":
        entity = names.of(data) or names.of_lapic(data.get("path"))
        # A child's event (…/thread[0]) or another device's.
        if entity is None:
            return Signal(SignalKind.LOOK_AGAIN)
        return Signal(SignalKind.DELETED, entity.first)
    if event == "DEVICE_UNPLUG_GUEST_ERROR":
        entity = names.of(data)
        if entity is None:
            return None
        # libvirt's words, where it is libvirt that tells.
        text = data.get("text")
        reason = text[:_LONGEST] if isinstance(text, str) and text else "the guest could not release it"
        return Signal(SignalKind.GUEST_REFUSED, entity.first, reason)
    if event == "ACPI_DEVICE_OST":
        return _ost(data.get("info"), names)
    if event == "RESET":
        return Signal(SignalKind.RESET, reason="the machine was reset, which drops the request")
    return None


def _ost(info: object, names: Names) -> Signal | None:
    if not isinstance(info, dict) or info.get("slot-type") != "CPU":
        return None
    source, status = info.get("source"), info.get("status")
    # "Done" (0) comes before the CPU is gone, and without a device once it is.
    if type(source) is not int or type(status) is not int or source not in _EJECT_SOURCES or status == 0:
        return Signal(SignalKind.LOOK_AGAIN)
    # The device id is there only for a CPU that has one.
    entity = names.of(info) or names.of_slot(info.get("slot"))
    first = None if entity is None else entity.first
    if status == _EJECTING:
        return Signal(SignalKind.EJECTING, first)
    reason = _OST_WORDS.get(status) or f"the guest answered with the unknown status {status}"
    return Signal(SignalKind.GUEST_REFUSED, first, reason)


def is_transient(text: str) -> bool:
    """Whether this error of `device_del` passes as the guest boots on, so that a later try may succeed (x86)."""
    # "acpi: device unplug request for not supported device type: …", until the guest's ACPI takes over (to 10.x).
    return "device unplug request for not supported device type" in text


def is_taken(text: str) -> bool:
    """Whether this error of `device_add` is about a device id: another device has it. A core of ppc64 leaves its
    slot a moment before its device is gone, and its id with it (10.0).
    """
    return "Duplicate device ID" in text


def is_so(text: str) -> bool:
    """Whether this error of `device_add` says that the slot is taken: another client was first.

    x86: "CPU[3] with APIC ID 3 exists", ppc64: "core 2 already populated", s390x: "…, it already exists" (7.2 to
    11.1); libvirt: "already in requested state". A query tells whether it is that slot.
    """
    return text.endswith(("exists", "already populated")) or "already in requested state" in text


def changes(before: DomainState, after: DomainState, time: float) -> list[Event]:
    """What came and went between two states of one machine, one event a vCPU; `time` in seconds since 1970."""
    found: list[Event] = []
    for was, now in zip(before.entities, after.entities, strict=False):
        first = was.ids[0]
        if was is now and before.vcpus[first] is after.vcpus[first]:
            continue
        went = was.plugged and (not now.plugged or replugged(was, now, before, after))
        came = now.plugged and (went or not was.plugged)
        if went:
            found += [Event(time, EventKind.REMOVED, (number,)) for number in was.ids]
        if came:
            found += [Event(time, EventKind.ADDED, (number,)) for number in now.ids]
    return found


def replugged(was: Entity, now: Entity, before: DomainState, after: DomainState) -> bool:
    """Whether a slot that is full in both states was empty between: another object, or another thread."""
    if not (was.plugged and now.plugged):
        return False
    if was.qom_path != now.qom_path:
        return True
    threads = before.vcpus[was.first].thread_id, after.vcpus[now.first].thread_id
    return None not in threads and threads[0] != threads[1]


#: What goes with a CPU: on x86 its local APIC and Hyper-V's interrupt controller, on ppc64 a core's threads and
#: what serves their interrupts.
_CHILD: Final = re.compile(r"(?P<cpu>.+?)(?:/thread\[\d+\])?(?:/(?:lapic|synic|icp|xive-tctx))?")
#: The id of a CPU that we, or libvirt, have plugged.
_OUR_ID: Final = re.compile(r"vcpu(\d+)(?:-\d+)?")
#: The device of a path, which may be that of something below it.
_DEVICE: Final = re.compile(r"/machine/(?:peripheral|peripheral-anon|unattached)/[^/]+")
#: So many devices, and departures that no query has decided on, are remembered.
_REMEMBERED: Final = 1024
#: Paths of one of them that are: a core of ppc64 has 8 threads, each with an interrupt controller.
_PATHS: Final = 64
#: Characters of a path or id that can be a CPU's, and of a reason.
_LONGEST: Final = 1000


def _is_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST


@dataclass(slots=True)
class _Departure:
    """One device that went; `number` counts them."""

    number: int
    path: str
    time: float
    #: The ACPI slot of a CPU that was named with this path.
    slot: int | None = None
    #: The paths of the events about it: a second one of the same path is about the next departure.
    paths: set[str] = field(default_factory=set)
    #: Whether one of them was about something that only CPUs have.
    is_cpu: bool = False


class Departures:
    """CPUs that came and went between two queries: QEMU's events alone tell of them. Pure.

    Give it each event (`hear`), note `heard` before a query is sent, and let it `decide` with the state that the
    query gave. QEMU empties a CPU's slot before it tells (7.2 to 11.1), so what that query still shows under the
    same path came later.

    What has gone was a CPU if it had what only CPUs have, if an ACPI slot of a CPU was named with it, or if a
    state showed its path as a CPU's. Its id alone does not tell: clients may call any device `vcpu2`.
    """

    def __init__(self) -> None:
        #: How many departures were heard of.
        self.heard = 0
        self._undecided: list[_Departure] = []
        #: The last one of each path, whose other events may still come.
        self._last: dict[str, _Departure] = {}
        #: Path -> ACPI slot; and slots that were said to be empty since the last decision, by no device.
        self._slots: dict[str, int] = {}
        self._emptied: list[int] = []
        #: Path -> removals that states have shown, and no event has told of yet.
        self._owed: dict[str, int] = {}

    def hear(self, event: str, data: Mapping[str, Any], time: float, *, own: bool = True) -> None:
        """An event of QEMU's; `time` in seconds since 1970.

        Without `own`, events of devices themselves say nothing: on x86 under TCG that of a CPU never comes, or
        only at a later plug (11.1), and its lapic's tells.
        """
        if event == "ACPI_DEVICE_OST":
            self._hear_ost(data.get("info"))
        # One with a text is libvirt's answer to a call of ours, and not news.
        elif event == "DEVICE_DELETED" and "text" not in data:
            path, device = data.get("path"), data.get("device")
            if _is_name(path):
                self._hear_deleted(path, time, own)
            elif _is_name(device):
                # No event of QEMU's is without a path. Of libvirt's aliases only those of CPUs look like ours.
                self._hear_deleted(PERIPHERAL + device, time, own, is_cpu=bool(_OUR_ID.fullmatch(device)))

    def decide(
        self, before: DomainState, after: DomainState, heard: int, *, has_removed: bool = True
    ) -> list[Event]:
        """What came and went again between two states, which their difference does not show.

        Args:
            before: the state until now.
            after: the state by a query.
            heard: `self.heard` when that query was sent.
            has_removed: whether `changes` has found a removal between the two.
        """
        for path in _left(before, after) if has_removed else ():
            # What tells of it may come later than the query that shows it.
            self._owed[path] = self._owed.get(path, 0) + 1
            _forget(self._owed)
        if not self._undecided:
            return []
        was, now = _by_path(before), _by_path(after)
        found: list[Event] = []
        left: list[_Departure] = []
        for one in self._undecided:
            if owed := self._owed.pop(one.path, 0):
                if owed > 1:
                    self._owed[one.path] = owed - 1
                continue
            is_there = one.path in was and one.path in now
            if one.number > heard or (is_there and all(one.path != other.path for other in left)):
                # The next state tells: it was heard of later than the query was sent, or is there still.
                left.append(one)
                continue
            entity = was.get(one.path) or now.get(one.path)
            if (ids := self._ids(one, entity, before, after)) is not None:
                detail = f"device '{one.path.removeprefix(PERIPHERAL)}', plugged and removed between two queries"
                # QEMU tells of no plug: what has gone had come.
                found += [Event(one.time, EventKind.ADDED, vcpus, detail) for vcpus in ids if vcpus]
                found += [Event(one.time, EventKind.REMOVED, vcpus, detail) for vcpus in ids]
        self._undecided = left
        self._emptied.clear()
        return found

    def forget(self, path: str | None) -> None:
        """That one has left this QOM path is told already."""
        self._undecided = [one for one in self._undecided if one.path != path]

    # -- inside -----------------------------------------------------------------------------------

    def _hear_deleted(self, path: str, time: float, own: bool, *, is_cpu: bool = False) -> None:
        match = _CHILD.fullmatch(path)
        cpu = match["cpu"] if match is not None else path
        device = _DEVICE.match(cpu)
        if device is not None and device[0] != cpu:
            return  # a part of a device, and not of a CPU
        if cpu == path and not own:
            return
        one = self._last.get(cpu)
        if one is None or path in one.paths:
            self.heard += 1
            one = self._last[cpu] = _Departure(self.heard, cpu, time, self._slots.pop(cpu, None))
            self._undecided.append(one)
            del self._undecided[:-_REMEMBERED]
            _forget(self._last)
        if len(one.paths) < _PATHS:
            one.paths.add(path)
        one.is_cpu |= is_cpu or cpu != path

    def _hear_ost(self, info: object) -> None:
        if not isinstance(info, dict) or info.get("slot-type") != "CPU":
            return
        slot, device = info.get("slot"), info.get("device")
        if not isinstance(slot, str) or not slot.isascii() or not slot.isdigit() or len(slot) > 6:
            return
        source, status = info.get("source"), info.get("status")
        if _is_name(device):
            self._slots[PERIPHERAL + device] = int(slot)
            _forget(self._slots)
        elif type(source) is int and source in _EJECT_SOURCES and status == 0:
            self._emptied.append(int(slot))
            del self._emptied[:-_REMEMBERED]

    def _ids(
        self, one: _Departure, entity: Entity | None, before: DomainState, after: DomainState
    ) -> list[tuple[int, ...]] | None:
        """The vCPUs that it was, one a row; an empty row where nothing tells; None where it may be no CPU."""
        if entity is None:
            if not one.is_cpu and one.slot is None:
                return None
            entity = self._named(one, before, after)
        return [()] if entity is None else [(number,) for number in entity.ids]

    def _named(self, one: _Departure, before: DomainState, after: DomainState) -> Entity | None:
        """The entity that a CPU was which neither state shows."""
        if one.slot is not None:
            return after.by_id.get(one.slot)
        ours = _OUR_ID.fullmatch(one.path.removeprefix(PERIPHERAL))
        if ours is not None and len(ours[1]) <= 6:
            entity = after.by_id.get(int(ours[1]))
            # One that has another path was not this: another client has given our id to a CPU in another slot.
            if entity is not None and not entity.plugged and not before.by_id[entity.first].plugged:
                return entity
        return after.by_id.get(self._emptied[0]) if len(set(self._emptied)) == 1 else None


def _left(before: DomainState, after: DomainState) -> list[str]:
    """The paths of CPUs that are gone, or are others, in the later state."""
    return [
        was.qom_path or PERIPHERAL + was.device_id
        for was, now in zip(before.entities, after.entities, strict=False)
        if was.plugged
        and not (was is now and before.vcpus[was.first] is after.vcpus[was.first])
        and (not now.plugged or replugged(was, now, before, after))
    ]


def _by_path(state: DomainState) -> dict[str, Entity]:
    return {one.qom_path or PERIPHERAL + one.device_id: one for one in state.entities if one.plugged}


def _forget(kept: dict[str, Any]) -> None:
    """Of too many, those that came first."""
    if len(kept) > _REMEMBERED:
        for path in list(kept)[: _REMEMBERED // 2]:
            del kept[path]
