"""The phases of a migration, each at one side. `core.migration` decides; this file asks, acts and waits.

`move` takes a guest through all of them; `migration` is the object that a user calls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, TypeVar

from qmpvcpu import aio
from qmpvcpu.core.migration.cookie import Cookie, machine_of
from qmpvcpu.core.migration.leaving import ONE_CPU, check_hangs, check_source, without_one_cpu
from qmpvcpu.core.migration.machines import check_arrived, check_destination, check_same, check_uri, missing
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
#: Seconds a destination has to take in what has arrived.
_ARRIVAL_SECONDS: Final = 10.0

# -- begin -------------------------------------------------------------------------------------------


async def check_begin(
    session: Session, *, force: bool, agent: Guest | None = None, is_paused: bool = False
) -> tuple[DomainState, bool]:
    """The source as it is, and whether it runs.

    Args:
        session: of the source.
        force: do what is known to hang.
        agent: of the guest, if it may take CPUs offline on the way.
        is_paused: the guest is paused on the way.

    Raises:
        VcpuRefused: it cannot be migrated now; every reason.
    """
    state = await session.read()
    runs, status = await run_state(session.monitor), await sides.status_of(session.monitor)
    refusals = check_source(state, runs, status, session.pending_unplugs.firsts, is_paused=is_paused)
    if runs == "paused" and status.is_incoming and ownership.recall(session, Role.DESTINATION) is not None:
        refusals.append(catalogue.ARRIVED())
    hangs = [] if force else check_hangs(state, session.removals)
    if agent is not None and any(one.code == ONE_CPU for one in hangs):
        hangs = without_one_cpu(hangs, await why_not(agent, state, runs))
    if refusals := refusals + hangs:
        raise VcpuRefused(refusals)
    return state, runs == "running"


# -- prepare -----------------------------------------------------------------------------------------


async def prepare(
    session: Session,
    cookie: Cookie,
    plug: Callable[[Sequence[int]], Awaitable[object]],
    differences: Sequence[Refusal] = (),
) -> None:
    """Check a destination that waits, plug what it lacks, and see to it that it does not start by itself.

    Args:
        session: the destination.
        cookie: of the source.
        plug: enables vCPUs there.
        differences: in what it is known to be another machine.

    Raises:
        VcpuRefused: it cannot take the guest; every reason. Nothing was touched.
        VcpuFailed: QEMU declines something.
    """
    state = await session.read()
    runs, uuid = await run_state(session.monitor), await session.monitor.query_uuid()
    source = cookie.machine
    # Of a cookie that another tool made, its XML is all that there is.
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
        raise VcpuFailed("; ".join(one.message for one in refusals), hint="start the destination anew")


async def listen(session: Session, uri: str | None, host: str | None, default: str | None = None) -> str:
    """Where the destination listens from now on, as the source names it.

    Args:
        session: of the destination.
        uri: where it should.
        host: how the source reaches it.
        default: as `uri`, if it does not listen yet.

    Raises:
        VcpuRefused: it listens elsewhere, or nobody said where it should.
        VcpuFailed: it cannot listen there.
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


# -- perform -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Departure:
    """How the memory of a guest left its source.

    Attributes:
        end: what became of the source.
        status: as QEMU reported it last.
        cancelled: the call was; it is raised once all is brought to an end.
        lost: the connection to the source is.
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
    session: Session, cookie: Cookie | None, *, force: bool, agent: Guest | None = None, is_paused: bool = False
) -> tuple[DomainState, bool]:
    """The source still is what the cookie says; `check_begin`.

    Raises:
        VcpuRefused: it is not, or cannot be migrated now.
    """
    state, runs = await check_begin(session, force=force, agent=agent, is_paused=is_paused)
    check_same(cookie.machine if cookie is not None else None, state)
    return state, runs


def claim_source(session: Session, begun: Cookie | None, *, runs: bool) -> None:
    """The source has the guest until all of it has been handed over; `begun` is the cookie of this, where known.

    Raises:
        VcpuRefused: it was used before, or the guest was paused or let run since.
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
    session: Session, begun: Cookie | None, channel: AbstractAsyncContextManager[str], how: sides.Transfer
) -> Departure:
    """Move the memory of a guest that the source has claimed. The claim is released where all has been handed
    over, and where nothing was sent.

    Args:
        session: of the source.
        begun: the cookie, where known.
        channel: gives the URI at which the destination is reached.
        how: it is moved.

    Raises:
        VcpuRefused, VcpuFailed: QEMU did not begin. Perhaps another migration is under way, which is not ours.
    """
    try:
        async with channel as uri:
            status = await sides.send(session.monitor, uri, how)
    except asyncio.CancelledError as error:
        # From here on it is brought to an end, whoever cancels how often.
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
    """What follows a departure, whoever cancels how often.

    Raises:
        CancelledError: the departure was cancelled; its cause is the error of the work, if that failed.
        VcpuError: of the work.
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
    """Move the guest to where a destination listens; somebody else looks after that one.

    Args:
        session: of the source.
        uri: where the destination listens.
        cookie: of the guest, where it is given.
        how: it is moved.
        force: do what is known to hang.

    Raises:
        VcpuRefused: nothing was sent.
        VcpuFailed: it was not handed over; the guest goes on at the source.
        VcpuConnectionError: the source is lost.
    """
    _, runs = await check_perform(session, cookie, force=force)
    begun = cookie or ownership.recall(session, Role.SOURCE)
    claim_source(session, begun, runs=runs)
    left = await depart(session, begun, nullcontext(uri), how)
    await bring_to_end(left, _stay(session, begun, left, runs=runs))
    return left.status


async def _stay(session: Session, begun: Cookie | None, left: Departure, *, runs: bool) -> None:
    """A guest that has not left goes on at the source. Raises VcpuError: it has not left."""
    if left.lost is not None:
        raise left.lost
    if left.end is Source.COMPLETED:
        return
    if left.cancelled is not None and (await sides.status_of(session.monitor)).status == "completed":
        # What has been handed over may be started there.
        ownership.release(begun, Role.SOURCE)
        return
    # The number is used up: whatever has arrived there is not let run any more.
    await sides.go_on(session, runs=runs)
    if left.cancelled is None:
        why = left.status.error or f"it was {left.status.status}"
        raise VcpuFailed(f"the migration failed: {why}; the guest goes on here", hint="see QEMU's logs")


# -- finish ------------------------------------------------------------------------------------------


async def arrival(session: Session, moved: Callable[[], object] = lambda: None) -> Refusal | None:
    """Wait until all of a guest has come to a destination; why it has not.

    Args:
        session: of the destination.
        moved: how far the guest has come; while that changes, there is time.

    Raises:
        VcpuConnectionError: its QEMU is lost.
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
    """Whether all has arrived at a destination (`moved` as of `arrival`), and is what left. Raises nothing of the
    connection.
    """
    try:
        if (refusal := await arrival(session, moved)) is not None:
            return Destination.BROKEN, [refusal]
        source = cookie.machine
        now = machine_of(await session.read())
        refusals = check_arrived(source, now) if source is not None else []
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
    """Let a destination run that has all of the guest; what became of it, and why it does not run.

    Args:
        session: of the destination.
        cookie: of the guest.
        force: also where another side has claimed it.
        reported: called with True before it is let run, and with False if it was not.
        moved: as of `arrival`.

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
    """The unplugs that were pending when the guest left are pending at this destination."""
    state = session.state
    entities = [state.by_id[first] for first in cookie.pending if first < state.maxcpus]
    if entities := [entity for entity in entities if entity.plugged]:
        session.pending_unplugs.ask(entities, state, time.time())
        session.learn()


# -- cancel ------------------------------------------------------------------------------------------


async def cancel(session: Session, *, force: bool = False) -> str:
    """End what is under way at one side: a source goes on, a destination that has not run ends. What was done, in
    words.

    Args:
        session: of that side.
        force: also what may make the guest run twice, or nowhere.

    Raises:
        VcpuRefused: there is nothing to cancel, or the other side has the guest.
        VcpuError: it could not be.
    """
    status, runs = await sides.status_of(session.monitor), await run_state(session.monitor)
    begun, prepared = ownership.recall(session, Role.SOURCE), ownership.recall(session, Role.DESTINATION)
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
            return f"the migration was cancelled, and the guest {'goes on' if ran else 'is paused, as it was'}"
    elif step is Cancel.NOTHING:
        raise catalogue.NOTHING_UNDER_WAY.error()
    # All of it has been handed over: the source has the guest only if it claims it.
    return await _take_back(session, begun, force=force)


async def _take_back(session: Session, begun: Cookie | None, *, force: bool) -> str:
    """A source that has handed its guest over goes on; `begun` is what is known of that at this side."""
    if not ownership.claim(begun, Role.SOURCE, force=force):
        raise catalogue.RUNS_AT_DESTINATION.error()
    runs = begun is None or begun.runs
    await sides.go_on(session, runs=runs)
    done = "goes on here" if runs else "is here again, paused as it was"
    if begun is None:
        return f"the guest, which had been handed over, {done}: see to it that the destination does not run it"
    return f"the guest, which had been handed over, {done}"


async def _end_arrived(session: Session, prepared: Cookie, *, force: bool) -> str:
    """A destination that has all of the guest, and has not been let run."""
    if not force and not (ownership.is_present(prepared, Role.SOURCE) and ownership.claim(prepared, Role.SOURCE)):
        raise catalogue.SOURCE_UNKNOWN.error()
    await sides.end(session)
    ownership.forget(session)
    return "the destination, which had not been let run, was ended"
