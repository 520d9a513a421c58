"""The grammar of the command line, in virsh's words. Loads argparse and nothing of qmpvcpu's engine."""

from __future__ import annotations

import argparse
from functools import partial
from typing import NoReturn

from qmpvcpu.errors import VcpuUsageError

_EPILOG = """\
DOMAIN is a name given to `define`, or with a / in it the path of a QMP socket or of a domain XML file;
else a file, host:port, or fd:N; with -c URI the name or UUID of a libvirt domain.
IDS is a list of vCPU ids: 5, 1-3,7 or 0-7,^2.

exit codes: 0 done  2 usage  3 refused  4 the guest rejected it  5 pending  6 partial  7 no connection
            8 QEMU failed, undone  130/143 interrupted
"""


class Help(Exception):
    """What --help asked for, as text."""


class _Parser(argparse.ArgumentParser):
    """Errors as `VcpuUsageError`, so that --json renders them too; help as `Help`, which its caller prints."""

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
    """Options that stand before or after the command; SUPPRESS keeps the one from undoing the other."""
    options = _Parser(add_help=False)
    group = options.add_argument_group("global options")
    add = group.add_argument
    add("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document on stdout")
    add("--debug", action="store_true", default=argparse.SUPPRESS, help="tracebacks and debug log on stderr")
    libvirts = "libvirt's: DOMAIN is one of its domains"
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


def _impact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--live", action="store_true", help="the running guest")
    parser.add_argument("--config", action="store_true", help="the persistent definition, from the next boot")
    parser.add_argument("--current", action="store_true", help="live if it runs, else config (default)")


def _change(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")
    parser.add_argument(
        "--async", dest="no_wait", action="store_true", help="do not wait for the end of an unplug"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="how long to wait for the guest (default 30, or 0 while it is stopped; 0: do not wait)",
    )
    _no_place(parser)


def _no_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-place",
        action="store_true",
        help="leave new threads where the kernel puts them, whatever <cputune> says",
    )


def _option(name: str, text: str) -> tuple[str, str]:
    return name, text


def _emulator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--emulator", metavar="PATH", help="the QEMU program")
    _probe_mode(parser)


def _probe_mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--probe",
        choices=("auto", "always", "never"),
        default="auto",
        help="ask a throwaway QEMU: auto: only where it cannot be computed (default); always; never",
    )


def build_parser() -> argparse.ArgumentParser:
    """The whole grammar."""
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

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[shared], allow_abbrev=False)

    def domain_command(name: str, text: str) -> argparse.ArgumentParser:
        made = command(name, text)
        made.add_argument("domain", metavar="DOMAIN", help="its name, the path of its QMP socket or of its XML")
        return made

    define = command("define", "define a domain from an XML file, or from a running QEMU")
    define.add_argument("word", metavar="FILE|NAME", help="a file of domain XML, or a name")
    define.add_argument(
        "--qmp",
        action="append",
        metavar="ADDR",
        default=[],
        help="its QMP socket; of several the first that is free",
    )
    define.add_argument("--xml", metavar="FILE", help="its domain XML; else it is made of what QEMU tells")

    undefine = command("undefine", "forget a domain; its last XML is kept")
    undefine.add_argument("word", metavar="NAME")

    command("list", "list the domains that are defined, and whether they run")

    dump = domain_command("dumpxml", "print the domain's XML, with its vCPUs as they are")
    dump.add_argument("--inactive", action="store_true", help="its definition, even while it runs")
    dump.add_argument("--dialect", choices=("rfc", "libvirt"), help="how <vcpus> is written")
    dump.add_argument(
        "--detail", choices=("minimal", "cell", "full"), help="what the RFC's <vcpu> shows (default full)"
    )

    apply = domain_command("apply", "make the domain's vCPUs what <vcpus> in FILE says, as one transaction")
    apply.add_argument("file", metavar="FILE", help="domain XML, or <vcpus> alone")
    _impact(apply)
    _change(apply)
    apply.add_argument("--force", action="store_true", help="also do what is known to crash QEMU")

    info = domain_command("vcpuinfo", "show every vCPU: id, place, state")
    info.add_argument("--live", action="store_true", help="the running guest")
    info.add_argument("--config", action="store_true", help="the persistent definition")

    count = domain_command("vcpucount", "count vCPUs, as virsh does")
    count.add_argument("--maximum", action="store_true", help="how many there can be")
    count.add_argument("--active", action="store_true", help="how many are enabled")
    _impact(count)
    count.add_argument("--guest", action="store_true", help="ask the guest agent")

    switch = domain_command("setvcpu", "enable, disable or query single vCPUs by id")
    switch.add_argument("ids", metavar="IDS", help="5, 1-3,7 or 0-7,^2; with --numa-node one node")
    switch.add_argument("--enable", action="store_true", help="plug them")
    switch.add_argument("--disable", action="store_true", help="unplug them")
    _impact(switch)
    switch.add_argument("--guest", action="store_true", help="through the guest agent: online and offline only")
    switch.add_argument("--numa-node", action="store_true", help="IDS is a node; take vCPUs of it")
    switch.add_argument("--count", type=_positive, metavar="N", help="with --numa-node: how many")
    switch.add_argument("--core", action="store_true", help="every vCPU of the core that holds the id")
    _change(switch)
    switch.add_argument(
        "--retry", type=_number, default=0, metavar="N", help="ask again, up to N times, what the guest refused"
    )
    switch.add_argument(
        "--atomic", action="store_true", help="bring back what was removed if the rest is rejected or fails"
    )
    switch.add_argument(
        "--no-fallback", action="store_true", help="never ask the guest agent for what hotplug cannot do"
    )
    switch.add_argument("--force", action="store_true", help="also do what is known to crash QEMU")

    counts = domain_command("setvcpus", "have so many vCPUs enabled: the lowest are added, the highest removed")
    counts.add_argument("total", type=_positive, metavar="COUNT", help="how many")
    _impact(counts)
    counts.add_argument("--guest", action="store_true", help="through the guest agent: online and offline only")
    counts.add_argument("--maximum", action="store_true", help="with --config: the maximum instead")
    counts.add_argument(
        "--hotpluggable", action="store_true", help="with --config: what is added can be unplugged later"
    )
    _change(counts)

    guest = domain_command(
        "guestvcpus", "show or switch the guest's own CPUs, by the guest's own ids, as virsh does"
    )
    guest.add_argument("--cpulist", metavar="GUEST-IDS", help="which ones to switch: 1, 1-3,5")
    guest.add_argument("--enable", action="store_true", help="take them online")
    guest.add_argument("--disable", action="store_true", help="take them offline")

    probe = command("probe", "show what the vCPUs of a guest that does not run will be")
    probe.add_argument(
        "word", metavar="FILE|NAME", nargs="?", help="its domain XML, or the name it is defined under"
    )
    for name, metavar, text in (
        ("machine", "TYPE", "as QEMU's -machine: q35, pseries …"),
        ("smp", "SMP", "as QEMU's -smp: 4,maxcpus=16,sockets=2 (default 1)"),
    ):
        # QEMU merges both kinds, in their order.
        probe.add_argument(
            f"--{name}",
            metavar=metavar,
            dest="words",
            action="append",
            default=[],
            type=partial(_option, name),
            help=text,
        )
    probe.add_argument("--cpu", metavar="MODEL", help="as QEMU's -cpu")
    probe.add_argument("--accel", choices=("tcg", "kvm"), help="as QEMU's -accel (default tcg)")
    probe.add_argument("--numa", action="append", metavar="NUMA", default=[], help="as QEMU's -numa")
    probe.add_argument("--arch", metavar="ARCH", help="QEMU's target, where the machine does not say it")
    _emulator(probe)
    probe.add_argument(
        "--refresh", action="store_true", help="ask QEMU afresh; alone: forget all that QEMUs have answered"
    )

    boot = command("boot-args", "print QEMU's command line for a guest with the vCPUs of its XML")
    boot.add_argument("word", metavar="FILE|NAME", help="its domain XML, or the name it is defined under")
    boot.add_argument(
        "--style",
        choices=("device", "qmp"),
        default="device",
        help="vCPUs that -smp cannot say: as -device (default), or as QMP commands for a paused QEMU",
    )
    boot.add_argument(
        "--incoming",
        metavar="URI",
        nargs="?",
        const="defer",
        help="for a guest that migrates here (default defer)",
    )
    _emulator(boot)

    start = command("start", "start a defined domain with exactly the vCPUs of its XML, in the background")
    start.add_argument("word", metavar="NAME", help="as it is defined")
    _probe_mode(start)
    _no_place(start)
    start.add_argument(
        "--timeout",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="how long to wait for its machine (default 30)",
    )

    destroy = command("destroy", "end the QEMU of a domain that `start` has started, at once")
    destroy.add_argument("word", metavar="NAME", help="as it is defined")

    pin = domain_command("vcpupin", "show or set the host CPUs of a vCPU's thread, as virsh does")
    pin.usage = f"{pin.prog} DOMAIN [[--vcpu] N] [[--cpulist] CPUS] [--live] [--config] [--current]"
    pin.add_argument("--vcpu", metavar="N", type=_number, help="the vCPU")
    pin.add_argument("--cpulist", metavar="CPUS", help="host CPUs: 0-3,^2; r: all")
    _impact(pin)

    def force_option(made: argparse.ArgumentParser) -> None:
        made.add_argument("--force", action="store_true", help="also do what is known to hang a guest")

    def wait_option(made: argparse.ArgumentParser) -> None:
        made.add_argument("--persistent", action="store_true", help="its definition goes too")
        made.add_argument(
            "--wait",
            metavar="S",
            nargs="?",
            type=_seconds,
            const=30.0,
            help="wait for pending unplugs first, S seconds (30)",
        )
        force_option(made)

    def moving_options(made: argparse.ArgumentParser) -> None:
        made.add_argument("--bandwidth", type=_positive, metavar="MIB", help="MiB a second at most")
        made.add_argument(
            "--timeout",
            type=_seconds,
            metavar="S",
            help="pause the guest if it has not converged after S seconds",
        )

    def where_options(made: argparse.ArgumentParser) -> None:
        made.add_argument("--uri", metavar="URI", help="where it listens: unix:PATH or tcp:HOST:PORT")
        _no_place(made)
        _probe_mode(made)

    migrate = domain_command("migrate", "take a running guest to another QEMU, and verify it there")
    destination = "a name, started here if it does not run, or the QMP socket of a QEMU with -incoming defer"
    migrate.add_argument("dest", metavar="DEST", help=destination)
    migrate.add_argument(
        "--dest-agent", metavar="ADDR", help="the guest agent's socket there, where DEST is a socket"
    )
    wait_option(migrate)
    migrate.add_argument("--undefine-source", action="store_true", help="forget the source's definition then")
    moving_options(migrate)
    where_options(migrate)

    begin = domain_command("migrate-begin", "first phase, at the source: print what goes along (the cookie)")
    wait_option(begin)

    prepare = command("migrate-prepare", "second phase, at the destination: start or check it; prints its URI")
    prepare.add_argument("cookie", metavar="COOKIE", help="what migrate-begin has printed; - is standard input")
    prepare.add_argument("dest", metavar="DEST", nargs="?", help=f"{destination} (default: the guest's name)")
    where_options(prepare)

    perform = domain_command("migrate-perform", "third phase, at the source: hand the guest over")
    perform.add_argument("uri", metavar="URI", help="what migrate-prepare has printed")
    force_option(perform)
    perform.add_argument("--cookie", metavar="COOKIE", help="what the guest must still be")
    moving_options(perform)

    finish = command("migrate-finish", "fourth phase, at the destination: verify the guest, and let it run")
    finish.add_argument("dest", metavar="DEST", help="its name, or its QMP socket")
    prepared = "what migrate-begin has printed; - is standard input (default: what it was prepared with, here)"
    finish.add_argument("cookie", metavar="COOKIE", nargs="?", help=prepared)
    finish.add_argument("--force", action="store_true", help="also what another side has taken")

    cancel = domain_command(
        "migrate-cancel", "end a migration: the source goes on, a destination that has not run ends"
    )
    cancel.add_argument("--force", action="store_true", help="also what the other side may have taken")

    save = domain_command("save", "write a running guest to a file, and end its QEMU")
    save.add_argument("file", metavar="FILE", help="it is replaced once the guest is in it, whole")
    save.add_argument(
        "--wait", metavar="S", nargs="?", type=_seconds, const=30.0, help="wait for pending unplugs first (30)"
    )
    save.add_argument(
        "--verify", action="store_true", help="have a second QEMU read the whole file before the first one ends"
    )
    force_option(save)

    restore = command("restore", "start a saved guest again, with exactly its vCPUs; the file stays")
    restore.add_argument("file", metavar="FILE", help="what `save` has written")
    restore.add_argument("dest", metavar="DEST", nargs="?", help=f"{destination} (default: the guest's name)")
    _no_place(restore)
    _probe_mode(restore)

    domain_command("watch", "report what happens to the vCPUs, line by line, until interrupted")

    compare = command("compare", "run one request on a guest of ours and on the same under libvirt, side by side")
    compare.add_argument("file", metavar="DOMAIN-XML", help="the guest; its <emulator> is started twice")
    compare.add_argument("--no-start", action="store_true", help="leave it shut off on both sides")
    words = "setvcpu and setvcpus as they are, without DOMAIN: setvcpu 5 --enable"
    compare.add_argument("request", metavar="REQUEST", nargs=argparse.REMAINDER, help=words)

    doctor = command(
        "doctor", "check what is here: QEMUs, machines that can hotplug, KVM, rights, what is missing"
    )
    doctor.add_argument("domain", metavar="DOMAIN", nargs="?", help="what this guest can and cannot do")

    command("demo", "boot a small guest, enable a vCPU in it, disable it again")

    completion = command("completion", "print a completion script for a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def _fill_in(found: argparse.Namespace, words: list[str]) -> list[str]:
    """What virsh takes without its option, wherever it stands; argparse does not. Returns what is left over."""
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
    """A request of `compare`: `setvcpu` or `setvcpus` without DOMAIN; without either, `setvcpu`.

    Raises:
        VcpuUsageError: it is none.
    """
    words = [word for word in words if word != "--"]
    if all(word.startswith("-") for word in words):
        raise VcpuUsageError("no request is given", hint="compare FILE setvcpu 5 --enable")
    if words[0] not in ("setvcpu", "setvcpus"):
        words = ["setvcpu", *words]
    return parse([words[0], "DOMAIN", *words[1:]])


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse, with the global options always present.

    Raises:
        VcpuUsageError: the words are not of the grammar.
        Help: --help is among them.
    """
    parser = build_parser()
    found, more = parser.parse_known_args(arguments)
    if found.command == "vcpupin":
        more = _fill_in(found, more)
    if more:
        text = f"unrecognized arguments: {' '.join(more)}"
        raise VcpuUsageError(text, hint=_help_of(f"{parser.prog} {found.command}"))
    if getattr(found, "current", False) and (found.live or found.config):
        word = "live" if found.live else "config"
        raise VcpuUsageError(f"--current and --{word} exclude each other", hint="leave out one of them")
    for name, default in _GLOBAL_DEFAULTS.items():
        if not hasattr(found, name):
            setattr(found, name, default)
    if found.command == "compare":
        # argparse leaves everything behind FILE to the request.
        found.no_start |= "--no-start" in found.request
        found.request = [word for word in found.request if word != "--no-start"]
        found.asked = parse_request(found.request)
        for name, default in _GLOBAL_DEFAULTS.items():
            # What stands behind the request is about all of it.
            if getattr(found.asked, name) != default:
                setattr(found, name, getattr(found.asked, name))
        _refuse_unheard(found, "compare has guests of its own", ("agent", "qmp_log"))
        if getattr(found.asked, "dry_run", False):
            raise VcpuUsageError("compare carries out what it is asked", hint="leave out --dry-run")
    if found.connect is not None and found.command not in _WITH_LIBVIRT:
        text = f"{found.command} is not for libvirt's domains"
        raise VcpuUsageError(text, hint=f"with -c URI there are {', '.join(sorted(_WITH_LIBVIRT))}")
    if found.connect is not None and found.command == "list":
        _refuse_unheard(found, "list asks libvirt alone", ("agent", "qmp_log", "via"))
    if found.connect is not None and found.command == "doctor" and found.domain is None:
        raise VcpuUsageError("doctor with -c URI is about one domain", hint="doctor DOMAIN; or leave out -c URI")
    if found.via is not None and found.connect is None:
        raise VcpuUsageError("--via is about a libvirt domain", hint="give libvirt's URI: -c URI")
    return found


def _refuse_unheard(found: argparse.Namespace, why: str, names: tuple[str, ...]) -> None:
    """What would be ignored is an error."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(found, name) is not None]
    if given:
        raise VcpuUsageError(f"{why}: {', '.join(given)} is of no use", hint="leave it out")


_GLOBAL_DEFAULTS = {"json": False, "debug": False, "agent": None, "qmp_log": None, "connect": None, "via": None}
#: Commands that take -c URI.
_WITH_LIBVIRT = frozenset(
    {
        "apply",
        "doctor",
        "dumpxml",
        "guestvcpus",
        "list",
        "setvcpu",
        "setvcpus",
        "vcpucount",
        "vcpuinfo",
        "vcpupin",
        "watch",
    }
)
