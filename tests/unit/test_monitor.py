"""The QMP monitor against a server that misbehaves, and addresses that lead nowhere."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat

import pytest

import qmpvcpu.qemu.monitor as monitor_module
from qmpvcpu.errors import VcpuConnectionError, VcpuUsageError
from qmpvcpu.ports import CommandError, MonitorEvent
from qmpvcpu.qemu.monitor import QmpLog, open_monitor, parse_address
from tests.support.fake_qmp import GREETING, answering, serve
from tests.support.waiting import within


async def forever(connection):
    await asyncio.Event().wait()


async def fails(address, reason, **options):
    with pytest.raises(VcpuConnectionError) as error:
        async with open_monitor(address, **options):
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
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address


def test_a_port_that_cannot_be_is_usage():
    with pytest.raises(VcpuUsageError):
        parse_address("host:70000")


async def test_what_is_known_at_once_is_said_at_once(tmp_path):
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    plain = tmp_path / "plain"
    plain.write_text("<domain/>")
    await fails(str(tmp_path / "nowhere"), "missing")
    await fails(str(stale), "refused")
    await fails(str(plain), "not-qmp")
    await fails(str(tmp_path), "not-qmp")
    await fails("fd:987", "missing")
    await fails(str(tmp_path / ("long" * 50)), "other")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        await fails(f"127.0.0.1:{free.getsockname()[1]}", "refused")
    reader, writer = os.pipe()
    await fails(f"fd:{reader}", "not-qmp")
    os.close(reader)
    os.close(writer)


async def test_a_server_that_accepts_and_never_greets(tmp_path):
    async with serve(tmp_path, forever) as path:
        error = await fails(path, "no-greeting", connect_timeout=0.2)
    assert "one client at a time" in error.hint


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
    assert "before it said anything" in str(error)


async def test_an_endless_line_costs_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor_module, "MESSAGE_LIMIT", 1 << 16)

    async def script(connection):
        await connection.greet()
        await connection.receive()
        while True:
            connection.raw(b"x" * 4096)
            await connection.writer.drain()

    async with serve(tmp_path, script) as path, open_monitor(path) as monitor:
        with pytest.raises(VcpuConnectionError, match="more than") as error:
            await monitor.query_status()
    assert error.value.reason == "malformed"


@pytest.mark.parametrize(
    "said",
    [b"garbage\r\n", b"[" * 100000 + b"\r\n", b'{"return": ' + b"9" * 5000 + b"}\r\n", b"\xff\r\n", b"3\r\n"],
)
async def test_garbage_in_mid_session_ends_the_command_at_once(tmp_path, said):
    def answer(connection, command):
        connection.raw(said)

    async with serve(tmp_path, answering(answer)) as path, open_monitor(path) as monitor:
        with pytest.raises(VcpuConnectionError) as error:
            await monitor.query_status()
        assert error.value.reason == "malformed"
        with pytest.raises(VcpuConnectionError):
            await monitor.query_status()


@pytest.mark.parametrize("reply", [{"error": 3}, {"error": {"class": "X"}}, {"nothing": 1}])
async def test_a_malformed_reply_is_told(tmp_path, reply):
    def answer(connection, command):
        connection.send(reply | {"id": command["id"]})

    async with serve(tmp_path, answering(answer)) as path, open_monitor(path) as monitor:
        with pytest.raises(VcpuConnectionError) as error:
            await monitor.query_status()
    assert error.value.reason == "malformed"


async def test_a_connection_closed_in_the_middle_of_a_command_ends_it_at_once(tmp_path):
    def answer(connection, command):
        connection.raw(b'{"ret')
        connection.close()

    async with serve(tmp_path, answering(answer)) as path, open_monitor(path) as monitor:
        heard = []
        with monitor.listen(heard.append):
            with pytest.raises(VcpuConnectionError) as error:
                await monitor.query_status()
            assert error.value.reason in ("closed", "malformed")
        assert heard == [error.value] or [e.reason for e in heard] == [error.value.reason]


async def test_a_lost_connection_reaches_listeners_while_nobody_asks(tmp_path):
    listening = asyncio.Event()

    async def script(connection):
        await connection.greet()
        await listening.wait()
        connection.event("STOP")
        connection.close()

    heard = asyncio.Queue()
    async with serve(tmp_path, script) as path, open_monitor(path) as monitor:
        with monitor.listen(heard.put_nowait):
            listening.set()
            event, lost = await heard.get(), await heard.get()
        with monitor.listen(heard.put_nowait):
            assert heard.get_nowait() is lost  # who comes late is told too
    assert event.name == "STOP"
    assert (type(lost), lost.reason) == (VcpuConnectionError, "closed")


async def test_a_server_that_closes_right_after_negotiation(tmp_path):
    async def script(connection):
        await connection.greet()
        connection.close()

    async with serve(tmp_path, script) as path:
        try:
            async with open_monitor(path) as monitor:
                with pytest.raises(VcpuConnectionError):
                    await monitor.query_status()
        except VcpuConnectionError as error:
            assert error.reason == "closed"


async def test_an_error_of_qemu_keeps_its_class_and_text(tmp_path):
    def answer(connection, command):
        connection.send(
            {"error": {"class": "DeviceNotFound", "desc": "Device 'x' not found"}, "id": command["id"]}
        )

    async with serve(tmp_path, answering(answer)) as path, open_monitor(path) as monitor:
        with pytest.raises(CommandError) as error:
            await monitor.device_del("x")
    assert (error.value.error_class, error.value.text) == ("DeviceNotFound", "Device 'x' not found")


async def test_no_answer_is_a_timeout_and_the_late_reply_belongs_to_nobody(tmp_path):
    held = []

    def answer(connection, command):
        if not held:
            held.append(command)
            return None
        connection.reply(held[0], "late")
        return "mine"

    async with serve(tmp_path, answering(answer)) as path, open_monitor(path, command_timeout=1) as monitor:
        with pytest.raises(VcpuConnectionError, match="did not answer 'query-status'") as error:
            await monitor.query_status()
        assert (error.value.reason, error.value.libvirt) == ("timeout", "VIR_ERR_OPERATION_TIMEOUT")
        assert await monitor.query_status() == "mine"


async def test_of_many_commands_only_the_oldest_is_on_the_clock(tmp_path):
    async def answer(connection, command):
        await asyncio.sleep(0.2)  # the work of a slow QEMU: all together take longer than one may
        return command["id"]

    async with serve(tmp_path, answering(answer)) as path, open_monitor(path, command_timeout=1.5) as monitor:
        replies = await asyncio.gather(*(monitor.query_status() for _ in range(10)))
    assert len(set(replies)) == 10


async def test_a_qemu_that_hangs_ends_all_commands_together(tmp_path):
    async with serve(tmp_path, answering(lambda connection, command: None)) as path:
        async with open_monitor(path, command_timeout=0.2) as monitor:
            calls = (monitor.query_status() for _ in range(1000))
            # One deadline after the other would be 200 s.
            results = await within(asyncio.gather(*calls, return_exceptions=True), "all of them end")
    assert {result.reason for result in results} == {"timeout"}


async def test_an_event_reaches_the_listener_before_the_reply_behind_it(tmp_path):
    def answer(connection, command):
        connection.event("DEVICE_DELETED", device="vcpu1")
        return {}

    async with serve(tmp_path, answering(answer)) as path, open_monitor(path) as monitor:
        heard = []
        with monitor.listen(heard.append):
            await monitor.device_del("vcpu1")
            assert heard == [MonitorEvent("DEVICE_DELETED", {"device": "vcpu1"}, 1.000005)]
        await monitor.device_del("vcpu1")
        assert len(heard) == 1


async def test_an_event_of_a_wrong_shape_harms_nothing(tmp_path):
    def answer(connection, command):
        connection.send({"event": 7, "data": [], "timestamp": {"seconds": "x"}})
        connection.send({"event": "A", "timestamp": {"seconds": 10**400, "microseconds": True}})
        return {}

    async with serve(tmp_path, answering(answer)) as path, open_monitor(path) as monitor:
        heard = []
        with monitor.listen(heard.append):
            await monitor.query_status()
    assert [event.time for event in heard] == [0.0, 0.0]


async def test_a_reply_of_five_thousand_cpus(tmp_path):
    rows = [{"cpu-index": n, "qom-path": f"/machine/peripheral/vcpu{n}" + "x" * 200} for n in range(5000)]
    async with serve(tmp_path, answering(lambda connection, command: rows)) as path, open_monitor(path) as monitor:
        assert await monitor.query_cpus_fast() == rows


async def test_an_inherited_descriptor_stays_the_callers(tmp_path):
    async with serve(tmp_path, answering(lambda connection, command: "ok")) as path:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            async with open_monitor(f"fd:{sock.fileno()}") as monitor:
                assert await monitor.query_status() == "ok"
            os.fstat(sock.fileno())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_tcp(host, tmp_path):
    script = answering(lambda connection, command: "ok")
    from tests.support.fake_qmp import Connection

    async def client(reader, writer):
        await script(Connection(reader, writer))
        writer.close()

    server = await asyncio.start_server(client, host, 0)
    port = server.sockets[0].getsockname()[1]
    async with open_monitor(f"[{host}]:{port}" if ":" in host else f"{host}:{port}") as monitor:
        assert await monitor.query_status() == "ok"
    server.close()


async def test_the_log_has_every_message_as_a_json_line_and_is_private(tmp_path):
    log_path = tmp_path / "log"
    log_path.write_text("")
    log_path.chmod(0o644)
    log = QmpLog(log_path)
    async with serve(tmp_path, answering(lambda connection, command: "ok")) as path:
        async with open_monitor(path, log=log) as monitor:
            await monitor.query_status()
    log.close()
    lines = [json.loads(line) for line in log_path.read_text().splitlines()]
    assert [line["direction"] for line in lines] == ["receive", "send", "receive", "send", "receive"]
    assert lines[3]["message"]["execute"] == "query-status"
    assert all(line["time"] > 0 for line in lines)
    assert stat.S_IMODE(log_path.stat().st_mode) == 0o600


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

    async with serve(tmp_path, script) as path, open_monitor(path) as monitor:
        assert await monitor.query_status() == {"status": "running"}


async def test_what_is_asked_at_once_goes_out_in_one_write_and_in_order(tmp_path, monkeypatch):
    writes = []
    send = socket.socket.send
    monkeypatch.setattr(monitor_module, "_BATCH", 4)
    async with serve(tmp_path, answering(lambda connection, command: command["execute"])) as path:
        async with open_monitor(path) as monitor:

            def count(sock, data, *flags):
                if sock is monitor._client._writer.get_extra_info("socket")._sock:
                    writes.append(bytes(data).count(b'"execute"'))
                return send(sock, data, *flags)

            monkeypatch.setattr(socket.socket, "send", count)
            names = [f"query-{n}" for n in range(10)]
            assert await asyncio.gather(*[monitor.execute(name) for name in names]) == names
    assert writes == [4, 4, 2]


async def test_events_that_nobody_reads_are_not_kept(tmp_path):
    async def script(connection):
        await connection.greet()
        command = await connection.receive()
        for _ in range(100):
            connection.event("RESUME")
        connection.reply(command, {})
        await asyncio.Event().wait()

    seen = []
    async with serve(tmp_path, script) as path, open_monitor(path) as monitor:
        with monitor.listen(seen.append):
            await monitor.query_status()
        assert len(seen) == 100 and monitor._client.events.empty()


async def test_a_number_of_5000_digits_is_not_called_32_mib(tmp_path):
    def answer(connection, command):
        connection.raw(b'{"return": ' + b"9" * 5000 + b"}\r\n")

    async with serve(tmp_path, answering(answer)) as path, open_monitor(path) as monitor:
        with pytest.raises(VcpuConnectionError) as error:
            await monitor.query_status()
    assert "MiB" not in str(error.value)


async def test_greeted_but_not_negotiated_is_told_so(tmp_path):
    async def script(connection):
        connection.send(GREETING)
        await asyncio.Event().wait()

    async with serve(tmp_path, script) as path:
        with pytest.raises(VcpuConnectionError) as error:
            async with open_monitor(path, connect_timeout=0.1):
                pass
    assert "did not greet" not in str(error.value)


@pytest.mark.parametrize("address", ["a\0b", "a..b:80"])
async def test_an_address_that_cannot_be_is_not_called_something_else_than_qmp(address):
    with pytest.raises((VcpuUsageError, VcpuConnectionError)) as error:
        async with open_monitor(address):
            pass
    assert getattr(error.value, "reason", "") != "not-qmp"
