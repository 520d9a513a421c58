"""Commands that start and end QEMUs, cancelled at any await: each QEMU is somebody's, and nothing
else is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

import qmpvcpu
from tests.support import owned, saving, soaking
from tests.support.awaits import awaits_of, cancelled_at
from tests.support.commands import cli
from tests.support.leaks import nothing_left
from tests.support.waiting import until, within

pytestmark = pytest.mark.qemu

XML = b"""<domain type='qemu'><name>one</name><memory unit='MiB'>32</memory><vcpu current='2'>4</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>
"""
SAMPLE = 3


class House:
    """A state folder, a folder for files, and the guest `one`."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.files = folder / "files"
        self.files.mkdir()
        self.file = self.files / "saved"

    async def runs(self) -> set[str]:
        """Which guests run, and not only wait."""
        found = set()
        for name in owned.running():
            async with qmpvcpu.connect(name) as domain:
                await domain.state()
                if domain.run_state == "running":
                    found.add(name)
        return found

    async def rest(self) -> None:
        for name in owned.running():
            await owned.destroy(name)
        self.file.unlink(missing_ok=True)

    async def is_one(self) -> None:
        """Whatever became of it, the guest is in one place."""
        runs = await self.runs()
        assert len(runs) + self.file.exists() == 1, (runs, self.file.exists())

    # -- what is cancelled, what has to be so before, and what is so after

    async def probe(self) -> None:
        await owned.probe()

    async def start(self) -> None:
        await owned.start("one")

    async def destroy(self) -> None:
        await owned.destroy("one")

    async def save(self) -> None:
        async with qmpvcpu.connect("one") as domain:
            await saving.save(domain, self.file)

    async def restore(self) -> None:
        await saving.restore(self.file)

    async def migrate(self) -> None:
        async with qmpvcpu.connect("one") as domain:
            await saving.move(domain, "two")

    async def nothing(self) -> None:
        pass

    async def saved(self) -> None:
        await self.start()
        await self.save()

    async def at_most_one(self) -> None:
        assert len(await self.runs()) <= 1


Step = Callable[[House], Coroutine[None, None, None]]
CALLS: dict[str, tuple[Step, Step, Step]] = {
    "probe": (House.nothing, House.probe, House.at_most_one),
    "start": (House.nothing, House.start, House.at_most_one),
    "destroy": (House.start, House.destroy, House.at_most_one),
    "save": (House.start, House.save, House.is_one),
    "restore": (House.saved, House.restore, House.at_most_one),
    "migrate": (House.start, House.migrate, House.is_one),
}


@pytest.fixture
async def house(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    (tmp_path / "one.xml").write_bytes(XML)
    assert (await cli("define", str(tmp_path / "one.xml"))).code == 0
    made = House(tmp_path)
    yield made
    await made.rest()


@pytest.mark.parametrize("name", CALLS)
async def test_cancelled_at_any_await_each_qemu_is_somebodys(house, name):
    """`scripts/soak leaks` is the long one."""
    before, call, after = CALLS[name]
    await before(house)
    last = await awaits_of(call(house))
    await house.rest()
    random = Random(soaking.seed(21))
    wanted = soaking.count(SAMPLE)
    chosen = random.sample(range(1, last + 1), min(wanted, last))
    for number in chosen:
        await before(house)
        async with nothing_left():
            with suppress(asyncio.CancelledError):
                await within(
                    cancelled_at(call(house), number),
                    f"its end, cancelled at await {number} of {last}",
                )
        await until(
            lambda: owned.qemus(house.state) == set(owned.running().values()),
            f"nobody's QEMU is left, cancelled at await {number} of {last}",
        )
        assert owned.folders() == owned.running().keys(), number
        assert {path.name for path in house.files.iterdir()} <= {"saved"}, number
        await after(house)
        await house.rest()
