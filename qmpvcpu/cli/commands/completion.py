"""`completion`: a script for a shell, which shtab makes of the grammar."""

from __future__ import annotations

import argparse
from importlib import import_module

from qmpvcpu.cli import commands
from qmpvcpu.cli.options import choice, command
from qmpvcpu.cli.parse import add_options
from qmpvcpu.cli.session import CommandSession
from qmpvcpu.errors import VcpuUsageError


@command(choice("shell", ("bash", "zsh", "fish"), "the shell"))
async def completion(session: CommandSession) -> int:
    """Print a completion script."""
    shell = session.options.shell
    try:
        shtab = import_module("shtab")
    except ImportError as error:
        raise VcpuUsageError("completion needs the package shtab", hint="pip install 'qmpvcpu[cli]'") from error
    script: str = shtab.complete(_whole_grammar(), shell=shell)
    session.show({"shell": shell, "script": script}, script.splitlines())
    return 0


def _whole_grammar() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qmpvcpu")
    rows = parser.add_subparsers(metavar="COMMAND")
    for name in commands.NAMES:
        add_options(rows.add_parser(name, help=commands.summary(name)), commands.load(name))
    return parser
