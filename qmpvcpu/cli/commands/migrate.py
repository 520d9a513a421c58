"""`migrate` and its phases, `save` and `restore`: take a guest elsewhere, or to a file."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from qmpvcpu.cli import render
from qmpvcpu.cli.options import (
    DEST_HELP,
    DEST_OR_NAME,
    DOMAIN,
    HANGS,
    NO_PLACE,
    PROBE_MODE,
    WAIT,
    argument,
    command,
    flag,
    positive,
    seconds,
    value,
)
from qmpvcpu.core.model import format_ids

if TYPE_CHECKING:
    from qmpvcpu.app.destination import Where
    from qmpvcpu.cli.session import CommandSession

_LEAVE = (flag("--persistent", "define it at the destination, too"), WAIT, HANGS)
_MOVING = (
    value("--bandwidth", "MIB", "MiB a second at most", type=positive),
    value(
        "--timeout", "S", "pause the guest if it has not converged after S seconds", type=seconds
    ),
)
_WHERE = (
    value("--uri", "URI", "where it listens: unix:PATH or tcp:HOST:PORT"),
    NO_PLACE,
    PROBE_MODE,
)
_PRINTED = "what migrate-begin has printed; - is standard input"


def _where(options: Namespace, agent: str | None = None) -> Where:
    """Return the destination that the options name."""
    from qmpvcpu.app.destination import Where
    from qmpvcpu.app.probes import ProbeMode

    return Where(options.dest, agent, place=not options.no_place, mode=ProbeMode(options.probe))


@command(
    DOMAIN,
    argument("dest", "DEST", DEST_HELP, option="desturi"),
    value("--dest-agent", "ADDR", "the guest agent's socket there, where DEST is a socket"),
    *_LEAVE,
    flag("--undefine-source", "remove the source's definition afterwards"),
    *_MOVING,
    *_WHERE,
)
async def migrate(session: CommandSession) -> int:
    """Take a running guest to another QEMU."""
    from qmpvcpu.app import migrate as app
    from qmpvcpu.domain.migration.sides import Transfer

    options = session.options
    async with session.connect() as source:
        with session.transfer() as progress:
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
    line = f"{options.domain}: runs at {options.dest} with vCPU {format_ids(done.vcpus)}"
    session.show(
        {**done.to_json(), "domain": options.domain, "destination": options.dest},
        [
            line,
            render.status(done.status),
        ],
    )
    return 0


@command(DOMAIN, *_LEAVE)
async def migrate_begin(session: CommandSession) -> int:
    """Print the cookie."""
    from qmpvcpu.app import migrate as app

    options = session.options
    async with (
        session.connect() as source,
        session.waiting("waiting for pending unplugs", options.wait),
    ):
        cookie = await source.migration.begin(
            persistent=options.persistent, wait=options.wait or 0.0, force=options.force
        )
    text = app.cookie_text(cookie)
    features = sorted(cookie.features)
    document = {
        "outcome": "queried",
        "name": cookie.name,
        "uuid": cookie.uuid,
        "features": features,
        "cookie": text,
    }
    session.show(document, [text.rstrip()])
    return 0


@command(argument("cookie", "COOKIE", _PRINTED), DEST_OR_NAME, *_WHERE)
async def migrate_prepare(session: CommandSession) -> int:
    """Start or check the destination."""
    from qmpvcpu.app import migrate as app

    options = session.options
    cookie = app.load_cookie(options.cookie)
    async with session.waiting("preparing the destination"):
        done = await app.migrate_prepare(cookie, _where(options), options.uri)
    session.warn(done.messages)
    session.show(done.to_json(), [done.uri])
    return 0


@command(
    DOMAIN,
    argument("uri", "URI", "what migrate-prepare has printed"),
    HANGS,
    value("--cookie", "COOKIE", "refuse unless the guest is still as this says"),
    *_MOVING,
)
async def migrate_perform(session: CommandSession) -> int:
    """Hand the guest over."""
    from qmpvcpu.app import migrate as app

    options = session.options
    cookie = app.load_cookie(options.cookie) if options.cookie is not None else None
    async with session.connect() as source:
        with session.transfer() as progress:
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
    lines = [
        f"{options.domain}: handed over, {render.status(status)}",
        "migrate-finish lets it run there",
    ]
    session.show(document, lines)
    return 0


@command(
    argument("dest", "DEST", "its name, or its QMP socket"),
    argument("cookie", "COOKIE", f"{_PRINTED} (default: that of migrate-prepare)", default=None),
    flag("--force", "even if another side has claimed the guest"),
)
async def migrate_finish(session: CommandSession) -> int:
    """Verify the guest, and let it run."""
    from qmpvcpu.app import migrate as app

    options = session.options
    cookie = app.load_cookie(options.cookie) if options.cookie is not None else None
    state, runs = await app.migrate_finish(options.dest, cookie, force=options.force)
    document = {
        "outcome": "applied",
        "changed": True,
        "domain": options.dest,
        "vcpus": list(state.enabled_ids),
    }
    word = "runs" if runs else "is paused, as it was,"
    session.show(document, [f"{options.dest}: {word} with vCPU {format_ids(state.enabled_ids)}"])
    return 0


@command(DOMAIN, flag("--force", "even if the other side may have claimed the guest"))
async def migrate_cancel(session: CommandSession) -> int:
    """End a migration."""
    from qmpvcpu.app import migrate as app

    done = await app.migrate_cancel(session.connect(), force=session.options.force)
    session.show(
        {"outcome": "applied", "changed": True, "message": done},
        [f"{session.options.domain}: {done}"],
    )
    return 0


@command(
    DOMAIN,
    argument("file", "FILE", "it is replaced once the guest is in it, whole"),
    WAIT,
    flag("--verify", "have a second QEMU read the whole file before the first one ends"),
    HANGS,
)
async def save(session: CommandSession) -> int:
    """Write a running guest to a file."""
    from qmpvcpu.app import saving

    options = session.options
    async with session.connect() as source:
        with session.transfer() as progress:
            done = await saving.save(
                source,
                options.file,
                wait=options.wait or 0.0,
                force=options.force,
                progress=progress,
                verify=options.verify,
            )
    session.warn(done.messages)
    line = (
        f"{options.domain}: saved to {done.file}, {done.size >> 20} MiB, with vCPU"
        f" {format_ids(done.vcpus)}"
    )
    session.show({**done.to_json(), "domain": options.domain}, [line])
    return 0


@command(argument("file", "FILE", "what `save` has written"), DEST_OR_NAME, NO_PLACE, PROBE_MODE)
async def restore(session: CommandSession) -> int:
    """Start a saved guest again."""
    from qmpvcpu.app import saving

    options = session.options
    async with session.waiting("restoring"):
        done = await saving.restore(options.file, _where(options))
    session.warn(done.messages)
    word = "runs" if done.runs else "is paused, as it was,"
    lines = [
        f"{done.name}: {word} with vCPU {format_ids(done.vcpus)}",
        *(f"QMP: {path}" for path in done.qmp),
    ]
    session.show(done.to_json(), lines)
    return 0
