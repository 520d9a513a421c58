"""The object behind `domain.migration`. Most commands never migrate: its parts are loaded when they are used."""

from __future__ import annotations

from importlib import import_module

# Type checkers read this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from qmpvcpu.domain.migration.migration import Access, Migration
    from qmpvcpu.domain.migration.picture import read_picture
    from qmpvcpu.domain.migration.saving import SaveTarget
    from qmpvcpu.domain.migration.sides import Transfer

__all__ = ["Access", "Migration", "SaveTarget", "Transfer", "read_picture"]

_HOMES = {
    "Access": "migration",
    "Migration": "migration",
    "SaveTarget": "saving",
    "Transfer": "sides",
    "read_picture": "picture",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
