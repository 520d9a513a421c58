"""Every reason to refuse a request, collected, and the combinations that kill QEMU.

Each check is a plain function `(…) -> list[Refusal]`; `core.planning.live` runs them all and reports all findings.
What kills QEMU is in `core.quirks`, a row each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qmpvcpu.core.model import LIBVIRT_DRIVER, DomainState, Entity, format_ids
from qmpvcpu.core.quirks import Fact, Quirk, Trigger, refused_on
from qmpvcpu.core.request import Knowledge, Request
from qmpvcpu.errors import Refusal
from qmpvcpu.flags import VcpuFlag

if TYPE_CHECKING:
    from qmpvcpu.core.state.guest_view import GuestView

__all__ = [
    "has_no_thread",
    "MAXIMUM_IS_CONFIG",
    "apic_id",
    "check_flags",
    "check_guest",
    "check_guest_ids",
    "check_hotplug_mode",
    "check_kills_on_plug",
    "check_kills_on_unplug",
    "check_options",
    "check_plug",
    "check_range",
    "check_unplug",
    "facts_after_unplug",
    "needs_firmware_state",
    "needs_hotplug_mode",
    "needs_smm_state",
    "needs_x2apic",
    "refusal_of",
    "restore_forbidden",
    "set_off",
    "undo_forbidden",
    "warnings",
]

FORCE_HINT: Final = "--force (force=True) does it all the same"

MAXIMUM_IS_CONFIG: Final = Refusal(
    "maximum",
    "the maximum of vCPUs cannot change while the guest runs",
    (),
    "--maximum goes with --config (config=True), without --live",
)

_ALL_FLAGS: Final = sum(VcpuFlag)


def check_flags(flags: VcpuFlag, *, is_query: bool | None = None) -> list[Refusal]:
    """Flags that exclude each other (design.md, "Refused before anything is touched").

    `is_query` is told by what changes something with neither ENABLE nor DISABLE.
    """
    found: list[Refusal] = []
    if flags in (VcpuFlag.ENABLE, VcpuFlag.DISABLE, VcpuFlag.CURRENT):
        return found

    def exclusive(message: str, hint: str) -> None:
        found.append(Refusal("flags", message, (), hint))

    unknown = int(flags) & ~_ALL_FLAGS
    if unknown:
        exclusive(f"unknown flags: {unknown:#x}", "VcpuFlag names those there are")
    if flags & VcpuFlag.ENABLE and flags & VcpuFlag.DISABLE:
        exclusive("--enable (ENABLE) and --disable (DISABLE) exclude each other", "ask for one of the two")
    if flags & VcpuFlag.GUEST:
        for flag, why in (
            (VcpuFlag.NUMA_NODE, "the agent does not tell a CPU's NUMA node"),
            (VcpuFlag.CONFIG, "the agent changes only the running guest"),
            (VcpuFlag.CORE, "the agent switches single CPUs"),
        ):
            if flags & flag:
                exclusive(f"GUEST and {flag.name} exclude each other: {why}", f"leave out {flag.name} or GUEST")
    if is_query is None:
        is_query = not flags & (VcpuFlag.ENABLE | VcpuFlag.DISABLE)
    if is_query and flags & VcpuFlag.LIVE and flags & VcpuFlag.CONFIG:
        exclusive("a query answers for LIVE or for CONFIG, not for both at once", "ask twice")
    return found


def check_options(request: Request) -> list[Refusal]:
    """Options that exclude each other."""
    found: list[Refusal] = []
    if request.atomic and not request.wait:
        found.append(
            Refusal(
                "flags",
                "--atomic and --async exclude each other: what fails later cannot be undone by this call",
                (),
                "leave out one of the two",
            )
        )
    return found


def check_range(state: DomainState, ids: Iterable[int]) -> list[Refusal]:
    """vCPU ids that this machine does not have."""
    bad = [number for number in ids if number not in state.by_id]
    if not bad:
        return []
    return [
        Refusal(
            "range",
            f"vCPU {format_ids(bad)} is not in this domain: its ids are 0 to {state.maxcpus - 1}"
            if min(bad) >= 0
            else f"a vCPU id cannot be negative: {', '.join(map(str, bad))}",
            tuple(bad),
            "`qmpvcpu vcpuinfo` lists the ids",
        )
    ]


def check_whole_entities(state: DomainState, ids: Sequence[int], flags: VcpuFlag) -> list[Refusal]:
    """Ids that are only a part of what one `device_add` or `device_del` moves."""
    asked = set(ids)
    found = []
    for entity in _entities(state, ids):
        missing = [number for number in entity.ids if number not in asked]
        if missing:
            mine = [number for number in entity.ids if number in asked]
            verb = "enable" if flags & VcpuFlag.ENABLE else "disable"
            found.append(
                Refusal(
                    "entity",
                    f"vCPU {format_ids(mine)} is a part of {entity.label}, which QEMU plugs and unplugs"
                    f" only together",
                    tuple(mine),
                    f"{verb} {format_ids(entity.ids)}, or give --core (CORE) for the whole core",
                )
            )
    return found


def check_guest(state: DomainState, ids: Sequence[int], view: GuestView, *, online: bool) -> list[Refusal]:
    """What stands against switching these vCPUs in the guest."""
    absent = [number for number in ids if not state.vcpus[number].enabled]
    unknown = [
        number
        for number in ids
        if state.vcpus[number].enabled and number not in view.by_vcpu and view.online(number) is not online
    ]
    fixed = [
        number
        for number in ids
        if not online and (cpu := view.by_vcpu.get(number)) is not None and cpu.online and cpu.can_offline is False
    ]
    found = []
    if absent:
        found.append(
            Refusal(
                "not-plugged",
                f"vCPU {format_ids(absent)} is not plugged, so the guest does not have it",
                tuple(absent),
                "enable it first, without --guest",
                "VIR_ERR_INVALID_ARG",
            )
        )
    if unknown:
        found.append(
            Refusal(
                "guest-cpu",
                f"which of the guest's CPUs is vCPU {format_ids(unknown)} is not known",
                tuple(unknown),
                "allow the agent guest-file-open, or use guestvcpus with the guest's own ids",
                "VIR_ERR_OPERATION_UNSUPPORTED",
            )
        )
    if fixed:
        found.append(
            Refusal(
                "guest-fixed",
                f"the guest cannot take vCPU {format_ids(fixed)} offline",
                tuple(fixed),
                "leave it online",
                "VIR_ERR_INVALID_ARG",
            )
        )
    return found


def only_the_agent(ids: Sequence[int]) -> Refusal:
    """Plugged, offline in the guest, and the agent is not to be used."""
    return Refusal(
        "guest-offline",
        f"vCPU {format_ids(ids)} is plugged and offline in the guest, which only the guest agent can change",
        tuple(ids),
        "leave out --no-fallback (fallback=False), or take it online in the guest",
        "VIR_ERR_OPERATION_INVALID",
    )


def check_guest_ids(ids: Sequence[int], view: GuestView, *, online: bool) -> list[Refusal]:
    """The same for CPUs named by the guest's own ids, by which `view` is keyed."""
    found = []
    unknown = [number for number in ids if number not in view.by_vcpu]
    if unknown:
        text = f"the guest has no CPU {format_ids(unknown)}"
        found.append(Refusal("range", text, tuple(unknown), "guestvcpus lists them"))
    fixed = [n for n in ids if not online and n in view.by_vcpu and view.by_vcpu[n].can_offline is False]
    if fixed:
        text = f"the guest cannot take its CPU {format_ids(fixed)} offline"
        found.append(Refusal("guest-fixed", text, tuple(fixed), "leave it online"))
    return found


def check_plug(state: DomainState, entities: Sequence[Entity]) -> list[Refusal]:
    """What stands against plugging these empty slots."""
    if not entities:
        return []
    if not state.can_plug:
        return [_no_hotplug(state, entities, "plugged")]
    unseen = [entity for entity in entities if not entity.hotpluggable]
    if not unseen:
        return []
    text = f"vCPU {format_ids(_ids(unseen))} is gone, and libvirt takes it for plugged"
    hint = "its monitor plugs it: --via monitor (via='monitor')"
    return [Refusal("unseen", text, _ids(unseen), hint, "VIR_ERR_OPERATION_INVALID")]


def check_unplug(state: DomainState, entities: Sequence[Entity]) -> list[Refusal]:
    """What stands against unplugging these plugged entities."""
    if not entities:
        return []
    if not state.can_plug:
        return [_no_hotplug(state, entities, "unplugged")]
    if not state.can_unplug:
        return [
            Refusal(
                "no-unplug",
                f"{state.machine} ({state.arch}) can plug CPUs, but never unplug one",
                _ids(entities),
                "the guest agent can take the CPU offline: --guest --disable",
                "VIR_ERR_OPERATION_UNSUPPORTED",
            )
        ]
    return [_never_unplugged(entity) for entity in entities if not entity.hotpluggable]


def _never_unplugged(entity: Entity) -> Refusal:
    if entity.first and entity.driver == LIBVIRT_DRIVER:
        return Refusal(
            "not-hotpluggable",
            f"{entity.label}: libvirt has not plugged it as a device (hotpluggable='no'), and cannot unplug it",
            entity.ids,
            "--via monitor can; hotpluggable='yes' in the definition makes it a device from the next boot on",
            "VIR_ERR_OPERATION_UNSUPPORTED",
        )
    return Refusal(
        "boot-cpu",
        f"{entity.label} {'hold' if len(entity.ids) > 1 else 'is'} the boot CPU, which QEMU never unplugs",
        entity.ids,
        "leave it enabled",
        "VIR_ERR_OPERATION_UNSUPPORTED",
    )


def _no_hotplug(state: DomainState, entities: Sequence[Entity], verb: str) -> Refusal:
    return Refusal(
        "no-hotplug",
        f"this machine has no CPU hotplug: on {state.machine} ({state.arch}) no CPU can be {verb}"
        " while the guest runs",
        _ids(entities),
        "change the number of CPUs it starts with (-smp), or its machine type",
        "VIR_ERR_OPERATION_UNSUPPORTED",
    )


def apic_id(state: DomainState, entity: Entity) -> int | None:
    """The x86 APIC id of a slot, None where the topology is not known (QEMU: hw/i386/topology.h)."""
    if state.topology is None or entity.props is None:
        return None
    thread_bits, core_bits, module_bits, die_bits = state.topology.x86_apic_widths
    result: int = entity.props.get("thread-id", 0)
    shift = thread_bits
    for level, width in (
        ("core-id", core_bits),
        ("module-id", module_bits),
        ("die-id", die_bits),
        ("socket-id", 0),
    ):
        result |= entity.props.get(level, 0) << shift
        shift += width
    return result


def _big_apic_ids(state: DomainState, entities: Iterable[Entity]) -> list[Entity]:
    """Those whose APIC id needs x2apic on a QEMU that does not check it."""
    if state.topology is None or state.topology.x86_apic_limit <= 255 or not _asks_for(state, Fact.APIC_255):
        return []
    return [entity for entity in entities if (apic_id(state, entity) or 0) >= 255]


def _asks_for(state: DomainState, fact: Fact) -> bool:
    """Whether this fact decides about a refusal on this guest, and so must be found out."""
    return any(fact in row.facts for row in refused_on(state.arch, state.accel, state.version))


def set_off(state: DomainState, trigger: Trigger, facts: Set[Fact]) -> list[Quirk]:
    """The defects that this would set off on this guest, and that are refused."""
    rows = refused_on(state.arch, state.accel, state.version)
    return [row for row in rows if trigger in row.triggers and row.facts <= facts]


def needs_x2apic(state: DomainState, entities: Iterable[Entity]) -> bool:
    """Whether a plan to plug these needs `Knowledge.x2apic`."""
    return bool(_big_apic_ids(state, entities))


def needs_smm_state(state: DomainState) -> bool:
    """Whether a plan to plug needs `Knowledge.smm`."""
    return _asks_for(state, Fact.SMM)


def needs_hotplug_mode(state: DomainState) -> bool:
    """Whether a plan to unplug needs `Knowledge.legacy_hotplug`."""
    return _asks_for(state, Fact.LEGACY_HOTPLUG)


def needs_firmware_state(state: DomainState) -> bool:
    """Whether a plan to unplug needs `Knowledge.firmware_runs`."""
    return _asks_for(state, Fact.FIRMWARE)


def facts_after_unplug(removals_seen: int) -> set[Fact]:
    """The fact that vCPUs were unplugged, if any were."""
    return {Fact.AFTER_UNPLUG} if removals_seen else set()


def check_kills_on_plug(state: DomainState, entities: Sequence[Entity], known: Knowledge) -> list[Refusal]:
    """Plugs that are known to end QEMU."""
    if not entities:
        return []
    facts = facts_after_unplug(known.removals_seen)
    big = _big_apic_ids(state, entities) if known.x2apic is not True else []
    if big:
        facts.add(Fact.APIC_255)
    if known.smm:
        facts.add(Fact.SMM)
    used = len(state.enabled_ids) + known.contexts_lost
    if contexts_run_out(state):
        facts.add(Fact.MULTI_THREAD)
        # Nobody tells how many are used up; what was seen is a lower bound.
        if known.contexts_lost and used + len(_ids(entities)) > state.maxcpus:
            facts.add(Fact.NO_CONTEXTS)
    return [
        refusal_of(row, state, _ids(big if Fact.APIC_255 in row.facts else entities), used=used)
        for row in set_off(state, Trigger.PLUG, facts)
    ]


def contexts_run_out(state: DomainState) -> bool:
    """Whether each vCPU that is plugged uses up one of maxcpus contexts."""
    return state.accel == "tcg" and state.can_unplug and state.threads_shared is not True


def check_hotplug_mode(state: DomainState, entities: Sequence[Entity], known: Knowledge) -> list[Refusal]:
    """Unplugs that QEMU rejects whatever the guest does next; the guest's agent may do instead."""
    if not entities or not known.legacy_hotplug:
        return []
    rows = set_off(state, Trigger.UNPLUG, {Fact.LEGACY_HOTPLUG})
    return [refusal_of(row, state, _ids(entities)) for row in rows if Fact.LEGACY_HOTPLUG in row.facts]


def check_kills_on_unplug(state: DomainState, entities: Sequence[Entity], known: Knowledge) -> list[Refusal]:
    """Unplugs that are known to end QEMU."""
    if not entities:
        return []
    facts = facts_after_unplug(known.removals_seen)
    if state.threads_shared:
        facts.add(Fact.SINGLE_THREAD)
    by_libvirt = any(entity.driver == LIBVIRT_DRIVER for entity in entities)
    if known.firmware_runs or (known.firmware_runs is None and by_libvirt):
        facts.add(Fact.FIRMWARE)
    found = []
    for row in set_off(state, Trigger.UNPLUG, facts):
        if Fact.FIRMWARE in row.facts and known.firmware_runs is None:
            message = f"{row.message}, and whether it does libvirt's API does not tell"
            row = replace(row, message=message, hint="a guest agent in its XML tells, or --via monitor")
        found.append(refusal_of(row, state, _ids(entities)))
    return found


def refusal_of(row: Quirk, state: DomainState, ids: tuple[int, ...] = (), *, used: int = 0) -> Refusal:
    """What a defect has against a request, which can be forced.

    Args:
        row: the defect.
        state: of the guest.
        ids: the vCPUs that would set it off.
        used: TCG contexts that are surely used up.
    """
    return Refusal(
        row.code,
        row.message.format(version=state.version, used=used, maxcpus=state.maxcpus),
        ids,
        f"{row.hint}; {FORCE_HINT}",
        "VIR_ERR_OPERATION_UNSUPPORTED",
        forceable=True,
    )


def warnings(
    state: DomainState, plugs: Sequence[Entity], unplugs: Sequence[Entity], known: Knowledge
) -> list[str]:
    """What is no reason to refuse, but the user should know."""
    if known.contexts_reported or not (plugs or unplugs):
        return []
    return plugs_left(state, known, plugs)


def plugs_left(state: DomainState, known: Knowledge, plugs: Sequence[Entity] = ()) -> list[str]:
    """How many plugs QEMU can take after these, as one text; none where they do not run out."""
    if not contexts_run_out(state):
        return []
    left = max(state.maxcpus - len(state.enabled_ids) - known.contexts_lost - len(_ids(plugs)), 0)
    # A core of ppc64 is one plug, and uses as many as it has threads.
    left //= len(state.entities[0].ids)
    return [
        f"QEMU under TCG does not free what an unplugged vCPU has used: this QEMU can take {left} more"
        f" plug{'s' if left != 1 else ''} before it aborts, or fewer if another program has unplugged vCPUs"
    ]


def _entities(state: DomainState, ids: Iterable[int]) -> list[Entity]:
    seen: dict[int, Entity] = {}
    for number in ids:
        entity = state.by_id.get(number)
        if entity is not None:
            seen.setdefault(entity.first, entity)
    return [seen[first] for first in sorted(seen)]


def _ids(entities: Iterable[Entity]) -> tuple[int, ...]:
    return tuple(number for entity in entities for number in entity.ids)


def restore_forbidden(state: DomainState, entities: Sequence[Entity], known: Knowledge) -> str | None:
    """Why what was removed must not be plugged again on this machine, None where it may be tried."""
    kills = check_kills_on_plug(state, entities, known)
    return kills[0].message if kills else None


def undo_forbidden(state: DomainState, known: Knowledge) -> str | None:
    """Why a plug must not be undone by an unplug on this machine, None where it may be tried."""
    if not state.can_unplug:
        return f"{state.machine} ({state.arch}) never unplugs a CPU"
    sample = [entity for entity in state.entities if entity.first != 0][:1]
    kills = check_kills_on_unplug(state, sample, known)
    return kills[0].message if kills else None


def has_no_thread(vcpu_id: int) -> Refusal:
    """Why a vCPU that is not enabled cannot be pinned."""
    hint = "--config pins it for when it is plugged"
    text = f"vCPU {vcpu_id} is not enabled: it has no thread"
    return Refusal("not-enabled", text, (vcpu_id,), hint, "VIR_ERR_OPERATION_INVALID")
