"""The guest's side of a request: CPUs that its agent switches, and those that it must come to run on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from typing import Final

from qmpvcpu.aio import wind_up
from qmpvcpu.core.engine.arrival import Arrival
from qmpvcpu.core.engine.report import Report, still_plugged
from qmpvcpu.core.engine.timers import UNDO_SECONDS
from qmpvcpu.core.model import format_ids
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.core.rules.agent import check_guest
from qmpvcpu.core.state.guest_view import GuestView
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.interrupted import Interrupted, leaves, leaving
from qmpvcpu.domain.session import Session
from qmpvcpu.errors import VcpuConnectionError, VcpuError, VcpuRejected
from qmpvcpu.flags import VcpuFlag

logger = logging.getLogger("qmpvcpu.domain.in_guest")

#: Nothing in the guest told which CPU is which.
_ASSUMED: Final = (
    "that the guest's CPU numbers are the vCPU ids is assumed: the agent could not read what tells them apart"
    " (guest-file-open)"
)


async def switch_planned(
    session: Session, guest: Guest, plan: Plan, view: GuestView | None, report: Report
) -> None:
    """Take online and offline what the plan says, and offline what the guest refused to let go.

    Args:
        session: the open connection.
        guest: the agent.
        plan: of the request; its hotplug is done.
        view: the guest's CPUs, as they were planned on.
        report: what it leads to is added to it.
    """
    offlines, messages = list(plan.offlines), [*report.messages]
    rejected = report.trouble if isinstance(report.trouble, VcpuRejected) else None
    if rejected is not None and plan.request.fallback and not report.undone:
        # The guest kept what it was asked to let go; perhaps it takes it offline.
        kept = [number for first in rejected.reasons for number in session.state.by_id[first].ids]
        view = await guest.try_view(session.state)
        if view is not None and not check_guest(session.state, [*kept, *offlines], view, online=False):
            offlines = sorted({*offlines, *kept})
            report.tries_the_agent()
    if report.has_failed():
        if ids := [*plan.onlines, *offlines]:
            report.messages.append(f"not tried after that: vCPU {format_ids(ids)} in the guest")
        return
    before = set(report.changed)
    await _switch(session, guest, view, plan.onlines, report, online=True)
    await _switch(session, guest, view, offlines, report, online=False)
    if report.has_failed():
        is_known = not isinstance(report.trouble, VcpuConnectionError) and report.changed == before
        if rejected is not None and is_known:
            report.agent_did_not_either(rejected, messages)
        return
    if not plan.request.has(VcpuFlag.GUEST) and (left_there := sorted({*offlines, *plan.offline_already})):
        report.messages.append(still_plugged(left_there))
    if view is not None and not report.changed:
        report.view = view


async def _switch(
    session: Session, guest: Guest, view: GuestView | None, ids: Sequence[int], report: Report, *, online: bool
) -> None:
    """Take these online or offline in the guest, unless the request has failed."""
    if not ids or report.has_failed():
        return
    assert view is not None
    try:
        run = await guest.switch(view, ids, online=online)
    except VcpuError as error:
        report.agent_failed(ids, error)
        return
    except asyncio.CancelledError as error:
        raise leaving(error, await _half_switched(session, guest, view, ids)) from error
    if view.assumed:
        report.messages.append(_ASSUMED)
    report.switched(run)
    with leaves(lambda: Interrupted(changed_ids=run.changed)):
        report.view = await guest.try_view(session.state) or report.view


async def _half_switched(session: Session, guest: Guest, view: GuestView, ids: Sequence[int]) -> Interrupted:
    """Cancelled while the agent switched these: what the guest says of them now, compared with `view`. If it says
    nothing in time, or at a second cancel, they are unsure.
    """
    found = Interrupted(unsure_ids=tuple(ids))

    async def look() -> None:
        nonlocal found
        async with asyncio.timeout(UNDO_SECONDS):
            now = await guest.view(session.state)
        changed = tuple(number for number in ids if now.online(number) is not view.online(number))
        found = Interrupted(changed_ids=changed)

    failure = await wind_up(look())
    if failure is not None:
        logger.debug("cancelled, and what the guest agent did is not known: %s", failure)
    return found


async def until_online(
    session: Session,
    guest: Guest,
    plugged: Collection[int],
    seconds: float,
    before: GuestView | None,
    report: Report,
) -> None:
    """Wait until the guest runs on what was plugged: enabled is what the guest can run on.

    Args:
        session: the open connection.
        guest: the agent.
        plugged: vCPU ids that the request has plugged, and that may have gone since.
        seconds: what is left for it.
        before: the guest before the plug, where only that tells which CPUs have come.
        report: what it leads to is added to it.
    """
    fresh = sorted(n for n in plugged if n not in report.pending and session.state.vcpus[n].enabled)
    if not fresh:
        return
    trouble: VcpuError | None = guest.trouble if guest.is_silent else None
    if trouble is None:
        try:
            arrival = await guest.await_online(session.state, fresh, seconds, before)
        except VcpuError as error:
            trouble = error
    if trouble is not None:
        report.messages.append(f"whether the guest runs on it is not known: {trouble.message}")
        if guest.has_answered and isinstance(trouble, VcpuConnectionError):
            report.is_not_online(fresh)
        return
    report.view = arrival.view
    if arrival.unknown:
        report.messages.append(_nameless(arrival))
    if arrival.missing:
        why = f": {arrival.last}" if arrival.last else ""
        ids = format_ids(sorted(arrival.missing))
        report.messages.append(f"vCPU {ids} is plugged, and the guest does not run on it{why}")
        report.is_not_online(arrival.missing)


def _nameless(arrival: Arrival) -> str:
    online = sum(cpu.online for cpu in arrival.view.cpus)
    return (
        f"whether the guest runs on vCPU {format_ids(arrival.unknown)} is not known: nothing tells which of its"
        f" CPUs that is ({online} of {len(arrival.view.cpus)} are online)"
    )
