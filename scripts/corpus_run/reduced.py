"""A domain without what needs hardware: the libvirtd of this host takes it where nothing else is
wrong.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from lxml import etree

from scripts.corpus_run.emulators import distributions, machines
from scripts.corpus_run.files import DomainFile, parse

#: What says something of vCPUs, nodes and memory.
_KEPT = (
    *(
        "name",
        "uuid",
        "memory",
        "currentMemory",
        "maxMemory",
        "vcpu",
        "vcpus",
        "cputune",
        "numatune",
        "cpu",
    ),
)
_TUNED = (
    *(
        "vcpupin",
        "vcpusched",
        "emulatorpin",
        "emulatorsched",
        "shares",
        "period",
        "quota",
        "global_period",
    ),
    *("global_quota", "emulator_period", "emulator_quota"),
)
_OF_CPU = ("topology", "numa", "model", "feature", "vendor")
_UUID = re.compile(r"\s*[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\s*")
_NAME = re.compile(r"[A-Za-z0-9._-]+")
#: The machine in place of one that Debian's QEMU does not have.
_MACHINES = ("q35", "pseries", "s390-ccw-virtio", "virt", "pc")
NAME = "corpus"
UUID = "5e3ad4d1-2d4f-4a9c-8c3d-7d6f8a1b2c3d"


@dataclass(frozen=True)
class Reduced:
    """One reduced document, of all the files that come to the same."""

    data: bytes
    files: tuple[str, ...]


def reduce_all(files: list[DomainFile]) -> list[Reduced]:
    """Each document once: most of libvirt's files differ in their devices alone."""
    found: dict[bytes, list[str]] = {}
    for file in files:
        found.setdefault(reduce(file.data), []).append(file.name)
    return [Reduced(data, tuple(names)) for data, names in found.items()]


def reduce(data: bytes) -> bytes:
    """The document. Name and UUID are the same for all where they are as they should be."""
    root = parse(data)
    old = root.find("os/type")
    arch, machine = (old.get("arch"), old.get("machine")) if old is not None else (None, None)
    for child in list(root):
        if child.tag not in _KEPT:
            root.remove(child)
    for child in list(root.iterfind("cputune/*")):
        if child.tag not in _TUNED:
            child.getparent().remove(child)
    for cpu in root.findall("cpu"):
        _reduce_cpu(cpu)
    for name in root.iterfind("name"):
        if _NAME.fullmatch(name.text or ""):
            name.text = NAME
    for uuid in list(root.iterfind("uuid")):
        if _UUID.fullmatch(uuid.text or ""):
            root.remove(uuid)
    if root.find("uuid") is None:
        # libvirt makes one, another for each time that it is defined.
        etree.SubElement(root, "uuid").text = UUID
    # KVM is not on every host, and other hypervisors are not QEMU's.
    root.set("type", "qemu")
    root.attrib.pop("id", None)
    if old is not None:
        _add_hardware(root, arch, machine)
    etree.cleanup_namespaces(root)
    # Comments and white space stand where elements were.
    for child in root:
        child.tail = "\n"
    for comment in list(root.iterchildren(etree.Comment, etree.PI)):
        root.remove(comment)
    root.text = "\n"
    return etree.tostring(root)


def own(data: bytes, number: int) -> bytes:
    """The document for one of several processes that use a libvirtd at once: another name, another
    UUID.
    """
    data = data.replace(f"<name>{NAME}</name>".encode(), f"<name>{NAME}-{number}</name>".encode())
    return data.replace(UUID.encode(), f"{UUID[:-12]}{number:012x}".encode())


def _reduce_cpu(cpu: etree._Element) -> None:
    for child in list(cpu):
        if child.tag not in _OF_CPU:
            cpu.remove(child)
    if cpu.get("mode", "custom") != "custom":
        # libvirt refuses the host's CPU under TCG, and there is no word for the best one on every
        # architecture.
        cpu.attrib.clear()
        for child in list(cpu):
            if child.tag in ("model", "feature", "vendor"):
                cpu.remove(child)


def _add_hardware(root: etree._Element, arch: str | None, machine: str | None) -> None:
    program = distributions(arch or os.uname().machine)
    if program is None:
        arch, machine = "x86_64", "pc"
        program = distributions(arch)
    assert program is not None, "scripts/setup installs qemu-system-x86_64"
    if machine is not None and machine not in machines(program):
        machine = next((name for name in _MACHINES if name in machines(program)), None)
    system = etree.SubElement(root, "os")
    words = {"arch": arch, "machine": machine}
    kind = etree.SubElement(
        system, "type", {key: word for key, word in words.items() if word is not None}
    )
    kind.text = "hvm"
    devices = etree.SubElement(root, "devices")
    etree.SubElement(devices, "emulator").text = program
    # Else libvirt adds them, and not every machine has a bus for them.
    etree.SubElement(devices, "controller", type="usb", model="none")
    etree.SubElement(devices, "memballoon", model="none")
