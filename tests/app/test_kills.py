"""Killed while it writes a definition, at any moment and at every system call: it is one of the two
versions.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sys
from collections import Counter
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.support import xml
from tests.support.soaking import count, seed
from tests.support.store import Definitions
from tests.support.waiting import until, within

pytestmark = pytest.mark.scripts

XML = b"<domain>\n  <name>web1</name>\n  <vcpu current='1'>4</vcpu>\n</domain>\n"
CALL = re.compile(r"^\d+ +([a-z0-9_]+)\(")


class Writers:
    def __init__(self, process):
        self.process = process

    async def start(self, mode):
        return int(await self._say(mode))

    async def go(self):
        """Let it run; its wait status."""
        return int((await self._say("go")).split()[1])

    async def _say(self, word):
        self.process.stdin.write(word.encode() + b"\n")
        return (await within(self.process.stdout.readline(), f"its answer to {word!r}")).decode()


@asynccontextmanager
async def writers(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path))
    folder = Definitions(tmp_path)
    folder.define("web1", XML)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("config_writer.py")),
        "web1",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert await process.stdout.readline() == b"ready\n"
        yield Writers(process), folder
    finally:
        process.stdin.close()
        await process.wait()


def versions(folder):
    """The two documents there can be."""
    off = folder.xml("web1")
    assert xml.read(off).enabled_ids == (0,)
    on = off.replace(b"current='1'", b"current='2'").replace(
        b"id='1' enabled='no'", b"id='1' enabled='yes'"
    )
    return off, on


async def written(folder):
    """Until the definition is another file."""
    file = folder.folder / "web1.xml"
    before = file.stat().st_ino, file.stat().st_mtime_ns
    await until(
        lambda: (file.stat().st_ino, file.stat().st_mtime_ns) != before,
        "a version is written",
        every=0.001,
    )


async def test_killed_at_random_moments(tmp_path, monkeypatch):
    """A thousand: `scripts/soak kills`."""
    seen, cut = Counter(), 0
    kills, dice = count(150), random.Random(seed(20))
    async with writers(tmp_path, monkeypatch) as (run, folder):
        off, on = versions(folder)
        for _ in range(kills):
            pid = await run.start("loop")
            end = asyncio.create_task(run.go())
            # However slow the machine is: some of them get to their first version, and some to
            # their second.
            for _ in range(dice.randrange(3)):
                await written(folder)
            await asyncio.sleep(dice.uniform(0.001, 0.01))
            os.kill(pid, signal.SIGKILL)
            assert await end == signal.SIGKILL
            found = folder.xml("web1")
            assert found in (off, on)
            seen[found == on] += 1
            cut += any(name.startswith(".") for name in os.listdir(folder.folder))
    # It was really in the middle of things, and in both versions.
    assert min(seen[True], seen[False], cut) > kills // 50, (seen, cut)


async def test_killed_at_every_system_call_of_one_write(tmp_path, monkeypatch):
    log = tmp_path / "calls"
    async with writers(tmp_path, monkeypatch) as (run, folder):
        off, on = versions(folder)

        async def traced(*words):
            """One write under strace."""
            (folder.folder / "web1.xml").write_bytes(off)
            pid = await run.start("once")
            tracer = await asyncio.create_subprocess_exec(
                "strace",
                "-f",
                "-p",
                str(pid),
                "-o",
                str(log),
                *words,
                stderr=asyncio.subprocess.PIPE,
            )
            try:
                assert b"attached" in await tracer.stderr.readline()
                return await run.go()
            finally:
                with suppress(ProcessLookupError):
                    tracer.terminate()
                await tracer.communicate()

        assert await traced() == 0
        assert folder.xml("web1") == on
        calls = Counter(
            match[1] for line in log.read_text().splitlines() if (match := CALL.match(line))
        )
        assert calls["fsync"] >= 2
        assert calls["rename"] + calls["renameat"] + calls["renameat2"] >= 2
        ends = Counter()
        for name, times in calls.items():
            for number in range(1, times + 1):
                status = await traced("-e", f"inject={name}:signal=KILL:when={number}")
                found = folder.xml("web1")
                assert found in (off, on), (name, number)
                ends[status, found == on] += 1
    assert ends[signal.SIGKILL, False] > 20, ends
    assert ends[signal.SIGKILL, True] > 5, ends
