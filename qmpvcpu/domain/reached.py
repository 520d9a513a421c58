"""One domain as a backend has reached it, and operations on its sides: the guest, its agent, its
definition.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qmpvcpu import xml as documents
from qmpvcpu.core import machine
from qmpvcpu.core.definition import state_of
from qmpvcpu.core.engine.report import Report
from qmpvcpu.core.model import DomainState, Outcome
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.agent import check_guest_ids
from qmpvcpu.core.rules.placement import with_threads
from qmpvcpu.core.rules.request import check_request, check_sides
from qmpvcpu.core.state.guest_view import GuestView, with_online
from qmpvcpu.domain import dump
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.definition import DefinitionHandle
from qmpvcpu.domain.pin import change_pin
from qmpvcpu.domain.placement import ThreadPlacement
from qmpvcpu.domain.planned import plan_on
from qmpvcpu.domain.run import Scope, run, run_on_definition, with_config
from qmpvcpu.domain.session import Session
from qmpvcpu.errors import Refusal, VcpuConnectionError, VcpuRefused
from qmpvcpu.flags import VcpuFlag

if TYPE_CHECKING:
    from qmpvcpu.core.machine.described import Described
    from qmpvcpu.domain.dump import DescribedXml


@dataclass(frozen=True, slots=True)
class Reached:
    """A domain as a backend has reached it. Hold the domain's queue during its calls.

    Attributes:
        name: the name that the user gave.
        session: the connection to the running guest.
        guest: the guest's agent.
        definition: the domain's definition.
        is_inactive: the domain does not run.
        busy: the domain runs, and another client uses its sockets.
        addresses: the addresses at which it is reached.
        agent_address: the address of the agent's socket, if the user named it.
    """

    name: str
    session: Session | None = None
    guest: Guest | None = None
    definition: DefinitionHandle | None = None
    is_inactive: bool = False
    busy: VcpuConnectionError | None = None
    addresses: tuple[str, ...] = ()
    agent_address: str | None = None

    def connected(self) -> Session:
        """Return the connection to the running guest.

        Raises:
            VcpuRefused: the domain does not run.
            VcpuConnectionError: there is no connection.
        """
        if self.session is None and self.is_inactive:
            raise catalogue.INACTIVE.error(name=self.name)
        if self.busy is not None:
            raise self.busy
        if self.session is None:
            raise VcpuConnectionError(
                f"the domain '{self.name}' is not connected",
                address=next(iter(self.addresses), None),
                reason="closed",
                hint="use it inside `async with connect(…)`, or await reconnect()",
            )
        return self.session

    def agent(self) -> Guest:
        """Return the guest's agent; `check` has made sure that it is known."""
        assert self.guest is not None
        return self.guest

    def sides(self, flags: VcpuFlag) -> tuple[bool, bool]:
        """Return whether the live and the config side are meant. CURRENT is LIVE if the domain
        runs, else CONFIG.
        """
        live, config = bool(flags & (VcpuFlag.LIVE | VcpuFlag.GUEST)), bool(flags & VcpuFlag.CONFIG)
        if not live and not config:
            config = self.is_inactive
            live = not config
        return live, config

    def preconditions(self, request: Request) -> list[Refusal]:
        """Return the refusals that depend on how the domain was reached, not on its state."""
        live, config = self.sides(request.flags)
        return check_sides(
            request,
            self.name,
            live=live,
            config=config,
            is_active=not self.is_inactive,
            has_definition=self.definition is not None,
            has_agent=self.guest is not None or self.session is None,
        )

    def check(self, request: Request, refusals: Sequence[Refusal] = ()) -> None:
        """Raise VcpuRefused for these refusals and for preconditions that are not met."""
        if found := [*refusals, *self.preconditions(request)]:
            raise VcpuRefused(found, ids=request.ids)

    # -- queries ----------------------------------------------------------------------------------

    async def state(self, flags: VcpuFlag) -> DomainState:
        """Return the state of the side that `flags` name."""
        live, _ = self.sides(flags)
        if not live:
            assert self.definition is not None
            definition = self.definition.definition()
            return machine.located(
                definition,
                state_of(
                    definition, self.name, active=self.session is not None or self.busy is not None
                ),
            )
        session = self.connected()
        state = await session.read()
        if self.guest is not None:
            ask = self.guest.view if flags & VcpuFlag.GUEST else self.guest.try_view
            view = await ask(state)
            state = state if view is None else with_online(state, view)
        return with_its_threads(session, state)

    async def guest_view(self) -> GuestView:
        """Return the guest's own CPUs."""
        self.check(Request((), VcpuFlag.GUEST))
        # Without a connection the agent is not known either.
        session = self.connected()
        return await self.agent().view(await session.read())

    async def dump_xml(self, flags: VcpuFlag, dialect: str | None, detail: str | None) -> bytes:
        """Return the XML of the side that `flags` name."""
        self.check(Request((), flags))
        live, _ = self.sides(flags)
        state = (
            with_its_threads(session := self.connected(), await session.read()) if live else None
        )
        if self.definition is not None:
            return dump.dump(self.definition.read(), state, dialect, detail)
        assert state is not None
        return dump.dump((await self.describe_xml(state)).xml, state, dialect, detail)

    async def describe(self, state: DomainState) -> Described:
        """Return what QEMU reports about the running guest."""
        session = self.connected()
        return await dump.describe(session.monitor, state, session.process, self.agent_address)

    async def describe_xml(self, state: DomainState) -> DescribedXml:
        """Return `describe` as a definition."""
        described = await self.describe(state)
        return dump.DescribedXml(
            documents.minimal_domain(described.definition, described.devices),
            described.left_out,
            described.devices is not None,
        )

    # -- changes and plans ------------------------------------------------------------------------

    async def change(self, request: Request) -> Outcome:
        """Carry out a request that changes something."""
        live, config = self.sides(request.flags)
        found = self.preconditions(request)
        if config and not live:
            return await run_on_definition(self.definition, request, found, self.name)
        if found and self.session is None:
            if config and self.definition is not None:
                # Add the refusals that the definition has.
                found += check_request(request) or self.definition.plan(request).plan.refusals
            raise VcpuRefused(found, ids=request.ids)
        return await run(self._scope(request, found, self.definition if config else None), request)

    async def plan(self, request: Request) -> Plan:
        """Return what `change` would do, with every refusal; nothing is touched."""
        live, config = self.sides(request.flags)
        found = self.preconditions(request)
        plan = Plan(request, request.ids)
        if live and self.session is not None:
            state, migrating = await self.session.read_and_check_migration()
            plan, _ = await plan_on(self.session, state, request, self.guest)
            scope = self._scope(request, found)
            found = list(scope.preconditions)
            if scope.placing is not None:
                plan = scope.placing.check(plan, state)
            plan = plan.refused(migrating)
        elif not found and not config:
            self.connected()
        if config and self.definition is not None:
            plan = with_config(plan, self.definition, live=live and self.session is not None)
        return plan.refused(found)

    def _scope(
        self,
        request: Request,
        preconditions: Sequence[Refusal],
        definition: DefinitionHandle | None = None,
    ) -> Scope:
        """Return what the request may touch, and where the definition wants the threads of plugged
        vCPUs.
        """
        session = self.connected()
        found, wanted = [*preconditions], None
        if self.definition is not None and request.place and request.enables_more:
            try:
                wanted = self.definition.definition()
            except VcpuRefused as error:
                hint = (
                    "correct it, or leave threads where the kernel puts them: --no-place"
                    " (place=False)"
                )
                found += [replace(refusal, hint=hint) for refusal in error.refusals]
        return Scope(
            session, self.guest, ThreadPlacement(session.threads, wanted), definition, tuple(found)
        )

    async def plug(self, ids: Sequence[int], place: bool) -> Outcome:
        """Plug the vCPUs that a migration destination lacks for the incoming guest."""
        request = Request(tuple(ids), VcpuFlag.ENABLE, fallback=False, place=place)
        return await run(replace(self._scope(request, ()), guest=None), request)

    async def switch_guest(self, ids: tuple[int, ...], online: bool) -> Outcome:
        """Take CPUs of the guest online or offline, by the guest's own ids."""
        began = time.monotonic()
        self.check(Request(ids, VcpuFlag.GUEST))
        view = await self.guest_view()
        if refusals := check_guest_ids(ids, view.own, online=online):
            raise VcpuRefused(refusals, ids=ids)
        report = Report(ids)
        report.switched(await self.agent().switch(view.own, ids, online), "the guest's CPU")
        return report.end(None, time.monotonic() - began)

    async def pin(self, request: Request, cpus: tuple[int, ...] | None) -> Outcome:
        """Pin the one vCPU of the request; None means all host CPUs."""
        live, config = self.sides(request.flags)
        found = self.preconditions(request)
        if (config and self.definition is None) or (live and self.is_inactive):
            raise VcpuRefused(found, ids=request.ids)
        return await change_pin(
            self.connected() if live else None,
            self.definition if config else None,
            request.ids[0],
            cpus,
            found,
        )

    def defined_agent(self) -> str | None:
        """Return the address of the agent's socket: the one that the user named, else the
        definition's.
        """
        if self.agent_address is not None or self.definition is None:
            return self.agent_address
        # An XML that cannot be read is reported by the calls that need it.
        with suppress(VcpuRefused):
            return self.definition.definition().agent
        return None


def with_its_threads(session: Session, state: DomainState) -> DomainState:
    """Add the placement of the vCPUs' threads, if they run on this host."""
    if session.threads is None:
        return state
    return with_threads(
        state,
        session.threads.look(
            [vcpu.thread_id for vcpu in state.vcpus if vcpu.thread_id is not None]
        ),
    )
