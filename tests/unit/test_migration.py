"""What goes with a guest that migrates, what stands against it, and which side runs it whatever happens."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from qmpvcpu.core.guest import GuestCpu, GuestView
from qmpvcpu.core.inventory import BootFacts, CpuInfoFast, HotpluggableCpu, build_state
from qmpvcpu.core.migration import (
    CPU_HOTPLUG,
    Cookie,
    Destination,
    MigrationStatus,
    Source,
    Step,
    address_of,
    check_arrived,
    check_cpu_operation,
    check_features,
    check_hangs,
    check_machine,
    check_one_cpu,
    check_source,
    cpus_but_first,
    features_of,
    is_in_order,
    machine_of,
    missing,
    needs_one_cpu,
    next_step,
    parse_status,
)
from qmpvcpu.core.model import Props, QemuVersion
from qmpvcpu.errors import VcpuRefused
from qmpvcpu.xml.domain import read_domain
from qmpvcpu.xml.migration import read_cookie, write_cookie


def state(*plugged, maxcpus=8, driver="t", nodes=False, machine="pc-q35-10.0"):
    slots = [
        HotpluggableCpu(
            driver,
            1,
            Props({"socket-id": n // 4, "core-id": n % 4, **({"node-id": n // 4} if nodes else {})}),
            f"/machine/peripheral/vcpu{n}" if n in plugged else None,
        )
        for n in range(maxcpus)
    ]
    cpus = [CpuInfoFast(n, f"/machine/peripheral/vcpu{n}", 100 + n, None) for n in plugged]
    return build_state(BootFacts("d", "x86_64", machine, False, QemuVersion(10, 0), None), slots, cpus)


def machine(*plugged, **more):
    return machine_of(state(*plugged, **more))


@pytest.mark.parametrize(
    ("vcpus", "in_order"),
    [
        ([(True, 1), (True, 2), (False, None)], True),
        ([(True, 1), (True, 1), (True, 2), (True, 2)], True),
        ([(True, None), (True, None), (False, None)], True),
        ([(True, 1), (False, None), (True, 2)], False),
        ([(True, 2), (True, 1)], False),
        ([(True, 1), (True, 3), (True, 2)], False),
        ([], True),
    ],
)
def test_libvirts_condition(vcpus, in_order):
    assert is_in_order(vcpus) is in_order


def test_the_feature_is_named_when_either_side_needs_it():
    sparse = read_domain(
        b"<domain><name>d</name><vcpu current='2'>8</vcpu><vcpus><vcpu id='0' enabled='yes' hotpluggable='no'/>"
        b"<vcpu id='5' enabled='yes' hotpluggable='yes'/></vcpus></domain>"
    )[1]
    assert features_of(state(0, 1), None) == frozenset()
    assert features_of(state(0, 5), None) == {CPU_HOTPLUG}
    assert features_of(state(1, 0), None) == {CPU_HOTPLUG}
    assert features_of(state(0, 1), sparse) == {CPU_HOTPLUG}


def test_features_we_do_not_know_are_refused_by_name():
    cookie = Cookie("d", None, b"<domain/>", features=frozenset({CPU_HOTPLUG, "warp", "allow-reboot"}))
    (refusal,) = check_features(cookie)
    assert refusal.message.endswith("allow-reboot, warp")
    assert not check_features(replace(cookie, features=frozenset({CPU_HOTPLUG})))


SOURCE = machine(0, 1, 5)


@pytest.mark.parametrize(
    ("here", "texts"),
    [
        (machine(0, 1, 5), []),
        (machine(0, 1), ["vCPU 5 is plugged at the source, and not at the destination"]),
        (machine(0, 1, 4, 5), ["vCPU 4 is plugged at the destination, and not at the source"]),
        (machine(0, 1, 4), ["vCPU 4 is plugged at the destination", "vCPU 5 is plugged at the source"]),
        (
            machine(0, 1, 5, maxcpus=6),
            ["maximum of vCPUs: 8 at the source, 6", "vCPU 6-7: the destination has no"],
        ),
        (machine(0, 1, 5, driver="u"), ["vCPU 0-7 is a: t at the source, u"]),
        (machine(0, 1, 5, machine="pc-q35-7.2"), ["machine type: pc-q35-10.0 at the source, pc-q35-7.2"]),
        (
            machine(0, 1, 5, nodes=True),
            ["NUMA node of vCPU 0-3: none at the source, 0", "NUMA node of vCPU 4-7: none at the source, 1"],
        ),
    ],
)
def test_everything_in_which_the_destination_differs(here, texts):
    found = [refusal.message for refusal in check_arrived(SOURCE, here)]
    assert len(found) == len(texts)
    for message, text in zip(found, texts, strict=True):
        assert message.startswith(text)


def test_another_slot_under_the_same_id():
    here = replace(SOURCE, slots=tuple(replace(s, props=Props({**s.props, "core-id": 9})) for s in SOURCE.slots))
    (refusal,) = check_machine(SOURCE, here)
    assert refusal.message.startswith("vCPU 0-7: its slot is another one")


def test_what_is_missing_comes_in_the_sources_order():
    assert [slot.ids for slot in missing(machine(0, 6, 2, 5), machine(0))] == [(6,), (2,), (5,)]


def test_a_source_that_cannot_go():
    here = state(0, 1, 5)
    assert not check_source(here, "running", MigrationStatus(), ())
    texts = [one.message for one in check_source(here, "running", MigrationStatus("active", blocked=("x",)), (5,))]
    assert texts[0].startswith("vCPU 5: its unplug is pending") and "active" in texts[1] and "x" in texts[2]
    assert "migrate-cancel" in check_source(here, "postmigrate", MigrationStatus("completed"), ())[0].hint
    assert check_cpu_operation("running", MigrationStatus("active"))
    assert check_cpu_operation("postmigrate", MigrationStatus("completed"))
    assert not check_cpu_operation("running", MigrationStatus("failed"))
    assert not check_cpu_operation("inmigrate", MigrationStatus("setup"))


@pytest.mark.parametrize(
    "reply", [None, [], {}, {"status": 7, "ram": [], "socket-address": 1}, {"ram": {"total": -1}}]
)
def test_what_is_no_status(reply):
    assert parse_status(reply).percent is None


def test_status_and_addresses():
    status = parse_status({"status": "active", "ram": {"total": 200, "remaining": 50, "transferred": 9}})
    assert (status.percent, status.transferred, status.is_active) == (75, 9, True)
    inet = {"type": "inet", "host": "::", "port": "44"}
    assert address_of(parse_status({"socket-address": [inet]}), "h") == "tcp:h:44"
    assert address_of(parse_status({"socket-address": [inet]}), "fe80::1") == "tcp:[fe80::1]:44"
    assert address_of(parse_status({"socket-address": [{"type": "unix", "path": "/s"}]}), None) == "unix:/s"
    assert address_of(MigrationStatus(), None) is None


def test_never_two_and_the_source_goes_on_unless_somebody_may_run_it():
    """Every pair that can be: the table's promises, not its rows."""
    for source, destination in product(Source, Destination):
        try:
            step = next_step(source, destination)
        except KeyError:
            # A source that keeps the guest, or may, is never followed by a destination that was told to run.
            assert source in (Source.KEPT, Source.UNKNOWN)
            assert destination in (Destination.RUNNING, Destination.DIED, Destination.UNKNOWN)
            continue
        if step is Step.START_DESTINATION:
            assert source in (Source.COMPLETED, Source.DEAD) and destination is Destination.WHOLE
        if step is Step.GO_BACK:
            assert source in (Source.COMPLETED, Source.KEPT)
            assert destination not in (Destination.RUNNING, Destination.UNKNOWN)
        if step is Step.END_SOURCE:
            assert destination is Destination.RUNNING
        if destination is Destination.UNKNOWN or (source, destination) == (Source.UNKNOWN, Destination.WHOLE):
            assert step is Step.LEAVE
        if destination is Destination.OTHER and source in (Source.DEAD, Source.UNKNOWN):
            # It may be the only copy.
            assert step is Step.LEAVE


XML = b"<?xml version='1.0'?>\n<!-- c --><domain type='kvm'>\n  <name>d</name>\n  <vcpu>8</vcpu>\n</domain>\n"


def test_the_cookie_comes_back_as_it_was():
    cookie = Cookie("d&", "u-1", XML, XML, frozenset({CPU_HOTPLUG}), machine(0, 6, 2, nodes=True), runs=False)
    text = write_cookie(cookie)
    assert b"<feature name='cpu-hotplug'/>" in text.replace(b'"', b"'")
    back = read_cookie(text)
    inner = XML[XML.index(b"<domain") :].strip()
    assert back == replace(cookie, xml=inner, persistent=inner)
    assert read_cookie(write_cookie(back)) == back
    # Elements that a reader does not know are no business of his.
    assert read_cookie(text.replace(b"<uuid>", b"<warp speed='9'/><uuid>")) == back


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"qemu-migration", b"domain", "is no <qemu-migration>"),
        (b"<live", b"<dead", None),
        (b"<name>d&amp;</name>", b"", "<name> is missing"),
        (b"plugged='yes' order='1'", b"plugged='yes' order='x'", "order='x'"),
        (b"<slot vcpus='0'", b"<slot vcpus='99999'", "needs vcpus"),
        (b"<slot vcpus='0'", b"<slot vcpus='1'", "names vCPU 1-7"),
        (b"name='core-id'", b"name='=id'", "is no property"),
        (b"<vcpu>8</vcpu>", b"<vcpu>x</vcpu>", "is no number"),
        (b"<live", b"<!DOCTYPE x><live", None),
    ],
)
def test_what_is_no_cookie(old, new, words):
    text = write_cookie(Cookie("d&", "u-1", XML, XML, frozenset({CPU_HOTPLUG}), machine(0, 1)))
    assert old in text
    with pytest.raises(VcpuRefused, match=words):
        read_cookie(text.replace(old, new))


@pytest.mark.parametrize(
    ("arch", "version", "enabled", "removals", "code"),
    [
        ("ppc64", QemuVersion(10, 0), (0, 1), 0, "one-cpu"),
        ("ppc64", QemuVersion(10, 0), (0,), 0, None),
        ("ppc64", QemuVersion(8, 2), (0, 1), 0, "one-cpu"),
        ("ppc64", QemuVersion(8, 1, 5), (0, 1), 0, "decrementer"),
        ("ppc64", QemuVersion(7, 2, 22), (0, 1), 0, "decrementer"),
        ("ppc64", QemuVersion(7, 2, 22), (0,), 0, "decrementer"),
        ("ppc64", QemuVersion(11, 1), (0, 1), 0, None),
        ("x86_64", QemuVersion(10, 0, 2), (0, 1), 1, "setup"),
        ("x86_64", QemuVersion(10, 0, 2), (0, 1), 0, None),
        ("x86_64", QemuVersion(11, 1), (0, 1), 3, None),
    ],
)
def test_what_is_known_to_hang(arch, version, enabled, removals, code):
    here = replace(state(*enabled), arch=arch, version=version, accel="tcg")
    assert [one.code for one in check_hangs(here, removals)] == ([code] if code else [])
    assert all(one.forceable for one in check_hangs(here, removals))
    assert not check_hangs(replace(here, accel="kvm"), removals)
    assert needs_one_cpu(here) is (code == "one-cpu")


def test_what_hangs_says_what_to_do():
    old, newer = (
        check_hangs(replace(state(0, 1), arch="ppc64", version=version, accel="tcg"), 0)[0]
        for version in (QemuVersion(7, 2), QemuVersion(10, 0))
    )
    assert "does not migrate the decrementer" in old.message and "--agent" not in old.hint
    assert "no interrupt reaches any vCPU but the first" in newer.message
    assert "--agent ADDR" in newer.hint and "--dest-agent ADDR" in newer.hint
    for one in (old, newer):
        assert "QEMU 11.1 or KVM; --force" in one.hint and one.forceable


def test_which_cpus_are_offline_on_the_way():
    cpus = tuple(GuestCpu(n, n in (0, 1, 3)) for n in range(5))
    view = GuestView(cpus, {0: cpus[0], 1: cpus[1], 6: cpus[3]})
    assert check_one_cpu(view) is None and cpus_but_first(view) == (1, 3)
    assert check_one_cpu(replace(view, by_vcpu={})) is None
    assert "CPU 0 is vCPU 6" in check_one_cpu(replace(view, by_vcpu={6: cpus[0]}))
    assert "CPU 0 is offline" in check_one_cpu(GuestView((GuestCpu(0, False), *cpus[1:]), {}))
