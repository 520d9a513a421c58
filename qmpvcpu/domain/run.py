"""One request that changes something, from its plan to its verified end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Final

from qmpvcpu.aio import wind_up
from qmpvcpu.core.arch import architecture
from qmpvcpu.core.engine.messages import Moves, Result, Snapshot, Terms
from qmpvcpu.core.engine.report import (
    conclude,
    interrupted,
    still_plugged,
    switched,
    unchanged,
    went_on,
    without_rejections,
)
from qmpvcpu.core.engine.timers import UNDO_SECONDS
from qmpvcpu.core.engine.transaction import Transaction
from qmpvcpu.core.model import DomainState, Outcome, format_ids
from qmpvcpu.core.planning.live import Plan, make_plan
from qmpvcpu.core.quirks import Fact, contexts_run_out, decides
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules import hotplug
from qmpvcpu.core.rules.agent import check_guest
from qmpvcpu.core.state.guest_view import GuestView
from qmpvcpu.core.state.knowledge import Knowledge
from qmpvcpu.core.state.pending import UsedContexts
from qmpvcpu.domain.agent import Arrival, Guest, with_online
from qmpvcpu.domain.drive import Drive
from qmpvcpu.domain.interrupted import Interrupted, leaves, leaving
from qmpvcpu.domain.placement import Placing, noted
from qmpvcpu.domain.reader import firmware_runs, has_x2apic, lacks_acpi, run_state
from qmpvcpu.domain.session import Link
from qmpvcpu.errors import (
    OutcomeKind,
    Refusal,
    VcpuConnectionError,
    VcpuError,
    VcpuFailed,
    VcpuRefused,
    VcpuRejected,
)
from qmpvcpu.flags import VcpuFlag

__all__ = ["change", "plan_on"]

logger = logging.getLogger("qmpvcpu.domain.run")


async def plan_on(
    link: Link, state: DomainState, request: Request, guest: Guest | None = None
) -> tuple[Plan, Knowledge]:
    """Plan, and ask QEMU and the guest what only some plans need to know.

    Raises:
        VcpuConnectionError, VcpuRefused: only the agent could do it, and it does not answer or is not allowed to.
    """
    known = link.knowledge()
    plan = make_plan(state, request, known)
    moved = [*plan.awaited, *plan.plugs]
    x2apic = firmware = smm = legacy = None
    if hotplug.needs_x2apic(state, moved):
        x2apic = await has_x2apic(link.monitor, state)
    # An undo unplugs too.
    if decides(state, Fact.FIRMWARE) and (moved or plan.unplugs):
        firmware = await firmware_runs(link.monitor)
        if firmware is None and guest is not None and await guest.try_view(state) is not None:
            firmware = False
    if moved and decides(state, Fact.SMM):
        smm = await link.smm_has_run()
    if plan.unplugs and decides(state, Fact.LEGACY_HOTPLUG):
        legacy = await link.is_hotplug_legacy()
    if smm or legacy:
        plan = make_plan(state, request, replace(known, smm=smm, legacy_hotplug=legacy))
    view = None
    if guest is not None and request.has(VcpuFlag.GUEST):
        # What is refused whatever the guest says is refused without it.
        view = await guest.view(state) if not plan.refusals else None
    elif guest is not None and plan.asks_guest:
        view = await guest.try_view(state)
    if x2apic is not None or firmware is not None or smm or legacy or view is not None:
        known = replace(link.knowledge(x2apic, firmware), smm=smm, legacy_hotplug=legacy, guest=view)
        plan = make_plan(state, request, known)
    return plan, known


async def change(
    link: Link,
    request: Request,
    here: Sequence[Refusal] = (),
    guest: Guest | None = None,
    beside: Callable[[Plan], Awaitable[Plan]] | None = None,
    placing: Placing | None = None,
) -> Outcome:
    """Carry out a request that changes something. The link's queue is held.

    Args:
        link: the open connection.
        request: what is asked.
        here: what stands against it whatever the state.
        guest: its agent, where one is known.
        beside: what else belongs to it: given the plan, before anything is done, with what stands against it.
        placing: where the threads of what it plugs belong.

    Raises:
        VcpuError: every end that is no success, but pending and requested.
    """
    began = time.monotonic()
    link.learn()
    held = link.state
    certain = on_held = False
    if not (link.stale or link.may_be_away or request.listed or request.has(VcpuFlag.GUEST)):
        # While it is being migrated QEMU itself declines: what is certainly to be done, and QEMU's alone, needs no
        # more than its vCPUs. A claim needs it all afresh.
        asked = guest if decides(held, Fact.FIRMWARE) else None
        on_held = _may_rest_on_held(link, request, atomic=beside is not None or request.atomic)
        if on_held:
            plan, known = await plan_on(link, held, request, asked)
            on_held = request.total is None or not plan.plugs
        if not on_held:
            held = await link.look()
            plan, known = await plan_on(link, held, request, asked)
        certain = bool(plan.plugs or plan.unplugs) and not (plan.refusals or plan.unchanged or plan.awaited)
        certain &= guest is None or not plan.asks_guest
        on_held &= certain
    if not certain:
        held, away = await link.read_at_rest()
        plan, known = await plan_on(link, held, request, guest)
        plan = plan.refused(away)
    plan = plan.refused(here)
    if placing is not None:
        plan = placing.check(plan, held)
    if beside is not None:
        plan = await beside(plan)
    if placing is not None and not plan.refusals:
        plan = placing.prepare(plan)
    if plan.refusals:
        if any(one.code == "place" for one in plan.refusals):
            # A QEMU that has exited since it was asked has no process: that is an error of the connection.
            await link.look()
        raise VcpuRefused(
            plan.refusals,
            ids=plan.targets,
            messages=plan.messages,
            seconds=round(time.monotonic() - began, 6),
        )
    if plan.moves_cpus and contexts_run_out(held) and not known.contexts_reported:
        link.ledger.note_contexts(UsedContexts(is_reported=True))
    end: Outcome | VcpuError
    before = None
    if guest is not None and request.wait and (plan.plugs or plan.awaited):
        await guest.ask_once(held)
        before = await guest.before_plug(held)
    if plan.moves_cpus:
        end = await _placed(link, held, plan, placing, lambda: _hotplug(link, held, plan, known, began))
        if end.outcome is not OutcomeKind.APPLIED:
            # Whatever upset the plan may upset what is held: the next call asks anew.
            link.stale = True
        with leaves(lambda: _left_at(link, plan, end)):
            if isinstance(end, VcpuFailed) and not end.changed_ids:
                # "device_add not allowed while migrating": the state that was held did not tell.
                _, away = await link.read_at_rest()
                if away:
                    raise VcpuRefused(away, ids=plan.targets) from end
            if certain and end.outcome is OutcomeKind.FAILED:
                # The held state was behind: another client had plugged just what was asked for.
                now, _ = await plan_on(link, link.state, request)
                if now.unchanged == now.targets and not now.refusals:
                    end = unchanged(link.state, now, time.monotonic() - began)
    else:
        end = unchanged(held, plan, time.monotonic() - began)
        if plan.placed and placing is not None:
            end = placing.place(held, link.state, plan, end)
    if guest is None and (plan.plugs or plan.awaited) and isinstance(end, Outcome) and end.changed:
        end = replace(end, messages=(*end.messages, _UNSEEN))
    if guest is not None:
        try:
            end = await _in_the_guest(link, guest, plan, known, end, began, before)
        except asyncio.CancelledError as error:
            stays = await _take_back(link, plan, end)
            raise leaving(error, stays | _left_at(link, plan, end, but=_plugged(plan))) from error
    if on_held and request.total is not None and isinstance(end, Outcome):
        moved = set(link.state.enabled_ids).symmetric_difference(held.enabled_ids)
        if not moved.issubset(plan.targets):
            end = await _counted_out(link, request, here, guest, placing, end, began)
    seconds = time.monotonic() - began
    if isinstance(end, VcpuError):
        end.seconds = round(seconds, 6)
        raise end
    return replace(end, seconds=seconds)


def _may_rest_on_held(link: Link, request: Request, *, atomic: bool) -> bool:
    """Whether the state that is held is enough for a plan: what happened to it unheard cannot make that wrong.

    Unheard are plugs by other clients, and unplugs too under TCG (the last DEVICE_DELETED never comes on x86) and
    through libvirt. QEMU itself declines what is there already. Of a count, whether it was reached is seen
    afterwards.
    """
    if request.has(VcpuFlag.NUMA_NODE) or link.ledger.firsts:
        return False
    if request.enable:
        return True
    hears_unplugs = link.monitor.hears_all and link.state.accel == "kvm"
    return hears_unplugs and not (request.total is not None and atomic)


async def _counted_out(
    link: Link,
    request: Request,
    here: Sequence[Refusal],
    guest: Guest | None,
    placing: Placing | None,
    end: Outcome,
    began: float,
) -> Outcome | VcpuError:
    """There were not those vCPUs that were known of: on from there, until there are as many as asked."""
    left = max(request.patience - (time.monotonic() - began), 0.0)
    link.stale = True
    more: Outcome | VcpuError
    try:
        more = await change(link, replace(request, timeout=left), here, guest, placing=placing)
    except VcpuError as error:
        more = error
    except asyncio.CancelledError as error:
        raise leaving(error, Interrupted(changed_ids=went_on(link.state, end, end).changed_ids)) from error
    return went_on(link.state, end, more)


def _plugged(plan: Plan) -> frozenset[int]:
    """vCPU ids that a plan plugs."""
    return frozenset(number for entity in (*plan.awaited, *plan.plugs) for number in entity.ids)


def _left_at(link: Link, plan: Plan, end: Outcome | VcpuError, but: frozenset[int] = frozenset()) -> Interrupted:
    """What a call has left that has come to `end`, and was cancelled then. Of vCPUs in `but` it says nothing."""
    asked = {number for entity in plan.unplugs for number in entity.ids}
    gone = {number for number in asked.intersection(end.pending) if not link.state.vcpus[number].enabled}
    return Interrupted(changed_ids=tuple(sorted({*end.changed_ids, *gone} - but)))


async def _placed(
    link: Link,
    held: DomainState,
    plan: Plan,
    placing: Placing | None,
    hotplug: Callable[[], Awaitable[Outcome | VcpuError]],
) -> Outcome | VcpuError:
    """Hotplug, with its threads where they belong; the cgroups of what is gone, or did not come, are removed."""
    ids = [number for entity in (*plan.awaited, *plan.plugs, *plan.unplugs) for number in entity.ids]
    try:
        if placing is None or placing.is_idle:
            end = await hotplug()
        else:
            trouble: list[str] = []
            async with placing.room(plan, trouble):
                end = await hotplug()
            if trouble:
                end = noted(end, trouble)
        if placing is not None:
            end = placing.place(held, link.state, plan, end)
    except BaseException:
        link.drop_groups(ids)
        raise
    with leaves(lambda: _left_at(link, plan, end)):
        await _wait_groups_gone(link, ids)
    return end


async def _take_back(link: Link, plan: Plan, end: Outcome | VcpuError) -> Interrupted:
    """Cancelled while the guest was to come to run on it: what this call has plugged is unplugged again. A second
    cancel ends that. Returns what stays.
    """
    ids = tuple(sorted(_plugged(plan).intersection(end.changed_ids)))
    if not ids:
        return Interrupted()
    failure = await wind_up(change(link, Request(ids, VcpuFlag.DISABLE, timeout=UNDO_SECONDS)))
    if isinstance(failure, Exception):
        logger.warning("cancelled, and vCPU %s stays plugged: %s", format_ids(ids), failure)
    vcpus = link.state.vcpus
    return Interrupted(changed_ids=tuple(n for n in ids if vcpus[n].enabled and not vcpus[n].pending))


async def _wait_groups_gone(link: Link, ids: Sequence[int]) -> None:
    """A thread that QEMU has joined leaves its cgroup a moment later. What stays longer, the link tries again."""
    deadline = time.monotonic() + _GROUP_SECONDS
    while True:
        if link.drop_groups(ids) or time.monotonic() >= deadline:
            return
        await asyncio.sleep(_GROUP_PAUSE)


#: Seconds for that, and between two looks.
_GROUP_SECONDS: Final = 1.0
_GROUP_PAUSE: Final = 0.002

#: Design: without an agent an enable is applied, `online` is null, and one line says so.
_UNSEEN: Final = (
    "no guest agent is known: whether the guest runs on it was not checked; --agent ADDR (agent=) names its socket"
)


_NO_ACPI: Final = "this machine has no ACPI (acpi=off): only firmware that drives CPU hotplug can answer"


async def _patience(link: Link, plan: Plan) -> float:
    """Seconds that the guest has. One that is stopped cannot answer before somebody lets it go on."""
    request = plan.request
    # libvirt passes on one unplug after the other, and each has to get as far as QEMU.
    is_direct = request.wait and link.monitor.hears_all
    if request.timeout is None and is_direct and plan.unplugs and link.seen_run_state != "running":
        return request.patience if await run_state(link.monitor) == "running" else 0.0
    return request.patience


async def _hotplug(
    link: Link, held: DomainState, plan: Plan, known: Knowledge, began: float
) -> Outcome | VcpuError:
    """What device_add and device_del can do of the plan."""
    since = {entity.first: link.ledger.asked(entity.first) for entity in plan.awaited}
    result, status = await _carry_out(link, held, plan, known)
    notes = _notes(link, result, since)
    if result.pending and architecture(held.arch).has_apic:
        with leaves(lambda: _left(result)):
            notes += [_NO_ACPI] if await lacks_acpi(link.monitor) else []
    return conclude(
        link.state,
        plan,
        result,
        time.monotonic() - began,
        stopped=None if status in (None, "running") else status,
        notes=notes,
    )


async def _in_the_guest(
    link: Link,
    guest: Guest,
    plan: Plan,
    known: Knowledge,
    end: Outcome | VcpuError,
    began: float,
    before: GuestView | None,
) -> Outcome | VcpuError:
    """What the agent can do: what hotplug could not, and wait until the guest runs on what was plugged."""
    request = plan.request
    view, offlines = known.guest, list(plan.offlines)
    rejected = end if isinstance(end, VcpuRejected) else None
    if rejected is not None and request.fallback and not rejected.undone:
        # The guest kept what it was asked to let go; perhaps it takes it offline.
        kept = [number for first in rejected.reasons for number in link.state.by_id[first].ids]
        view = await guest.try_view(link.state)
        if view is not None and not check_guest(link.state, [*kept, *offlines], view, online=False):
            offlines = sorted({*offlines, *kept})
            end = without_rejections(link.state, plan, rejected)
            note = f"hotplug could not: {rejected.message}"
            end = replace(end, messages=(*end.messages, note))
    if not isinstance(end, Outcome):
        if ids := [*plan.onlines, *offlines]:
            end.messages += (f"not tried after that: vCPU {format_ids(ids)} in the guest",)
        return end
    with leaves(lambda: _left_at(link, plan, end, but=_plugged(plan))):
        for ids, online in (([*plan.onlines], True), (offlines, False)):
            if not ids:
                continue
            assert view is not None
            done = await _switch(link, guest, plan, view, ids, end, online=online)
            if not isinstance(done, Outcome):
                if (
                    rejected is None
                    or isinstance(done, VcpuConnectionError)
                    or done.changed_ids != end.changed_ids
                ):
                    return done
                rejected.messages += (f"nor did the guest agent: {done.message}",)
                return rejected
            end = done
        if not request.has(VcpuFlag.GUEST) and (left_there := sorted({*offlines, *plan.offline_already})):
            end = replace(end, messages=(*end.messages, still_plugged(left_there)))
        if view is not None and not end.changed:
            end = _as_seen(link, view, end)
        if request.wait:
            plugged = [number for entity in (*plan.awaited, *plan.plugs) for number in entity.ids]
            fresh = [n for n in plugged if n not in end.pending and link.state.vcpus[n].enabled]
            if fresh:
                left = max(request.patience - (time.monotonic() - began), 0.0)
                end = await _until_online(link, guest, end, fresh, left, before)
    return end


async def _switch(
    link: Link, guest: Guest, plan: Plan, view: GuestView, ids: Sequence[int], before: Outcome, *, online: bool
) -> Outcome | VcpuError:
    """Take these online or offline in the guest."""
    try:
        run = await guest.switch(view, ids, online=online)
    except VcpuError as error:
        return interrupted(plan, ids, before, error)
    except asyncio.CancelledError as error:
        raise leaving(error, await _half_switched(link, guest, view, ids)) from error
    messages = list(before.messages)
    if view.assumed:
        messages.append(_ASSUMED)
    with leaves(lambda: Interrupted(changed_ids=run.changed)):
        state = await _lit(link, guest)
    return switched(state, plan, run, 0.0, before=before, messages=messages)


async def _half_switched(link: Link, guest: Guest, view: GuestView, ids: Sequence[int]) -> Interrupted:
    """Cancelled while the agent switched these: what the guest says of them now, compared with `view`. If it says
    nothing in time, or at a second cancel, they are unsure.
    """
    found = Interrupted(unsure_ids=tuple(ids))

    async def look() -> None:
        nonlocal found
        async with asyncio.timeout(UNDO_SECONDS):
            now = await guest.view(link.state)
        changed = tuple(number for number in ids if now.online(number) is not view.online(number))
        found = Interrupted(changed_ids=changed)

    failure = await wind_up(look())
    if failure is not None:
        logger.debug("cancelled, and what the guest agent did is not known: %s", failure)
    return found


#: Nothing in the guest told which CPU is which.
_ASSUMED: Final = (
    "that the guest's CPU numbers are the vCPU ids is assumed: the agent could not read what tells them apart"
    " (guest-file-open)"
)


def _as_seen(link: Link, view: GuestView, end: Outcome) -> Outcome:
    """Nothing was to be done; the rows with what the guest says."""
    state = with_online(link.state, view)
    return replace(end, rows=tuple(state.vcpus[row.id] for row in end.rows))


async def _until_online(
    link: Link, guest: Guest, end: Outcome, fresh: Sequence[int], seconds: float, before: GuestView | None
) -> Outcome:
    """Enabled is what the guest can run on."""
    trouble: VcpuError | None = guest.trouble if guest.is_silent else None
    if trouble is None:
        try:
            arrival = await guest.await_online(link.state, fresh, seconds, before)
        except VcpuError as error:
            trouble = error
    if trouble is not None:
        note = f"whether the guest runs on it is not known: {trouble.message}"
        end = replace(end, messages=(*end.messages, note))
        has_fallen_silent = guest.has_answered and isinstance(trouble, VcpuConnectionError)
        return _pending_online(end, fresh) if has_fallen_silent else end
    state = with_online(link.state, arrival.view)
    end = replace(end, rows=tuple(state.vcpus[row.id] for row in end.rows))
    why = f": {arrival.said}" if arrival.said else ""
    if arrival.unknown:
        end = replace(end, messages=(*end.messages, _nameless(arrival)))
    if not arrival.missing:
        return end
    text = f"vCPU {format_ids(arrival.missing)} is plugged, and the guest does not run on it{why}"
    return _pending_online(replace(end, messages=(*end.messages, text)), arrival.missing)


def _pending_online(end: Outcome, ids: Iterable[int]) -> Outcome:
    """These are plugged, and nobody knows that the guest runs on them."""
    return replace(end, outcome=OutcomeKind.PENDING, pending_online=tuple(sorted(ids)))


def _nameless(arrival: Arrival) -> str:
    lit = sum(cpu.online for cpu in arrival.view.cpus)
    return (
        f"whether the guest runs on vCPU {format_ids(arrival.unknown)} is not known: nothing tells which of its"
        f" CPUs that is ({lit} of {len(arrival.view.cpus)} are online)"
    )


async def _lit(link: Link, guest: Guest) -> DomainState:
    view = await guest.try_view(link.state)
    return link.state if view is None else with_online(link.state, view)


async def _carry_out(link: Link, state: DomainState, plan: Plan, known: Knowledge) -> tuple[Result, str | None]:
    """Its end and, if the guest has yet to answer, what QEMU says of its run state."""
    request = plan.request
    moves = Moves(plan.plugs, plan.unplugs, plan.awaited, link.ledger.firsts)
    terms = Terms(
        await _patience(link, plan),
        wait=request.wait,
        atomic=request.atomic,
        retries=request.retry,
        reset_drops_unplug=architecture(state.arch).reset_drops_unplug,
    )

    async def look(*, is_last: bool, resent: Callable[[], object], declined: Collection[int]) -> Snapshot:
        fresh = await link.look(is_last=is_last, anew=resent, declined=declined)
        restore_forbidden = None
        if request.atomic and not request.force:
            now = link.knowledge(known.x2apic, known.firmware_runs)
            gone = [fresh.by_id[e.first] for e in plan.unplugs if not fresh.by_id[e.first].plugged]
            restore_forbidden = hotplug.restore_forbidden(fresh, gone, now)
        return Snapshot.of(fresh, state, moves, hotplug.undo_forbidden(fresh, known), restore_forbidden)

    drive = Drive(Transaction(moves, terms), link.monitor, look, link.ask)
    link.driven = frozenset(entity.first for entity in moves.entities)
    try:
        await drive.run()
    except VcpuConnectionError as error:
        raise _lost_on_the_way(error, plan, drive.result) from error
    except asyncio.CancelledError as error:
        raise leaving(error, _left(drive.result)) from error
    finally:
        link.driven = frozenset()
        _record(link, drive.result)
    result = drive.result
    try:
        # It is in nobody's hands any more: an answer of the guest's that comes now ends it.
        with leaves(lambda: _left(result)):
            return result, await run_state(link.monitor) if result.pending else None
    except VcpuConnectionError as error:
        raise _lost_on_the_way(error, plan, result) from error


def _left(result: Result) -> Interrupted:
    """What a transaction has left, cancelled as it stands; what is pending, the link's ledger tells."""
    return Interrupted(changed_ids=result.changed, unsure_ids=result.unsure)


def _record(link: Link, result: Result) -> None:
    """What the next call, and the next process, must know of unplugs that have not ended."""
    pending = link.ledger.firsts
    if open_still := [entity for entity in result.still_asked if entity.first not in pending]:
        link.ledger.ask(open_still, link.state, time.time())
    link.ledger.end(result.gone, gone=True)
    link.ledger.end(result.finished)
    # What is pending for a cancelled call may have gone at its last look.
    link.ledger.settle(link.state)
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


def _lost_on_the_way(error: VcpuConnectionError, plan: Plan, result: Result) -> VcpuConnectionError:
    """The same error, with what was under way."""
    way = "; ".join(f"vCPU {format_ids(ids)}: {what}" for what, ids in result.stages.items())
    return VcpuConnectionError(
        f"{error.message}. When it was lost: {way}",
        address=error.address,
        reason=error.reason,
        hint=error.hint,
        libvirt=error.libvirt,
        ids=plan.targets,
        changed_ids=result.changed,
        pending=result.pending,
        undone=result.undone,
        messages=plan.messages,
        mechanism="hotplug",
    )
