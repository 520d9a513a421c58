"""Our call on the domains of a real libvirtd: by its API, and through its monitor."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import sys
import threading
from contextlib import asynccontextmanager

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from tests.qemu.libvirt_guests import (
    EJECTING,
    NUMA,
    PPC64,
    firmware,
    numa,
    qemu_of,
    start_until,
    suspend,
)
from tests.support.commands import cli, start_cli
from tests.support.hosts import why_no_kvm
from tests.support.libvirtds import daemon_of_our_own, managed
from tests.support.processes import send
from tests.support.waiting import deadline, until, within

pytestmark = [pytest.mark.qemu, pytest.mark.xdist_group("libvirt")]
needs_kvm = pytest.mark.skipif(why_no_kvm() is not None, reason=f"KVM: {why_no_kvm()}")


@pytest.fixture(scope="module")
async def daemon():
    async with daemon_of_our_own(log_qmp=True) as running:
        yield running


@asynccontextmanager
async def guest(daemon, xml=NUMA, *, start=True):
    """A domain of libvirt's; gone at the end."""
    async with managed(daemon, xml, start=start) as side:
        yield side


async def on(daemon, *words):
    return await cli("-c", daemon.uri, *words, "--json")


def sent(daemon, mark):
    return [command["execute"] for command in daemon.qmp_commands(mark)]


async def held(side):
    """Until some client's job holds the domain."""
    await until(lambda: asyncio.to_thread(side.is_held), "a client holds the domain", every=0.02)


async def free(side):
    """Until no client's job holds the domain."""

    async def is_free():
        return not await asyncio.to_thread(side.is_held)

    await until(is_free, "no client holds the domain", every=0.1)


async def tainted(side):
    """Whether libvirt says that somebody used its monitor."""
    return any("monitor" in text for text in await asyncio.to_thread(side.domain.messages, 0))


def listed(*enabled):
    """`<vcpus>` of the RFC's."""
    rows = (
        f"<vcpu id='{n}' state='{'enabled' if n in enabled else 'disabled'}'/>" for n in range(16)
    )
    return f"<vcpus>{''.join(rows)}</vcpus>"


async def test_by_its_api_libvirt_stays_the_owner_of_its_truth(daemon):
    async with guest(daemon) as side:
        run = await on(daemon, "list")
        assert {
            row["name"]: (row["state"], row["current"], row["maximum"])
            for row in run.json["domains"]
        } == {"web1": ("running", 3, 16)}
        mark = daemon.log_position()
        run = await on(daemon, "setvcpu", "web1", "9,5", "--enable", "--live", "--config")
        assert run.code == 0 and run.json["changed_ids"] == [5, 9], run.stdout
        assert (run.json["live_changed_ids"], run.json["config_changed_ids"]) == ([5, 9], [5, 9])
        # libvirt has sent them, one after the other, and knows them.
        assert sent(daemon, mark).count("device_add") == 2
        live, config = await side.sides()
        for xml in (live, config):
            assert len(re.findall(rb"<vcpu id='[59]' enabled='yes' hotpluggable='yes'", xml)) == 2
        assert not await tainted(side)
        run = await on(daemon, "setvcpu", "web1", "5", "--enable")
        assert run.code == 0 and run.json["changed"] is False
        info = (await on(daemon, "vcpuinfo", "web1")).json
        rows = info["vcpus"]
        assert [row["id"] for row in rows if row["state"] == "enabled"] == [0, 1, 2, 5, 9]
        assert rows[9]["props"] == {"socket-id": 1, "core-id": 0, "thread-id": 1, "node-id": 1}
        assert (rows[9]["order"], rows[9]["node"], rows[9]["hotpluggable"]) == (5, 1, True)
        assert rows[1]["hotpluggable"] is False
        assert (await on(daemon, "vcpucount", "web1", "--active", "--config")).json["count"] == 5
        run = await cli("-c", daemon.uri, "dumpxml", "web1", "--dialect", "rfc")
        assert "<vcpu id='9' state='enabled' cell='1'/>" in run.stdout
        inactive = await cli("-c", daemon.uri, "dumpxml", "web1", "--inactive")
        assert "<vcpu id='9' enabled='yes'" in inactive.stdout


async def test_what_libvirt_has_no_call_for(daemon):
    async with guest(daemon) as side:
        run = await on(daemon, "setvcpu", "web1", "1", "--enable", "--numa-node", "--count", "2")
        assert run.code == 0 and run.json["changed_ids"] == [8, 9], run.stdout
        run = await on(daemon, "setvcpu", "web1", "12", "--enable", "--core")
        assert run.code == 0 and run.json["changed_ids"] == [12, 13]
        plan = (await on(daemon, "setvcpu", "web1", "14-15", "--enable", "--dry-run")).json
        assert [step["vcpus"] for step in plan["plan"]] == [[14], [15]] and plan["refusals"] == []
        assert b"<vcpu id='14' enabled='no'" in (await side.live_xml())


async def test_several_are_one_transaction_and_undone_where_libvirt_fails(daemon):
    """libvirt never rolls back."""
    async with guest(daemon, PPC64) as side:
        # The firmware's threads poll and, on a busy machine, keep QEMU's main loop from its lock
        # for minutes.
        await asyncio.to_thread(side.domain.suspend)
        assert (await on(daemon, "setvcpu", "power1", "8-15", "--enable")).code == 0
        # Somebody else has plugged what libvirt does not know of.
        async with qmpvcpu.connect("power1", uri=daemon.uri, via="monitor") as domain:
            await domain.enable(range(32, 40))
        run = await on(daemon, "setvcpu", "power1", "16-23,32-39", "--enable")
        # An undo would unplug a core under the firmware, which kills this QEMU.
        assert run.code == 6 and run.json["error"]["remaining"] == list(range(16, 24)), run.stdout
        assert run.json["error"]["libvirt"] == "VIR_ERR_INTERNAL_ERROR", run.stdout
        assert (
            "already populated" in run.json["error"]["message"]
            or "Duplicate" in run.json["error"]["message"]
        )


@pytest.mark.parametrize("via", ["api", "monitor"])
@needs_kvm
async def test_unplugs_to_their_verified_end(daemon, tmp_path, via):
    async with guest(daemon, numa("kvm", firmware(tmp_path), EJECTING)) as side:
        run = await on(daemon, "--via", via, "setvcpu", "web1", "5-7", "--disable")
        assert run.code == 0 and run.json["changed_ids"] == [5, 6, 7], run.stdout
        xml = await side.live_xml()
        if via == "api":
            assert xml.count(b"enabled='yes'") == 5
            assert (await on(daemon, "setvcpu", "web1", "1", "--disable")).code == 3
            run = await on(daemon, "setvcpus", "web1", "2", "--live", "--config")
            assert run.code == 0 and run.json["changed_ids"] == [2, 3, 4, 5, 6, 7], run.stdout
            live, config = await side.sides()
            assert b"current='2'" in live and b"current='2'" in config
        else:
            assert "tainted" in run.json["messages"][-1]


@pytest.mark.parametrize("via", ["api", "monitor"])
@needs_kvm
async def test_what_other_clients_have_unplugged_unheard_is_counted(daemon, tmp_path, via):
    async with guest(daemon, numa("kvm", firmware(tmp_path), EJECTING)) as side:
        async with qmpvcpu.connect("web1", uri=daemon.uri, via=via) as domain:
            await domain.vcpus()
            await asyncio.to_thread(side.domain.setVcpu, "7", 0, 1)
            outcome = await domain.set_vcpus(7)
            assert (outcome.outcome, outcome.changed) == ("applied", False)
            await asyncio.to_thread(side.domain.setVcpu, "6", 0, 1)
            assert not (await domain.disable(6)).changed
            assert sum(row.enabled for row in await domain.vcpus()) == 6


async def test_through_its_monitor_with_our_own_engine(daemon, tmp_path):
    log = tmp_path / "qmp"
    async with guest(daemon) as side:
        mark = daemon.log_position()
        run = await on(
            daemon, "--via", "monitor", "setvcpu", "web1", "5-8", "--enable", "--qmp-log", str(log)
        )
        assert run.code == 0 and run.json["changed_ids"] == [5, 6, 7, 8], run.stdout
        assert (
            "tainted" in run.json["messages"][-1] and "does not follow" in run.json["messages"][-1]
        )
        # Four plugs and one query, as over QMP.
        commands = sent(daemon, mark)
        assert commands.count("device_add") == 4
        assert commands[commands.index("device_add") :][4] == "query-cpus-fast"
        assert "device_add" in [
            json.loads(line)["message"].get("execute") for line in log.read_text().splitlines()
        ]
        assert await tainted(side)
        assert b"current='3'" in await side.live_xml()
        run = await on(daemon, "--via", "monitor", "vcpuinfo", "web1")
        assert "tainted" in run.stderr
        rows = run.json["vcpus"]
        assert (
            rows[5]["state"] == "enabled"
            and rows[5]["thread_id"]
            and rows[5]["qom_path"].endswith("/vcpu5")
        )
        # Its threads are on this host.
        run = await on(daemon, "--via", "monitor", "vcpupin", "web1", "5", "0")
        assert run.code == 0, run.stdout
        run = await on(daemon, "--via", "monitor", "setvcpu", "web1", "5-6", "--enable", "--config")
        assert run.code == 0 and b"<vcpu id='6' enabled='yes'" in (await side.sides())[1], (
            run.stdout
        )


async def test_refusals_and_errors_keep_libvirts_code(daemon):
    async with guest(daemon):
        run = await on(daemon, "setvcpu", "web1", "16", "--enable")
        assert run.code == 3 and run.json["error"]["libvirt"] == "VIR_ERR_INVALID_ARG"
        run = await on(daemon, "vcpupin", "web1", "0", "999")
        assert run.code in (3, 8), run.stdout
        assert run.json["error"]["libvirt"].startswith("VIR_ERR_") and run.json["error"]["message"]
        run = await on(daemon, "setvcpu", "web1", "5", "--enable", "--guest")
        assert run.code == 3 and run.json["error"]["libvirt"] == "VIR_ERR_ARGUMENT_UNSUPPORTED"
        run = await on(daemon, "setvcpu", "web9", "5", "--enable")
        assert run.code == 7 and run.json["error"]["libvirt"] == "VIR_ERR_NO_DOMAIN"
        assert run.json["error"]["reason"] == "unknown-domain"
        run = await on(daemon, "migrate", "web1", "two")
        assert run.code == 2 and "not for libvirt's domains" in run.json["error"]["message"]
    run = await cli("-c", "qemu+unix:///system?socket=/nowhere", "list", "--json")
    assert run.code == 7 and run.json["error"]["reason"] == "missing", run.stdout
    for words in (
        ("--via", "monitor", "vcpuinfo", "web1"),
        ("-c", daemon.uri, "vcpuinfo", "web1", "--agent", "/nowhere"),
        ("-c", daemon.uri, "vcpuinfo", "web1", "--qmp-log", "/nowhere/log"),
        ("-c", daemon.uri, "save", "web1", "/nowhere"),
    ):
        run = await cli(*words, "--json")
        assert run.code == 2, run.stdout


async def test_pins_and_its_definition(daemon):
    async with guest(daemon) as side:
        run = await on(daemon, "vcpupin", "web1", "0", "0", "--live", "--config")
        assert run.code == 0 and run.json["changed"], run.stdout
        live, config = await side.sides()
        assert (
            b"<vcpupin vcpu='0' cpuset='0'/>" in live
            and b"<vcpupin vcpu='0' cpuset='0'/>" in config
        )
        assert (await on(daemon, "vcpupin", "web1", "0", "0")).json["changed"] is False
        assert (await on(daemon, "vcpupin", "web1", "0")).json["pins"][0]["cpus"] == "0"
        run = await on(daemon, "vcpupin", "web1", "9", "0")
        assert run.code == 3 and "has no thread" in run.json["error"]["message"]
        run = await on(daemon, "vcpupin", "web1", "9", "0", "--config")
        assert run.code == 0 and b"<vcpupin vcpu='9' cpuset='0'/>" in (await side.sides())[1]


async def test_of_one_that_is_shut_off(daemon, tmp_path):
    async with guest(daemon, start=False) as side:
        run = await on(daemon, "setvcpu", "web1", "5", "--enable")
        assert run.code == 0 and run.json["config_changed_ids"] == [5], run.stdout
        run = await on(daemon, "setvcpu", "web1", "6", "--enable", "--live")
        assert run.code == 3 and run.json["error"]["libvirt"] == "VIR_ERR_OPERATION_INVALID"
        assert (await on(daemon, "setvcpus", "web1", "6", "--hotpluggable")).code == 0
        assert b"current='6'" in (await side.sides())[1]
        wanted = tmp_path / "wanted.xml"
        wanted.write_text(listed(0, 1, 2, 11))
        run = await on(daemon, "apply", "web1", str(wanted))
        assert run.code == 0, run.stdout
        assert b"<vcpu id='11' enabled='yes'" in (await side.sides())[1]
        assert (await on(daemon, "list")).json["domains"][0]["state"] == "shut off"


async def test_apply_live_and_config(daemon, tmp_path):
    async with guest(daemon) as side:
        wanted = tmp_path / "wanted.xml"
        wanted.write_text(listed(0, 1, 2, 4, 11))
        run = await on(daemon, "apply", "web1", str(wanted), "--live", "--config")
        assert run.code == 0 and run.json["changed_ids"] == [4, 11], run.stdout
        for xml in await side.sides():
            assert b"<vcpu id='11' enabled='yes'" in xml


async def test_the_test_driver_knows_counts_only():
    """Each connection to test:///default is a world of its own."""
    async with qmpvcpu.connect("test", uri="test:///default") as domain:
        assert (await domain.state()).enabled_ids == (0, 1)
        outcome = await domain.set_vcpus(1)
        assert outcome.changed_ids == (1,) and (await domain.state()).enabled_ids == (0,)
        with pytest.raises(qmpvcpu.VcpuRefused, match="only the number of vCPUs") as caught:
            await domain.enable(1)
        assert caught.value.libvirt == "VIR_ERR_NO_SUPPORT"
        assert (await domain.pin(0, "0-1")).outcome == "applied"
        assert (await domain.set_vcpus(2, config=True)).outcome == "applied"
        with pytest.raises(qmpvcpu.VcpuRefused):
            await domain.set_vcpus(99)
    for words in (["99"], ["1", "--live", "--config", "--maximum"]):
        run = await cli("-c", "test:///default", "setvcpus", "test", *words, "--dry-run", "--json")
        assert run.code == 3 and run.json["refusals"], run.stdout
    run = await cli("-c", "test:///default", "list", "--json")
    assert [row["name"] for row in run.json["domains"]] == ["test"]


async def test_killed_between_calls_and_during_watch(daemon):
    async with guest(daemon):
        async with qmpvcpu.connect("web1", uri=daemon.uri) as domain:
            await domain.enable(5)
            watch = await start_cli("-c", daemon.uri, "watch", "web1", "--json")
            first = json.loads(await watch.stdout.readline())
            assert first["event"] == "snapshot" and first["vcpus"] == [0, 1, 2, 5]
            await domain.enable(9)
            line = json.loads(await within(watch.stdout.readline(), "an event"))
            assert (line["event"], line["vcpus"]) == ("vcpu-added", [9])
            await daemon.restart(kill=True)
            stdout, _ = await within(watch.communicate(), "watch has ended")
            assert watch.returncode == 7 and "closed" in stdout.decode(), stdout
            with pytest.raises(qmpvcpu.VcpuConnectionError) as caught:
                await domain.enable(6)
            assert caught.value.reason == "closed"
            await domain.reconnect()
            assert (await domain.state()).enabled_ids == (0, 1, 2, 5, 9)
            assert (await domain.enable(6)).changed_ids == (6,)
        # What `guest` ends is reached by a connection that was lost.
        run = await cli("-c", daemon.uri, "vcpucount", "web1", "--active", "--live")
        assert run.stdout.strip() == "6"
    import libvirt

    def end():
        conn = libvirt.open(daemon.uri)
        found = conn.lookupByName("web1")
        found.destroy()
        found.undefine()
        conn.close()

    await asyncio.to_thread(end)


async def test_two_connections_at_once(daemon):
    async with guest(daemon):
        async with (
            qmpvcpu.connect("web1", uri=daemon.uri) as one,
            qmpvcpu.connect("web1", uri=daemon.uri) as other,
        ):
            async with other.events() as events:
                done = await asyncio.gather(one.enable([4, 5]), other.enable([6, 7]))
                assert [outcome.changed_ids for outcome in done] == [(4, 5), (6, 7)]
                seen = set()
                async with deadline("all four are reported"):
                    while seen != {4, 5, 6, 7}:
                        seen |= set((await anext(events)).vcpus)
            assert (
                (await one.state()).enabled_ids
                == (await other.state()).enabled_ids
                == (0, 1, 2, 4, 5, 6, 7)
            )
            assert not (await other.enable([4, 5])).changed


async def test_nothing_holds_the_loop(daemon):
    """While libvirt is stopped, the loop turns; and a daemon that hangs is given up."""
    async with guest(daemon):
        async with qmpvcpu.connect("web1", uri=daemon.uri) as domain:
            os.kill(daemon.pid, signal.SIGSTOP)
            try:
                call = asyncio.create_task(domain.enable(5))
                for _ in range(50):
                    await asyncio.sleep(
                        0.01
                    )  # a turn of the loop; one that is held does not come back
                assert not call.done()
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
            finally:
                os.kill(daemon.pid, signal.SIGCONT)
        async with qmpvcpu.connect("web1", uri=daemon.uri) as domain:
            assert (await domain.state(VcpuFlag.LIVE)).maxcpus == 16


async def test_a_guest_that_stops_is_no_connection_any_more(daemon):
    async with guest(daemon) as side:
        watch = await start_cli("-c", daemon.uri, "watch", "web1", "--json")
        await watch.stdout.readline()
        await asyncio.to_thread(side.domain.destroy)
        stdout, _ = await within(watch.communicate(), "watch has ended")
        assert watch.returncode == 7 and "has stopped" in stdout.decode()


#: What ssh does for libvirt, without a host to log in to: a program that carries the bytes.
CARRIER = """#!{python}
import os, select, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect({socket!r})
while True:
    for ready in select.select([0, sock], [], [])[0]:
        data = os.read(0, 65536) if ready == 0 else sock.recv(65536)
        if not data:
            sys.exit()
        sock.sendall(data) if ready == 0 else os.write(1, data)
"""


async def test_by_way_of_a_program_as_to_another_host(daemon, tmp_path):
    """libvirt's remote protocol through somebody else's hands: what is there is another host's."""
    from urllib.parse import parse_qs, urlsplit

    carrier = tmp_path / "carry"
    path = parse_qs(urlsplit(daemon.uri).query)["socket"][0]
    carrier.write_text(CARRIER.format(python=sys.executable, socket=path))
    carrier.chmod(0o755)
    uri = f"qemu+ext://elsewhere/system?command={carrier}"
    async with guest(daemon):
        run = await cli("-c", uri, "setvcpu", "web1", "5", "--enable", "--json")
        assert run.code == 0 and run.json["changed_ids"] == [5], run.stdout + run.stderr
        run = await cli("-c", uri, "--via", "monitor", "vcpuinfo", "web1", "--json")
        row = run.json["vcpus"][5]
        # Thread ids are another host's: nothing is said of threads that have these numbers here.
        assert row["thread_id"] and row["pin"] is None
        run = await cli("-c", uri, "--via", "monitor", "vcpupin", "web1", "5", "0", "--json")
        assert run.code == 3, run.stdout
        async with qmpvcpu.connect("web1", uri=uri) as domain:
            os.system(f"pkill -f {carrier}")
            with pytest.raises(qmpvcpu.VcpuConnectionError):
                async with deadline("the carrier's end is seen"):
                    while True:
                        await domain.state()
            await domain.reconnect()
            assert (await domain.enable(6)).changed
    for uri in ("qemu+tls://localhost/system", "qemu+ssh://nobody@localhost:1/system", "bogus://"):
        run = await cli("-c", uri, "list", "--json")
        assert run.code == 7 and run.json["error"]["address"] == uri, run.stdout
        assert run.json["error"]["libvirt"].startswith("VIR_ERR_")


def workers():
    """Threads that make libvirt's calls."""
    return [
        one.name for one in threading.enumerate() if "changes" in one.name or "queries" in one.name
    ]


async def test_many_connections_leave_nothing(daemon):
    async def rounds(count):
        for _ in range(count):
            async with qmpvcpu.connect("web1", uri=daemon.uri) as domain:
                await domain.state()
        await until(lambda: len(workers()) == others, "its threads have ended")
        gc.collect()

    def left():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    async with guest(daemon):
        others = len(workers())
        await rounds(5)
        descriptors, threads = left()
        await rounds(30)
        # libvirt closes the last ones a moment later.
        await until(lambda: left()[0] <= descriptors + 2, "their descriptors are closed")
        await until(lambda: left()[1] <= threads + 2, "their threads have ended")


SECRET = NUMA.replace(
    "<devices>", "<devices><graphics type='vnc' port='-1' autoport='yes' passwd='geheim'/>", 1
)


async def test_what_libvirt_does_not_show_stays_in_the_definition(daemon, tmp_path):
    """Passwords are in no XML that is read without being asked for: they must not be lost when it
    is written.
    """
    async with guest(daemon, SECRET, start=False) as side:
        wanted = tmp_path / "wanted.xml"
        wanted.write_text(listed(0, 1, 2, 11))
        for words in (
            ("setvcpu", "web1", "5", "--enable"),
            ("setvcpus", "web1", "7"),
            ("vcpupin", "web1", "1", "0"),
            ("apply", "web1", str(wanted)),
            ("--via", "monitor", "setvcpu", "web1", "12", "--enable", "--config"),
        ):
            run = await on(daemon, *words)
            assert run.code == 0 and run.json["changed"], run.stdout
            secure = await asyncio.to_thread(side.definition, secure=True)
            assert b"passwd='geheim'" in secure, words
        assert "geheim" not in (await cli("-c", daemon.uri, "dumpxml", "web1")).stdout


async def test_two_calls_at_once_on_one_that_is_shut_off(daemon):
    async with guest(daemon, start=False) as side:
        async with qmpvcpu.connect("web1", uri=daemon.uri) as domain:
            done = await asyncio.gather(
                domain.enable(12, config=True), domain.set_vcpus(8, config=True)
            )
            assert done[0].changed_ids == (12,) and len(done[1].changed_ids) == 4
        xml = (await side.sides())[1]
        assert b"current='8'" in xml and b"<vcpu id='12' enabled='yes'" in xml


async def test_a_guest_that_was_started_anew_is_another_one(daemon):
    async with guest(daemon) as side:
        async with qmpvcpu.connect("web1", uri=daemon.uri) as domain:
            await domain.enable(9)
            await asyncio.to_thread(side.domain.destroy)
            await asyncio.to_thread(side.domain.create)
            for call in (domain.state(), domain.enable(10), domain.dump_xml()):
                with pytest.raises(qmpvcpu.VcpuConnectionError, match="has stopped"):
                    await call
            await domain.reconnect()
            assert (await domain.state()).enabled_ids == (0, 1, 2)
            await asyncio.to_thread(side.domain.destroy)
            with pytest.raises(qmpvcpu.VcpuConnectionError):
                await domain.state(VcpuFlag.LIVE)


async def test_a_transient_domain_and_its_own_xml(daemon):
    async with guest(daemon, SECRET) as side:
        await asyncio.to_thread(side.domain.undefine)
        run = await cli("-c", daemon.uri, "dumpxml", "web1")
        assert "<uuid>" in run.stdout and "<numa>" in run.stdout and "<graphics" in run.stdout
        run = await on(daemon, "setvcpu", "web1", "5", "--enable", "--live", "--config")
        assert run.code == 3 and "no persistent definition" in run.json["error"]["message"]
        assert (await on(daemon, "setvcpu", "web1", "5", "--enable")).code == 0
        rows = (await on(daemon, "list")).json["domains"]
        assert [(row["name"], row["current"]) for row in rows] == [("web1", 4)]


@needs_kvm
async def test_a_qemu_that_hangs_is_given_up_and_what_was_not_asked_is_not_asked(daemon, tmp_path):
    async with guest(daemon, numa("kvm", firmware(tmp_path), EJECTING)) as side:
        pid = qemu_of(daemon)
        # A guest that does not eject: paused.
        await asyncio.to_thread(side.domain.suspend)
        mark = daemon.log_position()
        process = await start_cli("-c", daemon.uri, "setvcpu", "web1", "4-7", "--disable", "--json")
        await until(lambda: "device_del" in sent(daemon, mark), "the first is asked for")
        send(process, signal.SIGINT)
        stdout, _ = await within(process.communicate(), "it is interrupted")
        assert process.returncode == 130
        # libvirt gives the first one up after 5 s; only then could it ask for another.
        await free(side)
        asked = [
            c["arguments"]["id"] for c in daemon.qmp_commands(mark) if c["execute"] == "device_del"
        ]
        assert len(asked) == 1 and json.loads(stdout)["pending"] == [int(asked[0][4:])], (
            asked,
            stdout,
        )
        os.kill(pid, signal.SIGSTOP)
        try:
            process = await start_cli(
                "-c", daemon.uri, "--via", "monitor", "vcpuinfo", "web1", "--json"
            )
            stdout, _ = await within(process.communicate(), "QEMU is given up")
            assert process.returncode == 7 and "did not answer" in stdout.decode()
            words = ("-c", daemon.uri, "--via", "monitor", "vcpuinfo", "web1", "--json")
            process = await start_until("libvirt_qemu.qemuMonitorCommand", *words)
            send(process, signal.SIGINT)
            await within(process.communicate(), "it is interrupted")
            assert process.returncode == 130
        finally:
            os.kill(pid, signal.SIGCONT)


@needs_kvm
async def test_the_next_process_knows_what_is_pending(daemon, tmp_path):
    async with guest(daemon, numa("kvm", firmware(tmp_path), EJECTING)) as side:
        await asyncio.to_thread(suspend, side.domain)
        run = await on(daemon, "setvcpu", "web1", "4", "--disable", "--timeout", "1")
        assert (run.code, run.json["pending"]) == (5, [4]), run.stdout
        assert not [text for text in run.json["messages"] if "only this process" in text]
        rows = (await on(daemon, "vcpuinfo", "web1")).json["vcpus"]
        assert [row["id"] for row in rows if row["pending"]] == [4]
        # Not "already so": it is on its way out. Once that has ended it is plugged again.
        enabling = await start_cli("-c", daemon.uri, "setvcpu", "web1", "4", "--enable", "--json")
        await asyncio.to_thread(side.domain.resume)
        stdout, _ = await within(enabling.communicate(), "it is plugged again")
        assert (enabling.returncode, json.loads(stdout)["changed_ids"]) == (0, [4]), stdout.decode()
        rows = (await on(daemon, "vcpuinfo", "web1")).json["vcpus"]
        assert [row["id"] for row in rows if row["state"] == "enabled"] == list(range(8))
        assert not any(row["pending"] for row in rows)


async def test_connections_that_fail_leave_no_threads():
    before = threading.active_count()
    for _ in range(10):
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            async with qmpvcpu.connect("web1", uri="qemu+unix:///system?socket=/nowhere"):
                pass
    await until(lambda: threading.active_count() <= before + 2, "their threads have ended")


async def test_what_cannot_be_is_said_and_is_no_bug_of_ours():
    for words, code in (
        (("-c", "test:///default", "--via", "monitor", "vcpuinfo", "test"), 3),
        (("-c", "qemu+ssh://[bad/system", "list"), 2),
        (("-c", "test:///default", "setvcpu", "test", "1", "--disable", "--dry-run"), 3),
        (("-c", "test:///default", "setvcpus", "test", "1", "--dry-run"), 0),
        (("-c", "test:///default", "setvcpus", "test", "8", "--maximum", "--config"), 0),
        (("-c", "test:///default", "vcpuinfo", "test", "--qmp-log", "/nowhere"), 2),
    ):
        run = await cli(*words, "--json")
        assert run.code == code, (words, run.stdout, run.stderr)
    async with qmpvcpu.connect("test", uri="test:///default") as domain:
        outcome = await domain.set_vcpus(1, config=True)
        assert outcome.config_changed_ids == (1,) and not outcome.live_changed_ids


async def test_pinned_everywhere_is_already_so(daemon):
    async with guest(daemon):
        assert (await on(daemon, "vcpupin", "web1", "0", "0")).json["changed"]
        assert (await on(daemon, "vcpupin", "web1", "0", "r")).json["changed"]
        assert not (await on(daemon, "vcpupin", "web1", "0", "r")).json["changed"]
