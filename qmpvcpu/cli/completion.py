"""Completion scripts, made by shtab from the grammar itself."""

from __future__ import annotations

from qmpvcpu.cli.parse import build_parser
from qmpvcpu.errors import VcpuUsageError

__all__ = ["completion"]


def completion(shell: str) -> str:
    """The script for "bash", "zsh" or "fish".

    Raises:
        VcpuUsageError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise VcpuUsageError("completion needs the package shtab", hint="pip install 'qmpvcpu[cli]'") from error
    script: str = shtab.complete(build_parser(), shell=shell)
    return script
