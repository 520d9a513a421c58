"""What QEMU reports about a migration: `query-migrate`, and the end of its log. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from qmpvcpu.core.state.inventory import count_of

#: QAPI MigrationStatus: those of a migration that has ended, and of none under way.
_ENDED: Final = frozenset({"completed", "failed", "cancelled"})
_IDLE: Final = frozenset({*_ENDED, "none", ""})
#: Seconds without progress after which a migration counts as stuck: while the sides connect, and
#: later.
_SETUP_SECONDS: Final = 10.0
_STUCK_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class MigrationStatus:
    """`query-migrate`. Bytes, and milliseconds for `downtime` and `total_time`; None what QEMU does
    not report.
    """

    status: str = "none"
    transferred: int | None = None
    remaining: int | None = None
    total: int | None = None
    downtime: int | None = None
    total_time: int | None = None
    error: str | None = None
    blocked: tuple[str, ...] = ()
    addresses: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    @property
    def is_active(self) -> bool:
        """Whether a migration is under way."""
        return self.status not in _IDLE

    @property
    def under_way(self) -> str | None:
        """The status of a migration that has begun and not ended."""
        return self.status if self.is_active else None

    @property
    def is_incoming(self) -> bool:
        """Whether this side has received all of a guest: only a source counts bytes."""
        return self.status == "completed" and self.total is None

    @property
    def has_ended(self) -> bool:
        """Whether a migration has ended, with or without success."""
        return self.status in _ENDED

    @property
    def percent(self) -> int | None:
        """How much of the memory has been sent at least once, 0 to 100."""
        if not self.total or self.remaining is None:
            return None
        return max(0, min(100, 100 - 100 * self.remaining // self.total))


#: Called with each fresh status while memory moves.
Progress = Callable[[MigrationStatus], None]


class Stillness:
    """How long there has been no progress; `now` is in seconds of one clock."""

    def __init__(self, now: float) -> None:
        self._moved_at = now
        self._last: tuple[int | None, int | None] = None, None

    def too_long(self, status: MigrationStatus, now: float) -> str | None:
        """A text if there has been no progress for too long; None if not."""
        if (status.transferred, status.remaining) != self._last:
            self._last, self._moved_at = (status.transferred, status.remaining), now
        is_setup = status.status == "setup"
        patience = _SETUP_SECONDS if is_setup else _STUCK_SECONDS
        if now <= self._moved_at + patience:
            return None
        text = f"no progress for {patience:g} s ('{status.status}'): cancelled"
        # 10.0 under TCG: an RCU grace period never ends after an x86 vCPU was unplugged.
        return text + (
            " (QEMU 10.0 under TCG does that after the unplug of an x86 vCPU)" if is_setup else ""
        )


def parse_status(reply: object) -> MigrationStatus:
    """A reply to `query-migrate`; malformed values count as not reported."""
    if not isinstance(reply, dict):
        return MigrationStatus()
    memory = reply.get("ram")
    ram: Mapping[str, Any] = memory if isinstance(memory, dict) else {}
    addresses, blocked = reply.get("socket-address"), reply.get("blocked-reasons")
    return MigrationStatus(
        str(reply.get("status") or "none")[:40],
        count_of(ram.get("transferred")),
        count_of(ram.get("remaining")),
        count_of(ram.get("total")),
        count_of(reply.get("downtime", reply.get("expected-downtime"))),
        count_of(reply.get("total-time")),
        str(reply["error-desc"])[:1000] if "error-desc" in reply else None,
        tuple(str(why)[:1000] for why in blocked[:20]) if isinstance(blocked, list) else (),
        tuple(one for one in addresses[:20] if isinstance(one, dict))
        if isinstance(addresses, list)
        else (),
    )


def address_of(status: MigrationStatus, host: str | None) -> str | None:
    """The URI at which a destination listens, for the source; None if it does not listen.

    Args:
        host: the destination's name for the source, if it listens on every address.
    """
    for one in status.addresses:
        if one.get("type") == "unix" and isinstance(one.get("path"), str):
            return f"unix:{one['path']}"
        if one.get("type") == "inet":
            name, port = str(one.get("host", "")), str(one.get("port", ""))
            if name in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, never bound
                name = host or "127.0.0.1"
            return f"tcp:[{name}]:{port}" if ":" in name else f"tcp:{name}:{port}"
    return None


def last_words(log: str, most: int = 400) -> str:
    """The end of a QEMU's stderr or log, on one line and printable; "" if it is empty."""
    lines = [_TIME.sub("", line.strip()) for line in log.splitlines()]
    # Its message about a signal is no reason.
    lines = [line for line in lines if line and "terminating on signal" not in line]
    text = "; ".join(lines[-4:])
    return "".join(char if char.isprintable() else " " for char in text)[-most:]


#: How a line of QEMU's log (-msg timestamp=on) or trace begins, and its message about a signal.
_TIME: Final = re.compile(r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z ")
