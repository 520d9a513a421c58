"""What a domain needs of the world, as Protocols. The edges (`qemu`, `libvirt`, …) implement them."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from qmpvcpu.errors import VcpuConnectionError

__all__ = [
    "Agent",
    "CommandError",
    "DefinitionStore",
    "Monitor",
    "MonitorEvent",
    "Peer",
    "Sink",
    "Staged",
]


class CommandError(Exception):
    """QEMU answered a command with an error. Stays inside: the domain turns it into a `VcpuError`.

    `error_class` is QAPI's `QapiErrorClass` ("GenericError", "DeviceNotFound", …), `text` QEMU's `desc`.
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
    """The other end of a unix socket: the process that listened, and the path it listens at."""

    pid: int | None = None
    path: str | None = None


#: Called in the order in which messages arrive, before the reply that follows an event is delivered. A lost
#: connection is the last thing a sink gets. A sink must not block and must not raise.
Sink = Callable[[MonitorEvent | VcpuConnectionError], None]


class Monitor(Protocol):
    """A QEMU monitor: QMP commands one to one, named after them, all by `execute`. Replies are QEMU's, unchecked.

    Calling a command sends it, in the order of the calls; awaiting what it returns waits for the reply and raises
    `CommandError` when QEMU answers with an error, and `VcpuConnectionError` when no answer comes in time or the
    connection is gone.
    """

    @property
    def address(self) -> str:
        """What it is connected to, as the user wrote it."""

    @property
    def is_local(self) -> bool:
        """Whether QEMU runs on this host, as far as the connection tells."""

    @property
    def run_id(self) -> object:
        """What tells this run of the guest from an earlier one, where that is known; else None."""

    @property
    def hears_all(self) -> bool:
        """Whether QEMU's own events come through it, none missing, and in order with the replies."""

    @property
    def peer(self) -> Peer:
        """Whom it is connected to, as far as the kernel tells."""

    @property
    def greeting(self) -> Mapping[str, Any]:
        """The `QMP` member of the greeting."""

    def listen(self, sink: Sink) -> AbstractContextManager[None]:
        """Give every event to `sink` from now on, until the context is left."""

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Future[object]:
        """Any QMP command."""

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
        """QMP `device_add`; `props` go out as they are: integers since 9.2 must be integers."""
        return self.execute("device_add", {**props, "driver": driver, "id": device_id})

    def device_del(self, device: str) -> Future[object]:
        """QMP `device_del`; `device` is an id or a QOM path. It only asks."""
        return self.execute("device_del", {"id": device})

    def drop_queued(self, *, plugs: bool = True) -> frozenset[str]:
        """Do not ask for what has not been asked for yet, where commands wait here for their turn: their devices'
        ids. Their answers are cancelled.

        Args:
            plugs: `device_add` too.
        """
        return frozenset()

    def human_monitor_command(self, line: str) -> Future[object]:
        """QMP `human-monitor-command`."""
        return self.execute("human-monitor-command", {"command-line": line})

    def cont(self) -> Future[object]:
        """QMP `cont`."""
        return self.execute("cont")

    def stop(self) -> Future[object]:
        """QMP `stop`; of a destination that waits, it does not run when all has arrived."""
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
        rows = [{"capability": name, "state": state} for name, state in capabilities.items()]
        return self.execute("migrate-set-capabilities", {"capabilities": rows})

    def migrate_set_parameters(self, parameters: Mapping[str, int | str]) -> Future[object]:
        """QMP `migrate-set-parameters`: bytes a second, milliseconds."""
        return self.execute("migrate-set-parameters", dict(parameters))

    def query_migrate_parameters(self) -> Future[object]:
        """QMP `query-migrate-parameters`."""
        return self.execute("query-migrate-parameters")

    def remove_fd(self, fdset: int) -> Future[object]:
        """QMP `remove-fd`: all of a set."""
        return self.execute("remove-fd", {"fdset-id": fdset})

    def add_fd(self, fd: int) -> Future[object]:
        """QMP `add-fd`, into a set of its own, with the descriptor itself; only where `takes_descriptors`."""

    def getfd(self, name: str, fd: int) -> Future[object]:
        """QMP `getfd`, with the descriptor itself (SCM_RIGHTS); only where `takes_descriptors`."""

    @property
    def takes_descriptors(self) -> bool:
        """Whether descriptors can be handed over: a unix socket."""

    async def close(self) -> None:
        """Close the connection. Never raises; may be called twice."""


class Agent(Protocol):
    """A guest agent: commands one to one. Replies are the guest's, unchecked.

    Each raises `CommandError` when the agent answers with an error, and `VcpuConnectionError` when it does not
    answer.
    """

    @property
    def address(self) -> str:
        """What it is connected to, as the user wrote it."""

    @property
    def reads_files(self) -> bool:
        """Whether `read_files` can read any."""

    def limit(self, seconds: float) -> AbstractContextManager[None]:
        """What is asked in the body has so long in all, besides each command's own deadline; nests."""

    async def open(self) -> None:
        """Connect to its socket, if it is not; an agent need not listen yet. Raises VcpuConnectionError."""

    async def get_vcpus(self) -> object:
        """`guest-get-vcpus`."""

    async def set_vcpus(self, wanted: Mapping[int, bool]) -> object:
        """`guest-set-vcpus`: logical id -> online."""

    async def read_files(self, limits: Mapping[str, int]) -> list[bytes | None]:
        """Files of the guest, path -> most bytes; None for one that cannot be read, or has more."""

    async def close(self) -> None:
        """Close the connection. Never raises; may be called twice."""


class Staged(Protocol):
    """A next version of a definition, written and not yet in its place."""

    def commit(self, before: bytes, again: Callable[[bytes], bytes], given_up: Callable[[], bool]) -> None:
        """Put it in place of `before`; if that is not what is there any more, what `again` makes of what is.

        `given_up` is asked while another process holds it. Raises OSError: what was there stands.
        """

    def discard(self) -> None:
        """Take it away, if it was not committed. Never raises."""


class DefinitionStore(Protocol):
    """Where the XML of one domain is kept. Everything here blocks, for as long as a disk does."""

    @property
    def place(self) -> str:
        """What it is called in messages."""

    def read(self) -> bytes:
        """The document. Raises VcpuRefused."""

    def stage(self, data: bytes) -> Staged:
        """Write the next version where it does not count yet. Raises OSError."""
