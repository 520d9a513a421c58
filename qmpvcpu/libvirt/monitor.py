"""libvirt's API in the place of a monitor and of the guest's agent (`--via api`)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Final

from qmpvcpu.core.request import parse_ids
from qmpvcpu.errors import VcpuUsageError
from qmpvcpu.libvirt.calls import Guest
from qmpvcpu.libvirt.passthrough import Behind
from qmpvcpu.ports import CommandError, MonitorEvent

logger = logging.getLogger("qmpvcpu.libvirt.monitor")

#: After so long libvirt has asked QEMU for the unplug, and waits for the guest, seconds: what stands against it
#: shows at once. It gives the guest 5 s, on pseries 10 (qemu_hotplug.c), and does not look again by itself.
_ASKED_SECONDS: Final = 0.5
#: libvirt 9.0 fails without an error where the guest has rejected the unplug (qemuDomainHotplugDelVcpu).
_NO_ERROR: Final = "VIR_ERR_OK"
#: Another call holds the domain: nothing was asked.
_LOCKED: Final = "state change lock"


def failed(error: CommandError) -> asyncio.Future[object]:
    """An answer that is there already."""
    result: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    result.set_exception(error)
    return result


class ApiMonitor(Behind):
    """libvirt's API in the place of a monitor: `device_add` and `device_del` are `virDomainSetVcpu`."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest)
        #: By first vCPU id, the ids of each entity.
        self.entities: dict[int, tuple[int, ...]] = {}
        #: vCPU ids that libvirt takes for plugged, and that are gone.
        self.unseen: frozenset[int] = frozenset()
        #: Some of which may be.
        self.doubtful: tuple[int, ...] = ()
        self._timers: set[asyncio.TimerHandle] = set()
        self._plugs: set[asyncio.Future[object]] = set()
        #: By first vCPU id, what libvirt has not been asked for yet: it takes one at a time.
        self._queued_plugs: dict[int, asyncio.Future[object]] = {}
        self._queued: dict[int, asyncio.Future[object]] = {}
        #: By first vCPU id, unplugs that libvirt was told of while another client held the domain.
        self._held_up: dict[int, asyncio.Future[object]] = {}

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen to libvirt. Blocks."""
        self._end_watch = self.guest.watch(loop, self._told)

    def _told(self, word: str, device: str) -> None:
        super()._told(word, device)
        event = "DEVICE_UNPLUG_GUEST_ERROR" if word == "removal-failed" else "DEVICE_DELETED"
        # Of no device of ours: whoever listens looks again.
        about = {"device": device} if device else {"path": ""}
        self._give(MonitorEvent(event, about, time.time()))

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> asyncio.Future[object]:
        """Of QMP there is nothing here."""
        return failed(CommandError(command, "CommandNotFound", "libvirt's API has nothing of this kind"))

    def query_status(self) -> asyncio.Future[object]:
        """`virDomainGetState`."""
        return asyncio.ensure_future(self._status())

    async def _status(self) -> object:
        return {"status": await self.guest.run_state()}

    def device_add(self, driver: str, device_id: str, props: Mapping[str, Any]) -> asyncio.Future[object]:
        """`virDomainSetVcpu` of one entity; `device_id` is libvirt's own, `vcpuN`."""
        first = int(device_id.removeprefix("vcpu").partition("-")[0])
        if first in self.unseen:
            text = f"vCPU {first} is gone, and libvirt takes it for plugged: --via monitor plugs it"
            return failed(CommandError("virDomainSetVcpu", "VIR_ERR_OPERATION_INVALID", text))
        call = self.guest.set_vcpu(self.entities[first], True, self.guest.flags(live=True))

        def begun() -> None:
            self._queued_plugs.pop(first, None)

        result = self.guest.connection.begin_change("virDomainSetVcpu", call, begun)
        self._queued_plugs[first] = result
        self._plugs.add(result)
        result.add_done_callback(self._plugs.discard)
        return result

    async def plugs_done(self) -> None:
        """Wait until libvirt has answered every plug: a query is about what was asked before it, as QEMU's are."""
        if self._plugs:
            await asyncio.wait(tuple(self._plugs))

    def device_del(self, device: str) -> asyncio.Future[object]:
        """`virDomainSetVcpu` of one entity. It answers once libvirt has asked; the end is an event."""
        loop = asyncio.get_running_loop()
        first = int(device.rpartition("/")[2].removeprefix("vcpu"))
        answer: asyncio.Future[object] = loop.create_future()

        was_held: list[bool] = []
        timers: list[asyncio.TimerHandle] = []

        def begun() -> None:
            self._queued.pop(first, None)
            wait()

        def wait() -> None:
            timers[:] = [loop.call_later(_ASKED_SECONDS, asked_by_now)]
            self._timers.update(timers)

        def asked_by_now() -> None:
            self._timers.difference_update(timers)
            if not was_held:
                # Its thread still connects.
                wait()
            elif any(was_held):
                # libvirt waits for another client's job first; when that ends nobody tells.
                self._held_up[first] = answer
            else:
                asked()

        def asked() -> None:
            if not answer.done():
                answer.set_result({})

        def ended(done: asyncio.Future[object]) -> None:
            self._queued.pop(first, None)
            self._held_up.pop(first, None)
            if done.cancelled():
                answer.cancel()
                return
            error = done.exception()
            event = text = None
            if error is None:
                event = "DEVICE_DELETED"
            elif (
                isinstance(error, CommandError)
                and error.error_class == "VIR_ERR_OPERATION_TIMEOUT"
                and _LOCKED not in error.text
            ):
                # libvirt has waited as long as it does. Its XML follows if an event comes, and else never.
                logger.debug("vCPU %s: %s", first, error.text)
            elif isinstance(error, CommandError) and (error.error_class == _NO_ERROR or "rejected" in error.text):
                event = "DEVICE_UNPLUG_GUEST_ERROR"
            elif not answer.done():
                answer.set_exception(error)
            elif isinstance(error, CommandError):
                # It was taken for asked, and that is over.
                event, text = "DEVICE_UNPLUG_GUEST_ERROR", error.text
            asked()
            if event is not None:
                about = {"device": f"vcpu{first}", "text": text}
                self._give(MonitorEvent(event, about, time.time()))

        call = self.guest.set_vcpu(self.entities[first], False, self.guest.flags(live=True))

        def work() -> object:
            was_held.append(self.guest.is_held_now())
            return call()

        asking = self.guest.connection.begin_change("virDomainSetVcpu", work, begun)
        self._queued[first] = asking
        asking.add_done_callback(ended)
        return answer

    def drop_queued(self, *, plugs: bool = True) -> frozenset[str]:
        """Do not ask for what libvirt has not been asked for yet."""
        drop = self.guest.connection.drop
        found: set[int] = set()
        for queued in (self._queued, self._queued_plugs) if plugs else (self._queued,):
            found.update(first for first, asking in queued.items() if drop(asking))
            queued.clear()
        for answer in tuple(self._held_up.values()):
            # It cannot be taken back, and will be asked, unless libvirt gives up first.
            if not answer.done():
                answer.set_result({})
        self._held_up.clear()
        return frozenset(f"vcpu{first}" for first in found)

    async def close(self) -> None:
        """End listening. Never raises; may be called twice."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        await super().close()


class ApiAgent:
    """The guest's agent by libvirt's API (`ports.Agent`). It reads no files: libvirt has no call for that."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    @property
    def address(self) -> str:
        """libvirt's URI."""
        return self._guest.connection.uri

    @property
    def reads_files(self) -> bool:
        """libvirt's API cannot."""
        return False

    def limit(self, seconds: float) -> AbstractContextManager[None]:
        """libvirt has deadlines of its own, and each question is one call."""
        return nullcontext()

    async def open(self) -> None:
        """libvirt is connected."""

    async def get_vcpus(self) -> object:
        """`virDomainGetGuestVcpus`, in the words of `guest-get-vcpus`."""
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
        """None of them."""
        return [None] * len(limits)

    async def close(self) -> None:
        """Nothing is open."""


def _cpus(text: object) -> frozenset[int]:
    with suppress(VcpuUsageError):
        return frozenset(parse_ids(text)) if isinstance(text, str) and text else frozenset()
    return frozenset()
