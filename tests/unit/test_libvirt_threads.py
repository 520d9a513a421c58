"""The threads that make libvirt's calls: order, what is taken back, what hangs, and their end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from qmpvcpu.libvirt.threads import Worker
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
async def worker():
    worker = Worker("of a test")
    yield worker
    await within(worker.finish(ended), "its thread has ended")


def ended():
    return ConnectionError("ended")


async def test_calls_in_their_order_and_each_ones_own_answer(worker):
    seen = []
    results = [worker.call(lambda n=n: seen.append(n) or n) for n in range(20)]

    def bad():
        raise KeyError("x")

    failing = worker.call(bad)
    assert [await result for result in results] == list(range(20)) == seen
    with pytest.raises(KeyError):
        await failing


async def test_whoever_takes_a_call_back_knows_whether_it_had_begun(worker):
    held, seen = Held(), []
    first, second = worker.call(held), worker.call(lambda: seen.append("called"))
    await asyncio.to_thread(held.begun.wait, DEADLINE)
    # The loop has not heard yet that the first has begun.
    assert (worker.drop(first), worker.drop(second), worker.drop(second)) == (False, True, False)
    held.let_go.set()
    assert (
        await first == "held" and second.cancelled() and await worker.call(lambda: "next") == "next" and not seen
    )


async def test_what_waits_behind_a_call_that_is_given_up_fails_and_what_comes_after_its_end_does_not(worker):
    held, seen = Held(), []
    first, second = worker.call(held), worker.call(lambda: seen.append("called"))
    await asyncio.to_thread(held.begun.wait, DEADLINE)
    # One that only waits is nobody else's trouble.
    third = worker.call(lambda: "third")
    worker.give_up(second, lambda: TimeoutError("not this"))
    second.cancel()
    worker.give_up(second, lambda: TimeoutError("not this"))
    assert not third.done()
    second = third
    worker.give_up(first, lambda: TimeoutError("stuck"))
    for waiting in (second, worker.call(lambda: seen.append("called"))):
        with pytest.raises(TimeoutError, match="stuck"):
            await within(waiting, "it fails")
    held.let_go.set()
    assert await first == "held"
    # Nobody who has its answer finds it stuck.
    assert await worker.call(lambda: "again") == "again" and not seen


async def test_at_the_end_what_waits_is_not_done_and_the_last_is(worker):
    other, held, seen = Worker("another"), Held(), []
    first, second = other.call(held), other.call(lambda: seen.append("called"))
    await asyncio.to_thread(held.begun.wait, DEADLINE)
    last = other.finish(ended, lambda: seen.append("last"))
    held.let_go.set()
    await within(last, "its last call")
    assert await first == "held" and seen == ["last"]
    for result in (second, other.call(lambda: seen.append("late"))):
        with pytest.raises(ConnectionError, match="ended"):
            await result
    await until(
        lambda: not [one for one in threading.enumerate() if "another" in one.name], "its thread has ended"
    )
