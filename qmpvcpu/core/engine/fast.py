"""The engine's trick for speed; `scripts/bench tricks` measures it, and `scripts/soak plain` runs
without it.
"""

from __future__ import annotations

from enum import Enum


class FastEnum(Enum):
    """An Enum whose members the interpreter hashes: they are the keys of the tables."""

    # "hash": Enum's own is a Python function, and every message looks several members up.
    __hash__ = object.__hash__
