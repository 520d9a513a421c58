"""One connection for long, many short ones, and a `watch` all the while: nothing grows, all is
told.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

import qmpvcpu
from tests.support import soaking
from tests.support.commands import start_cli
from tests.support.ejecting import ejecting
from tests.support.hosts import why_no_kvm
from tests.support.leaks import held
from tests.support.waiting import until, within

pytestmark = [
    pytest.mark.qemu,
    # Under TCG a QEMU can take only so many plugs.
    pytest.mark.skipif(why_no_kvm() is not None, reason=f"KVM: {why_no_kvm()}"),
]

#: Plugs in the suite, and of how many one is followed by a connection of its own.
SAMPLE, CONNECT_EVERY = 60, 5
#: What was held after so many is the measure.
SETTLED = 100
#: How much more memory than then, at most.
GROWTH = 1.1


class Watch:
    """A `watch` in another process; how often each event was told."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.told: Counter[str] = Counter()
        self._process = process
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while line := await self._process.stdout.readline():
            event = json.loads(line)
            assert "event" in event, event
            self.told[event["event"]] += 1

    @property
    def has_ended(self) -> bool:
        return self._reading.done()

    async def end(self) -> None:
        with suppress(ProcessLookupError):
            self._process.terminate()
        await self._process.wait()
        await self._reading


def resident() -> int:
    """Memory of this process, bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


async def test_nothing_grows_and_nothing_goes_untold(tmp_path, monkeypatch):
    """`scripts/soak endurance` is the long one."""
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    plugs = soaking.count(SAMPLE)
    async with ejecting("1,maxcpus=8", monitors=("qmp", "watched", "short")) as qemu:
        watch = Watch(await start_cli("watch", str(qemu.folder / "watched"), "--json"))
        await until(lambda: watch.has_ended or watch.told["snapshot"], "it watches")
        async with qmpvcpu.connect(qemu.qmp) as domain:
            settled, memory = sum(held(tmp_path).values()), resident()
            for number in range(plugs):
                if number == min(SETTLED, plugs // 2):
                    settled, memory = sum(held(tmp_path).values()), resident()
                vcpu = 1 + number % 7
                assert (await domain.enable(vcpu)).changed
                assert (await domain.disable(vcpu)).changed
                if number % CONNECT_EVERY == 0:
                    async with qmpvcpu.connect(str(qemu.folder / "short")) as short:
                        assert (await short.state()).enabled_ids == (0,)
            grown = resident() / memory
            # The file of an unplug goes when its end was seen, by whichever process.
            await until(
                lambda: sum(held(tmp_path).values()) <= settled,
                "no more is held than in the beginning",
            )
        # The watcher has heard of the last one when it has looked once more.
        await until(
            lambda: watch.has_ended or watch.told["vcpu-removed"] >= plugs, "every unplug was told"
        )
        await within(watch.end(), "watch ends")
    print(
        f"{plugs} plugs and unplugs, {-(-plugs // CONNECT_EVERY)} connects: memory x {grown:.3f},"
        f" {watch.told}"
    )
    assert (watch.told["vcpu-added"], watch.told["vcpu-removed"]) == (plugs, plugs)
    assert grown < GROWTH
