"""Where fetched QEMUs and built guests are kept: `QMPVCPU_CACHE`, else `~/.cache/qmpvcpu` (XDG)."""

from __future__ import annotations

import os
from pathlib import Path

from qmpvcpu.host.owners import trusted_folder


def cache_folder() -> Path:
    """The cache folder; it need not exist. The scripts in `scripts/` use the same rule.

    Raises:
        VcpuRefused: another user can write to it; the programs in it are run, so it is not trusted.
    """
    return trusted_folder(_cache_path(), "cache folder")


def _cache_path() -> Path:
    if own := os.environ.get("QMPVCPU_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qmpvcpu"
