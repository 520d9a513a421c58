"""What is kept of one QEMU for the next process: unplugs that may not have ended, and what they used up."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

from qmpvcpu.core.model import DomainState, Entity


@dataclass(frozen=True, slots=True)
class PendingUnplug:
    """An unplug of the entity with this first vCPU id.

    `qom_path` and `thread_id` are those it had then, None where not known. `asked` is in seconds since the epoch.
    """

    first: int
    qom_path: str | None
    thread_id: int | None
    asked: float | None


@dataclass(frozen=True, slots=True)
class UsedContexts:
    """What unplugs have used up of a QEMU under TCG, as far as processes of ours have seen.

    `gone` has the vCPU id and the thread id (0: not known) of each vCPU that was unplugged: so two processes that
    see the same unplug count it once. `is_reported`: whether a user of this guest was told that they run out.
    """

    gone: frozenset[tuple[int, int]] = frozenset()
    is_reported: bool = False

    def __or__(self, other: UsedContexts) -> UsedContexts:
        """What both say."""
        return UsedContexts(self.gone | other.gone, self.is_reported or other.is_reported)

    def count(self, thread_ids: Set[int]) -> int:
        """So many contexts were surely used by vCPUs that are gone; `thread_ids` are those of the vCPUs there now.

        With `thread=single` all vCPUs have one thread, and one context.
        """
        known = sum(thread not in thread_ids for _, thread in self.gone if thread)
        # One whose thread was not known may be one of those.
        return max(known, sum(not thread for _, thread in self.gone))


def unplug_of(entity: Entity, state: DomainState, asked: float) -> PendingUnplug:
    """The unplug of an entity that is, or may just have been, plugged."""
    now = state.by_id.get(entity.first, entity)
    path = now.qom_path or f"/machine/peripheral/{entity.device_id}"
    thread = state.vcpus[entity.first].thread_id if now.plugged else None
    return PendingUnplug(entity.first, path, thread, asked)


def is_open(unplug: PendingUnplug, state: DomainState) -> bool:
    """Whether QEMU may still carry it out: the slot is full, and with the same object and thread as then.

    That the guest refused it, or a reset dropped it, while nobody listened, nothing in QMP shows (7.2 to 11.1).
    """
    entity = state.by_id.get(unplug.first)
    if entity is None or entity.first != unplug.first or not entity.plugged:
        return False
    if unplug.qom_path is not None and unplug.qom_path != entity.qom_path:
        return False
    threads = unplug.thread_id, state.vcpus[entity.first].thread_id
    return None in threads or threads[0] == threads[1]


def mark(state: DomainState, firsts: Set[int]) -> DomainState:
    """The state with `Vcpu.pending` true for these entities, by first id, and for no other."""
    wrong = [v for v in state.vcpus if v.pending != (v.enabled and v.entity[0] in firsts)]
    if not wrong:
        return state
    vcpus = list(state.vcpus)
    for vcpu in wrong:
        vcpus[vcpu.id] = replace(vcpu, pending=not vcpu.pending)
    return replace(state, vcpus=tuple(vcpus))
