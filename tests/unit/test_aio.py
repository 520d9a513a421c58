"""`aio`: work is finished however often, and whenever, its caller is cancelled; then CancelledError
goes on.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from contextlib import suppress

import pytest

from qmpvcpu.aio import finish, wind_up

#: Seconds; nothing here takes so long unless it hangs.
GENEROUS = 20.0


class Work:
    """Awaits some turns of the loop, and then `gate`; notes how far it has come."""

    def __init__(self, turns=0, *, fails=None, value="made"):
        self.turns, self.fails, self.value = turns, fails, value
        self.begun, self.gate = asyncio.Event(), asyncio.Event()
        self.is_cancelled = self.is_done = False

    async def run(self):
        self.begun.set()
        try:
            for _ in range(self.turns):
                await asyncio.sleep(0)
            await self.gate.wait()
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        if self.fails is not None:
            raise self.fails
        self.is_done = True
        return self.value


@pytest.fixture(autouse=True)
async def complaints():
    """What the event loop has to say of forgotten tasks and errors: nothing."""
    loop, found = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: found.append(context))
    yield found
    await asyncio.sleep(0)
    gc.collect()
    loop.set_exception_handler(None)
    assert found == []


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


async def cancelled(task):
    async with asyncio.timeout(GENEROUS):
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
    return caught.value


async def test_uncancelled_it_returns_what_the_work_returns():
    work = Work()
    work.gate.set()
    assert await finish(work.run()) == "made"


async def test_uncancelled_it_raises_what_the_work_raises():
    work = Work(fails=OSError(28, "full"))
    work.gate.set()
    with pytest.raises(OSError, match="full"):
        await finish(work.run(), within=GENEROUS)


async def test_uncancelled_nothing_is_discarded():
    work, discarded = Work(), []
    work.gate.set()
    await finish(work.run(), discard=discarded.append)
    assert discarded == []


async def test_a_task_is_finished_as_a_coroutine_is():
    work = Work()
    inner = asyncio.create_task(work.run())
    task = asyncio.create_task(finish(inner))
    await work.begun.wait()
    task.cancel()
    work.gate.set()
    await cancelled(task)
    assert inner.result() == "made"


async def test_work_that_somebody_else_cancels_is_cancelled():
    inner = asyncio.create_task(Work().run())
    task = asyncio.create_task(finish(inner))
    await turns(2)
    inner.cancel()
    await cancelled(task)


@pytest.mark.parametrize("cancels", [1, 2, 10])
@pytest.mark.parametrize("step", range(8))
async def test_cancelled_at_each_await_the_work_is_finished_first(step, cancels):
    work = Work(4)
    task = asyncio.create_task(finish(work.run()))
    # Before its first step a task has begun nothing.
    await turns(step + 1)
    for _ in range(cancels):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    work.gate.set()
    await cancelled(task)
    assert (work.is_done, work.is_cancelled) == (True, False)


async def test_ten_cancels_at_once_are_one():
    work = Work()
    task = asyncio.create_task(finish(work.run()))
    await work.begun.wait()
    for _ in range(10):
        task.cancel()
    work.gate.set()
    await cancelled(task)
    assert work.is_done


async def test_cancelled_before_the_first_step_of_the_work_that_is_finished():
    work = Work(2)
    work.gate.set()

    async def caller():
        asyncio.current_task().cancel()
        await finish(work.run())

    await cancelled(asyncio.create_task(caller()))
    assert work.is_done


async def test_cancelled_when_the_work_has_just_ended_its_value_is_discarded():
    future, discarded = asyncio.get_running_loop().create_future(), []
    task = asyncio.create_task(finish(future, discard=discarded.append))
    await turns(1)
    future.set_result("made")
    task.cancel()
    await cancelled(task)
    assert discarded == ["made"]


async def test_a_value_that_nobody_gets_is_discarded_once():
    work, discarded = Work(), []
    task = asyncio.create_task(finish(work.run(), discard=discarded.append))
    await work.begun.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert discarded == []
    work.gate.set()
    await cancelled(task)
    assert discarded == ["made"]


async def test_what_a_thread_makes_is_discarded_too():
    gate, discarded = threading.Event(), []
    task = asyncio.create_task(finish(asyncio.to_thread(gate.wait), discard=discarded.append))
    await turns(3)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    gate.set()
    await cancelled(task)
    assert discarded == [True]


async def test_cancelled_and_failed_it_is_a_cancel_with_that_failure_as_its_cause():
    failure = OSError(28, "full")
    work, discarded = Work(fails=failure), []
    task = asyncio.create_task(finish(work.run(), discard=discarded.append))
    await work.begun.wait()
    task.cancel()
    work.gate.set()
    assert (await cancelled(task)).__cause__ is failure
    assert discarded == []


async def test_a_first_cancel_is_told_at_once_and_only_once():
    work, told = Work(), []
    task = asyncio.create_task(finish(work.run(), on_cancel=lambda: told.append(work.is_done)))
    await work.begun.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert told == [False]
    work.gate.set()
    await cancelled(task)
    assert told == [False]


async def test_until_it_is_cancelled_no_deadline_runs():
    work = Work(20)
    work.gate.set()
    assert await finish(work.run(), within=0) == "made"


async def test_work_that_ends_within_its_seconds_is_finished():
    work = Work()
    task = asyncio.create_task(finish(work.run(), within=GENEROUS))
    await work.begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    work.gate.set()
    await cancelled(task)
    assert work.is_done


async def test_work_that_takes_longer_is_cancelled():
    work = Work()
    task = asyncio.create_task(finish(work.run(), within=0.01))
    await work.begun.wait()
    task.cancel()
    await cancelled(task)
    await turns(2)
    assert work.is_cancelled


async def test_of_work_with_a_deadline_a_second_cancel_is_the_end():
    work = Work()
    task = asyncio.create_task(finish(work.run(), within=GENEROUS))
    await work.begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    await cancelled(task)
    await turns(2)
    assert work.is_cancelled


async def test_work_that_is_left_and_ends_all_the_same_is_discarded():
    gate, discarded = asyncio.Event(), []

    async def stubborn():
        while not gate.is_set():
            with suppress(asyncio.CancelledError):
                await gate.wait()
        return "made"

    task = asyncio.create_task(finish(stubborn(), within=0, discard=discarded.append))
    await turns(2)
    task.cancel()
    await cancelled(task)
    gc.collect()
    assert discarded == []
    gate.set()
    await turns(3)
    assert discarded == ["made"]


async def test_work_that_is_left_and_fails_is_not_complained_about():
    gate = asyncio.Event()

    async def stubborn():
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        gate.set()
        raise OSError(28, "full")

    task = asyncio.create_task(finish(stubborn(), within=0))
    await turns(2)
    task.cancel()
    await cancelled(task)
    await gate.wait()


# -- within asyncio's own --------------------------------------------------------------------------


async def test_a_timeout_around_it_is_a_timeout_once_the_work_is_done():
    work = Work()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await finish(work.run(), on_cancel=work.gate.set)
    assert work.is_done
    assert asyncio.current_task().cancelling() == 0


async def test_a_cancel_and_a_timeout_are_a_cancel():
    work = Work()

    async def caller():
        async with asyncio.timeout(0.001):
            await finish(work.run())

    task = asyncio.create_task(caller())
    await work.begun.wait()
    task.cancel()
    async with asyncio.timeout(GENEROUS):
        while task.cancelling() < 2:
            await asyncio.sleep(0)
    work.gate.set()
    await cancelled(task)
    assert work.is_done


# not so before Python 3.11.3
async def test_a_timeout_in_the_work_is_one_though_the_caller_is_cancelled():
    ended = []

    async def work():
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            ended.append("timeout")

    task = asyncio.create_task(finish(work()))
    await turns(2)
    task.cancel()
    await cancelled(task)
    assert ended == ["timeout"]


async def test_in_a_task_group_a_failure_beside_it_is_the_groups():
    work = Work()

    async def fails():
        await work.begun.wait()
        asyncio.get_running_loop().call_soon(work.gate.set)
        raise ValueError("the other one")

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(finish(work.run()))
            group.create_task(fails())
    assert [str(error) for error in caught.value.exceptions] == ["the other one"]
    assert work.is_done


async def test_in_the_body_of_a_task_group_too():
    work = Work()

    async def fails():
        await work.begun.wait()
        asyncio.get_running_loop().call_soon(work.gate.set)
        raise ValueError("the other one")

    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(fails())
            await finish(work.run())
    assert work.is_done
    assert asyncio.current_task().cancelling() == 0


# -- winding up ------------------------------------------------------------------------------------


async def wound_up(work, *, begun=None):
    """A caller that is cancelled, and winds up."""
    try:
        if begun is not None:
            begun.set()
        await asyncio.Event().wait()
    except asyncio.CancelledError as error:
        raise error from await wind_up(work)


async def winding_up(work):
    begun = asyncio.Event()
    task = asyncio.create_task(wound_up(work, begun=begun))
    await begun.wait()
    task.cancel()
    return task


async def test_what_is_still_to_be_done_after_a_cancel_is_done():
    work = Work()
    work.gate.set()
    error = await cancelled(await winding_up(work.run()))
    assert (work.is_done, error.__cause__) == (True, None)


async def test_its_failure_is_the_cause_of_the_cancel():
    work = Work(fails=OSError(28, "full"))
    work.gate.set()
    assert (await cancelled(await winding_up(work.run()))).__cause__ is work.fails


@pytest.mark.parametrize("step", range(6))
async def test_a_second_cancel_is_passed_on(step):
    work = Work(3)
    task = await winding_up(work.run())
    await turns(step + 1)
    task.cancel()
    error = await cancelled(task)
    assert not work.is_done
    assert isinstance(error.__cause__, asyncio.CancelledError)


async def test_what_the_second_cancel_has_to_clean_up_is_waited_for():
    gate, cleaned = asyncio.Event(), []

    async def careful():
        try:
            await asyncio.Event().wait()
        finally:
            await gate.wait()
            cleaned.append(True)

    task = await winding_up(careful())
    await turns(3)
    task.cancel()
    await turns(3)
    assert not task.done()
    gate.set()
    await cancelled(task)
    assert cleaned == [True]


# not so before Python 3.11.3, in the caller's task
async def test_a_timeout_works_while_winding_up():
    async def work():
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()

    assert isinstance((await cancelled(await winding_up(work()))).__cause__, TimeoutError)


async def test_a_second_cancel_when_it_has_just_failed_is_not_complained_about():
    failing = asyncio.get_running_loop().create_future()

    async def work():
        await failing

    task = await winding_up(work())
    await turns(3)
    failing.set_exception(OSError(28, "full"))
    await turns(1)
    task.cancel()
    assert isinstance((await cancelled(task)).__cause__, OSError)
