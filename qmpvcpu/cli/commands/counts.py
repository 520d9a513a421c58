"""`vcpuinfo` and `vcpucount`: the vCPUs of a guest as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmpvcpu.cli import render
from qmpvcpu.cli.options import DOMAIN, IMPACT, command, flag, flags_of
from qmpvcpu.core.model import DomainState
from qmpvcpu.core.rules import catalogue
from qmpvcpu.flags import VcpuFlag

if TYPE_CHECKING:
    from qmpvcpu.cli.session import CommandSession


@command(DOMAIN, IMPACT[0], flag("--config", "the persistent definition"))
async def vcpuinfo(session: CommandSession) -> int:
    """Show every vCPU."""
    if session.options.live and session.options.config:
        raise catalogue.LIVE_AND_CONFIG.error()
    async with session.connect() as domain:
        state = await domain.state(flags_of(session.options))
        session.warn_of_agent(domain)
    session.show(state.to_json(), render.info(state))
    return 0


@command(
    DOMAIN,
    flag("--maximum", "how many there can be"),
    flag("--active", "how many are enabled"),
    *IMPACT,
    flag("--guest", "ask the guest agent"),
)
async def vcpucount(session: CommandSession) -> int:
    """Count vCPUs."""
    options = session.options
    if options.maximum and options.active:
        raise catalogue.MAXIMUM_AND_ACTIVE.error()
    if options.live and options.config:
        raise catalogue.LIVE_AND_CONFIG.error()
    one = options.maximum or options.active or options.live or options.config or options.current
    states: dict[str, DomainState] = {}
    async with session.connect() as domain:
        if options.guest and not options.config:
            view = await domain.guest_vcpus()
            online = sum(cpu.online for cpu in view.cpus)
            session.show({"domain": domain.name, "count": online}, [str(online)])
            return 0
        if one or options.guest:
            state = await domain.state(flags_of(session.options))
            states["live" if state.version is not None else "config"] = state
        else:
            if domain.has_definition:
                states["config"] = await domain.state(VcpuFlag.CONFIG)
            if domain.is_active:
                states["live"] = await domain.state(VcpuFlag.LIVE)
    counts = {
        word: {side: count(states[side]) if side in states else None for side in ("live", "config")}
        for word, count in (
            ("maximum", lambda s: s.maxcpus),
            ("current", lambda s: len(s.enabled_ids)),
        )
    }
    document: dict[str, Any] = {"domain": domain.name, **counts}
    if one:
        found = counts["maximum" if options.maximum else "current"]
        number = next(count for count in found.values() if count is not None)
        session.show(document | {"count": number}, [str(number)])
    else:
        rows = [
            (word, side, str(counts[word][side]))
            for word in counts
            for side in ("config", "live")
            if counts[word][side] is not None
        ]
        session.show(document, render.columns(rows))
    return 0
