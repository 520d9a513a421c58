"""The grammar of the command line, in virsh's words."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from typing import Final, NoReturn

from qmpvcpu.cli import commands
from qmpvcpu.cli.options import Command
from qmpvcpu.errors import VcpuUsageError

_PROGRAM: Final = "qmpvcpu"
_DESCRIPTION: Final = (
    "Switch single virtual CPUs of a QEMU guest on and off, by id, straight over QMP."
)
_EPILOG: Final = """\
DOMAIN is a name given to `define`, or with a / in it the path of a QMP socket or of a domain
XML file; else a file, host:port, or fd:N; with -c URI the name or UUID of a libvirt domain.
IDS is a list of vCPU ids: 5, 1-3,7 or 0-7,^2.

exit codes: 0 done  2 usage  3 refused  4 the guest rejected it  5 pending  6 partial
            7 no connection  8 QEMU failed, undone  130/143 interrupted
"""
#: Those of `add_global_options` whose value is the next word.
_WITH_VALUE: Final = frozenset({"-c", "--connect", "--via", "--agent", "--qmp-log"})


class Help(Exception):
    """Raised for --help, with the text to print."""


class _Parser(argparse.ArgumentParser):
    """Raises errors as `VcpuUsageError`, so that --json renders them too, and help as `Help`, which
    the caller prints.
    """

    def error(self, message: str) -> NoReturn:
        raise VcpuUsageError(message, hint=_help_of(self.prog))

    def print_help(self, file: object = None) -> NoReturn:
        raise Help(self.format_help())


def _help_of(command: str) -> str:
    return f"`{command} --help` shows what it takes"


def add_global_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that may stand before or after every command."""
    add = parser.add_argument_group("global options").add_argument
    add("--json", action="store_true", help="one JSON document on stdout")
    add("--debug", action="store_true", help="tracebacks and debug log on stderr")
    add("-c", "--connect", metavar="URI", help="libvirt's URI: DOMAIN is one of its domains")
    add(
        "--via",
        choices=("api", "monitor"),
        help="how a libvirt domain is reached: by libvirt's API (default), or with our engine"
        " through its monitor",
    )
    add("--agent", metavar="ADDR", help="the guest agent's socket")
    add("--qmp-log", metavar="FILE", help="append every QMP message as a JSON line")


def _main_parser() -> _Parser:
    """Build the parser of a command line without a command."""
    lines = [_DESCRIPTION]
    width = max(map(len, commands.NAMES))
    for title, names in commands.GROUPS.items():
        lines += [
            "",
            f"{title}:",
            *(f"  {name:{width}}  {text}" for name, (_, text) in names.items()),
        ]
    parser = _Parser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} [OPTION]… COMMAND …",
        description="\n".join(lines),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    add_global_options(parser)
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line. The result always has the global options, the name of the command in
    `command`, and the function that carries it out in `run`.

    Raises:
        VcpuUsageError: the arguments do not match the grammar.
        Help: --help is among the arguments.
    """
    at = _first_word(arguments)
    if at is None:
        _main_parser().parse_args(arguments)
        raise VcpuUsageError("no command is given", hint=f"`{_PROGRAM} --help` lists them")
    name = arguments[at]
    if name not in commands.NAMES:
        near = get_close_matches(name, commands.NAMES, 3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise VcpuUsageError(
            f"there is no command '{name}'", hint=f"{hint}`{_PROGRAM} --help` lists them"
        )
    command = commands.load(name)
    given, rest = [*arguments[:at], *arguments[at + 1 :]], []
    if command.has_rest and (first := _first_word(given)) is not None:
        given, rest = given[: first + 1], given[first + 1 :]
    found = _parse_command(name, command, given, rest)
    found.command, found.run = name, command.run
    _check(found)
    return found


def _parse_command(
    name: str, command: Command, given: list[str], rest: list[str]
) -> argparse.Namespace:
    """Parse the arguments of one command. Each bare word is the value of the first argument that
    takes one and has none, as in virsh.
    """
    positionals = [option for option in command.options if option.is_word]
    metavars = [
        option.words["metavar"] if option.is_required else f"[{option.words['metavar']}]"
        for option in positionals
    ]
    prog = f"{_PROGRAM} {name}"
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *metavars, "[OPTION]…"]),
        description=commands.summary(name),
        allow_abbrev=False,
    )
    group = parser.add_argument_group("arguments, as bare words or with their options")
    for option in command.options:
        (group if option.is_word else parser).add_argument(*option.names, **option.words)
    add_global_options(parser)
    if "--" in given:
        at = given.index("--")
        given, rest = given[:at], given[at + 1 :]
    found, left = parser.parse_known_args(given)
    missing = [option for option in positionals if getattr(found, option.words["dest"]) is None]
    if command.has_rest:
        last = missing.pop()
        setattr(found, last.words["dest"], rest)
        rest = []
    bare = [text for text in left if _is_bare(text)] + rest
    # argparse has no argument that is an option and a bare word: each bare word is parsed once
    # more, after its option, which checks its type.
    filled = [f"{option.names[0]}={text}" for option, text in zip(missing, bare, strict=False)]
    parser.parse_args(filled, found)
    unknown = [text for text in left if not _is_bare(text)] + bare[len(missing) :]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    lacking = [option.words["metavar"] for option in missing[len(bare) :] if option.is_required]
    if lacking:
        parser.error(f"the following arguments are required: {', '.join(lacking)}")
    return found


def _is_bare(text: str) -> bool:
    """Whether a word is not an option; `-` is standard input."""
    return not text.startswith("-") or text == "-"


def _first_word(arguments: list[str]) -> int | None:
    """Return which of the arguments is the first that is neither an option nor its value."""
    at = 0
    while at < len(arguments):
        if _is_bare(arguments[at]):
            return at
        at += 2 if arguments[at] in _WITH_VALUE else 1
    return None


def _check(found: argparse.Namespace) -> None:
    """Check what argparse cannot: options that exclude each other, and those that need -c URI."""
    if getattr(found, "current", False) and (found.live or found.config):
        word = "live" if found.live else "config"
        raise VcpuUsageError(
            f"--current and --{word} exclude each other", hint="leave out one of them"
        )
    if found.connect is None:
        if found.via is not None:
            raise VcpuUsageError(
                "--via is about a libvirt domain", hint="give libvirt's URI: -c URI"
            )
        return
    if found.command not in commands.WITH_LIBVIRT:
        text = f"{found.command} is not for libvirt's domains"
        raise VcpuUsageError(text, hint=f"with -c URI there are {', '.join(commands.WITH_LIBVIRT)}")
    if found.command == "list":
        refuse_unused(found, "list asks libvirt alone", ("agent", "qmp_log", "via"))
    if found.command == "doctor" and found.domain is None:
        raise VcpuUsageError(
            "doctor with -c URI is about one domain", hint="doctor DOMAIN; or leave out -c URI"
        )


def refuse_unused(found: argparse.Namespace, why: str, names: tuple[str, ...]) -> None:
    """Raise VcpuUsageError for options that would be ignored."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(found, name) is not None]
    if given:
        raise VcpuUsageError(f"{why}: {', '.join(given)} has no effect", hint="leave it out")
