"""The guest's side of one domain: read its CPUs through the guest agent, and switch them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Final

from qmpvcpu.core.arch import Identity, architecture
from qmpvcpu.core.engine.agent_switch import (
    Answered,
    Arrival,
    Arriving,
    GetCpus,
    Seen,
    SetCpus,
    Switch,
    SwitchStep,
)
from qmpvcpu.core.model import DomainState, Event, EventKind
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.state.guest_view import (
    GuestView,
    identify,
    identity_limits,
    is_port_open,
    most_guest_cpus,
    parse_guest_vcpus,
)
from qmpvcpu.errors import VcpuConnectionError, VcpuRefused
from qmpvcpu.ports import Agent, CommandError, Monitor

#: Seconds for all agent commands of one view and of one switch. If every command took its own whole
#: deadline, one call would take half a minute.
_LOOK_SECONDS: Final = 5.0
_SWITCH_SECONDS: Final = 10.0
#: Seconds between two queries of a guest that has not yet brought a CPU online.
_LOOK_FIRST: Final = 0.02
_LOOK_MOST: Final = 0.5
#: Seconds for which an agent that did not answer is not queried again by optional queries, because
#: each query would cost its whole deadline.
_RETRY_SECONDS: Final = 5.0
#: Seconds that a guest has to bring CPUs online by itself, if its agent is not allowed to.
_GRACE: Final = 2.0


class Guest:
    """The agent of one domain."""

    def __init__(
        self, agent: Agent, monitor: Monitor, report: Callable[[list[Event]], None]
    ) -> None:
        self._agent = agent
        self._report = report
        self._last_online: dict[int, bool] = {}
        self._monitor = monitor
        self._vsmt: int | None = None
        self._vsmt_known = False
        self._silent_until = 0.0
        self._has_just_answered = False
        #: Whether the agent has answered on this connection.
        self.has_answered = False
        #: Whether the last view could not tell the guest's CPUs apart.
        self._is_blind = not agent.reads_files
        self._lock = asyncio.Lock()
        #: Why the last view failed.
        self.trouble: VcpuConnectionError | None = None

    async def reach(self) -> None:
        """Make sure that the agent's socket exists, whether or not the guest has opened its end.

        Raises:
            VcpuConnectionError: the socket does not exist.
        """
        await self._agent.open()

    async def view(self, state: DomainState) -> GuestView:
        """Return the guest's CPUs, and the vCPU that each one is.

        Raises:
            VcpuConnectionError: no agent answers, or its answer is impossible.
            VcpuRefused: the agent is not allowed to list CPUs.
        """
        async with self._lock:
            had_answered, self._has_just_answered = self._has_just_answered, False
            try:
                if not had_answered:
                    await self._check_port()
            except VcpuConnectionError as error:
                # This check is cheap, so the agent does not count as silent.
                self.trouble = error
                raise
            try:
                with self._agent.limit(_LOOK_SECONDS):
                    view = await self._view(state)
            except VcpuConnectionError as error:
                self.trouble = error
                if error.reason in ("no-agent", "timeout"):
                    self._silent_until = time.monotonic() + _RETRY_SECONDS
                raise
            self.trouble = None
            self._has_just_answered = self.has_answered = True
            self._silent_until = 0.0
            self._report_changes(view)
            return view

    def _report_changes(self, view: GuestView) -> None:
        """Emit events for the vCPUs that came online or went offline since the last view."""
        now_online = {number: cpu.online for number, cpu in view.by_vcpu.items()}
        before, self._last_online = self._last_online, now_online
        if not before:
            return
        # A CPU that is missing from the guest is not online in it.
        now = time.time()
        changes = [
            (number, online)
            for number, online in now_online.items()
            if before.get(number, False) is not online
        ]
        self._report(
            [
                Event(now, EventKind.ONLINE if on else EventKind.OFFLINE, (number,))
                for number, on in changes
            ]
        )

    async def try_view(self, state: DomainState) -> GuestView | None:
        """Return `view`, or None if it fails; `trouble` then says why. A silent agent is not
        queried.
        """
        if self.is_silent:
            return None
        try:
            return await self.view(state)
        except VcpuConnectionError:
            return None
        except VcpuRefused as refused:
            self.trouble = VcpuConnectionError(
                refused.message, address=self._agent.address, hint=refused.hint
            )
            return None

    @property
    def is_silent(self) -> bool:
        """Whether the agent failed to answer a moment ago."""
        return self.trouble is not None and time.monotonic() < self._silent_until

    async def ask_once(self, state: DomainState) -> None:
        """Query the agent if it has not answered yet. After a plug this distinguishes a silent
        agent from a missing one.
        """
        if not self.has_answered:
            await self.try_view(state)

    async def before_plug(self, state: DomainState) -> GuestView | None:
        """Return the guest's CPUs before a plug if only they show which CPUs have come, else
        None.
        """
        return await self.try_view(state) if self._is_blind else None

    async def switch(self, view: GuestView, vcpus: Sequence[int], online: bool) -> Switch:
        """Take these vCPUs online or offline, all or none. `view` must know each of them.

        Raises:
            VcpuConnectionError: the connection broke during the switch; what the agent has done is
                not known.
            VcpuRefused: `guest-set-vcpus` is disabled in the agent.
        """
        run = Switch(view, vcpus, online)
        effect = run.start()
        with self._agent.limit(_SWITCH_SECONDS):
            while effect is not None:
                if isinstance(effect, GetCpus):
                    effect = run.feed(Seen(parse_guest_vcpus(await self._ask())))
                    continue
                effect = run.feed(await self._set(effect, first=run.step is SwitchStep.SET))
        return run

    async def check_switch(self) -> None:
        """Check that the agent may switch CPUs, without switching any.

        Raises:
            VcpuConnectionError: the agent does not answer.
            VcpuRefused: `guest-set-vcpus` is disabled in the agent.
        """
        await self._check_port()
        try:
            await self._agent.set_vcpus({})
        except CommandError as error:
            if error.error_class == "CommandNotFound":
                raise _disabled(error) from error

    async def await_online(
        self,
        state: DomainState,
        vcpus: Collection[int],
        seconds: float,
        before: GuestView | None = None,
    ) -> Arrival:
        """Wait until the guest runs on newly plugged vCPUs, and take those online that it leaves
        offline.

        Args:
            state: the state after the plug.
            vcpus: ids of the plugged vCPUs.
            seconds: how long to wait.
            before: the guest's CPUs before the plug, as `before_plug` returned them.

        Raises:
            VcpuConnectionError: the connection to the agent broke.
            VcpuRefused: the agent is not allowed to list CPUs.
        """
        began = time.monotonic()
        deadline, pause = began + seconds, _LOOK_FIRST
        arriving = Arriving(state, vcpus, before)
        while True:
            view = arriving.seen(await self.view(state))
            # The kernel or a udev rule may bring CPUs online by itself, which takes a moment.
            if arriving.was_missing or time.monotonic() > began + _LOOK_FIRST:
                try:
                    view = await self._take_online(arriving, view)
                except VcpuRefused as refused:
                    arriving.last = refused.message
                    if arriving.offline(view):
                        deadline = min(deadline, began + _GRACE)
            found = arriving.arrival(view)
            if arriving.is_over(view) or time.monotonic() >= deadline:
                return found
            await asyncio.sleep(min(pause, max(deadline - time.monotonic(), 0)))
            pause = min(pause * 2, _LOOK_MOST)

    async def _take_online(self, arriving: Arriving, view: GuestView) -> GuestView:
        """Take the remaining CPUs online, and return the view afterwards. Raises VcpuRefused."""
        if offline := arriving.offline(view):
            run = await self.switch(view, offline, online=True)
            view = arriving.switched(run, view)
            self._report_changes(view)
        elif numbers := arriving.offline_newcomers():
            # The vCPU ids are not known, so the guest's own CPU numbers are used.
            run = await self.switch(view.own, numbers, online=True)
            arriving.last = next(iter(run.failures.values()), arriving.last)
        return view

    async def close(self) -> None:
        """Close the connection."""
        await self._agent.close()

    # -- inside -----------------------------------------------------------------------------------

    async def _check_port(self) -> None:
        """Check that a process in the guest has opened the agent's port. QEMU knows this, which
        saves the wait.

        Raises:
            VcpuConnectionError: no process has opened it.
        """
        try:
            chardevs = await self._monitor.query_chardev()
        except CommandError:
            return
        if is_port_open(chardevs, os.path.realpath(self._agent.address)) is False:  # noqa: ASYNC240 - a few lstat(2)
            raise VcpuConnectionError(
                f"no guest agent listens at '{self._agent.address}': nothing in the guest has"
                " opened its port",
                address=self._agent.address,
                reason="no-agent",
                hint="wait until the guest has booted; start qemu-ga in it",
                libvirt="VIR_ERR_AGENT_UNRESPONSIVE",
            )

    async def _view(self, state: DomainState) -> GuestView:
        cpus = parse_guest_vcpus(await self._ask(), most_guest_cpus(state))
        wanted = identity_limits(state, cpus)
        files: dict[str, bytes | None] = {}
        if wanted:
            # If guest-file-open is blocked, the view marks the CPU numbers as assumed.
            with suppress(CommandError):
                files = dict(zip(wanted, await self._agent.read_files(wanted), strict=True))
        view = identify(state, cpus, files, vsmt=await self._spacing(state))
        self._is_blind = view.assumed
        return view

    async def _spacing(self, state: DomainState) -> int | None:
        if architecture(state.arch).identity is Identity.PHYSICAL_ID and not self._vsmt_known:
            try:
                vsmt = await self._monitor.qom_get("/machine", "vsmt")
            except CommandError:
                vsmt = None
            self._vsmt = vsmt if type(vsmt) is int and vsmt > 0 else None
            self._vsmt_known = True
        return self._vsmt

    async def _ask(self) -> object:
        try:
            return await self._agent.get_vcpus()
        except CommandError as error:
            if error.error_class == "CommandNotFound":
                raise _disabled(error) from error
            raise VcpuConnectionError(
                f"the guest agent at '{self._agent.address}' cannot list the guest's CPUs:"
                f" {error.text}",
                address=self._agent.address,
                hint="look at the guest's agent and its log",
                libvirt="VIR_ERR_AGENT_COMMAND_FAILED",
            ) from error

    async def _set(self, effect: SetCpus, *, first: bool) -> Answered:
        try:
            return Answered(await self._agent.set_vcpus(effect.wanted))
        except CommandError as error:
            if first and error.error_class == "CommandNotFound":
                raise _disabled(error) from error
            return Answered(error=error.text)


def _disabled(error: CommandError) -> VcpuRefused:
    return catalogue.AGENT_DISABLED.error(command=error.command, error=error.text)
