"""`demo`: a small guest gets a vCPU and loses it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpvcpu.cli import render
from qmpvcpu.cli.options import command

if TYPE_CHECKING:
    from qmpvcpu.cli.session import CommandSession


@command()
async def demo(session: CommandSession) -> int:
    """Boot a guest, enable a vCPU in it, and disable it again."""
    from qmpvcpu.lab import demo as lab

    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if not session.output.is_json:
            session.output.lines([line])

    report = await lab.run(tell, render.info)
    if session.output.is_json:
        session.output.document(report | {"lines": lines})
    return 0
