"""Run one command. Signals, errors and exit codes are the same for all commands."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from qmpvcpu.cli.output import OutputLost
from qmpvcpu.cli.parse import Help, parse
from qmpvcpu.cli.words import report
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import VcpuError, VcpuFailed, VcpuUsageError

if TYPE_CHECKING:
    import argparse

    from qmpvcpu.cli.output import Output
    from qmpvcpu.cli.signals import Signals
    from qmpvcpu.domain.interrupted import Interrupted

_SIGPIPE_EXIT: Final = 141
#: Seconds that a connection has to close if a signal arrives after the command has finished.
_CLOSE_SECONDS: Final = 1.0
#: The largest number of files that a command has open at once: sockets, pipes to programs, locks,
#: files in /proc.
_NEEDED: Final = 24
_SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_HINT: Final = catalogue.FEW_DESCRIPTORS.hint


def run(arguments: list[str], output: Output, signals: Signals) -> int:
    """Parse, call and render; return the exit code from the table in design.md."""
    debug = "--debug" in arguments

    def body() -> int:
        _check_descriptors()
        options = parse(arguments)
        if debug:
            _debug_log(output)
        return _run_async(options, output, signals)

    return output.end(_ended(body, output, debug=debug))


def _ended(body: Callable[[], int], output: Output, *, debug: bool) -> int:
    """Return the exit code of `body`, and report its errors."""
    try:
        return body()
    except Help as help_text:
        if output.is_json:
            output.document({"help": str(help_text)})
        output.write("" if output.is_json else str(help_text))
        return 0
    except OutputLost:
        if output.reader_left:
            # The reader, for example `| head`, has read enough, which is not an error.
            return _SIGPIPE_EXIT
        return report(
            VcpuUsageError(
                "cannot write events to stdout",
                hint="write to a file system that has room, or to a terminal",
            ),
            output,
        )
    except _Interrupted as interrupted:
        return _report_interrupt(interrupted, output)
    except BaseException as error:  # noqa: BLE001 - the last place that can print a useful message
        if debug:
            _traceback(output)
        known = error if isinstance(error, VcpuError) else _short_of(error)
        return _report_bug(error, output) if known is None else report(known, output)


class _Interrupted(Exception):
    """A signal has interrupted the command. `is_stream`: the command runs until it is interrupted,
    and prints only lines.
    """

    def __init__(
        self, number: int, left: Interrupted, note: str | None, *, is_stream: bool
    ) -> None:
        super().__init__(number)
        self.number = number
        self.left = left
        self.note = note
        self.is_stream = is_stream


def _run_async(options: argparse.Namespace, output: Output, signals: Signals) -> int:
    import asyncio

    from qmpvcpu.cli.session import CommandSession

    session = CommandSession(options, output, lambda: signals.number is not None)

    async def body() -> int:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def interrupt() -> None:
            if session.has_ended:
                loop.call_later(_CLOSE_SECONDS, task.cancel)
            else:
                task.cancel()

        def react() -> None:
            loop.call_soon_threadsafe(interrupt)

        signals.react = react
        if signals.number is not None:
            interrupt()
        return int(await options.run(session))

    runner = asyncio.Runner()

    def run_it() -> int:
        work = body()
        try:
            return runner.run(work)
        except (asyncio.CancelledError, KeyboardInterrupt):
            if (code := session.tell_end()) is not None:
                return code
            number = signals.number or int(signal.SIGINT)
            left, note = session.interrupted(), session.interrupted_note
            raise _Interrupted(number, left, note, is_stream=options.command == "watch") from None
        finally:
            signals.react = None
            # If no event loop could be made, the coroutine was never started and must be closed
            # here.
            work.close()

    code = _ended(run_it, output, debug=options.debug)
    # The result is printed, so an error or a delay while closing must not change the exit code.
    with signals.leaving(code), suppress(Exception):
        runner.close()
    return code


def _report_bug(error: BaseException, output: Output) -> int:
    text = f"internal error: {type(error).__name__}: {error}"
    hint = "this is a bug of qmpvcpu: run it again with --debug and report what it prints"
    if output.is_json:
        document = {"type": type(error).__name__, "libvirt": "VIR_ERR_INTERNAL_ERROR"}
        output.document({"outcome": "bug", "error": document | {"message": text, "hint": hint}})
    output.say(f"qmpvcpu: {text}", f"  hint: {hint}")
    return 1


def _report_interrupt(interrupted: _Interrupted, output: Output) -> int:
    from qmpvcpu.core.model import format_ids

    left, note = interrupted.left, interrupted.note
    text = "interrupted"
    if left.pending:
        text += f"; vCPU {format_ids(left.pending)}: unplug requested, and still pending"
    if left.changed_ids:
        text += (
            f"; vCPU {format_ids(left.changed_ids)}: changed by this call in the running"
            " guest, and stays so"
        )
    if left.unsure_ids:
        text += (
            f"; vCPU {format_ids(left.unsure_ids)}: its change was not answered, and may be"
            " done still"
        )
    if left.definition_unsure:
        note = "the definition may still be written: vcpuinfo --config shows it"
    elif left.definition_written:
        note = "the definition was written"
    if note is not None:
        text += f"; {note}"
    has_changed = bool(left.changed_ids) or left.definition_written
    # "failed" claims that nothing has changed, so it must be certain.
    may_change = bool(left.pending or left.unsure_ids) or left.definition_unsure
    if output.is_json and not interrupted.is_stream:
        document: dict[str, Any] = {
            "outcome": "partial" if has_changed else "pending" if may_change else "failed",
            "changed": has_changed,
            **left.to_json(),
            "error": {
                "type": "KeyboardInterrupt",
                "libvirt": "VIR_ERR_OPERATION_ABORTED",
                "message": text,
                "hint": "look at `qmpvcpu vcpuinfo`",
            },
        }
        output.document(document)
    output.say(f"qmpvcpu: {text}")
    return 128 + interrupted.number


def _debug_log(output: Output) -> None:
    import logging

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            output.say(*self.format(record).splitlines())

    handler = Lines()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG, handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.INFO)


def _traceback(output: Output) -> None:
    import traceback

    output.say(*traceback.format_exc().splitlines())


# -- limits of this process: a command that would run short is refused before its first effect
# -------


def _check_descriptors() -> None:
    """Check that as many files can be opened as a command needs.

    Raises:
        VcpuRefused: fewer can be opened.
    """
    opened: list[int] = []
    try:
        while len(opened) < _NEEDED:
            opened.append(os.open("/", os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        raise catalogue.FEW_DESCRIPTORS.error(
            more=len(opened), needed=_NEEDED, error=error
        ) from error
    finally:
        for fd in opened:
            os.close(fd)


def _short_of(error: BaseException) -> VcpuError | None:
    """Return the error to report if the host ran short of memory or descriptors; None for any other
    cause.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return _failed(
                "this host is out of memory",
                "end what else uses memory, or raise the limit: ulimit -v",
            )
        if isinstance(cause, OSError) and cause.errno in _SHORT:
            return _failed(f"this host is out of a resource: {cause.strerror}", _HINT)
        if isinstance(cause, ImportError) and os.strerror(errno.EMFILE) in str(cause):
            return _failed(str(cause), _HINT)
        cause = cause.__cause__ or cause.__context__
    return None


def _failed(text: str, hint: str | None) -> VcpuFailed:
    return VcpuFailed(
        f"{text}; this command may have changed something: `qmpvcpu vcpuinfo` shows it",
        hint=hint,
        libvirt="VIR_ERR_SYSTEM_ERROR",
    )
