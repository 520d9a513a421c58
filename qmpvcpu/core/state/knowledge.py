"""What is known of a guest beyond the replies of the inventory: for the rules, and for the next
process. Pure.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

from qmpvcpu.core.model import DomainState, Entity
from qmpvcpu.core.state.guest_view import GuestView


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a check needs to know beyond the replies of the inventory.

    `removals_seen`: how many vCPUs our processes have seen removed. `x2apic`: whether the CPU model
    has it (None: not queried). `firmware_runs`: on ppc64, whether the boot CPU still executes
    firmware (None: not queried). `pending`: ids of the entities whose unplug was requested and has
    not ended. `guest`: its own view, where an agent answered.
    """

    removals_seen: int = 0
    x2apic: bool | None = None
    firmware_runs: bool | None = None
    pending: frozenset[int] = frozenset()
    guest: GuestView | None = None
    #: TCG contexts that were surely used by vCPUs that have been removed.
    contexts_lost: int = 0
    #: Whether a user of this guest has been warned that TCG contexts run out.
    contexts_reported: bool = False
    #: Whether OVMF with SMM has run (None: not queried).
    smm: bool | None = None
    #: Whether the guest's CPU hotplug block is still in its legacy mode (None: not queried).
    legacy_hotplug: bool | None = None


@dataclass(frozen=True, slots=True)
class PendingUnplug:
    """A pending unplug.

    `qom_path` and `thread_id` are those that the entity had when it was requested, None where not
    known. `requested` is that moment, in seconds since the epoch.
    """

    entity_id: int
    qom_path: str | None
    thread_id: int | None
    requested: float | None


@dataclass(frozen=True, slots=True)
class UsedContexts:
    """The TCG contexts of a QEMU that unplugged vCPUs have used up, as far as our processes have
    seen.

    `removed` has the vCPU id and the thread id (0: not known) of each vCPU that was unplugged: so
    two processes that see the same unplug count it once. `is_reported`: whether a user has been
    warned that contexts run out.
    """

    removed: frozenset[tuple[int, int]] = frozenset()
    is_reported: bool = False

    def __or__(self, other: UsedContexts) -> UsedContexts:
        """The two together."""
        return UsedContexts(self.removed | other.removed, self.is_reported or other.is_reported)

    def count(self, thread_ids: Set[int]) -> int:
        """How many contexts removed vCPUs have surely used; `thread_ids` are those of the vCPUs
        that are there now.

        With `thread=single` all vCPUs have one thread, and one context.
        """
        known = sum(thread not in thread_ids for _, thread in self.removed if thread)
        # A vCPU whose thread was not known may be one of the known ones.
        return max(known, sum(not thread for _, thread in self.removed))


def unplug_of(entity: Entity, state: DomainState, requested: float) -> PendingUnplug:
    """The unplug of an entity that is, or may just have been, plugged."""
    now = state.by_id.get(entity.id, entity)
    path = now.qom_path or f"/machine/peripheral/{entity.device_id}"
    return PendingUnplug(
        entity.id, path, state.vcpus[entity.id].thread_id if now.plugged else None, requested
    )


def is_open(unplug: PendingUnplug, state: DomainState) -> bool:
    """Whether QEMU may still carry it out: the slot is full, and with the same object and thread as
    then.

    If the guest refused it, or a reset dropped it, while nobody listened, QMP does not show that
    (7.2 to 11.1).
    """
    entity = state.by_id.get(unplug.entity_id)
    if entity is None or entity.id != unplug.entity_id or not entity.plugged:
        return False
    if unplug.qom_path is not None and unplug.qom_path != entity.qom_path:
        return False
    threads = unplug.thread_id, state.vcpus[entity.id].thread_id
    return None in threads or threads[0] == threads[1]


def mark(state: DomainState, entity_ids: Set[int]) -> DomainState:
    """The state with `Vcpu.pending` true for the entities of these ids, and for no other."""
    wrong = [v for v in state.vcpus if v.pending != (v.enabled and v.entity[0] in entity_ids)]
    if not wrong:
        return state
    vcpus = list(state.vcpus)
    for vcpu in wrong:
        vcpus[vcpu.id] = replace(vcpu, pending=not vcpu.pending)
    return replace(state, vcpus=tuple(vcpus))
