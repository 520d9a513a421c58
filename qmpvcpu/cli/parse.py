"""The grammar of the command line, in virsh's words. It loads argparse and nothing of qmpvcpu's engine."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple, NoReturn

from qmpvcpu.errors import VcpuUsageError

_EPILOG = """\
DOMAIN is a name given to `define`, or with a / in it the path of a QMP socket or of a domain XML file;
else a file, host:port, or fd:N; with -c URI the name or UUID of a libvirt domain.
IDS is a list of vCPU ids: 5, 1-3,7 or 0-7,^2.

exit codes: 0 done  2 usage  3 refused  4 the guest rejected it  5 pending  6 partial  7 no connection
            8 QEMU failed, undone  130/143 interrupted
"""


class Help(Exception):
    """Raised for --help, with the text to print."""


class _Parser(argparse.ArgumentParser):
    """Raises errors as `VcpuUsageError`, so that --json renders them too, and help as `Help`, which
    the caller prints.
    """

    def error(self, message: str) -> NoReturn:
        raise VcpuUsageError(message, hint=_help_of(self.prog))

    def _check_value(self, action: argparse.Action, value: str) -> None:
        if action.dest == "command" and action.choices is not None and value not in action.choices:
            from difflib import get_close_matches

            near = get_close_matches(value, list(action.choices), 3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise VcpuUsageError(f"there is no command '{value}'", hint=f"{hint}`{self.prog} --help` lists them")
        super()._check_value(action, value)

    def print_help(self, file: object = None) -> NoReturn:
        raise Help(self.format_help())


def _help_of(command: str) -> str:
    return f"`{command} --help` shows what it takes"


def _global_options() -> _Parser:
    """Options that may stand before or after the command. SUPPRESS keeps the default of one place
    from overwriting the other.
    """
    options = _Parser(add_help=False)
    group = options.add_argument_group("global options")
    add = group.add_argument
    add("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document on stdout")
    add("--debug", action="store_true", default=argparse.SUPPRESS, help="tracebacks and debug log on stderr")
    libvirts = "libvirt's URI: DOMAIN is one of its domains"
    add("-c", "--connect", metavar="URI", default=argparse.SUPPRESS, help=libvirts)
    via = "how a libvirt domain is reached: by libvirt's API (default), or with our engine through its monitor"
    add("--via", choices=("api", "monitor"), default=argparse.SUPPRESS, help=via)
    add("--agent", metavar="ADDR", default=argparse.SUPPRESS, help="the guest agent's socket")
    add("--qmp-log", metavar="FILE", default=argparse.SUPPRESS, help="append every QMP message as a JSON line")
    return options


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86400 * 365:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds, 0 or more")
    return value


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:9]) < 10**6:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of 1 or more")
    return int(text)


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 4:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 9999")
    return int(text)


class Argument:
    """One option or positional argument of a command, as `add_argument` takes it."""

    def __init__(self, *names: str, **words: Any) -> None:
        self.names = names
        self.words = words


def _flag(name: str, text: str, **words: Any) -> Argument:
    return Argument(name, action="store_true", help=text, **words)


def _value(name: str, metavar: str, text: str, **words: Any) -> Argument:
    return Argument(name, metavar=metavar, help=text, **words)


def _machine_word(name: str, metavar: str, text: str) -> Argument:
    """Keep the order of --machine and --smp, because QEMU merges -machine and -smp in their order."""

    def named(value: str) -> tuple[str, str]:
        return name, value

    return _value(f"--{name}", metavar, text, dest="words", action="append", default=[], type=named)


class Command(NamedTuple):
    """One command: its purpose, its arguments and options, and its usage if argparse's would mislead."""

    name: str
    text: str
    options: tuple[Argument, ...] = ()
    usage: str | None = None


_DOMAIN = _value("domain", "DOMAIN", "its name, the path of its QMP socket or of its XML")
_IMPACT = (
    _flag("--live", "the running guest"),
    _flag("--config", "the persistent definition, from the next boot"),
    _flag("--current", "live if it runs, else config (default)"),
)
_NO_PLACE = _flag("--no-place", "leave new threads where the kernel puts them, whatever <cputune> says")
_CHANGE = (
    _flag("--dry-run", "show what would be done, and do nothing"),
    _flag("--async", "do not wait for the end of an unplug", dest="no_wait"),
    _value(
        "--timeout",
        "S",
        "how long to wait for the guest (default 30, or 0 while it is stopped; 0: do not wait)",
        type=_seconds,
    ),
    _NO_PLACE,
)
_PROBE_MODE = Argument(
    "--probe",
    choices=("auto", "always", "never"),
    default="auto",
    help="ask a throwaway QEMU: auto: only where it cannot be computed (default); always; never",
)
_EMULATOR = (_value("--emulator", "PATH", "the QEMU program"), _PROBE_MODE)
_CRASHES = _flag("--force", "also do what is known to crash QEMU")
_HANGS = _flag("--force", "also do what is known to hang a guest")
_THROUGH_AGENT = _flag("--guest", "through the guest agent: online and offline only")
_WORD_OF_GUEST = "its domain XML, or the name it is defined under"
_AS_DEFINED = _value("word", "NAME", "the name that it is defined under")
_LEAVE = (
    _flag("--persistent", "define it at the destination, too"),
    _value("--wait", "S", "wait for pending unplugs first, S seconds (30)", nargs="?", type=_seconds, const=30.0),
    _HANGS,
)
_MOVING = (
    _value("--bandwidth", "MIB", "MiB a second at most", type=_positive),
    _value("--timeout", "S", "pause the guest if it has not converged after S seconds", type=_seconds),
)
_WHERE = (
    _value("--uri", "URI", "where it listens: unix:PATH or tcp:HOST:PORT"),
    _NO_PLACE,
    _PROBE_MODE,
)
_DESTINATION = "a name, started here if it does not run, or the QMP socket of a QEMU with -incoming defer"
_HERE = f"{_DESTINATION} (default: the guest's name)"

#: Every command, in the order in which --help lists them.
COMMANDS = (
    Command(
        "define",
        "define a domain from an XML file, or from a running QEMU",
        (
            _value("word", "FILE|NAME", "a file of domain XML, or a name"),
            _value(
                "--qmp", "ADDR", "its QMP socket; of several the first that is free", action="append", default=[]
            ),
            _value("--xml", "FILE", "its domain XML; else it is made of what QEMU tells"),
        ),
    ),
    Command(
        "undefine",
        "remove a domain's definition; its last XML is kept",
        (Argument("word", metavar="NAME"),),
    ),
    Command("list", "list the domains that are defined, and whether they run"),
    Command(
        "dumpxml",
        "print the domain's XML, with its vCPUs as they are",
        (
            _DOMAIN,
            _flag("--inactive", "its definition, even while it runs"),
            Argument("--dialect", choices=("rfc", "libvirt"), help="how <vcpus> is written"),
            Argument(
                "--detail",
                choices=("minimal", "cell", "full"),
                help="what the RFC's <vcpu> shows (default full)",
            ),
        ),
    ),
    Command(
        "apply",
        "make the domain's vCPUs what <vcpus> in FILE says, as one transaction",
        (_DOMAIN, _value("file", "FILE", "domain XML, or <vcpus> alone"), *_IMPACT, *_CHANGE, _CRASHES),
    ),
    Command(
        "vcpuinfo",
        "show every vCPU: id, place, state",
        (_DOMAIN, _IMPACT[0], _flag("--config", "the persistent definition")),
    ),
    Command(
        "vcpucount",
        "count vCPUs, as virsh does",
        (
            _DOMAIN,
            _flag("--maximum", "how many there can be"),
            _flag("--active", "how many are enabled"),
            *_IMPACT,
            _flag("--guest", "ask the guest agent"),
        ),
    ),
    Command(
        "setvcpu",
        "enable, disable or query single vCPUs by id",
        (
            _DOMAIN,
            _value("ids", "IDS", "5, 1-3,7 or 0-7,^2; with --numa-node one node"),
            _flag("--enable", "plug them"),
            _flag("--disable", "unplug them"),
            *_IMPACT,
            _THROUGH_AGENT,
            _flag("--numa-node", "IDS is a node; take vCPUs of it"),
            _value("--count", "N", "with --numa-node: how many", type=_positive),
            _flag("--core", "every vCPU of the core that holds the id"),
            *_CHANGE,
            _value("--retry", "N", "ask again, up to N times, what the guest refused", type=_number, default=0),
            _flag("--atomic", "bring back what was removed if the rest is rejected or fails"),
            _flag("--no-fallback", "never ask the guest agent for what hotplug cannot do"),
            _CRASHES,
        ),
    ),
    Command(
        "setvcpus",
        "have so many vCPUs enabled: the lowest are added, the highest removed",
        (
            _DOMAIN,
            _value("total", "COUNT", "how many", type=_positive),
            *_IMPACT,
            _THROUGH_AGENT,
            _flag("--maximum", "with --config: the maximum instead"),
            _flag("--hotpluggable", "with --config: what is added can be unplugged later"),
            *_CHANGE,
        ),
    ),
    Command(
        "guestvcpus",
        "show or switch the guest's own CPUs, by the guest's own ids, as virsh does",
        (
            _DOMAIN,
            _value("--cpulist", "GUEST-IDS", "which ones to switch: 1, 1-3,5"),
            _flag("--enable", "take them online"),
            _flag("--disable", "take them offline"),
        ),
    ),
    Command(
        "probe",
        "show what the vCPUs of a guest that does not run will be",
        (
            _value("word", "FILE|NAME", _WORD_OF_GUEST, nargs="?"),
            _machine_word("machine", "TYPE", "as QEMU's -machine: q35, pseries …"),
            _machine_word("smp", "SMP", "as QEMU's -smp: 4,maxcpus=16,sockets=2 (default 1)"),
            _value("--cpu", "MODEL", "as QEMU's -cpu"),
            Argument("--accel", choices=("tcg", "kvm"), help="as QEMU's -accel (default tcg)"),
            _value("--numa", "NUMA", "as QEMU's -numa", action="append", default=[]),
            _value("--arch", "ARCH", "QEMU's target, where the machine does not say it"),
            *_EMULATOR,
            _flag("--refresh", "ask QEMU also if it has answered; alone: remove cached answers"),
        ),
    ),
    Command(
        "boot-args",
        "print QEMU's command line for a guest with the vCPUs of its XML",
        (
            _value("word", "FILE|NAME", _WORD_OF_GUEST),
            Argument(
                "--style",
                choices=("device", "qmp"),
                default="device",
                help="vCPUs that -smp cannot express: as -device (default), or as QMP commands",
            ),
            _value(
                "--incoming", "URI", "for a guest that migrates here (default defer)", nargs="?", const="defer"
            ),
            *_EMULATOR,
        ),
    ),
    Command(
        "start",
        "start a defined domain with exactly the vCPUs of its XML, in the background",
        (
            _AS_DEFINED,
            _PROBE_MODE,
            _NO_PLACE,
            _value("--timeout", "S", "how long to wait for its machine (default 30)", type=_seconds, default=30.0),
        ),
    ),
    Command("destroy", "end the QEMU of a domain that `start` has started, at once", (_AS_DEFINED,)),
    Command(
        "vcpupin",
        "show or set the host CPUs of a vCPU's thread, as virsh does",
        (
            _DOMAIN,
            _value("--vcpu", "N", "the vCPU", type=_number),
            _value("--cpulist", "CPUS", "host CPUs: 0-3,^2; r: all"),
            *_IMPACT,
        ),
        "DOMAIN [[--vcpu] N] [[--cpulist] CPUS] [--live] [--config] [--current]",
    ),
    Command(
        "migrate",
        "take a running guest to another QEMU, and verify it there",
        (
            _DOMAIN,
            _value("dest", "DEST", _DESTINATION),
            _value("--dest-agent", "ADDR", "the guest agent's socket there, where DEST is a socket"),
            *_LEAVE,
            _flag("--undefine-source", "remove the source's definition afterwards"),
            *_MOVING,
            *_WHERE,
        ),
    ),
    Command(
        "migrate-begin",
        "first phase, at the source: print the cookie, which describes the guest",
        (_DOMAIN, *_LEAVE),
    ),
    Command(
        "migrate-prepare",
        "second phase, at the destination: start or check it; prints its URI",
        (
            _value("cookie", "COOKIE", "what migrate-begin has printed; - is standard input"),
            _value("dest", "DEST", _HERE, nargs="?"),
            *_WHERE,
        ),
    ),
    Command(
        "migrate-perform",
        "third phase, at the source: hand the guest over",
        (
            _DOMAIN,
            _value("uri", "URI", "what migrate-prepare has printed"),
            _HANGS,
            _value("--cookie", "COOKIE", "refuse unless the guest is still as this says"),
            *_MOVING,
        ),
    ),
    Command(
        "migrate-finish",
        "fourth phase, at the destination: verify the guest, and let it run",
        (
            _value("dest", "DEST", "its name, or its QMP socket"),
            _value(
                "cookie",
                "COOKIE",
                "what migrate-begin has printed; - is standard input (default: that of migrate-prepare)",
                nargs="?",
            ),
            _flag("--force", "even if another side has claimed the guest"),
        ),
    ),
    Command(
        "migrate-cancel",
        "end a migration: the source goes on, a destination that has not run ends",
        (_DOMAIN, _flag("--force", "even if the other side may have claimed the guest")),
    ),
    Command(
        "save",
        "write a running guest to a file, and end its QEMU",
        (
            _DOMAIN,
            _value("file", "FILE", "it is replaced once the guest is in it, whole"),
            _value("--wait", "S", "wait for pending unplugs first (30)", nargs="?", type=_seconds, const=30.0),
            _flag("--verify", "have a second QEMU read the whole file before the first one ends"),
            _HANGS,
        ),
    ),
    Command(
        "restore",
        "start a saved guest again, with exactly its vCPUs; the file stays",
        (
            _value("file", "FILE", "what `save` has written"),
            _value("dest", "DEST", _HERE, nargs="?"),
            _NO_PLACE,
            _PROBE_MODE,
        ),
    ),
    Command("watch", "report what happens to the vCPUs, line by line, until interrupted", (_DOMAIN,)),
    Command(
        "compare",
        "run one request on a guest of ours and on the same under libvirt, side by side",
        (
            _value("file", "DOMAIN-XML", "the guest; its <emulator> is started twice"),
            _flag("--no-start", "leave it shut off on both sides"),
            _value(
                "request",
                "REQUEST",
                "setvcpu and setvcpus as they are, without DOMAIN: setvcpu 5 --enable",
                nargs=argparse.REMAINDER,
            ),
        ),
    ),
    Command(
        "doctor",
        "check this host: QEMUs, machines that can hotplug, KVM, rights, what is missing",
        (_value("domain", "DOMAIN", "what this guest can and cannot do", nargs="?"),),
    ),
    Command("demo", "boot a small guest, enable a vCPU in it, disable it again"),
    Command(
        "completion",
        "print a completion script for a shell",
        (Argument("shell", choices=("bash", "zsh", "fish")),),
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser for the whole grammar."""
    shared = _global_options()
    parser = _Parser(
        prog="qmpvcpu",
        description="Switch single virtual CPUs of a QEMU guest on and off, by id, straight over QMP.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for command in COMMANDS:
        made = commands.add_parser(
            command.name, help=command.text, description=command.text, parents=[shared], allow_abbrev=False
        )
        for option in command.options:
            made.add_argument(*option.names, **option.words)
        if command.usage is not None:
            made.usage = f"{made.prog} {command.usage}"
    return parser


def _fill_in(found: argparse.Namespace, words: list[str]) -> list[str]:
    """Fill in the values that virsh accepts without their options, at any position, which argparse
    cannot do. Return the remaining words.
    """
    left = [word for word in words if word.startswith("-")]
    for word in words:
        if word in left:
            continue
        if found.vcpu is None:
            try:
                found.vcpu = _number(word)
            except argparse.ArgumentTypeError as error:
                raise VcpuUsageError(f"vCPU: {error}", hint="vcpupin DOMAIN N CPUS") from None
        elif found.cpulist is None:
            found.cpulist = word
        else:
            left.append(word)
    return left


def parse_request(words: list[str]) -> argparse.Namespace:
    """Parse a request of `compare`: `setvcpu` or `setvcpus` without DOMAIN. The default command is
    `setvcpu`.

    Raises:
        VcpuUsageError: the words are not such a request.
    """
    words = [word for word in words if word != "--"]
    if all(word.startswith("-") for word in words):
        raise VcpuUsageError("no request is given", hint="compare FILE setvcpu 5 --enable")
    if words[0] not in ("setvcpu", "setvcpus"):
        words = ["setvcpu", *words]
    return parse([words[0], "DOMAIN", *words[1:]])


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; the result always has the global options.

    Raises:
        VcpuUsageError: the arguments do not match the grammar.
        Help: --help is among the arguments.
    """
    parser = build_parser()
    found, more = parser.parse_known_args(arguments)
    if found.command == "vcpupin":
        more = _fill_in(found, more)
    if more:
        raise VcpuUsageError(
            f"unrecognized arguments: {' '.join(more)}", hint=_help_of(f"{parser.prog} {found.command}")
        )
    if getattr(found, "current", False) and (found.live or found.config):
        word = "live" if found.live else "config"
        raise VcpuUsageError(f"--current and --{word} exclude each other", hint="leave out one of them")
    for name, default in _GLOBAL_DEFAULTS.items():
        vars(found).setdefault(name, default)
    if found.command == "compare":
        _read_request(found)
    _check_libvirt(found)
    return found


def _read_request(found: argparse.Namespace) -> None:
    """Parse the request of `compare`, because argparse leaves everything after FILE to it."""
    found.no_start |= "--no-start" in found.request
    found.request = [word for word in found.request if word != "--no-start"]
    found.request_options = parse_request(found.request)
    for name, default in _GLOBAL_DEFAULTS.items():
        # A global option after the request applies to the whole command.
        if getattr(found.request_options, name) != default:
            setattr(found, name, getattr(found.request_options, name))
    _refuse_unused(found, "compare has guests of its own", ("agent", "qmp_log"))
    if getattr(found.request_options, "dry_run", False):
        raise VcpuUsageError("compare carries out the request", hint="leave out --dry-run")


def _check_libvirt(found: argparse.Namespace) -> None:
    """Check that the command works with -c URI, and that --via is used only with -c URI."""
    if found.connect is None:
        if found.via is not None:
            raise VcpuUsageError("--via is about a libvirt domain", hint="give libvirt's URI: -c URI")
        return
    if found.command not in _WITH_LIBVIRT:
        raise VcpuUsageError(
            f"{found.command} is not for libvirt's domains",
            hint=f"with -c URI there are {', '.join(sorted(_WITH_LIBVIRT))}",
        )
    if found.command == "list":
        _refuse_unused(found, "list asks libvirt alone", ("agent", "qmp_log", "via"))
    if found.command == "doctor" and found.domain is None:
        raise VcpuUsageError("doctor with -c URI is about one domain", hint="doctor DOMAIN; or leave out -c URI")


def _refuse_unused(found: argparse.Namespace, why: str, names: tuple[str, ...]) -> None:
    """Raise VcpuUsageError for options that would be ignored."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(found, name) is not None]
    if given:
        raise VcpuUsageError(f"{why}: {', '.join(given)} has no effect", hint="leave it out")


_GLOBAL_DEFAULTS = {"json": False, "debug": False, "agent": None, "qmp_log": None, "connect": None, "via": None}
#: Commands that accept -c URI.
_WITH_LIBVIRT = frozenset(
    (
        *("apply", "doctor", "dumpxml", "guestvcpus", "list", "setvcpu", "setvcpus"),
        *("vcpucount", "vcpuinfo", "vcpupin", "watch"),
    )
)
