"""What stands against a destination. Pure."""

from __future__ import annotations

from qmpvcpu.core.migration.cookie import Machine, Slot
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.catalogue import Reason
from qmpvcpu.errors import Refusal

__all__ = ["check_arrived", "check_machine", "missing"]


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
