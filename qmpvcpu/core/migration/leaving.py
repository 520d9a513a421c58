"""Why a guest cannot be migrated away. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.migration.status import MigrationStatus
from qmpvcpu.core.model import DomainState
from qmpvcpu.core.quirks import Fact, Trigger, quirk, set_off
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.hotplug import refusal_of
from qmpvcpu.core.state.guest_view import GuestView
from qmpvcpu.errors import Refusal

#: QAPI RunState: a source can be migrated from these.
_MIGRATABLE: Final = frozenset({"running", "paused", "prelaunch", "suspended", "watchdog", "debug"})
#: It cannot be migrated from these, and why.
_RUN_STATES: Final = {
    "shutdown": catalogue.SHUT_DOWN,
    "guest-panicked": catalogue.PANICKED,
    "internal-error": catalogue.INTERNAL_ERROR,
    "io-error": catalogue.IO_ERROR,
    "inmigrate": catalogue.WAITS_FOR_A_GUEST,
    "postmigrate": catalogue.WAS_MIGRATED,
}


def check_source(
    state: DomainState,
    run_state: str | None,
    status: MigrationStatus,
    pending: Iterable[int],
    *,
    is_paused: bool = False,
) -> list[Refusal]:
    """Why a guest cannot be migrated now; `is_paused`: it is paused meanwhile, so that no unplug
    can end.
    """
    found = []
    waiting = sorted(number for first in pending for number in state.by_id[first].ids)
    if waiting and not (is_paused and architecture(state.arch).saves_unplug):
        found.append(catalogue.PENDING(waiting))
    if status.is_active:
        found.append(catalogue.UNDER_WAY(status=status.status))
    elif run_state not in _MIGRATABLE:
        reason = _RUN_STATES.get(run_state or "", catalogue.RUN_STATE)
        found.append(reason(state=run_state or "in no known state"))
    return found + [catalogue.BLOCKED(why=why) for why in status.blocked]


#: The code of a defect that the agents of both sides can avoid (`needs_one_cpu`).
ONE_CPU: Final = quirk("ppc64-tcg-one-cpu").code


def check_hangs(state: DomainState, removals_seen: int) -> list[Refusal]:
    """Refuse migrations that are known to hang or to lose the guest; forceable. The code `ONE_CPU`
    does not apply while the guest has only its first CPU online.
    """
    if state.version is None:
        return []
    facts = {
        Fact.AFTER_UNPLUG: removals_seen > 0,
        Fact.SEVERAL_VCPUS: len(state.enabled_ids) > 1,
    }
    return [refusal_of(row, state) for row in set_off(state, Trigger.MIGRATE, facts)]


def needs_one_cpu(state: DomainState) -> bool:
    """Whether Linux survives a migration only if just its first CPU is online.

    QEMU does not migrate that RTAS has started the other CPUs; one that comes online later is
    started again.
    """
    return any(refusal.code == ONE_CPU for refusal in check_hangs(state, 0))


def without_one_cpu(hangs: list[Refusal], why: str | None) -> list[Refusal]:
    """The refusals that remain if the agent takes all other CPUs offline; `why`: it cannot, for
    this reason.
    """
    if why is None:
        return [one for one in hangs if one.code != ONE_CPU]
    return [
        replace(one, message=f"{one.message}; its other CPUs cannot be taken offline: {why}")
        if one.code == ONE_CPU
        else one
        for one in hangs
    ]


def check_one_cpu(view: GuestView) -> str | None:
    """Why a guest cannot be left with only its first CPU; None if it can, as far as is known."""
    if not any(cpu.online for cpu in view.cpus if cpu.logical_id == _FIRST_CPU):
        return f"its CPU {_FIRST_CPU} is offline"
    if view.vcpu_of(_FIRST_CPU) not in (None, 0):
        # After a kexec.
        return f"its CPU {_FIRST_CPU} is vCPU {view.vcpu_of(_FIRST_CPU)}, and not the boot CPU"
    return None


def cpus_but_first(view: GuestView) -> tuple[int, ...]:
    """The guest's own ids of its online CPUs except the first; they stay the same over a
    migration.
    """
    return tuple(cpu.logical_id for cpu in view.cpus if cpu.online and cpu.logical_id != _FIRST_CPU)


#: Linux and QEMU both start on it.
_FIRST_CPU: Final = 0
