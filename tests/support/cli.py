"""The command line in this process: what `qmpvcpu WORDS` prints and returns."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

from qmpvcpu.cli import main


@dataclass
class Done:
    """How one run ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        assert self.stdout.count("\n") == 1, (
            f"not one JSON document: {self.stdout!r}; stderr: {self.stderr}"
        )
        return json.loads(self.stdout)


def run_main(words: list[str]) -> Done:
    """Run it as the `qmpvcpu` program does, in the main thread, whose signals it handles."""
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    before, sys.argv = sys.argv, ["qmpvcpu", *words]
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            code = main()
    finally:
        sys.argv = before
    texts = [stream.buffer.getvalue().decode() for stream in (stdout, stderr)]  # type: ignore[attr-defined]
    return Done(code, *texts)
