"""Domain XML: what it says of vCPUs, what contradicts itself, and writing it back."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpvcpu import VcpuRefused
from tests.support import xml
from tests.support.documents import LIBVIRT, ODD, PLAIN, RFC

#: Two of four are enabled.
SPARE = PLAIN.replace(b"<vcpu>", b"<vcpu current='2'>")

# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("name", "web1"),
        ("arch", "x86_64"),
        ("machine", "pc-q35-10.0"),
        ("enabled_ids", (0, 1, 5)),
        ("dialect", "libvirt"),
        ("cells", (xml.Cell(0, (0, 1, 2, 3), 1 << 30), xml.Cell(1, (4, 5, 6, 7), 1 << 30))),
        ("topology", {"sockets": 2, "cores": 2, "threads": 2}),
        ("cpuset", (0, 1, 3)),
        ("pins", {1: (1, 2)}),
        ("emulator_pin", (0,)),
        ("schedulers", {0: "fifo:10", 1: "fifo:10", 5: "fifo:10", 6: "batch"}),
        ("agent", "/run/web1.agent"),
        ("emulator", "/usr/bin/qemu-system-x86_64"),
    ],
)
def test_what_libvirt_writes_is_read(fact, value):
    assert getattr(xml.read(LIBVIRT), fact) == value


@pytest.mark.parametrize(
    "row", [xml.Row(0, True, False, 1), xml.Row(5, True, True, 3), xml.Row(7, False, True)]
)
def test_libvirts_vcpus_are_read(row):
    assert xml.read(LIBVIRT).rows[row.id] == row


def test_there_are_as_many_vcpus_as_vcpu_says():
    assert len(xml.read(LIBVIRT).rows) == 8


@pytest.mark.parametrize(
    ("fact", "value"), [("enabled_ids", (0, 2)), ("dialect", "rfc"), ("cells", ()), ("pins", {})]
)
def test_the_rfcs_dialect_is_read_and_what_is_output_only_is_not(fact, value):
    assert getattr(xml.read(RFC), fact) == value


@pytest.mark.parametrize(
    ("document", "rows"),
    [
        (PLAIN, xml.first_enabled(4, {0, 1, 2, 3})),
        (PLAIN.replace(b"<vcpu>", b"<vcpu current='2'>"), xml.first_enabled(4, {0, 1})),
        (b"<domain><name>n</name></domain>", xml.first_enabled(1, {0})),
    ],
)
def test_without_vcpus_current_counts_and_without_vcpu_there_is_one(document, rows):
    assert xml.read(document).rows == rows


def test_ids_not_listed_are_disabled():
    listed = (
        b"<vcpus><vcpu id='3' enabled='yes' hotpluggable='yes'/><vcpu id='0'"
        b" enabled='yes'/></vcpus></domain>"
    )
    assert xml.read(PLAIN.replace(b"</domain>", listed)).rows == (
        xml.Row(0, True, False),
        xml.Row(1, False, True),
        xml.Row(2, False, True),
        xml.Row(3, True, True),
    )


@pytest.mark.parametrize("listed", [b"<vcpus/>", b"<vcpus>  <!-- none --></vcpus>"])
def test_a_list_of_none_is_none(listed):
    assert xml.read(PLAIN.replace(b"</domain>", listed + b"</domain>")).rows == xml.first_enabled(
        4, {0, 1, 2, 3}
    )


def test_a_list_of_none_becomes_one():
    document = SPARE.replace(b"</domain>", b"<vcpus/></domain>")
    assert xml.read(xml.switched(document, enable=(3,))).enabled_ids == (0, 1, 3)


STALE = b"""<domain type='kvm'><name>web1</name><vcpu current='2'>4</vcpu><vcpus>
<vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>
<vcpu id='1' enabled='no' hotpluggable='yes' order='2'/><vcpu id='2' enabled='yes' hotpluggable='yes' order='2'/>
<vcpu id='3' enabled='no' hotpluggable='yes'/></vcpus></domain>"""


def test_of_a_running_guest_libvirt_leaves_orders_of_what_is_gone():
    # 9.0, after an unplug that it gave up on.
    assert [row.order for row in xml.read(STALE, running=True).rows] == [1, None, 2, None]


def test_an_order_of_what_is_disabled_says_nothing():
    assert xml.read(STALE).rows[1] == xml.Row(1, False, True)


@pytest.mark.parametrize(
    ("inner", "arch"),
    [
        ("<os><type machine='pseries-10.0'>hvm</type></os>", "ppc64"),
        ("<devices><emulator>/opt/q/qemu-system-s390x</emulator></devices>", "s390x"),
        ("<os><type arch='armv7l' machine='virt'>hvm</type></os>", "armv7l"),
        ("<devices><emulator>/usr/bin/kvm</emulator></devices>", os.uname().machine),
    ],
)
def test_an_architecture_that_is_not_written_is_that_of_machine_program_or_host(inner, arch):
    assert xml.read(PLAIN.replace(b"</domain>", inner.encode() + b"</domain>")).arch == arch


def test_a_list_alone_that_lists_nothing_is_refused():
    with pytest.raises(VcpuRefused, match="<vcpus> lists no vCPU"):
        xml.enabled_in_list(b"<vcpus/>", 4)


def test_a_list_alone_may_have_a_gap():
    assert xml.enabled_in_list(
        b"<vcpus><vcpu id='0' enabled='yes'/><vcpu id='2' enabled='yes'/></vcpus>", 4
    ) == (
        0,
        2,
    )


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-1,", (0, 1)), ("^1,0-3", (0, 1, 2, 3)), ("0-3,^2", (0, 1, 3)), (" 0 - 1 , 3 ", (0, 1, 3))],
)
def test_lists_are_read_as_libvirt_reads_them(text, cpus):
    assert xml.read(PLAIN.replace(b"<vcpu>", f"<vcpu cpuset='{text}'>".encode())).cpuset == cpus


@pytest.mark.parametrize("text", ["0-3,^1-2", "2-1", "0,,1", "x", "^", "0,^0", ""])
def test_what_libvirt_reads_as_no_list_is_none(text):
    with pytest.raises(VcpuRefused, match="is not a list of host CPUs"):
        xml.read(PLAIN.replace(b"<vcpu>", f"<vcpu cpuset='{text}'>".encode()))


@pytest.mark.parametrize(
    "inner",
    [
        "<uuid/>",
        "<maxMemory/>",
        "<devices><emulator/></devices>",
        "<vcpus f='1'><vcpu id='0' enabled='yes'/></vcpus>",
    ],
)
def test_what_libvirt_ignores_is_ignored(inner):
    assert xml.read(b"<domain><name>n</name>" + inner.encode() + b"</domain>").emulator is None


def test_an_order_of_zero_says_nothing():
    listed = b"<vcpus><vcpu id='0' enabled='yes' order='0'/></vcpus></domain>"
    assert xml.read(b"<domain><name>n</name>" + listed).rows == (xml.Row(0, True, False),)


@pytest.mark.parametrize("maximum", [2, 8])
def test_a_pin_of_a_vcpu_that_is_not_there_does_not_come_to_life(maximum):
    document = PLAIN.replace(
        b"</domain>", b"<cputune><vcpupin vcpu='5' cpuset='0'/></cputune></domain>"
    )
    assert xml.read(xml.resized(document, maximum)).pins == {}


def test_without_vcpu_a_list_is_kept_in_its_place():
    document = b"<domain><name>n</name><vcpus><vcpu id='0' enabled='yes'/></vcpus></domain>"
    written = xml.switched(document, dialect="rfc")
    assert (written.count(b"</vcpus>"), xml.read(written).dialect) == (1, "rfc")


# -- writing it back -------------------------------------------------------------------------------


def test_what_is_enabled_gets_a_row_among_what_else_stands_in_vcpus():
    # Not listed is disabled: a row comes for what is enabled, and only for that.
    assert xml.switched(ODD, enable=(4, 6, 7)) == ODD.replace(b'"3"', b'"6"').replace(
        b"'yes' /> <?pi x?>",
        b"'yes' />\n     <vcpu id='6' enabled='yes' hotpluggable='yes'/>\n     <vcpu id='7'"
        b" enabled='yes'"
        b" hotpluggable='yes'/> <?pi x?>",
    ).replace(
        b"id='3' enabled='yes'/>",
        b"id='3' enabled='yes'/>\n     <vcpu id='4' enabled='yes' hotpluggable='yes'/>",
    )


def test_rows_in_any_order_are_read():
    assert xml.read(xml.switched(ODD, enable=(4, 6, 7))).enabled_ids == (0, 3, 4, 5, 6, 7)


def test_what_is_disabled_keeps_its_row():
    assert xml.switched(ODD, disable=(5,)) == ODD.replace(b'"3"', b'"2"').replace(
        b"'yes' enabled='yes' /> <?pi", b"'yes' enabled='no' /> <?pi"
    )


def test_a_smaller_maximum_takes_the_rows_beyond_it():
    assert xml.resized(ODD, 4) == ODD.replace(b'"3"', b'"2"').replace(b"  8<", b"  4<").replace(
        b"\n     <vcpu id='5' hotpluggable='yes' enabled='yes' />", b""
    )


def test_a_list_of_all_vcpus_stays_one():
    more = b"<vcpu id='7' enabled='no' hotpluggable='yes'/>\n    <vcpu id='8' enabled='no'"
    assert more in xml.resized(LIBVIRT, 9)


def test_no_change_changes_no_byte():
    assert xml.switched(LIBVIRT) == LIBVIRT


def test_where_current_and_vcpus_differ_vcpus_counts():
    assert xml.switched(RFC) == RFC.replace(b"current='1'", b"current='2'")


def test_one_switch_in_the_rfcs_dialect_changes_its_row_and_current():
    assert xml.switched(RFC, enable=(1,)) == RFC.replace(
        b'state="disabled"', b'state="enabled"'
    ).replace(b"current='1'", b"current='3'")


def test_one_switch_in_libvirts_dialect_also_takes_the_orders():
    want = LIBVIRT.replace(b"<vcpu id='6' enabled='no'", b"<vcpu id='6' enabled='yes'")
    for order in (b"1", b"2", b"3"):
        want = want.replace(b" order='%s'" % order, b"")
    assert xml.switched(LIBVIRT, enable=(6,)) == want.replace(b"current='3'", b"current='4'")


@pytest.mark.parametrize("dialect", [None, "rfc"])
def test_a_set_with_a_gap_needs_vcpus(dialect):
    assert xml.read(xml.switched(SPARE, enable=(3,), dialect=dialect)).enabled_ids == (0, 1, 3)


@pytest.mark.parametrize(
    ("dialect", "rows"),
    [
        (None, b"    <vcpu id='2' enabled='no' hotpluggable='yes'/>\n"),
        ("rfc", b"    <vcpu id='2' state='disabled'/>\n"),
    ],
)
def test_new_rows_are_libvirts_or_as_asked(dialect, rows):
    assert rows in xml.switched(PLAIN, disable=(2,), dialect=dialect)


def test_new_vcpus_stand_behind_vcpu_and_as_far_in():
    head = (
        b"<domain><name>n</name>\n  <vcpu current='3'>4</vcpu>\n  <vcpus>\n    <vcpu id='0'"
        b" enabled='yes'"
    )
    assert xml.switched(PLAIN, disable=(2,)).startswith(head)


def test_a_set_without_a_gap_needs_no_vcpus():
    assert xml.switched(PLAIN, disable=(3,)) == PLAIN.replace(b"<vcpu>", b"<vcpu current='3'>")


def test_the_other_dialect_can_be_asked_for():
    assert xml.read(xml.switched(RFC, dialect="libvirt")).dialect == "libvirt"


def test_an_empty_vcpu_grows():
    """Found by scripts/fuzz."""
    one = b"<domain><name>n</name><vcpu/></domain>"
    assert xml.resized(one, 2) == b"<domain><name>n</name><vcpu current='1'>2</vcpu></domain>"


LIKE_AN_ATTRIBUTE = ODD.replace(b"<!-- <vcpu id", b"<!--x")


def test_what_looks_like_an_attribute_behind_a_tag_is_none():
    """Found by scripts/fuzz: a comment with ='…' in it was taken for a part of the tag before it."""
    assert xml.read(xml.switched(LIKE_AN_ATTRIBUTE, enable=(6,))).enabled_ids == (0, 3, 5, 6)


def test_a_comment_stays_behind_its_tag():
    assert b"<vcpus  ><!--x='0'/> -->" in xml.switched(LIKE_AN_ATTRIBUTE, enable=(6,))


# -- what contradicts itself -----------------------------------------------------------------------


def domain(inner, vcpu="<vcpu>4</vcpu>"):
    return f"<domain>\n<name>n</name>\n{vcpu}\n{inner}\n</domain>".encode()


def listed(*rows):
    return domain("<vcpus><vcpu id='0' enabled='yes'/>\n" + "\n".join(rows) + "</vcpus>")


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"<network/>", ["line 1: the document is a <network>, not a <domain>"]),
        (b"<domain/>", ["line 1: the domain has no <name>"]),
        (domain("", "<vcpu>0</vcpu>"), ["line 3: <vcpu> 0 is out of range: it must be 1 to 16384"]),
        (domain("", "<vcpu>many</vcpu>"), ["<vcpu> 'many' is not a number"]),
        (
            domain("", "<vcpu current='5'>4</vcpu>"),
            ["<vcpu current> 5 is out of range: it must be 1 to 4"],
        ),
        (
            listed("<vcpu id='4' enabled='no'/>"),
            ["line 5: <vcpu id> 4 is out of range: it must be 0 to 3"],
        ),
        (listed("<vcpu enabled='no'/>"), ["<vcpu id> is missing"]),
        (listed("<vcpu id='1'/>"), ["needs enabled='yes|no' or state="]),
        (listed("<vcpu id='1' enabled='maybe'/>"), ["<vcpu enabled> must be 'yes' or 'no'"]),
        (listed("<vcpu id='0' enabled='yes'/>"), ["vCPU 0 is twice in <vcpus>"]),
        (listed("<vcpu id='1' state='enabled'/>"), ["mixes 'enabled'"]),
        (
            listed("<vcpu id='2' enabled='yes'/>"),
            ["line 4: vCPU 2 is enabled and not hotpluggable, after a hotpluggable one: the"],
        ),
        (
            domain("<cpu><numa><cell id='0'/><cell id='2'/></numa></cpu>"),
            ["line 4: NUMA cells are 0,2, and must be numbered from 0 without a gap"],
        ),
        (
            domain(
                "<cpu><numa><cell><distances><sibling id='0' value='11'/><sibling id='1'"
                " value='20'/>"
                "</distances></cell></numa></cpu>"
            ),
            [
                "distance of NUMA cell 0 to itself is 11",
                "<sibling id> 1 is out of range: it must be 0 to 0",
            ],
        ),
        (
            domain("<vcpus><vcpu id='0' enabled='yes' order='2'/></vcpus>"),
            ["line 4: vCPU 0 must be the first in the order"],
        ),
        (
            domain(
                "<vcpus><vcpu id='0' enabled='yes' order='1'/><vcpu id='1' enabled='yes'"
                " order='3'/>"
                "<vcpu id='2' enabled='yes' order='2'/></vcpus>"
            ),
            ["those that are not hotpluggable must have the order of their ids"],
        ),
        (
            domain(
                "<vcpus><vcpu id='0' state='enabled'/><vcpu id='²' state='enabled'"
                " order='1'/></vcpus>"
            ),
            ["<vcpu id> '²' is not a number"],
        ),
        (domain("", "<vcpu>2 </vcpu>"), ["<vcpu> '2 ' is not a number"]),
        (
            domain("<os><type machine='virt,dumpdtb=x'/></os>"),
            ["'virt,dumpdtb=x'> is not the name of a machine"],
        ),
        (listed("<vcpu id='1' enabled='yes' order='-1'/>"), ["<vcpu order> '-1' is not a number"]),
        (
            listed("<vcpu id='1' enabled='no' hotpluggable='no'/>"),
            ["vCPU 1 is disabled and not hotpluggable"],
        ),
        (domain("<vcpus><vcpu id='1' enabled='yes'/></vcpus>"), ["vCPU 0 is not enabled"]),
        (
            domain("<vcpus><vcpu id='0' enabled='yes' hotpluggable='yes'/></vcpus>"),
            ["vCPU 0 cannot be hotpluggable"],
        ),
        (
            domain("<cpu><topology sockets='1' cores='3' threads='1'/></cpu>"),
            ["<topology> has room for 3 vCPUs, but <vcpu> says 4"],
        ),
        (domain("<cpu><topology sockets='4' cores='1'/></cpu>"), ["<topology> has no threads"]),
        (
            domain(
                "<cpu><numa><cell cpus='0-2'/><cell cpus='2-4'/><cell id='0'"
                " cpus='3'/></numa></cpu>"
            ),
            [
                "vCPU 2 is in NUMA cell 0 and in 1",
                "NUMA cell 1 has vCPU 4",
                "there are two NUMA cells 0",
                "vCPU 3 is in",
            ],
        ),
        (
            domain(
                "<cputune><vcpupin vcpu='1' cpuset='x'/><vcpupin cpuset='1'/>\n<vcpupin"
                " vcpu='2'/></cputune>"
            ),
            [
                "line 4: <vcpupin cpuset>: 'x' is no",
                "<vcpupin vcpu> is missing",
                "line 5: <vcpupin cpuset> is missing",
            ],
        ),
        (
            domain(
                "<cputune><vcpusched vcpus='0-1' scheduler='rr'/><vcpusched vcpus='1'"
                " scheduler='fast'/></cputune>"
            ),
            ["<vcpusched priority> is missing", "<vcpusched scheduler> must be 'fifo' or 'rr'"],
        ),
    ],
)
def test_every_contradiction_is_told_with_its_line(data, texts):
    with pytest.raises(VcpuRefused) as caught:
        xml.read(data)
    messages = [refusal.message for refusal in caught.value.refusals]
    missing = [text for text in texts if not any(text in message for message in messages)]
    without_line = [message for message in messages if not message.startswith("line ")]
    assert (missing, without_line) == ([], []), messages


@pytest.mark.parametrize("word", ["name", "vcpu", "vcpus"])
def test_what_stands_twice(word):
    """Found by scripts/fuzz."""
    twice = PLAIN.replace(b"</domain>", f"<{word}/><{word}/></domain>".encode())
    with pytest.raises(VcpuRefused, match=f"line 3: there are two <{word}>"):
        xml.read(twice)


def test_a_prefix_that_stands_for_nothing_is_no_error_as_with_libvirt():
    document = SPARE.replace(
        b"</domain>", b"<qemu:commandline><qemu:arg value='-s'/></qemu:commandline></domain>"
    )
    assert xml.read(xml.switched(document, enable=(3,))).enabled_ids == (0, 1, 3)


# -- any document ----------------------------------------------------------------------------------


@st.composite
def domains(draw):
    """A document in three parts: head, vCPUs and tail; then how many vCPUs it has, and which are
    enabled.
    """
    maximum = draw(st.integers(1, 12))
    dialect = draw(st.sampled_from(["rfc", "libvirt", None]))
    spaces, quote = (
        draw(st.sampled_from(["", "\n", "\n    ", "\r\n\t"])),
        draw(st.sampled_from("'\"")),
    )
    on, rows = {0}, ""
    if dialect is not None:
        on = {0} | draw(st.sets(st.integers(0, maximum - 1)))
        key, yes, no = (
            ("state", "enabled", "disabled") if dialect == "rfc" else ("enabled", "yes", "no")
        )
        can_go = f"hotpluggable={quote}yes{quote}" if dialect == "libvirt" else ""
        rows = spaces.join(
            f"<vcpu {key}={quote}{yes if n in on else no}{quote} id={quote}{n}{quote} "
            f" {can_go if n else ''}/>"
            for n in range(maximum)
        )
        rows = f"<vcpus>{spaces}{rows}{spaces}</vcpus>"
    head = f"<domain>{spaces}<name>ä</name>{spaces}"
    vcpus = f"<vcpu current={quote}{len(on)}{quote}>{maximum}</vcpu>{spaces}{rows}"
    tail = f"{spaces}<x y='&lt;'/></domain>"
    return head.encode(), vcpus.encode(), tail.encode(), maximum, on


@settings(max_examples=100)
@given(domains())
def test_any_document_is_read(parts):
    *texts, _, on = parts
    assert set(xml.read(b"".join(texts)).enabled_ids) == on


@settings(max_examples=100)
@given(domains())
def test_any_document_without_a_change_keeps_every_byte(parts):
    text = b"".join(parts[:3])
    assert xml.switched(text) == text


@settings(max_examples=200)
@given(domains(), st.sets(st.integers(1, 11), min_size=1), st.booleans())
def test_what_is_written_is_what_was_asked_and_the_rest_stays(parts, ids, enabled):
    head, vcpus, tail, maximum, on = parts
    ids = {n for n in ids if n < maximum}
    got = xml.switched(head + vcpus + tail, **{"enable" if enabled else "disable": sorted(ids)})
    seen = set(xml.read(got).enabled_ids), got.startswith(head), got.endswith(tail)
    assert seen == (on | ids if enabled else on - ids, True, True)
