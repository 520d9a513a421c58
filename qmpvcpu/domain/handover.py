"""What this host remembers of a migration that a guest takes part in: its cookie, and which side has the guest."""

from __future__ import annotations

import secrets
from contextlib import suppress

from qmpvcpu.core.migration import Cookie
from qmpvcpu.domain.link import Link
from qmpvcpu.errors import VcpuRefused
from qmpvcpu.host.handover import Handovers, Side

__all__ = ["Side", "forget", "is_there", "keep", "kept", "new_number", "release", "take"]


def new_number() -> str:
    """Of one handing over; nobody guesses it."""
    return secrets.token_hex(16)


def _handovers() -> Handovers | None:
    with suppress(RuntimeError):  # no home folder
        return Handovers()
    return None


def keep(link: Link, side: Side, cookie: Cookie) -> None:
    """Remember that this guest is that side of it; where QEMU runs on this host."""
    from qmpvcpu.xml.migration import write_cookie

    here = _handovers()
    if here is not None and link.process is not None and cookie.number is not None:
        here.keep(link.process, side, cookie.number, write_cookie(cookie))


def kept(link: Link, side: Side) -> Cookie | None:
    """What this guest is that side of."""
    from qmpvcpu.xml.migration import read_cookie

    here = _handovers()
    data = here.kept(link.process, side) if here is not None and link.process is not None else None
    if data is not None:
        with suppress(VcpuRefused):
            return read_cookie(data)
    return None


def forget(link: Link) -> None:
    """It takes part in none any more."""
    here = _handovers()
    if here is not None and link.process is not None:
        here.forget(link.process)


def is_there(cookie: Cookie, side: Side) -> bool:
    """Whether that side is a QEMU that lives on this host."""
    here = _handovers()
    return here is not None and cookie.number is not None and here.is_there(side, cookie.number)


def take(cookie: Cookie, side: Side) -> bool:
    """Before that side is let run; whether it may be: the other one has not taken the guest."""
    here = _handovers()
    if here is None or cookie.number is None:
        return True
    return here.take(cookie.number, side) is side


def release(cookie: Cookie, side: Side) -> None:
    """That side does not run, and will not."""
    here = _handovers()
    if here is not None and cookie.number is not None:
        here.release(cookie.number, side)
