"""A command of the command line in a hurry, and with its memory told. Both are asked for by the
environment.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: How long connecting, each QMP command and each look at the guest may take, seconds.
STEP = "QMPVCPU_TEST_STEP"
#: The file to which the most memory that the command had is written, MiB.
PEAK = "QMPVCPU_TEST_PEAK"


def peak() -> float:
    """Most memory that this process has had, MiB."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1024


@contextmanager
def measured() -> Iterator[None]:
    """Around a command, in its own process."""
    if step := os.environ.get(STEP):
        hasten(float(step))
    try:
        yield
    finally:
        if file := os.environ.get(PEAK):
            Path(file).write_text(str(peak()))


def hasten(seconds: float) -> None:
    """Deadlines are no options of the command line."""
    import qmpvcpu.domain.agent
    import qmpvcpu.qemu.agent
    import qmpvcpu.qemu.monitor as monitor

    real = monitor.connect_monitor

    @functools.wraps(real)
    async def connect_monitor(address: str, **options: object) -> object:
        deadlines = {"connect_timeout": seconds, "command_timeout": seconds}
        return await real(address, **(options | deadlines))  # type: ignore[arg-type]

    monitor.connect_monitor = connect_monitor  # type: ignore[assignment]
    qmpvcpu.qemu.agent.AgentClient.__init__.__defaults__ = (seconds,)  # type: ignore[misc]
    qmpvcpu.domain.agent._LOOK_SECONDS = seconds  # type: ignore[misc]
    qmpvcpu.domain.agent._SWITCH_SECONDS = seconds  # type: ignore[misc]
