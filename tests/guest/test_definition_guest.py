"""LIVE with CONFIG on real Linux guests: a sparse set on both sides, and an unplug that does not
end.
"""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

import qmpvcpu
from tests.guest.test_whole_call_guest import csv, stopped
from tests.support.commands import cli
from tests.support.qemus import matrix
from tests.support.waiting import DEADLINE

pytestmark = pytest.mark.guest


def enabled(xml, key):
    rows = ElementTree.fromstring(xml).find("vcpus")
    return [int(row.attrib["id"]) for row in rows if row.attrib[key] in ("yes", "enabled")]


@matrix(("x86_64", "10.0"), ("ppc64", "10.0"))
async def test_a_sparse_set_in_the_guest_and_at_the_next_boot(
    arch, version, pool, tmp_path, monkeypatch
):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path))
    box = await pool.get(arch, version, plugs=2)
    assert (await cli("define", "web1", "--qmp", box.qmp)).code == 0
    sparse = box.ids(5)
    run = await cli("setvcpu", "web1", csv(sparse), "--enable", "--live", "--config", "--json")
    assert (run.code, run.json["live_changed_ids"], run.json["config_changed_ids"]) == (
        0,
        sparse,
        sparse,
    )
    await box.guest.wait_online(len(box.boot_ids) + len(sparse), timeout=DEADLINE)
    wanted = [*box.boot_ids, *sparse]
    async with qmpvcpu.connect(box.qmp) as domain:
        assert list((await domain.state()).enabled_ids) == wanted
    for words in ((), ("--inactive",)):
        for dialect, key in (("libvirt", "enabled"), ("rfc", "state")):
            run = await cli("dumpxml", "web1", *words, "--dialect", dialect)
            assert enabled(run.stdout, key) == wanted
            assert ElementTree.fromstring(run.stdout).find("vcpu").attrib["current"] == str(
                len(wanted)
            )
    # A guest that does not answer: the next boot stays what it was.
    before = (await cli("dumpxml", "web1", "--inactive")).stdout
    async with stopped(box):
        words = (
            "setvcpu",
            "web1",
            csv(sparse),
            "--disable",
            "--live",
            "--config",
            "--timeout",
            "1",
            "--json",
        )
        run = await cli(*words)
        assert (run.code, run.json["outcome"], run.json["defined"]) == (5, "pending", False)
        assert any("the definition was not written" in message for message in run.json["messages"])
        assert (await cli("dumpxml", "web1", "--inactive")).stdout == before
    run = await cli("setvcpu", "web1", csv(sparse), "--disable", "--live", "--config", "--json")
    assert (run.code, run.json["config_changed_ids"], run.json["defined"]) == (0, sparse, True)
    for words in ((), ("--inactive",)):
        run = await cli("dumpxml", "web1", *words, "--dialect", "rfc")
        assert enabled(run.stdout, "state") == list(box.boot_ids)
