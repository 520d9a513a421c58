"""Wrong words of a call: every public call refuses them as usage, with what to give, before
anything happens.
"""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

import qmpvcpu
from qmpvcpu import Domain, QmpLog, Request, VcpuFlag, VcpuUsageError, connect, parse_ids
from tests.support.fake_qemu import FakeQemu
from tests.support.fake_qmp import serve

NAN = math.nan

CALLS = {
    "a domain that is a number": lambda: connect(5),
    "a domain that is bytes": lambda: connect(b"web1"),
    "a client as an address": lambda: connect(qmp=QMPClient("x")),
    "addresses that are numbers": lambda: connect(qmp=[5]),
    "an agent that is a number": lambda: connect("a", agent=5),
    "an unknown keyword": lambda: connect("a", timeout=3),
    "too many arguments": lambda: connect("a", "b"),
    "a log that is a number": lambda: connect("a", qmp_log=5),
    "an XML whose name has a NUL": lambda: connect("a", xml="a\0"),
    "an address that no encoding has": lambda: connect("a", qmp="\ud800"),
    "an address among others that no encoding has": lambda: connect("a", qmp=["b", "\ud800"]),
    "another way": lambda: connect("a", via="ssh"),
    "a deadline that is not a number": lambda: connect("a", connect_timeout=NAN),
    "a deadline in the past": lambda: connect("a", connect_timeout=-1),
    "a deadline as text": lambda: connect("a", command_timeout="3"),
    "an endless deadline": lambda: connect("a", command_timeout=math.inf),
    "a list that is a number": lambda: parse_ids(5),
    "a log at a number": lambda: QmpLog(5),
    "a request with an unknown field": lambda: Request((1,), sooner=True),
    "a request of text": lambda: Request("1"),
    "a request with a truth value as id": lambda: Request((True,)),
    "a request that has no end": lambda: Request((1,), timeout=NAN),
    "smp as a number": lambda: qmpvcpu.parse_smp(3),
    "a mode that there is not": lambda: qmpvcpu.find_layout(None, mode="sometimes").send(None),
    "numa as one text": lambda: qmpvcpu.parse_numa("node"),
}

METHODS = {
    "a timeout as text": lambda domain: domain.enable(1, timeout="3"),
    "a timeout that is not a number": lambda domain: domain.enable(1, timeout=NAN),
    "a timeout that is true": lambda domain: domain.enable(1, timeout=True),
    "a negative timeout": lambda domain: domain.enable(1, timeout=-1),
    "an unknown option": lambda domain: domain.enable(1, tiemout=3),
    "a truth value as id": lambda domain: domain.enable(True),
    "a truth value among ids": lambda domain: domain.disable([1, True]),
    "text as id": lambda domain: domain.enable("1"),
    "text among ids": lambda domain: domain.enable(["1"]),
    "a fraction as id": lambda domain: domain.enable(1.0),
    "no id": lambda domain: domain.enable(None),
    "an empty list": lambda domain: domain.enable([]),
    "text from an iterator": lambda domain: domain.enable(iter(["1"])),
    "no argument": lambda domain: domain.vcpu(),
    "flags as text": lambda domain: domain.vcpu(1, "live"),
    "a count as text": lambda domain: domain.numa_node(0, VcpuFlag.ENABLE, count="2"),
    "a node that is none": lambda domain: domain.numa_node(None),
    "an option that is nearly true": lambda domain: domain.enable(1, force="no"),
    "a retry that is true": lambda domain: domain.disable(1, retry=True),
    "a fraction of vCPUs": lambda domain: domain.set_vcpus(2.5),
    "a state of text": lambda domain: domain.state("live"),
    "one host CPU that is no list": lambda domain: domain.pin(1, 5),
    "a pin with odd flags": lambda domain: domain.pin(1, [0], 9.5),
    "a document as text": lambda domain: domain.apply("<vcpus/>"),
    "a request that is none": lambda domain: domain.request(5),
    "a dialect that is a number": lambda domain: domain.dump_xml(dialect=5),
    "more ids than any machine has": lambda domain: domain.enable(range(10**9)),
    "online as text": lambda domain: domain.set_guest_vcpus(1, "yes"),
    "vCPUs as text": lambda domain: domain.vcpus("1"),
    "a place as text": lambda domain: domain.place("<domain/>"),
    "a plan with a wrong timeout": lambda domain: domain.plan_enable(1, timeout="3"),
    "save to a number": lambda domain: domain.save(5),
    "migrate to a number": lambda domain: domain.migrate(5, 5),
    "read from a descriptor that is not open": lambda domain: domain.migration.read_saved(-1, 0),
    "read from a descriptor that cannot be": lambda domain: domain.migration.read_saved(10**30, 0),
    "destroy without a name": lambda domain: qmpvcpu.destroy(),
    "start a number": lambda domain: qmpvcpu.start(5),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_usage_with_a_hint(name):
    with pytest.raises(VcpuUsageError) as caught:
        CALLS[name]()
    assert caught.value.hint


@pytest.mark.parametrize("name", METHODS)
async def test_a_wrong_call_of_a_domain_is_usage_with_a_hint_and_asks_qemu_nothing(tmp_path, name):
    qemu = FakeQemu()
    async with serve(tmp_path, qemu.script) as path, connect(path) as domain:
        before = list(qemu.commands)
        with pytest.raises(VcpuUsageError) as caught:
            await METHODS[name](domain)
        assert (bool(caught.value.hint), qemu.commands) == (True, before)


@pytest.mark.parametrize("limit", ["5", True, 0, NAN])
def test_a_limit_of_events_is_a_number_above_0(limit):
    with pytest.raises(VcpuUsageError):
        connect("a").events(limit=limit)


def test_a_mistyped_keyword_hints_at_the_near_one():
    with pytest.raises(VcpuUsageError) as caught:
        connect("a", timeout=3)
    assert caught.value.hint == "did you mean connect_timeout?"


async def test_a_path_is_as_good_as_its_text(tmp_path):
    async with serve(tmp_path, FakeQemu().script) as path, connect(Path(path)) as domain:
        assert (await domain.enable(iter([1]))).changed_ids == (1,)


def public_calls(kind):
    for name, member in inspect.getmembers(kind, inspect.iscoroutinefunction):
        if not name.startswith("_") and len(inspect.signature(member).parameters) > 1:
            yield name


@pytest.mark.parametrize("name", sorted(public_calls(Domain)))
async def test_every_call_of_a_domain_refuses_an_unknown_keyword_as_usage(name):
    with pytest.raises(VcpuUsageError, match="has no argument 'no_such'"):
        await getattr(connect("a"), name)(no_such=1)


@pytest.mark.parametrize("name", sorted(public_calls(type(connect("a").migration))))
async def test_every_call_of_a_migration_refuses_an_unknown_keyword_as_usage(name):
    with pytest.raises(VcpuUsageError, match="has no argument 'no_such'"):
        await getattr(connect("a").migration, name)(no_such=1)
