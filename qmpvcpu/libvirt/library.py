"""Load libvirt-python only when a libvirt domain is named: it may not be installed, and it takes
long to load.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qmpvcpu.core.rules import catalogue


def libvirt_module() -> Any:
    """The module `libvirt`.

    Raises:
        VcpuRefused: it is not installed.
    """
    try:
        return import_module("libvirt")
    except ImportError as error:
        raise catalogue.NO_LIBVIRT.error(error=error) from error


def libvirt_qemu_module() -> Any:
    """The module `libvirt_qemu`: QEMU's monitor and the guest's agent by libvirt."""
    return import_module("libvirt_qemu")
