"""Where threads belong, what stands against it, and what becomes of an end where it could not be."""

from __future__ import annotations

import pytest

import qmpvcpu
from qmpvcpu import Request, VcpuFailed, VcpuFlag, VcpuPartial, VcpuRefused, VcpuRejected
from tests.support.inventory import Qemu
from tests.support.placing import Change, Host, against, place_all_of, shown, wishes

ENABLE, DISABLE = VcpuFlag.ENABLE, VcpuFlag.DISABLE


def tuned(cputune="", cpuset="", count=4):
    text = (
        f"<domain><name>d</name><vcpu{cpuset}"
        f" current='1'>{count}</vcpu><cputune>{cputune}</cputune></domain>"
    )
    return text.encode()


#: vCPU 1 has its own CPU, and with 2 its scheduler.
XML = tuned(
    "<vcpupin vcpu='1' cpuset='3'/><vcpusched vcpus='1-2' scheduler='fifo' priority='10'/>"
    "<emulatorpin cpuset='0'/>",
    " cpuset='0-1'",
)
LOOSE = {"cpus": "0-1"}
FIFO = {"cpus": "0-1", "scheduler": "fifo:10"}
OWN = {"cpus": "3", "scheduler": "fifo:10"}


def state(*plugged, shared=False, thread=100):
    """vCPU n has thread 100 + n."""
    paths = {n: f"/machine/peripheral/vcpu{n}" for n in plugged}
    slots = [
        {
            "type": "t",
            "vcpus-count": 1,
            "props": {"core-id": n},
            **({"qom-path": paths[n]} if n in paths else {}),
        }
        for n in range(4)
    ]
    cpus = [
        {"cpu-index": n, "qom-path": path, "thread-id": thread + (0 if shared else n)}
        for n, path in paths.items()
    ]
    return Qemu(kvm=True).state(slots, cpus)


def enabling(*ids, host=None, xml=XML, before=None, **more):
    """A change of a guest with vCPU 0 alone, if nothing else is said."""
    return Change(host, xml, before or state(0), Request(ids, ENABLE, **more))


# -- what the XML says -----------------------------------------------------------------------------


def test_what_the_xml_says():
    assert wishes(XML, range(4)) == {0: LOOSE, 1: OWN, 2: FIFO, 3: LOOSE}


@pytest.mark.parametrize("xml", [None, tuned()])
def test_where_nothing_is_said_nothing_is_wished(xml):
    assert wishes(xml, range(4)) == {}


def test_a_new_thread_is_freed_of_the_emulators_cpus_which_it_would_get():
    assert wishes(tuned("<emulatorpin cpuset='0'/>"), [3]) == {3: {"cpus": ""}}


def test_a_plan_says_where_in_words():
    xml = tuned(
        "<vcpupin vcpu='1' cpuset='0-1,3'/><vcpusched vcpus='1' scheduler='fifo' priority='10'/>"
    )
    assert (
        "place vCPU 1: CPU 0-1,3, fifo:10" in enabling(1, host=Host(), xml=xml).checked.describe()
    )


def test_a_plan_says_where_as_json():
    step = {"step": "place", "vcpus": [1], "cpus": "3", "scheduler": "fifo:10"}
    assert step in enabling(1, host=Host()).checked.to_json()["plan"]


def test_a_period_of_0_is_not_set():
    assert wishes(tuned("<period>0</period><shares>0</shares>"), [0]) == {0: {"shares": 0}}


def test_spaces_are_allowed_where_libvirt_allows_them():
    assert wishes(tuned("<vcpupin vcpu=' 1' cpuset='0 - 1'/>"), range(4)) == {1: {"cpus": "0-1"}}


@pytest.mark.parametrize(
    "wrong",
    [
        "<vcpusched vcpus='50' scheduler='batch'/>",
        "<emulatorpin cpuset='0'/><emulatorpin cpuset='1'/>",
        "<vcpupin vcpu='1' cpuset='x'/>",
    ],
)
def test_what_libvirt_does_not_take_is_refused(wrong):
    with pytest.raises(VcpuRefused):
        wishes(tuned(wrong), range(4))


# -- what stands against it ------------------------------------------------------------------------

HOSTS = pytest.mark.parametrize(
    ("host", "words"),
    [
        (Host(), []),
        (None, ["vCPU 0-3 cannot be placed: QEMU's process is not found"]),
        (Host(is_owner=False), ["vCPU 0-3 cannot be placed: QEMU belongs to another user"]),
        (
            Host(online={0, 1}),
            ["vCPU 1 is pinned to host CPU 3: host CPU 3 is not online (online: 0-1)"],
        ),
        (Host(realtime=10), []),
        (Host(realtime=9), ["vCPU 1-2 cannot be fifo:10: CAP_SYS_NICE is missing"]),
        (
            Host(online={1}, realtime=0),
            ["vCPU 0,2-3 is", "vCPU 1 is pinned", "vCPU 1-2 cannot be fifo"],
        ),
    ],
    ids=["none", "not here", "another user", "offline", "just enough", "no right", "several"],
)


@HOSTS
def test_every_reason_against_it_together(host, words):
    messages = [refusal.message for refusal in against(XML, range(4), host)]
    assert [message[: len(word)] for message, word in zip(messages, words, strict=True)] == words


@HOSTS
def test_every_reason_says_how_to_do_without(host, words):
    assert all("--no-place" in refusal.hint for refusal in against(XML, range(4), host))


def test_where_nothing_is_wished_nothing_stands_against_it():
    assert against(None, range(4), None) == []


def test_every_reason_of_another_users_qemu_too():
    xml = tuned("<vcpupin vcpu='1' cpuset='3'/><period>5000</period>")
    found = [refusal.message for refusal in against(xml, [1], Host(is_owner=False, online={0, 1}))]
    words = ["another user", "online: 0-1", "cgroup"]
    assert [word in message for word, message in zip(words, found, strict=True)] == [True] * 3


def test_a_priority_that_there_is_not():
    (refusal,) = against(tuned("<vcpusched vcpus='1' scheduler='fifo' priority='0'/>"), [1], Host())
    assert "priorities are 1 to 99" in refusal.message


# -- what is plugged -------------------------------------------------------------------------------


@pytest.fixture(name="two")
def two_that_were_plugged():
    host = Host()
    return host, enabling(1, 2, host=host).finish(state(0, 1, 2))


def test_nothing_stands_against_a_plug_that_can_be_placed():
    assert not enabling(1, 2, host=Host()).checked.refusals


def test_what_came_is_placed(two):
    host, _ = two
    assert host.placed == {101: OWN, 102: FIFO}


def test_what_came_is_shown_where_it_is(two):
    _, end = two
    assert [(row.pin, row.scheduler, row.cpu) for row in end.rows] == [
        ("3", "fifo:10", 1),
        ("0-1", "fifo:10", 1),
    ]


@pytest.fixture(name="declined")
def plug_whose_second_vcpu_the_kernel_does_not_place():
    with pytest.raises(VcpuPartial) as caught:
        enabling(1, 2, host=Host(declines=[102])).finish(state(0, 1, 2))
    return caught.value


def test_what_could_not_be_placed_is_partial_and_named(declined):
    assert declined.remaining == (2,)


def test_what_could_not_be_placed_stays(declined):
    assert declined.changed_ids == (1, 2)


def test_what_could_not_be_placed_is_told_with_the_kernels_reason(declined):
    assert "vCPU 2 could not be given CPU 0-1, fifo:10: no such CPU" in declined.message


def test_an_end_that_is_worse_keeps_its_own_words():
    change = enabling(1, 2, host=Host(declines=[102]))
    with pytest.raises(VcpuRejected) as caught:
        change.finish(state(0, 2), VcpuRejected("no", reasons={3: "x"}))
    assert "could not be given" in caught.value.messages[0]


def test_groups_are_made_before_the_plug():
    host = Host()
    assert not enabling(1, 2, host=host).prepare().refusals
    assert host.groups == {1: OWN, 2: FIFO}


@pytest.fixture(name="no_group")
def refusal_where_no_group_can_be_made():
    host = Host(no_group=PermissionError(13, "Permission denied", "/g/vcpu1"))
    (refusal,) = enabling(1, host=host).prepare().refusals
    return refusal


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("message", "the cgroup of vCPU 1 cannot be used: /g/vcpu1: Permission denied"),
        ("libvirt", "VIR_ERR_OPERATION_DENIED"),
    ],
)
def test_where_no_group_can_be_made_the_plug_is_refused(no_group, member, value):
    assert getattr(no_group, member) == value


def test_where_no_group_can_be_made_the_hint_says_how_to_do_without(no_group):
    assert "--no-place" in no_group.hint


@pytest.fixture(name="silent")
def plug_that_the_xml_does_not_place_where_every_vcpu_has_a_group():
    host = Host(has_groups_for_all=True)
    change = enabling(1, 2, host=host, xml=None)
    assert not change.prepare().refusals
    change.finish(state(0, 1, 2))
    return host


def test_where_every_vcpu_has_a_group_so_have_those_the_xml_is_silent_on(silent):
    assert silent.groups == {1: {}, 2: {}}


def test_where_every_vcpu_has_a_group_threads_are_put_into_it(silent):
    assert silent.placed == {101: {}, 102: {}}


@pytest.mark.parametrize(
    ("now", "placed"),
    [(state(0, 1), {}), (state(0, 1, thread=200), {201: OWN})],
    ids=["it never went", "it came back"],
)
def test_a_vcpu_that_was_taken_back_has_a_new_thread(now, placed):
    host = Host()
    Change(host, XML, state(0, 1), Request((1,), DISABLE)).finish(now)
    assert host.placed == placed


@pytest.mark.parametrize(
    ("host", "xml", "more"),
    [(None, None, {}), (None, XML, {"place": False})],
    ids=["nothing is wished", "it is left alone"],
)
def test_what_is_not_to_be_placed_leaves_plan_and_end_alone(host, xml, more):
    change = enabling(1, host=host, xml=xml, **more)
    assert change.checked == change.plan
    assert change.finish(state(0, 1)).messages == ()


# -- one thread for all ----------------------------------------------------------------------------


def test_where_all_vcpus_are_one_thread_nothing_is_placed_and_that_is_told():
    checked = enabling(1, host=Host(), before=state(0, 2, shared=True)).checked
    assert ("nothing to place" in checked.messages[0], checked.refusals) == (True, ())


def test_with_one_vcpu_nobody_can_tell_whether_there_is_one_thread():
    assert not enabling(1, host=Host()).checked.messages


@pytest.fixture(name="one_thread")
def plug_after_which_there_is_one_thread():
    host = Host()
    return host, enabling(1, host=host).finish(state(0, 1, shared=True))


def test_one_thread_that_is_seen_only_then_is_told(one_thread):
    assert "nothing to place" in one_thread[1].messages[0]


def test_one_thread_that_is_seen_only_then_is_not_placed(one_thread):
    assert not one_thread[0].placed


def test_one_thread_that_is_seen_only_then_needs_no_groups(one_thread):
    assert one_thread[0].removed == {1}


def test_one_thread_of_a_guest_that_starts_is_not_placed():
    xml = XML.replace(b"<emulatorpin cpuset='0'/>", b"")
    assert "nothing to place" in place_all_of(Host(), xml, state(0, 1, shared=True))[0]


# -- a guest that starts ---------------------------------------------------------------------------


def test_all_of_a_guest_that_starts():
    host = Host()
    place_all_of(host, XML, state(0, 1))
    assert host.placed == {7: {"cpus": "0"}, 100: LOOSE, 101: OWN}


def test_of_a_guest_that_is_placed_there_is_nothing_to_say():
    assert place_all_of(Host(), XML, state(0, 1)) == []


@pytest.mark.parametrize(
    ("thread", "words"), [(101, "vCPU 1 could not"), (7, "the emulator could not")]
)
def test_a_guest_that_starts_and_that_the_kernel_does_not_place(thread, words):
    with pytest.raises(VcpuFailed, match=words):
        place_all_of(Host(declines=[thread]), XML, state(0, 1))


def test_a_guest_that_starts_and_is_not_found():
    with pytest.raises(VcpuRefused, match="not found"):
        place_all_of(None, XML, state(0, 1))


# -- enabled already -------------------------------------------------------------------------------

PIN = "<vcpupin vcpu='1' cpuset='{}'/>"
SCHEDULER = "<vcpusched vcpus='1' scheduler='fifo' priority='10'/>"


@pytest.mark.parametrize(
    ("xml", "thread", "is_placed"),
    [
        (tuned(PIN.format("1")), ((0, 1), "other"), True),
        (tuned(PIN.format("0-1")), ((0, 1), "other"), False),
        # Another process has pinned it since.
        (tuned(PIN.format("1")), ((0,), "other"), False),
        (tuned(SCHEDULER), ((0, 1), "other"), True),
        (tuned(SCHEDULER), ((0, 1), "rr:2"), False),
        (tuned(), ((0, 1), "other"), False),
    ],
)
def test_what_is_enabled_already_is_placed_where_it_never_was(xml, thread, is_placed):
    host = Host(threads={99: ((0, 1), "other"), 101: thread})
    checked = enabling(1, host=host, xml=xml, before=state(0, 1)).checked
    assert (1 in checked.placed) is is_placed


# -- shown -----------------------------------------------------------------------------------------


def test_a_state_shows_what_threads_have():
    rows = shown(state(0, 1), {101: ((2, 3), "rr:5", 3)}).vcpus[:2]
    assert [(v.pin, v.scheduler, v.cpu) for v in rows] == [(None, None, None), ("2-3", "rr:5", 3)]


# -- pins in a definition --------------------------------------------------------------------------

PINNED = {
    b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n  <os/>\n</domain>": (
        b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n  <cputune>\n    <vcpupin vcpu='2'"
        b" cpuset='0-1'/>\n"
        b"  </cputune>\n  <os/>\n</domain>"
    ),
    b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n  <cputune/>\n</domain>": (
        b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n  <cputune>\n    <vcpupin vcpu='2'"
        b" cpuset='0-1'/>\n"
        b"  </cputune>\n</domain>"
    ),
    b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n"
    b"  <cputune>\n    <!-- c -->\n    <shares>9</shares>\n  </cputune>\n</domain>": (
        b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n  <cputune>\n    <vcpupin vcpu='2'"
        b" cpuset='0-1'/>\n"
        b"    <!-- c -->\n    <shares>9</shares>\n  </cputune>\n</domain>"
    ),
    b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n"
    b"  <cputune>\n    <vcpupin vcpu='1' cpuset='5'/>\n  </cputune>\n</domain>": (
        b"<domain>\n  <name>d</name>\n  <vcpu>4</vcpu>\n  <cputune>\n    <vcpupin vcpu='1'"
        b" cpuset='5'/>\n"
        b"    <vcpupin vcpu='2' cpuset='0-1'/>\n  </cputune>\n</domain>"
    ),
    b'<domain><name>d</name><vcpu>4</vcpu><cputune><vcpupin cpuset="7" vcpu ='
    b' "2"/></cputune></domain>': (
        b'<domain><name>d</name><vcpu>4</vcpu><cputune><vcpupin cpuset="0-1" vcpu ='
        b' "2"/></cputune></domain>'
    ),
    b"<domain><name>d</name><vcpu>4</vcpu><cputune></cputune></domain>": (
        b"<domain><name>d</name><vcpu>4</vcpu><cputune>\n  <vcpupin vcpu='2'"
        b" cpuset='0-1'/>\n</cputune></domain>"
    ),
}


@pytest.fixture(name="file", params=PINNED, ids=range(len(PINNED)))
def definition_file(request, tmp_path):
    file = tmp_path / "d.xml"
    file.write_bytes(request.param)
    return file


async def test_a_pin_changes_the_definition(file):
    async with qmpvcpu.connect(str(file)) as domain:
        outcome = await domain.pin(2, "0-1")
    assert (outcome.config_changed_ids, outcome.defined) == ((2,), True)


async def test_a_pin_is_written_and_nothing_else(file):
    before = file.read_bytes()
    async with qmpvcpu.connect(str(file)) as domain:
        await domain.pin(2, "0-1")
    assert file.read_bytes() == PINNED[before]


async def test_a_pin_that_is_there_changes_nothing(file):
    async with qmpvcpu.connect(str(file)) as domain:
        await domain.pin(2, "0-1")
        assert not (await domain.pin(2, [0, 1])).changed


def pins(xml):
    return {n: wish["cpus"] for n, wish in wishes(xml, range(4)).items() if "cpus" in wish}


@pytest.fixture(name="taken")
async def definition_whose_pin_was_taken_away(file):
    """What stood there before, the file, and what came of it."""
    before = file.read_bytes()
    async with qmpvcpu.connect(str(file)) as domain:
        await domain.pin(2, "0-1")
        return before, file, await domain.pin(2, None)


async def test_a_pin_that_is_taken_away_changes_the_definition(taken):
    assert taken[2].changed


async def test_a_pin_that_is_taken_away_leaves_the_others(taken):
    before, file, _ = taken
    assert pins(file.read_bytes()) == {n: cpus for n, cpus in pins(before).items() if n != 2}


async def test_a_pin_that_is_taken_away_is_written_nowhere(taken):
    _, file, _ = taken
    assert b'cpuset="0-1"' not in file.read_bytes().replace(b"'", b'"')


@pytest.mark.parametrize("vcpu", [4, 99])
async def test_a_vcpu_that_there_is_not_is_not_pinned(file, vcpu):
    async with qmpvcpu.connect(str(file)) as domain:
        with pytest.raises(VcpuRefused):
            await domain.pin(vcpu, "0")


async def test_a_guest_that_does_not_run_is_not_pinned(file):
    async with qmpvcpu.connect(str(file)) as domain:
        with pytest.raises(VcpuRefused, match="not running"):
            await domain.pin(2, "0", VcpuFlag.LIVE)
