"""scripts/corpus: every domain XML file of libvirt's tests, to each command of ours and to a
libvirtd.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from qmpvcpu.app.cache import cache_folder
from qmpvcpu.lab.libvirtd import run_libvirtd
from scripts.corpus_run.files import DomainFile, domain_files
from scripts.corpus_run.finding import Finding
from scripts.corpus_run.reasons import LIST, Reason, explain, read_reasons
from scripts.corpus_run.reduced import reduce_all
from scripts.corpus_run.workers import Answers, ask_libvirt, enter, run_commands

#: libvirt's version, as scripts/fetch-libvirt has it.
VERSION = "11.3.0"
_CHUNK = 8
#: How much is printed of a kind of differences.
_EXAMPLES, _LONGEST = 3, 300


async def run(files: Sequence[DomainFile], workers: int) -> Answers:
    """Give all of them to all commands and to a libvirtd."""
    answers = Answers()
    reduced = reduce_all(files)
    async with run_libvirtd() as daemon:
        loop = asyncio.get_running_loop()
        with ProcessPoolExecutor(workers, get_context("spawn"), enter, (daemon.uri,)) as pool:
            parts = [loop.run_in_executor(pool, run_commands, part) for part in _parts(files)]
            parts += [loop.run_in_executor(pool, ask_libvirt, part) for part in _parts(reduced)]
            for part in parts:
                answers.add(await part)
    return answers


def _parts(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[first : first + _CHUNK] for first in range(0, len(items), _CHUNK)]


@dataclass
class Explained:
    """Findings by the reason that is for them; None for what nothing explains."""

    by_reason: dict[Reason | None, list[Finding]]

    @classmethod
    def of(
        cls, findings: Sequence[Finding], reasons: Sequence[Reason], files: Sequence[DomainFile]
    ) -> Explained:
        documents = {file.name: file for file in files}
        found: dict[Reason | None, list[Finding]] = {reason: [] for reason in (*reasons, None)}
        for finding in findings:
            found[explain(reasons, finding, documents[finding.file].data)].append(finding)
        return cls(found)


def report(
    files: Sequence[DomainFile], answers: Answers, explained: Explained, seconds: float
) -> None:
    """The figures."""
    sides = answers.sides
    print(f"{len(files)} domain XML files, {seconds:.0f} s")
    print(
        f"{answers.command_lines} command lines and {answers.requests} requests compared with"
        " libvirt's"
    )
    both, neither, us, libvirt = (
        sides.get(side, 0) for side in ((True, True), (False, False), (True, False), (False, True))
    )
    print(
        f"accepted by both {both}, refused by both {neither}, by us alone {us}, by libvirt alone"
        f" {libvirt}"
    )
    print("deliberate differences (files: reason):")
    for reason, findings in explained.by_reason.items():
        if reason is not None:
            print(f"  {_count(findings):5}: {reason.id}: {reason.why}")
    left = explained.by_reason[None]
    print(f"{_count(left)} files with differences that no reason explains")
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in left:
        kinds.setdefault((finding.check, finding.text), []).append(finding)
    for (check, text), findings in sorted(kinds.items(), key=lambda kind: -_count(kind[1])):
        print(f"  {_count(findings):5}: {check}: {text}")
        for finding in findings[:_EXAMPLES]:
            print(f"         {finding.file}: {finding.more[:_LONGEST]}")


def _count(findings: Sequence[Finding]) -> int:
    return len({finding.file for finding in findings})


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/corpus", description=__doc__)
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="each Nth file only, for a sample"
    )
    parser.add_argument(
        "--only",
        default="*",
        metavar="PATTERN",
        help="files whose name fits: qemuxmlconfdata/cpu-*",
    )
    parser.add_argument("--folder", type=Path, help="other files than libvirt's")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes"
    )
    given = parser.parse_args()
    reasons = read_reasons()
    everything = domain_files(given.folder or cache_folder() / "libvirt" / VERSION)
    if not everything:
        print("there are no files: scripts/fetch-libvirt gets libvirt's", file=sys.stderr)
        return 2
    files = [file for file in everything if fnmatch(file.name, given.only)][:: given.every]
    began = time.monotonic()
    answers = asyncio.run(run(files, given.workers))
    explained = Explained.of(answers.wrong(), reasons, files)
    report(files, answers, explained, time.monotonic() - began)
    unused = [
        reason.id
        for reason, found in explained.by_reason.items()
        if reason is not None and not found
    ]
    if given.folder is None and len(files) == len(everything) and unused:
        print(f"no file is left of {', '.join(unused)}: take it out of {LIST.name}")
        return 1
    return 1 if explained.by_reason[None] else 0


if __name__ == "__main__":
    sys.exit(main())
