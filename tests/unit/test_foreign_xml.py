"""A domain's XML from a file: what of it is of a host is named, and is not started."""

from __future__ import annotations

import pytest

from qmpvcpu import VcpuRefused
from tests.support import trust

PLAIN = """<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>d</name>
  <memory unit='KiB'>131072</memory>
  <vcpu current='1'>4</vcpu>
  <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>
  <devices>
    <emulator>/tmp/evil</emulator>
    <interface type='user'/>
    <channel type='unix'>
      <source mode='bind' path='/run/other/agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <serial type='file'><source path='/etc/passwd'/></serial>
  </devices>
</domain>
"""
OTHER = "xmlns:x='http://libvirt.org/schemas/domain/qemu/1.0'"
MEMORY = """<metadata><qmpvcpu:machine xmlns:qmpvcpu='urn:qmpvcpu:machine:1'>{}</qmpvcpu:machine></metadata>
  <memory unit"""


def added(before: str, text: str) -> str:
    return PLAIN.replace(before, text, 1)


@pytest.mark.parametrize(
    ("xml", "parts"),
    [
        (PLAIN, []),
        (
            added("</domain>", "<qemu:commandline><qemu:arg value='-S'/></qemu:commandline></domain>"),
            ["<qemu:commandline>"],
        ),
        (
            added("</domain>", f"<x:commandline {OTHER}><x:arg value='-S'/></x:commandline></domain>"),
            ["<x:commandline>"],
        ),
        (added("<os>", "<os><kernel>/boot/k</kernel>"), ["<os><kernel>"]),
        (added("<os>", "<os><initrd>/boot/i</initrd><loader>/fw</loader>"), ["<os><initrd>", "<os><loader>"]),
        (added("<interface", "<disk><source file='/etc/shadow'/></disk><interface"), ["<disk>"]),
        (added("<interface", "<disk device='cdrom'/><interface"), []),
        (added("pc-q35-10.0", "pc,firmware=/etc/shadow"), ["<os><type machine>"]),
        (added("<memory unit", MEMORY.format("<qmpvcpu:memory id='a' type='memory-backend-ram'/>")), []),
        (
            added("<memory unit", MEMORY.format("<qmpvcpu:memory id='a' type='memory-backend-file'/>")),
            ["memory in memory-backend-file"],
        ),
        (
            added(
                "<memory unit",
                MEMORY.format(
                    "<qmpvcpu:memory id='a'><qmpvcpu:option name='mem-path' value='x'/></qmpvcpu:memory>"
                ),
            ),
            ["memory in memory-backend-ram"],
        ),
        (
            added("<memory unit", MEMORY.format("<qmpvcpu:option of='accel' name='device' value='/dev/other'/>")),
            ["options of -accel"],
        ),
        (
            added("<memory unit", MEMORY.format("<qmpvcpu:option of='machine' name='hpet' value='off'/>")),
            [],
        ),
    ],
)  # fmt: skip
def test_what_is_of_a_host_is_named(xml, parts):
    assert trust.host_parts(xml) == parts


def test_with_a_definition_of_the_user_devices_are_of_that():
    xml = added("</domain>", "<qemu:commandline><qemu:arg value='-S'/></qemu:commandline></domain>")
    assert trust.host_parts(xml, defined=PLAIN) == []


def test_memory_that_the_users_definition_has_too_is_taken():
    backend = "<qmpvcpu:memory id='a' type='memory-backend-file'><qmpvcpu:option name='mem-path' value='{}'/></qmpvcpu:memory>"  # fmt: skip  # noqa: E501
    one, other = (added("<memory unit", MEMORY.format(backend.format(path))) for path in ("/hugepages", "/home"))
    assert trust.host_parts(one, defined=one) == []
    assert trust.host_parts(other, defined=one) == ["memory in memory-backend-file"]


def test_a_program_is_replaced_and_sockets_and_files_are_taken_away():
    text = trust.without_program(PLAIN, "/usr/bin/qemu-system-x86_64")
    assert "<emulator>/usr/bin/qemu-system-x86_64</emulator>" in text
    assert not [word for word in ("/tmp/evil", "/run/other", "/etc/passwd") if word in text]
    assert trust.program_and_agent(text) == ("/usr/bin/qemu-system-x86_64", None)


@pytest.mark.parametrize("emulators", ["", "<emulator>/a</emulator><emulator>/b</emulator>"])
def test_there_is_one_program(emulators):
    xml = PLAIN.replace("<emulator>/tmp/evil</emulator>", emulators)
    assert trust.without_program(xml, "/usr/bin/q").count("<emulator>") == 1
    assert trust.program_and_agent(trust.without_program(xml, "/usr/bin/q"))[0] == "/usr/bin/q"
    assert "<emulator>" not in trust.without_program(xml, None)


def test_what_is_not_a_domain_is_refused():
    with pytest.raises(VcpuRefused):
        trust.host_parts("<domain/>")
