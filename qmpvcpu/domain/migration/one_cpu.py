"""Migrate a guest with only its first CPU online, if it would hang otherwise. Its agent takes the
other CPUs offline before the first byte is sent, and online again at the side that then runs the
guest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Final

from qmpvcpu.core.migration.leaving import check_one_cpu, cpus_but_first
from qmpvcpu.core.model import DomainState, format_ids
from qmpvcpu.domain.agent import Guest
from qmpvcpu.errors import VcpuConnectionError, VcpuRefused, VcpuRejected

#: Seconds that the agent has to answer, and that a guest which has just arrived has to bring its
#: CPUs online.
_SECONDS: Final = 10.0
_LOOK: Final = 0.1


async def why_not(agent: Guest, state: DomainState, run_state: str | None) -> str | None:
    """Return why this guest cannot be left with only its first CPU online; None if it can, as far
    as known.
    """
    if run_state != "running":
        return f"it is '{run_state}', and its agent cannot be asked"
    try:
        return check_one_cpu(await agent.view(state))
    except (VcpuConnectionError, VcpuRefused) as error:
        return error.message


class OneCpu:
    """The CPUs that are offline for one migration.

    Args:
        agents: the guest's agents at the source and at the destination; None leaves all CPUs
            online.
        state: the state of the source.
    """

    def __init__(self, agents: tuple[Guest, Guest] | None, state: DomainState) -> None:
        self._agents = agents
        self._state = state
        #: The guest's own CPU numbers, which do not change during the migration.
        self._offline: list[int] = []
        #: The vCPU id of each CPU number, if it is known.
        self._vcpus: dict[int, int] = {}
        self._has_ended = False

    @property
    def vcpus(self) -> tuple[int, ...]:
        """vCPU ids of the offline CPUs, as far as known."""
        return tuple(
            sorted(self._vcpus[number] for number in self._offline if number in self._vcpus)
        )

    async def begin(self) -> None:
        """Take the CPUs offline, and verify each. Call `go_back` after an error or a cancel.

        Raises:
            VcpuConnectionError: an agent does not answer.
            VcpuRefused: an agent is not allowed to do it.
            VcpuRejected: the guest cannot be left with only its first CPU online.
        """
        if self._agents is None:
            return
        source, destination = self._agents
        # A wrong address of the destination's agent should be reported before anything is touched.
        await destination.reach()
        view = await source.view(self._state)
        if (why := check_one_cpu(view)) is not None:
            raise VcpuRejected(why)
        self._vcpus = {cpu.logical_id: vcpu for vcpu, cpu in view.by_vcpu.items()}
        for number in cpus_but_first(view):
            self._offline.append(number)
            # The CPUs are switched one by one: after a timeout, only one CPU is in doubt.
            run = await source.switch(view.own, [number], online=False)
            if number in run.failures:
                raise VcpuRejected(f"{self._named([number])}: {run.failures[number]}")

    async def arrive(self, state: DomainState) -> list[str]:
        """Take exactly these CPUs online again at the running destination; return messages."""
        if self._agents is None or not self._offline:
            return []
        taken = self._named(self._offline)
        messages = await self._bring_online(self._agents[1], state)
        why = f"QEMU {self._state.version} under TCG would have made it hang"
        return messages or [
            f"{taken}: offline in the guest on the way, and online again, since {why}"
        ]

    async def go_back(self) -> list[str]:
        """Take the CPUs online again at the source, unless the guest has left it; return
        messages.
        """
        if self._agents is None or self._has_ended:
            return []
        return await self._bring_online(self._agents[0], self._state)

    def leave(self) -> list[str]:
        """Give up, because it is not known where the guest is, or it has ended; return messages."""
        self._has_ended = True
        return [self._stayed("it cannot be asked")] if self._offline else []

    async def _bring_online(self, agent: Guest, state: DomainState) -> list[str]:
        self._has_ended = True
        why = "no time was left"
        deadline = time.monotonic() + _SECONDS
        while self._offline:
            try:
                own = (await agent.view(state)).own
                for number in [one for one in self._offline if one in own.by_vcpu]:
                    run = await agent.switch(own, [number], online=True)
                    if number in run.failures:
                        why = run.failures[number]
                    else:
                        self._offline.remove(number)
            except (VcpuConnectionError, VcpuRefused) as error:
                why = error.message
            if time.monotonic() >= deadline:
                break
            if self._offline:
                await asyncio.sleep(_LOOK)
        return [self._stayed(why)] if self._offline else []

    def _stayed(self, why: str) -> str:
        cpus = format_ids(self._offline)
        return (
            f"{self._named(self._offline)}: offline in the guest since then, because of '{why}':"
            f" `guestvcpus --cpulist {cpus} --enable` takes them online"
        )

    def _named(self, numbers: Iterable[int]) -> str:
        numbers = list(numbers)
        if all(number in self._vcpus for number in numbers):
            return f"vCPU {format_ids(sorted(self._vcpus[number] for number in numbers))}"
        return f"the guest's CPU {format_ids(numbers)}"
