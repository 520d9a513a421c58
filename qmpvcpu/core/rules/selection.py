"""Which vCPUs a request means: by ids, by NUMA node, by core, or by a number of vCPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qmpvcpu.core.model import DomainState, Entity, Vcpu
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.request import check_range
from qmpvcpu.core.state.guest_view import GuestView
from qmpvcpu.core.state.knowledge import Knowledge
from qmpvcpu.errors import Refusal
from qmpvcpu.flags import VcpuFlag


def choose(
    state: DomainState, request: Request, known: Knowledge
) -> tuple[tuple[int, ...], dict[int, bool], list[Refusal]]:
    """What a request means on the running guest.

    Returns:
        The vCPU ids that it is about; each id that is to change -> whether it is to be enabled
        (online, with GUEST); and the refusals of how it names them.
    """
    if request.listed is not None:
        targets, found = select_listed(state, request)
        return targets, {number: request.listed.vcpus[number].enabled for number in targets}, found
    if request.total is not None:
        resolve = resolve_guest_total if request.has(VcpuFlag.GUEST) else resolve_total
        wants, found = resolve(state, request, known)
        return tuple(wants), wants, found
    targets, found = select(state, request, known.guest)
    return (
        targets,
        dict.fromkeys(targets, request.enable) if request.enable != request.disable else {},
        found,
    )


def select(
    state: DomainState, request: Request, guest: GuestView | None = None
) -> tuple[tuple[int, ...], list[Refusal]]:
    """The vCPU ids that a request means, ascending, and the refusals of how it names them.

    Args:
        state: of the guest, or of a definition.
        request: what is requested.
        guest: its own view of its CPUs, where an agent answered.
    """
    if request.has(VcpuFlag.NUMA_NODE):
        return _select_of_node(state, request, guest)
    if request.count is not None:
        return request.ids, [catalogue.COUNT_WITHOUT_NODE()]
    refusals = check_range(state, request.ids)
    ids = [number for number in request.ids if number in state.by_id]
    if request.has(VcpuFlag.CORE):
        ids = sorted({number for vcpu_id in ids for number in core_of(state, vcpu_id)})
    return tuple(dict.fromkeys(ids if request.has(VcpuFlag.CORE) else request.ids)), refusals


def select_listed(state: DomainState, request: Request) -> tuple[tuple[int, ...], list[Refusal]]:
    """Every vCPU, as a file's `<vcpus>` lists them; and why that list does not fit this guest."""
    assert request.listed is not None
    listed = request.listed.vcpus
    if len(listed) != state.maxcpus:
        place = request.listed.place or "the file"
        return (), [catalogue.LISTED(place=place, count=len(listed), maxcpus=state.maxcpus)]
    mixed = [
        catalogue.LISTED_PART(
            entity.ids, label=entity.label, place=request.listed.place or "the file"
        )
        for entity in state.entities
        if len({listed[number].enabled for number in entity.ids}) > 1
    ]
    return tuple(range(state.maxcpus)), mixed


def core_of(state: DomainState, vcpu_id: int) -> tuple[int, ...]:
    """Every vCPU id of the core that has this one: an entity on ppc64, its threads on x86."""
    entity = state.by_id[vcpu_id]
    if state.version is None and state.topology is not None:
        # In a definition ids are numbered core by core.
        first = vcpu_id - vcpu_id % state.topology.threads
        return tuple(range(first, first + state.topology.threads))
    if len(entity.ids) > 1 or entity.props is None or "thread-id" not in entity.props:
        return entity.ids
    key = _core_key(entity)
    return tuple(number for e in state.entities if _core_key(e) == key for number in e.ids)


def _core_key(entity: Entity) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (level, value)
        for level, value in sorted((entity.props or {}).items())
        if level not in ("thread-id", "node-id")
    )


def _select_of_node(
    state: DomainState, request: Request, guest: GuestView | None
) -> tuple[tuple[int, ...], list[Refusal]]:
    if len(request.ids) != 1:
        return (), [catalogue.ONE_NODE()]
    node = request.ids[0]
    members = [vcpu for vcpu in state.vcpus if vcpu.node == node]
    if not state.nodes:
        return (), [catalogue.NO_NODES()]
    if not members:
        return (), [catalogue.EMPTY_NODE(node=node, nodes=state.nodes)]
    if request.is_query:
        return tuple(vcpu.id for vcpu in members), []
    count = 1 if request.count is None else request.count
    if count < 1:
        return (), [catalogue.NODE_COUNT(count=count)]
    if request.has(VcpuFlag.CORE):
        groups = _cores_of_node(state, members, request, guest)
        unit = "core"
    else:
        groups = [(vcpu.id,) for vcpu in members if _wanted(state, vcpu, request, guest)]
        unit = "vCPU"
    if request.disable:
        groups.reverse()
    # Disabling takes one whose unplug is pending first, so that no other goes; enabling takes it
    # last.
    groups.sort(
        key=lambda group: any(state.vcpus[number].pending for number in group) is request.enable
    )
    if len(groups) < count:
        kind = f"disabled {unit}s" if request.enable else f"enabled {unit}s that can be unplugged"
        return (), [catalogue.NODE_TOO_SMALL(node=node, found=len(groups), kind=kind, count=count)]
    return tuple(sorted(number for group in groups[:count] for number in group)), []


def _wanted(state: DomainState, vcpu: Vcpu, request: Request, guest: GuestView | None) -> bool:
    """Whether the request would change this vCPU."""
    if request.disable:
        return vcpu.enabled and state.by_id[vcpu.id].hotpluggable
    # One that is plugged, but offline in the guest, does not count as enabled.
    return (
        not vcpu.enabled or vcpu.pending or (guest is not None and guest.online(vcpu.id) is False)
    )


def _cores_of_node(
    state: DomainState, members: Sequence[Vcpu], request: Request, guest: GuestView | None
) -> list[tuple[int, ...]]:
    """The cores that are wholly on the node and that the request would change, lowest first."""
    on_node = {vcpu.id for vcpu in members}
    found: list[tuple[int, ...]] = []
    for core in sorted({core_of(state, vcpu.id) for vcpu in members}):
        vcpus = [state.vcpus[number] for number in core]
        if not on_node.issuperset(core):
            continue
        if request.enable:
            is_wanted = any(_wanted(state, vcpu, request, guest) for vcpu in vcpus)
        else:
            enabled = [vcpu for vcpu in vcpus if vcpu.enabled]
            is_wanted = bool(enabled) and all(state.by_id[vcpu.id].hotpluggable for vcpu in enabled)
        if is_wanted:
            found.append(core)
    return found


def resolve_total(
    state: DomainState, request: Request, known: Knowledge
) -> tuple[dict[int, bool], list[Refusal]]:
    """`set_vcpus`: which vCPUs must be enabled to make `request.total` of them, or why that cannot
    be.

    libvirt's choice (`qemuDomainSelectHotplugVcpuEntities`): the lowest empty entities are plugged
    and the highest hotpluggable ones unplugged, in that order and without a gap. An entity whose
    unplug is pending counts as enabled until its end: it is the first to stay if more are
    requested, and the first to go if fewer are. So there are never more vCPUs enabled than before,
    or than requested.

    Returns:
        vCPU id -> whether it is to be enabled, of every vCPU that is or is to be plugged.
    """
    total = request.total
    assert total is not None
    if total < 1:
        return {}, [catalogue.NO_VCPUS(total=total)]
    if total > state.maxcpus:
        return {}, [catalogue.OVER_MAXIMUM(total=total, most=state.maxcpus)]
    leaving = [e for e in state.entities if e.plugged and e.id in known.pending]
    staying = [e for e in state.entities if e.plugged and e.id not in known.pending]
    wants = {number: True for entity in staying for number in entity.ids}
    wants |= {number: False for entity in leaving for number in entity.ids}
    now = sum(len(entity.ids) for entity in staying)
    enable = total > now
    if enable:
        candidates = leaving + [entity for entity in state.entities if not entity.plugged]
    else:
        # On a machine that never unplugs, the checks of `rules.hotplug` say so.
        candidates = [
            e for e in reversed(staying) if e.hotpluggable or (not state.can_unplug and e.id != 0)
        ]
    below = above = now
    for entity in candidates:
        if now == total:
            break
        after = now + len(entity.ids) * (1 if enable else -1)
        below, above = min(now, after), max(now, after)
        if (after - total) * (now - total) < 0:
            break
        wants |= dict.fromkeys(entity.ids, enable)
        now = after
    if now == total:
        return wants, []
    if candidates and below < total < above:
        return {}, [
            catalogue.WHOLE_CORES(total=total, size=above - below, below=below, above=above)
        ]
    return {}, [catalogue.FEWEST(total=total, fewest=now)]


def resolve_guest_total(
    state: DomainState, request: Request, known: Knowledge
) -> tuple[dict[int, bool], list[Refusal]]:
    """`set_vcpus` through the agent: the lowest go online; the highest that can go offline do.

    Returns:
        vCPU id -> whether it is to be online, for those that must change.
    """
    total = request.total
    assert total is not None
    view = known.guest
    if view is None:
        return {}, []
    mine = sorted(number for number in view.by_vcpu if number in state.by_id)
    online = [number for number in mine if view.online(number)]
    nameless = sum(cpu.online for cpu in view.cpus) - len(online)
    if nameless:
        return {}, [catalogue.GUEST_CPUS_UNCOUNTED(count=nameless)]
    if not 1 <= total <= len(mine):
        return {}, [catalogue.GUEST_TOTAL(total=total, most=len(mine))]
    if total >= len(online):
        offline = [number for number in mine if not view.online(number)]
        return dict.fromkeys(offline[: total - len(online)], True), []
    loose = [number for number in online if view.by_vcpu[number].can_offline is not False]
    if len(online) - total > len(loose):
        return {}, [catalogue.GUEST_FEWEST(total=total, loose=len(loose))]
    return dict.fromkeys(sorted(loose[total - len(online) :]), False), []


def guest_total(view: GuestView, total: int) -> tuple[tuple[int, ...], bool, list[Refusal]]:
    """The guest's own ids of the CPUs that must change to make `total` of them online, whether they
    go online, and refusals. The lowest go online; the highest that can go offline do.
    """
    online_cpus = [cpu for cpu in view.cpus if cpu.online]
    online = total >= len(online_cpus)
    some = (
        [c for c in view.cpus if not c.online]
        if online
        else [c for c in online_cpus if c.can_offline is not False][::-1]
    )
    wanted = abs(total - len(online_cpus))
    if total < 1 or wanted > len(some):
        least, most = (
            len(online_cpus) - sum(cpu.can_offline is not False for cpu in online_cpus),
            len(view.cpus),
        )
        return (), online, [catalogue.GUEST_CPUS_TOTAL(total=total, least=max(least, 1), most=most)]
    return tuple(sorted(cpu.logical_id for cpu in some[:wanted])), online, []
