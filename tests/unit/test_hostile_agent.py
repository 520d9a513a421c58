"""A guest agent that means harm: shapes that a person thinks of. `scripts/soak hostile` generates
others.
"""

from __future__ import annotations

import asyncio
import json
import time

import pytest

import qmpvcpu
from qmpvcpu import VcpuConnectionError
from tests.support.agent import LONGEST_LINE, connected
from tests.support.fake_agent import FakeAgent, serve_agent
from tests.support.fake_guest import FakeGuest
from tests.support.fake_qemu import FakeQemu
from tests.support.fake_qmp import serve
from tests.support.waiting import until

#: Of one command, seconds; and what more a busy machine may need.
TIMEOUT, BUSY = 0.3, 4.0


class Flood(FakeAgent):
    """Says the same, without end, whatever it is asked."""

    def __init__(self, said):
        super().__init__()
        self.said = said

    async def serve(self, reader, writer):
        while True:
            writer.write(self.said)
            await writer.drain()


FLOODS = {
    "sentinels": b"\xff" * 100_000,
    "sentinels and ends of lines": b"\xff\n" * 50_000,
    "answers to nobody": b'\xff{"return": 7}\n' * 5000,
    "lines": b"\n" * 100_000,
    "no line": b"x" * 100_000,
    "half of an answer": b'\xff{"return": ' * 10_000,
}


@pytest.mark.parametrize("said", FLOODS.values(), ids=FLOODS)
async def test_a_flood_ends_at_the_deadline(tmp_path, said):
    async with (
        serve_agent(tmp_path, Flood(said)) as path,
        connected(path, timeout=TIMEOUT) as client,
    ):
        began = time.monotonic()
        with pytest.raises(VcpuConnectionError) as caught:
            await client.get_vcpus()
        assert time.monotonic() - began < TIMEOUT + BUSY
    assert caught.value.reason == "no-agent"


async def test_a_byte_at_a_time_does_not_put_off_the_deadline(tmp_path):
    class Slow(FakeAgent):
        async def serve(self, reader, writer):
            answer = b'\xff{"return": 1' + b" " * 1_000_000
            for byte in answer:
                writer.write(bytes([byte]))
                await asyncio.sleep(TIMEOUT / 5)

    async with serve_agent(tmp_path, Slow()) as path, connected(path, timeout=TIMEOUT) as client:
        began = time.monotonic()
        with pytest.raises(VcpuConnectionError):
            await client.get_vcpus()
        assert time.monotonic() - began < TIMEOUT + BUSY


@pytest.mark.parametrize(
    "before", [LONGEST_LINE - 3, LONGEST_LINE, LONGEST_LINE + 1, 3 * LONGEST_LINE + 77]
)
async def test_the_answer_to_the_sync_is_found_behind_a_line_of_any_length(tmp_path, before):
    agent = FakeAgent()
    agent.before_sync = b"\xff{" + b"x" * before
    async with serve_agent(tmp_path, agent) as path, connected(path) as client:
        assert len(await client.get_vcpus()) == 2


async def test_files_that_are_never_closed_cost_one_deadline_and_are_not_kept(tmp_path):
    """Each look opens some, and each closing of those would have waited for a second."""
    agent, opened = FakeAgent(), iter(range(1, 1_000_000))

    def open_file(command):
        return json.dumps({"return": next(opened), "id": command["id"]}).encode() + b"\n"

    agent.answers["guest-file-open"] = open_file
    agent.answers["guest-file-close"] = lambda command: None
    agent.answers["guest-file-read"] = lambda command: None
    async with serve_agent(tmp_path, agent) as path, connected(path, timeout=TIMEOUT) as client:
        for _ in range(4):
            began = time.monotonic()
            with pytest.raises(VcpuConnectionError):
                await client.read_files(dict.fromkeys((f"/f{n}" for n in range(60)), 10))
            # The reads, the sync after them that tells why, the closing and its sync.
            assert time.monotonic() - began < 6 * TIMEOUT + BUSY
        assert client.open_files <= 256


@pytest.mark.parametrize("handle", [1 << 63, -(1 << 70), 10**4000, 1.0, True])
async def test_a_handle_that_is_no_number_of_64_bits_is_no_file(tmp_path, handle):
    agent = FakeAgent()
    agent.answers["guest-file-open"] = lambda command: (
        json.dumps({"return": handle, "id": command["id"]}).encode() + b"\n"
    )
    async with serve_agent(tmp_path, agent) as path, connected(path) as client:
        assert (await client.read_files({"/f": 10}), client.open_files) == ([None], 0)
    assert "guest-file-read" not in [name for name, _ in agent.commands]


class Counting(FakeGuest):
    """How many clients it has."""

    clients = 0

    async def serve(self, reader, writer):
        self.clients += 1
        try:
            await super().serve(reader, writer)
        finally:
            self.clients -= 1


async def test_leaving_while_somebody_listens_closes_the_agents_socket(tmp_path):
    """The watcher asks the agent too, and may be anywhere in that."""
    left = []
    qemu = FakeQemu(plugged=(1,))
    guest = Counting(qemu)
    async with serve(tmp_path, qemu.script) as qmp, serve_agent(tmp_path, guest) as agent:
        for turns in range(60):
            async with qmpvcpu.connect(qmp, agent=agent) as domain, domain.events():
                qemu.connections[-1].event("RESET")
                for _ in range(turns):
                    await asyncio.sleep(0)
            left.append(domain)
        await until(lambda: guest.clients == 0, "the agent has no client any more")
    assert "closed" in repr(left[0])
