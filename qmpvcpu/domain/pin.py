"""`vcpupin`: the host CPUs of one vCPU, for its thread and in the definition."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from qmpvcpu.core.engine.report import Report
from qmpvcpu.core.model import DomainState, Outcome
from qmpvcpu.core.request import Request, parse_ids
from qmpvcpu.core.rules.placement import Placement, check_thread, check_thread_cpus, with_threads
from qmpvcpu.domain.definition import DefinitionHandle, follow
from qmpvcpu.domain.session import Session
from qmpvcpu.errors import (
    Refusal,
    VcpuConnectionError,
    VcpuFailed,
    VcpuRefused,
    VcpuUsageError,
)
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.host.definition_files import not_written
from qmpvcpu.host.process import is_alive


def check_pin(
    vcpu_id: int, cpus: str | Iterable[int] | None, flags: VcpuFlag
) -> tuple[tuple[int, ...] | None, Request]:
    """Return the requested host CPUs (None: all), and the request.

    Raises:
        VcpuUsageError: the arguments make no sense.
    """
    wanted = None if cpus is None else _host_cpus(cpus)
    if VcpuFlag(flags) & ~(VcpuFlag.LIVE | VcpuFlag.CONFIG):
        raise VcpuUsageError(
            f"{VcpuFlag(flags)!r} is not for pinning",
            hint="give LIVE, CONFIG or both",
        )
    if type(vcpu_id) is not int:
        raise VcpuUsageError(f"{vcpu_id!r} is not a vCPU id", hint="ids are integers")
    return wanted, Request((vcpu_id,), VcpuFlag(flags))


def _host_cpus(cpus: str | Iterable[int]) -> tuple[int, ...]:
    if isinstance(cpus, str):
        return parse_ids(cpus, "host CPU")
    chosen = tuple(cpus)
    if not chosen or any(type(number) is not int or number < 0 for number in chosen):
        raise VcpuUsageError(
            f"{chosen!r} are not host CPUs",
            hint="give one or more of 0, 1, …; None for all",
        )
    return tuple(sorted(set(chosen)))


async def change_pin(
    session: Session | None,
    definition: DefinitionHandle | None,
    vcpu_id: int,
    cpus: tuple[int, ...] | None,
    preconditions: Sequence[Refusal] = (),
) -> Outcome:
    """Pin a vCPU to host CPUs, or allow all of them. Both sides are checked before either is
    touched.

    Args:
        session: the connection to the running guest, if it is to change.
        definition: the definition, if it is to change.
        vcpu_id: the vCPU's id.
        cpus: host CPUs, ascending; None for all.
        preconditions: refusals that do not depend on the state.

    Raises:
        VcpuRefused: nothing was touched.
        VcpuFailed: the kernel declined.
        VcpuPartial: the thread is pinned, and the definition could not be written.
    """
    began = time.monotonic()
    report = Report((vcpu_id,))
    config = definition.plan_pin(vcpu_id, cpus) if definition is not None else None
    refusals = [*preconditions, *(config.plan.refusals if config is not None else ())]
    state = await session.read() if session is not None else None
    if session is not None and state is not None:
        refusals += [one for one in _against(session, state, vcpu_id, cpus) if one not in refusals]
    if refusals:
        raise VcpuRefused(refusals, ids=report.ids)
    try:
        if config is not None:
            try:
                await config.stage()
            except OSError as error:
                raise VcpuRefused([not_written(config.place, error)], ids=report.ids) from error
        if session is not None and state is not None:
            state, is_other = _pin(session, state, vcpu_id, cpus)
            report.changed |= {vcpu_id} if is_other else set()
        if config is None:
            report.defined((), (), written=False)
        else:
            await follow(config, report, failure="vCPU {} is pinned")
        return report.end(state, time.monotonic() - began)
    finally:
        if config is not None:
            config.discard()


def _against(
    session: Session, state: DomainState, vcpu_id: int, cpus: tuple[int, ...] | None
) -> list[Refusal]:
    if found := check_thread(state, vcpu_id):
        return found
    wanted = Placement(cpus if cpus is not None else ())
    return check_thread_cpus(
        vcpu_id, wanted, session.threads.facts((wanted,)) if session.threads is not None else None
    )


def _pin(
    session: Session, state: DomainState, vcpu_id: int, cpus: tuple[int, ...] | None
) -> tuple[DomainState, bool]:
    """Return the state afterwards, and whether the pinning has changed."""
    threads, thread_id = session.threads, state.vcpus[vcpu_id].thread_id
    before = (
        threads.look([thread_id]).get(thread_id)
        if threads is not None and thread_id is not None
        else None
    )
    if threads is None or thread_id is None or before is None:
        if session.process is not None and not is_alive(session.process.key):
            raise VcpuConnectionError(
                f"QEMU (process {session.process.pid}) has exited",
                reason="closed",
                hint="look at its log",
            )
        raise VcpuFailed(
            f"vCPU {vcpu_id} has no thread any more",
            hint="look at it with vcpuinfo",
            ids=(vcpu_id,),
        )
    placement = Placement(cpus if cpus is not None else ())
    try:
        if threads.has_layout() and not threads.is_in_group(thread_id, placement, vcpu_id):
            # A vCPU that QEMU started with and that was never placed is still in the emulator's
            # group, which may have other CPUs.
            threads.make_groups({vcpu_id: placement})
            after = threads.place(thread_id, placement, vcpu_id)
        else:
            after = before if before.cpus == cpus else threads.place(thread_id, placement)
    except OSError as error:
        raise VcpuFailed(
            f"vCPU {vcpu_id} could not be given {placement}: {error.strerror or error}",
            hint="look at its cpuset cgroup, which may not have these CPUs",
            ids=(vcpu_id,),
        ) from error
    return with_threads(state, {thread_id: after}), after.cpus != before.cpus
