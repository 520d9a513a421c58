"""Where threads belong, what stands against it, and what becomes of an end where it could not be."""

from __future__ import annotations

from dataclasses import replace

import pytest

import qmpvcpu
from qmpvcpu.core.inventory import BootFacts, CpuInfoFast, HotpluggableCpu, build_state
from qmpvcpu.core.model import Outcome, Props, QemuVersion
from qmpvcpu.core.placement import (
    HostFacts,
    Placement,
    ThreadState,
    check_placements,
    is_left,
    placements,
    with_threads,
)
from qmpvcpu.core.plan import Plan
from qmpvcpu.core.request import Request
from qmpvcpu.domain.place import Placing, place_all
from qmpvcpu.errors import OutcomeKind, VcpuFailed, VcpuPartial, VcpuRefused, VcpuRejected
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.xml.domain import read_domain

ALL = HostFacts(frozenset(range(4)), True, 99)
XML = (
    b"<domain><name>d</name><vcpu cpuset='0-1' current='1'>4</vcpu><cputune><vcpupin vcpu='1' cpuset='3'/>"
    b"<vcpusched vcpus='1-2' scheduler='fifo' priority='10'/><emulatorpin cpuset='0'/></cputune></domain>"
)
DEFINITION = read_domain(XML)[1]


def state(*plugged, shared=False, thread=100):
    slots = [
        HotpluggableCpu("t", 1, Props({"core-id": n}), f"/machine/peripheral/vcpu{n}" if n in plugged else None)
        for n in range(4)
    ]
    cpus = [CpuInfoFast(n, f"/machine/peripheral/vcpu{n}", thread + (0 if shared else n), None) for n in plugged]
    boot = BootFacts("d", "x86_64", "pc-q35-10.0", False, QemuVersion(10, 0), None)
    return build_state(boot, slots, cpus)


class Threads:
    """A host of the test: `refuses` are thread ids it declines."""

    def __init__(self, facts=ALL, refuses=(), *, layout=False, no_group=None):
        self.told = facts
        self.refuses = refuses
        self.layout = layout
        self.no_group = no_group
        self.placed = {}
        self.groups = {}

    def facts(self, wanted):
        return self.told

    def look(self, thread_ids):
        return {
            n: ThreadState(p.cpus or (), p.scheduler or "other", 1)
            for n, p in self.placed.items()
            if n in thread_ids
        }

    def others(self, thread_ids):
        return [7]

    def place(self, thread_id, placement, vcpu_id=None):
        if thread_id in self.refuses:
            raise OSError(22, "no such CPU in its cpuset")
        self.placed[thread_id] = placement
        return ThreadState(placement.cpus or (), placement.scheduler or "other", 1)

    main_id = 99

    def is_in_group(self, thread_id, placement, vcpu_id):
        return True

    def has_layout(self):
        return self.layout

    def make_groups(self, wanted):
        if self.no_group:
            raise self.no_group
        self.groups = dict(wanted)

    def has_groups(self):
        return bool(self.groups)

    def remove_groups(self, gone, enabled):
        self.removed = set(gone)
        return []

    def lay_out(self, wanted, emulator, thread_ids):
        self.laid_out = list(wanted), emulator, set(thread_ids)


def test_what_the_xml_says():
    assert placements(DEFINITION, range(4)) == {
        0: Placement((0, 1)),
        1: Placement((3,), "fifo:10"),
        2: Placement((0, 1), "fifo:10"),
        3: Placement((0, 1)),
    }
    assert placements(None, range(4)) == {}
    bare = replace(DEFINITION, cpuset=None, pins={}, schedulers={}, emulator_pin=None)
    assert placements(bare, range(4)) == {}
    # A new thread has the CPUs of the one that makes it: here the emulator's, which are not its own.
    assert placements(replace(bare, emulator_pin=(0,)), [3]) == {3: Placement(())}
    assert str(Placement((0, 1, 3), "fifo:10")) == "CPU 0-1,3, fifo:10"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (ALL, []),
        (None, ["vCPU 0-3 cannot be placed: QEMU's process is not found"]),
        (replace(ALL, is_owner=False), ["vCPU 0-3 cannot be placed: QEMU is another user's"]),
        (replace(ALL, online=frozenset({0, 1})), ["vCPU 1 is pinned to host CPU 3: online is 0-1"]),
        (replace(ALL, realtime=10), []),
        (replace(ALL, realtime=9), ["vCPU 1-2 shall be fifo:10, and CAP_SYS_NICE is missing"]),
        (replace(ALL, online=frozenset({1}), realtime=0), ["vCPU 0,2-3 is", "vCPU 1 is pinned", "vCPU 1-2 shall"]),
    ],
)
def test_every_reason_against_it_together(facts, words):
    found = check_placements(placements(DEFINITION, range(4)), facts)
    assert len(found) == len(words)
    for refusal, word in zip(found, words, strict=True):
        assert refusal.message.startswith(word) and "--no-place" in refusal.hint
    assert not check_placements({}, None)


def plan(*plugs, now=None):
    request = Request(plugs, VcpuFlag.ENABLE)
    return Plan(request, plugs, tuple((now or state(0)).by_id[n] for n in plugs))


def applied(*ids, rows=()):
    return Outcome(OutcomeKind.APPLIED, ids, rows, ids, mechanism="hotplug")


def test_what_came_is_placed_and_shown():
    threads = Threads()
    placing = Placing(threads, DEFINITION)
    now = state(0, 1, 2)
    assert not placing.check(plan(1, 2), state(0)).refusals
    end = placing.place(state(0), now, plan(1, 2), applied(1, 2, rows=now.vcpus[1:3]))
    assert threads.placed == {101: Placement((3,), "fifo:10"), 102: Placement((0, 1), "fifo:10")}
    assert [(row.pin, row.scheduler, row.cpu) for row in end.rows] == [("3", "fifo:10", 1), ("0-1", "fifo:10", 1)]


def test_what_could_not_be_placed_is_partial_and_stays():
    placing = Placing(Threads(refuses=(102,)), DEFINITION)
    placing.check(plan(1, 2), state(0))
    end = placing.place(state(0), state(0, 1, 2), plan(1, 2), applied(1, 2))
    assert isinstance(end, VcpuPartial) and end.remaining == (2,) and end.changed_ids == (1, 2)
    assert "vCPU 2 could not be given CPU 0-1, fifo:10: no such CPU" in end.message
    # An end that is worse keeps its own words.
    rejected = placing.place(state(0), state(0, 2), plan(1, 2), VcpuRejected("no", reasons={3: "x"}))
    assert isinstance(rejected, VcpuRejected) and "could not be given" in rejected.messages[0]


def test_groups_are_made_before_the_plug_or_it_is_refused():
    threads = Threads()
    placing = Placing(threads, DEFINITION)
    assert not placing.prepare(placing.check(plan(1, 2), state(0))).refusals
    assert threads.groups == {1: Placement((3,), "fifo:10"), 2: Placement((0, 1), "fifo:10")}
    placing = Placing(Threads(no_group=PermissionError(13, "Permission denied", "/g/vcpu1")), DEFINITION)
    (refusal,) = placing.prepare(placing.check(plan(1), state(0))).refusals
    assert refusal.message == "vCPU 1 cannot have its cgroup: /g/vcpu1: Permission denied"
    assert refusal.libvirt == "VIR_ERR_OPERATION_DENIED" and "--no-place" in refusal.hint


def test_where_every_vcpu_has_a_group_so_have_those_the_xml_is_silent_on():
    threads = Threads(layout=True)
    placing = Placing(threads, None)
    asked = placing.prepare(placing.check(plan(1, 2), state(0)))
    assert not asked.refusals and threads.groups == {1: Placement(), 2: Placement()}
    placing.place(state(0), state(0, 1, 2), asked, applied(1, 2))
    assert threads.placed == {101: Placement(), 102: Placement()}


def test_a_vcpu_that_was_taken_back_has_a_new_thread():
    threads = Threads()
    was = state(0, 1)
    taken = Plan(Request((1,), VcpuFlag.DISABLE), (1,), unplugs=(was.by_id[1],))
    Placing(threads, DEFINITION).place(was, was, taken, applied(1))
    assert not threads.placed
    Placing(threads, DEFINITION).place(was, state(0, 1, thread=200), taken, applied(1))
    assert threads.placed == {201: Placement((3,), "fifo:10")}


def test_one_thread_for_all():
    threads = Threads()
    placing = Placing(threads, DEFINITION)
    checked = placing.check(plan(1), state(0, 2, shared=True))
    assert not checked.refusals and "nothing to place" in checked.messages[0]
    # With one vCPU nobody can tell yet.
    placing = Placing(threads, DEFINITION)
    assert not placing.check(plan(1), state(0)).messages
    end = placing.place(state(0), state(0, 1, shared=True), plan(1), applied(1))
    assert threads.removed == {1}
    assert "nothing to place" in end.messages[0] and not threads.placed
    assert (
        "nothing to place"
        in place_all(threads, replace(DEFINITION, emulator_pin=None), state(0, 1, shared=True))[0]
    )


def test_nothing_is_wanted_or_it_is_left_alone():
    for placing, request in (
        (Placing(None, None), Request((1,), VcpuFlag.ENABLE)),
        (Placing(None, DEFINITION), Request((1,), VcpuFlag.ENABLE, place=False)),
    ):
        asked = replace(plan(1), request=request)
        assert placing.check(asked, state(0)) == asked
        end = applied(1)
        assert placing.place(state(0), state(0, 1), asked, end) is end


def test_all_of_a_guest_that_starts():
    threads = Threads()
    assert place_all(threads, DEFINITION, state(0, 1)) == []
    assert threads.placed == {7: Placement((0,)), 100: Placement((0, 1)), 101: Placement((3,), "fifo:10")}
    with pytest.raises(VcpuFailed, match="vCPU 1 could not"):
        place_all(Threads(refuses=(101,)), DEFINITION, state(0, 1))
    with pytest.raises(VcpuFailed, match="the emulator could not"):
        place_all(Threads(refuses=(7,)), DEFINITION, state(0, 1))
    with pytest.raises(VcpuRefused, match="not found"):
        place_all(None, DEFINITION, state(0, 1))


def test_a_state_shows_what_threads_have():
    shown = with_threads(state(0, 1), {101: ThreadState((2, 3), "rr:5", 3)})
    assert [(v.pin, v.scheduler, v.cpu) for v in shown.vcpus[:2]] == [(None, None, None), ("2-3", "rr:5", 3)]


PINNED = {
    b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n  <os/>\n</domain>": (
        b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n  <cputune>\n    <vcpupin vcpu='2' cpuset='0-1'/>\n"
        b"  </cputune>\n  <os/>\n</domain>"
    ),
    b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n  <cputune/>\n</domain>": (
        b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n  <cputune>\n    <vcpupin vcpu='2' cpuset='0-1'/>\n"
        b"  </cputune>\n</domain>"
    ),
    b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n"
    b"  <cputune>\n    <!-- c -->\n    <shares>9</shares>\n  </cputune>\n</domain>": (
        b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n  <cputune>\n    <vcpupin vcpu='2' cpuset='0-1'/>\n"
        b"    <!-- c -->\n    <shares>9</shares>\n  </cputune>\n</domain>"
    ),
    b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n"
    b"  <cputune>\n    <vcpupin vcpu='1' cpuset='5'/>\n  </cputune>\n</domain>": (
        b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n  <cputune>\n    <vcpupin vcpu='1' cpuset='5'/>\n"
        b"    <vcpupin vcpu='2' cpuset='0-1'/>\n  </cputune>\n</domain>"
    ),
    b'<domain><name>d</name><vcpu>4</vcpu><cputune><vcpupin cpuset="7" vcpu = "2"/></cputune></domain>': (
        b'<domain><name>d</name><vcpu>4</vcpu><cputune><vcpupin cpuset="0-1" vcpu = "2"/></cputune></domain>'
    ),
    b"<domain><name>d</name><vcpu>4</vcpu><cputune></cputune></domain>": (
        b"<domain><name>d</name><vcpu>4</vcpu><cputune>\n  <vcpupin vcpu='2' cpuset='0-1'/>\n</cputune></domain>"
    ),
}


@pytest.mark.parametrize("before", PINNED)
async def test_a_pin_in_the_definition_and_nothing_else(before, tmp_path):
    file = tmp_path / "d.xml"
    file.write_bytes(before)
    async with qmpvcpu.connect(str(file)) as domain:
        outcome = await domain.pin(2, "0-1")
        assert outcome.config_changed_ids == (2,) and outcome.defined
        assert file.read_bytes() == PINNED[before]
        assert not (await domain.pin(2, [0, 1])).changed
        # Taken away again: what stood there before stands there, but for a <cputune> that had to be made.
        had = b"vcpu = " in before
        assert (await domain.pin(2, None)).changed
        left = read_domain(file.read_bytes())[1].pins
        assert left == {n: p for n, p in read_domain(before)[1].pins.items() if n != 2}
        assert had or b"vcpu='2'" not in file.read_bytes()
        for bad in (4, 99):
            with pytest.raises(VcpuRefused):
                await domain.pin(bad, "0")
        with pytest.raises(VcpuRefused, match="not running"):
            await domain.pin(2, "0", VcpuFlag.LIVE)


@pytest.mark.parametrize(
    ("placement", "thread", "left"),
    [
        (Placement((1,)), ThreadState((0, 1), "other", 0), True),
        (Placement((0, 1)), ThreadState((0, 1), "other", 0), False),
        # Somebody has pinned it since.
        (Placement((1,)), ThreadState((0,), "other", 0), False),
        (Placement(scheduler="fifo:10"), ThreadState((0, 1), "other", 0), True),
        (Placement(scheduler="fifo:10"), ThreadState((0, 1), "rr:2", 0), False),
        (Placement(), ThreadState((0, 1), "other", 0), False),
    ],
)
def test_who_was_never_placed(placement, thread, left):
    assert is_left(placement, thread, ThreadState((0, 1), "other", 0)) is left


def test_the_plan_says_where():
    planned = Placing(Threads(), DEFINITION).check(plan(1), state(0))
    assert {"step": "place", "vcpus": [1], "cpus": "3", "scheduler": "fifo:10"} in planned.to_json()["plan"]
    assert "place vCPU 1: CPU 3, fifo:10" in planned.describe()


def test_every_reason_of_another_users_qemu_too():
    facts = replace(ALL, is_owner=False, online=frozenset({0, 1}))
    found = [one.message for one in check_placements({1: Placement((3,), period=5000)}, facts)]
    assert (
        len(found) == 3 and "another user's" in found[0] and "online is 0-1" in found[1] and "cgroup" in found[2]
    )


def tuned(text):
    return read_domain(f"<domain><name>d</name><vcpu>8</vcpu><cputune>{text}</cputune></domain>".encode())[1]


def test_cputune_as_libvirt_takes_it():
    assert tuned("<period>0</period><shares>0</shares>").period is None
    assert tuned("<vcpupin vcpu=' 1' cpuset='0 - 1'/>").pins == {1: (0, 1)}
    lowest = tuned("<vcpusched vcpus='1' scheduler='fifo' priority='0'/>")
    assert "priorities are 1 to 99" in check_placements(placements(lowest, [1]), ALL)[0].message
    for wrong in (
        "<vcpusched vcpus='50' scheduler='batch'/>",
        "<emulatorpin cpuset='0'/><emulatorpin cpuset='1'/>",
        "<vcpupin vcpu='1' cpuset='x'/>",
    ):
        with pytest.raises(VcpuRefused):
            tuned(wrong)
