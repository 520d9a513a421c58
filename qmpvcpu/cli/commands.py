"""One function per command: it calls the API and renders the result."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from qmpvcpu.cli import render
from qmpvcpu.cli.output import Output, OutputLost
from qmpvcpu.cli.progress import waiting
from qmpvcpu.cli.words import in_options
from qmpvcpu.core.model import DomainState, Outcome, format_ids
from qmpvcpu.core.planning.live import Plan
from qmpvcpu.core.request import TIMEOUT, Request, parse_ids
from qmpvcpu.core.rules import catalogue
from qmpvcpu.core.rules.request import check_range
from qmpvcpu.core.state.guest_view import GuestView
from qmpvcpu.domain import Domain, Options
from qmpvcpu.domain.connect import connect
from qmpvcpu.domain.interrupted import Interrupted
from qmpvcpu.errors import OutcomeKind, VcpuError, VcpuRefused, VcpuUsageError
from qmpvcpu.flags import VcpuFlag

#: Commands for guests that do not run. Other commands do not load their imports.
BOOT_COMMANDS: Final = frozenset({"probe", "boot-args", "start", "destroy"})


class CommandSession:
    """The state of one run of the command line: its options, and the domain while it is open."""

    def __init__(self, options: Namespace, output: Output, is_interrupted: Callable[[], bool]) -> None:
        self.options = options
        self.output = output
        self._is_interrupted = is_interrupted
        self.domain: Domain | None = None
        self.interrupted_note: str | None = None
        #: The result of the call that changes something, once it has finished.
        self._end: Outcome | VcpuError | None = None
        #: Whether that call finished before any signal arrived.
        self.has_ended = False
        self._log: Any = None
        self._warned: set[str] = set()

    def connect(self, *, watch: bool = False) -> Domain:
        """Return the domain of the command line, to be entered; `watch` as in `qmpvcpu.connect`."""
        options = self.options
        if options.qmp_log is not None and (options.connect is None or options.via == "monitor"):
            from qmpvcpu import QmpLog

            self._log = QmpLog(options.qmp_log)
        elif options.qmp_log is not None:
            raise VcpuUsageError(
                "libvirt's API does not show QMP messages", hint="leave out --qmp-log, or go --via monitor"
            )
        if options.via == "monitor":
            from qmpvcpu.domain.backends.libvirt import TAINTED

            self.warn([TAINTED])
        config_only = getattr(options, "config", False) and not (
            getattr(options, "live", False) or getattr(options, "guest", False)
        )
        self.domain = connect(
            options.domain,
            agent=options.agent,
            qmp_log=self._log,
            config_only=config_only,
            watch=watch,
            uri=options.connect,
            via=options.via or "api",
        )
        return self.domain

    def interrupted(self) -> Interrupted:
        """Return what this run has left, if it is interrupted now."""
        if self.domain is None:
            return Interrupted()
        if (end := self._end) is not None:
            # The call had finished, but its result arrived after the signal.
            return Interrupted(
                changed_ids=_live_changes(end), definition_written=isinstance(end, Outcome) and end.defined
            ).with_pending({*end.pending, *self.domain.pending_ids})
        # Between two calls, as in `watch`, only pending unplugs are left.
        return self.domain.interrupted or Interrupted(pending=self.domain.pending_ids)

    async def finish(self, call: Awaitable[Outcome]) -> Outcome:
        """Await the call that changes something. When it has finished, signals no longer change the
        exit code.

        Raises:
            CancelledError: a signal arrived before the call finished.
        """
        try:
            self._end = await call
        except VcpuError as error:
            self._end = error
            self._check_signals()
            raise
        self._check_signals()
        return self._end

    def _check_signals(self) -> None:
        if self._is_interrupted():
            raise asyncio.CancelledError
        self.has_ended = True

    def tell_end(self) -> int | None:
        """Show the result if the command was interrupted before it could; return the exit code, or
        None without a result.

        Raises:
            VcpuError: the error of the call.
        """
        end = self._end if self.has_ended else None
        if isinstance(end, VcpuError):
            raise end
        if end is None or end.outcome is OutcomeKind.QUERIED:
            return None
        return self.show_outcome(end)

    def show_outcome(self, end: Outcome) -> int:
        """Show the result of a change; return its exit code."""
        self.warn(end.messages)
        self.show(end.to_json(), render.outcome(end))
        return end.outcome.exit_code

    def show(self, document: dict[str, Any], lines: Iterable[str]) -> None:
        """Print one JSON document, or lines for a person."""
        if self.output.is_json:
            if "messages" in document:
                document = document | {"messages": [in_options(text) for text in document["messages"]]}
            self.output.document(document)
        else:
            self.output.lines(lines)

    def warn_of_agent(self, domain: Domain) -> None:
        """Print why `online` is not known, if an agent was named."""
        if (trouble := domain.agent_trouble) is not None:
            self.warn([f"online is not known: {trouble.message}"])

    def warn_when_interrupted(self, message: str) -> None:
        """Set a note that is printed if the command is interrupted from now on."""
        self.interrupted_note = message

    def warn(self, messages: Iterable[str]) -> None:
        """Print each warning once, to stderr, also with --json."""
        for message in messages:
            if message not in self._warned:
                self._warned.add(message)
                self.output.say(f"note: {in_options(message)}")


def _live_changes(end: Outcome | VcpuError) -> tuple[int, ...]:
    """Return the ids of the vCPUs that were changed in the running guest."""
    if isinstance(end, Outcome) and (end.live_changed_ids or end.config_changed_ids):
        return end.live_changed_ids
    return tuple(end.changed_ids)


async def command(session: CommandSession) -> int:
    """Run the parsed command; return the exit code."""
    name = session.options.command
    if name in BOOT_COMMANDS:
        from qmpvcpu.cli import boot

        return await boot.COMMANDS[name](session)
    if name.startswith("migrate") or name in ("save", "restore"):
        from qmpvcpu.cli import migrate

        return await migrate.COMMANDS[name](session)
    return await _COMMANDS[name](session)


async def _vcpuinfo(session: CommandSession) -> int:
    if session.options.live and session.options.config:
        raise catalogue.LIVE_AND_CONFIG.error()
    flags = _flags(session.options)
    async with session.connect() as domain:
        state = await domain.state(flags)
        session.warn_of_agent(domain)
    session.show(state.to_json(), _info_lines(state))
    return 0


def _info_lines(state: DomainState) -> list[str]:
    source: str | None = f"QEMU {state.version}"
    if state.version is None or not state.version.major:
        source = "the definition" if state.version is None else None
    words = [word for word in (state.arch, state.machine, source, state.accel) if word]
    head = f"{state.name}: {', '.join(words)}: {len(state.enabled_ids)} of {state.maxcpus} vCPUs enabled"
    if not state.can_plug:
        head += " (this machine has no CPU hotplug)"
    elif not state.can_unplug:
        head += " (this machine cannot unplug CPUs)"
    if state.threads_shared:
        head += ", all on one thread"
    return [head, *render.topology(state), "", *render.vcpu_table(state.vcpus)]


async def _vcpucount(session: CommandSession) -> int:
    options = session.options
    if options.maximum and options.active:
        raise catalogue.MAXIMUM_AND_ACTIVE.error()
    if options.live and options.config:
        raise catalogue.LIVE_AND_CONFIG.error()
    one = options.maximum or options.active or options.live or options.config or options.current
    states: dict[str, DomainState] = {}
    async with session.connect() as domain:
        if options.guest and not options.config:
            online = sum(cpu.online for cpu in (await domain.guest_vcpus()).cpus)
            session.show({"domain": domain.name, "count": online}, [str(online)])
            return 0
        if one or options.guest:
            state = await domain.state(_flags(options))
            states["live" if state.version is not None else "config"] = state
        else:
            if domain.has_definition:
                states["config"] = await domain.state(VcpuFlag.CONFIG)
            if domain.is_active:
                states["live"] = await domain.state(VcpuFlag.LIVE)
    counts = {
        word: {side: count(states[side]) if side in states else None for side in ("live", "config")}
        for word, count in (("maximum", lambda s: s.maxcpus), ("current", lambda s: len(s.enabled_ids)))
    }
    document: dict[str, Any] = {"domain": domain.name, **counts}
    if one:
        found = counts["maximum" if options.maximum else "current"]
        number = next(count for count in found.values() if count is not None)
        session.show(document | {"count": number}, [str(number)])
    else:
        rows = [
            (word, side, str(counts[word][side]))
            for word in counts
            for side in ("config", "live")
            if counts[word][side] is not None
        ]
        session.show(document, render.columns(rows))
    return 0


def _flags(options: Namespace) -> VcpuFlag:
    flags = VcpuFlag.CURRENT
    for name, flag in (
        ("enable", VcpuFlag.ENABLE),
        ("disable", VcpuFlag.DISABLE),
        ("live", VcpuFlag.LIVE),
        ("config", VcpuFlag.CONFIG),
        ("guest", VcpuFlag.GUEST),
        ("numa_node", VcpuFlag.NUMA_NODE),
        ("core", VcpuFlag.CORE),
    ):
        if getattr(options, name, False):
            flags |= flag
    return flags


async def _setvcpu(session: CommandSession) -> int:
    return await _carry_out(session, request_of(session.options))


async def _setvcpus(session: CommandSession) -> int:
    return await _carry_out(session, request_of(session.options))


def request_of(options: Namespace) -> Request:
    """Return the request of `setvcpu` or `setvcpus`."""
    if options.command == "setvcpu":
        return Request(
            parse_ids(options.ids),
            _flags(options),
            options.count,
            options.force,
            timeout=options.timeout,
            wait=not options.no_wait,
            atomic=options.atomic,
            retry=options.retry,
            fallback=not options.no_fallback,
            place=not options.no_place,
        )
    if options.maximum and not options.config:
        raise catalogue.MAXIMUM_WITHOUT_CONFIG.error()
    return Request(
        (),
        _flags(options),
        total=options.total,
        timeout=options.timeout,
        wait=not options.no_wait,
        maximum=options.maximum,
        hotpluggable=options.hotpluggable,
        place=not options.no_place,
    )


async def _apply(session: CommandSession) -> int:
    from qmpvcpu.app.definitions import read_document

    options = session.options
    xml = read_document(options.file)
    async with session.connect() as domain:
        given: Options = {
            "live": options.live,
            "config": options.config,
            "timeout": options.timeout,
            "wait": not options.no_wait,
            "atomic": not options.no_wait,
            "force": options.force,
            "place": not options.no_place,
        }
        if options.dry_run:
            return _show_plan(session, await domain.plan_apply(xml, source=options.file, **given))
        async with waiting(session.output, "waiting for the guest", options.timeout or TIMEOUT):
            result = await session.finish(domain.apply(xml, source=options.file, **given))
    return session.show_outcome(result)


def _show_plan(session: CommandSession, planned: Plan) -> int:
    session.warn(planned.messages)
    session.show(planned.to_json(), render.plan(planned))
    return OutcomeKind.REFUSED.exit_code if planned.refusals else 0


async def _define(session: CommandSession) -> int:
    from qmpvcpu.app.define import define

    options = session.options
    done = await define(options.word, options.qmp, options.agent, options.xml)
    session.warn(done.messages)
    how = "redefined" if done.replaced else "defined"
    session.show(done.to_json(), [f"{done.name}: {how} ({done.path})"])
    return 0


async def _undefine(session: CommandSession) -> int:
    from qmpvcpu.app import definitions

    name = session.options.word
    kept = definitions.undefine(name)
    session.show({"domain": name, "kept": str(kept)}, [f"{name}: undefined; its last XML is {kept}"])
    return 0


async def _list(session: CommandSession) -> int:
    from qmpvcpu.app import definitions

    uri = session.options.connect
    found = await (definitions.list_domains() if uri is None else definitions.list_libvirt(uri))
    session.show({"domains": [row.to_json() for row in found]}, render.domains(found))
    return 0


async def _dumpxml(session: CommandSession) -> int:
    options = session.options
    options.config = options.inactive
    async with session.connect() as domain:
        data = await domain.dump_xml(inactive=options.inactive, dialect=options.dialect, detail=options.detail)
    errors = None
    if options.dialect == "libvirt":
        from qmpvcpu.app.libvirt_schema import against_libvirts_schema

        errors = against_libvirts_schema(data)
        session.warn(f"libvirt's schema does not allow it: {error}" for error in errors or ())
    if options.json:
        session.output.document(
            {"domain": domain.name, "xml": data.decode(errors="replace"), "schema_errors": errors}
        )
    else:
        session.output.data(data if data.endswith(b"\n") else data + b"\n")
    return 0


async def _carry_out(session: CommandSession, request: Request) -> int:
    """Carry out a request, or only plan it, and show the result."""
    options = session.options
    async with session.connect() as domain:
        if options.dry_run and not request.is_query:
            return _show_plan(session, await domain.plan(request))
        async with waiting(session.output, "waiting for the guest", request.patience):
            result = await session.finish(domain.request(request))
        if result.outcome is OutcomeKind.QUERIED:
            state = domain.last_state
            session.warn_of_agent(domain)
    if result.outcome is not OutcomeKind.QUERIED:
        return session.show_outcome(result)
    session.warn(result.messages)
    session.show(
        state.to_json() | {"vcpus": [row.to_json() for row in result.rows]}, render.vcpu_table(result.rows)
    )
    return result.outcome.exit_code


async def _guestvcpus(session: CommandSession) -> int:
    options = session.options
    if (options.enable or options.disable) != (options.cpulist is not None) or (
        options.enable and options.disable
    ):
        raise VcpuUsageError(
            "--cpulist goes with one of --enable and --disable", hint="guestvcpus DOMAIN --cpulist 1-2 --disable"
        )
    async with session.connect() as domain:
        if options.cpulist is not None:
            result = await session.finish(
                domain.set_guest_vcpus(parse_ids(options.cpulist, "CPU of the guest"), options.enable)
            )
            session.warn(result.messages)
            view = GuestView((), {})
            try:
                view = await domain.guest_vcpus()
            except VcpuError as error:
                # The change is done and verified, so this error is only a warning.
                session.warn([f"what the guest's CPUs are now is not known: {error.message}"])
            # `vcpus` and `changed_ids` are the guest's own ids here; `cpus` has the vCPU of each one.
            session.show(result.to_json() | view.to_json(), render.guest_outcome(result, is_online=options.enable))
            return result.outcome.exit_code
        view = await domain.guest_vcpus()
    session.show(view.to_json() | {"domain": domain.name}, render.guest(view))
    return 0


async def _vcpupin(session: CommandSession) -> int:
    options = session.options
    number, cpus = options.vcpu, options.cpulist
    if cpus is not None and number is None:
        raise VcpuUsageError("no vCPU is given", hint="vcpupin DOMAIN --vcpu N --cpulist CPUS")
    flags = _flags(options)
    if cpus is None and options.live and options.config:
        raise catalogue.LIVE_AND_CONFIG.error()
    async with session.connect() as domain:
        if cpus is not None:
            result = await session.finish(domain.pin(number, None if cpus == "r" else cpus, flags))
        else:
            state = await domain.state(flags)
    if cpus is not None:
        session.warn(result.messages)
        word = "pinned" if cpus != "r" else "not pinned any more"
        session.show(
            result.to_json(), [f"vCPU {number}: {word}" if result.changed else f"vCPU {number}: already so"]
        )
        return result.outcome.exit_code
    refusals = check_range(state, (number,)) if number is not None else []
    if refusals:
        raise VcpuRefused(refusals)
    rows = [vcpu for vcpu in state.vcpus if number is None or vcpu.id == number]
    pins = [{"vcpu": vcpu.id, "cpus": vcpu.pin, "last_cpu": vcpu.cpu} for vcpu in rows]
    lines = [("VCPU", "CPU AFFINITY"), *((str(vcpu.id), vcpu.pin or "-") for vcpu in rows)]
    session.show({"domain": domain.name, "pins": pins}, render.columns(lines, right=frozenset({0})))
    return 0


@contextmanager
def _while_read(output: Output) -> Iterator[None]:
    """Raise OutputLost in the body when the reader of stdout has left, even if there is nothing to write."""
    loop, task, pipe = asyncio.get_running_loop(), asyncio.current_task(), output.pipe()
    if task is None or pipe is None:
        yield
        return

    def leave() -> None:
        loop.remove_reader(pipe)
        output.lose_reader()
        task.cancel()

    # For the writing end of a pipe, epoll(7) reports only an error, when the last reader has left.
    loop.add_reader(pipe, leave)
    try:
        yield
    except asyncio.CancelledError:
        if output.reader_left:
            raise OutputLost from None
        raise
    finally:
        loop.remove_reader(pipe)


async def _watch(session: CommandSession) -> int:
    with _while_read(session.output):
        return await _watch_on(session)


async def _watch_on(session: CommandSession) -> int:
    async with session.connect(watch=True) as domain, domain.events(steps=True) as events:
        state = domain.last_state
        pending = domain.pending_ids
        line: dict[str, Any] = {"time": time.time(), "event": "snapshot", "vcpus": list(state.enabled_ids)}
        line["detail"] = f"{len(state.enabled_ids)} of {state.maxcpus} vCPUs enabled"
        if pending:
            line["detail"] += f"; unplug pending: {format_ids(pending)}"
        _print_event(session, line | {"pending": list(pending)}, render.snapshot(line))
        for event in domain.settled:
            _print_event(session, event.to_json(), render.event(event))
        async for event in events:
            _print_event(session, event.to_json(), render.event(event))
    return 0


def _print_event(session: CommandSession, document: dict[str, Any], line: str) -> None:
    """Print one line of `watch` at once."""
    session.output.stream(document, line)


async def _doctor(session: CommandSession) -> int:
    from qmpvcpu.app import doctor
    from qmpvcpu.app.twin import check_defined

    if session.options.domain is None:
        report = await doctor.examine_host()
        session.show(report.to_json(), report.lines())
        return 0
    async with session.connect() as domain:
        findings = await doctor.examine_domain(domain)
        differs = await check_defined(domain) if session.options.connect is None else []
    findings = replace(findings, differences=tuple(one.message for one in differs))
    session.show(findings.to_json(), findings.lines())
    return 0


async def _compare(session: CommandSession) -> int:
    from qmpvcpu.cli.compare import compare

    return await compare(session, request_of)


async def _demo(session: CommandSession) -> int:
    from qmpvcpu.lab import demo

    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if not session.output.is_json:
            session.output.lines([line])

    report = await demo.run(tell, _info_lines)
    if session.output.is_json:
        session.output.document(report | {"lines": lines})
    return 0


_COMMANDS: Final[dict[str, Callable[[CommandSession], Awaitable[int]]]] = {
    "define": _define,
    "undefine": _undefine,
    "list": _list,
    "dumpxml": _dumpxml,
    "apply": _apply,
    "vcpuinfo": _vcpuinfo,
    "vcpucount": _vcpucount,
    "setvcpu": _setvcpu,
    "setvcpus": _setvcpus,
    "guestvcpus": _guestvcpus,
    "vcpupin": _vcpupin,
    "watch": _watch,
    "compare": _compare,
    "doctor": _doctor,
    "demo": _demo,
}
