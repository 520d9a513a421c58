"""What a caller asks for, as data, and the parser of id lists. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qmpvcpu.core.arguments import checked
from qmpvcpu.errors import VcpuUsageError
from qmpvcpu.flags import VcpuFlag

if TYPE_CHECKING:
    from qmpvcpu.core.definition import VcpuConfig

#: Seconds that the guest has, where the request does not say.
TIMEOUT: Final = 30.0
_LONGEST: Final = 86400.0 * 365
_MOST_RETRIES: Final = 9999
_RANGE = re.compile(r"(\^?)([0-9]{1,6})(?: *- *([0-9]{1,6}))?\Z")


@dataclass(frozen=True, slots=True)
class Listed:
    """What a file's `<vcpus>` says of every vCPU. `exact` is whether it says order and hotpluggable too."""

    vcpus: tuple[VcpuConfig, ...]
    exact: bool
    place: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """One call, as data.

    `ids` are vCPU ids or, with NUMA_NODE, one node, of which `count` is how many. With `total`, the number of
    vCPUs there should be, ids and ENABLE or DISABLE follow from the state; `maximum` makes that the number of ids
    in the definition instead, `hotpluggable` what is added there so. `force` does what is known to kill QEMU.
    `timeout` is in seconds, for what the guest must do (0: do not wait; None: `TIMEOUT`, and 0 while the guest is
    stopped and so cannot do anything). `wait` False is `--async`: the call ends
    once QEMU took an unplug. `atomic` brings back what was removed if the rest fails. `retry` is how often an
    unplug is asked again that the guest refused. `fallback` False never asks the guest agent instead. `listed`
    says what every vCPU should be, and ids follow from it. `place` False leaves threads where the kernel puts
    them.
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
            raise VcpuUsageError(f"a timeout of {self.timeout} s makes no sense", hint="give seconds, 0 or more")
        if not 0 <= self.retry <= _MOST_RETRIES:
            raise VcpuUsageError(
                f"{self.retry} retries make no sense", hint=f"give a number from 0 to {_MOST_RETRIES}"
            )

    @property
    def patience(self) -> float:
        """How long the guest may take, seconds."""
        return TIMEOUT if self.timeout is None else self.timeout

    def has(self, flag: VcpuFlag) -> bool:
        """Whether that flag is set. `&` of two IntFlags makes a third in Python; this asks int alone."""
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
        """Neither ENABLE nor DISABLE, nor a count to be reached."""
        return self.total is None and self.listed is None and not (self.enable or self.disable)

    def wants(self, vcpu_id: int) -> bool:
        """Whether this vCPU should be enabled; it must be one that the request is about."""
        return self.enable if self.listed is None else self.listed.vcpus[vcpu_id].enabled

    @property
    def enables_more(self) -> bool:
        """Whether it may plug: it enables, or reaches a count."""
        return not self.has(VcpuFlag.GUEST) and (self.enables or self.total is not None)

    @property
    def enables(self) -> bool:
        """Whether it may enable."""
        return self.enable or self.listed is not None


Request.__init__ = checked(Request.__init__)  # type: ignore[method-assign]


@checked
def parse_ids(text: str, noun: str = "vCPU id") -> tuple[int, ...]:
    """`5`, `1-3,7`, `0-7,^2`: vCPU ids, ascending, each once. As virsh does, it reads the list from left to right:
    `^1,0-1` is 0-1.

    Args:
        text: the list.
        noun: what it is a list of, for messages.

    Raises:
        VcpuUsageError: the text is not such a list, or leaves nothing.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        found = _RANGE.match(part.strip())
        if not found:
            raise VcpuUsageError(f"'{part.strip()}' is not a {noun}", hint="write a list as 5, 1-3,7 or 0-7,^2")
        low = int(found[2])
        high = int(found[3]) if found[3] is not None else low
        if high < low:
            raise VcpuUsageError(f"the range '{part.strip()}' runs backwards", hint=f"write {high}-{low}")
        if found[1]:
            chosen.difference_update(range(low, high + 1))
        else:
            chosen.update(range(low, high + 1))
    if not chosen:
        raise VcpuUsageError(f"'{text}' leaves no {noun}", hint="^N takes N out of the ids in front of it: 0-7,^2")
    return tuple(sorted(chosen))
