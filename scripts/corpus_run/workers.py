"""What runs in the processes of `scripts/corpus`: each has a state folder and a libvirt connection
of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.util import Finalize
from pathlib import Path

from scripts.corpus_run.against_libvirt import Ours, Theirs, compare
from scripts.corpus_run.commands import REFUSED, Commands
from scripts.corpus_run.files import DomainFile
from scripts.corpus_run.finding import Finding
from scripts.corpus_run.reduced import Reduced, own

#: Every definition is synced to disk, which costs nothing in memory.
_MEMORY = Path("/dev/shm")


@dataclass
class Answers:
    """Of a part of the corpus. `sides` counts files by whether we and libvirt take their reduced
    form.
    """

    findings: list[Finding] = field(default_factory=list)
    sides: dict[tuple[bool, bool], int] = field(default_factory=dict)
    command_lines: int = 0
    requests: int = 0
    #: Files whose reduced form libvirt refuses.
    refused: set[str] = field(default_factory=set)

    def add(self, other: Answers) -> None:
        self.findings += other.findings
        for side, count in other.sides.items():
            self.sides[side] = self.sides.get(side, 0) + count
        self.command_lines += other.command_lines
        self.requests += other.requests
        self.refused |= other.refused

    def wrong(self) -> list[Finding]:
        """The findings, but for files that we refuse as libvirt does."""
        return [
            finding
            for finding in self.findings
            if finding.check != REFUSED or finding.file not in self.refused
        ]


class _Here:
    folder: Path
    theirs: Theirs


def enter(uri: str) -> None:
    """Once in each process."""
    _Here.folder = Path(
        tempfile.mkdtemp(prefix="corpus-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None)
    )
    Finalize(None, shutil.rmtree, args=(_Here.folder,), exitpriority=1)
    os.environ["QMPVCPU_STATE"] = str(_Here.folder / "state")
    _Here.theirs = Theirs(uri)


def run_commands(files: Sequence[DomainFile]) -> Answers:
    answers = Answers()
    for file in files:
        commands = Commands(file, _Here.folder)
        answers.findings += commands.run()
        answers.command_lines += commands.compared
    return answers


def ask_libvirt(documents: Sequence[Reduced]) -> Answers:
    answers = Answers()
    ours = Ours(_Here.folder)
    for reduced in documents:
        found = compare(replace(reduced, data=own(reduced.data, os.getpid())), _Here.theirs, ours)
        answers.findings += [
            Finding(file, finding.check, finding.text, finding.more)
            for finding in found.findings
            for file in reduced.files
        ]
        side = found.ours, found.libvirts
        answers.sides[side] = answers.sides.get(side, 0) + len(reduced.files)
        answers.requests += found.requests
        answers.refused.update(() if found.libvirts else reduced.files)
    return answers
