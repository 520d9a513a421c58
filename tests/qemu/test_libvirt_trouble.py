"""Domains of a real libvirtd, and trouble: what hangs, is cancelled, is half done, or changes
hands.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import VcpuFlag
from tests.qemu.libvirt_guests import EJECTING, NUMA, firmware, numa, qemu_of, start_until, suspend
from tests.qemu.test_libvirt_real import free, guest, held, needs_kvm, on, sent, workers
from tests.support.commands import start_cli
from tests.support.libvirtds import daemon_of_our_own
from tests.support.processes import send
from tests.support.waiting import until, within

pytestmark = [pytest.mark.qemu, pytest.mark.xdist_group("libvirt")]


@pytest.fixture(scope="module")
async def daemon():
    async with daemon_of_our_own(log_qmp=True) as running:
        yield running


@contextmanager
def stopped(daemon):
    """The QEMU of its guest hangs."""
    pid = qemu_of(daemon)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_what_waits_behind_a_call_that_hangs_fails_with_it(daemon):
    async with guest(daemon):
        async with qmpvcpu.connect(
            "web1", uri=daemon.uri, via="monitor", command_timeout=1
        ) as domain:
            # What is asked once of each QEMU is asked before it hangs.
            await domain.enable(7)
            with stopped(daemon):
                for _ in range(2):
                    for call in (domain.enable(5), domain.state()):
                        with pytest.raises(
                            qmpvcpu.VcpuConnectionError, match="did not answer"
                        ) as caught:
                            await within(call, "it fails")
                        assert caught.value.reason == "timeout"
            # What had been sent is done once it goes on; nothing is lost for good.

            async def back():
                with suppress(qmpvcpu.VcpuConnectionError):
                    return 5 in (await domain.state()).enabled_ids

            await until(back, "vCPU 5 is plugged")
            assert (await domain.enable(6)).changed_ids == (6,)


async def test_watching_outlives_a_daemon_that_pauses(daemon):
    async with guest(daemon):
        async with (
            qmpvcpu.connect("web1", uri=daemon.uri, command_timeout=1) as domain,
            qmpvcpu.connect("web1", uri=daemon.uri) as other,
            domain.events() as events,
        ):
            os.kill(daemon.pid, signal.SIGSTOP)
            try:
                # So that what watches misses more than one answer.
                for _ in range(2):
                    with pytest.raises(qmpvcpu.VcpuConnectionError):
                        await domain.state()
            finally:
                os.kill(daemon.pid, signal.SIGCONT)
            await other.enable(5)
            assert (await within(anext(events), "vCPU 5 is reported")).vcpus == (5,)
            await other.enable(6)
            assert (await within(anext(events), "vCPU 6 is reported")).vcpus == (6,)


async def test_interrupted_in_the_middle_of_many_plugs(daemon):
    many = NUMA.replace(">16<", ">200<").replace("cores='4' threads='2'", "cores='100' threads='1'")
    many = many.replace("cpus='0-7'", "cpus='0-99'").replace("cpus='8-15'", "cpus='100-199'")
    async with guest(daemon, many) as side:
        mark = daemon.log_position()
        process = await start_cli("-c", daemon.uri, "setvcpus", "web1", "150", "--json")
        await until(lambda: sent(daemon, mark).count("device_add") >= 8, "some are plugged")
        send(process, signal.SIGINT)
        stdout, _ = await within(process.communicate(), "it is interrupted")
        assert process.returncode == 130
        added = [
            c["arguments"]["id"] for c in daemon.qmp_commands(mark) if c["execute"] == "device_add"
        ]
        assert len(added) < 147, added
        # Each of them is named: its undo is pending, or could not even be asked for.
        document = json.loads(stdout)
        told = {*document["pending"], *document["changed_ids"]}
        assert told <= {int(one.removeprefix("vcpu")) for one in added}
        live = (await side.live_xml()).count(b"enabled='yes'")
        assert live == 3 + len(told), (document, live)
        assert (
            document["outcome"] in ("partial", "pending")
            and "changed by this call" in document["error"]["message"]
        )


@needs_kvm
async def test_the_deadline_counts_though_libvirt_takes_one_unplug_at_a_time(daemon, tmp_path):
    async with guest(daemon, numa("kvm", firmware(tmp_path), EJECTING)) as side:
        # A guest that does not eject.
        await asyncio.to_thread(suspend, side.domain)
        mark = daemon.log_position()
        run = await on(daemon, "setvcpu", "web1", "5-7", "--disable", "--timeout", "1")
        assert run.code == 5 and len(run.json["pending"]) == 1, run.stdout
        assert any("its unplug was not requested" in text for text in run.json["messages"])
        # libvirt gives the first one up after 5 s; only then could it ask for another.
        await free(side)
        assert sent(daemon, mark).count("device_del") == 1
        assert [
            row["id"]
            for row in (await on(daemon, "vcpuinfo", "web1")).json["vcpus"]
            if row["pending"]
        ] == (run.json["pending"])


async def test_a_call_that_is_cancelled_while_it_waits_is_in_nobodys_way(daemon):
    async with guest(daemon):
        async with qmpvcpu.connect("web1", uri=daemon.uri) as domain:
            mark = daemon.log_position()
            enabling = asyncio.create_task(domain.enable(range(4, 16)))
            await until(lambda: sent(daemon, mark).count("device_add"), "it is under way")
            for _ in range(3):
                asking = asyncio.create_task(domain.vcpu(0))
                await asyncio.sleep(0)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
            assert (await within(enabling, "all are plugged")).changed_ids == tuple(range(4, 16))


async def test_a_connection_of_a_thread_that_breaks_alone_is_made_again(daemon):
    def sockets():
        found = {}
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                found[name] = os.readlink(f"/proc/self/fd/{name}")
        return {name: link for name, link in found.items() if link.startswith("socket:")}

    async with guest(daemon):
        async with qmpvcpu.connect("web1", uri=daemon.uri) as domain:
            before = sockets()
            await domain.enable(5)
            own = [name for name, link in sockets().items() if before.get(name) != link]
            assert own
            for name in own:
                with socket.socket(fileno=os.dup(int(name))) as one:
                    one.shutdown(socket.SHUT_RDWR)
            with pytest.raises(qmpvcpu.VcpuConnectionError) as caught:
                await domain.enable(6)
            assert caught.value.reason == "closed"
            assert (await domain.enable(6)).changed_ids == (6,)


@needs_kvm
async def test_an_earlier_unplug_stays_pending_where_it_could_not_be_asked_again(daemon, tmp_path):
    async with guest(daemon, numa("kvm", firmware(tmp_path), EJECTING)) as side:
        await asyncio.to_thread(suspend, side.domain)
        run = await on(
            daemon, "setvcpu", "web1", "7", "--disable", "--live", "--config", "--timeout", "1"
        )
        assert run.code == 5 and run.json["pending"] == [7]
        # Until libvirt gives that one up.
        await free(side)
        run = await on(
            daemon, "setvcpu", "web1", "5-7", "--disable", "--live", "--config", "--timeout", "1"
        )
        assert run.code == 6 or run.json["pending"] == [5, 7], run.stdout
        assert 7 in run.json["pending"] and any(
            "6: its unplug was not" in one for one in run.json["messages"]
        )
        rows = (await on(daemon, "vcpuinfo", "web1")).json["vcpus"]
        assert [row["id"] for row in rows if row["pending"]] == [5, 7]
        # What has not ended in the guest is not written to its definition.
        assert (await side.sides())[1].count(b"enabled='yes'") == 8


@needs_kvm
async def test_asked_is_what_libvirt_has_asked_also_behind_another_client(daemon, tmp_path):
    async with guest(daemon, numa("kvm", firmware(tmp_path), EJECTING)) as side:
        await asyncio.to_thread(suspend, side.domain)
        mark = daemon.log_position()
        first = asyncio.create_task(asyncio.to_thread(side.domain.setVcpu, "7", 0, 1))
        await held(side)
        # It holds the domain for 5 s from here on.
        run = await on(daemon, "setvcpu", "web1", "6", "--disable", "--async")
        assert (run.code, run.json["outcome"]) == (0, "requested"), run.stdout
        asked = [
            c["arguments"]["id"] for c in daemon.qmp_commands(mark) if c["execute"] == "device_del"
        ]
        assert asked == ["vcpu7", "vcpu6"]
        with pytest.raises(Exception, match="timed out"):
            await first
        # By its own deadline a call does not wait for that, however long it takes.
        with stopped(daemon):
            again = asyncio.create_task(asyncio.to_thread(side.domain.setVcpu, "5", 0, 1))
            await held(side)
            run = await on(daemon, "setvcpu", "web1", "4", "--disable", "--timeout", "1")
            assert run.code == 5 and run.json["pending"] == [4], run.stdout
            assert not again.done()
        with pytest.raises(Exception, match="timed out"):
            await again


async def test_under_tcg_what_is_gone_unseen_stays_known(daemon, tmp_path):
    async with guest(daemon, numa("qemu", firmware(tmp_path), EJECTING)):
        run = await on(daemon, "setvcpu", "web1", "7", "--disable")
        assert run.code == 0 and run.json["changed_ids"] == [7], run.stdout
        # With this libvirt looks at its threads anew, and its API shows no more that one is gone.
        assert (await on(daemon, "setvcpu", "web1", "9", "--enable")).code == 0
        rows = (await on(daemon, "vcpuinfo", "web1")).json["vcpus"]
        assert [row["id"] for row in rows if row["state"] == "enabled"] == [*range(7), 9]
        mark = daemon.log_position()
        run = await on(daemon, "setvcpu", "web1", "8,7", "--enable")
        message = run.json["error"]["message"]
        assert run.code == 3 and "libvirt did not notice" in message, run.stdout
        assert not sent(daemon, mark).count("device_add")
        assert (await on(daemon, "--via", "monitor", "setvcpu", "web1", "7", "--enable")).code == 0
        rows = (await on(daemon, "vcpuinfo", "web1")).json["vcpus"]
        assert [row["id"] for row in rows if row["state"] == "enabled"] == [*range(8), 9]
        # A connection that saw it go does not go on saying so.
        async with qmpvcpu.connect("web1", uri=daemon.uri) as held:
            assert (await held.disable(6)).changed_ids == (6,)
            assert (await held.enable(10)).changed_ids == (10,) and 6 not in (
                await held.state()
            ).enabled_ids
            assert (
                await on(daemon, "--via", "monitor", "setvcpu", "web1", "6", "--enable")
            ).code == 0
            assert 6 in (await held.state()).enabled_ids


async def test_a_held_connection_sees_what_becomes_of_its_domain(daemon):
    async with guest(daemon, start=False) as side:
        library = side.domain
        async with qmpvcpu.connect("web1", uri=daemon.uri) as domain:
            assert not (await domain.state()).active
            await asyncio.to_thread(library.create)
            assert (await domain.state()).active
            outcome = await domain.enable(5)
            assert (outcome.mechanism, outcome.changed_ids, outcome.defined) == (
                "hotplug",
                (5,),
                False,
            )
            await asyncio.to_thread(library.undefine)
            with pytest.raises(qmpvcpu.VcpuRefused, match="no persistent definition"):
                await domain.enable(6, live=True, config=True)
            xml = NUMA.replace("<name>", f"<uuid>{library.UUIDString()}</uuid><name>")
            await asyncio.to_thread(side.connection.defineXML, xml)
            assert (await domain.enable(6, live=True, config=True)).config_changed_ids == (6,)
        for call in (
            domain.state(),
            domain.state(VcpuFlag.CONFIG),
            domain.dump_xml(inactive=True),
            domain.pin(0, "0", VcpuFlag.CONFIG),
            domain.enable(7, config=True),
        ):
            with pytest.raises(qmpvcpu.VcpuConnectionError, match="not connected"):
                await call


async def test_a_call_cancelled_while_it_connects_anew_is_made_good_once(daemon):
    def changing():
        return sum("changes" in one for one in workers())

    async with guest(daemon, start=False) as side:
        library, before = side.domain, changing()
        for mend in ("the next call", "reconnect"):
            async with qmpvcpu.connect("web1", uri=daemon.uri) as domain:
                connect = domain._connect

                async def cancelled():
                    domain._connect = connect  # noqa: B023
                    raise asyncio.CancelledError

                domain._connect = cancelled
                await asyncio.to_thread(library.create)
                with pytest.raises(asyncio.CancelledError):
                    await domain.state()
                if mend == "reconnect":
                    await domain.reconnect()
                for _ in range(2):
                    assert (await domain.state()).active
                assert changing() <= before + 2  # one of the first connection may be about to end
            with pytest.raises(qmpvcpu.VcpuConnectionError, match="not connected"):
                await domain.state()
            await asyncio.to_thread(library.destroy)
        await until(lambda: changing() <= before + 1, "the threads of the others have ended")


async def test_a_definition_that_cannot_follow_is_partial(daemon):
    async with guest(daemon) as side:
        folder = Path(daemon.uri.partition("socket=")[2]).parent / "etc/libvirt/qemu"
        # It cannot be renamed over a folder.
        file = folder / "web1.xml"
        kept = file.rename(file.with_suffix(".kept"))
        file.mkdir()
        try:
            run = await on(daemon, "setvcpu", "web1", "5", "--enable", "--live", "--config")
            assert run.code == 6 and run.json["changed_ids"] == [5], run.stdout
            assert "stays so" in run.json["error"]["message"]
            assert "the definition is as it was" not in run.json["messages"]
            live, config = await side.sides()
            assert b"<vcpu id='5' enabled='yes'" in live
            assert (b"<vcpu id='5' enabled='yes'" in config) == (
                "changed the def" in run.json["error"]["message"]
            )
            run = await on(daemon, "setvcpu", "web1", "6", "--enable", "--config")
            assert run.code == 6 and "cannot keep it" in run.json["error"]["message"], run.stdout
        finally:
            file.rmdir()
            kept.rename(file)


async def test_interrupted_while_another_client_holds_the_domain(daemon):
    async with guest(daemon) as side:
        with stopped(daemon):
            other = asyncio.create_task(asyncio.to_thread(side.domain.setVcpu, "12", 1, 1))
            await held(side)
            words = ("-c", daemon.uri, "setvcpu", "web1", "11", "--enable", "--config", "--json")
            process = await start_until("libvirt.virDomain.setVcpu", *words)
            send(process, signal.SIGINT)
            stdout, _ = await within(process.communicate(), "it is interrupted")
            assert process.returncode == 130, stdout
            assert "may still be" in json.loads(stdout)["error"]["message"], stdout
        with suppress(Exception):
            await other


async def test_an_agent_that_is_not_there_is_no_guest_that_lies(daemon):
    channel = (
        "<channel type='unix'><target type='virtio'"
        " name='org.qemu.guest_agent.0'/></channel></devices>"
    )
    async with guest(daemon, NUMA.replace("</devices>", channel)):
        run = await on(daemon, "guestvcpus", "web1")
        assert (
            run.code == 7 and "QEMU guest agent is not connected" in run.json["error"]["message"]
        ), run.stdout
        assert run.json["error"]["libvirt"] == "VIR_ERR_AGENT_UNRESPONSIVE"
        # A plug is none of its business.
        run = await on(daemon, "setvcpu", "web1", "5", "--enable")
        assert run.code == 0 and "not known" in run.json["messages"][-1], run.stdout


async def test_two_who_want_the_same_have_it(daemon):
    async with guest(daemon):
        async with (
            qmpvcpu.connect("web1", uri=daemon.uri) as one,
            qmpvcpu.connect("web1", uri=daemon.uri) as other,
        ):
            done = await asyncio.gather(one.enable(range(4, 9)), other.enable(range(4, 9)))
            assert [outcome.outcome for outcome in done] == ["applied", "applied"]
            assert (await one.state()).enabled_ids == (0, 1, 2, *range(4, 9))


async def left():
    """File descriptors and threads of this process, once those that end have ended."""
    await until(lambda: not workers(), "its threads have ended")
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


async def test_lost_and_cancelled_connections_leave_nothing(daemon):
    async def lose(domain):
        await daemon.restart(kill=True)
        with pytest.raises(qmpvcpu.VcpuConnectionError):
            await domain.state()
        await domain.reconnect()

    async def cancelled(turns):
        task = asyncio.create_task(use())
        for _ in range(turns):
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])

    async def use():
        async with qmpvcpu.connect("test", uri="test:///default") as domain:
            await domain.state()

    async with guest(daemon):
        async with qmpvcpu.connect("web1", uri=daemon.uri) as domain:
            await lose(domain)
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(4):
                await lose(domain)
            gc.collect()
            assert len(os.listdir("/proc/self/fd")) <= before + 1
            await asyncio.to_thread((await domain_of(daemon)).destroy)
    await use()
    fds, threads = await left()
    for turns in range(40):
        await cancelled(turns)
    after = await left()
    assert after[0] <= fds + 3 and after[1] <= threads + 2, (fds, threads, after)


async def domain_of(daemon):
    import libvirt

    return (await asyncio.to_thread(libvirt.open, daemon.uri)).lookupByName("web1")
