"""The guest's side of a request: CPUs that its agent switches, and plugged CPUs that it should run
on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from typing import Final

from qmpvcpu.aio import wind_up
from qmpvcpu.core.engine.agent_switch import Arrival
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

#: Used if the agent could not read which CPU is which vCPU.
_ASSUMED: Final = (
    "that the guest's CPU numbers are the vCPU ids is assumed: the agent could not read the guest's"
    " files about them (guest-file-open)"
)


async def switch_planned(
    session: Session, guest: Guest, plan: Plan, view: GuestView | None, report: Report
) -> None:
    """Take vCPUs online and offline as planned, and take those offline that the guest refused to
    unplug.

    Args:
        session: the open connection.
        guest: the agent.
        plan: the plan of the request; its hotplug part is done.
        view: the guest's CPUs on which the plan was made.
        report: the results are added to it.
    """
    offlines, messages = list(plan.offlines), [*report.messages]
    rejected = report.trouble if isinstance(report.trouble, VcpuRejected) else None
    if rejected is not None and plan.request.fallback and not report.undone:
        # The guest refused the unplug, but it may still take the CPUs offline.
        refusing = [
            number for first in rejected.reasons for number in session.state.by_id[first].ids
        ]
        now = await guest.try_view(session.state)
        if now is not None and not (
            check_guest(session.state, [*refusing, *offlines], now, online=False)
            or check_guest(session.state, plan.onlines, now, online=True)
        ):
            view, offlines = now, sorted({*offlines, *refusing})
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
    if not plan.request.has(VcpuFlag.GUEST) and (
        offline_ids := sorted({*offlines, *plan.offline_already})
    ):
        report.messages.append(still_plugged(offline_ids))
    if view is not None and not report.changed:
        report.view = view


async def _switch(
    session: Session,
    guest: Guest,
    view: GuestView | None,
    ids: Sequence[int],
    report: Report,
    *,
    online: bool,
) -> None:
    """Take these vCPUs online or offline in the guest, unless the request has failed."""
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
        # A view from before is no answer to what the guest's CPUs are now.
        report.view = await guest.try_view(session.state)


async def _half_switched(
    session: Session, guest: Guest, view: GuestView, ids: Sequence[int]
) -> Interrupted:
    """After a cancel during a switch, compare the guest's present CPUs with `view`. If the guest
    does not answer in time, or after a second cancel, the ids are unsure.
    """
    found = Interrupted(unsure_ids=tuple(ids))

    async def look() -> None:
        nonlocal found
        async with asyncio.timeout(UNDO_SECONDS):
            now = await guest.view(session.state)
        found = Interrupted(
            changed_ids=tuple(
                number for number in ids if now.online(number) is not view.online(number)
            )
        )

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
    """Wait until the guest runs on the plugged vCPUs. A vCPU is enabled when the guest can run on
    it.

    Args:
        session: the open connection.
        guest: the agent.
        plugged: vCPU ids that the request has plugged; some may have been removed since.
        seconds: the time that is left.
        before: the guest's CPUs before the plug, if only they show which CPUs have come.
        report: the results are added to it.
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
        report.view = None
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
        f"whether the guest runs on vCPU {format_ids(arrival.unknown)} is not known: which of its"
        f" CPUs that is could not be found out ({online} of {len(arrival.view.cpus)} are online)"
    )
