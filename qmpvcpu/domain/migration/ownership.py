"""What this host remembers of a migration that a guest takes part in: its cookie, and which side has the guest."""

from __future__ import annotations

import secrets
from contextlib import suppress

from qmpvcpu.core.migration.cookie import Cookie
from qmpvcpu.domain.session import Link
from qmpvcpu.errors import VcpuRefused
from qmpvcpu.host.ownership import Handovers, Side

__all__ = [
    "Side",
    "begin_number",
    "forget",
    "give",
    "is_there",
    "is_used",
    "keep",
    "kept",
    "kept_source",
    "new_number",
    "release",
    "take",
]


def new_number() -> str:
    """Of one handing over; nobody guesses it."""
    return secrets.token_hex(16)


def _handovers() -> Handovers | None:
    with suppress(RuntimeError):  # no home folder
        return Handovers()
    return None


def begin_number(link: Link) -> str:
    """Of the handing over that this guest begins: one that was begun, and not used, goes on, so that there is one
    number for all that is under way.
    """
    begun = kept(link, Side.SOURCE)
    if begun is not None and begun.number is not None and not is_used(begun):
        return begun.number
    return new_number()


def keep(link: Link, side: Side, cookie: Cookie) -> None:
    """Remember that this guest is that side of it; where QEMU runs on this host."""
    from qmpvcpu.xml.cookie import write_cookie

    here = _handovers()
    if here is not None and link.process is not None and cookie.number is not None:
        here.keep(link.process, side, cookie.number, write_cookie(cookie))


def kept(link: Link, side: Side) -> Cookie | None:
    """What this guest is that side of."""
    from qmpvcpu.xml.cookie import read_cookie

    here = _handovers()
    data = here.kept(link.process, side) if here is not None and link.process is not None else None
    if data is not None:
        with suppress(VcpuRefused):
            return read_cookie(data)
    return None


def kept_source(cookie: Cookie) -> bytes | None:
    """The guest's XML, where this cookie is word for word one that a source on this host was given."""
    from qmpvcpu.xml.cookie import write_cookie

    here = _handovers()
    if here is None or cookie.number is None:
        return None
    known = here.written(Side.SOURCE, cookie.number)
    return cookie.xml if write_cookie(cookie) in known else None


def forget(link: Link, side: Side | None = None) -> None:
    """It takes part in none any more, or not as that side."""
    here = _handovers()
    if here is not None and link.process is not None:
        here.forget(link.process, side)


def is_there(cookie: Cookie, side: Side) -> bool:
    """Whether that side is a QEMU that lives on this host."""
    here = _handovers()
    return here is not None and cookie.number is not None and here.is_there(side, cookie.number)


def is_used(cookie: Cookie) -> bool:
    """Whether somebody has taken the guest of it."""
    here = _handovers()
    return here is not None and cookie.number is not None and here.holder(cookie.number) is not None


def _who(side: Side, link: Link | None) -> str:
    """There is one source, and there may be several destinations."""
    if side is Side.SOURCE or link is None or link.process is None:
        return side.value
    return f"{side.value} {link.process.key}"


def take(cookie: Cookie, side: Side, link: Link | None = None) -> bool:
    """Before that side (`link`, a destination) is let run; whether it may be: nobody else has taken the guest."""
    here = _handovers()
    return here is None or cookie.number is None or here.take(cookie.number, _who(side, link))


def give(cookie: Cookie, side: Side, link: Link | None = None) -> None:
    """The guest is that side's, whoever had taken it."""
    here = _handovers()
    if here is not None and cookie.number is not None:
        here.give(cookie.number, _who(side, link))


def release(cookie: Cookie, side: Side, link: Link | None = None) -> None:
    """That side has it no longer: anybody may take it."""
    here = _handovers()
    if here is not None and cookie.number is not None:
        here.release(cookie.number, _who(side, link))
