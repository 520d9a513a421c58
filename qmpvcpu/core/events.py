"""QMP events of CPUs -> signals: what happened to which entity; two states -> what changed between. Pure.

Sources: QAPI `DEVICE_DELETED`, `DEVICE_UNPLUG_GUEST_ERROR`, `ACPI_DEVICE_OST`; the codes of OST are those of the
ACPI specification, "_OST (OSPM Status Indication)".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from qmpvcpu.core.model import DomainState, Entity, Event, EventKind

__all__ = [
    "CPU_EVENTS",
    "Names",
    "Signal",
    "SignalKind",
    "changes",
    "interpret",
    "is_taken",
    "is_transient",
    "replugged",
]

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
        reason = text if isinstance(text, str) and text else "the guest could not release it"
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
    if type(source) is not int or type(status) is not int or source not in _EJECT_SOURCES:
        return Signal(SignalKind.LOOK_AGAIN)
    if status == 0:
        # "Done" comes before the CPU is gone, and without a device once it is.
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
