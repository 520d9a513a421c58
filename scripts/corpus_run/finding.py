"""One thing that is not as it should be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`check` is what was compared, `text` how it differs, without what only this file has; `more`
    has that.
    """

    file: str
    check: str
    text: str
    more: str = ""
