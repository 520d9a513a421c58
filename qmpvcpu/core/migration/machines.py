"""Why a destination cannot take a guest. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qmpvcpu.core.definition import Definition
from qmpvcpu.core.migration.cookie import Cookie, Machine, Slot, check_features, machine_of
from qmpvcpu.core.model import DomainState
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.catalogue import Reason
from qmpvcpu.errors import Refusal, VcpuRefused

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
    return [
        *(reason(there=there, now=now) for reason, there, now in rows if there != now),
        *_check_slots(source, destination),
        *_check_extra(source, destination),
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


def _check_extra(source: Machine, destination: Machine) -> list[Refusal]:
    extra = sorted(
        n for slot in destination.slots if slot.plugged and slot.ids[0] not in source.plugged for n in slot.ids
    )
    # 7.2 to 11.1: QEMU accepts it silently, and the guest never sees that CPU.
    return [catalogue.EXTRA(extra)] if extra else []


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
        hint = "begin again: the guest has changed since migrate-begin"
        raise VcpuRefused([replace(one, ids=(), hint=hint) for one in refusals])


def check_destination(
    cookie: Cookie, definition: Definition | None, state: DomainState, run_state: str | None, uuid: object
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
