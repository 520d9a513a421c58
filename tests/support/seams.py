"""What tests reach inside a domain for, because it has no public name."""

from __future__ import annotations

from typing import Any


def set_agent_deadline(domain: Any, seconds: float) -> None:
    """How long the guest agent has for one answer; it is 5 seconds, and no option of `connect`."""
    domain._reached.guest._agent._timeout = seconds
