"""A running QEMU's command line, as the kernel has it, read as QEMU reads it. Pure, and never
raises on odd input.

It is the only source for the NUMA node of a memory backend, CPU features, firmware and devices. It
has what QEMU was started with; QMP reports what was plugged since.

Sources: system/vl.c, util/keyval.c, util/qemu-option.c, util/cutils.c (`do_strtosz`),
hw/core/numa.c.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qmpvcpu.core.definition import Pairs
from qmpvcpu.core.machine.words import parse_number, parse_size, split_pairs

#: Options without an argument, of QEMU 7.2 to 11.1 (qemu-options.def).
_FLAGS: Final = frozenset(
    (
        *(
            "h",
            "help",
            "version",
            "S",
            "s",
            "nographic",
            "portrait",
            "no-reboot",
            "no-shutdown",
            "nodefaults",
        ),
        *(
            "no-user-config",
            "nouserconfig",
            "daemonize",
            "snapshot",
            "enable-kvm",
            "no-acpi",
            "no-hpet",
        ),
        *(
            "no-fd-bootchk",
            "usb",
            "full-screen",
            "win2k-hack",
            "singlestep",
            "one-insn-per-tb",
            "preconfig",
        ),
        *(
            "only-migratable",
            "semihosting",
            "enable-sync-profile",
            "xen-attach",
            "xen-domid-restrict",
        ),
        *(
            "old-param",
            "mem-prealloc",
            "alt-grab",
            "ctrl-grab",
            "no-quit",
            "sdl",
            "gtk",
            "curses",
            "perfmap",
        ),
        *("jitdump", "run-with-help", "async-teardown"),
    )
)
#: The key of a first word without a key, by option.
IMPLIED: Final = {
    "machine": "type",
    "accel": "accel",
    "m": "size",
    "smp": "cpus",
    "object": "qom-type",
    "device": "driver",
    "numa": "type",
    "netdev": "type",
    "nic": "type",
    "net": "type",
    "chardev": "backend",
    "mon": "chardev",
    "blockdev": "driver",
    "name": "guest",
    "vnc": "vnc",
    "fw_cfg": "name",
    "audiodev": "driver",
    "audio": "driver",
    "fsdev": "fsdriver",
    "virtfs": "fsdriver",
    "display": "type",
}
#: Options whose argument has no keys.
_PLAIN: Final = frozenset(
    (
        *(
            "cpu",
            "bios",
            "kernel",
            "initrd",
            "append",
            "dtb",
            "serial",
            "parallel",
            "vga",
            "monitor",
            "qmp",
        ),
        *(
            "qmp-pretty",
            "uuid",
            "mem-path",
            "L",
            "pidfile",
            "hda",
            "hdb",
            "hdc",
            "hdd",
            "cdrom",
            "fda",
            "fdb",
        ),
        *("pflash", "mtdblock", "sd", "incoming", "loadvm", "readconfig", "D", "d", "global"),
    )
)
_MIB: Final = 1024 * 1024
#: Options of the dynamic linker that take a word (ld.so(8)), and the names of its program.
_LOADER_WORDS: Final = frozenset(
    ("--argv0", "--library-path", "--inhibit-rpath", "--audit", "--preload")
)
_LOADER: Final = re.compile(r"ld(?:-[\w.-]+|64)?\.so(?:\.[0-9]+)*")


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its name without dashes, its argument as written, and the argument's keys if it
    has any.

    `pairs` of a JSON argument have dotted keys, and "on" or "off" for a truth value.
    """

    name: str
    text: str | None = None
    pairs: Pairs = ()

    def get(self, key: str) -> str | None:
        """The last value of a key, which is the one that counts."""
        return next((value for name, value in reversed(self.pairs) if name == key), None)

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the command line."""
        return (f"-{self.name}",) if self.text is None else (f"-{self.name}", self.text)


@dataclass(frozen=True, slots=True)
class MemorySize:
    """`-m`, in bytes; None if it is not written, or not readable."""

    size: int | None = None
    slots: int | None = None
    maximum: int | None = None


@dataclass(frozen=True, slots=True)
class CommandLineNode:
    """One `-numa node`: `memory` is its `mem=` in bytes, `memdev` the id of its backend."""

    id: int
    memdev: str | None = None
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class QemuCommandLine:
    """What QEMU was started with. `program` is the file that was run, also if a dynamic linker ran
    it.

    `unread` are the options that could not be read, as written.
    """

    program: str | None = None
    is_loaded: bool = False
    options: tuple[Option, ...] = ()
    unread: tuple[str, ...] = ()

    def all(self, *names: str) -> Iterator[Option]:
        """The options of these names, in order."""
        return (option for option in self.options if option.name in names)

    def text(self, name: str) -> str | None:
        """The argument of the last option of this name."""
        return next((option.text for option in reversed(self.options) if option.name == name), None)

    def has(self, *names: str) -> bool:
        """Whether there is an option of one of these names."""
        return any(True for _ in self.all(*names))

    @property
    def machine_options(self) -> Pairs:
        """The keys of all `-machine` options together, without the type and the accelerator."""
        merged = dict(pair for option in self.all("machine") for pair in option.pairs)
        return tuple((key, value) for key, value in merged.items() if key not in ("type", "accel"))

    @property
    def accel_options(self) -> Pairs:
        """The keys of the first `-accel`."""
        first = next(self.all("accel"), None)
        return (
            tuple(pair for pair in first.pairs if pair[0] != "accel") if first is not None else ()
        )

    @property
    def memory(self) -> MemorySize:
        """The sizes of all `-m` options together."""
        merged = dict(pair for option in self.all("m") for pair in option.pairs)
        slots = parse_number(merged.get("slots", ""))
        return MemorySize(
            parse_size(merged.get("size"), _MIB),
            slots if slots is not None and 0 <= slots < 2**16 else None,
            parse_size(merged.get("maxmem")),
        )

    @property
    def backends(self) -> tuple[Option, ...]:
        """`-object memory-backend-*`, in order."""
        return tuple(
            o for o in self.all("object") if (o.get("qom-type") or "").startswith("memory-backend-")
        )

    @property
    def nodes(self) -> tuple[CommandLineNode, ...]:
        """`-numa node`, by id; a node without an id has that of its position."""
        found: dict[int, CommandLineNode] = {}
        for option in self.all("numa"):
            if option.get("type") != "node":
                continue
            number = _int(option.get("nodeid"), len(found))
            # hw/core/numa.c: only this number is in MiB if it has no suffix.
            found[number] = CommandLineNode(
                number, option.get("memdev"), parse_size(option.get("mem"), _MIB)
            )
        return tuple(found[number] for number in sorted(found))

    @property
    def distances(self) -> tuple[tuple[int, int, int], ...]:
        """`-numa dist`: from, to, distance."""
        rows = (option for option in self.all("numa") if option.get("type") == "dist")
        return tuple(
            (_int(o.get("src"), 0), _int(o.get("dst"), 0), _int(o.get("val"), 0)) for o in rows
        )

    @property
    def memory_attributes(self) -> tuple[str, ...]:
        """The latencies, bandwidths, caches and initiators of `-numa` (ACPI's HMAT)."""
        found = []
        for option in self.all("numa"):
            kind, initiator = option.get("type") or "", option.get("initiator")
            if kind.startswith("hmat-"):
                found.append(" ".join(option.words))
            elif kind == "node" and initiator is not None:
                found.append(
                    f"-numa node,nodeid={option.get('nodeid') or '0'},initiator={initiator}"
                )
        return tuple(found)


def read_command_line(words: Sequence[str]) -> QemuCommandLine:
    """Read a command line.

    Args:
        words: the process's arguments, its program first.
    """
    program, rest, is_loaded = _program(list(words))
    options: list[Option] = []
    unread: list[str] = []
    position = 0
    while position < len(rest):
        word = rest[position]
        position += 1
        if not word.startswith("-") or word == "-":
            # To QEMU a bare word is the first disk.
            options.append(Option("hda", word))
            continue
        name = word.removeprefix("-").removeprefix("-")
        name = "machine" if name == "M" else name
        if name in _FLAGS:
            options.append(Option(name))
            continue
        if position == len(rest):
            unread.append(word)
            break
        text = rest[position]
        position += 1
        pairs = _pairs(name, text)
        if pairs is None:
            unread.append(f"{word} {text}")
        options.append(Option(name, text, pairs or ()))
    return QemuCommandLine(program, is_loaded, tuple(options), tuple(unread))


def _program(words: list[str]) -> tuple[str | None, list[str], bool]:
    """The program, the words after it, and whether the dynamic linker was called by name."""
    if not words:
        return None, [], False
    if not _LOADER.fullmatch(words[0].rpartition("/")[2]):
        return words[0], words[1:], False
    position = 1
    while position < len(words) and words[position].startswith("--"):
        position += 2 if words[position] in _LOADER_WORDS else 1
    if position >= len(words):
        return words[0], [], True
    return words[position], words[position + 1 :], True


def _pairs(name: str, text: str) -> Pairs | None:
    """The keys of an argument; None if it is JSON that does not parse."""
    if name in _PLAIN:
        return ()
    if text.startswith("{"):
        try:
            # -object writes a list by repeating its key (QEMU's OptsVisitor), not with an index.
            return tuple(_flat("", json.loads(text), has_indexes=name != "object"))
        except (ValueError, RecursionError):
            return None
    return split_pairs(text, IMPLIED.get(name))


def _flat(prefix: str, value: Any, *, has_indexes: bool) -> Iterable[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(
                f"{prefix}.{key}" if prefix else str(key), inner, has_indexes=has_indexes
            )
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _flat(
                f"{prefix}.{number}" if has_indexes else prefix, inner, has_indexes=has_indexes
            )
    elif isinstance(value, bool):
        yield prefix, "on" if value else "off"
    elif value is not None:
        yield prefix, str(value)


def split_cpu(text: str) -> tuple[str, Pairs]:
    """The model and the properties of -cpu's argument; features with `+` or `-` count last, as in
    QEMU.
    """
    model, *rest = text.split(",")
    last: dict[str, str] = {}
    for sign, value in (("+", "on"), ("-", "off")):
        last |= {word[1:].replace("_", "-"): value for word in rest if word.startswith(sign)}
    pairs = (word.partition("=") for word in rest if word and word[0] not in "+-")
    found = {key: value if equals else "on" for key, equals, value in pairs}
    return model, tuple((found | last).items())


def _int(text: str | None, default: int) -> int:
    """A number as C reads it: 010 is 8."""
    value = parse_number(text) if text is not None else None
    return default if value is None else value
