"""What tests reach inside a domain for, because it has no public name."""

from __future__ import annotations

import asyncio
from typing import Any

from qmpvcpu import Interrupted
from qmpvcpu.cli.commands import counts
from qmpvcpu.cli.session import CommandSession


def set_agent_deadline(domain: Any, seconds: float) -> None:
    """How long the guest agent has for one answer; it is 5 seconds, and no option of `connect`."""
    domain._reached.guest._agent._timeout = seconds


def interrupt_vcpuinfo(monkeypatch: Any, left: Interrupted) -> None:
    """`vcpuinfo` is cancelled at once, and has left this."""

    async def interrupted(session: CommandSession) -> int:
        raise asyncio.CancelledError

    monkeypatch.setattr(counts, "vcpuinfo", counts.vcpuinfo._replace(run=interrupted))
    monkeypatch.setattr(CommandSession, "interrupted", lambda session: left)
