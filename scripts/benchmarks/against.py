"""scripts/bench --against REF: this tree and an earlier commit, in turns, and that commit against
itself.

Each side is a process of its own that finds its `qmpvcpu` first (PYTHONPATH), on a QEMU of its own.
What is measured is what users wait for: whole commands, the import, one enable over an open
connection, and 1 to 240.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final, cast

from qmpvcpu.host.rights import kvm_state
from scripts.benchmarks.machines import machine

TOP: Final = Path(__file__).parents[2]
PAIRS: Final = 300
#: A side may take so many times what the earlier commit takes.
LIMIT: Final = 1.03
#: Plugs between two new machines: more of them take longer, on each side alike.
PLUGS: Final = 60
XML: Final = """<domain type='qemu'><name>d</name><vcpu current='2'>8</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"""

#: What a side runs: it connects to the path on a line, does what each further line says, and
#: answers in seconds, by the clock and of its CPU.
SIDE: Final = """
import asyncio, json, sys, time
import qmpvcpu

async def main():
    for line in sys.stdin:
        async with qmpvcpu.connect(json.loads(line)) as domain:
            print("[0, 0]", flush=True)
            while (words := json.loads(sys.stdin.readline())) is not None:
                began, used = time.perf_counter(), time.process_time()
                await getattr(domain, words[0])(words[1])
                print([time.perf_counter() - began, time.process_time() - used], flush=True)

exec(sys.argv[1])
asyncio.run(main())
"""


class Side:
    """One version of qmpvcpu; `times` and `cpu`: of what was measured last. `first`: Python that it
    runs first.
    """

    def __init__(self, folder: Path, first: str = "") -> None:
        # Bytecode is written, as on a user's machine.
        known = {
            name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
        }
        # Without PYTHONSAFEPATH, `-c` and `-m` look into the current folder first, which is always
        # this tree.
        self._environment = known | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
        self._process: subprocess.Popen[str] | None = None
        self._first = first
        self.times: list[float] = []
        self.cpu: list[float] = []

    def run(self, *words: str) -> None:
        """A whole process."""
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=self._environment
        )
        self.times.append(time.perf_counter() - began)

    def connect(self, path: str) -> None:
        """Hold a connection to this socket from now on, and leave the one before."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SIDE, self._first],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
            )
        else:
            self._say(None)
        self._say(path)
        self._answer()

    def call(self, name: str, argument: int) -> None:
        """A method of the domain."""
        self._say([name, argument])
        seconds, cpu = self._answer()
        self.times.append(seconds)
        self.cpu.append(cpu)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def _say(self, what: Any) -> None:
        assert self._process is not None
        stdin = cast("IO[str]", self._process.stdin)
        stdin.write(json.dumps(what) + "\n")
        stdin.flush()

    def _answer(self) -> list[float]:
        assert self._process is not None
        found: list[float] = json.loads(cast("IO[str]", self._process.stdout).readline())
        return found


@contextmanager
def sides(ref: str) -> Iterator[list[Side]]:
    """This tree, the commit, and the commit once more."""
    with tempfile.TemporaryDirectory(prefix="qmpvcpu-bench-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", str(tree), ref], cwd=TOP, check=True
        )
        made = [Side(TOP), Side(tree), Side(tree)]
        try:
            yield made
        finally:
            for side in made:
                side.end()
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=TOP, check=True)


def in_turns(all_sides: list[Side], act: Callable[[Side], None]) -> None:
    """Each side once, in any order."""
    for side in random.sample(all_sides, len(all_sides)):
        act(side)


def told(name: str, all_sides: list[Side]) -> bool:
    """Print the ratio of medians, and the commit's against itself; whether the limit holds."""
    ours, other, again = (statistics.median(side.times) for side in all_sides)
    count = len(all_sides[0].times)
    for side in all_sides:
        side.times = []
    ratio = ours / other
    verdict = "holds" if ratio <= LIMIT else "MISSED"
    print(
        f"{name}: {ours * 1000:.2f} / {other * 1000:.2f} ms = {ratio:.3f}  (at most {LIMIT:.2f}:"
        f" {verdict}),"
        f" {count} pairs; that commit against itself {again / other:.3f}",
        flush=True,
    )
    return ratio <= LIMIT


async def bench_commands(all_sides: list[Side], pairs: int) -> bool:
    """The import, and whole commands: of a file, and of a socket."""
    good = True
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "d.xml"
        file.write_text(XML)
        async with machine("tcg", "2,maxcpus=8") as qemu:
            rows = {
                "import qmpvcpu": ("-c", "import qmpvcpu"),
                "--version": ("-m", "qmpvcpu", "--version"),
                "vcpucount FILE": ("-m", "qmpvcpu", "vcpucount", str(file)),
                "vcpucount SOCKET": ("-m", "qmpvcpu", "vcpucount", qemu.qmp),
                "setvcpu SOCKET 1 --enable": (
                    "-m",
                    "qmpvcpu",
                    "setvcpu",
                    qemu.qmp,
                    "1",
                    "--enable",
                ),
            }
            for name, words in rows.items():
                in_turns(all_sides, lambda side: side.run(*words))  # noqa: B023 - bytecode is there from now on
                for side in all_sides:
                    side.times = []
                for _ in range(pairs):
                    in_turns(all_sides, lambda side: side.run(*words))  # noqa: B023
                good &= told(name, all_sides)
    return good


async def bench_calls(all_sides: list[Side], pairs: int, accel: str) -> bool:
    """One enable over a connection that is held; and 1 to 240, a thirtieth as often."""
    for first in range(0, pairs, PLUGS):
        async with AsyncExitStack() as stack:
            for side in all_sides:
                side.connect((await stack.enter_async_context(machine(accel, "1,maxcpus=240"))).qmp)
            for number in range(1, min(PLUGS, pairs - first) + 1):
                in_turns(all_sides, lambda side: side.call("enable", number))  # noqa: B023
    good = told(f"{accel}: one enable", all_sides)
    for _ in range(max(1, pairs // 30)):
        async with AsyncExitStack() as stack:
            for side in all_sides:
                side.connect((await stack.enter_async_context(machine(accel, "1,maxcpus=240"))).qmp)
            in_turns(all_sides, lambda side: side.call("set_vcpus", 240))
    return told(f"{accel}: set_vcpus(240) from 1", all_sides) and good


async def bench_against(ref: str, pairs: int) -> bool:
    """Everything, against one commit."""
    usable, _ = kvm_state()
    with sides(ref) as all_sides:
        good = await bench_commands(all_sides, pairs)
        return await bench_calls(all_sides, pairs, "kvm" if usable else "tcg") and good
