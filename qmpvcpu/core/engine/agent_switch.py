"""CPUs of the guest: taken online or offline through its agent, and awaited after a plug. Pure.

`Switch` is the transaction with the agent. `guest-set-vcpus` stops at the first CPU that fails,
keeps what it changed, and reports only how many those were: so the CPU that failed is set again
alone, which gives the reason. What counts in the end is a fresh list of the guest's CPUs. If a CPU
did not change, those that did are set back, and another fresh list verifies that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.model import DomainState
from qmpvcpu.core.state.guest_view import GuestCpu, GuestView, newcomers


class SwitchStep(Enum):
    """What the transaction waits for."""

    SET = "guest-set-vcpus"
    WHY = "guest-set-vcpus of the one that failed"
    CHECK = "guest-get-vcpus"
    UNDO = "undo: guest-set-vcpus"
    CHECK_UNDO = "undo: guest-get-vcpus"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class SetCpus:
    """Effect: `guest-set-vcpus`, logical id -> online, in this order."""

    wanted: Mapping[int, bool]


@dataclass(frozen=True, slots=True)
class GetCpus:
    """Effect: `guest-get-vcpus`, to be answered with `Seen`."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Input: how many CPUs the agent reports as set, or its error."""

    count: object = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """Input: the guest's CPUs now."""

    cpus: Sequence[GuestCpu]


Effect = SetCpus | GetCpus


@dataclass(slots=True)
class Switch:
    """The transaction: `start()`, then `feed()` until `step` is DONE.

    Args:
        view: the guest's CPUs before; it has every one of `vcpus`.
        vcpus: vCPU ids, in the order in which they are switched.
        online: whether they are taken online.

    `changed`, `undone` and `remaining` are vCPU ids at the end; `failures` maps each that did not
    change to the guest's reason, `undo_failures` each that could not be set back to the reason, if
    there is one.
    """

    view: GuestView
    vcpus: Sequence[int]
    online: bool
    step: SwitchStep = SwitchStep.SET
    changed: tuple[int, ...] = ()
    undone: tuple[int, ...] = ()
    remaining: tuple[int, ...] = ()
    failures: dict[int, str] = field(default_factory=dict)
    undo_failures: dict[int, str] = field(default_factory=dict)
    _left: list[int] = field(default_factory=list)
    _todo: tuple[int, ...] = ()

    def start(self) -> Effect | None:
        """The first effect; None if nothing has to change."""
        self._todo = tuple(vcpu for vcpu in self.vcpus if self.view.online(vcpu) is not self.online)
        self._left = list(self._todo)
        if not self._todo:
            self.step = SwitchStep.DONE
            return None
        return self._set(self._left, self.online)

    def feed(self, happened: Answered | Seen) -> Effect | None:
        """What happened -> what to do next; None at the end."""
        if isinstance(happened, Seen):
            return self._seen({cpu.logical_id: cpu.online for cpu in happened.cpus})
        if self.step is SwitchStep.UNDO:
            return self._undone(happened)
        return self._answered(happened)

    def _undone(self, answer: Answered) -> Effect:
        """A CPU that cannot be set back does not keep the others from it."""
        count = (
            answer.count
            if type(answer.count) is int and 0 <= answer.count <= len(self._left)
            else 0
        )
        if answer.error is not None:
            self.undo_failures[self._left[0]] = answer.error
        del self._left[: 1 if answer.error is not None else count + 1]
        if self._left:
            return self._set(self._left, not self.online)
        self.step = SwitchStep.CHECK_UNDO
        return GetCpus()

    def _answered(self, answer: Answered) -> Effect:
        why = self.step is SwitchStep.WHY
        requested = 1 if why else len(self._left)
        count = answer.count if type(answer.count) is int and 0 <= answer.count <= requested else 0
        if answer.error is not None:
            self.failures[self._left[0]] = answer.error
        elif count < requested and not why:
            del self._left[:count]
            self.step = SwitchStep.WHY
            return SetCpus({self._logical(self._left[0]): self.online})
        elif why and count == 1 and len(self._left) > 1:
            del self._left[0]
            self.step = SwitchStep.SET
            return self._set(self._left, self.online)
        self.step = SwitchStep.CHECK
        return GetCpus()

    def _seen(self, now: Mapping[int, bool]) -> Effect | None:
        followed = [vcpu for vcpu in self._todo if now.get(self._logical(vcpu)) is self.online]
        if self.step is SwitchStep.CHECK_UNDO:
            self.remaining = tuple(followed)
            self.undone = tuple(vcpu for vcpu in self.changed if vcpu not in followed)
            self.changed = self.remaining
        else:
            self.changed = tuple(followed)
            untried = self._left[1:] if self.failures else []
            # A CPU that did not have to change may have changed since: the call promises it for all
            # of them.
            self.failures = {
                vcpu: "not tried, because another one failed"
                if vcpu in untried
                else self.failures.get(vcpu, "the guest did not change it, and gave no reason")
                for vcpu in self.vcpus
                if now.get(self._logical(vcpu)) is not self.online
            }
            if self.failures and self.changed:
                self.step = SwitchStep.UNDO
                self._left = list(self.changed)
                return self._set(self._left, not self.online)
        self.step = SwitchStep.DONE
        return None

    def _logical(self, vcpu: int) -> int:
        return self.view.by_vcpu[vcpu].logical_id

    def _set(self, vcpus: Sequence[int], online: bool) -> SetCpus:
        return SetCpus({self._logical(vcpu): online for vcpu in vcpus})


# -- new CPUs --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrival:
    """Which of the plugged vCPUs the guest runs on.

    Attributes:
        missing: vCPU ids that it does not run on.
        unknown: vCPU ids for which this is not known, because its CPUs cannot be identified.
        last: its last error about one of them.
        view: its CPUs.
    """

    missing: frozenset[int]
    unknown: frozenset[int]
    last: str | None
    view: GuestView


class Arriving:
    """Plugged vCPUs until the guest runs on them.

    Args:
        state: with these vCPUs plugged.
        vcpus: their ids.
        before: the guest's CPUs before the plug, if only the difference identifies the new ones.
    """

    def __init__(
        self, state: DomainState, vcpus: Collection[int], before: GuestView | None
    ) -> None:
        self._vcpus = frozenset(vcpus)
        self._missing = set(vcpus)
        self._before = before
        self._new: tuple[GuestCpu, ...] = ()
        self._lists_all = architecture(state.arch).lists_possible_cpus
        self._enabled = len(state.enabled_ids)
        #: Whether any was missing in an earlier list.
        self.was_missing = False
        #: The guest's last error about one that is missing.
        self.last: str | None = None

    def seen(self, view: GuestView) -> GuestView:
        """Take in the guest's CPUs as they are now; return them with what the new ones prove."""
        self._new = ()
        if self._before is not None and view.assumed:
            new_cpus = newcomers(self._before, view, lists_all=self._lists_all)
            if len(new_cpus) > len(self._vcpus):
                # Other CPUs have come too, so the new ones cannot be identified.
                self._before = None
            self._new = new_cpus if len(new_cpus) == len(self._vcpus) else ()
        if self._new and all(cpu.online for cpu in self._new):
            view = replace(view, all_online=view.all_online | self._vcpus)
        self._missing = {number for number in self._missing if view.online(number) is not True}
        return view

    def offline(self, view: GuestView) -> list[int]:
        """The vCPU ids that are offline in the guest."""
        return sorted(number for number in self._missing if view.online(number) is False)

    def offline_newcomers(self) -> list[int]:
        """The same by the guest's own ids, where its CPUs cannot be identified."""
        return [cpu.logical_id for cpu in self._new if not cpu.online]

    def switched(self, run: Switch, view: GuestView) -> GuestView:
        """Take in which ones the agent has taken online; return the view with them."""
        self._missing -= set(run.changed)
        self.last = next(iter(run.failures.values()), self.last)
        return view.switched(run.changed, online=True)

    def arrival(self, view: GuestView) -> Arrival:
        """The result so far."""
        self.was_missing |= bool(self._missing)
        unknown = self._unnamed(view) if self._before is None else frozenset()
        return Arrival(frozenset(self._missing - unknown), unknown, self.last, view)

    def is_over(self, view: GuestView) -> bool:
        """Whether waiting is over: the guest runs on all of them, or it has all its CPUs, and they
        cannot be identified.
        """
        if not self._missing:
            return True
        # `newcomers` identifies the CPUs that came. If there are none, these vCPUs are the missing
        # ones.
        is_identified = self._before is not None or not view.assumed
        return (
            not is_identified
            and self._missing == self._unnamed(view)
            and len(view.cpus) >= self._enabled
        )

    def _unnamed(self, view: GuestView) -> frozenset[int]:
        found = frozenset(number for number in self._missing if view.online(number) is None)
        return found if len(found) <= view.strays else frozenset()
