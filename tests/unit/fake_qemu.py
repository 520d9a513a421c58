"""A scripted x86 QEMU behind the fake QMP server: slots that fill and empty, a guest that obeys the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.unit.fake_qmp import Connection, Script

BOOT_PATH = "/machine/unattached/device[0]"


class FakeQemu:
    """`slots` sockets of one thread, slot 0 plugged. What is public may be changed while it runs."""

    def __init__(self, slots: int = 4, plugged: tuple[int, ...] = (), *, kvm: bool = True) -> None:
        self.slots = slots
        self.kvm = kvm
        self.paths = {0: BOOT_PATH} | {n: f"/machine/peripheral/vcpu{n}" for n in plugged}
        #: Slot -> how often it was filled: a CPU plugged again has a new thread.
        self.lives: dict[int, int] = {}
        self.one_thread = False
        self.status = "running"
        self.commands: list[tuple[str, dict[str, Any]]] = []
        #: Slot -> the error `device_add` answers.
        self.add_errors: dict[int, str] = {}
        #: Slot -> what `device_del` does: "gone", "gone-silently", "refused", "silence", "error" or "close".
        self.on_delete: dict[int, str] = {}
        #: Called with each command before it is answered; may return True to leave it unanswered.
        self.hook: Callable[[Connection, dict[str, Any]], bool | None] = lambda connection, command: None
        self.connections: list[Connection] = []

    @property
    def script(self) -> Script:
        return self._serve

    def sent(self, name: str) -> list[dict[str, Any]]:
        return [arguments for command, arguments in self.commands if command == name]

    def fill(self, slot: int) -> None:
        self.lives[slot] = self.lives.get(slot, 0) + 1
        self.paths[slot] = f"/machine/peripheral/vcpu{slot}"

    def _thread(self, slot: int) -> int:
        return 100 + slot + 1000 * self.lives.get(slot, 0)

    def let_go(self, slot: int, *, tell: bool = True) -> None:
        path = self.paths.pop(slot)
        for connection in self.connections if tell else ():
            connection.event("DEVICE_DELETED", device=f"vcpu{slot}", path=path)

    def reset(self) -> None:
        for connection in self.connections:
            connection.event("RESET", guest=False, reason="host-qmp-system-reset")

    def refuse(self, slot: int) -> None:
        info = {"slot-type": "CPU", "slot": str(slot), "source": 3, "status": 128, "device": f"vcpu{slot}"}
        for connection in self.connections:
            connection.event("ACPI_DEVICE_OST", info=info)

    async def _serve(self, connection: Connection) -> None:
        await connection.greet()
        self.connections.append(connection)
        while (command := await connection.receive()) is not None:
            self.commands.append((command["execute"], command.get("arguments", {})))
            if not self.hook(connection, command):
                self._answer(connection, command)
        self.connections.remove(connection)

    def _answer(self, connection: Connection, command: dict[str, Any]) -> None:
        arguments = command.get("arguments", {})
        match command["execute"]:
            case "query-hotpluggable-cpus":
                value: Any = [self._slot(n) for n in reversed(range(self.slots))]
            case "query-cpus-fast":
                value = [
                    {"cpu-index": n, "qom-path": path, "thread-id": 77 if self.one_thread else self._thread(n)}
                    for n, path in self.paths.items()
                ]
            case "query-target":
                value = {"arch": "x86_64"}
            case "query-kvm":
                value = {"enabled": self.kvm, "present": True}
            case "query-status":
                value = {"status": self.status, "running": self.status == "running"}
            case "qom-get" if arguments["property"] == "type":
                value = "pc-q35-10.0-machine"
            case "qom-get":
                value = {"maxcpus": self.slots, "sockets": self.slots, "cores": 1, "threads": 1}
            case "device_add":
                slot = arguments["socket-id"]
                if (text := self.add_errors.get(slot)) is not None:
                    return error(connection, command, text)
                self.fill(slot)
                value = {}
            case "device_del":
                return self._delete(connection, command, int(arguments["id"].rpartition("vcpu")[2]))
            case _:
                return error(connection, command, "The command is not known", "CommandNotFound")
        connection.reply(command, value)
        return None

    def _delete(self, connection: Connection, command: dict[str, Any], slot: int) -> None:
        how = self.on_delete.get(slot, "gone")
        if how == "close":
            return connection.close()
        if how == "error":
            return error(connection, command, "acpi: device unplug request for not supported device type: CPU")
        connection.reply(command, {})
        if how.startswith("gone"):
            self.let_go(slot, tell=how == "gone")
        elif how == "refused":
            self.refuse(slot)
        return None

    def _slot(self, number: int) -> dict[str, Any]:
        slot = {"props": {"socket-id": number, "core-id": 0, "thread-id": 0}, "vcpus-count": 1, "type": "t-cpu"}
        return slot | ({"qom-path": self.paths[number]} if number in self.paths else {})


def error(connection: Connection, command: dict[str, Any], text: str, name: str = "GenericError") -> None:
    connection.send({"error": {"class": name, "desc": text}, "id": command["id"]})
