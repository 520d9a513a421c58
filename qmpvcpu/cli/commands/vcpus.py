"""`setvcpu`, `setvcpus`, `vcpupin` and `guestvcpus`: change the vCPUs of a guest."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from qmpvcpu.cli import render
from qmpvcpu.cli.options import (
    CHANGE,
    CRASHES,
    DOMAIN,
    IMPACT,
    THROUGH_AGENT,
    argument,
    command,
    flag,
    flags_of,
    number,
    positive,
    value,
)
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.core.request import Request, parse_ids
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.request import check_range
from qmpvcpu.core.state.guest_view import GuestView
from qmpvcpu.errors import OutcomeKind, VcpuError, VcpuRefused, VcpuUsageError

if TYPE_CHECKING:
    from qmpvcpu.cli.session import CommandSession


@command(
    DOMAIN,
    argument("ids", "IDS", "5, 1-3,7 or 0-7,^2; with --numa-node one node", option="vcpulist"),
    flag("--enable", "plug them"),
    flag("--disable", "unplug them"),
    *IMPACT,
    THROUGH_AGENT,
    flag("--numa-node", "IDS is a node; take vCPUs of it"),
    value("--count", "N", "with --numa-node: how many", type=positive),
    flag("--core", "every vCPU of the core that holds the id"),
    *CHANGE,
    value(
        "--retry", "N", "ask again, up to N times, what the guest refused", type=number, default=0
    ),
    flag("--atomic", "bring back what was removed if the rest is rejected or fails"),
    flag("--no-fallback", "never ask the guest agent for what hotplug cannot do"),
    CRASHES,
)
async def setvcpu(session: CommandSession) -> int:
    """Enable, disable or query single vCPUs."""
    return await _carry_out(session, request_of(session.options))


@command(
    DOMAIN,
    argument("total", "COUNT", "how many", option="count", type=positive),
    *IMPACT,
    THROUGH_AGENT,
    flag("--maximum", "with --config: the maximum instead"),
    flag("--hotpluggable", "with --config: what is added can be unplugged later"),
    *CHANGE,
)
async def setvcpus(session: CommandSession) -> int:
    """Have so many vCPUs enabled."""
    return await _carry_out(session, request_of(session.options))


def request_of(options: Namespace) -> Request:
    """Return the request of `setvcpu` or `setvcpus`."""
    if options.command == "setvcpu":
        return Request(
            parse_ids(options.ids),
            flags_of(options),
            options.count,
            options.force,
            timeout=options.timeout,
            wait=not options.no_wait,
            atomic=options.atomic,
            retry=options.retry,
            fallback=not options.no_fallback,
            place=not options.no_place,
        )
    if options.maximum and not options.config:
        raise catalogue.MAXIMUM_WITHOUT_CONFIG.error()
    return Request(
        (),
        flags_of(options),
        total=options.total,
        timeout=options.timeout,
        wait=not options.no_wait,
        maximum=options.maximum,
        hotpluggable=options.hotpluggable,
        place=not options.no_place,
    )


async def _carry_out(session: CommandSession, request: Request) -> int:
    """Carry out a request, or only plan it, and show the result."""
    options = session.options
    async with session.connect() as domain:
        if options.dry_run and not request.is_query:
            return show_plan(session, await domain.plan(request))
        async with session.waiting("waiting for the guest", request.patience):
            result = await session.finish(domain.request(request))
        if result.outcome is OutcomeKind.QUERIED:
            state = domain.last_state
            session.warn_of_agent(domain)
    if result.outcome is not OutcomeKind.QUERIED:
        return session.show_outcome(result)
    session.warn(result.messages)
    document = state.to_json() | {"vcpus": [row.to_json() for row in result.rows]}
    session.show(document, render.vcpu_table(result.rows))
    return result.outcome.exit_code


def show_plan(session: CommandSession, planned: Plan) -> int:
    """Show what would be done; return the exit code."""
    session.warn(planned.messages)
    session.show(planned.to_json(), render.plan(planned))
    return OutcomeKind.REFUSED.exit_code if planned.refusals else 0


@command(
    DOMAIN,
    argument("vcpu", "N", "the vCPU", type=number, default=None),
    argument("cpulist", "CPUS", "host CPUs: 0-3,^2; r: all", default=None),
    *IMPACT,
)
async def vcpupin(session: CommandSession) -> int:
    """Show or set the host CPUs of a vCPU's thread."""
    options = session.options
    vcpu_id, cpus = options.vcpu, options.cpulist
    if cpus is not None and vcpu_id is None:
        raise VcpuUsageError("no vCPU is given", hint="vcpupin DOMAIN --vcpu N --cpulist CPUS")
    flags = flags_of(session.options)
    if cpus is None and options.live and options.config:
        raise catalogue.LIVE_AND_CONFIG.error()
    async with session.connect() as domain:
        if cpus is not None:
            result = await session.finish(domain.pin(vcpu_id, None if cpus == "r" else cpus, flags))
        else:
            state = await domain.state(flags)
    if cpus is not None:
        session.warn(result.messages)
        word = "pinned" if cpus != "r" else "not pinned any more"
        session.show(
            result.to_json(),
            [f"vCPU {vcpu_id}: {word}" if result.changed else f"vCPU {vcpu_id}: already so"],
        )
        return result.outcome.exit_code
    refusals = check_range(state, (vcpu_id,)) if vcpu_id is not None else []
    if refusals:
        raise VcpuRefused(refusals)
    rows = [vcpu for vcpu in state.vcpus if vcpu_id is None or vcpu.id == vcpu_id]
    pins = [{"vcpu": vcpu.id, "cpus": vcpu.pin, "last_cpu": vcpu.cpu} for vcpu in rows]
    lines = [("VCPU", "CPU AFFINITY"), *((str(vcpu.id), vcpu.pin or "-") for vcpu in rows)]
    session.show({"domain": domain.name, "pins": pins}, render.columns(lines, right=frozenset({0})))
    return 0


@command(
    DOMAIN,
    argument("cpulist", "GUEST-IDS", "which ones to switch: 1, 1-3,5", default=None),
    flag("--enable", "take them online"),
    flag("--disable", "take them offline"),
)
async def guestvcpus(session: CommandSession) -> int:
    """Show or switch the guest's own CPUs."""
    options = session.options
    if options.enable + options.disable != (options.cpulist is not None):
        raise VcpuUsageError(
            "--cpulist goes with one of --enable and --disable",
            hint="guestvcpus DOMAIN --cpulist 1-2 --disable",
        )
    async with session.connect() as domain:
        if options.cpulist is not None:
            ids = parse_ids(options.cpulist, "CPU of the guest")
            result = await session.finish(domain.set_guest_vcpus(ids, options.enable))
            session.warn(result.messages)
            view = GuestView((), {})
            try:
                view = await domain.guest_vcpus()
            except VcpuError as error:
                # The change is done and verified, so this error is only a warning.
                session.warn([f"what the guest's CPUs are now is not known: {error.message}"])
            # `vcpus` and `changed_ids` are the guest's own ids here; `cpus` has the vCPU of each
            # one.
            lines = render.guest_outcome(result, is_online=options.enable)
            session.show(result.to_json() | view.to_json(), lines)
            return result.outcome.exit_code
        view = await domain.guest_vcpus()
    session.show(view.to_json() | {"domain": domain.name}, render.guest(view))
    return 0
