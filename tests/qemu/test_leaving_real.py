"""Leaving a domain always closes it, and of several addresses the one that is free is found at
once.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import qmpvcpu
from tests.support.awaits import cancelled_at
from tests.support.commands import cli, start_cli
from tests.support.leaks import nothing_left
from tests.support.qemus import MACHINES, qemu_binary, running
from tests.support.waiting import within

pytestmark = pytest.mark.qemu

SOCKETS = ("one", "two", "three")


@pytest.fixture
async def qemu(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    arguments = [
        *MACHINES["x86_64"],
        "-S",
        "-nodefaults",
        "-display",
        "none",
        "-smp",
        "2,maxcpus=8",
    ]
    async with running(qemu_binary("10.0", "x86_64"), arguments, monitors=SOCKETS) as process:
        yield process


def paths(qemu) -> list[str]:
    return [str(qemu.folder / name) for name in SOCKETS]


async def visit(qmp) -> None:
    async with qmpvcpu.connect(qmp=qmp) as domain:
        await domain.state()


async def listen(qmp) -> None:
    async with qmpvcpu.connect(qmp=qmp, watch=True) as domain, domain.events() as events:
        async for _ in events:
            pass


async def come_again(qmp) -> None:
    async with qmpvcpu.connect(qmp=qmp) as domain:
        await domain.reconnect()


async def every_await(work: Any, *folders) -> int:
    """Cancel it at each of its awaits in turn, until it ends before: how many there were. Each time
    all is given back.
    """
    number = 0
    while True:
        number += 1
        async with nothing_left(*folders):
            try:
                await within(cancelled_at(work(), number), f"the end, cancelled at await {number}")
            except asyncio.CancelledError:
                continue
            return number - 1


@pytest.mark.parametrize("visitor", [visit, come_again], ids=["left", "reconnected"])
async def test_cancelled_at_any_await_a_domain_is_closed(qemu, tmp_path, visitor):
    one = paths(qemu)[0]
    assert await every_await(lambda: visitor(one), tmp_path) > 5
    # Its socket takes one client: it is free again.
    await visit(one)


async def test_cancelled_at_any_await_of_a_choice_each_address_is_free_again(qemu, tmp_path):
    one, two, three = paths(qemu)
    async with qmpvcpu.connect(one):
        assert await every_await(lambda: visit([one, two, three]), tmp_path) > 5
        await visit(two)
        await visit(three)


async def test_a_second_cancel_does_not_keep_it_open(qemu, tmp_path):
    one = paths(qemu)[0]
    for number in range(1, 40):
        async with nothing_left(tmp_path):
            task = asyncio.create_task(visit(one))
            for _ in range(number):
                await asyncio.sleep(0)
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0)
            await asyncio.wait([task])
    await visit(one)


async def test_events_that_are_cancelled_leave_nothing(qemu, tmp_path):
    async with nothing_left(tmp_path):
        task = asyncio.create_task(listen(paths(qemu)[0]))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()


async def test_a_busy_address_is_not_waited_out(qemu):
    """It would be 5 s each."""
    one, two, three = paths(qemu)
    async with qmpvcpu.connect(one), qmpvcpu.connect(two):
        async with asyncio.timeout(4):
            await visit([one, two, three])


async def test_a_loser_is_let_go_at_once(qemu):
    """Two attempts wait at busy sockets when the third greets: each is free for the next client."""
    one, two, three = paths(qemu)
    async with qmpvcpu.connect(one), qmpvcpu.connect(two), qmpvcpu.connect(qmp=[one, two, three]):
        pass
    await visit(one)
    await visit(two)


async def test_all_addresses_busy_say_so_together(qemu):
    one, two, _ = paths(qemu)
    async with qmpvcpu.connect(one), qmpvcpu.connect(two):
        with pytest.raises(qmpvcpu.VcpuConnectionError) as caught:
            async with qmpvcpu.connect(qmp=[one, two], connect_timeout=0.3):
                pass
    assert (caught.value.reason, caught.value.message.count("did not greet within 0.3 s")) == (
        "no-greeting",
        2,
    )


async def test_a_watcher_takes_the_last_address(qemu):
    one, two, three = paths(qemu)
    async with qmpvcpu.connect(qmp=[one, two, three], watch=True):
        await visit(one)
        await visit(two)


async def test_a_watched_guest_is_switched_as_fast_as_another(qemu):
    """`watch` in one terminal, commands in the next."""
    one, two, _ = paths(qemu)
    await qemu.execute("cont")
    addresses = ["define", "w", "--qmp", one, "--qmp", two]
    assert (await cli(*addresses)).code == 0
    watch = await start_cli("watch", "w", "--json")
    await within(watch.stdout.readline(), "its snapshot")
    try:
        async with asyncio.timeout(4):
            assert (await cli("setvcpu", "w", "5", "--enable")).code == 0
        assert b"vcpu-added" in await within(watch.stdout.readline(), "the event")
    finally:
        watch.kill()
        await watch.wait()


async def in_another_loop(work) -> BaseException | None:
    def run() -> BaseException | None:
        async def body() -> BaseException | None:
            try:
                await work()
            except BaseException as error:
                return error
            return None

        return asyncio.run(body())

    return await within(asyncio.to_thread(run), "the end in the other event loop")


CALLS = {
    "state": lambda domain: domain.state(),
    "vcpu": lambda domain: domain.vcpu(1),
    "enable": lambda domain: domain.enable(5),
    "plan": lambda domain: domain.plan_enable(5),
    "dump": lambda domain: domain.dump_xml(),
    "agent": lambda domain: domain.agent_refusal(),
    "migrate": lambda domain: domain.migrate_begin(),
    "reconnect": lambda domain: domain.reconnect(),
    "events": lambda domain: domain.events().__aenter__(),
    "leave": lambda domain: domain.__aexit__(None, None, None),
}


@pytest.mark.parametrize("name", CALLS)
async def test_from_another_event_loop_it_is_wrong_use(qemu, name):
    async with qmpvcpu.connect(paths(qemu)[0]) as domain:
        error = await in_another_loop(lambda: CALLS[name](domain))
        assert isinstance(error, qmpvcpu.VcpuUsageError)
        # And it still works where it belongs.
        assert (await domain.state()).maxcpus == 8


async def test_events_are_read_in_one_event_loop(qemu):
    async with qmpvcpu.connect(paths(qemu)[0]) as domain, domain.events() as events:
        error = await in_another_loop(lambda: anext(events))
        assert isinstance(error, qmpvcpu.VcpuUsageError)


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"leave"}))
async def test_what_is_not_entered_is_wrong_use(name):
    with pytest.raises(qmpvcpu.VcpuUsageError, match="not entered"):
        await CALLS[name](qmpvcpu.connect("/run/nobody"))
