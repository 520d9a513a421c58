"""Where state is kept."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["state_folder"]


def state_folder() -> Path:
    """Definitions and pending unplugs: `QMPVCPU_STATE`, else the system's (root) or the user's (XDG) folder.

    It need not exist.
    """
    if own := os.environ.get("QMPVCPU_STATE"):
        return Path(own)
    if os.geteuid() == 0:
        return Path("/var/lib/qmpvcpu")
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "qmpvcpu"
