"""What a command is, and the options that several commands share. It loads argparse alone."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpvcpu.flags import VcpuFlag

if TYPE_CHECKING:
    from qmpvcpu.cli.session import CommandSession

Run = Callable[["CommandSession"], Awaitable[int]]


class Argument(NamedTuple):
    """One argument of a command: its names, and what `add_argument` takes for it.

    Attributes:
        is_word: whether a bare word gives it too, in the order of the command's arguments.
        is_required: whether the command cannot do without it.
    """

    names: tuple[str, ...]
    words: dict[str, Any]
    is_word: bool = False
    is_required: bool = False


class Command(NamedTuple):
    """One command: what it does, its arguments, and whether its last one is all that follows the
    first bare word, as it stands.
    """

    run: Run
    options: tuple[Argument, ...]
    has_rest: bool


def command(*options: Argument, has_rest: bool = False) -> Callable[[Run], Command]:
    """Make a command of the function that carries it out; see `Command`."""
    return lambda run: Command(run, options, has_rest)


def argument(name: str, metavar: str, text: str, *, option: str = "", **words: Any) -> Argument:
    """Return an argument that is given as a bare word, or after its option, as in virsh.

    Args:
        name: its name in the parsed options, and that of its option unless `option` is given.
        words: what `add_argument` takes; with `default` the command can do without it.
    """
    is_required = "default" not in words
    made = {"dest": name, "metavar": metavar, "help": text, **words}
    return Argument((f"--{option or name}",), made, is_word=True, is_required=is_required)


def flag(name: str, text: str, **words: Any) -> Argument:
    """Return an option without a value."""
    return Argument((name,), {"action": "store_true", "help": text, **words})


def value(name: str, metavar: str, text: str, **words: Any) -> Argument:
    """Return an option with a value."""
    return Argument((name,), {"metavar": metavar, "help": text, **words})


def choice(name: str, choices: tuple[str, ...], text: str, **words: Any) -> Argument:
    """Return an option with one of a few values."""
    return Argument((name,), {"choices": choices, "help": text, **words})


def seconds(text: str) -> float:
    """Parse a number of seconds. Raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86400 * 365:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds, 0 or more")
    return value


def positive(text: str) -> int:
    """Parse a number from 1 on. Raises ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:9]) < 10**6:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of 1 or more")
    return int(text)


def number(text: str) -> int:
    """Parse a number from 0 on. Raises ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or len(text) > 4:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 9999")
    return int(text)


DOMAIN = argument("domain", "DOMAIN", "its name, the path of its QMP socket or of its XML")
IMPACT = (
    flag("--live", "the running guest"),
    flag("--config", "the persistent definition, from the next boot"),
    flag("--current", "live if it runs, else config (default)"),
)
NO_PLACE = flag(
    "--no-place", "leave new threads where the kernel puts them, whatever <cputune> says"
)
CHANGE = (
    flag("--dry-run", "show what would be done, and do nothing"),
    flag("--async", "do not wait for the end of an unplug", dest="no_wait"),
    value(
        "--timeout",
        "S",
        "how long to wait for the guest (default 30, or 0 while it is stopped; 0: do not wait)",
        type=seconds,
    ),
    NO_PLACE,
)
PROBE_MODE = choice(
    "--probe",
    ("auto", "always", "never"),
    "ask a throwaway QEMU: auto: only where it cannot be computed (default); always; never",
    default="auto",
)
CRASHES = flag("--force", "also do what is known to crash QEMU")
HANGS = flag("--force", "also do what is known to hang a guest")
THROUGH_AGENT = flag("--guest", "through the guest agent: online and offline only")
DEST_HELP = (
    "a name, started here if it does not run, or the QMP socket of a QEMU with -incoming defer"
)
DEST_OR_NAME = argument("dest", "DEST", f"{DEST_HELP} (default: the guest's name)", default=None)
WAIT = value(
    "--wait",
    "S",
    "wait for pending unplugs first, S seconds (30)",
    nargs="?",
    type=seconds,
    const=30.0,
)

_FLAGS = {
    "enable": VcpuFlag.ENABLE,
    "disable": VcpuFlag.DISABLE,
    "live": VcpuFlag.LIVE,
    "config": VcpuFlag.CONFIG,
    "guest": VcpuFlag.GUEST,
    "numa_node": VcpuFlag.NUMA_NODE,
    "core": VcpuFlag.CORE,
}


def flags_of(options: argparse.Namespace) -> VcpuFlag:
    """Return the flags that the options name."""
    flags = VcpuFlag.CURRENT
    for name, one in _FLAGS.items():
        if getattr(options, name, False):
            flags |= one
    return flags
