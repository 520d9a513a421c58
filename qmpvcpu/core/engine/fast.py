"""The engine's trick for speed; `scripts/bench tricks` measures it, and `scripts/soak plain` runs without it."""

from __future__ import annotations

from enum import Enum


class FastEnum(Enum):
    """An Enum whose members are hashed by the interpreter: the tables are keyed by them."""

    # "hash": Enum's own is a Python function, and every message looks several members up.
    __hash__ = object.__hash__
