"""Load names of a package when they are first used, so that a command does not pay for what it does
not need.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy(package: str, homes: Mapping[str, tuple[str, ...]]) -> Callable[[str], object]:
    """Return the `__getattr__` of a package.

    Args:
        package: the package's `__name__`.
        homes: for each file of the package, the names that are loaded from it.
    """
    home_of = {name: home for home, names in homes.items() for name in names}
    # Importing a file sets an attribute of that name on the package, which would hide a lazy name.
    assert not home_of.keys() & homes.keys(), package

    def load(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return load
