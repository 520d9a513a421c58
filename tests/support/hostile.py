"""A hostile QEMU and a hostile guest agent: they begin as faithful ones, and distort some of their
answers.

`python -m tests.support.hostile FOLDER WHO COUNT SEED` serves in each folder that FOLDER has, each
client from a fresh machine, until that many answers were sent; then its sockets are gone. WHO is
`qmp` or `agent`, the one that is hostile. It prints what it has sent as JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

from tests.support.distort import Close, Distorter
from tests.support.fake_agent import FakeAgent, serve_agent
from tests.support.fake_guest import FakeGuest
from tests.support.fake_qemu import FakeQemu
from tests.support.fake_qmp import Connection, serve
from tests.support.recordings import recording

MACHINES = (None, None, "x86_64-10.0/q35-levels", "ppc64-10.0/pseries", "s390x-10.0/ccw")
UNPLUGS = (
    "gone",
    "gone",
    "gone",
    "gone-silently",
    "refused",
    "silence",
    "error",
    ["refused", "gone"],
)
RATES = (0.05, 0.2, 0.4, 0.9)


class Tally:
    """What was sent; `ended` is set once that is `count` answers."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.sent = self.clients = 0
        self.ways: Counter[str] = Counter()
        self.ended = asyncio.Event()

    def note(self, way: str | None) -> None:
        """One more, distorted in this way."""
        self.sent += 1
        if way is not None:
            self.ways[way] += 1
        if self.sent >= self.count:
            self.ended.set()


class Server:
    """The sockets of one folder. `seed` decides on all that it does, client by client."""

    def __init__(self, who: str, seed: str, tally: Tally) -> None:
        self._who, self._seed, self._tally = who, seed, tally
        self._clients = 0
        self._guest: FakeAgent = FakeAgent()

    async def qmp(self, connection: Connection) -> None:
        self._clients += 1
        self._tally.clients += 1
        draw = random.Random(f"{self._seed} machine {self._clients}")
        name = draw.choice(MACHINES)
        machine = recording(name) if name is not None else None
        qemu = FakeQemu(draw.choice((4, 4, 8)), draw.choice(((), (1,), (1, 3))), machine=machine)
        qemu.kvm = draw.random() < 0.7
        qemu.status = draw.choice(("running", "running", "running", "paused", "prelaunch"))
        for slot in list(qemu.machine.slots)[1:]:
            qemu.on_delete[slot] = draw.choice(UNPLUGS)
        self._guest = FakeGuest(qemu)
        if self._who == "qmp":
            connection.writer = self._hostile(connection.writer)
        with suppress(ConnectionError, AssertionError):
            await qemu.script(connection)

    async def agent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await self._guest.serve(
                reader, self._hostile(writer) if self._who == "agent" else writer
            )

    def _hostile(self, writer: asyncio.StreamWriter) -> Any:
        draw = random.Random(f"{self._seed} {self._clients}")
        rate, quiet = draw.choice(RATES), draw.choice((0, 6, 12, 20, 40, 80))
        return _Writer(writer, Distorter(f"{self._seed} {self._clients}", rate, quiet), self._tally)


class _Writer:
    """A stream's writer whose every write is one answer, and is distorted."""

    def __init__(self, writer: asyncio.StreamWriter, answers: Distorter, tally: Tally) -> None:
        self._writer = writer
        self._answers = answers
        self._tally = tally

    def write(self, data: bytes) -> None:
        way, pieces = self._answers.distort(data)
        self._tally.note(way)
        for piece in pieces:
            if isinstance(piece, Close):
                self._writer.close()
                break
            self._writer.write(piece)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


async def main(folder: Path, who: str, count: int, seed: str) -> None:
    tally = Tally(count)
    async with AsyncExitStack() as stack:
        for place in folder.iterdir():
            server, agent = Server(who, f"{seed} {place.name}", tally), FakeAgent()
            agent.serve = server.agent  # type: ignore[method-assign]
            await stack.enter_async_context(serve(place, server.qmp))
            await stack.enter_async_context(serve_agent(place, agent))
        print("ready", flush=True)
        await tally.ended.wait()
        for path in folder.glob("*/fake.*"):
            path.unlink()
        # Whoever is still connected is served to the end.
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    print(
        json.dumps({name: getattr(tally, name) for name in ("sent", "clients", "ways")}), flush=True
    )


if __name__ == "__main__":
    folder, who, count, seed = sys.argv[1:]
    # A client that has gone is no trouble.
    logging.disable()
    asyncio.run(main(Path(folder), who, int(count), seed))
