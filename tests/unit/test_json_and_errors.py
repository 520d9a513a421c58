"""The JSON keys of design.md, exactly; and errors and results as values: equal, pickled, readable."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpvcpu.core.inventory import BootFacts, CpuInfoFast, HotpluggableCpu, build_state
from qmpvcpu.core.model import Outcome, Props, QemuVersion, Vcpu
from qmpvcpu.errors import (
    OutcomeKind,
    Refusal,
    VcpuConnectionError,
    VcpuError,
    VcpuFailed,
    VcpuPartial,
    VcpuRefused,
    VcpuRejected,
    VcpuUsageError,
)

CHANGE_KEYS = [
    "outcome",
    "changed",
    "mechanism",
    "vcpus",
    "changed_ids",
    "pending",
    "undone",
    "messages",
    "seconds",
]
ROW_KEYS = [
    *("id", "state", "hotpluggable", "order", "node", "props", "entity", "qom_path", "thread_id", "online"),
    *("pending", "pin", "scheduler", "logical_id", "can_offline", "cpu"),
]
TREE = {
    VcpuUsageError: "usage",
    VcpuRefused: "refused",
    VcpuRejected: "rejected",
    VcpuFailed: "failed",
    VcpuPartial: "partial",
    VcpuConnectionError: "connection",
}


def test_an_outcome_as_json_is_designs():
    outcome = Outcome(OutcomeKind.PENDING, (1, 2), (), (1,), (2,), (), "hotplug", ("slow",), 0.1234567)
    keys = ["live_changed_ids", "config_changed_ids", "defined"]
    assert list(outcome.to_json()) == [*CHANGE_KEYS, *keys]
    assert json.loads(json.dumps(outcome.to_json())) == {
        "outcome": "pending",
        "changed": True,
        "mechanism": "hotplug",
        "vcpus": [1, 2],
        "changed_ids": [1],
        "pending": [2],
        "undone": [],
        "messages": ["slow"],
        "seconds": 0.123457,
        "live_changed_ids": [],
        "config_changed_ids": [],
        "defined": False,
    }


def test_a_vcpu_as_json_is_designs():
    assert list(Vcpu(0, True, False, (0,)).to_json()) == ROW_KEYS
    row = Vcpu(9, False, True, (8, 9), Props({"core-id": 8})).to_json()
    assert (row["state"], row["props"], row["entity"], row["order"]) == ("disabled", {"core-id": 8}, [8, 9], None)


def test_a_domain_as_json_is_designs():
    boot = BootFacts("web1", "x86_64", "q35", True, QemuVersion(10, 0), None)
    slot = HotpluggableCpu("t", 1, Props({"core-id": 0}), "/a")
    document = build_state(boot, [slot], [CpuInfoFast(0, "/a", 5, None)]).to_json()
    assert list(document) == ["domain", "arch", "machine", "accel", "active", "vcpus"]
    assert json.loads(json.dumps(document))["vcpus"][0]["thread_id"] == 5


@pytest.mark.parametrize("kind", list(TREE))
def test_an_error_as_json_has_designs_keys_and_those_of_a_change(kind):
    error = kind([Refusal("range", "no")]) if kind is VcpuRefused else kind("no")
    document = error.to_json()
    assert set(document) == {*CHANGE_KEYS, "error"}
    assert {"type", "libvirt", "message", "hint"} <= set(document["error"])
    assert (document["outcome"], document["error"]["type"]) == (TREE[kind], kind.__name__)
    assert document["error"]["message"] == str(error) == "no"
    assert isinstance(error, VcpuError)
    json.dumps(document)


def test_a_partial_error_is_a_failed_one():
    assert issubclass(VcpuPartial, VcpuFailed)


def test_a_refusal_carries_every_reason_and_each_hint_once():
    reasons = [Refusal("a", "first", (1,), "do this"), Refusal("b", "second", (2,), "do this", "VIR_ERR_X")]
    error = VcpuRefused(reasons)
    assert str(error) == "first; second"
    assert (error.hint, error.libvirt) == ("do this", "VIR_ERR_INVALID_ARG")
    assert [reason["code"] for reason in error.to_json()["error"]["refusals"]] == ["a", "b"]


TEXT = st.text(max_size=10)
IDS = st.lists(st.integers(0, 99), max_size=3)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "hint": TEXT,
        "libvirt": TEXT,
        "ids": IDS,
        "changed_ids": IDS,
        "pending": IDS,
        "undone": IDS,
        "messages": st.lists(TEXT, max_size=2),
        "mechanism": st.sampled_from(["hotplug", "agent"]),
        "seconds": st.floats(0, 9),
    },
)


@settings(max_examples=30)
@given(st.sampled_from(list(TREE)), TEXT, FIELDS)
def test_any_error_survives_pickle_and_copy_with_all_its_facts(kind, text, fields):
    error = kind([Refusal("x", text)], **fields) if kind is VcpuRefused else kind(text, **fields)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert again.to_json() == error.to_json()
        assert str(again) == str(error)


@settings(max_examples=30)
@given(st.integers(0, 9), st.booleans(), st.dictionaries(TEXT, st.integers() | TEXT, max_size=3), IDS)
def test_a_vcpu_is_a_value(number, enabled, props, entity):
    vcpu = Vcpu(number, enabled, True, tuple(entity), Props(props))
    again = pickle.loads(pickle.dumps(vcpu))
    assert (again, hash(again)) == (vcpu, hash(vcpu))
    assert {vcpu: 1}[again] == 1
    assert f"id={number}" in repr(vcpu)
    with pytest.raises(AttributeError):
        vcpu.enabled = not enabled


def test_python_m_version_loads_only_what_it_prints_with():
    heavy = ("asyncio", "lxml", "qemu.qmp", "importlib.metadata", "argparse", "json", "logging")
    code = (
        "import runpy, sys\n"
        "sys.argv = ['qmpvcpu', '--version']\n"
        "try: runpy.run_module('qmpvcpu', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, loaded = run.stdout.splitlines()
    assert version.startswith("qmpvcpu ")
    assert loaded == "[]"
