"""State and request -> the steps to take, and every reason why not. Touches nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qmpvcpu.core import checks
from qmpvcpu.core.model import DomainState, Entity, Vcpu, format_ids
from qmpvcpu.core.request import Knowledge, Request
from qmpvcpu.errors import Refusal
from qmpvcpu.flags import VcpuFlag

__all__ = ["Plan", "make_plan", "select"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be done: `plugs` and `unplugs` in the order they are sent, and why not, if not.

    `targets` is every vCPU id the request is about; `unchanged` those that are already as asked.
    """

    request: Request
    targets: tuple[int, ...]
    plugs: tuple[Entity, ...] = ()
    unplugs: tuple[Entity, ...] = ()
    awaited: tuple[Entity, ...] = ()
    unchanged: tuple[int, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    messages: tuple[str, ...] = ()

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The steps as JSON data, in the words of QMP."""
        steps: list[dict[str, Any]] = [
            {"step": "await-unplug", "vcpus": list(entity.ids), "qom_path": entity.qom_path}
            for entity in self.awaited
        ]
        steps += [
            {
                "step": "device_add",
                "vcpus": list(entity.ids),
                "arguments": {"driver": entity.driver, "id": entity.device_id, **dict(entity.props or {})},
            }
            for entity in (*self.awaited, *self.plugs)
        ]
        steps += [
            {
                "step": "device_del",
                "vcpus": list(entity.ids),
                "arguments": {"id": unplug_name(entity)},
            }
            for entity in self.unplugs
        ]
        return steps

    def to_json(self) -> dict[str, Any]:
        """The document of `setvcpu --dry-run --json`."""
        return {
            "plan": self.steps,
            "refusals": [refusal.message for refusal in self.refusals],
            "vcpus": list(self.targets),
            "unchanged": list(self.unchanged),
            "messages": list(self.messages),
        }

    def describe(self) -> list[str]:
        """The steps as lines a person reads."""
        lines = [f"wait until the unplug of {entity.label} has ended" for entity in self.awaited]
        lines += [
            f"plug {entity.label}: device_add {entity.driver},id={entity.device_id}"
            + "".join(f",{key}={value}" for key, value in (entity.props or {}).items())
            for entity in (*self.awaited, *self.plugs)
        ]
        lines += [f"unplug {entity.label}: device_del {unplug_name(entity)}" for entity in self.unplugs]
        if self.unchanged:
            done = "enabled" if self.request.enable else "disabled"
            lines.append(f"vCPU {format_ids(self.unchanged)}: already {done}")
        return lines


def unplug_name(entity: Entity) -> str:
    """What `device_del` calls it: the device id, or the QOM path of a CPU that was there at the start."""
    path = entity.qom_path or ""
    prefix = "/machine/peripheral/"
    return path[len(prefix) :] if path.startswith(prefix) else path


def make_plan(state: DomainState, request: Request, known: Knowledge | None = None) -> Plan:
    """Select the vCPUs, find what is to be done, and collect every reason not to do it."""
    known = known or Knowledge()
    enable, disable = request.enable, request.disable
    refusals = checks.check_flags(request.flags)
    targets, found = select(state, request)
    refusals += found
    plugs: list[Entity] = []
    unplugs: list[Entity] = []
    awaited: list[Entity] = []
    unchanged: list[int] = []
    if enable != disable:
        asked = set(targets)
        for entity in _entities(state, targets):
            if enable and entity.first in known.pending and entity.plugged:
                awaited.append(entity)
            elif entity.plugged == enable:
                unchanged += [number for number in entity.ids if number in asked]
            else:
                (plugs if enable else unplugs).append(entity)
        moved = {number for entity in (*awaited, *plugs, *unplugs) for number in entity.ids}
        touched = [number for number in targets if number in moved]
        refusals += checks.check_whole_entities(state, touched, request.flags)
        refusals += checks.check_plug(state, plugs)
        refusals += checks.check_unplug(state, unplugs)
        kills = checks.check_kills_on_plug(state, [*awaited, *plugs], known)
        kills += checks.check_kills_on_unplug(state, unplugs, known)
        refusals += [] if request.force else kills
    else:
        kills = []
    messages = checks.warnings(state, [*awaited, *plugs], unplugs)
    messages += [f"forced: {kill.message}" for kill in kills if request.force]
    return Plan(
        request=request,
        targets=tuple(targets),
        plugs=tuple(plugs),
        unplugs=tuple(unplugs),
        awaited=tuple(awaited),
        unchanged=tuple(unchanged),
        refusals=tuple(refusals),
        messages=tuple(messages),
    )


def _entities(state: DomainState, ids: Iterable[int]) -> list[Entity]:
    firsts = sorted({state.by_id[number].first for number in ids if number in state.by_id})
    return [state.by_id[first] for first in firsts]


def select(state: DomainState, request: Request) -> tuple[tuple[int, ...], list[Refusal]]:
    """The vCPU ids that a request means, ascending, and what is wrong with how it names them."""
    if request.has(VcpuFlag.NUMA_NODE):
        return _select_of_node(state, request)
    if request.count is not None:
        return request.ids, [
            Refusal("count", "a count goes with a NUMA node", (), "add --numa-node, or name the vCPU ids")
        ]
    refusals = checks.check_range(state, request.ids)
    ids = [number for number in request.ids if number in state.by_id]
    if request.has(VcpuFlag.CORE):
        ids = sorted({number for vcpu_id in ids for number in core_of(state, vcpu_id)})
    return tuple(dict.fromkeys(ids if request.has(VcpuFlag.CORE) else request.ids)), refusals


def core_of(state: DomainState, vcpu_id: int) -> tuple[int, ...]:
    """Every vCPU id of the core that holds this one: an entity on ppc64, its threads on x86."""
    entity = state.by_id[vcpu_id]
    if len(entity.ids) > 1 or entity.props is None or "thread-id" not in entity.props:
        return entity.ids
    key = _core_key(entity)
    return tuple(number for e in state.entities if _core_key(e) == key for number in e.ids)


def _core_key(entity: Entity) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (level, value) for level, value in sorted((entity.props or {}).items()) if level not in _NOT_OF_CORE
    )


_NOT_OF_CORE = frozenset({"thread-id", "node-id"})


def _select_of_node(state: DomainState, request: Request) -> tuple[tuple[int, ...], list[Refusal]]:
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
        groups = _cores_of_node(state, members, request)
        unit = "core"
    else:
        groups = [(vcpu.id,) for vcpu in members if _wanted(vcpu, request)]
        unit = "vCPU"
    if request.disable:
        groups.reverse()
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


def _wanted(vcpu: Vcpu, request: Request) -> bool:
    return not vcpu.enabled if request.enable else vcpu.enabled and vcpu.hotpluggable


def _cores_of_node(state: DomainState, members: Sequence[Vcpu], request: Request) -> list[tuple[int, ...]]:
    """Cores that lie on the node whole and have something to switch, lowest first."""
    on_node = {vcpu.id for vcpu in members}
    cores = sorted({core_of(state, vcpu.id) for vcpu in members})
    return [
        core
        for core in cores
        if on_node.issuperset(core)
        and (
            any(not state.vcpus[number].enabled for number in core)
            if request.enable
            else all(state.vcpus[n].hotpluggable or not state.vcpus[n].enabled for n in core)
            and any(state.vcpus[n].enabled for n in core)
        )
    ]
