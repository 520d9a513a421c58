"""Takes a guest from one QEMU to another: begin, prepare, perform, finish, cancel; and `migrate`, all of them.

`core.migration.machines` decides; what is here asks, tells, waits, and never lets two run.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from qmpvcpu import aio
from qmpvcpu.core.machine.versions import Feature, has
from qmpvcpu.core.migration.cookie import Cookie, Machine, check_features, machine_of
from qmpvcpu.core.migration.leaving import ONE_CPU, check_hangs, check_source, needs_one_cpu
from qmpvcpu.core.migration.machines import check_arrived, check_machine, missing
from qmpvcpu.core.migration.status import MigrationStatus, address_of, parse_status
from qmpvcpu.core.migration.who_runs import Destination, Source, Step, next_step
from qmpvcpu.core.model import DomainState, QemuVersion
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.catalogue import Reason
from qmpvcpu.domain.agent import Guest
from qmpvcpu.domain.migration import saving
from qmpvcpu.domain.migration.one_cpu import OneCpu, why_not
from qmpvcpu.domain.migration.ownership import Side, forget, give, is_there, is_used, keep, kept, release, take
from qmpvcpu.domain.reader import run_state
from qmpvcpu.domain.session import Link
from qmpvcpu.errors import (
    OutcomeKind,
    Refusal,
    VcpuConnectionError,
    VcpuError,
    VcpuFailed,
    VcpuPartial,
    VcpuRefused,
)
from qmpvcpu.host.process import is_alive
from qmpvcpu.ports import CommandError, Monitor, MonitorEvent

__all__ = [
    "Migrated",
    "Progress",
    "arrival",
    "cancel",
    "check_begin",
    "check_perform",
    "check_same",
    "finish",
    "go_on",
    "has_ended",
    "incoming_from_file",
    "keep_pending",
    "listen_at",
    "migrate",
    "perform",
    "perform_to_file",
    "prepare",
    "start",
    "status_of",
]

#: Called with each fresh status while memory moves.
Progress = Callable[[MigrationStatus], None]

#: Seconds between two looks, the first and the longest; and how long nothing may move.
_LOOK_FIRST: Final = 0.005
_LOOK_MOST: Final = 0.1
_STUCK_SECONDS: Final = 30.0
_SETUP_SECONDS: Final = 10.0
#: Seconds a destination has to take in what has arrived, and a QEMU to end.
_ARRIVAL_SECONDS: Final = 10.0
_END_SECONDS: Final = 5.0
#: Seconds a cancelled migration has to end.
_CANCEL_SECONDS: Final = 3.0
#: Without the return path a source does not learn that the destination could not take it (7.2 to 11.1). With
#: `pause-before-switchover` QEMU waits for a command of its user's at the end.
_CAPABILITIES: Final = {"return-path": True, "events": True, "pause-before-switchover": False}
_FD_NAME: Final = "qmpvcpu-migration"
_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"
#: Bytes a second: a paused guest waits for the disk, and for nothing else.
_AS_FAST_AS_IT_GETS: Final = 1 << 50


@dataclass(frozen=True, slots=True)
class Migrated:
    """A guest that runs at the destination, verified there. `vcpus` are its ids."""

    vcpus: tuple[int, ...]
    status: MigrationStatus
    messages: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The document of `migrate --json`: bytes, milliseconds, seconds."""
        return {
            "outcome": str(OutcomeKind.APPLIED),
            "changed": True,
            "vcpus": list(self.vcpus),
            "transferred": self.status.transferred,
            "downtime": self.status.downtime,
            "total_time": self.status.total_time,
            "messages": list(self.messages),
            "seconds": round(self.seconds, 6),
        }


async def status_of(monitor: Monitor) -> MigrationStatus:
    """`query-migrate`, checked."""
    try:
        return parse_status(await monitor.query_migrate())
    except CommandError as error:
        return MigrationStatus(error=error.text)


# -- the phases -------------------------------------------------------------------------------------


async def check_begin(
    link: Link, *, force: bool, agent: Guest | None = None, is_paused: bool = False
) -> tuple[DomainState, bool]:
    """The source as it is, and whether it runs.

    Args:
        link: of the source.
        force: do what is known to hang.
        agent: of the guest, if it may take CPUs offline on the way.
        is_paused: the guest is paused on the way.

    Raises:
        VcpuRefused: it cannot be migrated now; every reason.
    """
    state = await link.read()
    runs, status = await run_state(link.monitor), await status_of(link.monitor)
    refusals = check_source(state, runs, status, link.ledger.firsts, is_paused=is_paused)
    if runs == "paused" and status.is_incoming and kept(link, Side.DESTINATION) is not None:
        refusals.append(catalogue.ARRIVED())
    hangs = [] if force else check_hangs(state, link.removals)
    if agent is not None and any(one.code == ONE_CPU for one in hangs):
        hangs = _without_one_cpu(hangs, await why_not(agent, state, runs))
    if refusals := refusals + hangs:
        raise VcpuRefused(refusals)
    return state, runs == "running"


def _without_one_cpu(hangs: list[Refusal], why: str | None) -> list[Refusal]:
    """What hangs where the agent takes CPUs offline, or cannot, and `why`."""
    if why is None:
        return [one for one in hangs if one.code != ONE_CPU]
    return [
        replace(one, message=f"{one.message}; its other CPUs cannot be taken offline for it: {why}")
        if one.code == ONE_CPU
        else one
        for one in hangs
    ]


async def prepare(
    link: Link,
    cookie: Cookie,
    plug: Callable[[Sequence[int]], Awaitable[object]],
    differences: Sequence[Refusal] = (),
) -> Machine:
    """Check a destination that waits, plug what it lacks, and see to it that it does not start by itself.

    Args:
        link: the destination.
        cookie: of the source.
        plug: enables vCPUs there.
        differences: in what it is known to be another machine.

    Raises:
        VcpuRefused: it cannot take the guest; every reason. Nothing was touched.
        VcpuFailed: QEMU declines something.
    """
    state = await link.read()
    refusals = check_features(cookie)
    runs = await run_state(link.monitor)
    if runs != "inmigrate":
        refusals.append(
            catalogue.RUNS_ALREADY(name=state.name)
            if runs == "running"
            else catalogue.DOES_NOT_WAIT(name=state.name, state=runs)
        )
    refusals += _check_uuid(cookie, await link.monitor.query_uuid())
    source = cookie.machine
    refusals += check_machine(source, machine_of(state)) if source is not None else _check_count(cookie, state)
    refusals += differences
    if refusals:
        raise VcpuRefused(refusals)
    lacking = missing(source, machine_of(state)) if source is not None else []
    with _declined("prepare the destination"):
        await link.monitor.stop()
        await link.monitor.migrate_set_capabilities(_CAPABILITIES)
    for slot in lacking:
        await plug(list(slot.ids))
    arrived = machine_of(await link.read())
    refusals = check_arrived(source, arrived) if source is not None else []
    if refusals:
        raise VcpuFailed("; ".join(one.message for one in refusals), hint="start the destination anew")
    return arrived


def _check_uuid(cookie: Cookie, reply: object) -> list[Refusal]:
    here = reply.get("UUID") if isinstance(reply, dict) else None
    if here in (None, _NO_UUID, cookie.uuid) or cookie.uuid is None:
        return []
    return [catalogue.OTHER_UUID(uuid=cookie.uuid, there=here)]


def _check_count(cookie: Cookie, state: DomainState) -> list[Refusal]:
    """Of a cookie that another tool made, all that its XML says."""
    from qmpvcpu.xml.document import read_domain

    definition = read_domain(cookie.xml)[1]
    rows: tuple[tuple[Reason, object, object], ...] = (
        (catalogue.OTHER_MAXIMUM, definition.maxcpus, state.maxcpus),
        (catalogue.OTHER_VCPUS, definition.enabled_ids, state.enabled_ids),
    )
    return [reason(there=there, now=now) for reason, there, now in rows if there != now]


def _check_uri(uri: str) -> None:
    """Whatever else QEMU knows has no way back, or runs a program."""
    if not uri.startswith(("unix:", "tcp:", "fd:")):
        raise catalogue.NO_WAY.error(uri=uri)


async def listen_at(link: Link, uri: str | None, host: str | None, default: str | None = None) -> str:
    """Where the destination listens from now on, as the source names it.

    Args:
        link: of the destination.
        uri: where it shall.
        host: how the source reaches it.
        default: as `uri`, if it does not listen yet.

    Raises:
        VcpuRefused: it listens elsewhere, or nobody said where it shall.
        VcpuFailed: it cannot listen there.
    """
    if uri is not None:
        _check_uri(uri)
    there = address_of(await status_of(link.monitor), host)
    if there is not None:
        if uri is not None and uri != there:
            raise catalogue.LISTENS_ELSEWHERE.error(there=there)
        return there
    uri = uri or default
    if uri is None:
        raise catalogue.NO_URI.error()
    with _declined(f"listen at {uri}"):
        await link.monitor.migrate_incoming(uri)
    return address_of(await status_of(link.monitor), host) or uri


async def check_perform(
    link: Link, cookie: Cookie | None, *, force: bool, agent: Guest | None = None, is_paused: bool = False
) -> tuple[DomainState, bool]:
    """The source still is what the cookie says; `check_begin`.

    Raises:
        VcpuRefused: it is not, or cannot be migrated now.
    """
    state, runs = await check_begin(link, force=force, agent=agent, is_paused=is_paused)
    check_same(cookie, state)
    return state, runs


def check_same(cookie: Cookie | None, state: DomainState) -> None:
    """Raises VcpuRefused: the source is not what the cookie says any more."""
    source = cookie.machine if cookie is not None else None
    refusals = check_arrived(source, machine_of(state)) if source is not None else []
    if refusals:
        hint = "begin again: the guest has changed since migrate-begin"
        raise VcpuRefused([replace(one, ids=(), hint=hint) for one in refusals])


def take_for_perform(link: Link, begun: Cookie | None, *, runs: bool) -> None:
    """The source has the guest until all of it has been handed over; `begun` is the cookie of this, where known.

    Raises:
        VcpuRefused: it was used before, or the guest was paused or let run since.
    """
    saving.forget(link)
    if begun is None:
        return
    if begun.runs != runs:
        raise catalogue.RUNS_NO_MORE.error(was="running" if begun.runs else "paused")
    if is_used(begun) or not take(begun, Side.SOURCE):
        raise catalogue.COOKIE_USED.error()
    keep(link, Side.SOURCE, begun)


async def perform(
    monitor: Monitor,
    uri: str,
    *,
    bandwidth: int | None = None,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> MigrationStatus:
    """Move the guest's memory and devices; how that ended, which may be "failed". The source does not run then, if
    it was "completed".

    Args:
        monitor: of the source.
        uri: where the destination listens.
        bandwidth: MiB a second at most; None: QEMU's own limit.
        timeout: seconds after which the guest is paused, so that it comes to an end; None: never.
        progress: told each fresh status.

    Raises:
        VcpuFailed: QEMU did not begin.
        VcpuConnectionError: the source is lost.
        CancelledError: a migration that was not at its end is cancelled.
    """
    _check_uri(uri)
    async with _parameters(monitor, {} if bandwidth is None else {"max-bandwidth": bandwidth << 20}):
        with _declined("migrate"):
            await monitor.migrate_set_capabilities(_CAPABILITIES)
            await monitor.migrate(uri)
        try:
            return await _until_ended(monitor, timeout, progress)
        except asyncio.CancelledError:
            await aio.finish(stop_moving(monitor))
            raise


@asynccontextmanager
async def _parameters(monitor: Monitor, given: Mapping[str, int | str]) -> AsyncIterator[None]:
    """QEMU has these parameters of migration while this lasts, and its own ones again then."""
    if not given:
        yield
        return
    with _declined("be told how"):
        found = await monitor.query_migrate_parameters()
        usual = found if isinstance(found, dict) else {}
        # One that QEMU does not have set is not set here: 7.2 has no word for "no TLS".
        changed = {key: value for key, value in given.items() if usual.get(key, value) != value}
        await monitor.migrate_set_parameters(changed)
    try:
        yield
    finally:
        with suppress(CommandError, VcpuConnectionError):
            await monitor.migrate_set_parameters({key: usual[key] for key in changed})


async def _until_ended(monitor: Monitor, timeout: float | None, progress: Progress | None) -> MigrationStatus:
    loop = asyncio.get_running_loop()
    began = moved = loop.time()
    pause, paused = _LOOK_FIRST, False
    last: tuple[int | None, int | None] = None, None
    waker = asyncio.Event()

    def sink(event: MonitorEvent | VcpuConnectionError) -> None:
        if isinstance(event, VcpuConnectionError) or event.name in ("MIGRATION", "STOP"):
            waker.set()

    with monitor.listen(sink):
        while True:
            waker.clear()
            status = await status_of(monitor)
            if progress is not None:
                progress(status)
            if status.has_ended:
                return status
            now = loop.time()
            if (status.transferred, status.remaining) != last:
                last, moved = (status.transferred, status.remaining), now
            patience = _SETUP_SECONDS if status.status == "setup" else _STUCK_SECONDS
            if now > moved + patience:
                ended = await stop_moving(monitor)
                if ended.status == "completed":
                    return ended
                text = f"nothing has moved for {patience:g} s ('{status.status}'): cancelled"
                if status.status == "setup":
                    # 10.0, TCG: a grace period of RCU that never ends, once an x86 vCPU was unplugged.
                    text += " (QEMU 10.0 under TCG does so once an x86 vCPU was unplugged)"
                return MigrationStatus("cancelled", ended.transferred, error=text)
            if timeout is not None and not paused and now > began + timeout:
                paused = True
                with suppress(CommandError):
                    await monitor.stop()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await waker.wait()
            pause = min(pause * 2, _LOOK_MOST)


async def stop_moving(monitor: Monitor) -> MigrationStatus:
    """`migrate_cancel`, and its end; which is "completed" if it came too late.

    Raises:
        VcpuConnectionError: the source is lost.
    """
    with suppress(CommandError):
        await monitor.migrate_cancel()
    deadline = time.monotonic() + _CANCEL_SECONDS
    while True:
        status = await status_of(monitor)
        if not status.is_active or time.monotonic() >= deadline:
            return status
        await asyncio.sleep(_LOOK_FIRST)


async def perform_to_file(
    monitor: Monitor, version: QemuVersion, fd: int, offset: int, progress: Progress | None = None
) -> MigrationStatus:
    """Write a paused guest to a file; how that ended, which may be "failed". It stays paused.

    Args:
        monitor: of the guest.
        version: of its QEMU.
        fd: opened to write, and standing at `offset`.
        offset: bytes; where the stream begins.
        progress: told each fresh status.

    Raises:
        VcpuFailed: QEMU did not begin.
        VcpuConnectionError: QEMU is lost.
        CancelledError: it is cancelled.
    """
    with _declined("save it"):
        # A file has no way back.
        await monitor.migrate_set_capabilities(
            {**await _switched_off(monitor), **_CAPABILITIES, "return-path": False}
        )
        async with (
            _parameters(monitor, {"max-bandwidth": _AS_FAST_AS_IT_GETS, "tls-creds": ""}),
            _file_uri(monitor, version, fd, offset) as uri,
        ):
            await monitor.migrate(uri)
            try:
                return await _until_ended(monitor, None, progress)
            except asyncio.CancelledError:
                await aio.finish(stop_moving(monitor))
                raise


async def _switched_off(monitor: Monitor) -> dict[str, bool]:
    """The capabilities that are on, each with False. A saved file must be readable without them, because the
    process that restores it does not know which were on.
    """
    rows = await monitor.execute("query-migrate-capabilities")
    on = [row.get("capability") for row in rows if row.get("state") is True] if isinstance(rows, list) else []
    return {str(name): False for name in on}


async def incoming_from_file(
    link: Link, version: QemuVersion, fd: int, offset: int, *, only_reads: bool = False
) -> None:
    """Let a destination that is prepared read a file; `fd` is opened to read, and stands at `offset`. One that
    `only_reads` takes no disk.

    Raises:
        VcpuFailed: QEMU declines.
    """
    with _declined("read the saved guest"):
        late = {"late-block-activate": True} if only_reads else {}
        await link.monitor.migrate_set_capabilities({**_CAPABILITIES, "return-path": False, **late})
        async with _file_uri(link.monitor, version, fd, offset, keep=True) as uri:
            await link.monitor.migrate_incoming(uri)


@asynccontextmanager
async def _file_uri(
    monitor: Monitor, version: QemuVersion, fd: int, offset: int, *, keep: bool = False
) -> AsyncIterator[str]:
    """A file that QEMU is handed; 8.2 has `file:`, and 11.1 no `fd:` of files any more."""
    if not has(version, Feature.FILE_MIGRATION):
        await monitor.getfd(_FD_NAME, fd)
        yield f"fd:{_FD_NAME}"
        return
    reply = await monitor.add_fd(fd)
    number = reply.get("fdset-id") if isinstance(reply, dict) else None
    yield f"file:/dev/fdset/{number},offset={offset}"
    if not keep and type(number) is int:
        with suppress(CommandError, VcpuConnectionError):
            await monitor.remove_fd(number)


async def arrival(link: Link, moved: Callable[[], object] = lambda: None) -> Refusal | None:
    """Wait until all of a guest has come to a destination; why it has not. `moved` tells how far it has come:
    while that changes, there is time.

    Raises:
        VcpuConnectionError: its QEMU is lost.
    """
    pause, last, deadline = _LOOK_FIRST, moved(), time.monotonic() + _ARRIVAL_SECONDS
    while True:
        status, runs = await status_of(link.monitor), await run_state(link.monitor)
        if runs != "inmigrate" and not status.is_active:
            if status.is_incoming:
                return None
            return catalogue.NOTHING_ARRIVED(state=runs)
        if (now := moved()) != last:
            last, deadline = now, time.monotonic() + _ARRIVAL_SECONDS
        if status.status == "failed" or time.monotonic() >= deadline:
            return catalogue.NOT_ALL_ARRIVED(why=status.error or "not all of the guest has arrived")
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LOOK_MOST)


async def finish(
    link: Link, cookie: Cookie, moved: Callable[[], object] = lambda: None
) -> tuple[Destination, list[Refusal]]:
    """Whether all has arrived at a destination (`moved` as of `arrival`), and is what left. Raises nothing of the
    connection.
    """
    try:
        refusal = await arrival(link, moved)
        if refusal is not None:
            return Destination.BROKEN, [refusal]
        source = cookie.machine
        here = machine_of(await link.read())
        refusals = check_arrived(source, here) if source is not None else []
        return (Destination.OTHER if refusals else Destination.WHOLE), refusals
    except VcpuConnectionError as error:
        return Destination.GONE, [catalogue.DESTINATION_LOST(why=error.message)]


def keep_pending(link: Link, cookie: Cookie) -> None:
    """The unplugs that were pending when the guest left are pending here."""
    state = link.state
    entities = [state.by_id[first] for first in cookie.pending if first < state.maxcpus]
    if entities := [entity for entity in entities if entity.plugged]:
        link.ledger.ask(entities, state, time.time())
        link.learn()


async def start(link: Link, cookie: Cookie) -> tuple[Destination, str | None]:
    """Let the destination run, if the guest ran; whether it does, and what else is to be said."""
    if not cookie.runs:
        return Destination.RUNNING, None
    try:
        await link.monitor.cont()
        if (runs := await run_state(link.monitor)) != "running":
            return Destination.OTHER, f"the destination is '{runs}' after cont"
        return Destination.RUNNING, None
    except CommandError as error:
        return Destination.OTHER, f"the destination cannot run it: {error.text}"
    except VcpuConnectionError as error:
        return (Destination.DIED if await has_ended(link) else Destination.UNKNOWN), error.message


async def go_on(link: Link, *, runs: bool) -> None:
    """Let the source go on, if the guest ran.

    Raises:
        VcpuError: it does not.
    """
    await stop_moving(link.monitor)
    if runs and await run_state(link.monitor) != "running":
        with _declined("let the guest go on at the source"):
            await _cont(link.monitor)
        if (now := await run_state(link.monitor)) != "running":
            raise VcpuPartial(f"the guest is '{now}' at the source", hint="look at the log of its QEMU")


async def _cont(monitor: Monitor) -> None:
    """`cont`; a source that has only just said "completed" declines it for a moment (10.0: "Migration is not
    finalized yet").
    """
    deadline = time.monotonic() + _CANCEL_SECONDS
    while True:
        try:
            await monitor.cont()
            return
        except CommandError:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(_LOOK_FIRST)


async def _lost(source: Link) -> Source | None:
    """How a source is gone; None: it is there."""
    try:
        await run_state(source.monitor)
    except VcpuConnectionError:
        return Source.DEAD if await has_ended(source) else Source.UNKNOWN
    return None


async def end(link: Link) -> bool:
    """`quit`, and wait until it has; whether it has, as far as can be told."""
    with suppress(CommandError, VcpuConnectionError):
        await link.monitor.quit()
    return await has_ended(link)


async def has_ended(link: Link) -> bool:
    """Whether a QEMU that was told to end, or does not answer, has ended; waits a moment for it."""
    if link.process is None:
        return False
    deadline = time.monotonic() + _END_SECONDS
    while is_alive(link.process.key):
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_LOOK_FIRST)
    return True


async def cancel(link: Link, *, force: bool = False) -> str:
    """End what is under way at one side: a source goes on, a destination that has not run ends. What was done, in
    words.

    Args:
        force: also what may make the guest run twice, or nowhere.

    Raises:
        VcpuRefused: there is nothing to cancel, or the other side has the guest.
        VcpuError: it could not be.
    """
    status, runs = await status_of(link.monitor), await run_state(link.monitor)
    begun, prepared = kept(link, Side.SOURCE), kept(link, Side.DESTINATION)
    if runs == "inmigrate":
        await end(link)
        return "the destination, which waited, was ended"
    if runs == "paused" and status.is_incoming and prepared is not None:
        return await _end_arrived(link, prepared, force=force)
    if status.is_active:
        # It may be at its end all the same: then the source has the guest only if it takes it.
        ran = runs == "running" or (begun is not None and begun.runs)
        if (await stop_moving(link.monitor)).status == "completed":
            return await _take_back(link, begun, force=force)
        await go_on(link, runs=ran)
        return f"the migration was cancelled, and the guest {'goes on' if ran else 'is paused, as it was'}"
    if runs == "postmigrate":
        return await _take_back(link, begun, force=force)
    raise catalogue.NOTHING_UNDER_WAY.error()


async def _take_back(link: Link, begun: Cookie | None, *, force: bool) -> str:
    """A source that has handed its guest over goes on; `begun` is what is known of that here."""
    if begun is not None and force:
        give(begun, Side.SOURCE)
    elif begun is not None and not take(begun, Side.SOURCE):
        raise catalogue.RUNS_AT_DESTINATION.error()
    runs = begun is None or begun.runs
    await go_on(link, runs=runs)
    said = "goes on here" if runs else "is here again, paused as it was"
    if begun is None:
        return f"the guest, which had been handed over, {said}: see to it that the destination does not run it"
    return f"the guest, which had been handed over, {said}"


async def _end_arrived(link: Link, prepared: Cookie, *, force: bool) -> str:
    """A destination that has all of the guest, and has not been let run."""
    if not force and not (is_there(prepared, Side.SOURCE) and take(prepared, Side.SOURCE)):
        raise catalogue.SOURCE_UNKNOWN.error()
    await end(link)
    forget(link)
    return "the destination, which had not been let run, was ended"


# -- all of it --------------------------------------------------------------------------------------


@asynccontextmanager
async def _channel(source: Link, destination: Link, uri: str | None, host: str | None) -> AsyncIterator[str]:
    """How the source reaches the destination: what it listens at, what is asked, else a socket pair of ours."""
    there = address_of(await status_of(destination.monitor), host)
    if (
        uri is None
        and there is None
        and source.monitor.takes_descriptors
        and destination.monitor.takes_descriptors
    ):
        # Nothing that others could connect to, and nothing left behind.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs, _declined("be given a socket"):
            await destination.monitor.getfd(_FD_NAME, theirs.fileno())
            await source.monitor.getfd(_FD_NAME, ours.fileno())
            await destination.monitor.migrate_incoming(f"fd:{_FD_NAME}")
        yield f"fd:{_FD_NAME}"
        return
    yield await listen_at(destination, uri, host, f"tcp:{host or '127.0.0.1'}:0")


async def migrate(
    source: Link,
    destination: Link,
    cookie: Cookie,
    *,
    uri: str | None = None,
    host: str | None = None,
    bandwidth: int | None = None,
    timeout: float | None = None,
    progress: Progress | None = None,
    force: bool = False,
    settled: Callable[[], None] = lambda: None,
    agents: tuple[Guest, Guest] | None = None,
) -> Migrated:
    """Perform and finish, with a destination that is prepared; at the end exactly one side runs the guest.

    `settled` is called when the destination runs it, or may: it must not be ended any more. `agents` are the
    guest's at the source and at the destination: where that saves it from a hang, it migrates with one CPU online.

    Raises:
        VcpuRefused: nothing was touched.
        VcpuFailed: the guest goes on at the source; the destination's QEMU is ended.
        VcpuPartial: nobody can tell which side runs it, and neither was touched; or CPUs are offline in it.
        VcpuConnectionError: the source is lost, and the guest with it if its QEMU has ended.
    """
    began = time.monotonic()
    agent = agents[0] if agents is not None else None
    state, runs = await check_perform(source, cookie, force=force, agent=agent)
    if uri is not None:
        _check_uri(uri)
    cookie = replace(cookie, runs=runs)
    take_for_perform(source, cookie, runs=runs)
    one_cpu = OneCpu(*agents, state) if agents is not None and runs and needs_one_cpu(state) else None
    said: list[str] = []
    if one_cpu is not None:
        try:
            said = await _begin_one_cpu(one_cpu, source, force=force)
        except BaseException:
            # Nothing has been sent.
            release(cookie, Side.SOURCE)
            raise
    move = _Move(uri, host, bandwidth, timeout, progress, settled, one_cpu)
    try:
        status, messages = await _move(source, destination, cookie, move)
    except BaseException as error:
        messages = await aio.finish(one_cpu.go_back()) if one_cpu is not None else []
        if isinstance(error, VcpuError):
            error.messages = (*error.messages, *said, *messages)
        raise
    ids = tuple(n for slot in machine_of(destination.state).slots if slot.plugged for n in slot.ids)
    return Migrated(tuple(sorted(ids)), status, (*said, *messages), time.monotonic() - began)


async def _begin_one_cpu(one_cpu: OneCpu, source: Link, *, force: bool) -> list[str]:
    """Leave the guest with its first CPU; what is to be said of it.

    Raises:
        VcpuRefused: it cannot be, and `force` is not given. All are online again.
        VcpuPartial: it cannot be, and not all are online again.
    """
    try:
        await one_cpu.begin()
    except BaseException as error:
        left = await aio.finish(one_cpu.go_back())
        if not isinstance(error, VcpuError):
            raise
        if left:
            text = f"{error.message}; the guest was not migrated"
            raise VcpuPartial(text, hint=error.hint, remaining=one_cpu.vcpus, messages=left) from error
        if force:
            return [f"migrated with all its CPUs online, and it may hang: {error.message}"]
        hangs = _without_one_cpu(check_hangs(source.state, source.removals), error.message)
        raise VcpuRefused([one for one in hangs if one.code == ONE_CPU]) from error
    return []


@dataclass(frozen=True, slots=True)
class _Move:
    """How a guest is moved: the arguments of `migrate`."""

    uri: str | None
    host: str | None
    bandwidth: int | None
    timeout: float | None
    progress: Progress | None
    settled: Callable[[], None]
    one_cpu: OneCpu | None

    def left(self) -> list[str]:
        """The guest is in nobody's hands any more; what is to be said of it."""
        return self.one_cpu.leave() if self.one_cpu is not None else []


async def _move(
    source: Link, destination: Link, cookie: Cookie, move: _Move
) -> tuple[MigrationStatus, Sequence[str]]:
    """`migrate`, once all is checked; how it ended, and what is to be said of it."""
    status = MigrationStatus()
    cancelled: asyncio.CancelledError | None = None
    try:
        async with _channel(source, destination, move.uri, move.host) as where:
            status = await perform(
                source.monitor,
                where,
                bandwidth=move.bandwidth,
                timeout=move.timeout,
                progress=move.progress,
            )
        end_of_source = Source.COMPLETED if status.status == "completed" else Source.KEPT
        why = status.error or f"the migration was {status.status}"
    except asyncio.CancelledError as error:
        # From here on it is brought to an end, whoever cancels how often.
        cancelled = error
        end_of_source, why = Source.KEPT, "cancelled"
    except VcpuConnectionError as error:
        end_of_source, why = (Source.DEAD if await has_ended(source) else Source.UNKNOWN), error.message
    except VcpuRefused:
        release(cookie, Side.SOURCE)
        raise
    except VcpuFailed as error:
        # It did not begin: perhaps another one is under way, and that is not ours to end.
        release(cookie, Side.SOURCE)
        raise VcpuFailed(
            f"{error.message}; the guest goes on at the source", hint=error.hint, qmp_text=error.qmp_text
        ) from error
    try:
        messages = await aio.finish(_hand_over(source, destination, cookie, end_of_source, why, move))
    except VcpuError as error:
        if cancelled is not None:
            raise cancelled from error
        raise
    if cancelled is not None:
        raise cancelled
    return status, messages


async def _hand_over(
    source: Link,
    destination: Link,
    cookie: Cookie,
    end_of_source: Source,
    why: str,
    move: _Move,
) -> Sequence[str]:
    """Step by step, as the table says; what is to be said of it."""
    reasons: list[Refusal] = []
    is_told = False
    if end_of_source in (Source.COMPLETED, Source.DEAD):
        release(cookie, Side.SOURCE)
    if end_of_source is Source.KEPT:
        here = Destination.BROKEN
    else:
        here, reasons = await finish(destination, cookie)
    why = "; ".join(one.message for one in reasons) or why
    while True:
        step = next_step(end_of_source, here)
        if step is Step.START_DESTINATION and not take(cookie, Side.DESTINATION, destination):
            here, why = Destination.OTHER, "another side has taken the guest"
        elif step is Step.START_DESTINATION:
            is_told = True
            here, said = await start(destination, cookie)
            why = said or why
        elif step is Step.END_SOURCE:
            move.settled()
            forget(destination)
            messages = []
            if end_of_source is Source.DEAD:
                messages = ["the source's QEMU ended by itself, after it had handed the guest over"]
            elif not await end(source):
                messages = ["the source's QEMU may still be there, paused: end it, and do not let it go on"]
            if move.one_cpu is not None:
                messages += await move.one_cpu.arrive(destination.state)
            return messages
        elif step is Step.GO_BACK:
            if (lost := await _lost(source)) is not None:
                # What is at the destination may be all there is.
                why = f"{why}; the source's QEMU is gone, or does not answer"
                if end_of_source is Source.KEPT and lost is Source.DEAD:
                    release(cookie, Side.SOURCE)
                    here, reasons = await finish(destination, cookie)
                end_of_source = lost
                continue
            if not await end(destination) and is_told:
                # It may have run, and run again.
                here = Destination.UNKNOWN
                continue
            # What may be left there is not let run any more.
            release(cookie, Side.DESTINATION, destination)
            if not take(cookie, Side.SOURCE):
                move.settled()
                raise VcpuPartial(
                    f"{why}, and neither side here was touched",
                    hint="look where it runs",
                    messages=move.left(),
                )
            await go_on(source, runs=cookie.runs)
            raise VcpuFailed(f"{why}; the guest goes on at the source", hint="correct that, and migrate again")
        elif step is Step.LEAVE:
            move.settled()
            raise VcpuPartial(
                f"{why}; which side runs the guest cannot be told, and neither was touched",
                hint="look at both: migrate-cancel --force lets the source go on, migrate-finish the destination",
                messages=move.left(),
            )
        else:
            if here is Destination.GONE and not await has_ended(destination):
                # It only does not answer.
                move.settled()
            else:
                await end(destination)
            raise VcpuConnectionError(
                f"{why}; nobody runs it that we know of, and what had come to the destination is not let run",
                reason="closed",
                hint="if the source's QEMU is there, the guest goes on in it",
                messages=move.left(),
            )


@contextmanager
def _declined(what: str) -> Iterator[None]:
    """QEMU's error as ours."""
    try:
        yield
    except CommandError as error:
        text = f"QEMU cannot {what}: {error.text}"
        raise VcpuFailed(text, qmp_class=error.error_class, qmp_text=error.text, hint="look at its log") from error
