"""Domain XML from a file that nobody has defined on this host. It may describe the guest's machine,
CPUs, memory and addresses, but nothing of the host.

The functions do no IO.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from xml.sax.saxutils import escape

from qmpvcpu.core.definition import Definition, Dimm, MemoryBackend
from qmpvcpu.xml.boot_devices import QEMU_NAMESPACE
from qmpvcpu.xml.document import read_domain
from qmpvcpu.xml.source import Document, Element, namesake

#: A value that cannot begin another option of -machine.
_WORD: Final = re.compile(r"[A-Za-z0-9_.+-]{1,100}\Z")
_BOOT_FILES: Final = ("os/kernel", "os/initrd", "os/dtb", "os/loader", "os/nvram", "os/firmware")
#: Memory backends without a file.
_ANONYMOUS: Final = frozenset({"memory-backend-ram", "memory-backend-memfd"})
#: Elements that say where on its host a guest runs, and which share of the host it gets.
_TUNING: Final = ("cputune", "numatune", "memtune", "blkiotune", "resource")
#: A value that cannot name anything: a switch, a number or a size.
_VALUE: Final = re.compile(
    r"(?:on|off|yes|no|true|false|auto|0x[0-9a-f]{1,16}|-?[0-9]{1,20}(?:\.[0-9]{1,20})?[bkmgtpe]?)\Z",
    re.IGNORECASE,
)
#: Keys whose value is a file, a socket, a descriptor or a host NUMA node, even if it looks like a
#: number.
_NAMES_HOST: Final = re.compile(
    r"host[-_]nodes|(?:.*[-._])?(?:path|file|filename|device|fd|rom|socket|splash|shim|certs?)\Z"
)
#: Keys whose value is one of QEMU's own words, or the id of an object (QEMU 7.2 to 11.1).
_ENUMERATED: Final = re.compile(
    r"kernel-irqchip|thread|notify-vmexit|gic-version|iommu|msi|kvm-type|vm-type|ic-mode|resize-hpt|max-cpu-compat"
    r"|cap-[a-z-]+|nvdimm-persistence|aia|loadparm|x-oem-id|x-oem-table-id|boot\.(?:order|once)"
    r"|smp-cache\.[0-9]+\.(?:cache|topology)|memory-backend|pflash[01]|audiodev|pcspk-audiodev"
    r"|compat|priv-spec|vext-spec"
)
#: Keys of -cpu whose value the guest reads as text.
_TEXTS: Final = frozenset({"vendor", "model-id", "hv-vendor-id"})


def host_parts(xml: bytes, trusted: Definition | None = None) -> list[str]:
    """The parts of a domain's XML that refer to its host, such as command lines and files. Each is
    named after its element or option.

    Args:
        xml: the domain's XML.
        trusted: a definition of the same guest by its user. Parts that are also in it are not
            reported. Devices are not reported either, since they are started from this definition.

    Raises:
        VcpuRefused: it is not a domain's XML.
    """
    document, definition = read_domain(xml)
    found: dict[str, None] = dict.fromkeys(_of_options(definition, trusted))
    if trusted is None:
        found.update(dict.fromkeys(_of_devices(document.root)))
    return list(found)


def _of_options(definition: Definition, trusted: Definition | None) -> Iterable[str]:
    known: set[MemoryBackend | Dimm] = (
        {*trusted.options.backends, *trusted.dimms} if trusted is not None else set()
    )
    backends: tuple[MemoryBackend | Dimm, ...] = (*definition.options.backends, *definition.dimms)
    for backend in backends:
        is_plain = backend.driver in _ANONYMOUS and all(
            _VALUE.match(value) for _, value in backend.options
        )
        if (
            not is_plain or any(_NAMES_HOST.match(key) for key, _ in backend.options)
        ) and backend not in known:
            yield f"memory in {backend.driver}"
    for owner in ("machine", "accel", "cpu"):
        accepted = getattr(trusted.options, owner) if trusted is not None else ()
        for key, value in getattr(definition.options, owner):
            if (key, value) not in accepted and not _is_plain(owner, key, value):
                yield f"option {key} of -{owner}"


def _is_plain(owner: str, key: str, value: str) -> bool:
    """Whether an option cannot name a file, a socket or a program. An unknown option might name
    one.
    """
    # QEMU accepts a key with either sign.
    key = key.replace("_", "-")
    if _NAMES_HOST.match(key):
        return False
    if owner == "cpu" and key in _TEXTS:
        return True
    return bool(_VALUE.match(value) or (_ENUMERATED.fullmatch(key) and _WORD.match(value)))


def _of_devices(root: Element) -> Iterable[str]:
    for element in root.children:
        if namesake(root, element, "commandline", QEMU_NAMESPACE) and element.children:
            yield f"<{element.name}>"
    for path in _BOOT_FILES:
        if root.find(path) is not None:
            yield "".join(f"<{word}>" for word in path.split("/"))
    for element in root.all("devices/disk"):
        if element.find("source") is not None:
            yield "<disk>"


def without_placing(xml: bytes) -> tuple[bytes, list[str]]:
    """Remove host CPUs, schedulers, host NUMA nodes and shares of the host.

    Returns the document, and the names of the elements that were removed.

    Args:
        xml: the domain's XML.

    Raises:
        VcpuRefused: it is not a domain's XML.
    """
    document, _ = read_domain(xml)
    root = document.root
    found: dict[str, None] = {}
    for element in root.children:
        if element.name in _TUNING:
            document.remove(element)
            found[f"<{element.name}>"] = None
    vcpu = root.find("vcpu")
    for key in ("cpuset", "placement"):
        if vcpu is not None and key in vcpu.attributes:
            document.set_attribute(vcpu, key, None)
            found[f"<vcpu {key}>"] = None
    return document.to_bytes(), list(found)


def without_program(xml: bytes, emulator: str | None) -> bytes:
    """Replace the program, and remove the sockets and files of consoles and channels.

    Args:
        xml: the XML of a domain for which `host_parts` reports nothing.
        emulator: the path of a QEMU on this host; None removes the element, so that a QEMU is
            searched.

    Raises:
        VcpuRefused: it is not a domain's XML.
    """
    document, _ = read_domain(xml)
    devices = document.root.find("devices")
    if devices is None:
        return document.to_bytes()
    _give_program(document, devices, emulator)
    for element in devices.children:
        if element.name in ("channel", "serial", "console", "parallel"):
            for source in element.all("source"):
                document.remove(source)
    return document.to_bytes()


def _give_program(document: Document, devices: Element, emulator: str | None) -> None:
    programs = list(devices.all("emulator"))
    if emulator is not None and programs:
        document.set_text(programs.pop(0), emulator)
    elif emulator is not None:
        document.insert_first(devices, [f"<emulator>{escape(emulator)}</emulator>"])
    for element in programs:
        document.remove(element)
