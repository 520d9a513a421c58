"""kill -9 of a command, or of its QEMU, at each effect and at any time: the next command says what
is true.

`scripts/soak kills` takes every effect of every command, and hundreds of moments.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import Any, NamedTuple

import pytest

from tests.support import soaking
from tests.support.houses import CODES, MOVES, Met, Started, moved, started
from tests.support.lanes import meet_all
from tests.support.plugged import CHANGES, NAME, TALKING, Picture, Plugged, plugged

pytestmark = pytest.mark.qemu

#: Commands of each kind that are killed in the suite, at one effect each.
CHANGES_KILLED, MOVES_KILLED = 4, 1
#: From this count on a long run takes each effect.
ALL = 1000
#: How an error says that QEMU is not there any more.
LOST = re.compile(
    r"closed|exited|ended|gone|killed|nobody listens|does not run|not running|no socket|not start"
)


class Point(NamedTuple):
    """A command, and when something happens: `at` an effect, or `after` a part of the time that it
    takes.
    """

    words: str
    at: int | None = None
    after: float | None = None


class Whole(NamedTuple):
    """A command to which nothing happens."""

    effects: tuple[str, ...]
    seconds: float
    after: Any = None


_known: dict[tuple[Plugged, str], Whole] = {}
counted: Counter[str] = Counter()


def when(point: Point, whole: Whole) -> dict[str, Any]:
    """For `House.meet`."""
    if point.after is not None:
        return {"after": max(0.001, point.after * whole.seconds)}
    return {"at": point.at}


def everything(words: str, whole: Whole) -> Iterator[Point]:
    """Each effect; if fewer than `ALL` are wanted, so many in a thousand of them."""
    share, random = soaking.count(ALL) / ALL, Random(soaking.seed(24))
    for number in range(1, len(whole.effects) + 1):
        if random.random() < share:
            yield Point(words, at=number)


# -- commands on a guest that runs -----------------------------------------------------------------


async def whole_change(guest: Plugged, words: str) -> Whole:
    if (guest, words) not in _known:
        await guest.reset()
        met = await guest.house.meet(words)
        assert met.run.code == 0, met
        _known[guest, words] = Whole(met.log.effects, met.seconds or 0.0, await guest.picture())
    return _known[guest, words]


def check_definitions(met: Met, now: Picture, before: Picture, after: Picture) -> None:
    for one, old, new in zip(now.definitions, before.definitions, after.definitions, strict=True):
        assert one[1] in (old[1], new[1]), (met, one)


async def kill_change(guest: Plugged, point: Point) -> None:
    whole = await whole_change(guest, point.words)
    after: Picture = whole.after
    await guest.reset()
    before = await guest.picture()
    met = await guest.house.meet(point.words, **when(point, whole))
    assert met.was_killed or met.run.code in CODES, met
    counted[point.words] += met.was_killed
    now = await guest.picture()
    check_definitions(met, now, before, after)
    assert not guest.house.held_locks(), met
    if now.definitions[0][1] is not None and now.definitions[0][2] == before.definitions[0][2]:
        # Its sockets are still those of the guest. Between the record of an unplug and its
        # `device_del` nobody can tell whether QEMU was asked.
        await guest.says_what_is(may_pend="send device_del: done" not in met.log.effects)
    again = await guest.house.meet(point.words)
    # What is undefined already is refused.
    assert again.run.code in ({0, 3} if met.words[0] == "undefine" else {0}), (met, again)
    if now.definitions[0][2] == before.definitions[0][2] == after.definitions[0][2]:
        await guest.says_what_is(all_of_it=False)
    if met.words[0] == "setvcpus" and "--live" in met.words:
        # A count names no vCPU: what was plugged and not placed is placed when it is named.
        ids = ",".join(str(number) for number in sorted(after.plugged - {0}))
        assert (
            not ids
            or (await guest.house.meet(f"setvcpu {NAME} {ids} --enable --live")).run.code == 0
        ), met
    now = await guest.picture()
    assert (now.plugged, now.online, now.pins) == (after.plugged, after.online, after.pins), (
        met,
        again,
    )
    assert [one[:2] for one in now.definitions] == [one[:2] for one in after.definitions], (
        met,
        again,
    )
    assert [one[2] is None for one in now.definitions] == [
        one[2] is None for one in after.definitions
    ], (
        met,
        again,
    )
    assert not guest.house.staged(), (met, again, guest.house.staged())
    await guest.house.nobodys()


async def kill_change_everywhere(guest: Plugged, words: str) -> None:
    whole = await whole_change(guest, words)
    for point in everything(words, whole):
        await kill_change(guest, point)
    print(f"{words}: {len(whole.effects)} effects, {counted[words]} kills", flush=True)


async def test_a_change_is_killed_at_any_of_its_effects():
    random = Random(soaking.seed(25))
    if soaking.is_long_run():
        await meet_all(CHANGES, plugged, kill_change_everywhere)
        return
    chosen = random.sample(CHANGES, CHANGES_KILLED)
    await meet_all(
        [Point(words, at=random.randint(1, 24)) for words in chosen], plugged, kill_change
    )


# -- commands that start, end and move a QEMU ------------------------------------------------------


async def whole_move(words: str) -> Whole:
    met = await moved(words)
    return Whole(met.log.effects, met.seconds or 0.0)


def keeps_its_guest(words: str) -> bool:
    """Whether there is a guest before it and after it, so that none may be lost."""
    return words.startswith(("save", "migrate"))


async def check_end(guest: Started, met: Met) -> None:
    """Every guest can be ended and used again, and nothing is left: the next writer sweeps the
    folder.
    """
    await guest.nothing_left()
    await guest.define()
    if guest.file.exists():
        await guest.house.json("restore", str(guest.file))
        assert await guest.has_one() == "one", met
    else:
        await guest.house.json("start", "one")
    await guest.house.json("migrate-begin", "one")
    await guest.nothing_left()
    assert not guest.house.staged(), (met, guest.house.staged())


async def kill_move(guest: Started, point: Point) -> None:
    before, end = MOVES[point.words]
    # In the suite the count of its effects is not worth a run.
    whole = await whole_move(point.words) if point.after is not None else Whole((), 0.0)
    await guest.begin(before)
    met = await guest.house.meet(point.words, **when(point, whole))
    assert met.was_killed or met.run.code in CODES, met
    counted[point.words] += met.was_killed
    assert not guest.house.held_locks(), met
    await guest.says_what_is()
    if keeps_its_guest(point.words):
        assert await guest.has_one() is not None, met
    again = await guest.house.meet(point.words)
    assert again.run.code in CODES, (met, again)
    await guest.house.nobodys()
    if keeps_its_guest(point.words):
        assert await guest.has_one() is not None, (met, again)
    if again.run.code == 0 and end is not None:
        assert await guest.has_one() == end, (met, again)
    await check_end(guest, met)


async def kill_move_everywhere(words: str) -> None:
    whole = await whole_move(words)
    try:
        await meet_all(everything(words, whole), started, kill_move, keeps=False)
    finally:
        print(f"{words}: {len(whole.effects)} effects, {counted[words]} kills", flush=True)


async def test_a_move_is_killed_at_any_of_its_effects():
    random = Random(soaking.seed(26))
    if soaking.is_long_run():
        wrong = []
        for words in MOVES:
            try:
                await kill_move_everywhere(words)
            except AssertionError as error:
                wrong.append(str(error))
        assert not wrong, "\n".join(wrong)
        return
    chosen = random.sample(sorted(MOVES), MOVES_KILLED)
    points = [Point(words, at=random.randint(1, 60)) for words in chosen]
    await meet_all(points, started, kill_move, keeps=False)


# -- at any time -----------------------------------------------------------------------------------


def moments(commands: list[str], wanted: int, random: Random) -> list[Point]:
    return [Point(random.choice(commands), after=random.uniform(0, 1.05)) for _ in range(wanted)]


async def test_killed_at_any_time():
    random = Random(soaking.seed(27))
    wanted = soaking.count(5) // 5
    await meet_all(moments(list(CHANGES), -(-wanted // 2), random), plugged, kill_change)
    await meet_all(moments(list(MOVES), wanted // 2, random), started, kill_move, keeps=False)


# -- QEMU is killed --------------------------------------------------------------------------------


async def lose_qemu(guest: Plugged, point: Point) -> None:
    whole = await whole_change(guest, point.words)
    await guest.reset()
    before = await guest.picture()
    met = await guest.house.meet(point.words, **when(point, whole), pid=guest.qemu.pid)
    check_lost(met, point)
    for one, old, new in zip(
        guest.definitions(), before.definitions, whole.after.definitions, strict=True
    ):
        # Of a guest that does not run, it is the definition that is changed where neither was
        # named.
        is_other = met.run.json.get("defined") and one[1] not in (old[1], new[1])
        assert is_other or one[1] in (old[1], new[1]), (met, one)
        assert one[1] is None or guest.house.enabled_in_the_definition(one[0])
    if met.log.acted is not None:
        rows = await guest.house.rows()
        assert rows[NAME]["active"] is False, (met, rows)
        told = await guest.house.json("vcpuinfo", NAME)
        assert told["active"] is False, told
    await guest.house.json("vcpupin", NAME, "0", "0", "--config")
    assert not guest.house.staged(), (met, guest.house.staged())
    await guest.house.nobodys()


def check_lost(met: Met, point: Point) -> None:
    """It ended with a code that has a meaning, and does not claim what nobody can have seen."""
    assert met.run.code in CODES, met
    if met.log.acted is None:
        return
    counted[f"QEMU: {point.words}"] += 1
    # What is sent from then on nobody answers; but an agent may have said that it is done.
    if point.at is not None and point.at <= met.log.last_message and "{agent}" not in point.words:
        assert met.run.code != 0, met
    if met.run.code:
        told = met.run.json
        assert told["outcome"] != "applied", met
        assert LOST.search(str((told["error"] or {}).get("message"))), met


async def lose_started(guest: Started, point: Point, name: str) -> None:
    before, _ = MOVES[point.words]
    whole = await whole_move(point.words) if point.after is not None else Whole((), 0.0)
    await guest.begin(before)
    pidfile = str(guest.house.runtime(name) / "pid")
    met = await guest.house.meet(point.words, **when(point, whole), pidfile=pidfile)
    assert met.run.code in CODES, met
    counted[f"QEMU: {point.words}"] += met.log.acted is not None
    assert not guest.house.held_locks(), met
    rows = await guest.says_what_is()
    if met.log.acted is not None and not point.words.startswith("restore"):
        assert name not in rows or rows[name]["pid"] is None, (met, rows)
    if point.words.startswith("migrate") and name == "two" and met.run.code:
        # It has lost nothing: the source has the guest, or lets it go on.
        assert await guest.has_one() is not None or met.log.acted is None, met
    await check_end(guest, met)


async def test_qemu_is_killed_while_a_command_runs():
    random = Random(soaking.seed(28))
    wanted = soaking.count(10) * 3 // 10

    def points(commands: tuple[str, ...], count: int, most: int) -> list[Point]:
        at_effects = [
            Point(random.choice(commands), at=random.randint(1, most))
            for _ in range(-(-count // 2))
        ]
        return at_effects + moments(list(commands), count // 2, random)

    await meet_all(points(TALKING, -(-wanted // 2), 24), plugged, lose_qemu)
    for name, count in (("one", wanted // 3), ("two", wanted // 6)):
        commands = tuple(words for words in MOVES if name == "one" or "two" in words)
        await meet_all(
            points(commands, count, 100), started, partial(lose_started, name=name), keeps=False
        )
    print(dict(counted), flush=True)


@pytest.mark.parametrize(
    ("words", "before"),
    [
        ("vcpupin web1 1 0 --live --config", r"open .*\.new-"),
        ("setvcpu web1 3 --enable", "send device_add"),
    ],
    ids=["a pin", "a plug with a place"],
)
async def test_qemu_is_killed_between_its_last_answer_and(words, before):
    async with plugged() as guest:
        whole = await whole_change(guest, words)
        at = next(n for n, what in enumerate(whole.effects, 1) if re.match(before, what))
        await guest.reset()
        met = await guest.house.meet(words, at=at, pid=guest.qemu.pid)
        assert (met.run.code, met.run.json["outcome"]) == (7, "connection"), met
        assert LOST.search(met.run.json["error"]["message"]), met
