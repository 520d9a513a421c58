"""The QMP monitor against a server that misbehaves, and addresses that lead nowhere."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import stat
import tracemalloc

import pytest

from qmpvcpu import QmpLog, VcpuConnectionError, VcpuUsageError
from tests.support.fake_qmp import GREETING, Connection, answering, serve
from tests.support.monitor import Event, QmpError, connected, ends, meaning
from tests.support.waiting import DEADLINE, until, within


async def forever(connection):
    await asyncio.Event().wait()


async def fails(address, reason, **options):
    with pytest.raises(VcpuConnectionError) as error:
        async with connected(address, **options):
            pass
    assert error.value.reason == reason, error.value
    assert error.value.hint
    return error.value


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/a.sock", "/run/a.sock"),
        ("a.sock", "a.sock"),
        ("localhost:4444", ("localhost", 4444)),
        ("[::1]:4444", ("::1", 4444)),
        ("fd:7", 7),
        ("./host:4444", "./host:4444"),
        ("unix:/run/a.sock", "/run/a.sock"),
        ("unix:a.sock,server=on,wait=off", "a.sock"),
        ("unix:/run/a,b,server,nowait", "/run/a,b"),
        ("unix:4444", "4444"),
        ("tcp:host:4444", ("host", 4444)),
        ("tcp:[::1]:4444,server=on", ("::1", 4444)),
        ("tcp:4444", ("tcp", 4444)),
    ],
)
def test_addresses(text, address):
    assert meaning(text) == address


def test_a_port_that_cannot_be_is_usage():
    with pytest.raises(VcpuUsageError):
        meaning("host:70000")


@pytest.mark.parametrize(
    ("name", "reason"), [("nowhere", "missing"), ("", "not-qmp"), ("long" * 50, "other")]
)
async def test_a_path_that_leads_nowhere_is_said_at_once(tmp_path, name, reason):
    await fails(str(tmp_path / name), reason)


async def test_a_socket_where_nobody_listens_is_said_at_once(tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "stale"))
    await fails(str(tmp_path / "stale"), "refused")


async def test_a_file_is_said_at_once(tmp_path):
    (tmp_path / "plain").write_text("<domain/>")
    await fails(str(tmp_path / "plain"), "not-qmp")


async def test_a_port_where_nobody_listens_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        await fails(f"127.0.0.1:{free.getsockname()[1]}", "refused")


async def test_a_descriptor_that_is_not_open_is_said_at_once():
    await fails("fd:987", "missing")


async def test_a_descriptor_that_is_not_a_socket_is_said_at_once():
    reader, writer = os.pipe()
    try:
        await fails(f"fd:{reader}", "not-qmp")
    finally:
        os.close(reader)
        os.close(writer)


async def test_a_server_that_accepts_and_never_greets(tmp_path):
    async with serve(tmp_path, forever) as path:
        error = await fails(path, "no-greeting", connect_timeout=0.2)
    assert "takes one at a time" in error.hint


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b'{"hello": 1}\r\n',
        b'{"QMP": 3}\r\n',
        b"[]\r\n",
        b"\xff\xfe\x00\r\n",
        b"[" * 100000 + b"\r\n",
        b'{"QMP": ' + b"9" * 5000 + b"}\r\n",
        b"(qemu) \r\n",
        b'{"QMP": {"version"',
    ],
    ids=range(9),
)
async def test_a_server_that_is_not_qmp(tmp_path, said):
    async def script(connection):
        connection.raw(said)
        connection.writer.write_eof()
        await forever(connection)

    async with serve(tmp_path, script) as path:
        await fails(path, "not-qmp")


async def test_a_server_that_closes_at_once(tmp_path):
    async def script(connection):
        connection.close()

    async with serve(tmp_path, script) as path:
        error = await fails(path, "not-qmp")
    assert "without a greeting" in str(error)


async def test_an_endless_line_costs_bounded_memory(tmp_path):
    async def script(connection):
        await connection.greet()
        await connection.receive()
        while True:
            connection.raw(b"x" * (1 << 20))
            await connection.writer.drain()

    async with serve(tmp_path, script) as path, connected(path) as monitor:
        with pytest.raises(VcpuConnectionError, match="more than 32 MiB") as error:
            await monitor.command("query-status")
    assert error.value.reason == "malformed"


@pytest.mark.parametrize(
    "said",
    [
        b"garbage\r\n",
        b"[" * 100000 + b"\r\n",
        b'{"return": ' + b"9" * 5000 + b"}\r\n",
        b"\xff\r\n",
        b"3\r\n",
    ],
)
async def test_garbage_in_mid_session_ends_the_command_at_once(tmp_path, said):
    def answer(connection, command):
        connection.raw(said)

    async with serve(tmp_path, answering(answer)) as path, connected(path) as monitor:
        assert [end.reason for end in await ends(monitor, 1)] == ["malformed"]


async def test_after_garbage_no_command_is_sent_any_more(tmp_path):
    async with serve(
        tmp_path, answering(lambda connection, command: connection.raw(b"garbage\r\n"))
    ) as path:
        async with connected(path) as monitor:
            await ends(monitor, 1)
            with pytest.raises(VcpuConnectionError):
                await monitor.command("query-status")


@pytest.mark.parametrize("reply", [{"error": 3}, {"error": {"class": "X"}}, {"nothing": 1}])
async def test_a_malformed_reply_is_told(tmp_path, reply):
    def answer(connection, command):
        connection.send(reply | {"id": command["id"]})

    async with serve(tmp_path, answering(answer)) as path, connected(path) as monitor:
        with pytest.raises(VcpuConnectionError) as error:
            await monitor.command("query-status")
    assert error.value.reason == "malformed"


@pytest.fixture
async def cut_off(tmp_path):
    """What the command ends with, and what a listener hears, where a server closes in the middle of
    a reply.
    """

    def answer(connection, command):
        connection.raw(b'{"ret')
        connection.close()

    heard = []
    async with serve(tmp_path, answering(answer)) as path, connected(path) as monitor:
        with monitor.listening(heard.append):
            (end,) = await ends(monitor, 1)
    return end, heard


async def test_a_connection_closed_in_the_middle_of_a_command_ends_it_at_once(cut_off):
    end, _ = cut_off
    assert end.reason in ("closed", "malformed")


async def test_a_listener_hears_why_a_command_has_failed(cut_off):
    end, heard = cut_off
    assert [lost.reason for lost in heard] == [end.reason]


@pytest.fixture
async def lost(tmp_path):
    """What is heard of a server that tells STOP and closes: by a listener then, and by one that
    comes late.
    """
    listening = asyncio.Event()

    async def script(connection):
        await connection.greet()
        await listening.wait()
        connection.event("STOP")
        connection.close()

    early, late = asyncio.Queue(), asyncio.Queue()
    async with serve(tmp_path, script) as path, connected(path) as monitor:
        with monitor.listening(early.put_nowait):
            listening.set()
            heard = [await early.get(), await early.get()]
        with monitor.listening(late.put_nowait):
            return heard, late.get_nowait()


async def test_a_lost_connection_reaches_listeners_while_nobody_asks(lost):
    (event, loss), _ = lost
    assert (event.name, type(loss), loss.reason) == ("STOP", VcpuConnectionError, "closed")


async def test_a_listener_that_comes_late_is_told_of_the_loss_too(lost):
    (_, loss), late = lost
    assert late is loss


async def test_a_server_that_is_killed_in_the_middle_of_the_handshake(tmp_path):
    """With what it was sent unread, the connection is reset."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "qmp"))
        server.listen()
        server.setblocking(False)

        async def die():
            sock, _ = await loop.sock_accept(server)
            await loop.sock_sendall(sock, json.dumps(GREETING).encode() + b"\n")
            asked = asyncio.Event()
            loop.add_reader(sock, asked.set)
            await asked.wait()
            loop.remove_reader(sock)
            sock.close()

        death = asyncio.create_task(die())
        error = await within(fails(str(tmp_path / "qmp"), "closed"), "it fails")
        await death
    assert "closed the connection before the handshake was done" in str(error)


async def test_a_server_that_closes_right_after_negotiation(tmp_path):
    async def script(connection):
        await connection.greet()
        connection.close()

    async with serve(tmp_path, script) as path:
        try:
            async with connected(path) as monitor:
                with pytest.raises(VcpuConnectionError):
                    await monitor.command("query-status")
        except VcpuConnectionError as error:
            assert error.reason == "closed"


async def test_an_error_of_qemu_keeps_its_class_and_text(tmp_path):
    def answer(connection, command):
        connection.send(
            {
                "error": {"class": "DeviceNotFound", "desc": "Device 'x' not found"},
                "id": command["id"],
            }
        )

    async with serve(tmp_path, answering(answer)) as path, connected(path) as monitor:
        with pytest.raises(QmpError) as error:
            await monitor.command("device_del", id="x")
    assert (error.value.error_class, error.value.desc) == ("DeviceNotFound", "Device 'x' not found")


async def test_no_answer_is_a_timeout_and_the_late_reply_belongs_to_nobody(tmp_path):
    held = []

    def answer(connection, command):
        if not held:
            held.append(command)
            return None
        connection.reply(held[0], "late")
        return "mine"

    async with (
        serve(tmp_path, answering(answer)) as path,
        connected(path, command_timeout=1) as monitor,
    ):
        with pytest.raises(VcpuConnectionError, match="did not answer 'query-status'") as error:
            await monitor.command("query-status")
        mine = await monitor.command("query-status")
    assert (error.value.reason, error.value.libvirt, mine) == (
        "timeout",
        "VIR_ERR_OPERATION_TIMEOUT",
        "mine",
    )


async def test_of_many_commands_only_the_oldest_is_on_the_clock(tmp_path):
    async def answer(connection, command):
        await asyncio.sleep(0.2)  # the work of a slow QEMU: all together take longer than one may
        return command["id"]

    async with (
        serve(tmp_path, answering(answer)) as path,
        connected(path, command_timeout=1.5) as monitor,
    ):
        replies = await asyncio.gather(*(monitor.command("query-status") for _ in range(10)))
    assert len(set(replies)) == 10


async def test_a_qemu_that_hangs_ends_all_commands_together(tmp_path):
    async with serve(tmp_path, answering(lambda connection, command: None)) as path:
        async with connected(path, command_timeout=0.2) as monitor:
            # One deadline after the other would be 200 s.
            results = await within(ends(monitor, 1000), "all of them end")
    assert {result.reason for result in results} == {"timeout"}


def delete(connection, command):
    connection.event("DEVICE_DELETED", device="vcpu1")
    return {}


async def test_an_event_reaches_the_listener_before_the_reply_behind_it(tmp_path):
    heard = []
    async with serve(tmp_path, answering(delete)) as path, connected(path) as monitor:
        with monitor.listening(heard.append):
            await monitor.command("device_del", id="vcpu1")
            assert heard == [Event("DEVICE_DELETED", {"device": "vcpu1"}, 1.000005)]


async def test_who_has_left_hears_no_more_events(tmp_path):
    heard = []
    async with serve(tmp_path, answering(delete)) as path, connected(path) as monitor:
        with monitor.listening(heard.append):
            pass
        await monitor.command("device_del", id="vcpu1")
    assert heard == []


async def test_an_event_of_a_wrong_shape_harms_nothing(tmp_path):
    def answer(connection, command):
        connection.send({"event": 7, "data": [], "timestamp": {"seconds": "x"}})
        connection.send({"event": "A", "timestamp": {"seconds": 10**400, "microseconds": True}})
        return {}

    async with serve(tmp_path, answering(answer)) as path, connected(path) as monitor:
        heard = []
        with monitor.listening(heard.append):
            await monitor.command("query-status")
    assert [event.time for event in heard] == [0.0, 0.0]


async def test_a_reply_of_five_thousand_cpus(tmp_path):
    rows = [
        {"cpu-index": n, "qom-path": f"/machine/peripheral/vcpu{n}" + "x" * 200}
        for n in range(5000)
    ]
    async with (
        serve(tmp_path, answering(lambda connection, command: rows)) as path,
        connected(path) as monitor,
    ):
        assert await monitor.command("query-cpus-fast") == rows


async def test_an_inherited_descriptor_is_an_address(tmp_path):
    async with serve(tmp_path, answering(lambda connection, command: "ok")) as path:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            async with connected(f"fd:{sock.fileno()}") as monitor:
                assert await monitor.command("query-status") == "ok"


async def test_an_inherited_descriptor_stays_the_callers(tmp_path):
    async with serve(tmp_path, answering(lambda connection, command: "ok")) as path:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            async with connected(f"fd:{sock.fileno()}"):
                pass
            assert os.fstat(sock.fileno())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_tcp(host, tmp_path):
    script = answering(lambda connection, command: "ok")

    async def client(reader, writer):
        await script(Connection(reader, writer))
        writer.close()

    server = await asyncio.start_server(client, host, 0)
    port = server.sockets[0].getsockname()[1]
    async with connected(f"[{host}]:{port}" if ":" in host else f"{host}:{port}") as monitor:
        assert await monitor.command("query-status") == "ok"
    server.close()


@pytest.fixture
async def log(tmp_path):
    """The log of one command, into a file that was there and readable for everybody."""
    path = tmp_path / "log"
    path.write_text("")
    path.chmod(0o644)
    log = QmpLog(path)
    async with serve(tmp_path, answering(lambda connection, command: "ok")) as address:
        async with connected(address, log=log) as monitor:
            await monitor.command("query-status")
    log.close()
    return path


def lines(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


async def test_the_log_has_every_message_as_a_json_line(log):
    assert [line["direction"] for line in lines(log)] == [
        "receive",
        "send",
        "receive",
        "send",
        "receive",
    ]


async def test_the_log_has_each_message_whole(log):
    assert lines(log)[3]["message"]["execute"] == "query-status"


async def test_the_log_has_times(log):
    assert all(line["time"] > 0 for line in lines(log))


async def test_the_log_is_private(log):
    assert oct(stat.S_IMODE(log.stat().st_mode)) == "0o600"


def test_a_log_that_cannot_be_written_is_usage(tmp_path):
    with pytest.raises(VcpuUsageError):
        QmpLog(tmp_path / "no" / "log")


async def test_an_event_ahead_of_the_handshakes_reply_is_no_reply(tmp_path):
    async def script(connection):
        connection.send(GREETING)
        command = await connection.receive()
        connection.event("RESUME")
        connection.event("STOP")
        connection.send({"return": {}, "id": command.get("id")})
        connection.reply(await connection.receive(), {"status": "running"})
        await asyncio.Event().wait()

    async with serve(tmp_path, script) as path, connected(path) as monitor:
        assert await monitor.command("query-status") == {"status": "running"}


async def test_a_second_greeting_is_not_a_reply_to_the_handshake(tmp_path):
    async def script(connection):
        connection.send(GREETING)
        command = await connection.receive()
        connection.send(GREETING)
        connection.send({"return": {}, "id": command.get("id")})
        connection.reply(await connection.receive(), {"status": "running"})
        await asyncio.Event().wait()

    async with serve(tmp_path, script) as path, connected(path) as monitor:
        assert await monitor.command("query-status") == {"status": "running"}


async def test_what_is_asked_at_once_is_answered_in_order(tmp_path):
    names = [f"query-{n}" for n in range(80)]
    read = []

    def answer(connection, command):
        read.append(command["execute"])
        return {}

    async with serve(tmp_path, answering(answer)) as path, connected(path) as monitor:
        await asyncio.gather(*[monitor.command(name) for name in names])
    assert read == names


async def test_each_command_gets_its_own_reply(tmp_path):
    names = [f"query-{n}" for n in range(80)]
    async with serve(tmp_path, answering(lambda connection, command: command["execute"])) as path:
        async with connected(path) as monitor:
            assert await asyncio.gather(*[monitor.command(name) for name in names]) == names


async def test_what_is_asked_at_once_goes_out_in_few_writes(tmp_path, monkeypatch):
    """In more than one: QEMU is to begin before the last of many is made."""
    writes, send = [], socket.socket.send

    def count(sock, data, *flags):
        # The server's replies have no such key.
        if commands := bytes(data).count(b'"execute"'):
            writes.append(commands)
        return send(sock, data, *flags)

    async with (
        serve(tmp_path, answering(lambda connection, command: {})) as path,
        connected(path) as monitor,
    ):
        monkeypatch.setattr(socket.socket, "send", count)
        await ends(monitor, 80)
    assert (sum(writes), 1 < len(writes) <= 4) == (80, True), writes


def telling(count):
    """A server that tells so many events of 2 kB before each reply."""

    def answer(connection, command):
        for _ in range(count):
            connection.event("RESUME", text="x" * 2000)
        return {}

    return answering(answer)


async def test_every_event_reaches_a_listener(tmp_path):
    heard = []
    async with serve(tmp_path, telling(100)) as path, connected(path) as monitor:
        with monitor.listening(heard.append):
            await monitor.command("query-status")
    assert [event.name for event in heard] == ["RESUME"] * 100


async def test_events_that_nobody_reads_are_not_kept(tmp_path):
    async with serve(tmp_path, telling(1000)) as path, connected(path) as monitor:
        await monitor.command("query-status")
        tracemalloc.start()
        try:
            for _ in range(5):
                await monitor.command("query-status")
            now, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # They have 10 MB.
    assert now < 3_000_000


async def test_a_number_of_5000_digits_is_not_called_32_mib(tmp_path):
    def answer(connection, command):
        connection.raw(b'{"return": ' + b"9" * 5000 + b"}\r\n")

    async with serve(tmp_path, answering(answer)) as path, connected(path) as monitor:
        (end,) = await ends(monitor, 1)
    assert "MiB" not in str(end)


async def test_greeted_but_not_negotiated_is_told_so(tmp_path):
    async def script(connection):
        connection.send(GREETING)
        await asyncio.Event().wait()

    async with serve(tmp_path, script) as path:
        with pytest.raises(VcpuConnectionError) as error:
            async with connected(path, connect_timeout=1):
                pass
    assert "did not greet" not in str(error.value)


@pytest.mark.parametrize("address", ["a\0b", "a..b:80"])
async def test_an_address_that_cannot_be_is_not_called_something_else_than_qmp(address):
    with pytest.raises((VcpuUsageError, VcpuConnectionError)) as error:
        async with connected(address):
            pass
    assert getattr(error.value, "reason", "") != "not-qmp"


async def test_a_pretty_printed_socket_is_called_so(tmp_path):
    async def pretty(connection):
        connection.raw(json.dumps(GREETING, indent=4).replace("\n", "\r\n").encode() + b"\r\n")
        await forever(connection)

    async with serve(tmp_path, pretty) as path:
        error = await fails(path, "not-qmp")
    assert ("pretty-printed" in error.message, "-qmp, not -qmp-pretty" in error.hint) == (
        True,
        True,
    )


async def test_of_what_was_asked_at_once_the_first_error_is_enough(tmp_path):
    told = []
    asyncio.get_running_loop().set_exception_handler(
        lambda loop, context: told.append(context["message"])
    )

    async def script(connection):
        await connection.greet()
        await connection.receive()
        connection.close()

    async with serve(tmp_path, script) as path, connected(path) as monitor:
        first, *others = [monitor.send("query-status") for _ in range(3)]
        with pytest.raises(VcpuConnectionError):
            await first
        await asyncio.wait(others)
        del first, others
    gc.collect()
    assert told == []


@pytest.mark.parametrize(
    "said",
    [
        b'{"return": [' + b"[]," * 1_100_000 + b"1]}\n",
        b"[" + b"1," * 900_000 + b"1]\n",
        b"x" * 8_000_000 + b"\n",
    ],
    ids=["empty lists", "a list", "no JSON"],
)
async def test_what_is_large_and_not_understood_takes_little_memory(tmp_path, said):
    def answer(connection, command):
        connection.raw(said)

    async with (
        serve(tmp_path, answering(answer)) as path,
        connected(path, command_timeout=DEADLINE) as monitor,
    ):
        tracemalloc.start()
        try:
            (end,) = await ends(monitor, 1)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (end.reason, len(str(end)) < 500) == ("malformed", True)
    # What the server has yet to send, the buffer, the line as bytes and text, and a list of one
    # number.
    assert peak < 12 * len(said) + 10_000_000


@pytest.mark.parametrize(
    "said", [{"return": {}, "id": "x"}, {"id": ["qmpvcpu#0"]}, {"return": 1}, {"error": 3, "id": 3}]
)
async def test_a_reply_to_nothing_is_dropped(tmp_path, said):
    def answer(connection, command):
        connection.send(said)
        return "mine"

    async with serve(tmp_path, answering(answer)) as path, connected(path) as monitor:
        assert await monitor.command("query-status") == "mine"


async def test_the_words_of_an_error_are_bounded(tmp_path):
    def answer(connection, command):
        connection.send(
            {"error": {"class": ["x" * 100_000], "desc": "y" * 100_000}, "id": command["id"]}
        )

    async with serve(tmp_path, answering(answer)) as path, connected(path) as monitor:
        with pytest.raises(QmpError) as error:
            await monitor.command("query-status")
    assert len(error.value.error_class + error.value.desc) < 5000


@pytest.mark.parametrize(
    ("last", "seconds", "reason"),
    [(b"", 0.5, "timeout"), (b"garbage\n", 60, "malformed"), (None, 60, "closed")],
    ids=["nothing", "garbage", "its end"],
)
async def test_closing_does_not_wait_for_a_server_that_does_not_read(
    tmp_path, last, seconds, reason
):
    full = asyncio.Event()

    async def script(connection):
        await connection.greet()
        await full.wait()
        if last is None:
            connection.writer.write_eof()
        else:
            connection.raw(last)
        await forever(connection)

    async with serve(tmp_path, script) as path:
        async with connected(path, command_timeout=seconds) as monitor:
            coming = asyncio.ensure_future(ends(monitor, 20_000))
            await until(lambda: monitor.unsent_bytes, "the server has no room for more")
            full.set()
            found = await coming
            await within(monitor.close(), "closing")
    assert {end.reason for end in found} == {reason}
