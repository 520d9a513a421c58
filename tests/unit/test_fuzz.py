"""Seeded messages of `scripts/soak fuzz`; what a long run finds becomes a case or a plain test."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from scripts.soaking.targets import TARGETS, feed


@pytest.mark.parametrize("name", TARGETS)
def test_generated_messages_end_in_a_result_or_a_clear_error(name):
    @settings(
        max_examples=1250,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(TARGETS[name][0])
    def fuzz(message):
        feed(name, message)

    fuzz()
