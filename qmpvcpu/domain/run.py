"""Carry out one changing request, from the first query to the verified result. Every request has
the same sequence:

read, plan, check, prepare, act and verify, commit or discard, report
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

from qmpvcpu.core.definition import state_of
from qmpvcpu.core.engine.report import Report
from qmpvcpu.core.model import Outcome
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.core.quirks import contexts_run_out
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules.request import check_request
from qmpvcpu.core.state.knowledge import UsedContexts
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.definition import ConfigChange, DefinitionHandle, follow
from qmpvcpu.domain.hotplug import Hotplug
from qmpvcpu.domain.in_guest import switch_planned, until_online
from qmpvcpu.domain.interrupted import Interrupted, leaves, leaving
from qmpvcpu.domain.placement import ThreadPlacement
from qmpvcpu.domain.planned import Planned, plan_on, read_and_plan
from qmpvcpu.domain.reader import run_state
from qmpvcpu.domain.session import Session
from qmpvcpu.errors import (
    OutcomeKind,
    Refusal,
    VcpuConnectionError,
    VcpuError,
    VcpuFailed,
    VcpuPartial,
    VcpuRefused,
)
from qmpvcpu.host.definition_files import not_written

#: Design: without an agent an enable counts as applied, `online` is null, and one message says so.
_UNSEEN: Final = (
    "no guest agent is known: whether the guest runs on it was not checked; --agent"
    " ADDR (agent=) names its socket"
)
#: Seconds to wait until an ended thread leaves its cgroup, which it does a moment after QEMU joins
#: it; and seconds between two checks.
_GROUP_SECONDS: Final = 1.0
_GROUP_PAUSE: Final = 0.002


@dataclass(frozen=True, slots=True)
class Scope:
    """What a request on the running guest may touch.

    Attributes:
        session: the open connection; its queue is locked.
        guest: the guest's agent, if one is known.
        placing: where the threads of plugged vCPUs belong; None does not place them.
        definition: the definition that follows the guest; None if only the running guest is meant.
        preconditions: refusals that do not depend on the state.
    """

    session: Session
    guest: Guest | None = None
    placing: ThreadPlacement | None = None
    definition: DefinitionHandle | None = None
    preconditions: tuple[Refusal, ...] = ()


async def run(scope: Scope, request: Request) -> Outcome:
    """Carry out a request on the running guest, and on its definition if it follows.

    Raises:
        VcpuError: every outcome that is not a success, except pending and requested.
    """
    began = time.monotonic()
    planned = await read_and_plan(
        scope.session, request, scope.guest, config=scope.definition is not None
    )
    plan = planned.plan.refused(scope.preconditions)
    if scope.placing is not None:
        plan = scope.placing.check(plan, planned.state)
    config, plan = (
        _plan_definition(scope.definition, plan) if scope.definition is not None else (None, plan)
    )
    try:
        plan = await _prepare(scope, config, plan)
        if plan.refusals:
            await _refuse(scope.session, plan, began)
        report = Report(plan.targets, plan)
        try:
            await _act(scope, replace(planned, plan=plan), report, began)
        except VcpuError as error:
            report.failed(error)
        if config is not None:
            await follow(config, report, failure="vCPU {} is changed")
        return report.end(scope.session.state, time.monotonic() - began)
    finally:
        if config is not None:
            config.discard()


async def run_on_definition(
    definition: DefinitionHandle | None,
    request: Request,
    preconditions: Sequence[Refusal],
    name: str,
) -> Outcome:
    """Carry out a request on the definition alone.

    Raises:
        VcpuRefused: the request is refused, or the definition cannot be written; it is unchanged.
    """
    began = time.monotonic()
    found = [*preconditions, *check_request(request)]
    if definition is None:
        raise VcpuRefused(found, ids=request.ids)
    config = definition.plan(request)
    if refusals := [*found, *config.plan.refusals]:
        raise VcpuRefused(refusals, ids=config.plan.targets or request.ids)
    plan = config.plan
    report = Report(plan.targets)
    report.messages += plan.messages
    try:
        await config.stage()
        await config.commit()
    except OSError as error:
        raise VcpuRefused([not_written(definition.place, error)], ids=plan.targets) from error
    except VcpuPartial as error:
        report.defined((), plan.changed, written=False)
        report.failed(error.having(remaining=plan.changed))
    else:
        plan = config.plan
        report.defined(plan.targets, plan.changed, written=plan.writes)
        if request.total is not None:
            report.already = (f"nothing to do: {request.total} vCPUs are enabled already",)
    finally:
        config.discard()
    return report.end(state_of(plan.new, name), time.monotonic() - began)


def with_config(plan: Plan, definition: DefinitionHandle, *, live: bool) -> Plan:
    """Add to a plan what it changes in the definition."""
    if live:
        config, plan = _plan_definition(definition, plan)
    else:
        config = definition.plan(plan.request)
        plan = plan.refused(check_request(plan.request)).with_config(config.plan, alone=True)
    assert plan.config is not None
    return replace(plan, config=replace(plan.config, diff=() if plan.refusals else config.diff))


# -- check and prepare -----------------------------------------------------------------------------


def _plan_definition(definition: DefinitionHandle, plan: Plan) -> tuple[ConfigChange, Plan]:
    # A count is reached on each side by itself. Ids are those that the plan for the running guest
    # has chosen.
    ids = None if plan.request.total is not None else plan.targets
    try:
        config = definition.plan(plan.request, ids)
    except VcpuRefused as error:
        raise VcpuRefused([*plan.refusals, *error.refusals], ids=plan.targets) from error
    return config, plan.with_config(config.plan, alone=False)


async def _prepare(scope: Scope, config: ConfigChange | None, plan: Plan) -> Plan:
    """Write the next definition next to the old one and make cgroups, so that any obstacle shows
    before the guest is touched.
    """
    if config is not None and not plan.refusals:
        try:
            await config.stage()
        except OSError as error:
            plan = plan.refused([not_written(config.place, error)])
    if scope.placing is not None and not plan.refusals:
        plan = scope.placing.prepare(plan)
    return plan


async def _refuse(session: Session, plan: Plan, began: float) -> None:
    if any(one.code == "place" for one in plan.refusals):
        # If QEMU has exited since the query, it has no process to place. That is a connection
        # error.
        await session.look()
    raise VcpuRefused(
        plan.refusals,
        ids=plan.targets,
        messages=plan.messages,
        seconds=round(time.monotonic() - began, 6),
    )


# -- act and verify --------------------------------------------------------------------------------


async def _act(scope: Scope, planned: Planned, report: Report, began: float) -> None:
    """Change the running guest: hotplug, threads, and CPUs in the guest."""
    session, guest, plan = scope.session, scope.guest, planned.plan
    if plan.moves_cpus and contexts_run_out(planned.state) and not planned.known.contexts_reported:
        session.pending_unplugs.note_contexts(UsedContexts(is_reported=True))
    before = None
    if guest is not None and plan.request.wait and (plan.plugs or plan.awaited):
        await guest.ask_once(planned.state)
        before = await guest.before_plug(planned.state)
    hotplug = Hotplug(session, planned, await _timeout(session, plan)) if plan.moves_cpus else None
    if hotplug is not None:
        await _hotplug_and_place(scope, planned, hotplug, report)
        with leaves(lambda: _remains(session, plan, report)):
            await _look_into_failure(session, planned, report)
    else:
        report.found_unchanged(plan)
        if plan.placed and scope.placing is not None:
            scope.placing.place(planned.state, session.state, plan, report)
    if guest is None:
        if (plan.plugs or plan.awaited) and not report.has_failed() and report.changed:
            report.messages.append(_UNSEEN)
    else:
        plugs = hotplug.plugs if hotplug is not None else frozenset()
        try:
            with leaves(lambda: _remains(session, plan, report, but=plugs)):
                await switch_planned(session, guest, plan, planned.known.guest, report)
                if plan.request.wait and not report.has_failed():
                    left = max(plan.request.patience - (time.monotonic() - began), 0.0)
                    await until_online(session, guest, plugs, left, before, report)
        except asyncio.CancelledError as error:
            stays = await hotplug.take_back() if hotplug is not None else Interrupted()
            raise leaving(error, stays) from error
    if planned.is_cached and plan.request.total is not None and not report.has_failed():
        await _count_again(scope, planned, report, began)


async def _timeout(session: Session, plan: Plan) -> float:
    """Return the seconds that the guest has. A guest that is stopped cannot answer until it is
    resumed.
    """
    request = plan.request
    # libvirt sends one unplug after the other, and each must first reach QEMU.
    is_direct = request.wait and session.monitor.hears_all
    if (
        request.timeout is None
        and is_direct
        and plan.unplugs
        and session.seen_run_state != "running"
    ):
        return request.patience if await run_state(session.monitor) == "running" else 0.0
    return request.patience


async def _hotplug_and_place(
    scope: Scope, planned: Planned, hotplug: Hotplug, report: Report
) -> None:
    """Plug and unplug, and place the threads. The cgroups of vCPUs that left, or did not come, are
    removed.
    """
    session, plan = scope.session, planned.plan
    ids = [
        number for entity in (*plan.awaited, *plan.plugs, *plan.unplugs) for number in entity.ids
    ]
    try:
        async with _room(scope.placing, plan, report):
            await hotplug.run(report)
        if scope.placing is not None and not isinstance(report.trouble, VcpuConnectionError):
            scope.placing.place(planned.state, session.state, plan, report)
    except BaseException:
        session.drop_groups(ids)
        raise
    if report.outcome is not OutcomeKind.APPLIED:
        # The cause of the failure may also have changed the cached state, so the next call
        # refreshes it.
        session.stale = True
    with leaves(lambda: _remains(session, plan, report)):
        await _wait_groups_removed(session, ids)


@asynccontextmanager
async def _room(placing: ThreadPlacement | None, plan: Plan, report: Report) -> AsyncIterator[None]:
    if placing is None or placing.is_idle:
        yield
        return
    async with placing.room(plan, report.messages):
        yield


async def _wait_groups_removed(session: Session, ids: Sequence[int]) -> None:
    """Wait until the cgroups are removed. The session retries those that take longer."""
    deadline = time.monotonic() + _GROUP_SECONDS
    while True:
        if session.drop_groups(ids) or time.monotonic() >= deadline:
            return
        await asyncio.sleep(_GROUP_PAUSE)


async def _look_into_failure(session: Session, planned: Planned, report: Report) -> None:
    """After QEMU has declined: check whether the guest is migrating, or another client has already
    done what was requested.
    """
    if not isinstance(report.trouble, VcpuFailed):
        return
    if not report.changed:
        # "device_add not allowed while migrating": the cached state did not show the migration.
        _, migrating = await session.read_and_check_migration()
        if migrating:
            raise VcpuRefused(migrating, ids=planned.plan.targets) from report.trouble
    if planned.is_certain and report.outcome is OutcomeKind.FAILED:
        # The cached state was out of date: another client had already plugged the requested vCPUs.
        now, _ = await plan_on(session, session.state, planned.plan.request)
        if now.unchanged == now.targets and not now.refusals:
            report.found_unchanged(now)


async def _count_again(scope: Scope, planned: Planned, report: Report, began: float) -> None:
    """Re-plan from the fresh state until the count is reached, if others have plugged or unplugged
    too.
    """
    session, request = scope.session, planned.plan.request
    moved = set(session.state.enabled_ids).symmetric_difference(planned.state.enabled_ids)
    if moved.issubset(planned.plan.targets):
        return
    left = max(request.patience - (time.monotonic() - began), 0.0)
    session.stale = True
    more: Outcome | VcpuError
    try:
        with leaves(lambda: _remains(session, planned.plan, report)):
            more = await run(replace(scope, definition=None), replace(request, timeout=left))
    except VcpuError as error:
        more = error
    report.goes_on(session.state, more)


def _remains(
    session: Session, plan: Plan, report: Report, but: frozenset[int] = frozenset()
) -> Interrupted:
    """Return what a call that is cancelled now has left, except for the vCPUs in `but`."""
    requested = {number for entity in plan.unplugs for number in entity.ids}
    removed = {
        number
        for number in requested.intersection(report.pending)
        if not session.state.vcpus[number].enabled
    }
    return Interrupted(changed_ids=tuple(sorted({*report.changed, *removed} - but)))
