"""libvirt's API in place of a monitor and of the guest's agent (`--via api`)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Final

from qmpvcpu.core.request import parse_ids
from qmpvcpu.errors import VcpuUsageError
from qmpvcpu.libvirt.calls import LibvirtGuest
from qmpvcpu.libvirt.passthrough import Behind
from qmpvcpu.ports import CommandError, MonitorEvent

logger = logging.getLogger("qmpvcpu.libvirt.monitor")

#: Seconds after which libvirt must have sent the unplug to QEMU, and waits for the guest; an error
#: comes earlier. libvirt waits 5 s for the guest, and 10 s on pseries (qemu_hotplug.c). It does not
#: check once more by itself.
_REQUEST_SECONDS: Final = 0.5
#: libvirt 9.0 fails without an error code if the guest has rejected the unplug
#: (qemuDomainHotplugDelVcpu).
_NO_ERROR: Final = "VIR_ERR_OK"
#: In the text of the error if another call holds the domain, so that libvirt has sent nothing to
#: QEMU.
_LOCKED: Final = "state change lock"


def failed(error: CommandError) -> asyncio.Future[object]:
    """A future that already has this error."""
    result: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    result.set_exception(error)
    return result


class _Unplug:
    """One `virDomainSetVcpu` that unplugs an entity.

    `answer` stands for the answer to `device_del`: libvirt has sent it to QEMU. The result of the
    unplug is an event.
    """

    def __init__(self, monitor: ApiMonitor, first: int) -> None:
        self.first = first
        self._monitor = monitor
        self._loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[object] = self._loop.create_future()
        #: Whether another client held the domain when libvirt was called; None before the call.
        self._was_busy: bool | None = None
        self._timer: asyncio.TimerHandle | None = None
        guest = monitor.guest
        self._call = guest.set_vcpu(monitor.entities[first], False, guest.flags(live=True))
        self._asking = guest.connection.begin_change("virDomainSetVcpu", self._work, self._wait)
        self._asking.add_done_callback(self._finish)

    def drop(self) -> bool:
        """Cancel the unplug if it was not sent. Returns whether it was cancelled.

        Once libvirt waits for another client's job, the call cannot be cancelled: libvirt sends the
        unplug later, unless it gives up before.
        """
        if self._monitor.guest.connection.drop(self._asking):
            return True
        if self._was_busy:
            self._answer()
        return False

    def stop(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _work(self) -> object:
        self._was_busy = self._monitor.guest.is_busy()
        return self._call()

    def _wait(self) -> None:
        self._timer = self._loop.call_later(_REQUEST_SECONDS, self._check_request)

    def _check_request(self) -> None:
        if self._was_busy is None:
            # The worker's thread is still connecting.
            self._wait()
        elif not self._was_busy:
            self._answer()
        # Otherwise libvirt waits for another client's job, and nothing reports the end of that.

    def _answer(self) -> None:
        if not self.answer.done():
            self.answer.set_result({})

    def _finish(self, done: asyncio.Future[object]) -> None:
        self.stop()
        self._monitor.forget(self)
        if done.cancelled():
            self.answer.cancel()
            return
        error = done.exception()
        if error is None:
            self._end("DEVICE_DELETED")
        elif isinstance(error, CommandError) and _has_given_up(error):
            # libvirt waited for its full time. It updates its XML only if an event still comes.
            logger.debug("vCPU %s: %s", self.first, error.text)
            self._answer()
        elif isinstance(error, CommandError) and (
            error.error_class == _NO_ERROR or "rejected" in error.text
        ):
            self._end("DEVICE_UNPLUG_GUEST_ERROR")
        elif not self.answer.done():
            self.answer.set_exception(error)
        elif isinstance(error, CommandError):
            # We had reported it as sent before this error came, so the result is an event.
            self._end("DEVICE_UNPLUG_GUEST_ERROR", error.text)

    def _end(self, event: str, text: str | None = None) -> None:
        self._answer()
        self._monitor.deliver(
            MonitorEvent(event, {"device": f"vcpu{self.first}", "text": text}, time.time())
        )


def _has_given_up(error: CommandError) -> bool:
    return error.error_class == "VIR_ERR_OPERATION_TIMEOUT" and _LOCKED not in error.text


class ApiMonitor(Behind):
    """libvirt's API in place of a monitor: `device_add` and `device_del` become
    `virDomainSetVcpu`.
    """

    def __init__(self, guest: LibvirtGuest) -> None:
        super().__init__(guest)
        #: The vCPU ids of each entity, by entity id.
        self.entities: dict[int, tuple[int, ...]] = {}
        #: Ids of vCPUs that were removed and that libvirt still has as plugged.
        self.unseen: frozenset[int] = frozenset()
        #: Entity ids that share an order in libvirt's XML: one of each group was removed.
        self.doubtful: tuple[int, ...] = ()
        self._plugs: set[asyncio.Future[object]] = set()
        #: By entity id, the plugs that libvirt has not received yet: it takes one call at a time.
        self._queued_plugs: dict[int, asyncio.Future[object]] = {}
        #: The unplugs that have not finished.
        self._unplugs: set[_Unplug] = set()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Subscribe to libvirt's events. Blocks."""
        self._end_watch = self.guest.watch(loop, self._on_event)

    def _on_event(self, word: str, device: str) -> None:
        super()._on_event(word, device)
        event = "DEVICE_UNPLUG_GUEST_ERROR" if word == "removal-failed" else "DEVICE_DELETED"
        # If it is not about a device of ours, listeners read the state and compare.
        self.deliver(
            MonitorEvent(event, {"device": device} if device else {"path": ""}, time.time())
        )

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None
    ) -> asyncio.Future[object]:
        """Fail: libvirt's API has no QMP commands."""
        return failed(CommandError(command, "CommandNotFound", "libvirt's API has no such command"))

    def query_status(self) -> asyncio.Future[object]:
        """`virDomainGetState`."""
        return asyncio.ensure_future(self._status())

    async def _status(self) -> object:
        return {"status": await self.guest.run_state()}

    def device_add(
        self, driver: str, device_id: str, props: Mapping[str, Any]
    ) -> asyncio.Future[object]:
        """`virDomainSetVcpu` for one entity; `device_id` is libvirt's own, `vcpuN`."""
        first = int(device_id.removeprefix("vcpu").partition("-")[0])
        if first in self.unseen:
            return failed(
                CommandError(
                    "virDomainSetVcpu",
                    "VIR_ERR_OPERATION_INVALID",
                    f"vCPU {first} was unplugged, and libvirt did not notice: --via monitor plugs"
                    " it",
                )
            )
        call = self.guest.set_vcpu(self.entities[first], True, self.guest.flags(live=True))

        def begun() -> None:
            self._queued_plugs.pop(first, None)

        result = self.guest.connection.begin_change("virDomainSetVcpu", call, begun)
        self._queued_plugs[first] = result
        self._plugs.add(result)
        result.add_done_callback(self._plugs.discard)
        return result

    async def plugs_done(self) -> None:
        """Wait until libvirt has answered every plug. A query then includes them, as one to QEMU
        does.
        """
        if self._plugs:
            await asyncio.wait(tuple(self._plugs))

    def device_del(self, device: str) -> asyncio.Future[object]:
        """`virDomainSetVcpu` for one entity. The answer comes once libvirt has sent it; the result
        is an event.
        """
        unplug = _Unplug(self, int(device.rpartition("/")[2].removeprefix("vcpu")))
        self._unplugs.add(unplug)
        return unplug.answer

    def forget(self, unplug: _Unplug) -> None:
        """Remove an unplug that has finished."""
        self._unplugs.discard(unplug)

    def drop_queued(self, *, plugs: bool = True) -> frozenset[str]:
        """Cancel the changes that libvirt has not received yet. Returns their device ids."""
        found = {unplug.first for unplug in tuple(self._unplugs) if unplug.drop()}
        if plugs:
            drop = self.guest.connection.drop
            found.update(first for first, asking in self._queued_plugs.items() if drop(asking))
            self._queued_plugs.clear()
        return frozenset(f"vcpu{first}" for first in found)

    async def close(self) -> None:
        """Cancel the subscriptions. Never raises; may be called twice."""
        for unplug in self._unplugs:
            unplug.stop()
        await super().close()


class ApiAgent:
    """The guest's agent by libvirt's API (`ports.Agent`). It cannot read files: libvirt has no call
    for that.
    """

    reads_files = False

    def __init__(self, guest: LibvirtGuest) -> None:
        self._guest = guest

    @property
    def address(self) -> str:
        """libvirt's URI."""
        return self._guest.connection.uri

    def limit(self, seconds: float) -> AbstractContextManager[None]:
        """Do nothing: libvirt has deadlines of its own, and each request is one call."""
        return nullcontext()

    async def open(self) -> None:
        """Do nothing: libvirt is already connected."""

    async def get_vcpus(self) -> object:
        """`virDomainGetGuestVcpus`, converted to the reply of `guest-get-vcpus`."""
        reply = await self._guest.guest_vcpus()
        sets = {key: _cpus(reply.get(key)) for key in ("vcpus", "online", "offlinable")}
        return [
            {"logical-id": n, "online": n in sets["online"], "can-offline": n in sets["offlinable"]}
            for n in sorted(sets["vcpus"])
        ]

    async def set_vcpus(self, wanted: Mapping[int, bool]) -> object:
        """`virDomainSetGuestVcpus`."""
        for online in (True, False):
            ids = [number for number, on in wanted.items() if on is online]
            if ids:
                await self._guest.set_guest_vcpus(ids, online)
        return len(wanted)

    async def read_files(self, limits: Mapping[str, int]) -> list[bytes | None]:
        """Return None for each file: libvirt cannot read them."""
        return [None] * len(limits)

    async def close(self) -> None:
        """Do nothing: there is no connection of its own."""


def _cpus(text: object) -> frozenset[int]:
    with suppress(VcpuUsageError):
        return frozenset(parse_ids(text)) if isinstance(text, str) and text else frozenset()
    return frozenset()
