"""A full disk and a read-only one, really mounted: refused, and the definition is whole."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest

pytestmark = pytest.mark.scripts

SCRIPT = """
set -eu
mount -t tmpfs -o size=32k,mode=700 none "$QMPVCPU_STATE"
"$PYTHON" -m qmpvcpu define "$FILE" >&2
cp "$QMPVCPU_STATE/definitions/d.xml" "$BEFORE"
head -c 100000 /dev/zero >"$QMPVCPU_STATE/fill" 2>/dev/null || true
ask() {
    code=0
    "$PYTHON" -m qmpvcpu setvcpu d 1 --enable --config --json || code=$?
    echo "$code"
    cmp "$QMPVCPU_STATE/definitions/d.xml" "$BEFORE"
    ls -A "$QMPVCPU_STATE/definitions" | tr '\\n' ' '
    echo
}
ask
rm "$QMPVCPU_STATE/fill"
mount -o remount,ro "$QMPVCPU_STATE"
ask
"$PYTHON" -m qmpvcpu undefine d --json || echo $?
mount -o remount,rw "$QMPVCPU_STATE"
"$PYTHON" -m qmpvcpu setvcpu d 1 --enable --config >&2
! cmp -s "$QMPVCPU_STATE/definitions/d.xml" "$BEFORE"
"""


async def test_a_full_and_a_read_only_disk(tmp_path):
    file, state = tmp_path / "d.xml", tmp_path / "state"
    state.mkdir()
    file.write_text(
        "<domain><name>d</name><vcpu current='1'>4</vcpu>" + "<!-- x -->" * 300 + "</domain>"
    )
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SCRIPT),
        env=os.environ
        | {
            "QMPVCPU_STATE": str(state),
            "FILE": str(file),
            "BEFORE": str(tmp_path / "before"),
            "PYTHON": sys.executable,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    (
        full,
        code_full,
        left_full,
        readonly,
        code_readonly,
        left_readonly,
        undefined,
        code_undefined,
    ) = stdout.decode().splitlines()
    for answer, code, left, words in (
        (full, code_full, left_full, "No space left on device"),
        (readonly, code_readonly, left_readonly, "Read-only file system"),
    ):
        document = json.loads(answer)
        assert (document["outcome"], document["changed"], code) == ("refused", False, "3")
        assert words in document["error"]["message"]
        assert left.split() == ["d.json", "d.xml"]
    assert ("Read-only" in json.loads(undefined)["error"]["message"], code_undefined) == (True, "3")
