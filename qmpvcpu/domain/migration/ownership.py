"""Which side of a migration has the guest, and with which cookie, as this host remembers it.

The source has the guest from before its first byte until all of it has been handed over, and releases it then. A
side that is to run claims it first, in one step, and no other side can.
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
    """Of the migration that this guest begins; nobody guesses it. One that was begun and not used goes on, so that
    there is one number for all that is under way.
    """
    begun = recall(session, Role.SOURCE)
    if begun is not None and begun.number is not None and not is_used(begun):
        return begun.number
    return secrets.token_hex(16)


# -- the cookie of a QEMU that takes part ------------------------------------------------------------


def remember(session: Session, role: Role, cookie: Cookie) -> None:
    """This guest has that role in the migration of this cookie; where its QEMU runs on this host."""
    store = _store()
    if store is not None and session.process is not None and cookie.number is not None:
        store.remember(session.process, role, cookie.number, write_cookie(cookie))


def recall(session: Session, role: Role) -> Cookie | None:
    """The cookie of the migration in which this guest has that role."""
    store = _store()
    data = store.recall(session.process, role) if store is not None and session.process is not None else None
    if data is not None:
        with suppress(VcpuRefused):
            return read_cookie(data)
    return None


def recall_source(cookie: Cookie) -> bytes | None:
    """The guest's XML, where this cookie is word for word one that a source on this host was given."""
    store = _store()
    if store is None or cookie.number is None:
        return None
    return cookie.xml if write_cookie(cookie) in store.cookies(Role.SOURCE, cookie.number) else None


def forget(session: Session) -> None:
    """This guest takes part in no migration any more."""
    store = _store()
    if store is not None and session.process is not None:
        store.forget(session.process)


def is_present(cookie: Cookie, role: Role) -> bool:
    """Whether a QEMU that has that role in the migration of this cookie lives on this host."""
    store = _store()
    return store is not None and cookie.number is not None and store.is_present(role, cookie.number)


# -- who has the guest of a cookie: anybody may have that of an unknown one --------------------------


def claim(cookie: Cookie | None, role: Role, session: Session | None = None, *, force: bool = False) -> bool:
    """Before that side (`session`, a destination) is let run: whether the guest is that side's now. It is not
    where another side has claimed it, unless `force` takes it from that one.
    """
    store, number = _store(), cookie.number if cookie is not None else None
    return store is None or number is None or store.claim(number, _who(role, session), force=force)


def release(cookie: Cookie | None, role: Role, session: Session | None = None) -> None:
    """That side does not have it any more: any side may claim it."""
    store = _store()
    if store is not None and cookie is not None and cookie.number is not None:
        store.release(cookie.number, _who(role, session))


def is_used(cookie: Cookie) -> bool:
    """Whether a side has claimed the guest of it."""
    store = _store()
    return store is not None and cookie.number is not None and store.holder(cookie.number) is not None


def _who(role: Role, session: Session | None) -> str:
    """There is one source, and there may be several destinations."""
    if role is Role.SOURCE or session is None or session.process is None:
        return role.value
    return f"{role.value} {session.process.key}"


def _store() -> Ownership | None:
    with suppress(RuntimeError):  # no home folder
        return Ownership()
    return None
