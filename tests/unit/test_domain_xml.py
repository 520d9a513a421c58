"""Domain XML: what it says of vCPUs, what contradicts itself, and writing it back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpvcpu.core.definition import NumaCell, VcpuConfig, default_vcpus
from qmpvcpu.errors import VcpuRefused
from qmpvcpu.xml.domain import read_domain, write_vcpus

LIBVIRT = b"""<domain type='kvm' id='3'>
  <name>web1</name>
  <uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid>
  <metadata><app:x xmlns:app='urn:x'><vcpu>99</vcpu></app:x></metadata>
  <vcpu placement='static' cpuset='0-3,^2' current='3'>8</vcpu>
  <vcpus>
    <vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>
    <vcpu id='1' enabled='yes' hotpluggable='yes' order='2'/>
    <vcpu id='2' enabled='no' hotpluggable='yes'/>
    <vcpu id='3' enabled='no' hotpluggable='yes'/>
    <vcpu id='4' enabled='no' hotpluggable='yes'/>
    <vcpu id='5' enabled='yes' hotpluggable='yes' order='3'/>
    <vcpu id='6' enabled='no' hotpluggable='yes'/>
    <vcpu id='7' enabled='no' hotpluggable='yes'/>
  </vcpus>
  <iothreads>2</iothreads>
  <cputune>
    <shares>2048</shares>
    <vcpupin vcpu='1' cpuset='1-2'/>
    <vcpupin vcpu='900' cpuset='1'/>
    <emulatorpin cpuset='0'/>
    <vcpusched vcpus='0-1,5' scheduler='fifo' priority='10'/>
    <vcpusched vcpus='6' scheduler='batch'/>
  </cputune>
  <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>
  <cpu mode='host-passthrough'>
    <topology sockets='2' dies='1' cores='2' threads='2'/>
    <numa>
      <cell id='0' cpus='0-3' memory='1048576' unit='KiB'/>
      <cell id='1' cpus='4-7' memory='1048576' unit='KiB'/>
    </numa>
  </cpu>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <channel type='unix'>
      <source mode='bind' path='/run/web1.agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
  </devices>
</domain>
"""
RFC = b"""<domain>
\t<name>rfc</name>
\t<vcpu current='1'>3</vcpu>
\t<vcpus>
\t\t<vcpu id='0' state='enabled'/>
\t\t<vcpu id="1" state="disabled" cell='7'/>
\t\t<vcpu id='2' state='enabled' cell='1' pin='1-2' scheduler='fifo:10'/>
\t</vcpus>
</domain>"""
PLAIN = b"<domain><name>n</name>\n  <vcpu>4</vcpu>\n</domain>"


def write(data, change, dialect=None):
    document, old = read_domain(data)
    return write_vcpus(document, old, change(old), dialect)


ODD = b"""<domain xmlns:x='urn:x'>
  <name>odd</name>
  <vcpu current = "3" >  8  </vcpu  >
  <vcpus  ><!-- <vcpu id='0'/> -->
     <vcpu  enabled = "yes" id="0"   hotpluggable='no'></vcpu>
     <vcpu id='5' hotpluggable='yes' enabled='yes' /> <?pi x?>
     <x:note/>
     <vcpu hotpluggable='yes' id='3' enabled='yes'/>
  </vcpus>
</domain>
"""


def test_what_else_stands_in_vcpus_stays():
    # Not listed is disabled: a row comes for what is enabled, and only for that.
    got = write(ODD, lambda old: old.switched((4, 6, 7), enabled=True))
    assert got == ODD.replace(b'"3"', b'"6"').replace(
        b"'yes' /> <?pi x?>",
        b"'yes' />\n     <vcpu id='6' enabled='yes' hotpluggable='yes'/>\n     <vcpu id='7' enabled='yes'"
        b" hotpluggable='yes'/> <?pi x?>",
    ).replace(
        b"id='3' enabled='yes'/>", b"id='3' enabled='yes'/>\n     <vcpu id='4' enabled='yes' hotpluggable='yes'/>"
    )
    assert read_domain(got)[1].enabled_ids == (0, 3, 4, 5, 6, 7)
    got = write(ODD, lambda old: old.switched((5,), enabled=False))
    assert got == ODD.replace(b'"3"', b'"2"').replace(
        b"'yes' enabled='yes' /> <?pi", b"'yes' enabled='no' /> <?pi"
    )
    # A smaller maximum takes the rows beyond it.
    got = write(ODD, lambda old: replace(old, vcpus=old.vcpus[:4]))
    assert got == ODD.replace(b'"3"', b'"2"').replace(b"  8  ", b"  4  ").replace(
        b"\n     <vcpu id='5' hotpluggable='yes' enabled='yes' />", b""
    )
    # And a complete list stays complete.
    more = VcpuConfig(8, enabled=False, hotpluggable=True)
    got = write(LIBVIRT, lambda old: replace(old, topology=None, vcpus=(*old.vcpus, more)))
    assert b"<vcpu id='7' enabled='no' hotpluggable='yes'/>\n    <vcpu id='8' enabled='no'" in got


def test_what_libvirt_writes_is_read():
    _, found = read_domain(LIBVIRT)
    assert (found.name, found.arch, found.machine) == ("web1", "x86_64", "pc-q35-10.0")
    assert (found.maxcpus, found.enabled_ids, found.dialect) == (8, (0, 1, 5), "libvirt")
    assert found.vcpus[5] == VcpuConfig(5, enabled=True, hotpluggable=True, order=3)
    assert found.cells == (NumaCell(0, (0, 1, 2, 3), 1 << 30), NumaCell(1, (4, 5, 6, 7), 1 << 30))
    assert (found.cell_of(5), found.topology.sockets, found.topology.threads) == (1, 2, 2)
    assert (found.cpuset, found.pins, found.emulator_pin) == ((0, 1, 3), {1: (1, 2)}, (0,))
    assert found.schedulers == {0: "fifo:10", 1: "fifo:10", 5: "fifo:10", 6: "batch"}
    assert (found.agent, found.emulator) == ("/run/web1.agent", "/usr/bin/qemu-system-x86_64")


def test_the_rfcs_dialect_is_read_and_what_is_output_only_is_not():
    _, found = read_domain(RFC)
    assert (found.enabled_ids, found.dialect, found.cells, found.pins) == ((0, 2), "rfc", (), {})


def test_without_vcpus_current_counts_and_without_vcpu_there_is_one():
    assert read_domain(PLAIN)[1].vcpus == default_vcpus(4, 4)
    assert read_domain(PLAIN.replace(b"<vcpu>", b"<vcpu current='2'>"))[1].enabled_ids == (0, 1)
    assert read_domain(b"<domain><name>n</name></domain>")[1].vcpus == default_vcpus(1, 1)


def test_ids_not_listed_are_disabled():
    rows = b"<vcpus><vcpu id='3' enabled='yes'/><vcpu id='0' enabled='yes'/></vcpus></domain>"
    _, found = read_domain(PLAIN.replace(b"</domain>", rows))
    assert found.enabled_ids == (0, 3)
    assert [vcpu.hotpluggable for vcpu in found.vcpus] == [False, True, True, False]


def test_one_switch_changes_its_lines_only():
    assert write(LIBVIRT, lambda old: old) == LIBVIRT
    assert write(RFC, lambda old: old) == RFC.replace(b"current='1'", b"current='2'")  # `<vcpus>` wins
    got = write(RFC, lambda old: old.switched((1,), enabled=True))
    assert got == RFC.replace(b'state="disabled"', b'state="enabled"').replace(b"current='1'", b"current='3'")
    got = write(LIBVIRT, lambda old: old.switched((6,), enabled=True))
    want = LIBVIRT.replace(b"<vcpu id='6' enabled='no'", b"<vcpu id='6' enabled='yes'")
    for order in (b"1", b"2", b"3"):
        want = want.replace(b" order='%s'" % order, b"")
    assert got == want.replace(b"current='3'", b"current='4'")


def test_a_set_with_a_gap_needs_vcpus_and_one_without_does_not():
    got = write(PLAIN, lambda old: old.switched((2,), enabled=False))
    assert read_domain(got)[1].enabled_ids == (0, 1, 3)
    assert got.startswith(
        b"<domain><name>n</name>\n  <vcpu current='3'>4</vcpu>\n  <vcpus>\n    <vcpu id='0' enabled='yes'"
    )
    got = write(PLAIN, lambda old: old.switched((2,), enabled=False), "rfc")
    assert b"\n    <vcpu id='2' state='disabled'/>\n" in got
    assert read_domain(got)[1].enabled_ids == (0, 1, 3)
    got = write(PLAIN, lambda old: old.switched((3,), enabled=False))
    assert got == PLAIN.replace(b"<vcpu>", b"<vcpu current='3'>")
    assert read_domain(write(RFC, lambda old: old, "libvirt"))[1].dialect == "libvirt"


def domain(inner, vcpu="<vcpu>4</vcpu>"):
    return f"<domain>\n<name>n</name>\n{vcpu}\n{inner}\n</domain>".encode()


def listed(*rows):
    return domain("<vcpus><vcpu id='0' enabled='yes'/>\n" + "\n".join(rows) + "</vcpus>")


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"<network/>", ["line 1: <network> is no <domain>"]),
        (b"<domain/>", ["line 1: the domain has no <name>"]),
        (domain("", "<vcpu>0</vcpu>"), ["line 3: <vcpu> 0 is out of range: it can be 1 to 16384"]),
        (domain("", "<vcpu>many</vcpu>"), ["<vcpu> 'many' is no number"]),
        (domain("", "<vcpu current='5'>4</vcpu>"), ["<vcpu current> 5 is out of range: it can be 1 to 4"]),
        (listed("<vcpu id='4' enabled='no'/>"), ["line 5: <vcpu id> 4 is out of range: it can be 0 to 3"]),
        (listed("<vcpu enabled='no'/>"), ["<vcpu id> is missing"]),
        (listed("<vcpu id='1'/>"), ["needs enabled='yes|no' or state="]),
        (listed("<vcpu id='1' enabled='maybe'/>"), ["<vcpu enabled> must be 'yes' or 'no'"]),
        (listed("<vcpu id='0' enabled='yes'/>"), ["vCPU 0 stands twice"]),
        (listed("<vcpu id='1' state='enabled'/>"), ["mixes 'enabled'"]),
        (listed("<vcpu id='1' enabled='no' order='2'/>"), ["vCPU 1 is disabled and has an order"]),
        (listed("<vcpu id='1' enabled='yes' order='0'/>"), ["<vcpu order> 0 is out of range"]),
        (listed("<vcpu id='1' enabled='no' hotpluggable='no'/>"), ["vCPU 1 is disabled and not hotpluggable"]),
        (domain("<vcpus><vcpu id='1' enabled='yes'/></vcpus>"), ["vCPU 0 is not enabled"]),
        (
            domain("<vcpus><vcpu id='0' enabled='yes' hotpluggable='yes'/></vcpus>"),
            ["vCPU 0 cannot be hotpluggable"],
        ),
        (
            domain("<cpu><topology sockets='1' cores='3' threads='1'/></cpu>"),
            ["<topology> has room for 3 vCPUs, and <vcpu> says 4"],
        ),
        (domain("<cpu><topology sockets='4' cores='1'/></cpu>"), ["<topology> has no threads"]),
        (
            domain("<cpu><numa><cell cpus='0-2'/><cell cpus='2-4'/><cell id='0' cpus='3'/></numa></cpu>"),
            [
                "vCPU 2 is in NUMA cell 0 and in 1",
                "NUMA cell 1 has vCPU 4",
                "NUMA cell 0 stands twice",
                "vCPU 3 is in",
            ],
        ),
        (
            domain("<cputune><vcpupin vcpu='1' cpuset='x'/><vcpupin cpuset='1'/>\n<vcpupin vcpu='2'/></cputune>"),
            [
                "line 4: <vcpupin cpuset>: 'x' is no",
                "<vcpupin vcpu> is missing",
                "line 5: <vcpupin cpuset> is missing",
            ],
        ),
        (
            domain(
                "<cputune><vcpusched vcpus='0-1' scheduler='rr'/><vcpusched vcpus='1' scheduler='fast'/></cputune>"
            ),
            ["<vcpusched priority> is missing", "<vcpusched scheduler> must be 'fifo' or 'rr'"],
        ),
    ],
)
def test_every_contradiction_is_told_with_its_line(data, texts):
    with pytest.raises(VcpuRefused) as caught:
        read_domain(data)
    messages = [refusal.message for refusal in caught.value.refusals]
    assert all(message.startswith("line ") for message in messages)
    for text in texts:
        assert any(text in message for message in messages), (text, messages)


@settings(max_examples=200)
@given(
    maximum=st.integers(1, 12),
    enabled=st.sets(st.integers(1, 11)),
    switch=st.sets(st.integers(1, 11), min_size=1),
    online=st.booleans(),
    dialect=st.sampled_from(["rfc", "libvirt", None]),
    spaces=st.sampled_from(["", "\n", "\n    ", "\r\n\t"]),
    quote=st.sampled_from("'\""),
)
def test_what_is_written_is_what_was_asked_and_the_rest_stays(
    maximum, enabled, switch, online, dialect, spaces, quote
):
    lit = {0} | {n for n in enabled if n < maximum}
    ids = tuple(sorted(n for n in switch if n < maximum))
    rows = ""
    if dialect is not None:
        key, yes, no = ("state", "enabled", "disabled") if dialect == "rfc" else ("enabled", "yes", "no")
        rows = spaces.join(
            f"<vcpu {key}={quote}{yes if n in lit else no}{quote} id={quote}{n}{quote}  />" for n in range(maximum)
        )
        rows = f"<vcpus>{spaces}{rows}{spaces}</vcpus>"
    else:
        lit = set(range(maximum))
    head, tail = f"<domain>{spaces}<name>ä</name>{spaces}", f"{spaces}<x y='<'/></domain>".replace("'<'", "'&lt;'")
    text = f"{head}<vcpu current={quote}{len(lit)}{quote}>{maximum}</vcpu>{spaces}{rows}{tail}".encode()
    document, old = read_domain(text)
    assert set(old.enabled_ids) == lit
    got = write_vcpus(document, old, old.switched(ids, online)) if ids else write_vcpus(document, old, old)
    _, new = read_domain(got)
    assert set(new.enabled_ids) == (lit | set(ids) if online else lit - set(ids))
    assert got.startswith(head.encode())
    assert got.endswith(tail.encode())
    if not ids:
        assert got == text


def test_what_looks_like_an_attribute_behind_a_tag_is_none():
    """Found by scripts/fuzz: a comment with ='…' in it was taken for a part of the tag before it."""
    got = write(ODD.replace(b"<!-- <vcpu id", b"<!--x"), lambda old: old.switched((6,), enabled=True))
    assert read_domain(got)[1].enabled_ids == (0, 3, 5, 6)
    assert b"<vcpus  ><!--x='0'/> -->" in got


def test_an_empty_vcpu_and_what_stands_twice():
    """Found by scripts/fuzz."""
    one = b"<domain><name>n</name><vcpu/></domain>"
    grown = write(one, lambda old: replace(old, vcpus=(*old.vcpus, VcpuConfig(1, False, True))))
    assert grown == b"<domain><name>n</name><vcpu current='1'>2</vcpu></domain>"
    for word in ("name", "vcpu", "vcpus"):
        twice = PLAIN.replace(b"</domain>", f"<{word}/><{word}/></domain>".encode())
        with pytest.raises(VcpuRefused, match=f"line 3: <{word}> stands twice"):
            read_domain(twice)


def test_a_prefix_that_stands_for_nothing():
    """Found by scripts/fuzz: lxml's error came out as it was."""
    with pytest.raises(VcpuRefused, match="line 7: Namespace prefix x on note is not defined"):
        read_domain(ODD.replace(b" xmlns:x='urn:x'", b""))


def test_of_a_running_guest_libvirt_leaves_orders_of_what_is_gone():
    # 9.0, after an unplug that it gave up on.
    text = b"""<domain type='kvm'><name>web1</name><vcpu current='2'>4</vcpu><vcpus>
<vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>
<vcpu id='1' enabled='no' hotpluggable='yes' order='2'/><vcpu id='2' enabled='yes' hotpluggable='yes' order='2'/>
<vcpu id='3' enabled='no' hotpluggable='yes'/></vcpus></domain>"""
    with pytest.raises(VcpuRefused, match="is disabled and has an order"):
        read_domain(text)
    definition = read_domain(text, running=True)[1]
    assert [vcpu.order for vcpu in definition.vcpus] == [1, None, 2, None]
