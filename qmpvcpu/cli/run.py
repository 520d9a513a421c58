"""Runs one command: signals, errors and exit codes are the same for all of them."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from qmpvcpu.cli.parse import parse
from qmpvcpu.errors import VcpuError

if TYPE_CHECKING:
    import argparse
    import asyncio

    from qmpvcpu.domain.interrupted import Interrupted

__all__ = ["run"]

_SIGPIPE_EXIT = 141


def run(arguments: list[str]) -> int:
    """Parse, call, render; returns the exit code of design.md's table."""
    as_json = "--json" in arguments
    debug = "--debug" in arguments
    try:
        options = parse(arguments)
        if debug:
            _debug_log()
        code = _call(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader left (`| head`): nothing is wrong with us, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _SIGPIPE_EXIT
    except VcpuError as error:
        if debug:
            _traceback()
        return _report(error, as_json)
    except _Interrupted as interrupted:
        # `watch` has no other end: its lines are all it has to say.
        return _report_interrupt(interrupted, as_json and options.command != "watch")
    except Exception as error:  # noqa: BLE001 - the last place that can say something useful
        if debug:
            _traceback()
        text = f"internal error: {type(error).__name__}: {error}"
        hint = "this is a bug of qmpvcpu: run it again with --debug and report what it prints"
        if as_json:
            document = {"type": type(error).__name__, "libvirt": "VIR_ERR_INTERNAL_ERROR"}
            print(json.dumps({"outcome": "bug", "error": document | {"message": text, "hint": hint}}))
        _say(f"qmpvcpu: {text}", f"  hint: {hint}")
        return 1


class _Interrupted(Exception):
    def __init__(self, number: int, left: Interrupted, note: str | None) -> None:
        super().__init__(number)
        self.number = number
        self.left = left
        self.note = note


def _call(options: argparse.Namespace) -> int:
    if options.command == "completion":
        from qmpvcpu.cli.completion import completion

        print(completion(options.shell))
        return 0
    return _run_async(options)


def _run_async(options: argparse.Namespace) -> int:
    import asyncio
    import signal

    from qmpvcpu.cli.commands import Session, command

    session = Session(options)
    caught: list[int] = []

    def interrupt(number: int, task: asyncio.Task[int]) -> None:
        caught.append(number)
        task.cancel()

    async def body() -> int:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt, int(number), task)
        return await command(session)

    try:
        with asyncio.Runner() as runner:
            return runner.run(body())
    except (asyncio.CancelledError, KeyboardInterrupt):
        number = caught[0] if caught else signal.SIGINT
        raise _Interrupted(number, session.interrupted(), session.interrupted_note) from None


def _say(*lines: str) -> None:
    if lines:
        print(*lines, sep="\n", file=sys.stderr)


def _report(error: VcpuError, as_json: bool) -> int:
    if as_json:
        print(json.dumps(error.to_json()))
    _say(f"qmpvcpu: {error.outcome}: {error.message}")
    if error.hint:
        _say(f"  hint: {error.hint}")
    _say(*(f"note: {message}" for message in error.messages))
    return error.outcome.exit_code


def _report_interrupt(interrupted: _Interrupted, as_json: bool) -> int:
    from qmpvcpu.core.model import format_ids

    left, note = interrupted.left, interrupted.note
    text = "interrupted"
    if left.pending:
        text += f"; vCPU {format_ids(left.pending)}: unplug asked, and still pending"
    if left.changed_ids:
        text += f"; vCPU {format_ids(left.changed_ids)}: changed by this call in the running guest, and stays so"
    if left.unsure_ids:
        text += f"; vCPU {format_ids(left.unsure_ids)}: its change was not answered, and may be done still"
    if left.definition_unsure:
        note = "the definition may still be written: vcpuinfo --config shows it"
    elif left.definition_written:
        note = "the definition was written"
    if note is not None:
        text += f"; {note}"
    has_changed = bool(left.changed_ids) or left.definition_written
    # "failed" claims that all is as it was.
    may_change = bool(left.pending or left.unsure_ids) or left.definition_unsure
    if as_json:
        document: dict[str, Any] = {
            "outcome": "partial" if has_changed else "pending" if may_change else "failed",
            "changed": has_changed,
            **left.to_json(),
            "error": {
                "type": "KeyboardInterrupt",
                "libvirt": "VIR_ERR_OPERATION_ABORTED",
                "message": text,
                "hint": "`qmpvcpu vcpuinfo` shows what is",
            },
        }
        print(json.dumps(document))
    _say(f"qmpvcpu: {text}")
    return 128 + interrupted.number


def _debug_log() -> None:
    import logging

    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")
    logging.getLogger("asyncio").setLevel(logging.INFO)


def _traceback() -> None:
    import traceback

    traceback.print_exc()
