"""`compare`: one request, a guest of ours and libvirt's, as a user runs it."""

from __future__ import annotations

import pytest

from tests.qemu.libvirt_guests import NUMA
from tests.support.commands import cli

pytestmark = [pytest.mark.qemu, pytest.mark.xdist_group("libvirt")]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "web1.xml"
    path.write_text(NUMA)
    return str(path)


async def test_both_sides_and_what_they_sent(file):
    run = await cli("compare", file, "setvcpu", "9", "--enable", "--live", "--config", "--json")
    assert run.code == 0, run.stderr
    ours, theirs = run.json["ours"], run.json["libvirt"]
    assert run.json["differs"] == [] and ours["live_vcpus"] == theirs["config_vcpus"] == [
        0,
        1,
        2,
        9,
    ]
    plug = {"socket-id": 1, "core-id": 0, "thread-id": 1, "node-id": 1, "id": "vcpu9"}
    for side, queries in ((ours, 1), (theirs, 2)):
        first = next(command for command in side["commands"] if command["execute"] == "device_add")
        assert first["arguments"] | plug == first["arguments"]
        assert [command["execute"] for command in side["commands"]][-1] == "query-cpus-fast"
        assert sum("query-" in command["execute"] for command in side["commands"]) == queries
        assert side["seconds"] > 0 and side["error"] is None
        assert "  <vcpu id='9' enabled='yes' hotpluggable='yes' order='4'/>" in side["live"]


async def test_what_differs_is_shown(file):
    run = await cli("compare", file, "1", "--enable")
    assert run.code == 0, run.stderr
    assert "differs: error" in run.stdout
    assert "VIR_ERR_INVALID_ARG" in run.stdout
    run = await cli("compare", file, "--no-start", "setvcpus", "7", "--json")
    assert (
        run.json["ours"]["live"] is None
        and run.json["differs"] == []
        and len(run.json["ours"]["config_vcpus"]) == 7
    )


@pytest.mark.parametrize(
    "words",
    [
        ("compare", "FILE", "setvcpu", "5", "--enable", "--dry-run"),
        ("compare", "FILE", "setvcpu", "5", "--enable", "--agent", "/nowhere"),
        ("compare", "FILE", "5", "--enable", "--qmp-log", "/nowhere"),
        ("-c", "test:///default", "list", "--agent", "/nowhere"),
        ("-c", "test:///default", "--via", "monitor", "list"),
        ("-c", "test:///default", "doctor"),
        ("-c", "test:///default", "migrate", "test", "other"),
    ],
)
async def test_what_would_be_ignored_is_refused(file, words):
    run = await cli(*[str(file) if word == "FILE" else word for word in words], "--json")
    assert run.code == 2 and run.json["error"]["hint"], run.stdout


async def test_no_request_and_no_file(file):
    run = await cli("compare", file, "--json")
    assert run.code == 2 and "no request" in run.json["error"]["message"]
    run = await cli("compare", "/nowhere.xml", "5", "--enable", "--json")
    assert run.code == 3 and "there is no file" in run.json["error"]["message"]
