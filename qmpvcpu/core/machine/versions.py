"""What a version of QEMU can do, and which version's rules a machine type follows. Pure.

Only this module and `core.quirks` compare versions of QEMU: this one for features and arithmetic,
that one for defects. To add a feature, add a row to `_SINCE`; code calls `has(version, Feature.…)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

from qmpvcpu.core.model import QemuVersion


class Feature(StrEnum):
    """What QEMU has since some version; for a rule of the machine type, the version of that type
    counts.
    """

    #: -smp: a missing number becomes cores of one socket (before: sockets of one core). Of the
    #: machine type.
    CORES_FIRST = "cores-first"
    #: -smp: 0 is refused for every level (before: it means "not written"), and 1 is accepted for
    #: every level.
    NO_ZERO_LEVELS = "no-zero-levels"
    #: -smp: drawers and books are accepted, and s390x has them in props. Whether a machine may have
    #: more than one of them depends on the version of its type.
    DRAWERS_AND_BOOKS = "drawers-and-books"
    #: -smp: modules.
    MODULES = "modules"
    #: s390x: threads are refused (before: they become cores). Of the machine type.
    S390X_ONE_THREAD = "s390x-one-thread"
    #: pseries under TCG: more than one thread in a core.
    PSERIES_TCG_THREADS = "pseries-tcg-threads"
    #: `-numa node,mem=` is refused. Of the machine type.
    NO_NUMA_MEM = "no-numa-mem"
    #: Sizes: `0x10M` is refused, and `.5M` is accepted (before: the other way round).
    STRICT_SIZES = "strict-sizes"
    #: pseries: transactional memory, which TCG does not have, is not required. Of the machine type.
    PSERIES_WITHOUT_HTM = "pseries-without-htm"
    #: Migration to and from a `file:` URI.
    FILE_MIGRATION = "file-migration"


_SINCE: Final[Mapping[Feature, QemuVersion]] = {
    Feature.PSERIES_WITHOUT_HTM: QemuVersion(2, 12),
    Feature.NO_NUMA_MEM: QemuVersion(5, 1),
    Feature.CORES_FIRST: QemuVersion(6, 2),
    Feature.S390X_ONE_THREAD: QemuVersion(7, 2),
    Feature.STRICT_SIZES: QemuVersion(8, 1),
    Feature.DRAWERS_AND_BOOKS: QemuVersion(8, 2),
    Feature.FILE_MIGRATION: QemuVersion(8, 2),
    Feature.PSERIES_TCG_THREADS: QemuVersion(8, 2),
    Feature.NO_ZERO_LEVELS: QemuVersion(9, 0),
    Feature.MODULES: QemuVersion(9, 1),
}

#: The versions that the arithmetic of `core.machine.smp` has been compared with
#: (tests/qemu/test_smp_real.py).
MEASURED: Final = (QemuVersion(7, 2), QemuVersion(10, 0), QemuVersion(11, 1))
#: The oldest machine type of each family in each of `MEASURED` (`query-machines`); its newest is
#: its own. QEMU drops types after some years. "virt" is loongarch64's: aarch64's is not computed.
_OLDEST_TYPES: Final[Mapping[str, Sequence[QemuVersion | None]]] = {
    "pc-i440fx": (QemuVersion(1, 4), QemuVersion(2, 4), QemuVersion(5, 2)),
    "pc-q35": (QemuVersion(2, 4), QemuVersion(2, 4), QemuVersion(5, 2)),
    "pseries": (QemuVersion(2, 7), QemuVersion(3, 0), QemuVersion(5, 2)),
    "s390-ccw-virtio": (QemuVersion(2, 4), QemuVersion(2, 9), QemuVersion(5, 2)),
    "virt": (None, None, QemuVersion(11, 1)),
}
#: The first version with CPU hotplug on a family, where it came later than the family.
_HOTPLUG_SINCE: Final = {"virt": QemuVersion(10, 0)}
#: The last minor version of each major version; it is 2 from 4 to 10.
_LAST_MINOR: Final = {1: 7, 2: 12, 3: 1} | dict.fromkeys(range(4, 11), 2)
_TYPE: Final = re.compile(r"(.+)-((?:0|[1-9]\d?)\.(?:0|[1-9]\d?))")
_TYPE_VERSION: Final = re.compile(r"-(\d{1,3})\.(\d{1,3})\Z")


def has(version: QemuVersion, feature: Feature) -> bool:
    """Whether a QEMU, or a machine type, of this version has a feature."""
    return version >= _SINCE[feature]


def has_hotplug(version: QemuVersion, machine: str) -> bool:
    """Whether a QEMU of this version has CPU hotplug on a machine type whose rules are known."""
    since = _HOTPLUG_SINCE.get(_TYPE_VERSION.sub("", machine))
    return since is None or version >= since


def are_same(one: QemuVersion | None, other: QemuVersion | None) -> bool:
    """Whether both are known and equal: then both QEMUs use the same names."""
    return one is not None and one == other


def is_measured(version: QemuVersion) -> bool:
    """Whether the arithmetic has been compared with a QEMU of this major and minor version."""
    return _is_release(version) and _minor(version) in MEASURED


def enclosing(version: QemuVersion) -> Sequence[QemuVersion]:
    """The measured versions next below and next above an unmeasured one; empty where either is
    missing.
    """
    below = [measured for measured in MEASURED if measured <= version]
    above = [measured for measured in MEASURED if measured > version]
    return (below[-1], above[0]) if below and above else ()


def compat_version(machine: str, version: QemuVersion) -> QemuVersion:
    """The version whose rules a machine type follows: that of its name, else QEMU's."""
    return _type_version(machine) or _minor(version)


def has_machine(version: QemuVersion, machine: str) -> bool | None:
    """Whether a QEMU of this version has a machine type; None if only a probe can show it.

    Args:
        version: QEMU's.
        machine: a machine type whose rules are known; every QEMU has a name without a version.
    """
    match = _TYPE.fullmatch(machine)
    if match is None:
        return True if "." not in machine else None
    kind = _type_version(machine)
    assert kind is not None
    if match[1] not in _OLDEST_TYPES:
        return None
    if kind.minor > _LAST_MINOR.get(kind.major, kind.minor):
        return False
    if kind > _minor(version):
        return False if _is_release(version) else None
    oldest = dict(zip(MEASURED, _OLDEST_TYPES[match[1]], strict=True))
    if is_measured(version):
        first = oldest[_minor(version)]
        return first is not None and first <= kind
    around = [oldest[measured] for measured in enclosing(version)]
    if len(around) == 2:
        below, above = around
        if above is not None and below is not None and above <= kind:
            return True
        if below is not None and kind < below:
            return False
    return None


def newest_type(version: QemuVersion, machine: str) -> str | None:
    """The newest machine type of the family of this one; None if that is not known."""
    match = _TYPE.fullmatch(machine)
    if (
        match is None
        or has_machine(version, newest := f"{match[1]}-{version.major}.{version.minor}") is not True
    ):
        return None
    return newest


def oldest_with(machine: str) -> QemuVersion:
    """The oldest QEMU that has this versioned machine type; 0.0 for a type without a version."""
    return _type_version(machine) or QemuVersion(0, 0)


def _type_version(machine: str) -> QemuVersion | None:
    found = _TYPE_VERSION.search(machine)
    return QemuVersion(int(found[1]), int(found[2])) if found else None


def _is_release(version: QemuVersion) -> bool:
    """Whether this is a release, not a development version: 10.0.50 to 10.0.94 lead to 10.1."""
    return version.micro < 50


def _minor(version: QemuVersion) -> QemuVersion:
    return QemuVersion(version.major, version.minor)
