"""A machine as its slots, from what is plugged in each; and what has changed from one moment to the
next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from qmpvcpu import DomainState, Entity, Props, QemuVersion, Vcpu
from qmpvcpu.core.state.events import changes


class Slot(NamedTuple):
    """What may be plugged at once: its vCPU ids; path and thread if it is."""

    ids: tuple[int, ...]
    qom_path: str | None = None
    thread_id: int | None = None


def changed(before: Iterable[Slot], after: Iterable[Slot]) -> list[tuple[str, tuple[int, ...]]]:
    """The events that tell what has come and gone, with their vCPU ids."""
    return [
        (str(event.event), event.vcpus) for event in changes(state_of(before), state_of(after), 1.0)
    ]


def state_of(slots: Iterable[Slot]) -> DomainState:
    entities: list[Entity] = []
    vcpus: dict[int, Vcpu] = {}
    for slot in slots:
        props = Props({"core-id": slot.ids[0]})
        entities.append(Entity(slot.ids, "t", props, slot.qom_path, None, True))
        plugged = slot.qom_path is not None
        vcpus |= {
            n: Vcpu(
                n, plugged, True, slot.ids, props, qom_path=slot.qom_path, thread_id=slot.thread_id
            )
            for n in slot.ids
        }
    return DomainState(
        name="d",
        arch="x86_64",
        machine="q35",
        accel="tcg",
        active=True,
        version=QemuVersion(10, 0),
        topology=None,
        can_plug=True,
        can_unplug=True,
        threads_shared=False,
        entities=tuple(entities),
        vcpus=tuple(vcpus[n] for n in sorted(vcpus)),
    )
