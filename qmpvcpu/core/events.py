"""QMP events of CPUs -> signals: what happened to which entity. Pure.

Sources: QAPI `DEVICE_DELETED`, `DEVICE_UNPLUG_GUEST_ERROR`, `ACPI_DEVICE_OST`; the codes of OST are those of the
ACPI specification, "_OST (OSPM Status Indication)".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from qmpvcpu.core.model import Entity

__all__ = ["CPU_EVENTS", "Signal", "SignalKind", "interpret"]

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


def interpret(event: str, data: Mapping[str, Any], entities: Collection[Entity]) -> Signal | None:
    """What an event says, about which of these entities; None where it says nothing about CPUs."""
    if event == "DEVICE_DELETED":
        entity = _by_name(data, entities)
        # A child's event (…/lapic, …/thread[0]) or another device's: on x86 under TCG the CPU's own never comes.
        if entity is None:
            return Signal(SignalKind.LOOK_AGAIN)
        return Signal(SignalKind.DELETED, entity.first)
    if event == "DEVICE_UNPLUG_GUEST_ERROR":
        entity = _by_name(data, entities)
        if entity is None:
            return None
        return Signal(SignalKind.GUEST_REFUSED, entity.first, "the guest could not release it")
    if event == "ACPI_DEVICE_OST":
        return _ost(data.get("info"), entities)
    if event == "RESET":
        return Signal(SignalKind.RESET, reason="the machine was reset, which drops the request")
    return None


def _by_name(data: Mapping[str, Any], entities: Collection[Entity]) -> Entity | None:
    device, path = data.get("device"), data.get("path")
    for entity in entities:
        # A slot that was empty when this was planned gets our own device id.
        mine = entity.qom_path or f"/machine/peripheral/{entity.device_id}"
        if path == mine or (device is not None and mine == f"/machine/peripheral/{device}"):
            return entity
    return None


def _ost(info: object, entities: Collection[Entity]) -> Signal | None:
    if not isinstance(info, dict) or info.get("slot-type") != "CPU":
        return None
    source, status = info.get("source"), info.get("status")
    if type(source) is not int or type(status) is not int or source not in _EJECT_SOURCES:
        return Signal(SignalKind.LOOK_AGAIN)
    if status == 0:
        # "Done" comes before the CPU is gone, and without a device once it is.
        return Signal(SignalKind.LOOK_AGAIN)
    # The slot is the index of the CPU in QEMU's list of possible CPUs, which on x86 is the vCPU id; the device
    # id is there only for a CPU that has one.
    slot = str(info.get("slot"))
    named = _by_name(info, entities) if info.get("device") is not None else None
    by_slot = (entity.first for entity in entities if str(entity.first) == slot)
    first = named.first if named is not None else next(by_slot, None)
    if status == _EJECTING:
        return Signal(SignalKind.EJECTING, first)
    reason = _OST_WORDS.get(status) or f"the guest answered with the unknown status {status}"
    return Signal(SignalKind.GUEST_REFUSED, first, reason)
