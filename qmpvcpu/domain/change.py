"""One request that changes something, from its plan to its verified end."""

from __future__ import annotations

import time
from collections.abc import Sequence

from qmpvcpu.core import checks
from qmpvcpu.core.model import DomainState, Entity, Outcome, format_ids
from qmpvcpu.core.outcome import conclude, unchanged
from qmpvcpu.core.plan import Plan, make_plan
from qmpvcpu.core.request import Knowledge, Request
from qmpvcpu.core.transaction import SETTLED, STILL_ASKED, Result, Transaction
from qmpvcpu.domain.drive import Drive
from qmpvcpu.domain.link import Link
from qmpvcpu.domain.read import firmware_runs, has_x2apic, run_state
from qmpvcpu.errors import OutcomeKind, Refusal, VcpuConnectionError, VcpuError, VcpuRefused
from qmpvcpu.flags import VcpuFlag

__all__ = ["change", "plan_on"]


async def plan_on(link: Link, state: DomainState, request: Request) -> tuple[Plan, Knowledge]:
    """Plan, and ask QEMU what only some plans need to know."""
    known = link.knowledge()
    plan = make_plan(state, request, known)
    moved = [*plan.awaited, *plan.plugs]
    x2apic = firmware = None
    if checks.needs_x2apic(state, moved):
        x2apic = await has_x2apic(link.monitor, state)
    # An undo unplugs too.
    if checks.needs_firmware_state(state) and (moved or plan.unplugs):
        firmware = await firmware_runs(link.monitor)
    if x2apic is not None or firmware is not None:
        known = link.knowledge(x2apic, firmware)
        plan = make_plan(state, request, known)
    return plan, known


async def change(link: Link, request: Request, here: Sequence[Refusal] = ()) -> Outcome:
    """Carry out a request that changes something. The link's queue is held.

    Args:
        link: the open connection.
        request: what is asked.
        here: what stands against it whatever the state.

    Raises:
        VcpuError: every end that is no success, but pending and requested.
    """
    began = time.monotonic()
    link.learn()
    held = link.state
    certain = False
    by_id = request.enable and not request.has(VcpuFlag.NUMA_NODE)
    if by_id and not link.stale and not link.ledger.firsts:
        plan, known = await plan_on(link, held, request)
        # Only what is certainly to be done may rest on held state; a claim needs a fresh query.
        certain = bool(plan.plugs) and not (plan.refusals or plan.unchanged or plan.unplugs)
    if not certain:
        held = await link.read()
        plan, known = await plan_on(link, held, request)
    plan = plan.refused(here)
    if plan.refusals:
        raise VcpuRefused(
            plan.refusals,
            ids=plan.targets,
            messages=plan.messages,
            seconds=round(time.monotonic() - began, 6),
        )
    if not (plan.plugs or plan.unplugs or plan.awaited):
        return unchanged(held, plan, time.monotonic() - began)
    since = {entity.first: link.ledger.asked(entity.first) for entity in plan.awaited}
    result, status = await _carry_out(link, held, plan, known)
    end = conclude(
        link.state,
        plan,
        result,
        time.monotonic() - began,
        stopped=None if status in (None, "running") else status,
        notes=_notes(link, result, since),
    )
    if end.outcome is not OutcomeKind.APPLIED:
        # Whatever upset the plan may upset what is held: the next call asks anew.
        link.stale = True
    if certain and end.outcome is OutcomeKind.FAILED:
        # The held state was behind: another client had plugged just what was asked for.
        now, _ = await plan_on(link, link.state, request)
        if now.unchanged == now.targets and not now.refusals:
            return unchanged(link.state, now, time.monotonic() - began)
    if isinstance(end, VcpuError):
        raise end
    return end


async def _carry_out(link: Link, state: DomainState, plan: Plan, known: Knowledge) -> tuple[Result, str | None]:
    """Its end and, if the guest has yet to answer, what QEMU says of its run state."""
    request = plan.request
    transaction = Transaction(
        plan.plugs,
        plan.unplugs,
        plan.awaited,
        wait=request.wait,
        reset_drops_unplug=checks.is_x86(state),
        atomic=request.atomic,
        retries=request.retry,
        doubted=link.ledger.firsts,
    )

    def prepare(fresh: DomainState) -> None:
        transaction.undo_forbidden = checks.undo_forbidden(fresh, known)
        if request.atomic and not request.force:
            now = link.knowledge(known.x2apic, known.firmware_runs)
            gone = [fresh.by_id[e.first] for e in plan.unplugs if not fresh.by_id[e.first].plugged]
            transaction.restore_forbidden = checks.restore_forbidden(fresh, gone, now)

    entities = (*plan.awaited, *plan.plugs, *plan.unplugs)
    drive = Drive(transaction, link.monitor, link.look, request.timeout, state, prepare, link.ask)
    link.driven = frozenset(entity.first for entity in entities)
    try:
        result = await drive.run(entities)
        return result, await run_state(link.monitor) if result.pending else None
    except VcpuConnectionError as error:
        raise _lost_on_the_way(error, plan, transaction) from error
    finally:
        link.driven = frozenset()
        _record(link, transaction, entities)


def _record(link: Link, transaction: Transaction, entities: Sequence[Entity]) -> None:
    """What the next call, and the next process, must know of unplugs that have not ended."""
    states = transaction.states
    pending = link.ledger.firsts
    open_still = [e for e in entities if states[e.first] in STILL_ASKED and e.first not in pending]
    if open_still:
        link.ledger.ask(open_still, link.state, time.time())
    link.ledger.end([first for first, state in states.items() if state in SETTLED])
    link.watch()


def _notes(link: Link, result: Result, since: dict[int, float | None]) -> list[str]:
    """What to say of pending unplugs."""
    if not result.pending:
        return []
    notes = []
    earlier = {first: asked for first, asked in since.items() if first in result.pending}
    if earlier:
        known = [asked for asked in earlier.values() if asked is not None]
        when = f" {time.time() - min(known):.0f} s ago" if known else " earlier"
        notes.append(
            f"the unplug was asked{when} and its end was not seen: if the guest refused it, or was reset, while"
            " nobody listened, only asking again settles it (--disable)"
        )
    if link.ledger.trouble is not None:
        notes.append(f"only this process knows that it is pending: {link.ledger.trouble}")
    return notes


def _lost_on_the_way(error: VcpuConnectionError, plan: Plan, transaction: Transaction) -> VcpuConnectionError:
    """The same error, with what was under way."""
    states: dict[str, list[int]] = {}
    for entity in (*plan.awaited, *plan.plugs, *plan.unplugs):
        states.setdefault(transaction.states[entity.first].value, []).extend(entity.ids)
    way = "; ".join(f"vCPU {format_ids(ids)}: {what}" for what, ids in states.items())
    result = transaction.result()
    return VcpuConnectionError(
        f"{error.message}. When it was lost: {way}",
        address=error.address,
        reason=error.reason,
        hint=error.hint,
        libvirt=error.libvirt,
        ids=plan.targets,
        changed_ids=sorted({*result.plugged, *result.removed}),
        pending=transaction.still_asked,
        undone=result.undone,
        messages=plan.messages,
        mechanism="hotplug",
    )
