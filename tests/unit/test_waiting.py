"""What the tests wait with: a condition that comes is returned, one that does not come is named."""

import asyncio

import pytest

from tests.support.waiting import deadline, until, until_blocking, within


async def test_the_answer_that_was_waited_for_is_returned():
    answers = iter([None, [], "third"])
    assert await until(lambda: next(answers), "the third answer", every=0) == "third"


async def test_a_condition_may_be_a_coroutine_function():
    async def ready():
        return 7

    assert await until(ready, "ready") == 7


async def test_what_did_not_come_is_named_with_the_last_answer():
    with pytest.raises(AssertionError, match=r"not within 0 s: the guest is up; last seen: \[\]"):
        await until(list, "the guest is up", seconds=0)
    with pytest.raises(AssertionError, match="not within 0 s: the file is there; last seen: False"):
        until_blocking(lambda: False, "the file is there", seconds=0)
    with pytest.raises(AssertionError, match="not within 0 s: it ends"):
        await within(asyncio.Event().wait(), "it ends", seconds=0)


async def test_a_timeout_of_the_body_stays_a_timeout():
    with pytest.raises(TimeoutError, match="its own"):
        async with deadline("it ends"):
            raise TimeoutError("its own")
