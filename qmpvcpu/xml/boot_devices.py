"""Read what libvirt's domain XML says about booting: `<os>`, `<disk>`, `<interface>`,
`<qemu:commandline>`.
"""

from __future__ import annotations

from typing import Final

from qmpvcpu.core.machine.devices import AGENT_PORT
from qmpvcpu.core.machine.hardware import Disk, Flash, GivenDevices, Hardware
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import Refusal, VcpuRefused
from qmpvcpu.xml.metadata import machine_element
from qmpvcpu.xml.source import Document, Element, namesake

#: libvirt's namespace of `<qemu:commandline>`.
QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
#: Elements that are read elsewhere, that the machine has anyway, or that need no warning when they
#: are left out.
_HANDLED: Final = frozenset(
    {"emulator", "disk", "serial", "console", "controller", "memballoon", "input"}
)
_UNSTARTED: Final = (
    *("iothreads", "memoryBacking", "sysinfo", "cpu/maxphysaddr", "cpu/cache"),
    *("cpu/numa/interconnects", "os/bootmenu", "os/smbios", "os/dtb", "os/acpi"),
)
#: QEMU has the first three by default; SMM is read and passed on.
_FEATURES: Final = ("acpi", "apic", "pae", "smm")
_SWITCH: Final = {"on": True, "off": False}


def read_hardware(document: Document) -> Hardware:
    """Read the boot devices from a domain's XML.

    Raises:
        VcpuRefused: a device cannot be started; every reason, each with its line.
    """
    root = document.root
    devices = root.find("devices")
    found = _protected(root)
    disks = []
    left_out: dict[str, None] = dict.fromkeys(_noticed(root))
    networks = 0
    for element in devices.children if devices is not None else ():
        if element.name == "disk":
            disk = _disk(element, found)
            if disk is not None:
                disks.append(disk)
        elif element.name == "interface" and element.attributes.get("type") == "user":
            networks += 1
        elif element.name == "channel":
            if element.value("target", "name") != AGENT_PORT:
                left_out["channel"] = None
        elif element.name == "memory" and element.attributes.get("model") == "dimm":
            # It belongs to the machine: see `core.machine.boot_arguments`.
            continue
        elif element.name not in _HANDLED:
            left_out[element.name] = None
    if found:
        raise VcpuRefused(found)
    flash = _flash(root)
    smm = root.find("features/smm")
    return Hardware(
        root.text_at("os/kernel") or None,
        root.text_at("os/initrd") or None,
        root.text_at("os/cmdline") or None,
        (root.text_at("os/loader") or None) if flash is None else None,
        flash,
        _SWITCH.get(smm.attributes.get("state", "on")) if smm is not None else None,
        tuple(disks),
        networks,
        command_line_of(document),
        tuple(left_out),
        _given(root),
    )


def _protected(root: Element) -> list[Refusal]:
    """Refuse a guest with `<launchSecurity>`: it must not be started without protection from its
    host.
    """
    element = root.find("launchSecurity")
    if element is None:
        return []
    kind = element.attributes.get("type", "")
    return [catalogue.PROTECTION(line=element.line, kind=kind[:40])]


def _noticed(root: Element) -> list[str]:
    """Elements outside of `<devices>` that we do not start, and whose absence the guest would
    notice.
    """
    found = [path for path in _UNSTARTED if root.find(path) is not None]
    if any(cell.find("cache") is not None for cell in root.all("cpu/numa/cell")):
        found.append("cpu/numa/cell/cache")
    nvram, firmware, offset = (
        root.find("os/nvram"),
        root.value("os", "firmware"),
        root.value("clock", "offset"),
    )
    if nvram is not None and (_variables(nvram) is None or _flash(root) is None):
        # We do not know where libvirt stores the variables of this guest.
        found.append("os/nvram")
    if nvram is not None and "template" in nvram.attributes:
        found.append("os/nvram template")
    if firmware is not None and not root.text_at("os/loader"):
        found.append(f"os firmware='{firmware[:40]}'")
    if offset not in (None, "utc"):
        found.append(f"clock offset='{offset[:40]}'")
    features = root.find("features")
    children = features.children if features is not None else ()
    return found + [child.name for child in children if child.name not in _FEATURES]


def _given(root: Element) -> GivenDevices | None:
    found = machine_element(root)
    if found is None or found[0].attributes.get("devices") != "commandline":
        return None
    attributes = found[0].attributes
    return GivenDevices(attributes.get("defaults") == "yes", attributes.get("serial") == "yes")


def _flash(root: Element) -> Flash | None:
    """`<loader type='pflash'>` with its `<nvram>`; None for any other firmware."""
    loader, nvram, code = root.find("os/loader"), root.find("os/nvram"), root.text_at("os/loader")
    if loader is None or not code or loader.attributes.get("type") != "pflash":
        return None
    return Flash(
        code,
        loader.attributes.get("format", "raw"),
        loader.attributes.get("readonly") == "yes",
        loader.attributes.get("secure") == "yes",
        _variables(nvram) if nvram is not None else None,
        nvram.attributes.get("format", "raw") if nvram is not None else "raw",
    )


def _variables(nvram: Element) -> str | None:
    """The file with the variables, in either form of `<nvram>`."""
    has_source = nvram.find("source") is not None
    return (nvram.value("source", "file") if has_source else nvram.text.strip()) or None


def _disk(element: Element, found: list[Refusal]) -> Disk | None:
    kind, path = element.attributes.get("device", "disk"), None
    source = element.find("source")
    if source is not None:
        path = source.attributes.get("file") or source.attributes.get("dev")
    elif kind == "cdrom":
        # The drive is empty.
        return None
    if path is None or kind not in ("disk", "cdrom"):
        found.append(catalogue.XML_DISK(line=element.line))
        return None
    return Disk(
        path,
        element.value("driver", "type") or "raw",
        element.value("target", "bus") or "virtio",
        is_cdrom=kind == "cdrom",
        is_readonly=element.find("readonly") is not None,
    )


def command_line_of(document: Document) -> tuple[str, ...]:
    """The arguments in `<qemu:commandline>`, by which libvirt passes arguments on to QEMU."""
    return tuple(
        argument.attributes.get("value", "")
        for element in document.root.children
        if (prefix := namesake(document.root, element, "commandline", QEMU_NAMESPACE))
        for argument in element.all(f"{prefix}arg")
    )
