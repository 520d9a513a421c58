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

import qmpvcpu
from qmpvcpu import (
    DomainState,
    Entity,
    Outcome,
    OutcomeKind,
    Props,
    QemuVersion,
    Refusal,
    Vcpu,
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
    *(
        "id",
        "state",
        "hotpluggable",
        "order",
        "node",
        "props",
        "entity",
        "qom_path",
        "thread_id",
        "online",
    ),
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


OUTCOME = Outcome(OutcomeKind.PENDING, (1, 2), (), (1,), (2,), (), "hotplug", ("slow",), 0.1234567)


def test_the_keys_of_an_outcome_are_in_designs_order():
    behind = CHANGE_KEYS.index("undone")
    keys = ["live_changed_ids", "config_changed_ids", "defined"]
    assert list(OUTCOME.to_json()) == [
        *CHANGE_KEYS[:behind],
        "pending_online",
        *CHANGE_KEYS[behind:],
        *keys,
    ]


def test_an_outcome_as_json_is_designs():
    assert json.loads(json.dumps(OUTCOME.to_json())) == {
        "outcome": "pending",
        "changed": True,
        "mechanism": "hotplug",
        "vcpus": [1, 2],
        "changed_ids": [1],
        "pending": [2],
        "pending_online": [],
        "undone": [],
        "messages": ["slow"],
        "seconds": 0.123457,
        "live_changed_ids": [],
        "config_changed_ids": [],
        "defined": False,
    }


def test_a_vcpu_as_json_is_designs():
    assert list(Vcpu(0, True, False, (0,)).to_json()) == ROW_KEYS


@pytest.mark.parametrize(
    ("key", "value"),
    [("state", "disabled"), ("props", {"core-id": 8}), ("entity", [8, 9]), ("order", None)],
)
def test_a_vcpus_json_says_the_facts(key, value):
    assert Vcpu(9, False, True, (8, 9), Props({"core-id": 8})).to_json()[key] == value


@pytest.fixture
def domain():
    props = Props({"core-id": 0})
    return DomainState(
        name="web1",
        arch="x86_64",
        machine="q35",
        accel="kvm",
        active=True,
        version=QemuVersion(10, 0),
        topology=None,
        can_plug=True,
        can_unplug=True,
        threads_shared=None,
        entities=(Entity((0,), "t", props, "/a", None, False),),
        vcpus=(Vcpu(0, True, False, (0,), props, thread_id=5),),
    )


def test_a_domain_as_json_is_designs(domain):
    assert list(domain.to_json()) == ["domain", "arch", "machine", "accel", "active", "vcpus"]


def test_a_domains_json_has_its_vcpus(domain):
    assert json.loads(json.dumps(domain.to_json()))["vcpus"][0]["thread_id"] == 5


def each(kind):
    """An error of that kind, about nothing."""
    return kind([Refusal("range", "no")]) if kind is VcpuRefused else kind("no")


kinds = pytest.mark.parametrize("kind", list(TREE))


@kinds
def test_an_error_as_json_has_designs_keys_and_those_of_a_change(kind):
    assert set(each(kind).to_json()) == {*CHANGE_KEYS, "error"}


@kinds
def test_an_errors_json_says_what_went_wrong(kind):
    assert {"type", "libvirt", "message", "hint"} <= set(each(kind).to_json()["error"])


@kinds
def test_an_errors_json_names_outcome_and_type(kind):
    document = each(kind).to_json()
    assert (document["outcome"], document["error"]["type"]) == (TREE[kind], kind.__name__)


@kinds
def test_an_error_has_one_message(kind):
    assert each(kind).to_json()["error"]["message"] == str(each(kind)) == "no"


@kinds
def test_an_error_is_a_vcpu_error(kind):
    assert isinstance(each(kind), VcpuError)


@kinds
def test_an_errors_json_is_json(kind):
    assert json.loads(json.dumps(each(kind).to_json()))


def test_a_partial_error_is_a_failed_one():
    assert issubclass(VcpuPartial, VcpuFailed)


@pytest.fixture
def refused():
    return VcpuRefused(
        [
            Refusal("a", "first", (1,), "do this"),
            Refusal("b", "second", (2,), "do this", "VIR_ERR_X"),
        ]
    )


def test_a_refusal_says_every_reason(refused):
    assert str(refused) == "first; second"


def test_a_refusal_says_each_hint_once(refused):
    assert refused.hint == "do this"


def test_a_refusal_has_libvirts_code_of_its_first_reason(refused):
    assert refused.libvirt == "VIR_ERR_INVALID_ARG"


def test_a_refusals_json_has_every_reason(refused):
    assert [reason["code"] for reason in refused.to_json()["error"]["refusals"]] == ["a", "b"]


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
        assert (type(again), again.to_json(), str(again)) == (kind, error.to_json(), str(error))


VCPUS = st.builds(
    Vcpu,
    st.integers(0, 9),
    st.booleans(),
    st.just(True),
    IDS.map(tuple),
    st.dictionaries(TEXT, st.integers() | TEXT, max_size=3).map(Props),
)


@settings(max_examples=30)
@given(VCPUS)
def test_a_vcpu_is_a_value(vcpu):
    again = pickle.loads(pickle.dumps(vcpu))
    assert (again, hash(again)) == (vcpu, hash(vcpu))


def test_a_vcpu_is_a_key():
    assert {Vcpu(1, True, True, (1,)): 1}[Vcpu(1, True, True, (1,))] == 1


def test_a_vcpu_shows_its_id():
    assert "id=1" in repr(Vcpu(1, True, True, (1,)))


def test_a_vcpu_is_frozen():
    with pytest.raises(AttributeError):
        Vcpu(1, True, True, (1,)).enabled = False


@pytest.fixture(scope="module")
def version_lines():
    """What `python -m qmpvcpu --version` prints, and which of the heavy modules are loaded then."""
    heavy = ("asyncio", "lxml", "qemu.qmp", "importlib.metadata", "argparse", "json", "logging")
    code = (
        "import os, runpy, sys\n"
        "os._exit = sys.exit\n"
        "sys.argv = ['qmpvcpu', '--version']\n"
        "try: runpy.run_module('qmpvcpu', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def test_python_m_prints_its_version(version_lines):
    assert version_lines[0] == f"qmpvcpu {qmpvcpu.__version__}"


def test_python_m_version_loads_only_what_it_prints_with(version_lines):
    assert version_lines[1] == "[]"
