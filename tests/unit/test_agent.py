"""The agent's protocol, against an agent that does its worst."""

from __future__ import annotations

import asyncio
import json
import socket
import tracemalloc
from contextlib import asynccontextmanager

import pytest

from qmpvcpu import VcpuConnectionError
from tests.support.agent import LONGEST_LINE, AgentError, connect, connected
from tests.support.fake_agent import FakeAgent, serve_agent
from tests.support.waiting import DEADLINE, deadline, until

#: For an agent that does not answer in time, where its other answers come in time, seconds.
SOON = 1.0


@asynccontextmanager
async def talking(folder, agent, timeout=DEADLINE):
    async with serve_agent(folder, agent) as path, connected(path, timeout=timeout) as client:
        yield client


async def fails(client, reason):
    """A command of this client fails, for this reason."""
    with pytest.raises(VcpuConnectionError) as caught:
        await client.get_vcpus()
    assert caught.value.reason == reason
    return caught.value


def raw(value):
    """Answers a command with this, as it is."""
    return lambda command: value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"


async def test_vcpus_are_told(tmp_path):
    async with talking(tmp_path, FakeAgent({0: True, 1: False})) as client:
        assert [(row["logical-id"], row["online"]) for row in await client.get_vcpus()] == [
            (0, True),
            (1, False),
        ]


async def test_vcpus_are_set(tmp_path):
    agent = FakeAgent({0: True, 1: False})
    async with talking(tmp_path, agent) as client:
        assert (await client.set_vcpus({1: True}), agent.online) == (1, {0: True, 1: True})


async def test_a_connection_is_synced_once(tmp_path):
    agent = FakeAgent({0: True, 1: False})
    async with talking(tmp_path, agent) as client:
        await client.get_vcpus()
        await client.set_vcpus({1: True})
    names = [name for name, _ in agent.commands]
    assert names == ["guest-sync-delimited", "guest-get-vcpus", "guest-set-vcpus"]


async def test_what_an_earlier_client_left_behind_is_dropped(tmp_path):
    agent = FakeAgent()
    agent.before_sync = (
        b'half an answer {"retu' + b'\xff{"return": 4711}\n{"return": {}}\n\xffrubbish\n'
    )
    async with talking(tmp_path, agent) as client:
        assert len(await client.get_vcpus()) == 2


async def test_an_agent_without_ids_is_understood(tmp_path):
    agent = FakeAgent()
    agent.answers["guest-get-vcpus"] = raw({"return": []})
    async with talking(tmp_path, agent) as client:
        assert await client.get_vcpus() == []


odd_answers = pytest.mark.parametrize(
    "answer",
    [
        b"[" * 100_000 + b"\n",
        b"not JSON\n",
        b"\n",
        b"[]\n",
        {"id": "another", "return": {}},
        {"return": 1, "error": {"class": "x", "desc": "y"}},
        {"nothing": 1},
        {"error": "words"},
        {"error": {"class": "x"}},
        b'{"return": ' + b"9" * 5000 + b"}\n",
        b"\xff\xfe\n",
    ],
    ids=range(11),
)


@odd_answers
async def test_an_answer_that_cannot_be_is_an_error(tmp_path, answer):
    agent = FakeAgent()
    agent.answers["guest-get-vcpus"] = raw(answer)
    async with talking(tmp_path, agent) as client:
        error = await fails(client, "malformed")
    assert (error.outcome.exit_code, bool(error.hint)) == (7, True)


@odd_answers
async def test_after_an_answer_that_cannot_be_the_next_command_syncs_and_works(tmp_path, answer):
    agent = FakeAgent()
    agent.answers["guest-get-vcpus"] = raw(answer)
    async with talking(tmp_path, agent) as client:
        with pytest.raises(VcpuConnectionError):
            await client.get_vcpus()
        del agent.answers["guest-get-vcpus"]
        rows = await client.get_vcpus()
    syncs = [name for name, _ in agent.commands].count("guest-sync-delimited")
    assert (len(rows), syncs) == (2, 2)


async def test_an_endless_line_costs_bounded_memory(tmp_path):
    agent = FakeAgent()
    agent.answers["guest-get-vcpus"] = raw(b"x" * (LONGEST_LINE * 8))
    async with talking(tmp_path, agent) as client:
        tracemalloc.start()
        try:
            with pytest.raises(VcpuConnectionError, match="more than 1 MiB"):
                await client.get_vcpus()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < LONGEST_LINE * 24  # the scripted agent's own 8 included


async def test_after_an_endless_line_the_next_command_works(tmp_path):
    agent = FakeAgent()
    agent.answers["guest-get-vcpus"] = raw(b"x" * (LONGEST_LINE * 8))
    async with talking(tmp_path, agent) as client:
        with pytest.raises(VcpuConnectionError):
            await client.get_vcpus()
        del agent.answers["guest-get-vcpus"]
        assert len(await client.get_vcpus()) == 2


async def test_a_flood_before_the_sync_ends_at_the_deadline(tmp_path):
    async def flood(reader, writer):
        while True:
            writer.write(b'\xff{"return": 99}\n' * 1000)
            await writer.drain()

    agent = FakeAgent()
    agent.serve = flood
    async with talking(tmp_path, agent, timeout=SOON) as client:
        await fails(client, "no-agent")


async def test_silence_is_no_agent(tmp_path):
    agent = FakeAgent()
    agent.answers["guest-sync-delimited"] = raw(b"")
    async with talking(tmp_path, agent, timeout=SOON) as client:
        error = await fails(client, "no-agent")
    assert "qemu-ga" in error.hint


async def test_a_late_answer_is_dropped(tmp_path):
    agent = FakeAgent()
    agent.answers["guest-sync-delimited"] = raw(b"")
    async with talking(tmp_path, agent, timeout=SOON) as client:
        with pytest.raises(VcpuConnectionError):
            await client.get_vcpus()
        del agent.answers["guest-sync-delimited"]
        agent.before_sync = b'\xff{"return": 1}\n{"return": "the late one"}\n'
        assert len(await client.get_vcpus()) == 2


async def test_an_agent_that_was_restarted_is_told_from_none(tmp_path):
    agent = FakeAgent()
    agent.answers["guest-get-vcpus"] = raw(b"")
    async with talking(tmp_path, agent, timeout=SOON) as client:
        await fails(client, "agent-restarted")


async def test_a_closed_socket_is_opened_again_for_the_next_command(tmp_path):
    agent = FakeAgent()

    async def hang_up(reader, writer):
        await reader.readline()
        writer.close()

    serve, agent.serve = agent.serve, hang_up
    async with talking(tmp_path, agent) as client:
        await fails(client, "closed")
        agent.serve = serve
        assert len(await client.get_vcpus()) == 2


async def test_a_disabled_command_is_the_agents_error(tmp_path):
    agent = FakeAgent()
    text = "Command guest-set-vcpus has been disabled: the command is not allowed"
    agent.answers["guest-set-vcpus"] = raw({"error": {"class": "CommandNotFound", "desc": text}})
    async with talking(tmp_path, agent) as client:
        with pytest.raises(AgentError) as caught:
            await client.set_vcpus({1: True})
    assert (caught.value.error_class, caught.value.desc) == ("CommandNotFound", text)


async def test_the_guests_words_are_printable_and_bounded(tmp_path):
    agent = FakeAgent()
    agent.answers["guest-get-vcpus"] = raw(
        {"error": {"class": "C", "desc": "\x1b[31m" + "x" * 5000}}
    )
    async with talking(tmp_path, agent) as client:
        with pytest.raises(AgentError) as caught:
            await client.get_vcpus()
    assert (len(caught.value.desc), caught.value.desc.isprintable()) == (300, True)


async def test_files_are_read_many_at_once_and_each_handle_is_closed(tmp_path):
    agent = FakeAgent(files={f"/f{n}": str(n).encode() for n in range(40)})
    async with talking(tmp_path, agent) as client:
        found = await client.read_files(
            dict.fromkeys([*(f"/f{n}" for n in range(40)), "/none"], 100)
        )
    assert (found, agent.handles) == ([*(str(n).encode() for n in range(40)), None], {})


@pytest.mark.parametrize(
    "reply",
    [
        {},
        [],
        {"buf-b64": 5},
        {"buf-b64": "?"},
        {"buf-b64": "AAAA", "eof": False},
        {"buf-b64": "AAAA" * 400},
    ],
)
async def test_a_file_that_is_none_or_too_long_or_never_ends_is_none(tmp_path, reply):
    agent = FakeAgent(files={"/f": b""})
    agent.answers["guest-file-read"] = answer(lambda command: reply)
    async with talking(tmp_path, agent) as client:
        found = await client.read_files({"/f": 1000})
    assert (found, agent.handles) == ([None], {})


def answer(give):
    return lambda command: (
        json.dumps({"return": give(command), "id": command["id"]}).encode() + b"\n"
    )


async def test_files_that_come_in_drips_cost_twice_the_deadline(tmp_path):
    agent = FakeAgent(files={f"/f{n}": b"x" for n in range(40)})
    agent.answers["guest-file-read"] = answer(
        lambda command: {"count": 1, "buf-b64": "YQ==", "eof": False}
    )
    async with talking(tmp_path, agent, timeout=SOON) as client:
        # At this pace the whole of one file would take longer than the test may.
        async with deadline("the files are given up"):
            found = await client.read_files(dict.fromkeys(agent.files, 1 << 23))
        assert found == [None] * 40
        assert len(await client.get_vcpus()) == 2
    assert agent.handles == {}


async def test_a_handle_whose_answer_came_too_late_is_closed_all_the_same(tmp_path):
    agent = FakeAgent(files={"/f": b"x", "/g": b"y"})
    kept = []

    def late(command):
        kept.append(
            json.dumps(
                agent.answer("guest-file-open", command["arguments"]) | {"id": command["id"]}
            )
        )

    def sync(command):
        agent.answers.pop("guest-file-open", None)
        text = "".join(line + "\n" for line in kept).encode()
        return text + b"\xff" + json.dumps({"return": command["arguments"]["id"]}).encode() + b"\n"

    async with talking(tmp_path, agent, timeout=SOON) as client:
        await client.get_vcpus()
        agent.answers |= {"guest-file-open": late, "guest-sync-delimited": sync}
        with pytest.raises(VcpuConnectionError):
            await client.read_files({"/f": 10, "/g": 10})
        assert len(kept) == 2
        assert agent.handles == {}


async def test_one_command_that_is_not_allowed_leaves_no_file_open(tmp_path):
    agent = FakeAgent(files={"/f": b"x"})

    def some(command):
        if command["arguments"]["path"] == "/f":
            return (
                json.dumps(
                    agent.answer("guest-file-open", command["arguments"]) | {"id": command["id"]}
                ).encode()
                + b"\n"
            )
        return b'{"error": {"class": "CommandNotFound", "desc": "no"}}\n'.replace(
            b"}}", b'}, "id": "%s"}' % command["id"].encode()
        )

    agent.answers["guest-file-open"] = some
    async with talking(tmp_path, agent) as client:
        with pytest.raises(AgentError):
            await client.read_files({"/f": 10, "/g": 10})
    assert agent.handles == {}


async def test_ids_are_drawn(tmp_path):
    """An earlier client's, one process before, were as likely as ours."""
    numbers = []
    for _ in range(2):
        agent = FakeAgent()
        async with talking(tmp_path, agent) as client:
            await client.get_vcpus()
        numbers.append(agent.commands[0][1]["id"])
        (tmp_path / "fake.agent").unlink(missing_ok=True)
    assert abs(numbers[0] - numbers[1]) > 1000


async def test_what_an_earlier_client_asked_is_not_taken_for_ours(tmp_path):
    agent = FakeAgent()
    agent.before_sync = (
        b'\xff{"return": 1}\n{"error": {"class": "GenericError", "desc": "JSON'
        b' parse error, stray"}}\n'
    )
    async with talking(tmp_path, agent) as client:
        assert len(await client.get_vcpus()) == 2


async def test_an_error_that_is_not_ours_is_not_an_answer_where_the_agent_repeats_ids(tmp_path):
    agent = FakeAgent()
    async with talking(tmp_path, agent) as client:
        await client.get_vcpus()
        agent.answers["guest-get-vcpus"] = raw(
            b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n'
        )
        await fails(client, "malformed")
        del agent.answers["guest-get-vcpus"]
        assert len(await client.get_vcpus()) == 2


@pytest.fixture
async def deaf():
    """A connection to a peer that does not read, once the socket is full."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel makes it its smallest
        async with connected(f"fd:{ours.fileno()}", timeout=0.001) as client:
            await until(lambda: unanswered(client), "the socket is full")
            yield client


async def unanswered(client):
    """How much waits to be sent after one command more."""
    with pytest.raises(VcpuConnectionError):
        await client.get_vcpus()
    return client.unsent_bytes


async def test_commands_to_a_peer_that_does_not_read_do_not_pile_up(deaf):
    waiting = deaf.unsent_bytes
    assert [await unanswered(deaf) for _ in range(10)] == [waiting] * 10


async def test_closing_does_not_wait_for_a_peer_that_does_not_read(deaf):
    async with deadline("the connection is closed"):
        await deaf.close()


@pytest.mark.parametrize(("address", "reason"), [("none", "missing"), ("file", "refused")])
async def test_no_socket(tmp_path, address, reason):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(VcpuConnectionError) as caught:
        await connect(str(tmp_path / address))
    assert (caught.value.reason, bool(caught.value.hint)) == (reason, True)


async def test_a_cancelled_command_leaves_no_answer_for_the_next(tmp_path):
    agent = FakeAgent()
    agent.answers["guest-ping"] = raw(b"")
    async with talking(tmp_path, agent) as client:
        await client.get_vcpus()
        task = asyncio.create_task(client.command("guest-ping"))
        await until(lambda: agent.commands[-1][0] == "guest-ping", "the agent has the command")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        agent.before_sync = b'{"return": {}}\n'
        assert len(await client.get_vcpus()) == 2


async def test_slow_answers_share_one_limit(tmp_path):
    agent = FakeAgent()
    agent.pause = 0.1
    async with talking(tmp_path, agent) as client:
        with pytest.raises(
            VcpuConnectionError, match=r"not answer 'guest-get-vcpus' before 0\.5 s"
        ):
            with client.limit(0.5):
                for _ in range(100):
                    await client.get_vcpus()
        # Beyond the limit only its own deadline counts.
        assert len(await client.get_vcpus()) == 2


async def test_a_limit_within_another_cannot_be_longer(tmp_path):
    agent = FakeAgent()
    agent.pause = 0.1
    async with talking(tmp_path, agent) as client:
        with pytest.raises(VcpuConnectionError, match=r"before 0\.3 s were over"):
            with client.limit(0.3), client.limit(60):
                for _ in range(100):
                    await client.get_vcpus()
