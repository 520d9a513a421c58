"""`completion`: a script for a shell, which shtab makes of the grammar."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import TYPE_CHECKING

from qmpvcpu.cli import commands
from qmpvcpu.cli.options import argument, command
from qmpvcpu.cli.parse import add_global_options
from qmpvcpu.errors import VcpuUsageError

if TYPE_CHECKING:
    from qmpvcpu.cli.session import CommandSession


@command(argument("shell", "SHELL", "bash, zsh or fish", choices=("bash", "zsh", "fish")))
async def completion(session: CommandSession) -> int:
    """Print a completion script."""
    shell = session.options.shell
    try:
        shtab = import_module("shtab")
    except ImportError as error:
        raise VcpuUsageError(
            "completion needs the package shtab", hint="pip install 'qmpvcpu[cli]'"
        ) from error
    script: str = shtab.complete(_whole_grammar(), shell=shell)
    session.show({"shell": shell, "script": script}, script.splitlines())
    return 0


def _whole_grammar() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qmpvcpu")
    rows = parser.add_subparsers(metavar="COMMAND")
    for name in commands.NAMES:
        row = rows.add_parser(name, help=commands.summary(name))
        for option in commands.load(name).options:
            if option.is_word:
                known = {
                    key: option.words[key] for key in ("help", "choices") if key in option.words
                }
                row.add_argument(option.words["dest"], **known)
            else:
                row.add_argument(*option.names, **option.words)
        add_global_options(row)
    return parser
