"""`compare`: our result and libvirt's, one after the other."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from difflib import unified_diff
from typing import TYPE_CHECKING, Any

from qmpvcpu.cli.commands.vcpus import request_of
from qmpvcpu.cli.options import argument, command, flag
from qmpvcpu.cli.parse import parse, refuse_unused
from qmpvcpu.errors import VcpuUsageError

if TYPE_CHECKING:
    from qmpvcpu.cli.session import CommandSession
    from qmpvcpu.lab.compare import Comparison


def parse_request(words: list[str]) -> argparse.Namespace:
    """Parse a request: `setvcpu` or `setvcpus` without DOMAIN. The default command is `setvcpu`.

    Raises:
        VcpuUsageError: the words are not such a request.
    """
    words = [text for text in words if text != "--"]
    if all(text.startswith("-") for text in words):
        raise VcpuUsageError("no request is given", hint="compare FILE setvcpu 5 --enable")
    if words[0] not in ("setvcpu", "setvcpus"):
        words = ["setvcpu", *words]
    return parse([words[0], "DOMAIN", *words[1:]])


@command(
    argument("file", "DOMAIN-XML", "the guest; its <emulator> is started twice"),
    flag("--no-start", "leave it shut off on both sides"),
    argument("request", "REQUEST", "setvcpu and setvcpus without DOMAIN: setvcpu 5 --enable"),
    has_rest=True,
)
async def compare(session: CommandSession) -> int:
    """Run one request on both sides, and show the results."""
    from qmpvcpu.app.definitions import read_document
    from qmpvcpu.lab import compare as lab

    options = session.options
    words = [text for text in options.request if text != "--no-start"]
    request = parse_request(words)
    for given in (options, request):
        refuse_unused(
            given, "compare has guests of its own", ("agent", "qmp_log", "connect", "via")
        )
    if request.dry_run:
        raise VcpuUsageError("compare carries out the request", hint="leave out --dry-run")
    is_started = not options.no_start and "--no-start" not in options.request
    xml = read_document(options.file)
    async with session.waiting("comparing with libvirt"):
        found = (await lab.compare(xml, [request_of(request)], start=is_started))[0]
    session.show({"request": words, **found.to_json()}, lines_of(found))
    return 0


def lines_of(found: Comparison) -> list[str]:
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
    return list(
        unified_diff(ours, theirs, f"{word}, qmpvcpu", f"{word}, libvirt", lineterm="", n=0)
    )
