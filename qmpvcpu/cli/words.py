"""Errors as a person reads them: a reason a line, each with what to type."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Final

from qmpvcpu.errors import VcpuError, VcpuRefused

if TYPE_CHECKING:
    from qmpvcpu.cli.output import Output

__all__ = ["in_options", "report"]

#: What a text says to programs behind the option: "--force (force=True)", "--live (LIVE)".
_ARGUMENT: Final = re.compile(r"((?:^|[\s(])(?:--?[a-z][\w-]*)(?: [A-Z]+)?) \((?:[a-z_]+=\w*|[A-Z][A-Z_]+)\)")


def in_options(text: str) -> str:
    """With the options of the command line alone."""
    return _ARGUMENT.sub(r"\1", text)


def report(error: VcpuError, output: Output) -> int:
    """Say how a command ended that did not do what was asked; returns its exit code."""
    hint = None if error.hint is None else in_options(error.hint)
    if output.is_json:
        document = error.to_json()
        document["error"]["hint"] = hint
        for refusal in document["error"].get("refusals", ()):
            refusal["hint"] = refusal["hint"] and in_options(refusal["hint"])
        output.document(document)
    if isinstance(error, VcpuRefused) and len(error.refusals) > 1:
        for reason, refusals in groupby(error.refusals, key=lambda refusal: refusal.hint):
            output.say(*(f"qmpvcpu: {error.outcome}: {refusal.message}" for refusal in refusals))
            if reason:
                output.say(f"  hint: {in_options(reason)}")
    else:
        output.say(f"qmpvcpu: {error.outcome}: {error.message}")
        if hint:
            output.say(f"  hint: {hint}")
    # A note of an exception tells how the QEMU that it is about has ended.
    output.say(*(f"note: {message}" for message in (*error.messages, *getattr(error, "__notes__", ()))))
    return error.outcome.exit_code
