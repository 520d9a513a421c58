"""A scripted QEMU of any architecture behind the fake QMP server: it starts from a recording of a
real one, its slots fill and empty, and its guest obeys the test.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from tests.support.fake_qmp import Connection, Script
from tests.support.recordings import Recording, sockets

BOOT_PATH = "/machine/unattached/device[0]"
CHANGES = ("device_add", "device_del")


class FakeQemu:
    """A machine as it was recorded, or one of `slots` sockets with one thread each; vCPU 0 is
    plugged.

    A slot's number is its first vCPU id. What is public may be changed while it runs.
    """

    def __init__(
        self,
        slots: int = 4,
        plugged: Iterable[int] = (),
        *,
        kvm: bool = True,
        machine: Recording | None = None,
    ) -> None:
        self.machine = machine if machine is not None else sockets(slots)
        self.kvm = kvm
        self.version = dict(self.machine.greeting)
        self.arch = self.machine.arch
        self.paths = dict(self.machine.paths)
        #: Slot -> how often it was filled: a CPU plugged again has a new thread.
        self.lives: dict[int, int] = {}
        for slot in plugged:
            self.paths.setdefault(slot, f"/machine/peripheral/vcpu{slot}")
        self.one_thread = False
        #: Ids of real threads, which the vCPUs get one after the other; empty: made up.
        self.real_threads: list[int] = []
        self._given: dict[tuple[int, int, int], int] = {}
        self.status = "running"
        #: Whether a ppc64 guest still executes its firmware.
        self.firmware = False
        #: Device ids that other devices have.
        self.other_devices: set[str] = set()
        self.commands: list[tuple[str, dict[str, Any]]] = []
        #: Slot -> the error `device_add` answers.
        self.add_errors: dict[int, str] = {}
        #: Slot -> what `device_add` does instead: "silence" or "close".
        self.on_add: dict[int, str] = {}
        #: Slot -> what `device_del` does: "gone", "gone-silently", "refused", "silence", "error",
        #: "error: TEXT" or "close"; a list is used up word by word, and its last one stays.
        self.on_delete: dict[int, str | list[str]] = {}
        #: Called with each command before it is answered; may return True to leave it unanswered.
        self.hook: Callable[[Connection, dict[str, Any]], bool | None] = (
            lambda connection, command: None
        )
        self.connections: list[Connection] = []

    @property
    def script(self) -> Script:
        return self._serve

    @property
    def slots(self) -> int:
        """How many slots there are; setting it takes the last ones away."""
        return len(self.machine.slots)

    @slots.setter
    def slots(self, count: int) -> None:
        self.machine.slots = dict(list(self.machine.slots.items())[:count])

    @property
    def plugged_ids(self) -> list[int]:
        """Every vCPU id that is plugged."""
        if not self.machine.slots:
            return [cpu["cpu-index"] for cpu in self.machine.replies["query-cpus-fast"]["return"]]
        return sorted(first + n for first in self.paths for n in range(self.threads(first)))

    def threads(self, slot: int) -> int:
        return self.machine.slots[slot]["vcpus-count"]

    def sent(self, name: str) -> list[dict[str, Any]]:
        return [arguments for command, arguments in self.commands if command == name]

    def when_sent(self, name: str, count: int = 1) -> asyncio.Event:
        """Set once it has read that many commands of this name."""
        reached = asyncio.Event()
        before = self.hook

        def hook(connection: Connection, command: dict[str, Any]) -> bool | None:
            if len(self.sent(name)) >= count:
                reached.set()
            return before(connection, command)

        self.hook = hook
        return reached

    @property
    def changes(self) -> list[tuple[str, dict[str, Any]]]:
        """The commands that change something, in order."""
        return [(name, arguments) for name, arguments in self.commands if name in CHANGES]

    def fill(self, slot: int, device: str | None = None) -> None:
        self.lives[slot] = self.lives.get(slot, 0) + 1
        self.paths[slot] = f"/machine/peripheral/{device or f'vcpu{slot}'}"

    def let_go(self, slot: int, *, tell: bool = True) -> None:
        path = self.paths.pop(slot)
        device = {"device": path.rpartition("/")[2]} if "/peripheral/" in path else {}
        for connection in self.connections if tell else ():
            connection.event("DEVICE_DELETED", path=path, **device)

    def reset(self) -> None:
        for connection in self.connections:
            connection.event("RESET", guest=False, reason="host-qmp-system-reset")

    def refuse(self, slot: int) -> None:
        device = self.paths[slot].rpartition("/")[2]
        for connection in self.connections:
            if self.arch == "ppc64":
                connection.event("DEVICE_UNPLUG_GUEST_ERROR", device=device, path=self.paths[slot])
            else:
                info = {
                    "slot-type": "CPU",
                    "slot": str(slot),
                    "source": 3,
                    "status": 128,
                    "device": device,
                }
                connection.event("ACPI_DEVICE_OST", info=info)

    def close(self) -> None:
        for connection in self.connections:
            connection.close()

    async def _serve(self, connection: Connection) -> None:
        await connection.greet(
            {"QMP": {"version": {"qemu": self.version, "package": ""}, "capabilities": []}}
        )
        self.connections.append(connection)
        while (command := await connection.receive()) is not None:
            self.commands.append((command["execute"], command.get("arguments", {})))
            if not self.hook(connection, command):
                self._answer(connection, command)
        self.connections.remove(connection)

    def _answer(self, connection: Connection, command: dict[str, Any]) -> None:
        arguments = command.get("arguments", {})
        match command["execute"]:
            case "query-hotpluggable-cpus" if self.machine.slots:
                value: Any = [self._slot(n) for n in reversed(self.machine.slots)]
            case "query-cpus-fast" if self.machine.slots:
                value = self._cpus()
            case "query-target":
                value = {"arch": self.arch}
            case "query-kvm":
                value = {"enabled": self.kvm, "present": True}
            case "query-status":
                value = {"status": self.status, "running": self.status == "running"}
            case "human-monitor-command" if arguments["command-line"] == "info registers -a":
                value = f"NIP 0 MSR {0x8000000000001000 if self.firmware else 0x8000000000001033:016x}\r\n"
            case "device_add":
                return self._add(connection, command, arguments)
            case "device_del":
                return self._delete(connection, command, arguments["id"])
            case name:
                return self._recorded(connection, command, name, arguments)
        connection.reply(command, value)
        return None

    def _recorded(
        self, connection: Connection, command: dict[str, Any], name: str, arguments: dict[str, Any]
    ) -> None:
        if name == "qom-get":
            exact = f"qom-get {arguments['path']} {arguments['property']}"
            path = arguments["path"] if arguments["path"] == "/machine" else "CPU"
            name = (
                exact
                if exact in self.machine.replies
                else f"qom-get {path} {arguments['property']}"
            )
        reply = self.machine.replies.get(name)
        if reply is None:
            return error(
                connection, command, f"The command {name} has not been found", "CommandNotFound"
            )
        connection.send(reply | {"id": command["id"]})
        return None

    def _tried(self, connection: Connection, command: dict[str, Any], name: str) -> None:
        connection.send(self.machine.tried[name] | {"id": command["id"]})

    def _add(
        self, connection: Connection, command: dict[str, Any], arguments: dict[str, Any]
    ) -> None:
        device, driver = arguments["id"], arguments["driver"]
        props = {key: value for key, value in arguments.items() if key not in ("id", "driver")}
        slot = next(
            (
                n
                for n, each in self.machine.slots.items()
                if (each["props"], each["type"]) == (props, driver)
            ),
            None,
        )
        if slot is None:
            return error(connection, command, f"this machine has no slot for {arguments}")
        if (text := self.add_errors.get(slot)) is not None:
            return error(connection, command, text)
        if (how := self.on_add.get(slot)) is not None:
            return connection.close() if how == "close" else None
        if slot in self.paths:
            return self._tried(connection, command, "slot taken")
        if device in self.other_devices | {path.rpartition("/")[2] for path in self.paths.values()}:
            return error(connection, command, f"Duplicate device ID '{device}'")
        self.fill(slot, device)
        return connection.reply(command, {})

    def _delete(self, connection: Connection, command: dict[str, Any], name: str) -> None:
        slot = next(
            (n for n, path in self.paths.items() if name in (path, path.rpartition("/")[2])), None
        )
        if slot is None:
            return error(connection, command, f"Device '{name}' not found", "DeviceNotFound")
        never = self.machine.tried["unplug"] == self.machine.tried["unplug boot CPU"]
        if slot == 0 or never:
            return self._tried(connection, command, "unplug boot CPU")
        how = self.on_delete.get(slot, "gone")
        if isinstance(how, list):
            how = how.pop(0) if len(how) > 1 else how[0]
        if how == "close":
            return connection.close()
        word, _, text = how.partition(": ")
        if word == "error":
            text = text or "acpi: device unplug request for not supported device type: CPU"
            return error(connection, command, text)
        connection.reply(command, {})
        if how.startswith("gone"):
            self.let_go(slot, tell=how == "gone")
        elif how == "refused":
            self.refuse(slot)
        return None

    def _slot(self, number: int) -> dict[str, Any]:
        slot = self.machine.slots[number]
        return slot | ({"qom-path": self.paths[number]} if number in self.paths else {})

    def _cpus(self) -> list[dict[str, Any]]:
        rows = []
        for slot, path in self.paths.items():
            for n in range(self.threads(slot)):
                thread = 77 if self.one_thread else self._thread(slot, n)
                name = f"{path}/thread[{n}]" if self.arch == "ppc64" else path
                rows.append({"cpu-index": slot + n, "qom-path": name, "thread-id": thread})
        return rows

    def _thread(self, slot: int, number: int) -> int:
        life = self.lives.get(slot, 0)
        if not self.real_threads:
            return 100 + slot + number + 1000 * life
        return self.real_threads[self._given.setdefault((slot, number, life), len(self._given))]


def error(
    connection: Connection, command: dict[str, Any], text: str, name: str = "GenericError"
) -> None:
    connection.send({"error": {"class": name, "desc": text}, "id": command["id"]})
