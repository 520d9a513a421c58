"""The difference between two documents."""

from __future__ import annotations

import difflib


def unified_diff(before: bytes, after: bytes, name: str) -> tuple[str, ...]:
    """The lines of a unified diff; `name` is the name of the document."""
    old, new = (data.decode(errors="replace").splitlines() for data in (before, after))
    return tuple(difflib.unified_diff(old, new, name, f"{name} as asked", lineterm=""))
