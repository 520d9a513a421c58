"""A call as data, and the parser of id lists. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qmpvcpu.core.arguments import checked
from qmpvcpu.errors import VcpuUsageError
from qmpvcpu.flags import VcpuFlag

if TYPE_CHECKING:
    from qmpvcpu.core.definition import VcpuConfig

#: Seconds that the guest has if the request does not set them.
TIMEOUT: Final = 30.0
_LONGEST: Final = 86400.0 * 365
_MOST_RETRIES: Final = 9999
_RANGE = re.compile(r"(\^?)([0-9]{1,6})(?: *- *([0-9]{1,6}))?\Z")


@dataclass(frozen=True, slots=True)
class Listed:
    """Every vCPU of a file's `<vcpus>`. `exact` is whether it has order and hotpluggable too."""

    vcpus: tuple[VcpuConfig, ...]
    exact: bool
    place: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """One call, as data.

    Attributes:
        ids: vCPU ids or, with NUMA_NODE, one node.
        flags: of the call.
        count: with NUMA_NODE, how many vCPUs or cores of the node.
        force: also do what is known to kill QEMU.
        total: the number of vCPUs to reach; ids, ENABLE and DISABLE then follow from the state.
        timeout: seconds for what the guest must do (0: do not wait; None: `TIMEOUT`, but 0 while
            the guest is stopped and so cannot act).
        wait: False is `--async`: the call ends once QEMU has accepted the unplugs.
        atomic: plug back what was removed if the rest fails.
        retry: how often an unplug that the guest refused is requested again.
        fallback: whether the guest agent may do what hotplug cannot.
        maximum: `total` is the number of vCPU ids in the definition instead.
        hotpluggable: the vCPUs that `total` adds to the definition are hotpluggable.
        listed: the state of every vCPU; ids then follow from it.
        place: False leaves threads where the kernel puts them.
    """

    ids: tuple[int, ...]
    flags: VcpuFlag = VcpuFlag.CURRENT
    count: int | None = None
    force: bool = False
    total: int | None = None
    timeout: float | None = None
    wait: bool = True
    atomic: bool = False
    retry: int = 0
    fallback: bool = True
    maximum: bool = False
    hotpluggable: bool = False
    listed: Listed | None = None
    place: bool = True

    def __post_init__(self) -> None:
        if self.timeout is not None and not 0 <= self.timeout <= _LONGEST:
            raise VcpuUsageError(
                f"{self.timeout} s is not a timeout", hint="give seconds, 0 or more"
            )
        if not 0 <= self.retry <= _MOST_RETRIES:
            raise VcpuUsageError(
                f"{self.retry} is not a number of retries",
                hint=f"give a number from 0 to {_MOST_RETRIES}",
            )

    @property
    def patience(self) -> float:
        """How long the guest may take, seconds."""
        return TIMEOUT if self.timeout is None else self.timeout

    def has(self, flag: VcpuFlag) -> bool:
        """Whether that flag is set. `&` of two IntFlags is a slow Python function; this one is
        int's.
        """
        return int.__and__(self.flags, flag) != 0

    @property
    def enable(self) -> bool:
        """Whether the request enables."""
        return self.has(VcpuFlag.ENABLE)

    @property
    def disable(self) -> bool:
        """Whether the request disables."""
        return self.has(VcpuFlag.DISABLE)

    @property
    def is_query(self) -> bool:
        """Whether it has neither ENABLE nor DISABLE, nor a number to reach."""
        return self.total is None and self.listed is None and not (self.enable or self.disable)

    @property
    def enables_more(self) -> bool:
        """Whether it may plug: it enables, or reaches a number of vCPUs."""
        return not self.has(VcpuFlag.GUEST) and (self.enables or self.total is not None)

    @property
    def enables(self) -> bool:
        """Whether it may enable."""
        return self.enable or self.listed is not None


Request.__init__ = checked(Request.__init__)  # type: ignore[method-assign]


@checked
def parse_ids(text: str, noun: str = "vCPU id") -> tuple[int, ...]:
    """`5`, `1-3,7`, `0-7,^2`: vCPU ids, ascending, each once. As virsh does, it reads the list from
    left to right: `^1,0-1` is 0-1.

    Args:
        text: the list.
        noun: the name of one item, for messages.

    Raises:
        VcpuUsageError: the text is not such a list, or the list is empty.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        found = _RANGE.match(part.strip())
        if not found:
            raise VcpuUsageError(
                f"'{part.strip()}' is not a {noun}", hint="write a list as 5, 1-3,7 or 0-7,^2"
            )
        low = int(found[2])
        high = int(found[3]) if found[3] is not None else low
        if high < low:
            raise VcpuUsageError(
                f"the range '{part.strip()}' runs backwards", hint=f"write {high}-{low}"
            )
        if found[1]:
            chosen.difference_update(range(low, high + 1))
        else:
            chosen.update(range(low, high + 1))
    if not chosen:
        raise VcpuUsageError(
            f"'{text}' is empty: it has no {noun}",
            hint="^N takes N out of the ids in front of it: 0-7,^2",
        )
    return tuple(sorted(chosen))
