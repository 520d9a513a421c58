"""The guests that tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.guests import Pool


@pytest.fixture(scope="session")
async def pool() -> AsyncIterator[Pool]:
    pool = Pool()
    yield pool
    for key in list(pool.booted):
        await pool.drop(key)
