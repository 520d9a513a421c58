"""libvirt-python, loaded when a libvirt domain is named: not everybody has it, and it takes a while."""

from __future__ import annotations

from typing import Any

from qmpvcpu.core.rules import catalogue


def libvirt_module() -> Any:
    """The module `libvirt`.

    Raises:
        VcpuRefused: it is not installed.
    """
    try:
        import libvirt
    except ImportError as error:
        raise catalogue.NO_LIBVIRT.error(error=error) from error
    return libvirt


def libvirt_qemu_module() -> Any:
    """The module `libvirt_qemu`, QEMU's monitor and agent behind libvirt."""
    import libvirt_qemu

    return libvirt_qemu
