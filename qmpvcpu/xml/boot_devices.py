"""What libvirt's domain XML says of booting: `<os>`, `<disk>`, `<interface>`, `<qemu:commandline>`."""

from __future__ import annotations

from typing import Final

from qmpvcpu.core.machine.hardware import Disk, Flash, GivenDevices, Hardware
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import Refusal, VcpuRefused
from qmpvcpu.xml.metadata import machine_element
from qmpvcpu.xml.source import Document, Element

#: libvirt's, of `<qemu:commandline>`.
QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
#: What is there anyhow, or not worth a word.
_HANDLED: Final = frozenset({"emulator", "disk", "serial", "console", "controller", "memballoon", "input"})
_UNSTARTED: Final = (
    *("iothreads", "memoryBacking", "sysinfo", "cpu/maxphysaddr", "cpu/cache"),
    *("cpu/numa/interconnects", "os/bootmenu", "os/smbios", "os/dtb", "os/acpi"),
)
#: QEMU has these by itself; and SMM is passed on.
_FEATURES: Final = ("acpi", "apic", "pae", "smm")
_SWITCH: Final = {"on": True, "off": False}
_AGENT: Final = "org.qemu.guest_agent.0"


def read_hardware(document: Document) -> Hardware:
    """Read it.

    Raises:
        VcpuRefused: what is there cannot be started; every reason, each with its line.
    """
    root = document.root
    os, devices = root.child("os"), root.child("devices")
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
            target = element.child("target")
            if target is None or target.attributes.get("name") != _AGENT:
                left_out["channel"] = None
        elif element.name == "memory" and element.attributes.get("model") == "dimm":
            # The machine's: core.bootargs.
            continue
        elif element.name not in _HANDLED:
            left_out[element.name] = None
    if found:
        raise VcpuRefused(found)
    flash = _flash(os)
    smm = root.find("features/smm")
    return Hardware(
        _text(os, "kernel"),
        _text(os, "initrd"),
        _text(os, "cmdline"),
        _text(os, "loader") if flash is None else None,
        flash,
        _SWITCH.get(smm.attributes.get("state", "on")) if smm is not None else None,
        tuple(disks),
        networks,
        command_line_of(document),
        tuple(left_out),
        _given(root),
    )


def _protected(root: Element) -> list[Refusal]:
    """A guest that is to be protected from its host is not started without that."""
    element = root.child("launchSecurity")
    if element is None:
        return []
    kind = element.attributes.get("type", "")
    return [catalogue.PROTECTION(line=element.line, kind=kind[:40])]


def _noticed(root: Element) -> list[str]:
    """Elements outside of `<devices>` that are not started, and that the guest would notice."""
    found = [path for path in _UNSTARTED if root.find(path) is not None]
    numa = root.find("cpu/numa")
    if numa is not None and any(cell.child("cache") is not None for cell in numa.all("cell")):
        found.append("cpu/numa/cell/cache")
    os, clock, features = root.child("os"), root.child("clock"), root.child("features")
    nvram = os.child("nvram") if os is not None else None
    if nvram is not None and (_variables(nvram) is None or _flash(os) is None):
        # Where libvirt puts a guest's variables of its own is not known here.
        found.append("os/nvram")
    if nvram is not None and "template" in nvram.attributes:
        found.append("os/nvram template")
    if os is not None and "firmware" in os.attributes and _text(os, "loader") is None:
        found.append(f"os firmware='{os.attributes['firmware'][:40]}'")
    if clock is not None and clock.attributes.get("offset", "utc") != "utc":
        found.append(f"clock offset='{clock.attributes['offset'][:40]}'")
    children = features.children if features is not None else ()
    return found + [child.name for child in children if child.name not in _FEATURES]


def _given(root: Element) -> GivenDevices | None:
    found = machine_element(root)
    if found is None or found[0].attributes.get("devices") != "commandline":
        return None
    attributes = found[0].attributes
    return GivenDevices(attributes.get("defaults") == "yes", attributes.get("serial") == "yes")


def _text(parent: Element | None, name: str) -> str | None:
    element = parent.child(name) if parent is not None else None
    return (element.text.strip() or None) if element is not None else None


def _flash(os: Element | None) -> Flash | None:
    """`<loader type='pflash'>` with `<nvram>`."""
    loader, nvram = (os.child(name) if os is not None else None for name in ("loader", "nvram"))
    code = loader.text.strip() if loader is not None else ""
    if loader is None or not code or loader.attributes.get("type") != "pflash":
        return None
    variables = _variables(nvram) if nvram is not None else None
    return Flash(
        code,
        loader.attributes.get("format", "raw"),
        loader.attributes.get("readonly", "no") == "yes",
        loader.attributes.get("secure") == "yes",
        variables,
        nvram.attributes.get("format", "raw") if nvram is not None else "raw",
    )


def _variables(nvram: Element) -> str | None:
    """The file, in either form."""
    source = nvram.child("source")
    path = source.attributes.get("file") if source is not None else nvram.text.strip()
    return path or None


def _disk(element: Element, found: list[Refusal]) -> Disk | None:
    source, target, driver = (element.child(name) for name in ("source", "target", "driver"))
    kind = element.attributes.get("device", "disk")
    if source is None and kind == "cdrom":
        # An empty drive.
        return None
    path = None
    if source is not None:
        path = source.attributes.get("file") or source.attributes.get("dev")
    if path is None or kind not in ("disk", "cdrom"):
        found.append(catalogue.XML_DISK(line=element.line))
        return None
    return Disk(
        path,
        driver.attributes.get("type", "raw") if driver is not None else "raw",
        target.attributes.get("bus", "virtio") if target is not None else "virtio",
        is_cdrom=kind == "cdrom",
        is_readonly=element.child("readonly") is not None,
    )


def command_line_of(document: Document) -> tuple[str, ...]:
    """`<qemu:commandline>`, libvirt's way to hand arguments through."""
    root = document.root
    words = []
    for element in root.children:
        prefix, colon, name = element.name.rpartition(":")
        if name != "commandline" or not colon:
            continue
        space = element.attributes.get(f"xmlns:{prefix}", root.attributes.get(f"xmlns:{prefix}"))
        if space == QEMU_NAMESPACE:
            words += [arg.attributes.get("value", "") for arg in element.all(f"{prefix}:arg")]
    return tuple(words)
