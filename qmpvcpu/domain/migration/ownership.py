"""Which side of a migration owns the guest, and with which cookie, as stored on this host.

The source owns the guest from before its first byte until the whole guest was sent, and then
releases it. A side that should run the guest claims it first, in one atomic step, and then no other
side can claim it.
"""

from __future__ import annotations

import secrets
from contextlib import suppress

from qmpvcpu.core.migration.cookie import Cookie
from qmpvcpu.domain.session import Session
from qmpvcpu.errors import VcpuRefused
from qmpvcpu.host.ownership import Ownership, Role
from qmpvcpu.xml.cookie import read_cookie, write_cookie


def begin_number(session: Session) -> str:
    """Return the number of the migration that begins, which cannot be guessed. If a migration was
    begun and its cookie not used, its number is used again, so that each guest has only one.
    """
    begun = recall(session, Role.SOURCE)
    if begun is not None and begun.number is not None and not is_used(begun):
        return begun.number
    return secrets.token_hex(16)


# -- the cookie of a QEMU that takes part ----------------------------------------------------------


def remember(session: Session, role: Role, cookie: Cookie) -> None:
    """Store that this guest has this role in the migration of this cookie, if its QEMU runs on this
    host.
    """
    store = _store()
    if store is not None and session.process is not None and cookie.number is not None:
        store.remember(session.process, role, cookie.number, write_cookie(cookie))


def recall(session: Session, role: Role) -> Cookie | None:
    """Return the cookie of the migration in which this guest has this role."""
    store = _store()
    data = (
        store.recall(session.process, role)
        if store is not None and session.process is not None
        else None
    )
    if data is not None:
        with suppress(VcpuRefused):
            return read_cookie(data)
    return None


def recall_source(cookie: Cookie) -> bytes | None:
    """Return the guest's XML, if a source on this host has exactly this cookie."""
    store = _store()
    if store is None or cookie.number is None:
        return None
    return cookie.xml if write_cookie(cookie) in store.cookies(Role.SOURCE, cookie.number) else None


def forget(session: Session) -> None:
    """Store that this guest does not take part in a migration any more."""
    store = _store()
    if store is not None and session.process is not None:
        store.forget(session.process)


def is_present(cookie: Cookie, role: Role) -> bool:
    """Return whether a QEMU with this role in the migration of this cookie runs on this host."""
    store = _store()
    return store is not None and cookie.number is not None and store.is_present(role, cookie.number)


# -- who owns the guest of a cookie; any side may own one whose number is unknown ------------------


def claim(
    cookie: Cookie | None, role: Role, session: Session | None = None, *, force: bool = False
) -> bool:
    """Claim the guest before a side (`session`, if it is a destination) is let run; return whether
    that side owns it now. It does not if another side has claimed the guest, unless `force` takes
    it from that side.
    """
    store, number = _store(), cookie.number if cookie is not None else None
    return store is None or number is None or store.claim(number, _who(role, session), force=force)


def release(cookie: Cookie | None, role: Role, session: Session | None = None) -> None:
    """Release the guest, so that any side may claim it."""
    store = _store()
    if store is not None and cookie is not None and cookie.number is not None:
        store.release(cookie.number, _who(role, session))


def is_used(cookie: Cookie) -> bool:
    """Return whether a side has claimed the guest of this cookie."""
    store = _store()
    return (
        store is not None and cookie.number is not None and store.holder(cookie.number) is not None
    )


def _who(role: Role, session: Session | None) -> str:
    """Name a side. There is one source, and there may be several destinations."""
    if role is Role.SOURCE or session is None or session.process is None:
        return role.value
    return f"{role.value} {session.process.key}"


def _store() -> Ownership | None:
    with suppress(RuntimeError):  # there is no home folder
        return Ownership()
    return None
