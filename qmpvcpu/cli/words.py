"""Errors as text for a person: one line per reason, each with what to type."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Final

from qmpvcpu.errors import VcpuError, VcpuRefused

if TYPE_CHECKING:
    from qmpvcpu.cli.output import Output

#: The part of a text that is for API users, after an option: "--force (force=True)", "--live
#: (LIVE)".
_ARGUMENT: Final = re.compile(
    r"((?:^|[\s(])(?:--?[a-z][\w-]*)(?: [A-Za-z]+)?) \((?:[a-z_]+='?\w*'?|[A-Z][A-Z_]+)\)"
)


def in_options(text: str) -> str:
    """Return the text with only the options of the command line."""
    return _ARGUMENT.sub(r"\1", text)


def report(error: VcpuError, output: Output) -> int:
    """Print the error of a command; return its exit code."""
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
    # The notes of an exception say how the QEMU concerned has ended.
    output.say(
        *(f"note: {message}" for message in (*error.messages, *getattr(error, "__notes__", ())))
    )
    return error.outcome.exit_code
