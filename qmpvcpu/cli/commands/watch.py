"""`watch`: what happens to the vCPUs of a guest, line by line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qmpvcpu.cli import render
from qmpvcpu.cli.options import DOMAIN, command
from qmpvcpu.cli.output import Output, OutputLost
from qmpvcpu.core.model import format_ids

if TYPE_CHECKING:
    from qmpvcpu.cli.session import CommandSession


@contextmanager
def _while_read(output: Output) -> Iterator[None]:
    """Raise OutputLost in the body when the reader of stdout has left, even if there is nothing to
    write.
    """
    import asyncio

    loop, task, pipe = asyncio.get_running_loop(), asyncio.current_task(), output.pipe()
    if task is None or pipe is None:
        yield
        return

    def leave() -> None:
        loop.remove_reader(pipe)
        output.lose_reader()
        task.cancel()

    # For the writing end of a pipe, epoll(7) reports only an error, when the last reader has left.
    loop.add_reader(pipe, leave)
    try:
        yield
    except asyncio.CancelledError:
        if output.reader_left:
            raise OutputLost from None
        raise
    finally:
        loop.remove_reader(pipe)


@command(DOMAIN)
async def watch(session: CommandSession) -> int:
    """Report events until interrupted."""
    with _while_read(session.output):
        return await _watch_on(session)


async def _watch_on(session: CommandSession) -> int:
    async with session.connect(watch=True) as domain, domain.events(steps=True) as events:
        state = domain.last_state
        pending = domain.pending_ids
        line: dict[str, Any] = {
            "time": time.time(),
            "event": "snapshot",
            "vcpus": list(state.enabled_ids),
        }
        line["detail"] = f"{len(state.enabled_ids)} of {state.maxcpus} vCPUs enabled"
        if pending:
            line["detail"] += f"; unplug pending: {format_ids(pending)}"
        session.output.stream(line | {"pending": list(pending)}, render.snapshot(line))
        for event in domain.settled:
            session.output.stream(event.to_json(), render.event(event))
        async for event in events:
            session.output.stream(event.to_json(), render.event(event))
    return 0
