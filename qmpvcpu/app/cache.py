"""Where fetched QEMUs and built guests are: `QMPVCPU_CACHE`, else `~/.cache/qmpvcpu` (XDG)."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """The cache folder; it need not exist. The scripts in `scripts/` use the same rule."""
    if own := os.environ.get("QMPVCPU_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qmpvcpu"
