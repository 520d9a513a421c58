"""What goes with a guest that migrates, what stands against it, and which side runs it whatever
happens.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from qmpvcpu import QemuVersion, VcpuRefused
from tests.support.inventory import Qemu
from tests.support.migrating import (
    DESTINATIONS,
    SOURCES,
    address,
    against_destination,
    against_hotplug,
    against_leaving,
    against_one_cpu,
    against_trip,
    cookie,
    differences,
    features,
    last_words,
    offline_on_the_way,
    read,
    stands_still,
    status,
    step,
    to_cancel,
    to_plug,
    travels_with_one_cpu,
    unknown_features,
    with_picture,
    written,
)
from tests.support.states import ppc64, x86


def state(*plugged, maxcpus=8, driver="t", nodes=False, machine="pc-q35-10.0", first_core=0):
    """Sockets of four cores; what is plugged came in this order."""
    paths = {n: f"/machine/peripheral/vcpu{n}" for n in plugged}
    slots = [
        {
            "type": driver,
            "vcpus-count": 1,
            "props": {
                "socket-id": n // 4,
                "core-id": n % 4 + first_core,
                **({"node-id": n // 4} if nodes else {}),
            },
            **({"qom-path": paths[n]} if n in paths else {}),
        }
        for n in range(maxcpus)
    ]
    cpus = [{"cpu-index": n, "qom-path": path, "thread-id": 100 + n} for n, path in paths.items()]
    return Qemu(machine=machine).state(slots, cpus)


# -- what a reader must know -----------------------------------------------------------------------

IN_ORDER, NEEDED = frozenset(), frozenset({"cpu-hotplug"})


def definition(*vcpus):
    """Each with whether it is enabled, and its order."""
    rows = "".join(
        f"<vcpu id='{n}' enabled='{'yes' if enabled else 'no'}'"
        f" hotpluggable='{'yes' if n else 'no'}'" + (f" order='{order}'/>" if order else "/>")
        for n, (enabled, order) in enumerate(vcpus)
    )
    current = sum(enabled for enabled, _ in vcpus)
    text = (
        "<domain><name>d</name><vcpu"
        f" current='{current}'>{len(vcpus)}</vcpu><vcpus>{rows}</vcpus></domain>"
    )
    return text.encode()


@pytest.mark.parametrize(
    ("vcpus", "needed"),
    [
        ([(True, 1), (True, 2), (False, None)], IN_ORDER),
        ([(True, None), (True, None), (False, None)], IN_ORDER),
        ([(True, 1), (False, None), (True, 2)], NEEDED),
        ([(True, 1), (True, 3), (True, 2)], NEEDED),
    ],
)
def test_libvirts_condition(vcpus, needed):
    assert features(state(0, 1), definition(*vcpus)) == needed


@pytest.mark.parametrize(
    ("live", "needed"),
    [
        (state(0, 1), IN_ORDER),
        (state(0, 5), NEEDED),
        (state(1, 0), NEEDED),
        # All vCPUs of a core have one order.
        (ppc64((0, 1), threads=2), IN_ORDER),
    ],
)
def test_the_feature_is_named_where_the_running_guest_needs_it(live, needed):
    assert features(live) == needed


def test_a_guest_without_vcpus_is_in_order():
    assert features(Qemu(machine="none").state(None, [])) == IN_ORDER


def test_features_we_do_not_know_are_refused_by_name():
    (refusal,) = unknown_features({"cpu-hotplug", "warp", "allow-reboot"})
    assert refusal.message.endswith("allow-reboot, warp")


def test_features_we_know_are_not_refused():
    assert unknown_features({"cpu-hotplug"}) == []


# -- the other side --------------------------------------------------------------------------------

SOURCE = state(0, 1, 5)


@pytest.mark.parametrize(
    ("here", "texts"),
    [
        (state(0, 1, 5), []),
        (state(0, 1), ["vCPU 5 is plugged at the source, but not at the destination"]),
        (state(0, 1, 4, 5), ["vCPU 4 is plugged at the destination, but not at the source"]),
        (
            state(0, 1, 4),
            ["vCPU 4 is plugged at the destination", "vCPU 5 is plugged at the source"],
        ),
        (
            state(0, 1, 5, maxcpus=6),
            ["maximum of vCPUs: 8 at the source, 6", "vCPU 6-7: the destination has no"],
        ),
        (state(0, 1, 5, driver="u"), ["the driver of vCPU 0-7: t at the source, u"]),
        (
            state(0, 1, 5, machine="pc-q35-7.2"),
            ["machine type: pc-q35-10.0 at the source, pc-q35-7.2"],
        ),
        (
            state(0, 1, 5, nodes=True),
            [
                "NUMA node of vCPU 0-3: none at the source, 0",
                "NUMA node of vCPU 4-7: none at the source, 1",
            ],
        ),
        (state(0, 1, 5, first_core=9), ["vCPU 0-7 has another slot"]),
    ],
    ids=["none", "missing", "extra", "both", "maxcpus", "driver", "machine", "nodes", "slot"],
)
def test_everything_in_which_the_destination_differs(here, texts):
    found = differences(SOURCE, here)
    assert [message[: len(text)] for message, text in zip(found, texts, strict=True)] == texts


def test_what_is_missing_comes_in_the_sources_order():
    assert to_plug(state(0, 6, 2, 5), state(0)) == [(6,), (2,), (5,)]


# -- now -------------------------------------------------------------------------------------------

ACTIVE = {"status": "active"}


def test_a_guest_that_runs_can_leave():
    assert against_leaving(SOURCE, "running") == []


@pytest.mark.parametrize(
    ("run_state", "words"),
    [
        ("shutdown", "only after a reset"),
        ("guest-panicked", "its kernel has crashed"),
        ("internal-error", "QEMU cannot run it any further"),
        ("io-error", "a disk has failed"),
        ("inmigrate", "waits for an incoming migration"),
        ("save-vm", "the guest is 'save-vm'"),
    ],
)
def test_a_guest_in_a_state_that_makes_no_sense_of_it_does_not_leave(run_state, words):
    (refusal,) = against_leaving(SOURCE, run_state)
    assert words in refusal.message


@pytest.mark.parametrize(("machine", "codes"), [(SOURCE, []), (ppc64([0, 1]), ["pending"])])
def test_paused_on_the_way_a_pending_unplug_goes_along_where_the_machine_saves_it(machine, codes):
    found = against_leaving(machine, "running", pending=[1], is_paused=True)
    assert [refusal.code for refusal in found] == codes


def test_every_reason_against_leaving_is_told_together():
    found = against_leaving(
        SOURCE, "running", ACTIVE | {"blocked-reasons": ["x-device"]}, pending=[5]
    )
    words = ["vCPU 5: its unplug is pending", "active", "x-device"]
    assert [word in refusal.message for word, refusal in zip(words, found, strict=True)] == [
        True
    ] * 3


def test_a_guest_that_has_left_can_be_let_go_on():
    assert (
        "migrate-cancel" in against_leaving(SOURCE, "postmigrate", {"status": "completed"})[0].hint
    )


@pytest.mark.parametrize(
    ("run_state", "reply", "is_refused"),
    [
        ("running", "active", True),
        ("postmigrate", "completed", True),
        ("running", "failed", False),
        ("inmigrate", "setup", False),
    ],
)
def test_no_vcpu_is_switched_on_the_way(run_state, reply, is_refused):
    assert bool(against_hotplug(run_state, {"status": reply})) is is_refused


# -- what query-migrate tells ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply", [None, [], {}, {"status": 7, "ram": [], "socket-address": 1}, {"ram": {"total": -1}}]
)
def test_what_is_not_a_status_tells_no_progress(reply):
    assert status(reply).percent is None


STATUS = {"status": "active", "ram": {"total": 200, "remaining": 50, "transferred": 9}}


@pytest.mark.parametrize(
    ("member", "value"), [("percent", 75), ("transferred", 9), ("is_active", True)]
)
def test_a_status(member, value):
    assert getattr(status(STATUS), member) == value


INET = {"type": "inet", "host": "::", "port": "44"}


@pytest.mark.parametrize(
    ("listening", "host", "uri"),
    [
        ([INET], "h", "tcp:h:44"),
        ([INET], "fe80::1", "tcp:[fe80::1]:44"),
        ([{"type": "unix", "path": "/s"}], None, "unix:/s"),
        ([], None, None),
    ],
)
def test_where_a_destination_listens(listening, host, uri):
    assert address({"socket-address": listening}, host) == uri


# -- who runs it -----------------------------------------------------------------------------------

#: Every pair that can be, with the step: the promises of the table are tested, not its rows.
STEPS = [(source, there, step(source, there)) for source, there in product(SOURCES, DESTINATIONS)]


def pairs(*steps):
    return [(source, there) for source, there, found in STEPS if found in steps]


def test_only_a_source_that_keeps_the_guest_or_may_has_pairs_that_cannot_be():
    assert {source for source, _ in pairs(None)} <= {"kept", "unknown"}


def test_a_destination_that_was_told_to_run_cannot_follow_a_source_that_keeps_the_guest():
    assert {there for _, there in pairs(None)} <= {"running", "died", "unknown"}


def test_a_destination_is_started_only_when_the_source_has_handed_over_or_is_dead():
    assert {source for source, _ in pairs("start-destination")} == {"completed", "dead"}


def test_only_a_whole_guest_is_started():
    assert {there for _, there in pairs("start-destination")} == {"whole"}


def test_only_a_source_that_lives_goes_on():
    assert {source for source, _ in pairs("go-back")} <= {"completed", "kept"}


def test_a_source_does_not_go_on_while_the_destination_may_run():
    assert {there for _, there in pairs("go-back")}.isdisjoint({"running", "unknown"})


def test_a_source_is_ended_only_when_the_destination_runs():
    assert {there for _, there in pairs("end-source")} == {"running"}


@pytest.mark.parametrize(
    ("source", "there"), [*((source, "unknown") for source in SOURCES), ("unknown", "whole")]
)
def test_where_nobody_can_tell_whether_the_other_side_runs_neither_is_touched(source, there):
    # A source that keeps the guest is never followed by one that may run.
    assert step(source, there) == (None if source == "kept" else "leave")


@pytest.mark.parametrize("source", ["dead", "unknown"])
def test_what_may_be_the_only_copy_is_not_touched(source):
    assert step(source, "other") == "leave"


# -- what there is to cancel, and when nothing moves any more --------------------------------------

MOVES = {"status": "active", "ram": {"transferred": 1, "remaining": 9, "total": 10}}
ARRIVED = {"status": "completed"}
LEFT = {"status": "completed", "ram": {"transferred": 10, "remaining": 0, "total": 10}}


@pytest.mark.parametrize(
    ("run_state", "reply", "is_prepared", "what"),
    [
        ("inmigrate", None, True, "end-waiting"),
        ("inmigrate", MOVES, False, "end-waiting"),
        ("paused", ARRIVED, True, "end-arrived"),
        ("paused", ARRIVED, False, "nothing"),
        ("paused", LEFT, True, "nothing"),
        ("running", MOVES, False, "stop"),
        ("paused", MOVES, False, "stop"),
        ("postmigrate", LEFT, False, "take-back"),
        ("running", None, False, "nothing"),
        ("running", ARRIVED, True, "nothing"),
    ],
)
def test_what_there_is_to_cancel(run_state, reply, is_prepared, what):
    assert to_cancel(run_state, reply, is_prepared=is_prepared) == what


def moves(transferred, word="active"):
    return {
        "status": word,
        "ram": {"transferred": transferred, "remaining": 100 - transferred, "total": 100},
    }


def test_memory_that_moves_has_no_end_of_its_time():
    assert stands_still((29.0 * n, moves(n)) for n in range(1, 5)) == [None] * 4


def test_memory_that_stands_still_for_30_s_is_stopped():
    found = stands_still([(0.0, moves(1)), (30.0, moves(1)), (30.1, moves(1))])
    assert found == [None, None, "no progress for 30 s ('active'): cancelled"]


def test_sides_that_do_not_connect_have_10_s():
    found = stands_still([(0.0, moves(0, "setup")), (10.1, moves(0, "setup"))])
    assert found[1].startswith("no progress for 10 s ('setup'): cancelled (QEMU 10.0 under TCG")


# -- what stands against a destination -------------------------------------------------------------

TWO_OF_8 = b"<domain type='kvm'><name>d</name><memory>1</memory><vcpu current='2'>8</vcpu></domain>"


@pytest.mark.parametrize(
    ("run_state", "uuid", "codes"),
    [
        ("inmigrate", {"UUID": "u-1"}, []),
        ("inmigrate", {"UUID": "00000000-0000-0000-0000-000000000000"}, []),
        ("inmigrate", None, []),
        ("inmigrate", {"UUID": "u-2"}, ["uuid"]),
        ("running", {"UUID": "u-2"}, ["run-state", "uuid"]),
        ("prelaunch", None, ["run-state"]),
        (None, None, ["run-state"]),
    ],
)
def test_what_stands_against_a_destination_is_told_together(run_state, uuid, codes):
    source = state(0, 1)
    assert against_destination(cookie(source, TWO_OF_8, name="d"), source, run_state, uuid) == codes


@pytest.mark.parametrize(
    ("there", "codes"),
    [(state(0, 1), []), (state(0), ["vcpus"]), (state(0, maxcpus=4), ["vcpus", "vcpus"])],
)
def test_of_another_tools_cookie_its_xml_is_compared(there, codes):
    assert (
        against_destination(replace(cookie(there, TWO_OF_8, name="d"), machine=None), there)
        == codes
    )


# -- the cookie ------------------------------------------------------------------------------------

XML = (
    b"<?xml version='1.0'?>\n<!-- c --><domain type='kvm'>\n  <name>d</name>\n "
    b" <vcpu>8</vcpu>\n</domain>\n"
)
COOKIE = cookie(state(0, 6, 2, nodes=True), XML, name="d&", runs=False)


def test_the_cookie_names_its_features_as_libvirt_does():
    assert b"<feature name='cpu-hotplug'/>" in written(COOKIE).replace(b'"', b"'")


def test_the_cookie_comes_back_as_it_was():
    inner = XML[XML.index(b"<domain") :].strip()
    assert read(written(COOKIE)) == replace(COOKIE, xml=inner, persistent=inner)


def test_a_cookie_that_was_read_is_written_as_it_was():
    back = read(written(COOKIE))
    assert read(written(back)) == back


def test_elements_of_a_cookie_that_are_not_known_are_passed_over():
    text = written(COOKIE)
    assert read(text.replace(b"<uuid>", b"<warp speed='9'/><uuid>")) == read(text)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"qemu-migration", b"domain", "is not a <qemu-migration>"),
        (b"<live", b"<dead", None),
        (b"<name>d&amp;</name>", b"", "<name> is missing"),
        (b"plugged='yes' order='1'", b"plugged='yes' order='x'", "order='x'"),
        (b"<slot vcpus='0'", b"<slot vcpus='99999'", "needs vcpus"),
        (b"<slot vcpus='0'", b"<slot vcpus='1'", "names vCPU 1-7"),
        (b"name='core-id'", b"name='=id'", "is not a CPU property"),
        (b"<vcpu>8</vcpu>", b"<vcpu>x</vcpu>", "is not a number"),
        (b"<live", b"<!DOCTYPE x><live", None),
    ],
)
def test_what_is_not_a_cookie(old, new, words):
    text = written(cookie(state(0, 1), XML, name="d&"))
    assert old in text, "the case changes something"
    with pytest.raises(VcpuRefused, match=words):
        read(text.replace(old, new))


TOLD = with_picture(
    replace(COOKIE, pending=(2, 6)),
    version=QemuVersion(10, 0, 2),
    memory=64 << 20,
    blocks={"pc.ram": 64 << 20, "a<&>'": 1},
    nodes={0: 32, 1: 32},
    machine={"hpet": True, "x": "\x01é"},
    pci={"0:01.0": "8086:1"},
    added=("virtio-rng-pci",),
)


def test_what_the_source_told_of_its_machine_goes_with_it():
    assert (read(written(TOLD)).picture, read(written(TOLD)).pending) == (TOLD.picture, (2, 6))


def test_what_another_version_has_written_of_it_is_passed_over():
    assert read(written(TOLD).replace(b'"nodes"', b'"knots"')).picture is None


def test_an_old_cookie_says_nothing_of_it():
    assert read(written(COOKIE)).picture is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"memory": 67108864', b'"memory": [[]]'),
        (b'"memory": 67108864', b'"memory": "a"'),
        (b'["pc.ram", 67108864]', b'["pc.ram", "big"]'),
        (b'[0, 32]', b'["0", 32]'),
        (b'[0, 32]', b'[0, true]'),
        (b'[0, 32]', b'[0]'),
        (b'[0, 32]', b'[[0], 32]'),
        (b'[10, 0, 2]', b'[10, 0]'),
        (b'"added": [', b'"added": [{}, '),
        (b"<picture>{", b"<picture>" + b"[" * 20000),
        (b"}</picture>", b"</picture>"),
    ],
)  # fmt: skip
def test_what_cannot_be_what_it_told_is_refused(old, new):
    assert old in written(TOLD), "the case changes something"
    with pytest.raises(VcpuRefused, match="<picture> is not what"):
        read(written(TOLD).replace(old, new))


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        ("\n\n", ""),
        (
            "2026-11-27T20:29:06.123456Z qemu-system-x86_64: Unknown section\n",
            "qemu-system-x86_64: Unknown section",
        ),
        ("a\nb\nc\nd\ne\n", "b; c; d; e"),
        ("bad\x1b[31m \x07words\u202e", "bad [31m  words "),
        ("kept\nqemu: terminating on signal 15 from pid 1\n", "kept"),
        ("x" * 1000, "x" * 400),
    ],
)
def test_an_error_has_the_last_words_of_a_log(log, words):
    assert last_words(log) == words


# -- trips that are known to go wrong --------------------------------------------------------------


def tcg(arch, version, enabled, *, kvm=False):
    if arch == "x86_64":
        return x86(range(enabled), version=version, kvm=kvm)
    return ppc64(range(enabled), version=version, kvm=kvm, threads=1)


HANGS = pytest.mark.parametrize(
    ("arch", "version", "enabled", "removals", "code"),
    [
        ("ppc64", (10, 0), 2, 0, "one-cpu"),
        ("ppc64", (10, 0), 1, 0, None),
        ("ppc64", (8, 2), 2, 0, "one-cpu"),
        ("ppc64", (8, 1, 5), 2, 0, "decrementer"),
        ("ppc64", (7, 2, 22), 2, 0, "decrementer"),
        ("ppc64", (7, 2, 22), 1, 0, "decrementer"),
        ("ppc64", (11, 1), 2, 0, None),
        ("x86_64", (10, 0, 2), 2, 1, "setup"),
        ("x86_64", (10, 0, 2), 2, 0, None),
        ("x86_64", (11, 1), 2, 3, None),
    ],
)


@HANGS
def test_what_is_known_to_hang(arch, version, enabled, removals, code):
    found = against_trip(tcg(arch, version, enabled), removals)
    assert [refusal.code for refusal in found] == ([code] if code else [])


@HANGS
def test_what_is_known_to_hang_can_be_forced(arch, version, enabled, removals, code):
    assert all(refusal.forceable for refusal in against_trip(tcg(arch, version, enabled), removals))


@HANGS
def test_under_kvm_nothing_hangs(arch, version, enabled, removals, code):
    assert not against_trip(tcg(arch, version, enabled, kvm=True), removals)


@HANGS
def test_what_travels_with_one_cpu(arch, version, enabled, removals, code):
    assert travels_with_one_cpu(tcg(arch, version, enabled)) is (code == "one-cpu")


@pytest.fixture(name="decrementer")
def refusal_of_an_old_qemu():
    (refusal,) = against_trip(tcg("ppc64", (7, 2), 2))
    return refusal


@pytest.fixture(name="interrupts")
def refusal_of_a_newer_qemu():
    (refusal,) = against_trip(tcg("ppc64", (10, 0), 2))
    return refusal


def test_an_old_qemu_loses_the_decrementer(decrementer):
    assert "does not migrate the decrementer" in decrementer.message


def test_against_the_decrementer_no_agent_helps(decrementer):
    assert "--agent" not in decrementer.hint


def test_a_newer_qemu_loses_interrupts(interrupts):
    assert "no interrupt reaches any vCPU but the first" in interrupts.message


def test_against_lost_interrupts_the_agents_of_both_sides_help(interrupts):
    assert "--agent ADDR" in interrupts.hint
    assert "--dest-agent ADDR" in interrupts.hint


@pytest.mark.parametrize("version", [(7, 2), (10, 0)])
def test_what_hangs_says_what_to_do(version):
    (refusal,) = against_trip(tcg("ppc64", version, 2))
    assert "QEMU 11.1 or KVM; --force" in refusal.hint


# -- a trip with one CPU online --------------------------------------------------------------------

ONLINE = {n: n in (0, 1, 3) for n in range(5)}


@pytest.mark.parametrize(
    "numbers", [{0: 0, 1: 1, 6: 3}, {}], ids=["all are known", "none is known"]
)
def test_a_guest_can_be_left_with_its_first_cpu(numbers):
    assert against_one_cpu(ONLINE, numbers) is None


def test_all_but_the_first_cpu_are_offline_on_the_way():
    assert offline_on_the_way(ONLINE, {0: 0, 1: 1, 6: 3}) == (1, 3)


@pytest.mark.parametrize(
    ("online", "numbers", "why"),
    [(ONLINE, {6: 0}, "CPU 0 is vCPU 6"), (ONLINE | {0: False}, {}, "CPU 0 is offline")],
)
def test_a_guest_that_cannot_be_left_with_its_first_cpu(online, numbers, why):
    assert why in against_one_cpu(online, numbers)
