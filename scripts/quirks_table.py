"""Prints the table of known defects (`qmpvcpu.core.quirks`) into docs/qemu-facts.md."""

from __future__ import annotations

import sys
from pathlib import Path

from qmpvcpu.core.quirks import QUIRKS, Fact, Quirk

DOCUMENT = Path(__file__).parent.parent / "docs" / "qemu-facts.md"
BEGIN, END = "<!-- printed by scripts/quirks-table -->", "<!-- end -->"


def where(row: Quirk) -> str:
    words = [
        ", ".join(arch.name for arch in row.arches) or "all",
        (row.accel or "every accelerator").upper(),
    ]
    for fact, thread in ((Fact.SINGLE_THREAD, "single"), (Fact.MULTI_THREAD, "multi")):
        words += [f"`thread={thread}`"] if fact in row.facts else []
    return ", ".join(words)


def versions(row: Quirk) -> str:
    since = f"since {row.came.major}.{row.came.minor}; " if row.came is not None else ""
    fixed = f"{row.fixed.major}.{row.fixed.minor}" if row.fixed is not None else "not fixed"
    return f"{since}{', '.join(row.seen)} → {fixed}"


def table() -> str:
    lines = [
        "| id | where | set off by | what happens | seen → fixed | refused |",
        "|---|---|---|---|---|---|",
    ]
    for row in QUIRKS:
        cells = [f"`{row.id}`", where(row), ", ".join(row.triggers), row.effect, versions(row)]
        lines.append("| " + " | ".join([*cells, "yes" if row.is_refused else "no"]) + " |")
    return "\n".join(lines)


def printed(document: str) -> str:
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    document = DOCUMENT.read_text()
    wanted = printed(document)
    if arguments == ["--check"]:
        if document != wanted:
            print(
                "docs/qemu-facts.md has another table than qmpvcpu/core/quirks.py: run"
                " scripts/quirks-table"
            )
        return int(document != wanted)
    DOCUMENT.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
