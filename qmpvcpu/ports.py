"""What a domain needs from the outside, as Protocols. The edges (`qemu`, `libvirt`, …) implement
them.
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from qmpvcpu.errors import VcpuConnectionError


class CommandError(Exception):
    """QEMU answered a command with an error. Internal: the domain turns it into a `VcpuError`.

    `error_class` is QAPI's `QapiErrorClass` ("GenericError", "DeviceNotFound", …); `text` is QEMU's
    `desc`.
    """

    def __init__(self, command: str, error_class: str, text: str) -> None:
        super().__init__(f"{command}: {text}")
        self.command = command
        self.error_class = error_class
        self.text = text


@dataclass(frozen=True, slots=True)
class MonitorEvent:
    """One QMP event: its QAPI name, its data, and QEMU's time stamp in seconds since the epoch."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a unix socket: the process that listens, and the path of its socket."""

    pid: int | None = None
    path: str | None = None


#: Called in the order in which messages arrive, and before the reply that follows an event is
#: delivered. The error of a lost connection is the last call. A sink must not block and must not
#: raise.
Sink = Callable[[MonitorEvent | VcpuConnectionError], None]


class Monitor(Protocol):
    """A QEMU monitor: one method per QMP command, named after it; all use `execute`. Replies are
    QEMU's, unchecked.

    Calling a method sends the command, in the order of the calls. Awaiting the result waits for the
    reply. It raises `CommandError` if QEMU answers with an error, and `VcpuConnectionError` if no
    answer comes in time or the connection is lost.
    """

    @property
    def address(self) -> str:
        """The address of the connection, as the user wrote it."""

    @property
    def is_local(self) -> bool:
        """Whether QEMU runs on this host, as far as the connection shows."""

    @property
    def run_id(self) -> object:
        """An object that differs between runs of the guest, if that is known; else None."""

    @property
    def hears_all(self) -> bool:
        """Whether all of QEMU's own events arrive, in order with the replies."""

    @property
    def peer(self) -> Peer:
        """The process at the other end, as far as the kernel reports it."""

    @property
    def greeting(self) -> Mapping[str, Any]:
        """The `QMP` member of the greeting."""

    def listen(self, sink: Sink) -> AbstractContextManager[None]:
        """Pass every event to `sink` from now on, until the context is left."""

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Future[object]:
        """Send any QMP command."""

    def query_hotpluggable_cpus(self) -> Future[object]:
        """QMP `query-hotpluggable-cpus`."""
        return self.execute("query-hotpluggable-cpus")

    def query_cpus_fast(self) -> Future[object]:
        """QMP `query-cpus-fast`."""
        return self.execute("query-cpus-fast")

    def query_target(self) -> Future[object]:
        """QMP `query-target`."""
        return self.execute("query-target")

    def query_kvm(self) -> Future[object]:
        """QMP `query-kvm`."""
        return self.execute("query-kvm")

    def query_machines(self) -> Future[object]:
        """QMP `query-machines`."""
        return self.execute("query-machines")

    def query_status(self) -> Future[object]:
        """QMP `query-status`."""
        return self.execute("query-status")

    def query_chardev(self) -> Future[object]:
        """QMP `query-chardev`."""
        return self.execute("query-chardev")

    def query_name(self) -> Future[object]:
        """QMP `query-name`."""
        return self.execute("query-name")

    def query_uuid(self) -> Future[object]:
        """QMP `query-uuid`."""
        return self.execute("query-uuid")

    def query_memory_size_summary(self) -> Future[object]:
        """QMP `query-memory-size-summary`."""
        return self.execute("query-memory-size-summary")

    def qom_get(self, path: str, name: str) -> Future[object]:
        """QMP `qom-get`; `name` is the property."""
        return self.execute("qom-get", {"path": path, "property": name})

    def device_add(self, driver: str, device_id: str, props: Mapping[str, Any]) -> Future[object]:
        """QMP `device_add`; `props` are sent unchanged, because QEMU 9.2 and later requires
        integers as integers.
        """
        return self.execute("device_add", {**props, "driver": driver, "id": device_id})

    def device_del(self, device: str) -> Future[object]:
        """QMP `device_del`; `device` is an id or a QOM path. The command only requests the
        unplug.
        """
        return self.execute("device_del", {"id": device})

    def drop_queued(self, *, plugs: bool = True) -> frozenset[str]:
        """Drop the commands that still wait here for their turn, and cancel their replies. Return
        the ids of their devices.

        Args:
            plugs: drop `device_add` commands too.
        """
        return frozenset()

    def human_monitor_command(self, line: str) -> Future[object]:
        """QMP `human-monitor-command`."""
        return self.execute("human-monitor-command", {"command-line": line})

    def cont(self) -> Future[object]:
        """QMP `cont`."""
        return self.execute("cont")

    def stop(self) -> Future[object]:
        """QMP `stop`; after it, a waiting destination does not start when the guest has arrived."""
        return self.execute("stop")

    def quit(self) -> Future[object]:
        """QMP `quit`."""
        return self.execute("quit")

    def query_migrate(self) -> Future[object]:
        """QMP `query-migrate`."""
        return self.execute("query-migrate")

    def migrate(self, uri: str) -> Future[object]:
        """QMP `migrate`."""
        return self.execute("migrate", {"uri": uri})

    def migrate_incoming(self, uri: str) -> Future[object]:
        """QMP `migrate-incoming`."""
        return self.execute("migrate-incoming", {"uri": uri})

    def migrate_cancel(self) -> Future[object]:
        """QMP `migrate_cancel`."""
        return self.execute("migrate_cancel")

    def migrate_set_capabilities(self, capabilities: Mapping[str, bool]) -> Future[object]:
        """QMP `migrate-set-capabilities`."""
        return self.execute(
            "migrate-set-capabilities",
            {
                "capabilities": [
                    {"capability": name, "state": state} for name, state in capabilities.items()
                ]
            },
        )

    def migrate_set_parameters(self, parameters: Mapping[str, int | str]) -> Future[object]:
        """QMP `migrate-set-parameters`; units are bytes per second and milliseconds."""
        return self.execute("migrate-set-parameters", dict(parameters))

    def query_migrate_parameters(self) -> Future[object]:
        """QMP `query-migrate-parameters`."""
        return self.execute("query-migrate-parameters")

    def remove_fd(self, fdset: int) -> Future[object]:
        """QMP `remove-fd` for a whole set."""
        return self.execute("remove-fd", {"fdset-id": fdset})

    def add_fd(self, fd: int) -> Future[object]:
        """QMP `add-fd` with the descriptor itself, into a new set; only if `takes_descriptors`."""

    def getfd(self, name: str, fd: int) -> Future[object]:
        """QMP `getfd` with the descriptor itself (SCM_RIGHTS); only if `takes_descriptors`."""

    @property
    def takes_descriptors(self) -> bool:
        """Whether descriptors can be passed, which needs a unix socket."""

    async def close(self) -> None:
        """Close the connection. Never raises; may be called twice."""


class Agent(Protocol):
    """A guest agent: one method per command. Replies are the guest's, unchecked.

    Each method raises `CommandError` if the agent answers with an error, and `VcpuConnectionError`
    if it does not answer.
    """

    @property
    def address(self) -> str:
        """The address of the connection, as the user wrote it."""

    @property
    def reads_files(self) -> bool:
        """Whether `read_files` works with this agent."""

    def limit(self, seconds: float) -> AbstractContextManager[None]:
        """Limit the total time of all commands in the body, in addition to the deadline of each
        command; can be nested.
        """

    async def open(self) -> None:
        """Connect to the agent's socket, if not connected; an agent need not listen yet. Raises
        VcpuConnectionError.
        """

    async def get_vcpus(self) -> object:
        """`guest-get-vcpus`."""

    async def set_vcpus(self, wanted: Mapping[int, bool]) -> object:
        """`guest-set-vcpus`; `wanted` maps logical ids to online."""

    async def read_files(self, limits: Mapping[str, int]) -> list[bytes | None]:
        """Read files of the guest; `limits` maps paths to maximum bytes. None for a file that is
        unreadable or longer.
        """

    async def close(self) -> None:
        """Close the connection. Never raises; may be called twice."""


class Staged(Protocol):
    """A next version of a definition that is written but not yet in place."""

    def commit(
        self, before: bytes, remake: Callable[[bytes], bytes], given_up: Callable[[], bool]
    ) -> None:
        """Put the version in place of `before`. If the definition is not `before` any more, put the
        result of `remake` on it in place.

        `given_up` is called while another process locks the definition. Raises OSError; the
        definition is then unchanged.
        """

    def discard(self) -> None:
        """Remove the version, if it was not committed. Never raises."""


class DefinitionStore(Protocol):
    """The store of one domain's XML. All methods may block as long as a disk does."""

    @property
    def place(self) -> str:
        """The name of this definition in messages."""

    def read(self) -> bytes:
        """Return the document. Raises VcpuRefused."""

    def stage(self, data: bytes) -> Staged:
        """Write the next version without putting it in place. Raises OSError."""
