"""What stands against a guest's leaving. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.migration.status import MigrationStatus
from qmpvcpu.core.model import DomainState
from qmpvcpu.core.quirks import Fact, Trigger, facts_after_unplug, quirk, set_off
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.hotplug import refusal_of
from qmpvcpu.core.state.guest_view import GuestView
from qmpvcpu.errors import Refusal

#: QAPI RunState: a source can be migrated from these.
_MIGRATABLE: Final = frozenset({"running", "paused", "prelaunch", "suspended", "watchdog", "debug"})
#: Those it cannot, and why.
_RUN_STATES: Final = {
    "shutdown": catalogue.SHUT_DOWN,
    "guest-panicked": catalogue.PANICKED,
    "internal-error": catalogue.INTERNAL_ERROR,
    "io-error": catalogue.IO_ERROR,
    "inmigrate": catalogue.WAITS_FOR_A_GUEST,
    "postmigrate": catalogue.WAS_HANDED_OVER,
}


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
        found.append(catalogue.PENDING(waiting))
    if status.is_active:
        found.append(catalogue.UNDER_WAY(status=status.status))
    elif run_state not in _MIGRATABLE:
        reason = _RUN_STATES.get(run_state or "", catalogue.RUN_STATE)
        found.append(reason(state=run_state or "in no state that QEMU tells"))
    return found + [catalogue.BLOCKED(why=why) for why in status.blocked]


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
    facts = facts_after_unplug(removals_seen)
    if len(state.enabled_ids) > 1:
        facts.add(Fact.SEVERAL_VCPUS)
    return [refusal_of(row, state) for row in set_off(state, Trigger.MIGRATE, facts)]


def needs_one_cpu(state: DomainState) -> bool:
    """Whether a Linux gets over a migration only with just its first CPU online.

    QEMU does not migrate that RTAS started the others; a CPU that comes online is started afresh.
    """
    return any(refusal.code == ONE_CPU for refusal in check_hangs(state, 0))


def without_one_cpu(hangs: list[Refusal], why: str | None) -> list[Refusal]:
    """What hangs where the agent takes all CPUs but the first offline; or cannot, and `why`."""
    if why is None:
        return [one for one in hangs if one.code != ONE_CPU]
    return [
        replace(one, message=f"{one.message}; its other CPUs cannot be taken offline for it: {why}")
        if one.code == ONE_CPU
        else one
        for one in hangs
    ]


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
