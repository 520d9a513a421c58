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
            ["option device of -accel"],
        ),
        (
            added("<memory unit", MEMORY.format("<qmpvcpu:option of='machine' name='hpet' value='off'/>")),
            [],
        ),
    ],
)  # fmt: skip
def test_what_is_of_a_host_is_named(xml, parts):
    assert trust.host_parts(xml) == parts


def with_option(owner: str, name: str, value: str) -> str:
    option = f"<qmpvcpu:option of='{owner}' name='{name}' value='{value}'/>"
    return added("<memory unit", MEMORY.format(option))


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        ("machine", "boot.splash", "secret.bmp"),
        ("machine", "boot.splash", "1"),
        ("machine", "boot-certs.0.path", "certs"),
        ("machine", "shim", "shim.efi"),
        ("machine", "no-such-option", "word"),
        ("machine", "kernel-irqchip", "/dev/x"),
        ("accel", "rapl-helper-socket", "name"),
        ("accel", "fd", "3"),
        ("cpu", "no-such-feature", "name"),
    ],
)
def test_an_option_that_may_name_a_file_is_named(owner, name, value):
    xml = with_option(owner, name, value)
    assert trust.host_parts(xml) == [f"option {name} of -{owner}"]
    assert trust.host_parts(xml, defined=PLAIN) == [f"option {name} of -{owner}"]
    assert trust.host_parts(xml, defined=xml) == []


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        ("machine", "kernel-irqchip", "split"),
        ("machine", "kernel_irqchip", "split"),
        ("machine", "gic-version", "max"),
        ("machine", "cap-cfpc", "fixed-ccd"),
        ("machine", "nvdimm-persistence", "mem-ctrl"),
        ("machine", "max-ram-below-4g", "2G"),
        ("machine", "vmport", "auto"),
        ("machine", "smp-cache.0.topology", "core"),
        ("machine", "memory-backend", "pc.ram"),
        ("accel", "thread", "single"),
        ("accel", "tb-size", "64"),
        ("cpu", "hv-spinlocks", "0x1fff"),
        ("cpu", "tsc-frequency", "2500000000"),
        ("cpu", "model-id", "Westmere E56xx/L56xx (IBRS)"),
        ("cpu", "hv_vendor_id", "KVMKVMKVM"),
    ],
)
def test_an_option_of_the_machine_is_taken(owner, name, value):
    assert trust.host_parts(with_option(owner, name, value)) == []


@pytest.mark.parametrize(
    "option",
    [
        "name='host-nodes' value='0'",
        "name='policy' value='bind'",
        "name='prealloc-context' value='x'",
    ],
)
def test_memory_on_nodes_of_the_host_is_named(option):
    backend = f"<qmpvcpu:memory id='a'><qmpvcpu:option {option}/></qmpvcpu:memory>"
    assert trust.host_parts(added("<memory unit", MEMORY.format(backend))) == [
        "memory in memory-backend-ram"
    ]


def test_a_place_on_the_host_is_left_out():
    tuning = (
        "<cputune><vcpupin vcpu='0' cpuset='1'/><vcpusched vcpus='0' scheduler='fifo' priority='99'/></cputune>"
        "<numatune><memory mode='strict' nodeset='0'/></numatune><resource><partition>/m</partition></resource>"
    )
    placed = added("</vcpu>", f"</vcpu>{tuning}").replace(
        "<vcpu ", "<vcpu placement='static' cpuset='0-1' "
    )
    text, found = trust.without_placing(placed)
    assert text == PLAIN
    assert found == ["<cputune>", "<numatune>", "<resource>", "<vcpu cpuset>", "<vcpu placement>"]
    assert trust.without_placing(PLAIN) == (PLAIN, [])


def test_with_a_definition_of_the_user_devices_are_of_that():
    xml = added("</domain>", "<qemu:commandline><qemu:arg value='-S'/></qemu:commandline></domain>")
    assert trust.host_parts(xml, defined=PLAIN) == []


def test_memory_that_the_users_definition_has_too_is_taken():
    backend = "<qmpvcpu:memory id='a' type='memory-backend-file'><qmpvcpu:option name='mem-path' value='{}'/></qmpvcpu:memory>"  # fmt: skip
    one, other = (
        added("<memory unit", MEMORY.format(backend.format(path)))
        for path in ("/hugepages", "/home")
    )
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
