"""The phases of a migration, each at one side. `core.migration` decides; this file queries, acts
and waits.

`move` runs all phases for one guest. `migration` is the object that a user calls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, TypeVar

from qmpvcpu import aio
from qmpvcpu.core.migration.cookie import (
    Cookie,
    check_arrived,
    check_destination,
    check_same,
    check_uri,
    machine_of,
    missing,
)
from qmpvcpu.core.migration.leaving import ONE_CPU, check_hangs, check_source, without_one_cpu
from qmpvcpu.core.migration.status import MigrationStatus, address_of
from qmpvcpu.core.migration.who_runs import Cancel, Destination, Source, cancel_step
from qmpvcpu.core.model import DomainState
from qmpvcpu.core.rules import catalogue
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.migration import ownership, saving, sides
from qmpvcpu.domain.migration.one_cpu import why_not
from qmpvcpu.domain.reader import run_state
from qmpvcpu.domain.session import Session
from qmpvcpu.errors import Refusal, VcpuConnectionError, VcpuError, VcpuFailed, VcpuRefused
from qmpvcpu.host.ownership import Role
from qmpvcpu.xml.document import read_domain

T = TypeVar("T")

_NOT_REPORTED: Final = MigrationStatus()
#: Seconds that a destination has to load what has arrived.
_ARRIVAL_SECONDS: Final = 10.0

# -- begin -----------------------------------------------------------------------------------------


async def check_begin(
    session: Session, *, force: bool, agent: Guest | None = None, is_paused: bool = False
) -> tuple[DomainState, bool]:
    """Return the state of the source, and whether it runs.

    Args:
        session: the connection to the source.
        force: also do what is known to hang the guest.
        agent: the guest's agent, if it may take CPUs offline for the migration.
        is_paused: the guest is paused during the migration.

    Raises:
        VcpuRefused: the guest cannot be migrated now; it lists every reason.
    """
    state = await session.read()
    runs, status = await run_state(session.monitor), await sides.status_of(session.monitor)
    refusals = check_source(
        state, runs, status, session.pending_unplugs.entity_ids, is_paused=is_paused
    )
    if (
        runs == "paused"
        and status.is_incoming
        and ownership.recall(session, Role.DESTINATION) is not None
    ):
        refusals.append(catalogue.ARRIVED())
    hangs = [] if force else check_hangs(state, session.removals)
    if agent is not None and any(one.code == ONE_CPU for one in hangs):
        hangs = without_one_cpu(hangs, await why_not(agent, state, runs))
    if refusals := refusals + hangs:
        raise VcpuRefused(refusals)
    return state, runs == "running"


# -- prepare ---------------------------------------------------------------------------------------


async def prepare(
    session: Session,
    cookie: Cookie,
    plug: Callable[[Sequence[int]], Awaitable[object]],
    differences: Sequence[Refusal] = (),
) -> None:
    """Check a waiting destination, plug the vCPUs that it lacks, and make sure that it does not
    start by itself.

    Args:
        session: the connection to the destination.
        cookie: the source's cookie.
        plug: enables vCPUs at the destination.
        differences: refusals for known differences between the machines.

    Raises:
        VcpuRefused: the destination cannot take the guest; it lists every reason. Nothing was
            touched.
        VcpuFailed: QEMU declined a command.
    """
    state = await session.read()
    runs, uuid = await run_state(session.monitor), await session.monitor.query_uuid()
    source = cookie.machine
    # A cookie that another tool made contains only the XML.
    definition = read_domain(cookie.xml)[1] if source is None else None
    if refusals := [*check_destination(cookie, definition, state, runs, uuid), *differences]:
        raise VcpuRefused(refusals)
    with sides.declined("prepare the destination"):
        await session.monitor.stop()
        await sides.set_capabilities(session.monitor)
    if source is None:
        return
    for slot in missing(source, machine_of(state)):
        await plug(list(slot.ids))
    if refusals := check_arrived(source, machine_of(await session.read())):
        raise VcpuFailed(
            "; ".join(one.message for one in refusals), hint="start the destination again"
        )


async def listen(
    session: Session, uri: str | None, host: str | None, default: str | None = None
) -> str:
    """Let the destination listen, and return its address as the source must name it.

    Args:
        session: the connection to the destination.
        uri: the address to listen at.
        host: how the source reaches this host.
        default: used instead of `uri` if the destination does not listen yet.

    Raises:
        VcpuRefused: the destination listens elsewhere, or no address was given.
        VcpuFailed: the destination cannot listen there.
    """
    if uri is not None:
        check_uri(uri)
    there = address_of(await sides.status_of(session.monitor), host)
    if there is not None:
        if uri not in (None, there):
            raise catalogue.LISTENS_ELSEWHERE.error(there=there)
        return there
    uri = uri or default
    if uri is None:
        raise catalogue.NO_URI.error()
    with sides.declined(f"listen at {uri}"):
        await session.monitor.migrate_incoming(uri)
    return address_of(await sides.status_of(session.monitor), host) or uri


# -- perform ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Departure:
    """How the memory of a guest left its source.

    Attributes:
        end: what became of the source.
        status: the last status that QEMU reported.
        cancelled: the cancel of the call; it is raised when everything has been brought to an end.
        lost: the error of a broken connection to the source.
    """

    end: Source
    status: MigrationStatus = _NOT_REPORTED
    cancelled: asyncio.CancelledError | None = None
    lost: VcpuConnectionError | None = None

    @property
    def why(self) -> str:
        """Why the guest has not left."""
        if self.lost is not None:
            return self.lost.message
        if self.cancelled is not None:
            return "cancelled"
        return self.status.error or f"the migration was {self.status.status}"


async def check_perform(
    session: Session,
    cookie: Cookie | None,
    *,
    force: bool,
    agent: Guest | None = None,
    is_paused: bool = False,
) -> tuple[DomainState, bool]:
    """`check_begin`, and check that the source still matches the cookie.

    Raises:
        VcpuRefused: the source does not match, or cannot be migrated now.
    """
    state, runs = await check_begin(session, force=force, agent=agent, is_paused=is_paused)
    check_same(cookie.machine if cookie is not None else None, state)
    return state, runs


def claim_source(session: Session, begun: Cookie | None, *, runs: bool) -> None:
    """Claim the guest for the source until the whole guest was sent. `begun` is the cookie of this
    migration, if known.

    Raises:
        VcpuRefused: the cookie was used before, or the guest was paused or resumed since.
    """
    saving.forget(session)
    if begun is None:
        return
    if begun.runs != runs:
        raise catalogue.RUNS_NO_MORE.error(was="running" if begun.runs else "paused")
    if ownership.is_used(begun) or not ownership.claim(begun, Role.SOURCE):
        raise catalogue.COOKIE_USED.error()
    ownership.remember(session, Role.SOURCE, begun)


async def depart(
    session: Session,
    begun: Cookie | None,
    channel: AbstractAsyncContextManager[str],
    how: sides.Transfer,
) -> Departure:
    """Send the memory of a guest that the source has claimed. The claim is released if everything
    was sent, or if nothing was.

    Args:
        session: the connection to the source.
        begun: the cookie, if known.
        channel: yields the URI at which the destination is reached.
        how: how the memory is sent.

    Raises:
        VcpuRefused, VcpuFailed: QEMU did not begin. Another migration, which is not ours, may be
        running.
    """
    try:
        async with channel as uri:
            status = await sides.send(session.monitor, uri, how)
    except asyncio.CancelledError as error:
        # From now on the migration is brought to an end, even if the caller is cancelled again.
        return Departure(Source.KEPT, cancelled=error)
    except VcpuConnectionError as error:
        return Departure(Source.UNKNOWN, lost=error)
    except (VcpuRefused, VcpuFailed):
        ownership.release(begun, Role.SOURCE)
        raise
    if status.status != "completed":
        return Departure(Source.KEPT, status)
    ownership.release(begun, Role.SOURCE)
    return Departure(Source.COMPLETED, status)


async def bring_to_end(left: Departure, work: Awaitable[T]) -> T:
    """Run the work that follows a departure to its end, however often the caller is cancelled.

    Raises:
        CancelledError: the departure was cancelled; the cause is the error of the work, if that
            failed.
        VcpuError: the work failed.
    """
    try:
        found = await aio.finish(work)
    except VcpuError as error:
        if left.cancelled is not None:
            raise left.cancelled from error
        raise
    if left.cancelled is not None:
        raise left.cancelled
    return found


async def perform(
    session: Session, uri: str, cookie: Cookie | None, how: sides.Transfer, *, force: bool
) -> MigrationStatus:
    """Send the guest to a listening destination, for which another caller is responsible.

    Args:
        session: the connection to the source.
        uri: where the destination listens.
        cookie: the guest's cookie, if it is given.
        how: how the memory is sent.
        force: also do what is known to hang the guest.

    Raises:
        VcpuRefused: nothing was sent.
        VcpuFailed: the guest was not sent; it continues at the source.
        VcpuConnectionError: the connection to the source broke.
    """
    _, runs = await check_perform(session, cookie, force=force)
    begun = cookie or ownership.recall(session, Role.SOURCE)
    claim_source(session, begun, runs=runs)
    left = await depart(session, begun, nullcontext(uri), how)
    await bring_to_end(left, _stay(session, begun, left, runs=runs))
    return left.status


async def _stay(session: Session, begun: Cookie | None, left: Departure, *, runs: bool) -> None:
    """Let a guest that has not left continue at the source, and raise VcpuError with the reason why
    it has not left.
    """
    if left.lost is not None:
        raise left.lost
    if left.end is Source.COMPLETED:
        return
    if (
        left.cancelled is not None
        and (await sides.status_of(session.monitor)).status == "completed"
    ):
        # The whole guest was sent, so the destination may be started.
        ownership.release(begun, Role.SOURCE)
        return
    # The source keeps its claim, so a destination cannot be let run with what has arrived there.
    await sides.go_on(session, runs=runs)
    if left.cancelled is None:
        why = left.status.error or f"it was {left.status.status}"
        raise VcpuFailed(
            f"the migration failed: {why}; the guest goes on at the source",
            hint="look at QEMU's logs",
        )


# -- finish ----------------------------------------------------------------------------------------


async def arrival(session: Session, moved: Callable[[], object] = lambda: None) -> Refusal | None:
    """Wait until the whole guest has arrived at a destination; return the reason if it has not.

    Args:
        session: the connection to the destination.
        moved: returns the progress of the transfer; while it changes, the wait goes on.

    Raises:
        VcpuConnectionError: the connection to the destination broke.
    """
    pause, last, deadline = sides.LOOK_FIRST, moved(), time.monotonic() + _ARRIVAL_SECONDS
    while True:
        status, runs = await sides.status_of(session.monitor), await run_state(session.monitor)
        if runs != "inmigrate" and not status.is_active:
            return None if status.is_incoming else catalogue.NOTHING_ARRIVED(state=runs)
        if (now := moved()) != last:
            last, deadline = now, time.monotonic() + _ARRIVAL_SECONDS
        if status.status == "failed" or time.monotonic() >= deadline:
            return catalogue.NOT_ALL_ARRIVED(why=status.error or "not all of the guest has arrived")
        await asyncio.sleep(pause)
        pause = min(pause * 2, sides.LOOK_MOST)


async def arrive(
    session: Session, cookie: Cookie, moved: Callable[[], object] = lambda: None
) -> tuple[Destination, list[Refusal]]:
    """Return whether the whole guest has arrived at a destination and is the one that left (`moved`
    as in `arrival`). A broken connection is a result, not an error.
    """
    try:
        if (refusal := await arrival(session, moved)) is not None:
            return Destination.BROKEN, [refusal]
        source = cookie.machine
        refusals = (
            check_arrived(source, machine_of(await session.read())) if source is not None else []
        )
        return (Destination.OTHER if refusals else Destination.WHOLE), refusals
    except VcpuConnectionError as error:
        return Destination.GONE, [catalogue.DESTINATION_LOST(why=error.message)]


async def finish(
    session: Session,
    cookie: Cookie,
    *,
    force: bool,
    reported: Callable[[bool], None],
    moved: Callable[[], object],
) -> tuple[Destination, str]:
    """Let a destination run if it has the whole guest; return what became of it, and why it does
    not run.

    Args:
        session: the connection to the destination.
        cookie: the guest's cookie.
        force: also run the guest if another side has claimed it.
        reported: called with True before the guest is let run, and with False if it was not.
        moved: as in `arrival`.

    Raises:
        VcpuRefused: another side has claimed the guest.
    """
    found, refusals = await arrive(session, cookie, moved)
    if found is not Destination.WHOLE:
        return found, "; ".join(one.message for one in refusals)
    if not ownership.claim(cookie, Role.DESTINATION, session, force=force):
        raise catalogue.RUNS_AT_SOURCE.error()
    reported(True)
    found, why = await sides.let_run(session, cookie)
    reported(found in (Destination.RUNNING, Destination.UNKNOWN))
    if found is Destination.RUNNING:
        _keep_pending(session, cookie)
        ownership.forget(session)
    return found, why or ""


def _keep_pending(session: Session, cookie: Cookie) -> None:
    """Remember at this destination the unplugs that were pending when the guest left its source."""
    state = session.state
    entities = [state.by_id[first] for first in cookie.pending if first < state.maxcpus]
    if entities := [entity for entity in entities if entity.plugged]:
        session.pending_unplugs.ask(entities, state, time.time())
        session.learn()


# -- cancel ----------------------------------------------------------------------------------------


async def cancel(session: Session, *, force: bool = False) -> str:
    """Cancel what one side does: a source continues, a destination that has not run ends. Return
    what was done, in words.

    Args:
        session: the connection to that side.
        force: also do what may let the guest run twice, or nowhere.

    Raises:
        VcpuRefused: there is nothing to cancel, or the other side has the guest.
        VcpuError: the cancel failed.
    """
    status, runs = await sides.status_of(session.monitor), await run_state(session.monitor)
    begun, prepared = (
        ownership.recall(session, Role.SOURCE),
        ownership.recall(session, Role.DESTINATION),
    )
    step = cancel_step(runs, status, is_prepared=prepared is not None)
    if step is Cancel.END_WAITING:
        await sides.end(session)
        return "the destination, which waited, was ended"
    if step is Cancel.END_ARRIVED and prepared is not None:
        return await _end_arrived(session, prepared, force=force)
    if step is Cancel.STOP:
        ran = runs == "running" or (begun is not None and begun.runs)
        if (await sides.stop_moving(session.monitor)).status != "completed":
            await sides.go_on(session, runs=ran)
            return (
                "the migration was cancelled, and the guest"
                f" {'goes on' if ran else 'is paused, as it was'}"
            )
    elif step is Cancel.NOTHING:
        raise catalogue.NOTHING_UNDER_WAY.error()
    # The whole guest was sent, so the source owns it only after a new claim.
    return await _take_back(session, begun, force=force)


async def _take_back(session: Session, begun: Cookie | None, *, force: bool) -> str:
    """Let a source continue that has sent its whole guest. `begun` is its cookie, as far as known
    at this side.
    """
    if not ownership.claim(begun, Role.SOURCE, force=force):
        raise catalogue.RUNS_AT_DESTINATION.error()
    runs = begun is None or begun.runs
    await sides.go_on(session, runs=runs)
    done = "goes on at the source" if runs else "is at the source again, paused as it was"
    text = f"the guest, which had been handed over, {done}"
    return text if begun is not None else f"{text}: make sure that the destination does not run it"


async def _end_arrived(session: Session, prepared: Cookie, *, force: bool) -> str:
    """End a destination that has the whole guest and has not been let run."""
    if not force and not (
        ownership.is_present(prepared, Role.SOURCE) and ownership.claim(prepared, Role.SOURCE)
    ):
        raise catalogue.SOURCE_UNKNOWN.error()
    await sides.end(session)
    ownership.forget(session)
    return "the destination, which had not been let run, was ended"
