"""What a person thinks of who means harm, against the command line: exit code, one document,
memory, deadline.

In the suite they are small and in a hurry; `scripts/soak hostile` runs them as large as they are
meant, with the deadlines that users have, and prints the figures.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from qmpvcpu import OutcomeKind
from tests.support import measured, soaking
from tests.support.commands import cli
from tests.support.fake_agent import serve_agent
from tests.support.fake_guest import FakeGuest
from tests.support.fake_qemu import FakeQemu, error
from tests.support.fake_qmp import GREETING, serve

LONG = soaking.is_long_run()
#: Entries of a list, and bytes of a line.
MANY, LINE = (1_000_000, 1 << 30) if LONG else (70_000, 40 << 20)
#: The whole command: connecting has 5 s and a QMP command 10 s, the agent 5 s for a look; and a
#: busy machine.
WITHIN = 45 if LONG else 15
#: MiB. Python and our modules have 40; a line of QMP 32, once as it is read, and once and twice as
#: text.
MEMORY = 300
#: Seconds between two bytes of a slow server.
PAUSE = 1.0 if LONG else 0.1

ENABLE = ("setvcpu", "2", "--enable", "--timeout", "2")
DISABLE = ("setvcpu", "1", "--disable", "--timeout", "1")


@dataclass
class Machine:
    """What a shape changes: a faithful QEMU and guest, and what is served instead of the first."""

    qemu: FakeQemu
    guest: FakeGuest
    script: Callable[..., Awaitable[None]]
    words: tuple[str, ...] = ENABLE

    def answers(self, name, said):
        """To this command, whatever it asks, these bytes, in which ID stands for its id."""

        def hook(connection, command):
            if command["execute"] == name:
                connection.raw(said.replace(b"ID", command["id"].encode()) + b"\n")
                return True
            return False

        self.qemu.hook = hook

    def guest_answers(self, name, said):
        self.guest.answers[name] = lambda command: (
            said.replace(b"ID", command["id"].encode()) + b"\n"
        )

    def after(self, name, act):
        """Called once this command has come."""

        def hook(connection, command):
            if command["execute"] == name:
                act(connection, command)
            return False

        self.qemu.hook = hook

    def besides(self, work):
        """Goes on as long as the connection does, after the greeting."""

        async def script(connection):
            async def later():
                await asyncio.sleep(0.05)
                await work(connection)

            task = asyncio.ensure_future(later())
            try:
                await self.qemu.script(connection)
            finally:
                task.cancel()

        self.script = script


async def forever(connection):
    await asyncio.Event().wait()


async def endless(connection, said=b"x" * (1 << 20), count=sys.maxsize):
    for _ in range(count):
        connection.raw(said)
        await connection.writer.drain()


async def slowly(connection, said):
    for byte in said:
        connection.raw(bytes([byte]))
        await asyncio.sleep(PAUSE)


def many(entry):
    return b'{"return": [' + b",".join([entry] * MANY) + b'], "id": "ID"}'


def a_million_slots(machine):
    machine.answers("query-hotpluggable-cpus", many(b"{}"))


def a_million_whole_slots(machine):
    machine.answers(
        "query-hotpluggable-cpus",
        many(b'{"type": "t", "vcpus-count": 1, "props": {"socket-id": 1}}'),
    )


def a_million_cpus(machine):
    machine.answers("query-cpus-fast", many(b'{"cpu-index": 1, "thread-id": 1, "qom-path": "x"}'))


def a_million_cpus_of_the_guest(machine):
    machine.guest_answers("guest-get-vcpus", many(b'{"logical-id": 1, "online": true}'))


def a_byte_at_a_time(machine):
    machine.qemu.hook = lambda connection, command: True
    machine.besides(lambda connection: slowly(connection, b'{"return": ' + b" " * 1000))


def a_greeting_a_byte_at_a_time(machine):
    machine.script = lambda connection: slowly(connection, json.dumps(GREETING).encode() + b"\n")


def a_byte_at_a_time_from_the_agent(machine):
    async def serve(reader, writer):
        for byte in b'\xff{"return": ' + b" " * 1000:
            writer.write(bytes([byte]))
            await asyncio.sleep(PAUSE)

    machine.guest.serve = serve


def indices_beyond_64_bits(machine):
    row = b'{"cpu-index": 1%b, "thread-id": 1%b, "qom-path": "x"}' % (b"0" * 400, b"0" * 400)
    machine.answers("query-cpus-fast", b'{"return": [' + row + b'], "id": "ID"}')


def counts_beyond_all_numbers(machine):
    row = b'{"type": "t", "vcpus-count": 1e999, "props": {"socket-id": -1e999}}'
    machine.answers("query-hotpluggable-cpus", b'{"return": [' + row + b'], "id": "ID"}')


def a_number_of_thousands_of_digits(machine):
    machine.answers("query-kvm", b'{"return": ' + b"9" * 5000 + b', "id": "ID"}')


def logical_ids_beyond_64_bits(machine):
    row = b'{"logical-id": 1' + b"0" * 400 + b', "online": true}'
    machine.guest_answers("guest-get-vcpus", b'{"return": [' + row + b'], "id": "ID"}')


def replies_to_earlier_questions(machine):
    ids = []

    def hook(connection, command):
        ids.append(command["id"])
        command["id"] = ids[max(len(ids) - 2, 0)]
        return False

    machine.qemu.hook = hook


def replies_of_the_agent_to_earlier_questions(machine):
    earlier = []

    def answer(command):
        earlier.append(command["id"])
        return (
            json.dumps(
                {"return": [], "id": earlier[-2] if len(earlier) > 1 else "qmpvcpu#0"}
            ).encode()
            + b"\n"
        )

    machine.guest.answers["guest-get-vcpus"] = answer


def events_without_end(machine):
    event = b'{"event": "DEVICE_DELETED", "data": {"path": "/machine/peripheral/vcpu9"}}\n'
    machine.besides(lambda connection: endless(connection, event * 2000))


def events_without_end_while_the_guest_is_asked(machine):
    machine.qemu.on_delete[1] = "silence"
    machine.words = DISABLE
    events_without_end(machine)


def events_without_end_before_the_handshake(machine):
    async def script(connection):
        connection.send(GREETING)
        await endless(connection, b'{"event": "RESUME"}\n' * 5000)

    machine.script = script


def lines_without_end(machine):
    machine.besides(lambda connection: endless(connection, b"{}\n" * 100_000))


def a_slot_list_that_shrinks_during_enable(machine):
    machine.after("device_add", lambda connection, command: setattr(machine.qemu, "slots", 2))


def a_slot_list_that_shrinks_during_disable(machine):
    def act(connection, command):
        machine.qemu.slots = 1
        machine.qemu.paths = {0: machine.qemu.paths[0]}

    machine.words = DISABLE
    machine.qemu.on_delete[1] = "silence"
    machine.after("device_del", act)


def a_line_without_end(machine):
    machine.after("query-kvm", lambda connection, command: connection.raw(b'{"return": "'))
    machine.besides(lambda connection: endless(connection, count=LINE >> 20))


def a_text_of_wide_characters(machine):
    """Just within the limit; one that is wide makes all of them four times as large in memory."""
    text = b"\\ud83d\\ude00" + b"x" * ((32 << 20) - 1000)
    machine.answers("query-target", b'{"return": {"arch": "' + text + b'"}, "id": "ID"}')


def a_line_of_the_agent_without_end(machine):
    async def serve(reader, writer):
        for _ in range(LINE >> 20):
            writer.write(b"x" * (1 << 20))
            await writer.drain()
        await asyncio.Event().wait()

    machine.guest.serve = serve


def a_greeting_that_never_comes(machine):
    machine.script = forever


def a_greeting_without_end(machine):
    machine.script = lambda connection: endless(connection, count=LINE >> 20)


def a_greeting_of_a_million_values(machine):
    async def script(connection):
        connection.raw(b'{"QMP": {"version": {}, "capabilities": [' + b"[]," * MANY * 3 + b"1]}}\n")
        await forever(connection)

    machine.script = script


def a_server_that_closes_after_each_command(machine):
    machine.after("query-target", lambda connection, command: connection.close())


def a_server_that_never_answers(machine):
    machine.qemu.hook = lambda connection, command: True


def an_agent_that_never_answers(machine):
    async def serve(reader, writer):
        await asyncio.Event().wait()

    machine.guest.serve = serve


def control_characters_in_an_error(machine):
    def hook(connection, command):
        if command["execute"] == "device_add":
            error(
                connection,
                command,
                "\x1b[2Jno\x07\x9b31m\u202e\ud800\nsecond line",
                "Generic\x1bError",
            )
            return True
        return False

    machine.qemu.hook = hook


#: Each with how it ends.
SHAPES = {
    a_million_slots: {"connection"},
    a_million_whole_slots: {"connection"},
    a_million_cpus: {"connection"},
    a_million_cpus_of_the_guest: {"applied", "pending"},
    a_byte_at_a_time: {"connection"},
    a_greeting_a_byte_at_a_time: {"connection"},
    a_byte_at_a_time_from_the_agent: {"applied", "pending"},
    indices_beyond_64_bits: {"connection"},
    counts_beyond_all_numbers: {"connection"},
    a_number_of_thousands_of_digits: {"connection"},
    logical_ids_beyond_64_bits: {"applied", "pending"},
    replies_to_earlier_questions: {"connection"},
    replies_of_the_agent_to_earlier_questions: {"applied", "pending"},
    events_without_end: {"applied", "connection"},
    events_without_end_while_the_guest_is_asked: {"pending", "connection"},
    events_without_end_before_the_handshake: {"connection"},
    lines_without_end: {"applied", "connection"},
    a_slot_list_that_shrinks_during_enable: {"connection", "failed"},
    a_slot_list_that_shrinks_during_disable: {"connection"},
    a_line_without_end: {"connection"},
    a_text_of_wide_characters: {"connection"},
    a_line_of_the_agent_without_end: {"applied", "pending"},
    a_greeting_that_never_comes: {"connection"},
    a_greeting_without_end: {"connection"},
    a_greeting_of_a_million_values: {"connection"},
    a_server_that_closes_after_each_command: {"connection"},
    a_server_that_never_answers: {"connection"},
    an_agent_that_never_answers: {"applied", "pending"},
    control_characters_in_an_error: {"failed"},
}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
async def test_a_hostile_shape_ends_the_command_in_time_and_memory(tmp_path, monkeypatch, shape):
    qemu = FakeQemu(plugged=(1,))
    monkeypatch.setenv(measured.PEAK, str(tmp_path / "memory"))
    if not LONG:
        monkeypatch.setenv(measured.STEP, "0.5")
    machine = Machine(qemu, FakeGuest(qemu), qemu.script)
    shape(machine)
    async with (
        serve(tmp_path, machine.script) as qmp,
        serve_agent(tmp_path, machine.guest) as agent,
    ):
        name, *words = machine.words
        began = time.monotonic()
        run = await cli("--json", name, qmp, *words, "--agent", agent)
        seconds = time.monotonic() - began
    memory = float((tmp_path / "memory").read_text())
    if LONG:
        print(f"\n{shape.__name__}: {seconds:.1f} s, {memory:.0f} MiB, {run.json['outcome']}")
    assert run.stdout.count("\n") == 1, run.stdout
    assert run.json["outcome"] in SHAPES[shape], run.stdout
    assert run.code == OutcomeKind(run.json["outcome"]).exit_code
    assert all(char == "\n" or char.isprintable() for char in run.stderr), repr(run.stderr)
    assert (seconds < WITHIN, memory < MEMORY) == (True, True), f"{seconds:.1f} s, {memory:.0f} MiB"
