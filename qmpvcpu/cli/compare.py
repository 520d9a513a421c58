"""`compare`: our result and libvirt's, one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qmpvcpu.app.definitions import read_document
from qmpvcpu.cli.progress import waiting
from qmpvcpu.lab import compare as app

if TYPE_CHECKING:
    from qmpvcpu.cli.commands import CommandSession
    from qmpvcpu.core.request import Request


async def compare(session: CommandSession, request_of: Callable[[Any], Request]) -> int:
    """Run one request on both sides, and show the results."""
    options = session.options
    request = options.request_options
    xml = read_document(options.file)
    async with waiting(session.output, "comparing with libvirt"):
        found = (await app.compare(xml, [request_of(request)], start=not options.no_start))[0]
    session.show({"request": options.request, **found.to_json()}, lines_of(found))
    return 0


def lines_of(found: app.Comparison) -> list[str]:
    """Return the comparison as lines for a person."""
    lines = []
    for name, side in (("qmpvcpu", found.ours), ("libvirt", found.libvirt)):
        code = f" ({side.error})" if side.error else ""
        lines.append(f"{name}: {side.outcome}{code}, {side.seconds * 1000:.1f} ms")
        if side.message:
            lines.append(f"  {side.message}")
        lines += [f"  > {_words(command)}" for command in side.commands]
        lines.append("")
    for word in ("live", "config"):
        ours, theirs = getattr(found.ours, word), getattr(found.libvirt, word)
        if ours is None and theirs is None:
            continue
        if ours == theirs:
            lines += [f"{word}, both:", *(f"  {line}" for line in _short(ours))]
        else:
            lines += _diff(word, ours or (), theirs or ())
    lines.append(f"differs: {', '.join(found.differs)}" if found.differs else "no difference")
    return lines


def _words(command: Mapping[str, Any]) -> str:
    arguments = command.get("arguments")
    return str(command["execute"]) + (f" {json.dumps(arguments)}" if arguments else "")


def _short(lines: tuple[str, ...]) -> list[str]:
    """Leave out disabled vCPUs."""
    return [line for line in lines if "enabled='no'" not in line]


def _diff(word: str, ours: tuple[str, ...], theirs: tuple[str, ...]) -> list[str]:
    from difflib import unified_diff

    return list(unified_diff(ours, theirs, f"{word}, qmpvcpu", f"{word}, libvirt", lineterm="", n=0))
