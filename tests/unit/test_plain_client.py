"""The monitor and the engine without our tricks for speed: a sample of `scripts/soak plain`.

The tests that this file imports run here once more, on a client that uses `qemu.qmp` as it is.
"""

import pytest

from tests.support.plain_client import PLAIN, plain_client
from tests.unit.test_hostile import (
    test_calls_on_a_hostile_server_end_well as calls_on_a_hostile_server,
)
from tests.unit.test_monitor_anything import *  # noqa: F403
from tests.unit.test_unplug import *  # noqa: F403


@pytest.fixture(autouse=True)
def on_the_plain_client(monkeypatch):
    monkeypatch.setenv(PLAIN, "1")
    with plain_client():
        yield


def test_calls_on_a_hostile_qemu_end_well():
    calls_on_a_hostile_server("qmp")
