"""CONFIG: how a request changes a definition, and every reason why it cannot. Pure.

The rules are those of libvirt's qemu driver (`qemuDomainSetVcpuConfig`, `qemuDomainSetVcpusConfig`,
`qemuDomainVcpuValidateConfig`), except that a request for what already is so succeeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qmpvcpu.core.definition import Definition, VcpuConfig, state_of
from qmpvcpu.core.model import format_ids
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.config import check_maximum, check_order, check_total
from qmpvcpu.core.rules.hotplug import check_whole_entities
from qmpvcpu.core.rules.request import check_range
from qmpvcpu.core.rules.selection import select, select_listed
from qmpvcpu.errors import Refusal


@dataclass(frozen=True, slots=True)
class ConfigPlan:
    """The definition before and after the request.

    `targets` is every vCPU id the request is about, `changed` those that it switches, `unchanged`
    those that already are as requested.
    """

    old: Definition
    new: Definition
    targets: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()
    unchanged: tuple[int, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    messages: tuple[str, ...] = ()
    #: The document before and after, as a unified diff, if that was requested.
    diff: tuple[str, ...] = ()

    @property
    def writes(self) -> bool:
        """Whether there is anything to write."""
        return self.new != self.old

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The steps as JSON data."""
        if not self.writes or self.refusals:
            return []
        steps: list[dict[str, Any]] = []
        if self.new.maxcpus != self.old.maxcpus:
            steps.append({"step": "set-maximum", "vcpus": [], "maximum": self.new.maxcpus})
        steps += [
            {"step": "define", "vcpus": [n for n in self.changed if n in on], "state": word}
            for word, on in self._sides
            if on.intersection(self.changed)
        ]
        return steps or [{"step": "define", "vcpus": []}]

    def describe(self) -> list[str]:
        """The steps as lines for the user."""
        lines = []
        if self.new.maxcpus != self.old.maxcpus:
            lines.append(
                f"in the definition: at most {self.new.maxcpus} vCPUs, not {self.old.maxcpus}"
            )
        lines += [
            f"in the definition: vCPU {format_ids(ids)} {word}"
            for word, on in self._sides
            if (ids := on.intersection(self.changed))
        ]
        if self.new.pins != self.old.pins:
            for number in self.changed:
                cpus = self.new.pins.get(number)
                word = (
                    f"pinned to host CPU {format_ids(cpus)}" if cpus is not None else "not pinned"
                )
                lines.append(f"in the definition: vCPU {number} {word}")
        if self.writes and not lines:
            lines.append("in the definition: order and hotpluggable of vCPUs")
        if self.unchanged and not self.writes:
            lines.append(
                f"in the definition: vCPU {format_ids(self.unchanged)} already as requested"
            )
        return lines

    @property
    def _sides(self) -> tuple[tuple[str, set[int]], ...]:
        on = set(self.new.enabled_ids)
        return ("enabled", on), (
            "disabled",
            set(range(max(self.old.maxcpus, self.new.maxcpus))) - on,
        )


def plan_config(
    definition: Definition, request: Request, ids: Sequence[int] | None = None
) -> ConfigPlan:
    """The definition after `request`.

    Args:
        definition: before it.
        request: what is requested; `planning.live` plans its LIVE side.
        ids: the vCPU ids it means, if the running guest's state has decided that.
    """
    if request.maximum:
        return _plan_maximum(definition, request)
    if request.listed is not None:
        return _plan_listed(definition, request)
    if request.total is not None:
        return _plan_total(definition, request)
    state = state_of(definition)
    ids, refusals = select(state, request) if ids is None else (tuple(ids), check_range(state, ids))
    known = [number for number in ids if number in state.by_id]
    changed = tuple(
        number for number in known if definition.vcpus[number].enabled is not request.enable
    )
    refusals += check_whole_entities(state, changed, request.flags)
    if request.disable and 0 in changed:
        refusals.append(catalogue.CONFIG_VCPU_0((0,)))
    else:
        refusals += check_order(definition, changed)
    return ConfigPlan(
        definition,
        definition.switched(changed, request.enable) if changed and not refusals else definition,
        ids,
        changed,
        tuple(number for number in known if number not in changed),
        tuple(refusals),
    )


def _plan_total(definition: Definition, request: Request) -> ConfigPlan:
    """`request.total` vCPUs: the lowest disabled are enabled or the highest enabled disabled, in
    whole cores.
    """
    total = request.total
    assert total is not None
    refusals = check_total(definition, total)
    if refusals:
        return ConfigPlan(definition, definition, refusals=tuple(refusals))
    size = definition.granularity
    now = len(definition.enabled_ids)
    cores = [definition.vcpus[first : first + size] for first in range(0, definition.maxcpus, size)]
    chosen: list[int] = []
    enable = total > now
    for core in cores if enable else reversed(cores):
        if now == total:
            break
        ids = [vcpu.id for vcpu in core if vcpu.enabled is not enable]
        if (now + len(ids) > total) if enable else (now - len(ids) < total):
            low, high = (now, now + len(ids)) if enable else (now - len(ids), now)
            refusals = [
                catalogue.DEFINED_WHOLE_CORES(total=total, size=size, below=low, above=high)
            ]
            return ConfigPlan(definition, definition, refusals=tuple(refusals))
        chosen += ids
        now += len(ids) if enable else -len(ids)
    if not chosen:
        return ConfigPlan(definition, definition)
    vcpus = [replace(vcpu, order=None) for vcpu in definition.vcpus]
    # vCPUs that cannot be unplugged must be the first ones: after a hotpluggable one all are
    # hotpluggable.
    pluggable = request.hotpluggable
    for number, vcpu in enumerate(definition.vcpus):
        if number in chosen:
            vcpus[number] = VcpuConfig(number, enable, hotpluggable=pluggable or not enable)
        elif vcpu.enabled and vcpu.hotpluggable and enable:
            pluggable = True
    changed = tuple(sorted(chosen))
    return ConfigPlan(definition, replace(definition, vcpus=tuple(vcpus)), changed, changed)


def _plan_listed(definition: Definition, request: Request) -> ConfigPlan:
    """Take every vCPU's state from a file, and order and hotpluggable too if both documents have
    them.
    """
    assert request.listed is not None
    targets, refusals = select_listed(state_of(definition), request)
    if refusals:
        return ConfigPlan(definition, definition, targets, refusals=tuple(refusals))
    listed = request.listed.vcpus
    changed = tuple(n for n in targets if definition.vcpus[n].enabled is not listed[n].enabled)
    if request.listed.exact and definition.dialect != "rfc":
        new = replace(definition, vcpus=listed)
    else:
        new = definition
        for on in (False, True):
            ids = tuple(number for number in changed if listed[number].enabled is on)
            new = new.switched(ids, on) if ids else new
    if not listed[0].enabled:
        refusals.append(catalogue.CONFIG_VCPU_0((0,)))
    return ConfigPlan(
        definition,
        definition if refusals else new,
        targets,
        changed,
        tuple(number for number in targets if number not in changed),
        tuple(refusals),
    )


def plan_pin(definition: Definition, vcpu_id: int, cpus: tuple[int, ...] | None) -> ConfigPlan:
    """`<vcpupin>` of one vCPU; None removes it."""
    refusals = check_range(state_of(definition), (vcpu_id,))
    pins = {number: pin for number, pin in definition.pins.items() if number != vcpu_id}
    if cpus is not None:
        pins[vcpu_id] = cpus
    new = definition if refusals else replace(definition, pins=dict(sorted(pins.items())))
    changed = (vcpu_id,) if new != definition else ()
    unchanged = () if changed or refusals else (vcpu_id,)
    return ConfigPlan(definition, new, (vcpu_id,), changed, unchanged, tuple(refusals))


def _plan_maximum(definition: Definition, request: Request) -> ConfigPlan:
    """Another number of vCPU ids (`qemuDomainSetVcpusMax`)."""
    maximum = request.total
    assert maximum is not None
    refusals = check_maximum(definition, maximum)
    if refusals or maximum == definition.maxcpus:
        return ConfigPlan(definition, definition, refusals=tuple(refusals))
    vcpus = [replace(vcpu, order=None) for vcpu in definition.vcpus[:maximum]]
    vcpus += [
        VcpuConfig(number, enabled=False, hotpluggable=True)
        for number in range(len(vcpus), maximum)
    ]
    removed = tuple(number for number in definition.enabled_ids if number >= maximum)
    notes = (
        (f"vCPU {format_ids(removed)} was enabled in the definition, and no longer exists",)
        if removed
        else ()
    )
    new = replace(
        definition,
        vcpus=tuple(vcpus),
        pins={number: cpus for number, cpus in definition.pins.items() if number < maximum},
        schedulers={
            number: word for number, word in definition.schedulers.items() if number < maximum
        },
    )
    return ConfigPlan(definition, new, removed, removed, messages=notes)
