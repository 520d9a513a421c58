"""CPUs of the guest that are taken online or offline through its agent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from qmpvcpu.core.engine.agent_switch import Answered, GetCpus, Seen, Switch, SwitchStep
from qmpvcpu.core.state.guest_view import GuestCpu, GuestView

#: More commands than any switch of a few CPUs takes.
_MOST = 100


class Declined(Exception):
    """The error that the agent answers with."""


class Agent(Protocol):
    """The guest's side, by the guest's own numbers."""

    def set(self, wanted: Mapping[int, bool]) -> Any:
        """`guest-set-vcpus`: how many it set. Raises Declined."""

    def get(self) -> Mapping[int, bool]:
        """`guest-get-vcpus`: which are online."""


@dataclass(frozen=True)
class Switched:
    """How it ended, by vCPU ids: what changed, what was put back, what could not be; and the
    guest's reasons.
    """

    changed: tuple[int, ...]
    undone: tuple[int, ...]
    remaining: tuple[int, ...]
    failures: Mapping[int, str]
    undo_failures: Mapping[int, str]


def switch(
    numbers: Mapping[int, int], vcpus: Iterable[int], online: bool, agent: Agent
) -> Switched:
    """Take these vCPUs online or offline. `numbers` are vCPU ids -> the guest's own numbers."""
    now = agent.get()
    cpus = {vcpu: GuestCpu(number, now[number], True) for vcpu, number in numbers.items()}
    machine = Switch(GuestView(tuple(cpus.values()), cpus), tuple(vcpus), online)
    effect = machine.start()
    for _ in range(_MOST):
        if effect is None:
            break
        if isinstance(effect, GetCpus):
            effect = machine.feed(
                Seen([GuestCpu(number, on) for number, on in agent.get().items()])
            )
        else:
            try:
                answer = Answered(agent.set(dict(effect.wanted)))
            except Declined as error:
                answer = Answered(error=str(error))
            effect = machine.feed(answer)
    assert machine.step is SwitchStep.DONE, "it does not end"
    return Switched(
        machine.changed,
        machine.undone,
        machine.remaining,
        dict(machine.failures),
        dict(machine.undo_failures),
    )


def begins(cpus: dict[int, int], vcpus: Iterable[int], all_online: Iterable[int]) -> bool:
    """Whether a switch of these vCPUs to online begins with a `guest-set-vcpus`.

    `all_online` are known to be online, although nobody knows which CPU each of them is. `cpus` are
    the guest's own ids of the others, which are offline.
    """
    rows = {vcpu: GuestCpu(number, False, True) for vcpu, number in cpus.items()}
    view = GuestView(tuple(rows.values()), rows, all_online=frozenset(all_online))
    return Switch(view, tuple(vcpus), True).start() is not None
