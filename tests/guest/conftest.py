"""The guests that tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.guests import Pool


@pytest.fixture(scope="session")
async def booted() -> AsyncIterator[Pool]:
    pool = Pool()
    yield pool
    for key in list(pool.booted):
        await pool.drop(key)


@pytest.fixture
async def pool(booted: Pool) -> AsyncIterator[Pool]:
    """Its guests run while a test has it: an idle Linux under TCG takes half a CPU."""
    yield booted
    await booted.rest()
