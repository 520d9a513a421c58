"""Monitor and engine without our tricks for speed: `scripts/soak plain`, and a sample in the suite."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: The variable of the environment that asks for it, in this process and those that it starts.
PLAIN = "QMPVCPU_TEST_PLAIN"


def use() -> None:
    """Give this process, which must not have loaded the engine yet, a plain client and a plain
    engine.
    """
    from qmpvcpu.core.engine import fast

    assert "qmpvcpu.core.engine.stages" not in sys.modules  # its tables are keyed by hashes
    del fast.FastEnum.__hash__
    _use_client()


def _use_client() -> None:
    from qmpvcpu.qemu import monitor
    from qmpvcpu.qemu.client import Client

    monitor.CLIENT = Client


@contextmanager
def plain_client() -> Iterator[None]:
    """Connections that are made inside have the plain client."""
    from qmpvcpu.qemu import monitor

    usual = monitor.CLIENT
    _use_client()
    try:
        yield
    finally:
        monitor.CLIENT = usual


def overridden() -> dict[str, bool]:
    """The members of `qemu.qmp` that our clients override, and whether theirs takes the same
    arguments.
    """
    from qemu.qmp import QMPClient

    from qmpvcpu.qemu.client import Client
    from qmpvcpu.qemu.fast_client import FastClient

    members = {
        name: member
        for kind in (Client, FastClient)
        for name, member in vars(kind).items()
        if hasattr(QMPClient, name) and not name.startswith("__")
    }

    def arguments(member: object) -> list[str]:
        return list(inspect.signature(member).parameters)  # type: ignore[arg-type]

    return {
        name: arguments(member) == arguments(getattr(QMPClient, name))
        for name, member in members.items()
    }


def is_known_to_qemu_qmp(name: str) -> bool:
    """Whether a client of `qemu.qmp` has this member, before it is connected."""
    from qemu.qmp import QMPClient

    return hasattr(QMPClient("known"), name)
