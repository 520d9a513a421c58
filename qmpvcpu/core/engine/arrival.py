"""How plugged vCPUs come to the guest: what it says of them, look after look, until it runs on them. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from qmpvcpu.core.arch import architecture
from qmpvcpu.core.engine.agent_switch import Switch
from qmpvcpu.core.model import DomainState
from qmpvcpu.core.state.guest_view import GuestCpu, GuestView, newcomers


@dataclass(frozen=True, slots=True)
class Arrival:
    """How plugged vCPUs came to the guest.

    Attributes:
        missing: vCPU ids that it does not run on.
        unknown: vCPU ids for which this is not known, because its CPUs cannot be told apart.
        last: what it said last.
        view: its CPUs.
    """

    missing: frozenset[int]
    unknown: frozenset[int]
    last: str | None
    view: GuestView


class Arriving:
    """vCPUs that the guest is to come to run on.

    Args:
        state: with them.
        vcpus: their ids.
        before: the guest before they came, where only that tells which CPUs have come.
    """

    def __init__(self, state: DomainState, vcpus: Collection[int], before: GuestView | None) -> None:
        self._vcpus = frozenset(vcpus)
        self._missing = set(vcpus)
        self._before = before
        self._come: tuple[GuestCpu, ...] = ()
        self._lists_all = architecture(state.arch).lists_possible_cpus
        self._enabled = len(state.enabled_ids)
        #: Whether any was missing at an earlier look.
        self.was_missing = False
        #: What the guest said last of one that does not come.
        self.last: str | None = None

    def seen(self, view: GuestView) -> GuestView:
        """What the guest says now; the same, with what its newcomers tell."""
        self._come = ()
        if self._before is not None and view.assumed:
            come = newcomers(self._before, view, lists_all=self._lists_all)
            if len(come) > len(self._vcpus):
                # Others have come too: nobody can say whose is whose.
                self._before = None
            self._come = come if len(come) == len(self._vcpus) else ()
        if self._come and all(cpu.online for cpu in self._come):
            view = replace(view, all_online=view.all_online | self._vcpus)
        self._missing = {number for number in self._missing if view.online(number) is not True}
        return view

    def offline(self, view: GuestView) -> list[int]:
        """vCPU ids that the guest has offline."""
        return sorted(number for number in self._missing if view.online(number) is False)

    def offline_newcomers(self) -> list[int]:
        """The same by the guest's own numbers, where nothing tells which vCPU is which."""
        return [cpu.logical_id for cpu in self._come if not cpu.online]

    def switched(self, run: Switch, view: GuestView) -> GuestView:
        """The agent has taken some online; the view with them."""
        self._missing -= set(run.changed)
        self.last = next(iter(run.failures.values()), self.last)
        return view.switched(run.changed, online=True)

    def arrival(self, view: GuestView) -> Arrival:
        """How it stands."""
        self.was_missing |= bool(self._missing)
        unknown = self._unnamed(view) if self._before is None else frozenset()
        return Arrival(frozenset(self._missing - unknown), unknown, self.last, view)

    def is_over(self, view: GuestView) -> bool:
        """Whether all have come, or no use to wait: where nothing tells the guest's CPUs apart, that does not
        change once they are all there.
        """
        if not self._missing:
            return True
        # `newcomers` identifies the CPUs that came. If there are none, these vCPUs are the missing ones.
        is_told = self._before is not None or not view.assumed
        return not is_told and self._missing == self._unnamed(view) and len(view.cpus) >= self._enabled

    def _unnamed(self, view: GuestView) -> frozenset[int]:
        found = frozenset(number for number in self._missing if view.online(number) is None)
        return found if len(found) <= view.strays else frozenset()
