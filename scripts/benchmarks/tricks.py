"""scripts/bench tricks: one enable and 1 to 240, without each trick for speed against with all of
them, in turns.

Each side is a process of its own on a QEMU of its own. The ratios are medians over pairs, of the
side's CPU time and by the clock, which other work on the machine disturbs more. "nothing" has all
tricks, like what all others are compared with: it shows how far chance goes. A trick that saves
less than 3 % is to be deleted.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Final

from qmpvcpu.host.rights import kvm_state
from scripts.benchmarks.against import PLUGS, TOP, Side, in_turns
from scripts.benchmarks.machines import machine

_CLIENT: Final = "from qmpvcpu.qemu.fast_client import FastClient as fast"
_ENGINE: Final = "from qmpvcpu.core.engine.fast import FastEnum as fast"
#: What a side runs first, to be without a trick: everything works without it.
WITHOUT: Final[Mapping[str, str]] = {
    "own replies": f"{_CLIENT}; del fast._put, fast._receive_reply",
    "no texts": f"{_CLIENT}; del fast._cb_outbound, fast._cb_inbound",
    "hash": f"{_ENGINE}; del fast.__hash__",
}


def told(what: str, all_sides: Mapping[str, Side]) -> None:
    """Print how many times as long each takes, and forget it."""
    usual = all_sides["(usual)"]
    for name, side in all_sides.items():
        if side is not usual:
            clock, cpu = (
                statistics.median(a / b for a, b in zip(left, right, strict=True))
                for left, right in ((side.times, usual.times), (side.cpu, usual.cpu))
            )
            ratios = f"{cpu:.3f} times the CPU, {clock:.3f} times by the clock"
            print(f"{what} without {name}: {ratios}, {len(side.cpu)} pairs", flush=True)
    for side in all_sides.values():
        side.times, side.cpu = [], []


async def bench_tricks(pairs: int) -> None:
    """One enable `pairs` times, and 1 to 240 a fifteenth as often."""
    accel = "kvm" if kvm_state()[0] else "tcg"
    all_sides = {"(usual)": Side(TOP), "nothing": Side(TOP)}
    all_sides |= {name: Side(TOP, first) for name, first in WITHOUT.items()}
    sides = list(all_sides.values())
    try:
        for begun in range(0, pairs, PLUGS):
            async with AsyncExitStack() as stack:
                for side in random.sample(sides, len(sides)):
                    side.connect(
                        (await stack.enter_async_context(machine(accel, "1,maxcpus=240"))).qmp
                    )
                for number in range(1, min(PLUGS, pairs - begun) + 1):
                    in_turns(sides, lambda side: side.call("enable", number))  # noqa: B023
        told(f"{accel}: one enable", all_sides)
        for _ in range(max(1, pairs // 15)):
            for side in random.sample(sides, len(sides)):
                async with machine(accel, "1,maxcpus=240") as qemu:
                    side.connect(qemu.qmp)
                    side.call("set_vcpus", 240)
        told(f"{accel}: set_vcpus(240) from 1", all_sides)
    finally:
        for side in sides:
            side.end()
