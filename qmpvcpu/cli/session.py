"""What a command has to do with: its options, its output and its domain."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any

import qmpvcpu
from qmpvcpu.cli import progress, render
from qmpvcpu.cli.output import Output
from qmpvcpu.cli.words import in_options
from qmpvcpu.core.migration.status import Progress
from qmpvcpu.core.model import Outcome
from qmpvcpu.domain import Domain, backends
from qmpvcpu.domain.connect import connect
from qmpvcpu.domain.interrupted import Interrupted
from qmpvcpu.errors import OutcomeKind, VcpuError, VcpuUsageError


class CommandSession:
    """One run of a command: its options, and the domain while it is open."""

    def __init__(
        self, options: Namespace, output: Output, is_interrupted: Callable[[], bool]
    ) -> None:
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
            self._log = qmpvcpu.QmpLog(options.qmp_log)
        elif options.qmp_log is not None:
            text = "libvirt's API does not show QMP messages"
            raise VcpuUsageError(text, hint="leave out --qmp-log, or go --via monitor")
        if options.via == "monitor":
            self.warn([backends.TAINTED])
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

    def waiting(self, what: str, limit: float | None = None) -> AbstractAsyncContextManager[None]:
        """While the body runs, show on a terminal that the command waits; see
        `progress.waiting`.
        """
        return progress.waiting(self.output, what, limit)

    def transfer(self) -> AbstractContextManager[Progress | None]:
        """While the body runs, show on a terminal how far a migration is; see
        `progress.transfer`.
        """
        return progress.transfer(self.output)

    def interrupted(self) -> Interrupted:
        """Return what this run has left, if it is interrupted now."""
        if self.domain is None:
            return Interrupted()
        if (end := self._end) is not None:
            # The call had finished, but its result arrived after the signal.
            written = isinstance(end, Outcome) and end.defined
            found = Interrupted(changed_ids=_live_changes(end), definition_written=written)
            return found.with_pending({*end.pending, *self.domain.pending_ids})
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
                document = document | {
                    "messages": [in_options(text) for text in document["messages"]]
                }
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
