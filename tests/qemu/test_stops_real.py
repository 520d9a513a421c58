"""QEMU, or libvirtd, is stopped (SIGSTOP) while a command runs: that ends by its deadline, with a
clear error.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

from tests.qemu.libvirt_guests import EJECTING, numa
from tests.support import soaking, xml
from tests.support.ejecting import firmware
from tests.support.hosts import why_no_kvm
from tests.support.houses import CODES, MOVES, House, Met, Started, house, moved, started
from tests.support.lanes import meet_all
from tests.support.libvirtds import Libvirtd, daemon_of_our_own
from tests.support.plugged import TALKING, Plugged, plugged
from tests.support.waiting import until

pytestmark = [pytest.mark.qemu, pytest.mark.xdist_group("libvirt")]

#: Nothing computes meanwhile.
LANES = 6
#: In the suite an answer may take a second, in place of ten.
PATIENCE = None if soaking.is_long_run() else 1.0
#: Seconds that a command may take from the stop on: a QMP command has 10, an undo 5, what waits for
#: the guest `--timeout`.
CHANGE_SECONDS = 20.0
#: An answer has 10 s, and then to bring back a guest that was paused to be saved has 60.
MOVE_SECONDS = 80.0
#: libvirt has 10 s for a query and 60 s for a change, and then a second to close.
LIBVIRT_SECONDS = 65.0
CLEAR = re.compile(
    r"did not answer|did not greet|did not set up|within|not known|closed|does not end|no guest"
    r" agent"
)


class Point(NamedTuple):
    """A command, and at which part of its effects; `whom`: the QEMU of that guest, or the last
    child.
    """

    words: str
    part: float
    whom: str = ""


longest: dict[str, float] = {}
#: How many were stopped.
acted: Counter[str] = Counter()


def note(kind: str, point: Point, met: Met, most: float) -> None:
    seconds = met.seconds or 0.0
    longest[kind] = max(longest.get(kind, 0.0), seconds)
    if soaking.is_long_run():
        told = met.run.json if met.run.stdout else {}
        message = (told.get("error") or {}).get("message")
        print(
            f"{kind}: {point} ({met.log.effects[-1:]}): {seconds:.1f} s, {met.run.code}: {message}",
            flush=True,
        )
    acted[kind] += met.log.acted is not None
    assert seconds < most, (seconds, point, met)
    assert met.run.code in CODES, met
    if met.run.code not in (0, 5):
        assert met.run.json["error"]["message"], met


@contextmanager
def going_on(*pids: int) -> Iterator[None]:
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def effect(point: Point, effects: int) -> int:
    return 1 + int(point.part * effects)


# -- a change of a guest ---------------------------------------------------------------------------


async def stop_change(guest: Plugged, point: Point) -> None:
    await guest.reset()
    given = point.words + (
        "" if point.words.startswith(("vcpupin", "guestvcpus")) else " --timeout 2"
    )
    whole = await guest.house.meet(given)
    at = effect(point, len(whole.log.effects))
    await guest.reset()
    with going_on(guest.qemu.pid):
        met = await guest.house.meet(
            given, at=at, number=signal.SIGSTOP, pid=guest.qemu.pid, patience=PATIENCE
        )
    note("change", point, met, CHANGE_SECONDS)
    # What is sent from then on nobody answers; but an agent may have said that it is done.
    if met.log.acted is not None and at <= met.log.last_message and "{agent}" not in point.words:
        assert met.run.code != 0, (at, met)
    await guest.says_what_is(may_pend=True)


async def test_a_qemu_that_is_stopped_holds_no_change_up():
    random = Random(soaking.seed(29))
    points = [Point(random.choice(TALKING), random.random()) for _ in range(soaking.count(1))]
    await meet_all(points, plugged, stop_change, lanes=LANES)
    print(longest, acted)


# -- a start, an end, a move of a guest ------------------------------------------------------------


async def stop_move(guest: Started, point: Point) -> None:
    before, _ = MOVES[point.words]
    await guest.begin(before)
    at = effect(
        point, len((await moved(point.words)).log.effects) if soaking.is_long_run() else 100
    )
    whom: dict[str, Any] = (
        {"child": True}
        if point.whom == "child"
        else {"pidfile": str(guest.house.runtime(point.whom) / "pid")}
    )
    met = await guest.house.meet(
        point.words, at=at, number=signal.SIGSTOP, patience=PATIENCE, **whom
    )
    with going_on(*guest.house.qemus()):
        pass
    note("move", point, met, MOVE_SECONDS)
    await guest.says_what_is()
    if point.words.startswith(("save", "migrate")):
        assert await guest.has_one() is not None, met
    await guest.nothing_left()


async def test_a_qemu_that_is_stopped_holds_no_move_up():
    random = Random(soaking.seed(30))
    points = []
    # What is stopped is not always there by then.
    for _ in range(soaking.count(1)):
        words = random.choice(sorted(MOVES))
        whom = random.choice(["one", "two", "two"] if "two" in words else ["one", "one", "child"])
        points.append(Point(words, random.random(), whom))
    await meet_all(points, started, stop_move, lanes=LANES, keeps=False)
    print(longest, acted)


# -- libvirtd --------------------------------------------------------------------------------------

LIBVIRTS = (
    "setvcpu web1 9,10 --enable",
    "setvcpu web1 9,10 --enable --live --config",
    "setvcpu web1 6,7 --disable",
    "setvcpu web1 6,7 --disable --live --config",
    "setvcpus web1 10 --live --config",
    "setvcpus web1 6 --live --config",
    "vcpupin web1 1 0 --live --config",
    "vcpuinfo web1",
    "list",
)


@dataclass
class Under:
    """A guest of a libvirtd."""

    house: House
    daemon: Libvirtd

    async def sides(self) -> tuple[str, str]:
        """The XML of the guest that runs, and its definition, by a new connection: an older one may
        be lost.
        """
        return await asyncio.to_thread(_sides, self.daemon.uri)

    async def reset(self) -> None:
        last: Any = None

        async def is_done() -> bool:
            nonlocal last
            if last is not None and last.code == 5:
                # Whether libvirt has passed an unplug on before it was stopped nobody can tell: it
                # is asked again.
                await self.house.cli(
                    "-c", self.daemon.uri, "setvcpu", "web1", "6,7", "--disable", "--live"
                )
            last = await self.house.cli(
                "-c", self.daemon.uri, "setvcpus", "web1", "8", "--live", "--config"
            )
            return last.code == 0

        try:
            await until(is_done, "its vCPUs are as they were")
        except AssertionError as error:
            raise AssertionError(f"{error}: {last}") from None

    async def says_what_is(self) -> None:
        told: Any = None

        async def same() -> bool:
            nonlocal told
            before = await self.sides()
            told = [
                await self.house.cli("--json", "-c", self.daemon.uri, "vcpuinfo", "web1", word)
                for word in ("--live", "--config")
            ]
            if before != await self.sides() or any(run.code for run in told):
                return False
            for run, text in zip(told, before, strict=True):
                enabled = {row["id"] for row in run.json["vcpus"] if row["state"] == "enabled"}
                assert enabled == set(xml.read(text.encode()).enabled_ids), (run, text)
            return True

        await until(same, "libvirt and we say the same")


def _start(uri: str, text: str) -> None:
    import libvirt

    connection = libvirt.open(uri)
    try:
        connection.defineXML(text).create()
    finally:
        connection.close()


def _sides(uri: str) -> tuple[str, str]:
    import libvirt

    connection = libvirt.open(uri)
    try:
        domain = connection.lookupByName("web1")
        return domain.XMLDesc(0), domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    finally:
        connection.close()


@asynccontextmanager
async def under_libvirt() -> AsyncIterator[Under]:
    kind = "kvm" if why_no_kvm() is None else "qemu"
    async with house() as made, daemon_of_our_own() as daemon:
        # libvirt's QEMU may run as another user.
        image = Path(firmware(daemon.folder))
        image.chmod(0o644)
        await asyncio.to_thread(_start, daemon.uri, numa(kind, str(image), EJECTING))
        yield Under(made, daemon)


async def stop_libvirtd(one: Under, point: Point) -> None:
    await one.reset()
    given = f"-c {one.daemon.uri} {point.words}"
    whole = await one.house.meet(given)
    await one.reset()
    at = effect(point, len(whole.log.effects))
    with going_on(one.daemon.pid):
        met = await one.house.meet(
            given, at=at, number=signal.SIGSTOP, pid=one.daemon.pid, patience=PATIENCE
        )
    note("libvirtd", point, met, LIBVIRT_SECONDS)
    await one.says_what_is()


async def test_a_libvirtd_that_is_stopped_holds_nobody_up():
    random = Random(soaking.seed(31))
    wanted = soaking.count(1)
    points = [Point(random.choice(LIBVIRTS), random.random()) for _ in range(wanted)]
    if not soaking.is_long_run():
        points = [Point("vcpuinfo web1", 0.5)]
    await meet_all(points, under_libvirt, stop_libvirtd, lanes=4)
    print(longest, acted)
