"""Guests that `start` has started, by name: what the next process finds of one."""

from __future__ import annotations

from pathlib import Path

from qmpvcpu.host.runtime import Runtime


def pid_of(name: str) -> int | None:
    """The pid of its QEMU; None if it does not run."""
    return Runtime(name).pid()


def folder_of(name: str) -> Path:
    """Where its sockets are, while it runs."""
    return Runtime(name).folder


def leave_pid(name: str, pid: int) -> None:
    """As a guest that is gone has left it, after its pid came again."""
    runtime = Runtime(name)
    runtime.prepare()
    runtime.pidfile.write_text(f"{pid}\n")
