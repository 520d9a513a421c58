"""CONFIG, and LIVE with CONFIG: the definition is checked and staged first, and takes effect last."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from qmpvcpu.core.model import Outcome, format_ids
from qmpvcpu.core.planning.config import ConfigPlan
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.core.request import Request
from qmpvcpu.core.rules.request import check_request
from qmpvcpu.core.state.from_definition import state_of
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.definition import ConfigChange, Persistent, half_done
from qmpvcpu.domain.interrupted import Interrupted, leaving
from qmpvcpu.domain.placement import Placing
from qmpvcpu.domain.run import change
from qmpvcpu.domain.session import Link
from qmpvcpu.errors import OutcomeKind, Refusal, VcpuError, VcpuPartial, VcpuRefused
from qmpvcpu.host.definition_files import not_written

__all__ = ["change_both", "change_config", "with_config"]


async def change_config(
    persistent: Persistent | None, request: Request, here: Sequence[Refusal], name: str
) -> Outcome:
    """Carry out a request on the definition alone.

    Raises:
        VcpuRefused: it is not to be done, or cannot be written; the definition is as it was.
    """
    began = time.monotonic()
    found = [*here, *check_request(request)]
    if persistent is None:
        raise VcpuRefused(found, ids=request.ids)
    config = persistent.plan(request)
    refusals = [*found, *config.plan.refusals]
    if refusals:
        raise VcpuRefused(refusals, ids=config.plan.targets or request.ids)
    try:
        try:
            await config.stage()
            await config.commit()
        finally:
            config.discard()
    except VcpuPartial as error:
        error.ids, error.changed_ids, error.remaining = (
            config.plan.targets,
            config.plan.changed,
            config.plan.changed,
        )
        raise
    except OSError as error:
        raise VcpuRefused([not_written(persistent.place, error)], ids=config.plan.targets) from error
    plan = config.plan
    rows = state_of(plan.new, name).vcpus
    return Outcome(
        OutcomeKind.APPLIED,
        plan.targets,
        tuple(rows[number] for number in plan.targets if number < len(rows)),
        changed_ids=plan.changed,
        messages=plan.messages,
        seconds=time.monotonic() - began,
        config_changed_ids=plan.changed,
        defined=plan.writes,
        already=() if request.total is None else (f"nothing to do: {request.total} vCPUs are enabled already",),
    )


async def change_both(
    link: Link,
    persistent: Persistent | None,
    request: Request,
    here: Sequence[Refusal] = (),
    guest: Guest | None = None,
    placing: Placing | None = None,
) -> Outcome:
    """Both are checked, and the definition is staged; then live; then the definition takes effect.

    Raises:
        VcpuPartial, VcpuConnectionError: the guest is changed, and the definition could not be.
        VcpuError: every other end of the live side that is no success; the definition is as it was.
    """
    config: ConfigChange | None = None

    async def beside(plan: Plan) -> Plan:
        nonlocal config
        if persistent is None:
            return plan
        config, plan = _planned(persistent, plan)
        if not plan.refusals:
            try:
                await config.stage()
            except OSError as error:
                plan = plan.refused([not_written(persistent.place, error)])
        return plan

    try:
        end = await change(link, request, here, guest, beside, placing)
        if config is None:
            return end
        # What is plugged stays, whether or not the guest has come to run on it.
        if end.outcome is not OutcomeKind.APPLIED and not (end.pending_online and not end.pending):
            return replace(end, messages=(*end.messages, *_left(config.plan, str(end.outcome))))
        try:
            await config.commit()
        except asyncio.CancelledError as error:
            raise leaving(error, Interrupted(changed_ids=end.changed_ids)) from error
        except (OSError, VcpuError) as error:
            assert persistent is not None
            what = f"vCPU {format_ids(end.changed_ids)} is changed"
            facts = {"ids": end.ids, "undone": end.undone, "messages": end.messages, "mechanism": end.mechanism}
            config = None  # what became of it is told
            raise half_done(
                error, persistent.place, what, end.changed_ids, seconds=round(end.seconds, 6), **facts
            ) from error
        return _with(end, config.plan)
    except VcpuError as error:
        if config is not None and not isinstance(error, VcpuRefused | VcpuPartial) and config.plan.writes:
            error.messages += ("the definition is as it was",)
        raise
    finally:
        if config is not None:
            config.discard()


def with_config(plan: Plan, persistent: Persistent, *, live: bool) -> Plan:
    """A plan with what it makes of the definition."""
    if live:
        config, plan = _planned(persistent, plan)
        assert plan.config is not None
        return replace(plan, config=replace(plan.config, diff=() if plan.refusals else config.diff))
    request = plan.request
    config = persistent.plan(request)
    plan = plan.refused(check_request(request)).with_config(config.plan, alone=True)
    return replace(plan, config=replace(config.plan, diff=() if plan.refusals else config.diff))


def _planned(persistent: Persistent, plan: Plan) -> tuple[ConfigChange, Plan]:
    # A count is reached on each side by itself; ids are those that the running guest has decided on.
    ids = None if plan.request.total is not None else plan.targets
    request = plan.request
    try:
        config = persistent.plan(request, ids)
    except VcpuRefused as error:
        raise VcpuRefused([*plan.refusals, *error.refusals], ids=plan.targets) from error
    return config, plan.with_config(config.plan, alone=False)


def _left(plan: ConfigPlan, outcome: str) -> list[str]:
    if not plan.writes:
        return []
    return [
        f"the definition was not written, because the running guest's side is {outcome}: once that has ended, ask"
        " for --config (CONFIG) alone"
    ]


def _with(end: Outcome, plan: ConfigPlan) -> Outcome:
    return replace(
        end,
        ids=tuple(sorted({*end.ids, *plan.targets})),
        changed_ids=tuple(sorted({*end.changed_ids, *plan.changed})),
        live_changed_ids=end.changed_ids,
        config_changed_ids=plan.changed,
        defined=plan.writes,
    )
