"""`set_vcpus` beside another client that nobody has heard: a count goes on until it is reached."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

import qmpvcpu
from tests.support.fake_qemu import FakeQemu


@pytest.fixture
def unheard(running):
    """A domain with vCPUs 0 to 3 plugged as far as it knows, and others that another client has
    plugged since.
    """

    @asynccontextmanager
    async def start(qemu, *others):
        async with running(qemu) as domain:
            await domain.vcpus()
            for slot in others:
                qemu.fill(slot)
            yield domain

    return start


async def test_a_count_goes_on_where_another_client_has_plugged_unheard(unheard):
    qemu = FakeQemu(8, plugged=(1, 2, 3))
    async with unheard(qemu, 6, 5) as domain:
        outcome = await domain.set_vcpus(2)
        assert sum(row.enabled for row in await domain.vcpus()) == 2
    assert (outcome.outcome, outcome.changed_ids, outcome.ids) == (
        "applied",
        (2, 3, 5, 6),
        (2, 3, 5, 6),
    )
    assert [(row.id, row.enabled) for row in outcome.rows] == [(n, False) for n in (2, 3, 5, 6)]
    assert set(qemu.paths) == {0, 1}


async def test_what_it_had_done_before_the_guest_rejected_the_rest_is_told(unheard):
    qemu = FakeQemu(8, plugged=(1, 2, 3))
    qemu.on_delete = {6: "refused"}
    async with unheard(qemu, 6) as domain:
        with pytest.raises(qmpvcpu.VcpuRejected) as caught:
            await domain.set_vcpus(2)
    assert (caught.value.ids, caught.value.changed_ids) == ((2, 3, 6), (2, 3))


async def test_where_the_rest_is_refused_it_is_partial(unheard):
    qemu = FakeQemu(8, plugged=(1, 2, 3))

    def leave(connection, command):
        if command["execute"] == "device_del":
            qemu.status = "postmigrate"

    async with unheard(qemu, 6) as domain:
        qemu.hook = leave
        with pytest.raises(
            qmpvcpu.VcpuPartial, match="destination; vCPU 2-3 stays changed"
        ) as caught:
            await domain.set_vcpus(2)
    assert (caught.value.remaining, caught.value.changed_ids, caught.value.ids) == (
        (2, 3),
        (2, 3),
        (2, 3, 6),
    )


async def test_a_count_that_fails_after_it_went_on_is_partial(unheard):
    qemu = FakeQemu(8, plugged=(1, 2, 3))
    qemu.on_delete = {6: "error"}
    async with unheard(qemu, 6) as domain:
        with pytest.raises(qmpvcpu.VcpuPartial) as caught:
            await domain.set_vcpus(2)
    assert (caught.value.changed_ids, caught.value.remaining) == ((2, 3), (2, 3))


async def test_of_a_count_that_went_on_what_has_gone_meanwhile_is_not_pending(unheard):
    qemu = FakeQemu(8, plugged=(1, 2, 3))
    qemu.on_delete = dict.fromkeys((2, 3, 6), "silence")

    def hook(connection, command):
        if command["execute"] == "query-status" and len(qemu.sent("device_del")) == 2:
            for slot in {2, 3}.intersection(qemu.paths):
                qemu.let_go(slot)

    async with unheard(qemu, 6) as domain:
        qemu.hook = hook
        outcome = await domain.set_vcpus(2, wait=False)
        assert domain.pending_ids == outcome.pending == (6,)
    assert (outcome.outcome, outcome.changed_ids, outcome.ids) == ("requested", (2, 3), (2, 3, 6))
    assert [row.enabled for row in outcome.rows] == [False, False, True]
