"""Find a free QMP address of a guest. A guest may have several QMP sockets, and each takes one
client at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from qmpvcpu import aio
from qmpvcpu.errors import VcpuConnectionError
from qmpvcpu.ports import Monitor

#: Reasons of a `VcpuConnectionError` which mean that no QEMU listens at the address.
NOBODY_LISTENS: Final = frozenset({"missing", "refused"})

#: Seconds to wait for a greeting before the next address is tried too. QEMU greets within
#: milliseconds if no other client uses the socket.
_HEAD_START: Final = 0.05

#: Opens a monitor at one address.
Opener = Callable[[str], Awaitable[Monitor]]


async def first_free(addresses: Sequence[str], opener: Opener) -> Monitor:
    """Connect to the first address that greets. All other attempts have ended when this returns.

    The addresses are tried in order. The next one is tried when the previous one has failed, or has
    not greeted for 50 ms.

    Raises:
        VcpuConnectionError: no address accepts a connection.
    """
    if len(addresses) == 1:
        return await opener(addresses[0])
    attempts: list[asyncio.Future[Monitor]] = []
    try:
        found = await _race(addresses, opener, attempts)
    except BaseException:
        await aio.finish(_give_up(attempts))
        raise
    try:
        await aio.finish(_give_up([attempt for attempt in attempts if attempt is not found]))
    except BaseException:
        await aio.finish(found.result().close())
        raise
    return found.result()


async def _race(
    addresses: Sequence[str], opener: Opener, attempts: list[asyncio.Future[Monitor]]
) -> asyncio.Future[Monitor]:
    """Return the attempt that finished first. `attempts` then holds every attempt that was
    started.
    """
    while True:
        if len(attempts) < len(addresses):
            attempts.append(asyncio.ensure_future(opener(addresses[len(attempts)])))
        under_way = [attempt for attempt in attempts if not attempt.done()]
        if under_way:
            await asyncio.wait(
                under_way,
                timeout=_HEAD_START if len(attempts) < len(addresses) else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
        ended = [attempt for attempt in attempts if attempt.done()]
        errors: list[VcpuConnectionError] = []
        for attempt in ended:
            error = attempt.exception()
            if not isinstance(error, VcpuConnectionError):
                # An error of another kind is about the request, and another address would give the
                # same one.
                attempt.result()
                return attempt
            errors.append(error)
        if len(errors) == len(addresses):
            raise _none_free(errors)


async def _give_up(attempts: Sequence[asyncio.Future[Monitor]]) -> None:
    for attempt in attempts:
        attempt.cancel()
    for attempt in attempts:
        await asyncio.wait((attempt,))
        if not attempt.cancelled() and attempt.exception() is None:
            await attempt.result().close()


def _none_free(errors: Sequence[VcpuConnectionError]) -> VcpuConnectionError:
    # A socket that another client uses is a more useful error than an address without QEMU.
    worst = next((error for error in errors if error.reason not in NOBODY_LISTENS), errors[0])
    return VcpuConnectionError(
        "no QMP address answers: " + "; ".join(error.message for error in errors),
        address=worst.address,
        reason=worst.reason,
        hint=worst.hint,
        libvirt=worst.libvirt,
    )
