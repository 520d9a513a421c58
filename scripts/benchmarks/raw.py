"""The bare socket that we are measured against: no asyncio, no library, as little Python as
possible.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any

from qmpvcpu.core.model import Entity


class RawQmp:
    """A blocking QMP client; events are skipped."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.file = self.sock.makefile("rb")
        self.file.readline()
        self.command("qmp_capabilities")

    def __enter__(self) -> RawQmp:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.sock.close()

    def command(self, name: str, **arguments: Any) -> Any:
        self.sock.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        return self.reply()

    def reply(self) -> Any:
        while True:
            message = json.loads(self.file.readline())
            if "event" not in message:
                return message["return"]

    def device_add(self, entity: Entity) -> None:
        self.command(
            "device_add", driver=entity.driver, id=entity.device_id, **dict(entity.props or {})
        )

    def unplug(self, entities: Sequence[Entity], left: int = 1) -> None:
        """All device_del written first, then every reply read, then asked until only `left` CPUs
        are there.
        """
        messages = [
            {"execute": "device_del", "arguments": {"id": entity.device_id}} for entity in entities
        ]
        self.sock.sendall(b"".join(json.dumps(message).encode() for message in messages))
        for _ in messages:
            self.reply()
        while len(self.command("query-cpus-fast")) > left:
            pass

    def pipeline(self, entities: Sequence[Entity]) -> None:
        """All device_add and one query-cpus-fast written first, then every reply read."""
        messages = [
            {
                "execute": "device_add",
                "arguments": {
                    "driver": entity.driver,
                    "id": entity.device_id,
                    **dict(entity.props or {}),
                },
            }
            for entity in entities
        ]
        messages.append({"execute": "query-cpus-fast", "arguments": {}})
        self.sock.sendall(b"".join(json.dumps(message).encode() for message in messages))
        for _ in messages:
            self.reply()
