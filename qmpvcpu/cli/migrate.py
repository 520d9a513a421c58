"""The commands that move a guest to another QEMU, or to a file and back."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from qmpvcpu.app import migrate as app
from qmpvcpu.app import saving
from qmpvcpu.app.destination import Where
from qmpvcpu.app.probes import ProbeMode
from qmpvcpu.cli.progress import waiting
from qmpvcpu.core.migration.status import MigrationStatus, Progress
from qmpvcpu.core.model import format_ids
from qmpvcpu.domain.migration.sides import Transfer

if TYPE_CHECKING:
    from qmpvcpu.cli.commands import CommandSession
    from qmpvcpu.cli.output import Output

#: Seconds between two updates of the progress line.
_TICK: Final = 0.2


@contextmanager
def _progress(output: Output) -> Iterator[Progress | None]:
    """Show bytes, percent and downtime on one line of a terminal, and erase the line at the end."""
    if not output.shows_progress:
        yield None
        return
    last = 0.0

    def show(status: MigrationStatus) -> None:
        nonlocal last
        if (now := time.monotonic()) >= last + _TICK:
            last = now
            output.progress(f"\r\x1b[Kmigrating: {app.describe_status(status)} ")

    try:
        yield show
    finally:
        output.progress("\r\x1b[K")


def _where(options: Namespace, agent: str | None = None) -> Where:
    return Where(options.dest, agent, place=not options.no_place, mode=ProbeMode(options.probe))


async def _migrate(session: CommandSession) -> int:
    options = session.options
    async with session.connect() as source:
        with _progress(session.output) as progress:
            done = await app.migrate(
                source,
                _where(options, options.dest_agent),
                Transfer(options.uri, None, options.bandwidth, options.timeout, progress),
                persistent=options.persistent,
                undefine_source=options.undefine_source,
                wait=options.wait or 0.0,
                force=options.force,
                at_destination=lambda: session.warn_when_interrupted(
                    f"the guest is at {options.dest}: look there"
                ),
            )
    session.warn(done.messages)
    session.show(
        {**done.to_json(), "domain": options.domain, "destination": options.dest},
        [
            f"{options.domain}: runs at {options.dest} with vCPU {format_ids(done.vcpus)}",
            app.describe_status(done.status),
        ],
    )
    return 0


async def _begin(session: CommandSession) -> int:
    options = session.options
    async with session.connect() as source, waiting(session.output, "waiting for pending unplugs", options.wait):
        cookie = await source.migration.begin(
            persistent=options.persistent, wait=options.wait or 0.0, force=options.force
        )
    text = app.cookie_text(cookie)
    session.show(
        {
            "outcome": "queried",
            "name": cookie.name,
            "uuid": cookie.uuid,
            "features": sorted(cookie.features),
            "cookie": text,
        },
        [text.rstrip()],
    )
    return 0


async def _prepare(session: CommandSession) -> int:
    options = session.options
    cookie = app.load_cookie(options.cookie)
    async with waiting(session.output, "preparing the destination"):
        done = await app.migrate_prepare(cookie, _where(options), options.uri)
    session.warn(done.messages)
    session.show(done.to_json(), [done.uri])
    return 0


async def _perform(session: CommandSession) -> int:
    options = session.options
    cookie = app.load_cookie(options.cookie) if options.cookie is not None else None
    async with session.connect() as source:
        with _progress(session.output) as progress:
            status = await source.migration.perform(
                options.uri,
                cookie=cookie,
                bandwidth=options.bandwidth,
                timeout=options.timeout,
                progress=progress,
                force=options.force,
            )
    document = {
        "outcome": "applied",
        "changed": True,
        "transferred": status.transferred,
        "downtime": status.downtime,
        "total_time": status.total_time,
    }
    session.show(
        document,
        [f"{options.domain}: handed over, {app.describe_status(status)}", "migrate-finish lets it run there"],
    )
    return 0


async def _finish(session: CommandSession) -> int:
    options = session.options
    cookie = app.load_cookie(options.cookie) if options.cookie is not None else None
    state, runs = await app.migrate_finish(options.dest, cookie, force=options.force)
    document = {"outcome": "applied", "changed": True, "domain": options.dest, "vcpus": list(state.enabled_ids)}
    word = "runs" if runs else "is paused, as it was,"
    session.show(document, [f"{options.dest}: {word} with vCPU {format_ids(state.enabled_ids)}"])
    return 0


async def _cancel(session: CommandSession) -> int:
    done = await app.migrate_cancel(session.connect(), force=session.options.force)
    session.show({"outcome": "applied", "changed": True, "message": done}, [f"{session.options.domain}: {done}"])
    return 0


async def _save(session: CommandSession) -> int:
    options = session.options
    async with session.connect() as source:
        with _progress(session.output) as progress:
            done = await saving.save(
                source,
                options.file,
                wait=options.wait or 0.0,
                force=options.force,
                progress=progress,
                verify=options.verify,
            )
    session.warn(done.messages)
    session.show(
        {**done.to_json(), "domain": options.domain},
        [f"{options.domain}: saved to {done.file}, {done.size >> 20} MiB, with vCPU {format_ids(done.vcpus)}"],
    )
    return 0


async def _restore(session: CommandSession) -> int:
    options = session.options
    async with waiting(session.output, "restoring"):
        done = await saving.restore(options.file, _where(options))
    session.warn(done.messages)
    word = "runs" if done.runs else "is paused, as it was,"
    lines = [f"{done.name}: {word} with vCPU {format_ids(done.vcpus)}", *(f"QMP: {path}" for path in done.qmp)]
    session.show(done.to_json(), lines)
    return 0


COMMANDS: Final[dict[str, Callable[[CommandSession], Awaitable[int]]]] = {
    "migrate": _migrate,
    "migrate-begin": _begin,
    "migrate-prepare": _prepare,
    "migrate-perform": _perform,
    "migrate-finish": _finish,
    "migrate-cancel": _cancel,
    "save": _save,
    "restore": _restore,
}
