"""Counts the statements of the product, by room, in this tree and at a commit."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

__all__ = ["count", "main"]

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def count(source: str) -> int:
    """Statements of one file, without its docstrings."""
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = sum(
        isinstance(n, _DOCUMENTED) and ast.get_docstring(n, clean=False) is not None for n in nodes
    )
    return sum(isinstance(node, ast.stmt) for node in nodes) - docstrings


def _here() -> Counter[str]:
    return _by_room((str(path), path.read_text()) for path in Path("qmpvcpu").rglob("*.py"))


def _at(ref: str) -> Counter[str]:
    names = _git("ls-tree", "-r", "--name-only", ref, "qmpvcpu").split()
    return _by_room((name, _git("show", f"{ref}:{name}")) for name in names if name.endswith(".py"))


def _by_room(files: Iterable[tuple[str, str]]) -> Counter[str]:
    rooms: Counter[str] = Counter()
    for name, source in files:
        parts = name.split("/")
        rooms[parts[1] if len(parts) > 2 else "."] += count(source)
    return rooms


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


def main() -> None:
    """The table, on stdout."""
    now = _here()
    then = _at(sys.argv[1]) if len(sys.argv) > 1 else None
    for room in sorted({*now, *(then or ())}):
        print(
            f"{room:10} {now[room]:6}"
            + (f" {then[room]:6} {now[room] - then[room]:+6}" if then else "")
        )
    total = sum(now.values())
    print(f"{'all':10} {total:6}", end="")
    print(f" {sum(then.values()):6} {total - sum(then.values()):+6}" if then else "")


if __name__ == "__main__":
    main()
