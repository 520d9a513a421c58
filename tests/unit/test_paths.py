"""Paths that cannot be looked into are passed over; `Path.is_file()` raises there for an ordinary
user.
"""

from __future__ import annotations

import pytest

from tests.support.cli import run_main

IMPOSSIBLE = f"/{'a' * 5000}"


def test_a_path_entry_that_cannot_be_looked_into_has_no_qemu(monkeypatch, tmp_path):
    monkeypatch.setenv("QMPVCPU_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", IMPOSSIBLE)
    assert run_main(["doctor", "--json"]).json["qemus"] == []


@pytest.mark.parametrize("command", ["boot-args", "probe"])
def test_a_file_that_cannot_be_looked_into_is_not_there(command):
    done = run_main([command, IMPOSSIBLE, "--json"])
    assert (done.code, "there is no file" in done.json["error"]["message"]) == (3, True)
