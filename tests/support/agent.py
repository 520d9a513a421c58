"""An open connection to a guest agent: commands go out, answers and errors come in, in the agent's
own words.

All of it raises `qmpvcpu.VcpuConnectionError` where no answer comes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from qmpvcpu.ports import CommandError
from qmpvcpu.qemu.agent import AgentClient
from tests.support.waiting import DEADLINE

#: What a line may have, bytes.
LONGEST_LINE = 1 << 20


@dataclass
class AgentError(Exception):
    """The error that a command is answered with."""

    error_class: str
    desc: str


class Agent:
    def __init__(self, client: AgentClient) -> None:
        self._client = client

    async def get_vcpus(self) -> Any:
        """`guest-get-vcpus`. Raises AgentError."""
        return await _answer(self._client.get_vcpus())

    async def set_vcpus(self, wanted: Mapping[int, bool]) -> Any:
        """`guest-set-vcpus`: logical id -> whether it is to be online. Raises AgentError."""
        return await _answer(self._client.set_vcpus(wanted))

    async def read_files(self, limits: Mapping[str, int]) -> list[bytes | None]:
        """The contents of files by path, each with its limit in bytes; None for one that cannot be
        read.

        Raises AgentError.
        """
        found: list[bytes | None] = await _answer(self._client.read_files(limits))
        return found

    def limit(self, seconds: float) -> AbstractContextManager[None]:
        """What is asked in the body has so long in all."""
        return self._client.limit(seconds)

    async def command(self, name: str) -> Any:
        """Any other command. Raises AgentError."""
        return await _answer(self._client.execute(name))

    @property
    def unsent_bytes(self) -> int:
        """What waits in this process, because the peer does not read."""
        writer = self._client._writer
        return 0 if writer is None else writer.transport.get_write_buffer_size()

    @property
    def open_files(self) -> int:
        """Files of the guest that are still to be closed."""
        return len(self._client._handles)

    async def close(self) -> None:
        await self._client.close()


async def connect(address: str, *, timeout: float = DEADLINE) -> Agent:
    """Connect to an agent's socket; `timeout` in seconds, for each command."""
    client = AgentClient(address, timeout)
    await client.open()
    return Agent(client)


@asynccontextmanager
async def connected(address: str, *, timeout: float = DEADLINE) -> AsyncIterator[Agent]:
    """`connect`, and close at the end."""
    agent = await connect(address, timeout=timeout)
    try:
        yield agent
    finally:
        await agent.close()


async def _answer(coming: Awaitable[Any]) -> Any:
    try:
        return await coming
    except CommandError as error:
        raise AgentError(error.error_class, error.text) from None
