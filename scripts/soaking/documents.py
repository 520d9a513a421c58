"""Domain XML with a few bytes changed: refused, or read, changed and read again as it was meant."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from qmpvcpu.core.planning.config import plan_config, state_of
from qmpvcpu.core.request import Request
from qmpvcpu.domain.dump import dump
from qmpvcpu.flags import VcpuFlag
from qmpvcpu.xml.document import read_domain
from qmpvcpu.xml.vcpus import write_vcpus

SEEDS = [
    b"""<domain type='kvm' xmlns:x='urn:x'>
  <name>a</name>
  <vcpu placement='static' cpuset='0-3,^2' current='3'>8</vcpu>
  <vcpus ><!-- <vcpu id='0'/> -->
    <vcpu  enabled = "yes" id="0"   hotpluggable='no' order='1'></vcpu>
    <vcpu id='5' enabled='yes' hotpluggable='yes' order='3' /> <?pi x?><x:note/>
    <vcpu id='1' enabled='yes' hotpluggable='yes' order='2'/>
  </vcpus>
  <cputune><vcpupin vcpu='1' cpuset='1-2'/><vcpusched vcpus='0-1' scheduler='fifo' priority='10'/></cputune>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <cpu><topology sockets='2' cores='2' threads='2'/><numa><cell id='0' cpus='0-7,^4'/></numa></cpu>
</domain>
""",
    b"""<domain>
\t<name>b</name>
\t<vcpu current='2'>3</vcpu>
\t<vcpus>
\t\t<vcpu id='0' state='enabled'/>
\t\t<vcpu id="1" state="disabled" cell='7'/>
\t\t<vcpu id='2' state='enabled' pin='1-2'/>
\t</vcpus>
</domain>""",
    b"<domain><name>c</name>\n  <vcpu>4</vcpu>\n</domain>",
    b"<domain><name>d</name></domain>",
]
BITS = [
    *(
        b"'",
        b'"',
        b"<",
        b">",
        b"/",
        b"&",
        b" ",
        b"\n",
        b"=",
        b"-",
        b"^",
        b",",
        b"0",
        b"1",
        b"9",
        b"\xff",
        b"\0",
    ),
    *(
        b"&#39;",
        b"<!-- x='1' -->",
        b"<![CDATA[a]]>",
        b"<?p?>",
        b"\xc3\xa4",
        b"<vcpu/>",
        b" order='2'",
        b" id='2'",
    ),
    *(
        b" state='enabled'",
        b" enabled='no'",
        b"<vcpus>",
        b"</vcpus>",
        b"99999999999",
        b"<cell cpus='0'/>",
    ),
]
EDITS = st.tuples(
    st.integers(0, 1023), st.integers(0, 11), st.sampled_from(BITS) | st.binary(max_size=2)
)
DOCUMENTS = st.tuples(
    st.sampled_from(SEEDS),
    st.lists(EDITS, max_size=3),
    st.integers(0, 7),
    st.integers(1, 12),
    st.booleans(),
)


def document(message: tuple[bytes, list[tuple[int, int, bytes]], int, int, bool]) -> None:
    """What is written reads as it was planned; what is not asked keeps its bytes."""
    data, edits, vcpu, total, enable = message
    for position, length, bit in edits:
        at = position * len(data) // 1024
        data = data[:at] + bit + data[at + length :]
    source, definition = read_domain(data)
    assert source.to_bytes() == data
    state_of(definition)
    flag = VcpuFlag.ENABLE if enable else VcpuFlag.DISABLE
    counted = Request((), total=total)
    for request in (Request((vcpu,), flag), counted, replace(counted, maximum=True)):
        source, definition = read_domain(data)
        plan = plan_config(definition, request)
        if plan.refusals or not plan.writes:
            continue
        _, again = read_domain(write_vcpus(source, plan.old, plan.new))
        assert (again.enabled_ids, again.maxcpus) == (plan.new.enabled_ids, plan.new.maxcpus)
        assert definition.dialect == "rfc" or again.vcpus == plan.new.vcpus
    for dialect in ("rfc", "libvirt"):
        assert read_domain(dump(data, None, dialect, None))[1].enabled_ids == definition.enabled_ids
