"""State and request -> the steps to take, and every reason why not. Touches nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qmpvcpu.core import checks
from qmpvcpu.core.config import ConfigPlan
from qmpvcpu.core.model import LIBVIRT_DRIVER, DomainState, Entity, format_ids
from qmpvcpu.core.placement import Placement
from qmpvcpu.core.request import Knowledge, Request
from qmpvcpu.core.select import resolve_guest_total, resolve_total, select, select_listed
from qmpvcpu.errors import Refusal
from qmpvcpu.flags import VcpuFlag

__all__ = ["Plan", "make_plan", "unplug_name"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be done: `plugs` and `unplugs` in the order they are sent, and why not, if not.

    `targets` is every vCPU id the request is about; `unchanged` those that are already as asked. `onlines` and
    `offlines` are vCPU ids that the guest agent switches.
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
    #: What the threads of these vCPUs are given, of those that are plugged, or are and were never placed.
    placed: Mapping[int, Placement] = field(default_factory=dict)
    #: Whether hotplug cannot do a part of it, and the guest agent perhaps can.
    hopeless: bool = False
    #: What becomes of the definition.
    config: ConfigPlan | None = None

    def with_config(self, config: ConfigPlan, *, alone: bool) -> Plan:
        """This plan with what becomes of the definition, which may be all of it."""
        return replace(
            self,
            config=config,
            targets=config.targets if alone else self.targets,
            unchanged=config.unchanged if alone else self.unchanged,
            refusals=(*self.refusals, *(refusal for refusal in config.refusals if refusal not in self.refusals)),
            messages=(*self.messages, *config.messages),
        )

    def refused(self, more: Sequence[Refusal]) -> Plan:
        """This plan, with more reasons not to do it, in front of its own."""
        return replace(self, refusals=(*more, *self.refusals)) if more else self

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
            "vcpus": sorted({*self.targets, *(self.config.targets if self.config is not None else ())}),
            "unchanged": list(self.unchanged),
            "messages": list(self.messages),
            "diff": [] if self.config is None else list(self.config.diff),
        }

    def describe(self) -> list[str]:
        """The steps as lines a person reads."""
        lines = [f"wait until the unplug of {entity.label} has ended" for entity in self.awaited]
        lines += [f"plug {entity.label}: {_plug_words(entity)}" for entity in (*self.awaited, *self.plugs)]
        lines += [f"unplug {entity.label}: {_unplug_words(entity)}" for entity in self.unplugs]
        if self.onlines:
            lines.append(f"take vCPU {format_ids(self.onlines)} online in the guest: guest-set-vcpus")
        if self.offlines:
            lines.append(f"take vCPU {format_ids(self.offlines)} offline in the guest: guest-set-vcpus")
        lines += [f"place vCPU {number}: {placement}" for number, placement in self.placed.items() if placement]
        if self.request.total is not None and not lines and not self.refusals and self.config is None:
            lines.append(f"{self.request.total} vCPUs are enabled already")
        if self.config is not None:
            lines += self.config.describe()
            lines += self.config.diff
        if self.unchanged and (self.config is None or self.plugs or self.unplugs):
            done = "so" if self.request.listed else "enabled" if self.request.enable else "disabled"
            lines.append(f"vCPU {format_ids(self.unchanged)}: already {done}")
        return lines


def _plug_words(entity: Entity) -> str:
    if entity.driver == LIBVIRT_DRIVER:
        return f"{entity.driver} {format_ids(entity.ids)}, 1"
    props = "".join(f",{key}={value}" for key, value in (entity.props or {}).items())
    return f"device_add {entity.driver},id={entity.device_id}{props}"


def _unplug_words(entity: Entity) -> str:
    if entity.driver == LIBVIRT_DRIVER:
        return f"{entity.driver} {format_ids(entity.ids)}, 0"
    return f"device_del {unplug_name(entity)}"


def unplug_name(entity: Entity) -> str:
    """What `device_del` calls it: the device id, or the QOM path of a CPU that was there at the start."""
    path = entity.qom_path or ""
    prefix = "/machine/peripheral/"
    return path[len(prefix) :] if path.startswith(prefix) else path


def make_plan(state: DomainState, request: Request, known: Knowledge | None = None) -> Plan:
    """Select the vCPUs, find what is to be done, and collect every reason not to do it."""
    known = known or Knowledge()
    refusals = checks.check_flags(request.flags, is_query=request.is_query) + checks.check_options(request)
    if request.listed is not None:
        targets, found = select_listed(state, request)
    elif request.total is not None and request.has(VcpuFlag.GUEST):
        request, found = resolve_guest_total(state, request, known)
        targets = request.ids
    elif request.total is not None:
        request, found = resolve_total(state, request, known)
        targets = request.ids
    else:
        targets, found = select(state, request)
    refusals += found
    enable, disable = request.enable, request.disable
    plugs: list[Entity] = []
    unplugs: list[Entity] = []
    awaited: list[Entity] = []
    unchanged: list[int] = []
    onlines: list[int] = []
    offlines: list[int] = []
    guest = known.guest
    blocked: list[Refusal] = []
    # The guest's own view and the persistent definition have other steps than the running guest.
    is_live = not request.has(VcpuFlag.GUEST) and (request.has(VcpuFlag.LIVE) or not request.has(VcpuFlag.CONFIG))
    if (enable != disable or request.listed is not None) and is_live:
        asked = set(targets)
        for entity in _entities(state, targets):
            on = request.wants(entity.first if entity.first in asked else min(asked.intersection(entity.ids)))
            if on and entity.first in known.pending and entity.plugged:
                awaited.append(entity)
            elif entity.plugged == on:
                same = [number for number in entity.ids if number in asked]
                # Plugged, and offline in the guest, is not enabled.
                dark = [
                    number for number in same if enable and guest is not None and guest.online(number) is False
                ]
                onlines += dark
                unchanged += [number for number in same if number not in dark]
            else:
                (plugs if on else unplugs).append(entity)
        if onlines and not request.fallback:
            refusals.append(checks.only_the_agent(onlines))
        moved = {number for entity in (*awaited, *plugs, *unplugs) for number in entity.ids}
        touched = [number for number in targets if number in moved]
        refusals += checks.check_whole_entities(state, touched, request.flags)
        refusals += checks.check_plug(state, plugs)
        blocked = checks.check_unplug(state, unplugs)
        if blocked and guest is not None and request.fallback:
            # What hotplug cannot do, the guest can: the vCPU stays plugged.
            hopeless = {number for refusal in blocked for number in refusal.ids}
            stuck = [entity for entity in unplugs if hopeless.intersection(entity.ids)]
            unplugs = [entity for entity in unplugs if entity not in stuck]
            ids = [number for entity in stuck for number in entity.ids]
            against = checks.check_guest(state, ids, guest, online=False)
            offlines += [number for number in ids if guest.online(number) is not False]
            unchanged += [number for number in ids if guest.online(number) is False]
            blocked = [*blocked, *against] if against else []
        refusals += blocked
        kills = checks.check_kills_on_plug(state, [*awaited, *plugs], known)
        kills += checks.check_kills_on_unplug(state, unplugs, known)
        refusals += [] if request.force else kills
    else:
        kills = []
    if enable != disable and request.has(VcpuFlag.GUEST) and guest is not None and not refusals:
        refusals += checks.check_guest(state, targets, guest, online=enable)
        moved_ids = [number for number in targets if guest.online(number) is not enable]
        unchanged = [number for number in targets if number not in moved_ids]
        (onlines if enable else offlines).extend(moved_ids)
    messages = checks.warnings(state, [*awaited, *plugs], unplugs)
    messages += [f"forced: {kill.message}" for kill in kills if request.force]
    return Plan(
        request=request,
        targets=tuple(targets),
        plugs=tuple(plugs),
        unplugs=tuple(unplugs),
        awaited=tuple(awaited),
        onlines=tuple(onlines),
        offlines=tuple(offlines),
        unchanged=tuple(unchanged),
        refusals=tuple(refusals),
        messages=tuple(messages),
        hopeless=bool(blocked),
    )


def _entities(state: DomainState, ids: Iterable[int]) -> list[Entity]:
    firsts = sorted({state.by_id[number].first for number in ids if number in state.by_id})
    return [state.by_id[first] for first in firsts]
