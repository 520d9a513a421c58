"""State and request -> the steps to take, and every reason not to. Touches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qmpvcpu.core.model import LIBVIRT_DRIVER, DomainState, Entity, format_ids
from qmpvcpu.core.planning.config import ConfigPlan
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules import catalogue, hotplug
from qmpvcpu.core.rules.agent import check_guest
from qmpvcpu.core.rules.placement import Placement
from qmpvcpu.core.rules.request import check_request
from qmpvcpu.core.rules.selection import choose
from qmpvcpu.core.state.guest_view import GuestView
from qmpvcpu.core.state.knowledge import Knowledge
from qmpvcpu.errors import Refusal
from qmpvcpu.flags import VcpuFlag


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be done: `plugs` and `unplugs` in the order in which they are sent, or the
    refusals.

    `targets` is every vCPU id the request is about; `unchanged` those that already are as
    requested. `onlines` and `offlines` are vCPU ids that the guest agent switches.
    """

    request: Request
    targets: tuple[int, ...]
    plugs: tuple[Entity, ...] = ()
    unplugs: tuple[Entity, ...] = ()
    awaited: tuple[Entity, ...] = ()
    onlines: tuple[int, ...] = ()
    offlines: tuple[int, ...] = ()
    unchanged: tuple[int, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    messages: tuple[str, ...] = ()
    #: The placements of the vCPUs that are to be plugged, or that are plugged and were never
    #: placed.
    placed: Mapping[int, Placement] = field(default_factory=dict)
    #: Those of `unchanged` that were to be disabled, and are plugged but already offline in the
    #: guest.
    offline_already: tuple[int, ...] = ()
    #: Each vCPU id that is to change -> whether it is to be enabled (online, with GUEST).
    wants: Mapping[int, bool] = field(default_factory=dict)
    #: Whether the plan depends on the guest's own view: a vCPU that is to be enabled is plugged, or
    #: hotplug cannot do a part of it, and the guest agent perhaps can.
    asks_guest: bool = False
    #: The change of the definition.
    config: ConfigPlan | None = None

    def with_config(self, config: ConfigPlan, *, alone: bool) -> Plan:
        """This plan with the change of the definition; `alone`: that is all of it."""
        return replace(
            self,
            config=config,
            targets=config.targets if alone else self.targets,
            unchanged=config.unchanged if alone else self.unchanged,
            refusals=(
                *self.refusals,
                *(refusal for refusal in config.refusals if refusal not in self.refusals),
            ),
            messages=(*self.messages, *config.messages),
        )

    def refused(self, more: Sequence[Refusal]) -> Plan:
        """This plan with more refusals, before its own."""
        return replace(self, refusals=(*more, *self.refusals)) if more else self

    @property
    def moves_cpus(self) -> bool:
        """Whether QEMU plugs or unplugs any."""
        return bool(self.plugs or self.unplugs or self.awaited)

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
                "arguments": {
                    "driver": entity.driver,
                    "id": entity.device_id,
                    **dict(entity.props or {}),
                },
            }
            for entity in (*self.awaited, *self.plugs)
        ]
        steps += [
            {
                "step": "device_del",
                "vcpus": list(entity.ids),
                "arguments": {"id": entity.unplug_name},
            }
            for entity in self.unplugs
        ]
        steps += [
            {"step": "guest-set-vcpus", "vcpus": list(ids), "online": online}
            for ids, online in ((self.onlines, True), (self.offlines, False))
            if ids
        ]
        steps += [
            {"step": "place", "vcpus": [number], **placement.to_json()}
            for number, placement in self.placed.items()
            if placement
        ]
        if self.config is not None:
            steps += self.config.steps
        return steps

    def to_json(self) -> dict[str, Any]:
        """The document of `setvcpu --dry-run --json`."""
        return {
            "plan": self.steps,
            "refusals": [refusal.message for refusal in self.refusals],
            "vcpus": sorted(
                {*self.targets, *(self.config.targets if self.config is not None else ())}
            ),
            "unchanged": list(self.unchanged),
            "messages": list(self.messages),
            "diff": [] if self.config is None else list(self.config.diff),
        }

    def describe(self) -> list[str]:
        """The steps as lines for the user."""
        lines = [f"wait until the unplug of {entity.label} has ended" for entity in self.awaited]
        lines += [
            f"plug {entity.label}: {_plug_words(entity)}" for entity in (*self.awaited, *self.plugs)
        ]
        lines += [f"unplug {entity.label}: {_unplug_words(entity)}" for entity in self.unplugs]
        lines += [
            f"take vCPU {format_ids(ids)} {word} in the guest: guest-set-vcpus"
            for ids, word in ((self.onlines, "online"), (self.offlines, "offline"))
            if ids
        ]
        lines += [
            f"place vCPU {number}: {placement}"
            for number, placement in self.placed.items()
            if placement
        ]
        if self.config is not None:
            lines += [*self.config.describe(), *self.config.diff]
        is_live = self.config is None or self.plugs or self.unplugs
        if is_live and (self.unchanged or not (lines or self.refusals)):
            lines += self.already()
        return lines

    def already(self) -> list[str]:
        """Lines for the user about what already is as requested, in the words of the request."""
        is_guest = self.request.has(VcpuFlag.GUEST)
        if self.request.total is not None:
            total = self.request.total
            some = "1 vCPU is" if total == 1 else f"{total} vCPUs are"
            if self.offline_already:
                rest = f"vCPU {format_ids(self.offline_already)} plugged and offline in the guest"
                return [f"nothing to do: {some} online already, and {rest}"]
            return [
                f"nothing to do: {some} {'online in the guest' if is_guest else 'enabled'} already"
            ]
        on, off = (
            ("online in the guest", "offline in the guest") if is_guest else ("enabled", "disabled")
        )
        words: dict[str, list[int]] = {}
        for number in self.unchanged:
            word = on if self.wants.get(number) else off
            words.setdefault(
                "offline in the guest" if number in self.offline_already else word, []
            ).append(number)
        return [f"vCPU {format_ids(ids)}: already {word}" for word, ids in words.items()]


def _plug_words(entity: Entity) -> str:
    if entity.driver == LIBVIRT_DRIVER:
        return f"{entity.driver} {format_ids(entity.ids)}, 1"
    props = "".join(f",{key}={value}" for key, value in (entity.props or {}).items())
    return f"device_add {entity.driver},id={entity.device_id}{props}"


def _unplug_words(entity: Entity) -> str:
    if entity.driver == LIBVIRT_DRIVER:
        return f"{entity.driver} {format_ids(entity.ids)}, 0"
    return f"device_del {entity.unplug_name}"


def make_plan(state: DomainState, request: Request, known: Knowledge | None = None) -> Plan:
    """Select the vCPUs, find what is to be done, and collect every refusal."""
    known = known or Knowledge()
    guest = known.guest
    targets, wants, found = choose(state, request, known)
    refusals = check_request(request) + found
    if request.has(VcpuFlag.GUEST):
        return _plan_guest(state, request, guest, targets, wants, refusals)
    only_config = request.has(VcpuFlag.CONFIG) and not request.has(VcpuFlag.LIVE)
    if not wants or only_config:
        # A query, or a request for the definition alone, has no live steps.
        return Plan(request, targets, refusals=tuple(refusals))
    steps = _steps(state, wants, known)
    if request.total is not None:
        # A count is only about the vCPUs that move.
        steps = replace(steps, unchanged=[])
        targets = tuple(sorted({*(n for e in steps.moved for n in e.ids), *steps.onlines}))
    if steps.onlines and not request.fallback and request.listed is None:
        refusals.append(catalogue.ONLY_THE_AGENT(steps.onlines))
    moved = {number for entity in steps.moved for number in entity.ids}
    refusals += hotplug.check_whole_entities(
        state, [number for number in targets if number in moved], request.flags
    )
    refusals += hotplug.check_plug(state, steps.plugs)
    blocked = hotplug.check_unplug(state, steps.unplugs)
    if not request.force:
        blocked += hotplug.check_hotplug_mode(state, steps.unplugs, known)
    asks_guest = bool(steps.plugged_already) or (bool(blocked) and request.fallback)
    asks_guest |= request.enable and request.has(VcpuFlag.NUMA_NODE)
    if blocked and guest is not None and request.fallback:
        steps, blocked = _fallen_back(state, steps, blocked, guest)
    refusals += blocked
    kills = hotplug.check_kills_on_plug(state, [*steps.awaited, *steps.plugs], known)
    kills += hotplug.check_kills_on_unplug(state, steps.unplugs, known)
    if not request.force:
        refusals += kills
    messages = hotplug.warnings(state, [*steps.awaited, *steps.plugs], steps.unplugs, known)
    messages += [f"forced: {kill.message}" for kill in kills if request.force]
    return Plan(
        request=request,
        targets=targets,
        plugs=tuple(steps.plugs),
        unplugs=tuple(steps.unplugs),
        awaited=tuple(steps.awaited),
        onlines=tuple(steps.onlines),
        offlines=tuple(steps.offlines),
        unchanged=tuple(sorted(steps.unchanged)),
        refusals=tuple(refusals),
        messages=tuple(messages),
        offline_already=tuple(steps.offline_already),
        wants=wants,
        asks_guest=asks_guest,
    )


@dataclass(frozen=True, slots=True)
class _Steps:
    """What is to be done, by kind; `plugged_already` are vCPUs that are to be enabled and already
    plugged.
    """

    plugs: list[Entity] = field(default_factory=list)
    unplugs: list[Entity] = field(default_factory=list)
    awaited: list[Entity] = field(default_factory=list)
    onlines: list[int] = field(default_factory=list)
    offlines: list[int] = field(default_factory=list)
    unchanged: list[int] = field(default_factory=list)
    offline_already: list[int] = field(default_factory=list)
    plugged_already: list[int] = field(default_factory=list)

    @property
    def moved(self) -> tuple[Entity, ...]:
        """What is plugged or unplugged."""
        return (*self.awaited, *self.plugs, *self.unplugs)


def _steps(state: DomainState, wants: Mapping[int, bool], known: Knowledge) -> _Steps:
    """What must be done for each vCPU, given what is plugged, pending and online now."""
    steps = _Steps()
    for entity in state.entities_of(wants):
        meant = [number for number in entity.ids if number in wants]
        on = wants[meant[0]]
        if on and entity.id in known.pending and entity.plugged:
            steps.awaited.append(entity)
        elif entity.plugged != on:
            (steps.plugs if on else steps.unplugs).append(entity)
        else:
            # One that is plugged, but offline in the guest, does not count as enabled.
            offline = [
                n
                for n in meant
                if on and known.guest is not None and known.guest.online(n) is False
            ]
            steps.onlines.extend(offline)
            steps.unchanged.extend(number for number in meant if number not in offline)
            steps.plugged_already.extend(meant if on else ())
    return steps


def _fallen_back(
    state: DomainState, steps: _Steps, blocked: list[Refusal], guest: GuestView
) -> tuple[_Steps, list[Refusal]]:
    """Let the guest take offline what hotplug cannot unplug: the vCPU stays plugged."""
    hopeless = {number for refusal in blocked for number in refusal.ids}
    stuck = [entity for entity in steps.unplugs if hopeless.intersection(entity.ids)]
    ids = [number for entity in stuck for number in entity.ids]
    offline = [number for number in ids if guest.online(number) is False]
    against = check_guest(state, ids, guest, online=False)
    steps = replace(
        steps,
        unplugs=[entity for entity in steps.unplugs if entity not in stuck],
        offlines=[number for number in ids if number not in offline],
        unchanged=[*steps.unchanged, *offline],
        offline_already=offline,
    )
    return steps, [*blocked, *against] if against else []


def _plan_guest(
    state: DomainState,
    request: Request,
    guest: GuestView | None,
    targets: tuple[int, ...],
    wants: Mapping[int, bool],
    refusals: list[Refusal],
) -> Plan:
    """Plan a request with GUEST: CPUs are taken online or offline in the guest only."""
    if guest is None or refusals or not wants:
        return Plan(request, targets, refusals=tuple(refusals), wants=wants)
    online = next(iter(wants.values()))
    refusals = check_guest(state, targets, guest, online=online)
    moved = tuple(number for number in targets if guest.online(number) is not online)
    return Plan(
        request,
        targets,
        onlines=moved if online else (),
        offlines=() if online else moved,
        unchanged=tuple(number for number in targets if number not in moved),
        refusals=tuple(refusals),
        wants=wants,
    )
