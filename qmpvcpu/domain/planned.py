"""Read the state that a request is planned on, and plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qmpvcpu.core.model import DomainState
from qmpvcpu.core.planning.live import Plan, make_plan
from qmpvcpu.core.quirks import Fact, decides
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules import hotplug
from qmpvcpu.core.state.guest_view import GuestView
from qmpvcpu.core.state.knowledge import Knowledge
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.reader import firmware_runs, has_x2apic
from qmpvcpu.domain.session import Session
from qmpvcpu.flags import VcpuFlag


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan for the running guest, and what it is based on.

    Attributes:
        state: the state that the plan was made on.
        known: the other facts that the plan needed.
        is_certain: the plan does not claim that anything is already done. All of it will be sent,
            and QEMU declines what is already so.
        is_cached: the state is the cached one.
    """

    plan: Plan
    state: DomainState
    known: Knowledge
    is_certain: bool = False
    is_cached: bool = False


async def read_and_plan(
    session: Session, request: Request, guest: Guest | None, *, config: bool
) -> Planned:
    """Read as much as the request needs, and plan on it.

    Args:
        session: the open connection.
        request: the request.
        guest: the guest's agent, if one is known.
        config: whether the definition follows.

    Raises:
        VcpuConnectionError, VcpuRefused: only the agent could do it, and it does not answer or is
            not allowed to.
    """
    session.learn()
    found = await _without_claim(session, request, guest, config=config)
    if found is not None:
        return found
    state, migrating = await session.read_and_check_migration()
    plan, known = await plan_on(session, state, request, guest)
    return Planned(plan.refused(migrating), state, known)


async def _without_claim(
    session: Session, request: Request, guest: Guest | None, *, config: bool
) -> Planned | None:
    """Return a plan that needs only the vCPUs, if this request has one.

    While the guest is migrating, QEMU itself declines. So a plan that is certain to be sent, and
    only to QEMU, needs no other query. A plan that claims that something is already so needs a
    refresh of everything.
    """
    if session.stale or session.may_be_migrating or request.listed or request.has(VcpuFlag.GUEST):
        return None
    answered = guest if decides(session.state, Fact.FIRMWARE) else None
    state, is_cached = (
        session.state,
        _is_cached_state_enough(session, request, atomic=config or request.atomic),
    )
    if is_cached:
        plan, known = await plan_on(session, state, request, answered)
        is_cached = request.total is None or not plan.plugs
    if not is_cached:
        state = await session.look()
        plan, known = await plan_on(session, state, request, answered)
    has_claim = (
        plan.refusals or plan.unchanged or plan.awaited or (guest is not None and plan.asks_guest)
    )
    if has_claim or not (plan.plugs or plan.unplugs):
        return None
    return Planned(plan, state, known, is_certain=True, is_cached=is_cached)


def _is_cached_state_enough(session: Session, request: Request, *, atomic: bool) -> bool:
    """Whether the cached state is enough for a plan: changes without an event cannot make the plan
    wrong.

    Plugs by other clients have no event. Unplugs have none under TCG (the last DEVICE_DELETED never
    comes on x86), nor through libvirt. QEMU itself declines to plug what is plugged already.
    Whether a count was reached is checked afterwards.
    """
    if request.has(VcpuFlag.NUMA_NODE) or session.pending_unplugs.entity_ids:
        return False
    if request.enable:
        return True
    hears_unplugs = session.monitor.hears_all and session.state.accel == "kvm"
    return hears_unplugs and not (request.total is not None and atomic)


async def plan_on(
    session: Session, state: DomainState, request: Request, guest: Guest | None = None
) -> tuple[Plan, Knowledge]:
    """Plan, and query from QEMU and the guest what only some plans need.

    Raises:
        VcpuConnectionError, VcpuRefused: only the agent could do it, and it does not answer or is
            not allowed to.
    """
    known = session.knowledge()
    plan = make_plan(state, request, known)
    answered = await _ask_qemu(session, state, plan, guest, known)
    if answered.smm or answered.legacy_hotplug:
        plan = make_plan(state, request, answered)
    view = await _ask_guest(guest, state, plan)
    if answered == known and view is None:
        return plan, known
    known = replace(answered, guest=view)
    return make_plan(state, request, known), known


async def _ask_qemu(
    session: Session, state: DomainState, plan: Plan, guest: Guest | None, known: Knowledge
) -> Knowledge:
    moved = [*plan.awaited, *plan.plugs]
    if hotplug.needs_x2apic(state, moved):
        known = replace(known, x2apic=await has_x2apic(session.monitor, state))
    # An undo of a plug is an unplug too.
    if decides(state, Fact.FIRMWARE) and (moved or plan.unplugs):
        runs = await firmware_runs(session.monitor)
        if runs is None and guest is not None and await guest.try_view(state) is not None:
            runs = False
        known = replace(known, firmware_runs=runs)
    if moved and decides(state, Fact.SMM):
        known = replace(known, smm=await session.smm_has_run())
    if plan.unplugs and decides(state, Fact.LEGACY_HOTPLUG):
        known = replace(known, legacy_hotplug=await session.is_hotplug_legacy())
    return known


async def _ask_guest(guest: Guest | None, state: DomainState, plan: Plan) -> GuestView | None:
    if guest is None:
        return None
    if plan.request.has(VcpuFlag.GUEST):
        # The agent is not queried for a plan that is refused in any case.
        return await guest.view(state) if not plan.refusals else None
    return await guest.try_view(state) if plan.asks_guest else None
