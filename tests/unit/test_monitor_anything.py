"""Whatever a server says, in whatever pieces: the monitor ends a command, and only with its own
errors.
"""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpvcpu import VcpuConnectionError
from tests.support.fake_qmp import GREETING, Connection, answering, serve
from tests.support.monitor import Event, QmpError, connected, ends
from tests.support.waiting import deadline, within

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
ERROR = st.fixed_dictionaries({}, optional={"class": JSON, "desc": JSON})
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "return": JSON,
        "error": JSON | ERROR,
        "event": JSON,
        "data": JSON,
        "timestamp": JSON
        | st.fixed_dictionaries({}, optional={"seconds": JSON, "microseconds": JSON}),
        "id": JSON,
        "QMP": JSON,
    },
)
LINE = MESSAGE.map(lambda message: json.dumps(message).encode()) | st.binary(max_size=30)


async def answers(said, right_id):
    """What a command ends with when the server says `said` and closes."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    server = Connection(reader, writer)

    async def serve_one():
        await server.greet()
        command = await server.receive()
        for line in said:
            server.raw(line + b"\n")
        if right_id is not None:
            server.send(right_id | {"id": command["id"]})
        writer.close()

    task = asyncio.ensure_future(serve_one())
    heard = []
    try:
        async with deadline("an answer"), connected(f"fd:{ours.fileno()}") as monitor:
            with monitor.listening(heard.append):
                return await monitor.command("query-status"), heard
    finally:
        await task
        writer.close()
        ours.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(LINE, max_size=3), st.none() | MESSAGE)
def test_a_command_ends_with_a_reply_or_an_error_of_ours(said, right_id):
    try:
        asyncio.run(answers(said, right_id))
    except VcpuConnectionError as error:
        assert error.reason in ("closed", "malformed")
        assert error.hint
    except QmpError as error:
        assert (type(error.error_class), type(error.desc)) == (str, str)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=2), max_size=4))
def test_events_of_any_data_come_in_order_before_the_reply(all_data):
    said = [
        json.dumps({"event": f"E{n}", "data": data}).encode() for n, data in enumerate(all_data)
    ]
    reply, heard = asyncio.run(answers(said, {"return": "ok"}))
    names = [event.name for event in heard if isinstance(event, Event)]
    assert (reply, names) == ("ok", [f"E{n}" for n in range(len(all_data))])


async def test_a_reply_may_come_a_byte_at_a_time_and_glued_to_what_follows(tmp_path):
    async def script(connection):
        for byte in json.dumps(GREETING).encode() + b"\r\n":
            connection.raw(bytes([byte]))
            await connection.writer.drain()
        command = await connection.receive()
        connection.send({"return": {}})
        command = await connection.receive()
        reply = {"return": "whole", "id": command["id"]}
        text = (
            json.dumps({"event": "A"})
            + "\n"
            + json.dumps(reply)
            + "\n"
            + json.dumps({"event": "B"})
            + "\n"
        )
        connection.raw(text[:7].encode())
        await connection.writer.drain()
        connection.raw(text[7:].encode())
        await connection.receive()

    heard = asyncio.Queue()
    async with serve(tmp_path, script) as path, connected(path) as monitor:
        with monitor.listening(heard.put_nowait):
            assert await monitor.command("query-status") == "whole"
            assert [(await heard.get()).name, (await heard.get()).name] == ["A", "B"]


async def test_a_listener_that_leaves_hears_nothing_and_the_others_do(tmp_path):
    def answer(connection, command):
        connection.event("A")
        return {}

    stayed, left = [], []
    async with serve(tmp_path, answering(answer)) as path, connected(path) as monitor:
        with monitor.listening(stayed.append):
            with monitor.listening(left.append):
                pass
            await monitor.command("query-status")
    assert (len(stayed), left) == (1, [])


async def test_a_lost_connection_is_the_last_thing_a_listener_hears(tmp_path):
    def answer(connection, command):
        for number in range(50):
            connection.event(f"E{number}")
        connection.close()

    heard = []
    async with serve(tmp_path, answering(answer)) as path, connected(path) as monitor:
        with monitor.listening(heard.append):
            with pytest.raises(VcpuConnectionError):
                await monitor.command("query-status")
    assert [event.name for event in heard[:-1]] == [f"E{number}" for number in range(50)]
    assert isinstance(heard[-1], VcpuConnectionError)


async def test_all_commands_under_way_end_when_the_connection_does(tmp_path):
    read = []

    def answer(connection, command):
        read.append(command)
        if len(read) == 10:
            connection.close()

    async with (
        serve(tmp_path, answering(answer)) as path,
        connected(path, command_timeout=600) as monitor,
    ):
        found = await within(ends(monitor, 10), "all of them end")
    assert {getattr(end, "reason", end) for end in found} == {"closed"}


async def test_a_cancelled_command_leaves_the_others_their_replies(tmp_path):
    held = []
    both = asyncio.Event()

    def answer(connection, command):
        held.append((connection, command))
        if len(held) == 2:
            both.set()

    async with serve(tmp_path, answering(answer)) as path, connected(path) as monitor:
        first, second = (asyncio.ensure_future(monitor.command("query-status")) for _ in range(2))
        await both.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        for number, (connection, command) in enumerate(held):
            connection.reply(command, number)
        assert await second == 1


async def test_closing_twice_and_after_a_loss_is_quiet(tmp_path):
    async def script(connection):
        await connection.greet()
        connection.close()

    heard = asyncio.Queue()
    async with serve(tmp_path, answering(lambda connection, command: {})) as path:
        async with connected(path) as monitor:
            with monitor.listening(heard.put_nowait):
                await monitor.close()
                await monitor.close()
    assert heard.empty()  # closing is no loss


async def test_a_failed_connection_leaves_the_callers_descriptor_open():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"hello\r\n")
        with pytest.raises(VcpuConnectionError) as caught:
            async with connected(f"fd:{ours.fileno()}"):
                pass
        assert caught.value.reason == "not-qmp"
        ours.getpeername()
