"""A sample of `scripts/corpus`, and that it sees what it is there for."""

from __future__ import annotations

import asyncio
import re
import sys

import pytest

from scripts.corpus_run.arguments import differences, read_args, read_words
from scripts.corpus_run.commands import Commands
from scripts.corpus_run.files import DomainFile, domain_files
from scripts.corpus_run.finding import Finding
from scripts.corpus_run.reasons import explain, read_reasons
from scripts.corpus_run.reduced import reduce, reduce_all
from scripts.corpus_run.said import said
from tests.support.waiting import within

XML = """<domain type='qemu'><name>web1</name><memory unit='MiB'>64</memory>{vcpu}
<os><type arch='x86_64' machine='pc'>hvm</type></os>{more}</domain>"""
ARGS = r"""LC_ALL=C \
/usr/bin/qemu-system-x86_64 \
-machine pc,usb=off,acpi=on \
-accel tcg \
-object '{"qom-type":"memory-backend-ram","id":"ram-node0","size":33554432}' \
-object '{"qom-type":"memory-backend-ram","id":"ram-node1","size":33554432}' \
-smp 3,maxcpus=4,sockets=2,dies=1,cores=2,threads=1 \
-numa node,nodeid=0,cpus=0-1,memdev=ram-node0 \
-numa node,nodeid=1,cpus=2,cpus=3,memdev=ram-node1 \
-numa dist,src=0,dst=1,val=21 \
-msg timestamp=on
"""


async def corpus(*words: str) -> tuple[int, str]:
    """Its exit code, and all that it says."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scripts.corpus_run", "--workers", "1", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    stdout, _ = await within(process.communicate(), "it ends", 500)
    return process.returncode, stdout.decode()


@pytest.mark.scripts
async def test_a_sample_of_libvirts_files_differs_only_where_a_reason_is_written():
    code, output = await corpus("--every", "60")
    assert code == 0, output
    found = [
        re.search(pattern, output)
        for pattern in ("(.*) domain XML", "(.*) command lines and (.*) requests")
    ]
    files, command_lines, requests = (int(number) for match in found for number in match.groups())
    assert files > 40
    assert command_lines > 20
    assert requests > 100


def test_every_reason_of_the_list_can_be_read():
    assert len(read_reasons()) <= 20


# -- what it would see -----------------------------------------------------------------------------


@pytest.fixture
def file_of(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    made = tmp_path / "made"
    made.mkdir()

    def make(vcpu="<vcpu current='3'>4</vcpu>", more="", args=None) -> DomainFile:
        (made / "web1.xml").write_text(XML.format(vcpu=vcpu, more=more))
        if args is not None:
            (made / "web1.x86_64-latest.args").write_text(args)
        (file,) = domain_files(made)
        return file

    return make


NUMA = """<cpu><topology sockets='2' cores='2' threads='1'/><numa>
<cell id='0' cpus='0-1' memory='32768'><distances><sibling id='1' value='21'/></distances></cell>
<cell id='1' cpus='2-3' memory='32768'/></numa></cpu>"""


def test_the_same_command_line_is_no_finding(file_of, tmp_path):
    commands = Commands(file_of(more=NUMA, args=ARGS), tmp_path)
    assert (commands.run(), commands.compared) == ([], 1)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("-smp 3", "-smp 2", "-smp cpus"),
        ("maxcpus=4", "maxcpus=8", "-smp maxcpus"),
        ("dies=1", "dies=2", "-smp dies"),
        ("cpus=2,cpus=3", "cpus=2", "-numa node cpus"),
        ("33554432", "33554433", "-numa node memory"),
        ("nodeid=1", "nodeid=2", "-numa node"),
        ("val=21", "val=22", "-numa dist"),
        ("acpi=on", "acpi=off", "-machine acpi: on, libvirt off"),
        ("-accel tcg", "-accel kvm", "-accel: tcg, libvirt kvm"),
        ("-machine pc", "-machine q35", "-machine type"),
        ("-msg", "-device qemu64-x86_64-cpu,id=vcpu3 -msg", "-device cpu"),
        ("-msg", "-numa hmat-lb,initiator=0 -msg", "-numa hmat-lb"),
    ],
)
def test_another_command_line_is_one(file_of, tmp_path, old, new, text):
    findings = Commands(file_of(more=NUMA, args=ARGS.replace(old, new)), tmp_path).run()
    assert {(finding.check, finding.text) for finding in findings} == {("arguments", text)}


def test_what_qemu_takes_where_nothing_is_written_is_no_difference():
    short = read_words(
        ["-machine", "pc", "-accel", "tcg", "-smp", "4", "-numa", "dist,src=1,dst=0,val=21"]
    )
    words = "-machine pc,acpi=on -accel tcg -smp cpus=4,dies=1"
    words += " -numa dist,src=0,dst=1,val=21 -numa dist,src=0,dst=0,val=10"
    long = read_words(words.split())
    assert list(differences(short, long)) == []


def test_a_refusal_is_a_finding(file_of, tmp_path):
    (finding,) = Commands(file_of(vcpu="<vcpu current='9'>4</vcpu>"), tmp_path).run()
    assert finding.check == "define refuses"


def test_the_rest_of_a_document_counts(file_of, tmp_path):
    commands = Commands(file_of(), tmp_path)
    commands._rest_is_kept("setvcpu", commands.file.data.replace(b"machine='pc'", b"machine='q35'"))
    assert [finding.text for finding in commands.findings] == [
        "changes another part of the document"
    ]


def test_vcpus_are_read_with_libvirts_defaults():
    data = XML.format(
        vcpu="<vcpu current='1'>3</vcpu>", more="<cputune><vcpupin vcpu='7' cpuset='0'/></cputune>"
    )
    assert said(data.encode()).rows == {
        0: (True, False, None),
        1: (False, True, None),
        2: (False, True, None),
    }
    assert said(data.encode()).pins == {}


def test_a_reduced_document_has_its_vcpus_and_no_device():
    more = "<devices><disk/></devices><cputune><vcpupin vcpu='1' cpuset='0'/></cputune>"
    data = XML.format(vcpu="<vcpu current='2'>3</vcpu>", more=more).replace("qemu", "xen").encode()
    found = reduce(data)
    assert said(found) == said(data)
    assert b"disk" not in found and b'type="qemu"' in found


def test_documents_that_differ_in_devices_are_one(file_of):
    one = file_of(more="<devices><disk/></devices>")
    assert [len(found.files) for found in reduce_all([one, one])] == [2]


@pytest.mark.scripts
async def test_libvirt_is_given_the_same(file_of):
    folder = file_of(more=NUMA).path.parent
    (folder / "web2.xml").write_text(XML.format(vcpu="<vcpu current='9'>4</vcpu>", more=""))
    (folder / "other.xml").write_text("<network/>")
    code, output = await corpus("--folder", str(folder))
    assert "2 domain XML files" in output
    assert "accepted by both 1, refused by both 1, by us alone 0, by libvirt alone 0" in output
    # The first has what this list is for, the second nothing that is wrong.
    assert (code, "0 files with differences that no reason explains" in output) == (0, True)


def test_a_reason_is_for_its_check_text_and_document(tmp_path):
    file = tmp_path / "list.toml"
    file.write_text(
        """[[difference]]
id = "one"
why = "It is so."
[[difference.where]]
check = "arguments"
text = "-smp .*"
document = "cpu/topology"
"""
    )
    reasons = read_reasons(file)
    document = XML.format(vcpu="", more=NUMA).encode()
    assert explain(reasons, Finding("a.xml", "arguments", "-smp dies"), document) is reasons[0]
    assert explain(reasons, Finding("a.xml", "arguments", "-numa dist"), document) is None
    assert explain(reasons, Finding("a.xml", "define", "-smp dies"), document) is None
    assert explain(reasons, Finding("a.xml", "arguments", "-smp dies"), XML.encode()) is None


def test_a_list_of_too_many_reasons_is_none(tmp_path):
    file = tmp_path / "list.toml"
    file.write_text(
        "".join(f"[[difference]]\nid = '{n}'\nwhy = 'It is so.'\nwhere = []\n" for n in range(21))
    )
    with pytest.raises(ValueError, match="at most 20"):
        read_reasons(file)


def test_a_command_line_of_libvirts_is_read_whole():
    found = read_args(ARGS)
    assert found.smp["cpus"] == 3
    assert found.nodes == {0: ((0, 1), 33554432), 1: ((2, 3), 33554432)}
