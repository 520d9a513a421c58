"""Every command of the contract does what it did when it was recorded (`scripts/record-commands`)."""

from __future__ import annotations

import json

import pytest

from tests.support.recorded import DATA, SCENARIOS, record

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize("name", SCENARIOS)
async def test_each_command_does_what_was_recorded(name, tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("QMPVCPU_CACHE", str(tmp_path / "cache"))
    expected = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    for was, now in zip(expected, await record(SCENARIOS[name], tmp_path), strict=True):
        # As JSON: a tuple is a list there.
        assert json.loads(json.dumps(now)) == was
