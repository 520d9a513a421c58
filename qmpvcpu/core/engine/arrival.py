"""Whether the guest runs on newly plugged vCPUs, by one list of its CPUs after the other. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.engine.agent_switch import Switch
from qmpvcpu.core.model import DomainState
from qmpvcpu.core.state.guest_view import GuestCpu, GuestView, newcomers


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

    def __init__(self, state: DomainState, vcpus: Collection[int], before: GuestView | None) -> None:
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
        return not is_identified and self._missing == self._unnamed(view) and len(view.cpus) >= self._enabled

    def _unnamed(self, view: GuestView) -> frozenset[int]:
        found = frozenset(number for number in self._missing if view.online(number) is None)
        return found if len(found) <= view.strays else frozenset()
