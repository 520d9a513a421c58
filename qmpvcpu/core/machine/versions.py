"""What a version of QEMU can do, and whose rules a machine type keeps. Pure.

Versions of QEMU are compared here and in `core.quirks` only: this table has features and arithmetic, that one
defects. A new feature is one row of `_SINCE`; code asks `has(version, Feature.…)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

from qmpvcpu.core.model import QemuVersion

__all__ = [
    "MEASURED",
    "Feature",
    "compat_version",
    "are_same",
    "enclosing",
    "has",
    "is_dropped",
    "is_measured",
    "measured_with",
    "oldest_with",
    "takes_machine",
]


class Feature(StrEnum):
    """What a QEMU has since some version; where it is a rule of the machine type, that type's version counts."""

    #: -smp: what is not written becomes cores of one socket (before: sockets of one core). Of the machine type.
    CORES_FIRST = "cores-first"
    #: -smp: 0 is refused for every level (before: it means "not written"), and 1 is taken for every level.
    NO_ZERO_LEVELS = "no-zero-levels"
    #: -smp: drawers and books; s390x tells them in props.
    DRAWERS_AND_BOOKS = "drawers-and-books"
    #: -smp: modules.
    MODULES = "modules"
    #: s390x: threads are refused (before: they are made cores of). Of the machine type.
    S390X_ONE_THREAD = "s390x-one-thread"
    #: pseries under TCG: more than one thread in a core.
    PSERIES_TCG_THREADS = "pseries-tcg-threads"
    #: loongarch64 virt: CPU hotplug.
    LOONGARCH64_HOTPLUG = "loongarch64-hotplug"
    #: Migration to and from a `file:` URI.
    FILE_MIGRATION = "file-migration"


_SINCE: Final[Mapping[Feature, QemuVersion]] = {
    Feature.CORES_FIRST: QemuVersion(6, 2),
    Feature.S390X_ONE_THREAD: QemuVersion(7, 2),
    Feature.DRAWERS_AND_BOOKS: QemuVersion(8, 2),
    Feature.FILE_MIGRATION: QemuVersion(8, 2),
    Feature.PSERIES_TCG_THREADS: QemuVersion(8, 2),
    Feature.NO_ZERO_LEVELS: QemuVersion(9, 0),
    Feature.MODULES: QemuVersion(9, 1),
    Feature.LOONGARCH64_HOTPLUG: QemuVersion(10, 0),
}

#: The versions that the arithmetic of `core.smp` has been compared with (tests/qemu/test_smp_real.py).
MEASURED: Final = (QemuVersion(7, 2), QemuVersion(10, 0), QemuVersion(11, 1))
#: QEMU drops machine types after some years: those before this one are gone in the newest of `MEASURED`.
_OLDEST_TYPE: Final = QemuVersion(6, 0)
_TYPE_VERSION: Final = re.compile(r"-(\d{1,3})\.(\d{1,3})\Z")


def has(version: QemuVersion, feature: Feature) -> bool:
    """Whether a QEMU, or a machine type, of this version has a feature."""
    return version >= _SINCE[feature]


def are_same(one: QemuVersion | None, other: QemuVersion | None) -> bool:
    """Whether both are known, and one: what the two QEMUs tell is told in the same words."""
    return one is not None and one == other


def is_measured(version: QemuVersion) -> bool:
    """Whether the arithmetic has been compared with a QEMU of this major and minor version."""
    return _minor(version) in MEASURED


def enclosing(version: QemuVersion) -> Sequence[QemuVersion]:
    """The measured versions next below and next above an unmeasured one; empty where either is missing."""
    below = [measured for measured in MEASURED if measured <= version]
    above = [measured for measured in MEASURED if measured > version]
    return (below[-1], above[0]) if below and above else ()


def compat_version(machine: str, version: QemuVersion) -> QemuVersion:
    """The version whose rules a machine type keeps: that of its name, else QEMU's."""
    return _type_version(machine) or _minor(version)


def takes_machine(version: QemuVersion, machine: str) -> bool:
    """Whether a machine type is not newer than this QEMU."""
    return compat_version(machine, version) <= version


def measured_with(machine: str) -> Sequence[QemuVersion]:
    """The measured versions that a machine type is not too new for."""
    return [version for version in MEASURED if takes_machine(version, machine)]


def is_dropped(machine: str) -> bool:
    """Whether a machine type is so old that a QEMU may not have it any more."""
    return compat_version(machine, _OLDEST_TYPE) < _OLDEST_TYPE


def oldest_with(machine: str) -> QemuVersion:
    """The oldest QEMU that has this versioned machine type; 0.0 for a type without a version."""
    return _type_version(machine) or QemuVersion(0, 0)


def _type_version(machine: str) -> QemuVersion | None:
    found = _TYPE_VERSION.search(machine)
    return QemuVersion(int(found[1]), int(found[2])) if found else None


def _minor(version: QemuVersion) -> QemuVersion:
    return QemuVersion(version.major, version.minor)
