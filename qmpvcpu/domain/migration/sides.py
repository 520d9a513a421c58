"""The acts of one side of a migration: send memory to another QEMU or a file, or receive it; then
let the guest continue or run, or end its QEMU.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from qmpvcpu import aio
from qmpvcpu.core.machine.versions import Feature, has
from qmpvcpu.core.migration.cookie import Cookie, check_uri
from qmpvcpu.core.migration.status import MigrationStatus, Progress, Stillness, parse_status
from qmpvcpu.core.migration.who_runs import Destination, Source
from qmpvcpu.core.model import QemuVersion
from qmpvcpu.domain.reader import run_state
from qmpvcpu.domain.session import Session
from qmpvcpu.errors import VcpuConnectionError, VcpuFailed, VcpuPartial
from qmpvcpu.host.process import is_alive
from qmpvcpu.ports import CommandError, Monitor, MonitorEvent

#: Seconds between two queries: the first interval and the longest.
LOOK_FIRST: Final = 0.005
LOOK_MOST: Final = 0.1
#: Seconds that a cancelled migration has to end.
_CANCEL_SECONDS: Final = 3.0
#: Without the return path a source does not learn that the destination failed (7.2 to 11.1). With
#: `pause-before-switchover` QEMU waits for another command before the end.
_CAPABILITIES: Final = {"return-path": True, "events": True, "pause-before-switchover": False}
#: A file has no return path.
_FILE_CAPABILITIES: Final = {**_CAPABILITIES, "return-path": False}
#: Seconds that a QEMU has to exit.
_END_SECONDS: Final = 5.0
FD_NAME: Final = "qmpvcpu-migration"
#: Bytes per second. A paused guest should be limited only by the disk.
_AS_FAST_AS_IT_GETS: Final = 1 << 50


@dataclass(frozen=True, slots=True)
class Transfer:
    """How a guest's memory is sent to a destination.

    Attributes:
        uri: where the destination listens; None: two QEMUs on this host use a private socket.
        host: the address by which the source's host reaches the destination's host.
        bandwidth: maximum MiB per second; None: QEMU's own limit.
        timeout: seconds after which the guest is paused, so that the migration can finish; None:
            never.
        progress: called with each fresh status.
    """

    uri: str | None = None
    host: str | None = None
    bandwidth: int | None = None
    timeout: float | None = None
    progress: Progress | None = None


async def status_of(monitor: Monitor) -> MigrationStatus:
    """Return the parsed reply of `query-migrate`."""
    try:
        return parse_status(await monitor.query_migrate())
    except CommandError as error:
        return MigrationStatus(error=error.text)


@contextmanager
def declined(what: str) -> Iterator[None]:
    """Translate an error of QEMU into VcpuFailed."""
    try:
        yield
    except CommandError as error:
        raise VcpuFailed(
            f"QEMU cannot {what}: {error.text}",
            qmp_class=error.error_class,
            qmp_text=error.text,
            hint="look at its log",
        ) from error


async def set_capabilities(monitor: Monitor) -> None:
    """Set the capabilities that both sides of a migration need."""
    await monitor.migrate_set_capabilities(_CAPABILITIES)


async def send(monitor: Monitor, uri: str, transfer: Transfer) -> MigrationStatus:
    """Send the guest's memory and devices; return the final status, which may be "failed". After
    "completed" the source does not run.

    Args:
        monitor: the monitor of the source.
        uri: where the destination listens.
        transfer: how the memory is sent.

    Raises:
        VcpuRefused, VcpuFailed: QEMU did not begin.
        VcpuConnectionError: the connection to the source broke.
        CancelledError: the call was cancelled; a migration that had not completed is cancelled too.
    """
    check_uri(uri)
    limits = {} if transfer.bandwidth is None else {"max-bandwidth": transfer.bandwidth << 20}
    async with _parameters(monitor, limits):
        with declined("migrate"):
            await set_capabilities(monitor)
            await monitor.migrate(uri)
        return await _watched(monitor, transfer)


async def send_to_file(
    monitor: Monitor, version: QemuVersion, fd: int, offset: int, progress: Progress | None = None
) -> MigrationStatus:
    """Write a paused guest to a file; return the final status, which may be "failed". The guest
    stays paused.

    Args:
        monitor: the monitor of the guest.
        version: the version of its QEMU.
        fd: a file descriptor that is open for writing and positioned at `offset`.
        offset: where the stream begins, in bytes.
        progress: called with each fresh status.

    Raises:
        VcpuFailed: QEMU did not begin.
        VcpuConnectionError: the connection to QEMU broke.
        CancelledError: the call was cancelled.
    """
    with declined("save it"):
        await monitor.migrate_set_capabilities(
            {**await _switched_off(monitor), **_FILE_CAPABILITIES}
        )
        async with (
            _parameters(monitor, {"max-bandwidth": _AS_FAST_AS_IT_GETS, "tls-creds": ""}),
            _file_uri(monitor, version, fd, offset) as uri,
        ):
            await monitor.migrate(uri)
            return await _watched(monitor, Transfer(progress=progress))


async def receive_file(
    monitor: Monitor, version: QemuVersion, fd: int, offset: int, *, only_reads: bool = False
) -> None:
    """Let a prepared destination read a file. `fd` is open for reading and positioned at `offset`.
    With `only_reads` the destination does not activate its disks.

    Raises:
        VcpuFailed: QEMU declined.
    """
    with declined("read the saved guest"):
        late = {"late-block-activate": True} if only_reads else {}
        await monitor.migrate_set_capabilities({**_FILE_CAPABILITIES, **late})
        async with _file_uri(monitor, version, fd, offset, keep=True) as uri:
            await monitor.migrate_incoming(uri)


async def stop_moving(monitor: Monitor) -> MigrationStatus:
    """Send `migrate_cancel`, and wait for the end; return the final status, which is "completed" if
    the cancel came too late.

    Raises:
        VcpuConnectionError: the connection to the source broke.
    """
    with suppress(CommandError):
        await monitor.migrate_cancel()
    deadline = time.monotonic() + _CANCEL_SECONDS
    while True:
        status = await status_of(monitor)
        if not status.is_active or time.monotonic() >= deadline:
            return status
        await asyncio.sleep(LOOK_FIRST)


@asynccontextmanager
async def _parameters(monitor: Monitor, given: Mapping[str, int | str]) -> AsyncIterator[None]:
    """Set these migration parameters of QEMU, and restore the previous ones afterwards."""
    if not given:
        yield
        return
    with declined("change how it migrates"):
        found = await monitor.query_migrate_parameters()
        usual = found if isinstance(found, dict) else {}
        # A parameter that QEMU does not report is not set: 7.2 has no value for "no TLS".
        changed = {key: value for key, value in given.items() if usual.get(key, value) != value}
        await monitor.migrate_set_parameters(changed)
    try:
        yield
    finally:
        with suppress(CommandError, VcpuConnectionError):
            await monitor.migrate_set_parameters({key: usual[key] for key in changed})


async def _switched_off(monitor: Monitor) -> dict[str, bool]:
    """Return the capabilities that are on, each with False. A saved file must be readable without
    them, because the process that restores it does not know which were on.
    """
    rows = await monitor.execute("query-migrate-capabilities")
    on = (
        [row.get("capability") for row in rows if row.get("state") is True]
        if isinstance(rows, list)
        else []
    )
    return {str(name): False for name in on}


@asynccontextmanager
async def _file_uri(
    monitor: Monitor, version: QemuVersion, fd: int, offset: int, *, keep: bool = False
) -> AsyncIterator[str]:
    """Pass a file to QEMU, and yield its URI. QEMU has `file:` from 8.2 on, and 11.1 no longer
    accepts files as `fd:`.
    """
    if not has(version, Feature.FILE_MIGRATION):
        await monitor.getfd(FD_NAME, fd)
        yield f"fd:{FD_NAME}"
        return
    reply = await monitor.add_fd(fd)
    number = reply.get("fdset-id") if isinstance(reply, dict) else None
    yield f"file:/dev/fdset/{number},offset={offset}"
    if not keep and type(number) is int:
        with suppress(CommandError, VcpuConnectionError):
            await monitor.remove_fd(number)


async def _watched(monitor: Monitor, transfer: Transfer) -> MigrationStatus:
    """Return how a running migration ends. If the caller is cancelled, the migration is cancelled
    too.
    """
    try:
        return await _until_ended(monitor, transfer)
    except asyncio.CancelledError:
        await aio.finish(stop_moving(monitor))
        raise


async def _until_ended(monitor: Monitor, transfer: Transfer) -> MigrationStatus:
    loop = asyncio.get_running_loop()
    pause_at = None if transfer.timeout is None else loop.time() + transfer.timeout
    stillness = Stillness(loop.time())
    pause = LOOK_FIRST
    waker = asyncio.Event()

    def sink(event: MonitorEvent | VcpuConnectionError) -> None:
        if isinstance(event, VcpuConnectionError) or event.name in ("MIGRATION", "STOP"):
            waker.set()

    with monitor.listen(sink):
        while True:
            waker.clear()
            status = await status_of(monitor)
            if transfer.progress is not None:
                transfer.progress(status)
            if status.has_ended:
                return status
            if (why := stillness.too_long(status, loop.time())) is not None:
                ended = await stop_moving(monitor)
                is_late = ended.status == "completed"
                return (
                    ended if is_late else MigrationStatus("cancelled", ended.transferred, error=why)
                )
            if pause_at is not None and loop.time() > pause_at:
                pause_at = None
                with suppress(CommandError):
                    await monitor.stop()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await waker.wait()
            pause = min(pause * 2, LOOK_MOST)


# -- the guest continues, or is let run, or its QEMU ends ------------------------------------------


async def go_on(session: Session, *, runs: bool) -> None:
    """Let the source continue, if the guest ran.

    Raises:
        VcpuError: the source does not run.
    """
    await stop_moving(session.monitor)
    if runs and await run_state(session.monitor) != "running":
        with declined("let the guest go on at the source"):
            await _cont(session.monitor)
        if (now := await run_state(session.monitor)) != "running":
            raise VcpuPartial(
                f"the guest is '{now}' at the source", hint="look at the log of its QEMU"
            )


async def _cont(monitor: Monitor) -> None:
    """Send `cont`. A source that has just reported "completed" declines it for a moment (10.0:
    "Migration is not finalized yet").
    """
    deadline = time.monotonic() + _CANCEL_SECONDS
    while True:
        try:
            await monitor.cont()
            return
        except CommandError:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(LOOK_FIRST)


async def let_run(session: Session, cookie: Cookie) -> tuple[Destination, str | None]:
    """Let the destination run, if the guest ran; return whether it does, and why not."""
    if not cookie.runs:
        return Destination.RUNNING, None
    try:
        await session.monitor.cont()
        if (runs := await run_state(session.monitor)) != "running":
            return Destination.OTHER, f"the destination is '{runs}' after cont"
        return Destination.RUNNING, None
    except CommandError as error:
        return Destination.OTHER, f"the destination cannot run it: {error.text}"
    except VcpuConnectionError as error:
        return (
            Destination.DIED if await has_ended(session) else Destination.UNKNOWN
        ), error.message


async def end(session: Session) -> bool:
    """Send `quit`, and wait until QEMU has ended; return whether it has, as far as known."""
    with suppress(CommandError, VcpuConnectionError):
        await session.monitor.quit()
    return await has_ended(session)


async def has_ended(session: Session) -> bool:
    """Wait for a QEMU that should end, or does not answer; return whether it has ended."""
    if session.process is None:
        return False
    deadline = time.monotonic() + _END_SECONDS
    while is_alive(session.process.key):
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(LOOK_FIRST)
    return True


async def lost(source: Session) -> Source | None:
    """Return how a source was lost; None if it answers."""
    try:
        await run_state(source.monitor)
    except VcpuConnectionError:
        return Source.DEAD if await has_ended(source) else Source.UNKNOWN
    return None
