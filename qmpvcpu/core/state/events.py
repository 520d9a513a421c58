"""QMP events of CPUs -> signals: what happened to which entity; two states -> the changes between
them. Pure.

Sources: QAPI `DEVICE_DELETED`, `DEVICE_UNPLUG_GUEST_ERROR`, `ACPI_DEVICE_OST`; the codes of OST are
those of the ACPI specification, "_OST (OSPM Status Indication)".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, TypeGuard

from qmpvcpu.core.model import DomainState, Entity, Event, EventKind

#: Events about a CPU, and events after which an earlier state may be out of date.
CPU_EVENTS: Final = frozenset(
    {"ACPI_DEVICE_OST", "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "RESET", "SHUTDOWN"}
)

_EJECT_SOURCES: Final = frozenset({3, 0x103})
_EJECTING: Final = 0x84

_OST_WORDS: Final = {
    1: "the guest failed to eject it (early in its boot, or an error in its kernel)",
    2: "the guest does not know this kind of request",
    0x80: "the guest does not allow it to be ejected (eject disabled)",
    0x81: "the guest reports that an application uses it",
    0x82: "the guest reports that it is busy",
    0x83: "the guest reports that something it depends on is busy or cannot be ejected",
}


class SignalKind(Enum):
    """What an event reports about an entity."""

    #: It, or a part of it, was removed.
    DELETED = "deleted"
    EJECTING = "ejecting"
    GUEST_REFUSED = "guest-refused"
    #: Something ended or changed; only a fresh query shows what.
    REFRESH = "look-again"
    #: The machine was reset: x86 drops every pending unplug.
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class Signal:
    """One interpreted event. `entity_id` is None if it is not about an entity."""

    kind: SignalKind
    entity_id: int | None = None
    reason: str | None = None


class Names:
    """How QEMU's events name these entities: by QOM path, and by the x86 slot number."""

    __slots__ = ("_by_id", "_by_path")

    def __init__(self, entities: Iterable[Entity]) -> None:
        self._by_path: dict[str, Entity] = {}
        self._by_id: dict[str, Entity] = {}
        for entity in entities:
            # A slot that was empty in the plan gets our own device id.
            self._by_path[entity.qom_path or PERIPHERAL + entity.device_id] = entity
            self._by_id[str(entity.id)] = entity

    def add(self, entity: Entity) -> None:
        """The entity has a new device id too."""
        self._by_path[PERIPHERAL + entity.device_id] = entity

    def of(self, data: Mapping[str, Any]) -> Entity | None:
        """The entity that `device` or `path` of an event means, by id or by the exact path."""
        path, device = data.get("path"), data.get("device")
        found = self._by_path.get(path) if isinstance(path, str) else None
        if found is None and isinstance(device, str):
            found = self._by_path.get(PERIPHERAL + device)
        return found

    def of_lapic(self, path: object) -> Entity | None:
        """The x86 CPU whose local APIC this is. QEMU removes it with its CPU, once the slot is
        empty; under TCG it sends no event for the CPU itself (7.2 to 11.1).
        """
        if not isinstance(path, str) or not path.endswith(_LAPIC):
            return None
        return self._by_path.get(path.removesuffix(_LAPIC))

    def of_slot(self, slot: object) -> Entity | None:
        """The entity of an ACPI slot: its index in QEMU's list of possible CPUs, which on x86 is
        the vCPU id.
        """
        return self._by_id.get(str(slot))


PERIPHERAL: Final = "/machine/peripheral/"
_LAPIC: Final = "/lapic"


def interpret(event: str, data: Mapping[str, Any], names: Names) -> Signal | None:
    """What an event means, and for which of these entities; None if it is not about CPUs."""
    if event == "DEVICE_DELETED":
        entity = names.of(data) or names.of_lapic(data.get("path"))
        # The event of a child (…/thread[0]), or of another device.
        if entity is None:
            return Signal(SignalKind.REFRESH)
        return Signal(SignalKind.DELETED, entity.id)
    if event == "DEVICE_UNPLUG_GUEST_ERROR":
        entity = names.of(data)
        if entity is None:
            return None
        # Only libvirt gives a text.
        text = data.get("text")
        return Signal(
            SignalKind.GUEST_REFUSED,
            entity.id,
            text[:_LONGEST] if isinstance(text, str) and text else "the guest could not release it",
        )
    if event == "ACPI_DEVICE_OST":
        return _ost(data.get("info"), names)
    if event == "RESET":
        return Signal(SignalKind.RESET, reason="the machine was reset, which drops the request")
    return None


def _ost(info: object, names: Names) -> Signal | None:
    if not isinstance(info, dict) or info.get("slot-type") != "CPU":
        return None
    source, status = info.get("source"), info.get("status")
    # "Done" (0) comes before the CPU is removed, and once more without a device after that.
    if (
        type(source) is not int
        or type(status) is not int
        or source not in _EJECT_SOURCES
        or status == 0
    ):
        return Signal(SignalKind.REFRESH)
    # A CPU without a device id is named only by its slot.
    entity = names.of(info) or names.of_slot(info.get("slot"))
    first = None if entity is None else entity.id
    if status == _EJECTING:
        return Signal(SignalKind.EJECTING, first)
    unknown = f"the guest answered with the unknown status {status}"
    return Signal(SignalKind.GUEST_REFUSED, first, _OST_WORDS.get(status, unknown))


def is_transient(text: str) -> bool:
    """Whether this error of `device_del` ends while the guest boots, so that a later try may
    succeed (x86).
    """
    # "acpi: device unplug request for not supported device type: …", until the guest's ACPI takes
    # over (to 10.x).
    return "device unplug request for not supported device type" in text


def is_taken(text: str) -> bool:
    """Whether this error of `device_add` says that another device has the id. On ppc64 the slot of
    a core is empty a moment before its device, and with it the id, is removed (10.0).
    """
    return "Duplicate device ID" in text


def is_filled(text: str) -> bool:
    """Whether this error of `device_add` says that the slot is filled: another client was faster.

    x86: "CPU[3] with APIC ID 3 exists", ppc64: "core 2 already populated", s390x: "…, it already
    exists" (7.2 to 11.1); libvirt: "already in requested state". A query shows whether it is that
    slot.
    """
    return text.endswith(("exists", "already populated")) or "already in requested state" in text


def changes(before: DomainState, after: DomainState, time: float) -> list[Event]:
    """The plugs and removals between two states of one machine, one event a vCPU; `time` in seconds
    since 1970.
    """
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
    """Whether a slot that is filled in both states was empty in between: its object or its thread
    is another.
    """
    if not (was.plugged and now.plugged):
        return False
    if was.qom_path != now.qom_path:
        return True
    threads = before.vcpus[was.id].thread_id, after.vcpus[now.id].thread_id
    return None not in threads and threads[0] != threads[1]


#: Parts of a CPU: on x86 its local APIC and Hyper-V's interrupt controller, on ppc64 a core's
#: threads and their interrupt controllers.
_CHILD: Final = re.compile(r"(?P<cpu>.+?)(?:/thread\[\d+\])?(?:/(?:lapic|synic|icp|xive-tctx))?")
#: The id of a CPU that qmpvcpu or libvirt has plugged.
_OUR_ID: Final = re.compile(r"vcpu(\d+)(?:-\d+)?")
#: The device in a path, which may go on to a part of it.
_DEVICE: Final = re.compile(r"/machine/(?:peripheral|peripheral-anon|unattached)/[^/]+")
#: How many devices, and how many undecided departures, are remembered.
_REMEMBERED: Final = 1024
#: How many paths of each: a core of ppc64 has 8 threads, each with an interrupt controller.
_PATHS: Final = 64
#: The most characters of a CPU's path or id, and of a reason: the other side may be hostile.
_LONGEST: Final = 1000


def _is_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST


@dataclass(slots=True)
class _Departure:
    """One device that was removed; `number` counts them."""

    number: int
    path: str
    time: float
    #: The ACPI slot that an event named for this path.
    slot: int | None = None
    #: The paths of its events: another event of the same path is about the next departure.
    paths: set[str] = field(default_factory=set)
    #: Whether one of them was about a part that only CPUs have.
    is_cpu: bool = False


class Departures:
    """CPUs that were plugged and removed between two queries: only QEMU's events show them. Pure.

    Call `hear` for each event, read `heard` before a query is sent, and call `decide` with the
    state from that query. QEMU empties a CPU's slot before it sends the event (7.2 to 11.1), so a
    CPU that the query still shows under the same path was plugged later.

    A removed device was a CPU if it had a part that only CPUs have, if an event named an ACPI CPU
    slot for it, or if a state had its path for a CPU. Its id alone is not enough: clients may call
    any device `vcpu2`.
    """

    def __init__(self) -> None:
        #: How many departures events have reported.
        self.heard = 0
        self._undecided: list[_Departure] = []
        #: The last departure of each path; more events about it may come.
        self._last: dict[str, _Departure] = {}
        #: Path -> ACPI slot; and the slots that events without a device have reported as empty
        #: since the last query.
        self._slots: dict[str, int] = {}
        self._emptied: list[int] = []
        #: Path -> removals that states have shown, but no event has reported yet.
        self._owed: dict[str, int] = {}

    def hear(self, event: str, data: Mapping[str, Any], time: float, *, own: bool = True) -> None:
        """Take in an event of QEMU; `time` in seconds since 1970.

        Without `own`, events of devices themselves are ignored: on x86 under TCG that of a CPU
        never comes, or only at a later plug (11.1), and the event of its local APIC counts instead.
        """
        if event == "ACPI_DEVICE_OST":
            self._hear_ost(data.get("info"))
        # An event with a text is libvirt's answer to our own call.
        elif event == "DEVICE_DELETED" and "text" not in data:
            path, device = data.get("path"), data.get("device")
            if _is_name(path):
                self._hear_deleted(path, time, own)
            elif _is_name(device):
                # Only libvirt sends events without a path. Of its aliases only those of CPUs look
                # like our ids.
                self._hear_deleted(
                    PERIPHERAL + device, time, own, is_cpu=bool(_OUR_ID.fullmatch(device))
                )

    def decide(
        self, before: DomainState, after: DomainState, heard: int, *, has_removed: bool = True
    ) -> list[Event]:
        """The events of CPUs that were plugged and removed between two states, which do not show
        them.

        Args:
            before: the state before the query.
            after: the state from the query.
            heard: `self.heard` when that query was sent.
            has_removed: whether `changes` has found a removal between the two.
        """
        for path in _left(before, after) if has_removed else ():
            # Its event may come later than the query that shows the removal.
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
                # The next state decides: the event came after the query was sent, or the CPU is
                # there again.
                left.append(one)
                continue
            entity = was.get(one.path) or now.get(one.path)
            if (ids := self._ids(one, entity, before, after)) is not None:
                detail = (
                    f"device '{one.path.removeprefix(PERIPHERAL)}', plugged and removed"
                    " between two queries"
                )
                # QEMU sends no event for a plug: what was removed had been plugged.
                found += [Event(one.time, EventKind.ADDED, vcpus, detail) for vcpus in ids if vcpus]
                found += [Event(one.time, EventKind.REMOVED, vcpus, detail) for vcpus in ids]
        self._undecided = left
        self._emptied.clear()
        return found

    def forget(self, path: str | None) -> None:
        """The removal of the CPU at this QOM path has been reported already."""
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
        """Its vCPU ids, one a row; an empty row if they are not known; None if it may not be a
        CPU.
        """
        if entity is None:
            if not one.is_cpu and one.slot is None:
                return None
            entity = self._named(one, before, after)
        return [()] if entity is None else [(number,) for number in entity.ids]

    def _named(self, one: _Departure, before: DomainState, after: DomainState) -> Entity | None:
        """The entity of a CPU that neither state shows."""
        if one.slot is not None:
            return after.by_id.get(one.slot)
        ours = _OUR_ID.fullmatch(one.path.removeprefix(PERIPHERAL))
        if ours is not None and len(ours[1]) <= 6:
            entity = after.by_id.get(int(ours[1]))
            # A filled slot is another one: another client has given our id to a CPU of a different
            # slot.
            if entity is not None and not entity.plugged and not before.by_id[entity.id].plugged:
                return entity
        return after.by_id.get(self._emptied[0]) if len(set(self._emptied)) == 1 else None


def _left(before: DomainState, after: DomainState) -> list[str]:
    """The paths of the CPUs that the later state does not have, or has replaced."""
    return [
        was.qom_path or PERIPHERAL + was.device_id
        for was, now in zip(before.entities, after.entities, strict=False)
        if was.plugged
        and not (was is now and before.vcpus[was.id] is after.vcpus[was.id])
        and (not now.plugged or replugged(was, now, before, after))
    ]


def _by_path(state: DomainState) -> dict[str, Entity]:
    return {
        one.qom_path or PERIPHERAL + one.device_id: one for one in state.entities if one.plugged
    }


def _forget(kept: dict[str, Any]) -> None:
    """Drop the oldest half if there are too many."""
    if len(kept) > _REMEMBERED:
        for path in list(kept)[: _REMEMBERED // 2]:
            del kept[path]
