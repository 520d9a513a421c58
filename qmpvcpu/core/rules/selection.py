"""Which vCPUs a request means: ids, the vCPUs or cores of a NUMA node, or as many as make a count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from qmpvcpu.core.model import DomainState, Entity, Vcpu, format_ids
from qmpvcpu.core.request import Knowledge, Request
from qmpvcpu.core.rules import checks
from qmpvcpu.core.state.guest_view import GuestView
from qmpvcpu.errors import Refusal
from qmpvcpu.flags import VcpuFlag

__all__ = ["core_of", "guest_total", "resolve_guest_total", "resolve_total", "select", "select_listed"]


def select(
    state: DomainState, request: Request, guest: GuestView | None = None
) -> tuple[tuple[int, ...], list[Refusal]]:
    """The vCPU ids that a request means, ascending, and what is wrong with how it names them.

    Args:
        state: of the guest, or of a definition.
        request: what is asked.
        guest: its own view of its CPUs, where an agent answered.
    """
    if request.has(VcpuFlag.NUMA_NODE):
        return _select_of_node(state, request, guest)
    if request.count is not None:
        return request.ids, [
            Refusal("count", "a count goes with a NUMA node", (), "add --numa-node, or name the vCPU ids")
        ]
    refusals = checks.check_range(state, request.ids)
    ids = [number for number in request.ids if number in state.by_id]
    if request.has(VcpuFlag.CORE):
        ids = sorted({number for vcpu_id in ids for number in core_of(state, vcpu_id)})
    return tuple(dict.fromkeys(ids if request.has(VcpuFlag.CORE) else request.ids)), refusals


def select_listed(state: DomainState, request: Request) -> tuple[tuple[int, ...], list[Refusal]]:
    """Every vCPU, as a file's `<vcpus>` lists them; and why this cannot be that guest's."""
    assert request.listed is not None
    listed = request.listed.vcpus
    if len(listed) != state.maxcpus:
        text = f"{request.listed.place} lists {len(listed)} vCPUs, and this domain has {state.maxcpus}"
        return (), [Refusal("listed", text.strip(), (), "only which of them are enabled can be applied")]
    mixed = [
        Refusal(
            "entity",
            f"{entity.label} can only be enabled and disabled together, and {request.listed.place} does not",
            entity.ids,
            "give all of them the same state",
        )
        for entity in state.entities
        if len({listed[number].enabled for number in entity.ids}) > 1
    ]
    return tuple(range(state.maxcpus)), mixed


def core_of(state: DomainState, vcpu_id: int) -> tuple[int, ...]:
    """Every vCPU id of the core that holds this one: an entity on ppc64, its threads on x86."""
    entity = state.by_id[vcpu_id]
    if state.version is None and state.topology is not None:
        # A definition: its ids are numbered core by core.
        first = vcpu_id - vcpu_id % state.topology.threads
        return tuple(range(first, first + state.topology.threads))
    if len(entity.ids) > 1 or entity.props is None or "thread-id" not in entity.props:
        return entity.ids
    key = _core_key(entity)
    return tuple(number for e in state.entities if _core_key(e) == key for number in e.ids)


def _core_key(entity: Entity) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (level, value) for level, value in sorted((entity.props or {}).items()) if level not in _NOT_OF_CORE
    )


_NOT_OF_CORE: Final = frozenset({"thread-id", "node-id"})


def _select_of_node(
    state: DomainState, request: Request, guest: GuestView | None
) -> tuple[tuple[int, ...], list[Refusal]]:
    if len(request.ids) != 1:
        return (), [Refusal("node", "NUMA_NODE takes one node", (), "name one node")]
    node = request.ids[0]
    members = [vcpu for vcpu in state.vcpus if vcpu.node == node]
    if not state.nodes:
        refusal = Refusal("node", "this machine has no NUMA nodes", (), "name vCPU ids instead")
        return (), [refusal]
    if not members:
        known = format_ids(state.nodes)
        return (), [Refusal("node", f"no vCPU is on NUMA node {node}: nodes are {known}", (), "see vcpuinfo")]
    if request.is_query:
        return tuple(vcpu.id for vcpu in members), []
    count = 1 if request.count is None else request.count
    if count < 1:
        return (), [Refusal("count", f"a count of {count} makes no sense", (), "give 1 or more")]
    if request.has(VcpuFlag.CORE):
        groups = _cores_of_node(state, members, request, guest)
        unit = "core"
    else:
        groups = [(vcpu.id,) for vcpu in members if _wanted(state, vcpu, request, guest)]
        unit = "vCPU"
    if request.disable:
        groups.reverse()
    # The end of an unplug that is pending is waited for before another vCPU goes, and taken back last.
    groups.sort(key=lambda group: any(state.vcpus[number].pending for number in group) is request.enable)
    if len(groups) < count:
        kind = f"disabled {unit}s" if request.enable else f"enabled {unit}s that can be unplugged"
        return (), [
            Refusal(
                "node",
                f"NUMA node {node} has {len(groups)} {kind}, {count} asked",
                (),
                "see vcpuinfo for other nodes",
            )
        ]
    return tuple(sorted(number for group in groups[:count] for number in group)), []


def _wanted(state: DomainState, vcpu: Vcpu, request: Request, guest: GuestView | None) -> bool:
    """Whether there is something to switch."""
    if request.disable:
        return vcpu.enabled and state.by_id[vcpu.id].hotpluggable
    # Plugged and offline in the guest is not enabled already.
    return not vcpu.enabled or vcpu.pending or (guest is not None and guest.online(vcpu.id) is False)


def _cores_of_node(
    state: DomainState, members: Sequence[Vcpu], request: Request, guest: GuestView | None
) -> list[tuple[int, ...]]:
    """Cores that lie on the node whole and have something to switch, lowest first."""
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


def resolve_total(state: DomainState, request: Request, known: Knowledge) -> tuple[dict[int, bool], list[Refusal]]:
    """`set_vcpus`: what each vCPU must be for `request.total` of them to be enabled, or why that cannot be.

    libvirt's choice (`qemuDomainSelectHotplugVcpuEntities`): the lowest empty entities are added, the highest
    hotpluggable ones removed, whole entities in that order and nothing skipped. An entity whose unplug is pending
    counts as enabled until its end: it is the first that stays when more are wanted, and the first that goes when
    fewer are. So never more are enabled than were before, or than are wanted.

    Returns:
        vCPU id -> whether it is to be enabled, of every vCPU that is or is to be plugged.
    """
    total = request.total
    assert total is not None
    if total < 1:
        refusal = Refusal("count", f"a guest cannot have {total} vCPUs", (), "give 1 or more")
        return {}, [refusal]
    if total > state.maxcpus:
        return {}, [
            Refusal(
                "count",
                f"{total} vCPUs asked, and this domain can have {state.maxcpus} (maxcpus)",
                (),
                "the maximum can change only in the persistent definition: --maximum --config",
            )
        ]
    leaving = [e for e in state.entities if e.plugged and e.first in known.pending]
    staying = [e for e in state.entities if e.plugged and e.first not in known.pending]
    wants = {number: True for entity in staying for number in entity.ids}
    wants |= {number: False for entity in leaving for number in entity.ids}
    now = sum(len(entity.ids) for entity in staying)
    enable = total > now
    if enable:
        candidates = leaving + [entity for entity in state.entities if not entity.plugged]
    else:
        # Where nothing can ever be unplugged, the checks say why; else only what can be is looked at.
        candidates = [e for e in reversed(staying) if e.hotpluggable or (not state.can_unplug and e.first != 0)]
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
    return {}, [_unreachable(total, now, below, above, candidates)]


def resolve_guest_total(
    request: Request, state: DomainState, view: GuestView | None
) -> tuple[dict[int, bool], list[Refusal]]:
    """`set_vcpus` through the agent: the lowest are taken online, the highest that can be are taken offline.

    Returns:
        vCPU id -> whether it is to be online, of those that are to be switched.
    """
    total = request.total
    assert total is not None
    if view is None:
        return {}, []
    mine = sorted(number for number in view.by_vcpu if number in state.by_id)
    online = [number for number in mine if view.online(number)]
    nameless = sum(cpu.online for cpu in view.cpus) - len(online)
    if nameless:
        message = (
            f"which vCPU {nameless} of the guest's online CPUs is, is not known, so they cannot be counted out"
        )
        hint = "allow the agent guest-file-open, or use guestvcpus with the guest's own ids"
        return {}, [Refusal("guest-cpu", message, (), hint, "VIR_ERR_OPERATION_UNSUPPORTED")]
    if not 1 <= total <= len(mine):
        message = f"{total} vCPUs online in the guest, and it has {len(mine)} that are plugged and known"
        return {}, [Refusal("count", message, (), f"give 1 to {len(mine)}, or plug more, without --guest")]
    if total >= len(online):
        offline = [number for number in mine if not view.online(number)]
        return dict.fromkeys(offline[: total - len(online)], True), []
    loose = [number for number in online if view.by_vcpu[number].can_offline is not False]
    if len(online) - total > len(loose):
        message = f"{total} vCPUs online cannot be reached: the guest can take only {len(loose)} offline"
        return {}, [Refusal("count", message, (), "guestvcpus shows which", "VIR_ERR_CONFIG_UNSUPPORTED")]
    return dict.fromkeys(sorted(loose[total - len(online) :]), False), []


def guest_total(view: GuestView, total: int) -> tuple[tuple[int, ...], bool, list[Refusal]]:
    """So many CPUs online, counted by the guest's own numbers: which are to be switched, and whether online. The
    lowest are taken online, the highest that can be are taken offline.
    """
    lit = [cpu for cpu in view.cpus if cpu.online]
    online = total >= len(lit)
    some = (
        [c for c in view.cpus if not c.online] if online else [c for c in lit if c.can_offline is not False][::-1]
    )
    wanted = abs(total - len(lit))
    if total < 1 or wanted > len(some):
        least, most = len(lit) - sum(cpu.can_offline is not False for cpu in lit), len(view.cpus)
        text = f"{total} CPUs online in the guest: it can have {max(least, 1)} to {most}"
        return (), online, [Refusal("count", text, (), "guestvcpus shows which", "VIR_ERR_INVALID_ARG")]
    return tuple(sorted(cpu.logical_id for cpu in some[:wanted])), online, []


def _unreachable(total: int, now: int, below: int, above: int, candidates: Sequence[Entity]) -> Refusal:
    if candidates and below < total < above:
        size = above - below
        message = f"{total} vCPUs cannot be reached: they come and go in cores of {size}"
        hint = f"ask for {below} or {above}"
    else:
        message = f"{total} vCPUs cannot be reached: with what can be unplugged now, {now} is the fewest"
        hint = "vcpuinfo shows which vCPUs are hotpluggable"
    return Refusal("count", message, (), hint, "VIR_ERR_CONFIG_UNSUPPORTED")
