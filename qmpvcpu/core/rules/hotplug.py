"""Why vCPUs cannot be plugged or unplugged: they are part of an entity, the machine cannot, or QEMU
would die.

What makes QEMU die is in `core.quirks`, one row for each defect.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from qmpvcpu.core.model import LIBVIRT_DRIVER, DomainState, Entity
from qmpvcpu.core.quirks import Fact, Quirk, Trigger, contexts_run_out, decides, set_off
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.catalogue import Reason
from qmpvcpu.core.state.knowledge import Knowledge
from qmpvcpu.errors import Refusal
from qmpvcpu.flags import VcpuFlag


def check_whole_entities(state: DomainState, ids: Sequence[int], flags: VcpuFlag) -> list[Refusal]:
    """Refuse ids that are only a part of what one `device_add` or `device_del` moves."""
    requested = set(ids)
    verb = "enable" if flags & VcpuFlag.ENABLE else "disable"
    return [
        catalogue.PART_OF_ENTITY(
            [number for number in entity.ids if number in requested],
            label=entity.label,
            verb=verb,
            whole=entity.ids,
        )
        for entity in state.entities_of(ids)
        if not requested.issuperset(entity.ids)
    ]


def check_plug(state: DomainState, entities: Sequence[Entity]) -> list[Refusal]:
    """Why these empty slots cannot be filled."""
    if not entities:
        return []
    if not state.can_plug:
        return [
            catalogue.NO_HOTPLUG(
                _ids(entities), machine=state.machine, arch=state.arch, done="plugged"
            )
        ]
    unseen = [entity for entity in entities if not entity.hotpluggable]
    return [catalogue.UNSEEN(_ids(unseen))] if unseen else []


def check_unplug(state: DomainState, entities: Sequence[Entity]) -> list[Refusal]:
    """Why these plugged entities cannot be unplugged."""
    if not entities:
        return []
    if not state.can_plug:
        return [
            catalogue.NO_HOTPLUG(
                _ids(entities), machine=state.machine, arch=state.arch, done="unplugged"
            )
        ]
    if not state.can_unplug:
        return [catalogue.NO_UNPLUG(_ids(entities), machine=state.machine, arch=state.arch)]
    return [_never_unplugged(entity) for entity in entities if not entity.hotpluggable]


def _never_unplugged(entity: Entity) -> Refusal:
    if entity.id and entity.driver == LIBVIRT_DRIVER:
        return catalogue.NOT_A_DEVICE(entity.ids, label=entity.label)
    return catalogue.BOOT_CPU(
        entity.ids, label=entity.label, verb="include" if len(entity.ids) > 1 else "is"
    )


def _big_apic_ids(state: DomainState, entities: Iterable[Entity]) -> list[Entity]:
    """The entities whose APIC id needs x2apic, on a QEMU that does not check for it."""
    if (
        state.topology is None
        or state.topology.x86_apic_limit <= 255
        or not decides(state, Fact.APIC_255)
    ):
        return []
    return [entity for entity in entities if (state.x86_apic_id(entity) or 0) >= 255]


def needs_x2apic(state: DomainState, entities: Iterable[Entity]) -> bool:
    """Whether `Knowledge.x2apic` must be known to plug these."""
    return bool(_big_apic_ids(state, entities))


def check_kills_on_plug(
    state: DomainState, entities: Sequence[Entity], known: Knowledge
) -> list[Refusal]:
    """Refuse plugs that are known to end QEMU."""
    if not entities:
        return []
    big = _big_apic_ids(state, entities) if known.x2apic is not True else []
    used = len(state.enabled_ids) + known.contexts_lost
    run_out = contexts_run_out(state)
    facts = {
        Fact.AFTER_UNPLUG: known.removals_seen > 0,
        Fact.APIC_255: bool(big),
        Fact.SMM: known.smm is True,
        Fact.MULTI_THREAD: run_out,
        # QEMU does not report how many are used up: the removals that were seen give a lower bound.
        Fact.NO_CONTEXTS: run_out
        and known.contexts_lost > 0
        and used + len(_ids(entities)) > state.maxcpus,
    }
    return [
        refusal_of(row, state, _ids(big if Fact.APIC_255 in row.facts else entities), used=used)
        for row in set_off(state, Trigger.PLUG, facts)
    ]


def check_hotplug_mode(
    state: DomainState, entities: Sequence[Entity], known: Knowledge
) -> list[Refusal]:
    """Refuse unplugs that QEMU rejects in any case; the agent may take the CPU offline instead."""
    if not entities or not known.legacy_hotplug:
        return []
    return [
        refusal_of(row, state, _ids(entities))
        for row in set_off(state, Trigger.UNPLUG, {Fact.LEGACY_HOTPLUG: True})
        if Fact.LEGACY_HOTPLUG in row.facts
    ]


def check_kills_on_unplug(
    state: DomainState, entities: Sequence[Entity], known: Knowledge
) -> list[Refusal]:
    """Refuse unplugs that are known to end QEMU."""
    if not entities:
        return []
    by_libvirt = any(entity.driver == LIBVIRT_DRIVER for entity in entities)
    facts = {
        Fact.AFTER_UNPLUG: known.removals_seen > 0,
        Fact.SINGLE_THREAD: state.threads_shared is True,
        Fact.FIRMWARE: by_libvirt if known.firmware_runs is None else known.firmware_runs,
    }
    found = []
    for row in set_off(state, Trigger.UNPLUG, facts):
        if Fact.FIRMWARE in row.facts and known.firmware_runs is None:
            row = replace(
                row,
                message=f"{row.message}, and libvirt's API does not report whether it does",
                hint="add a guest agent to its XML, or use --via monitor",
            )
        found.append(refusal_of(row, state, _ids(entities)))
    return found


def refusal_of(
    row: Quirk, state: DomainState, ids: tuple[int, ...] = (), *, used: int = 0
) -> Refusal:
    """The refusal because of a defect; it can be forced.

    Args:
        row: the defect.
        state: of the guest.
        ids: the vCPUs that would set it off.
        used: TCG contexts that are surely used up.
    """
    reason = Reason(
        row.code,
        row.message,
        f"{row.hint}; --force (force=True) does it anyway",
        "VIR_ERR_OPERATION_UNSUPPORTED",
        forceable=True,
    )
    return reason(ids, version=state.version, used=used, maxcpus=state.maxcpus)


def warnings(
    state: DomainState, plugs: Sequence[Entity], unplugs: Sequence[Entity], known: Knowledge
) -> list[str]:
    """What the user should know, though it is not a reason to refuse."""
    is_quiet = known.contexts_reported or not (plugs or unplugs)
    return [] if is_quiet else plugs_left(state, known, plugs)


def plugs_left(state: DomainState, known: Knowledge, plugs: Sequence[Entity] = ()) -> list[str]:
    """How many plugs QEMU can take after these, as one text; empty where plugs do not run out."""
    if not contexts_run_out(state):
        return []
    left = max(state.maxcpus - len(state.enabled_ids) - known.contexts_lost - len(_ids(plugs)), 0)
    # One plug of a ppc64 core uses a context for each of its threads.
    left //= len(state.entities[0].ids)
    return [
        "QEMU under TCG does not free the context of an unplugged vCPU: this QEMU can take"
        f" {left} more plug{'s' if left != 1 else ''} before it aborts, or fewer if another"
        " program has unplugged vCPUs"
    ]


def _ids(entities: Iterable[Entity]) -> tuple[int, ...]:
    return tuple(number for entity in entities for number in entity.ids)


def restore_forbidden(
    state: DomainState, entities: Sequence[Entity], known: Knowledge
) -> str | None:
    """Why entities that were removed must not be plugged back on this machine; None if they may."""
    kills = check_kills_on_plug(state, entities, known)
    return kills[0].message if kills else None


def undo_forbidden(state: DomainState, known: Knowledge) -> str | None:
    """Why a plug must not be undone by an unplug on this machine; None if it may."""
    if not state.can_unplug:
        return f"{state.machine} ({state.arch}) never unplugs a CPU"
    kills = check_kills_on_unplug(state, state.entities[1:2], known)
    return kills[0].message if kills else None
