"""The threads that make libvirt's calls: order, what is taken back, what hangs, and their end."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from tests.support.calls import Calls
from tests.support.waiting import DEADLINE, until, within


class Held:
    """A call that goes on until it is let go."""

    def __init__(self):
        self.begun = threading.Event()
        self.let_go = threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.let_go.wait(DEADLINE)
        return "held"


@pytest.fixture
async def calls():
    calls = Calls("of a test")
    yield calls
    await within(calls.end(ENDED), "its thread has ended")


ENDED = ConnectionError("ended")
STUCK = TimeoutError("stuck")


@asynccontextmanager
async def held(calls):
    """The call that is being made, until the end of the body or `let_go`."""
    body = Held()
    call = calls.make(body)
    await asyncio.to_thread(body.begun.wait, DEADLINE)
    try:
        yield call, body.let_go
    finally:
        body.let_go.set()


# -- in their order --------------------------------------------------------------------------------


async def test_calls_are_made_in_their_order(calls):
    seen = []
    await asyncio.gather(*[calls.make(lambda n=n: seen.append(n)) for n in range(20)])
    assert seen == list(range(20))


async def test_each_call_gets_its_own_answer(calls):
    results = [calls.make(lambda n=n: n) for n in range(20)]
    assert [await result for result in results] == list(range(20))


async def test_a_call_that_fails_raises(calls):
    def bad():
        raise KeyError("x")

    with pytest.raises(KeyError):
        await calls.make(bad)


# -- taken back ------------------------------------------------------------------------------------


async def test_whoever_takes_a_call_back_knows_whether_it_had_begun(calls):
    async with held(calls) as (first, _):
        second = calls.make(lambda: None)
        # The loop has not heard yet that the first has begun.
        assert [calls.take_back(call) for call in (first, second, second)] == [False, True, False]


async def test_a_call_that_had_begun_gives_its_answer(calls):
    async with held(calls) as (first, let_go):
        calls.take_back(first)
        let_go.set()
        assert await first == "held"


async def test_a_call_that_is_taken_back_is_not_made(calls):
    seen = []
    async with held(calls):
        calls.take_back(calls.make(lambda: seen.append("called")))
    await calls.make(lambda: None)
    assert seen == []


async def test_what_comes_after_a_call_that_was_taken_back_is_made(calls):
    async with held(calls):
        calls.take_back(calls.make(lambda: None))
        after = calls.make(lambda: "next")
    assert await after == "next"


# -- given up --------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
async def test_a_call_that_only_waits_is_nobody_elses_trouble(calls, times):
    async with held(calls):
        second, third = calls.make(lambda: None), calls.make(lambda: "third")
        for _ in range(times):
            calls.give_up(second, TimeoutError("not this"))
            second.cancel()
    assert await third == "third"


@asynccontextmanager
async def stuck(calls, seen):
    """A call that was given up and is still being made; one that waited behind it; one that came
    later.
    """
    async with held(calls) as (first, let_go):
        waiting = calls.make(lambda: seen.append("called"))
        calls.give_up(first, STUCK)
        yield first, waiting, calls.make(lambda: seen.append("called")), let_go


@pytest.mark.parametrize("which", [1, 2], ids=["before", "after"])
async def test_what_waits_behind_a_call_that_is_given_up_fails(calls, which):
    async with stuck(calls, []) as parts:
        with pytest.raises(TimeoutError, match="stuck"):
            await within(parts[which], "it fails")


async def test_a_call_that_was_given_up_gives_its_answer_when_it_comes_back(calls):
    async with stuck(calls, []) as (first, _, _, let_go):
        let_go.set()
        assert await first == "held"


async def test_what_comes_after_the_end_of_a_call_that_was_given_up_is_made(calls):
    async with stuck(calls, []) as (first, _, _, let_go):
        let_go.set()
        await first
        # Nobody who has its answer finds it stuck.
        assert await calls.make(lambda: "again") == "again"


async def test_what_has_failed_behind_a_call_that_was_given_up_is_not_made(calls):
    seen = []
    async with stuck(calls, seen) as (first, _, _, let_go):
        let_go.set()
        await first
        await calls.make(lambda: None)
    assert seen == []


# -- the end ---------------------------------------------------------------------------------------


@pytest.fixture
async def ended():
    """Ended while a call was being made; its answer, one that waited, one that came later, and what
    was called.
    """
    calls, seen = Calls("another"), []
    async with held(calls) as (first, let_go):
        waiting = calls.make(lambda: seen.append("called"))
        last = calls.end(ENDED, lambda: seen.append("last"))
        let_go.set()
        await within(last, "its last call")
    return calls, first, (waiting, calls.make(lambda: seen.append("late"))), seen


async def test_at_the_end_the_call_that_is_being_made_gives_its_answer(ended):
    _, first, _, _ = ended
    assert await first == "held"


async def test_at_the_end_what_waits_is_not_made_and_the_last_is(ended):
    *_, seen = ended
    assert seen == ["last"]


@pytest.mark.parametrize("which", [0, 1], ids=["waited", "late"])
async def test_at_the_end_everything_else_fails(ended, which):
    _, _, others, _ = ended
    with pytest.raises(ConnectionError, match="ended"):
        await others[which]


async def test_at_the_end_the_thread_ends(ended):
    calls, *_ = ended
    await until(lambda: not calls.has_thread, "its thread has ended")
