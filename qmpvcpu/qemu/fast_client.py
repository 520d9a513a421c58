"""Tricks for speed on `qemu.qmp` 0.0.6, each with the line of `scripts/bench tricks` that shows what it saves.

Without any of these members the client does the same: they can be deleted one by one, and that is how each is
measured. `scripts/soak plain` runs the tests without all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from qemu.qmp import Message, Runstate

from qmpvcpu.qemu.client import Client
from qmpvcpu.qemu.qmp_log import QmpLog

#: Commands in one write, at most: QEMU is to begin before the last of many is made.
_BATCH: Final = 32


class FastClient(Client):
    """`Client`, faster."""

    def __init__(self, name: str, log: QmpLog | None) -> None:
        super().__init__(name, log)
        self._batch: list[bytes] = []

    # "own replies"
    def _put(self, content: Mapping[str, object], command: str, result: asyncio.Future[object]) -> None:
        self._outgoing.put_nowait(Message(content, eager=False))

    async def _receive_reply(self, command: str, result: asyncio.Future[object], message: Message) -> None:
        self._settle(command, result, message)

    # "one write"
    def _do_send(self, msg: Message) -> None:
        self._batch.append(bytes(msg))
        if self.runstate is not Runstate.RUNNING or self._outgoing.empty() or len(self._batch) >= _BATCH:
            assert self._writer is not None
            self._writer.write(b"".join(self._batch))
            self._batch.clear()

    # "no texts"
    def _cb_outbound(self, msg: Message) -> Message:
        self._note_sent(msg)
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        self._note_received(msg)
        return msg
