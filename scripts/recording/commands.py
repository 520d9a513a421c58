"""record-commands [NAME...]: tests/data/commands/NAME.jsonl, from real QEMUs of the cache."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from tests.support import commands
from tests.support.recorded import DATA, SCENARIOS, lines, record


def main() -> None:
    for name in sys.argv[1:] or SCENARIOS:
        with tempfile.TemporaryDirectory(prefix="qmpvcpu-record-") as folder:
            os.environ |= {"QMPVCPU_STATE": f"{folder}/state", "QMPVCPU_CACHE": f"{folder}/cache"}
            records = asyncio.run(record(SCENARIOS[name], Path(folder)))
            commands.end()
        DATA.mkdir(exist_ok=True)
        (DATA / f"{name}.jsonl").write_text(lines(records))
        print(f"{name}: {len(records)} commands")


if __name__ == "__main__":
    main()
