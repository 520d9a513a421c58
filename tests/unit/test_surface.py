"""What users hold on to: public names, JSON keys, exit codes, pickles; and what must not be loaded."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest

import qmpvcpu
from qmpvcpu import Outcome, OutcomeKind, Props, Refusal, Vcpu
from qmpvcpu.cli import commands


def loaded(code):
    script = f"import sys\n{code}\nimport json; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_qmpvcpu_loads_no_engine():
    assert not {"asyncio", "lxml", "qemu.qmp", "argparse", "importlib.metadata"} & loaded(
        "import qmpvcpu"
    )


def test_version_loads_nothing_it_does_not_need():
    modules = loaded(
        "sys.argv = ['qmpvcpu', '--version']\nfrom qmpvcpu.cli import main\nassert main() == 0"
    )
    assert not {"asyncio", "lxml", "qemu.qmp", "importlib.metadata", "argparse"} & modules


@pytest.mark.parametrize("name", commands.NAMES)
def test_help_loads_no_engine(name):
    code = f"sys.argv = ['qmpvcpu', {name!r}, '--help']\nfrom qmpvcpu.cli import main\n"
    code += "try: main()\nexcept SystemExit: 0"
    assert not {"asyncio", "lxml", "qemu.qmp", "importlib.metadata", "shtab"} & loaded(code)


@pytest.mark.parametrize("name", qmpvcpu.__all__)
def test_every_public_name_is_there(name):
    assert getattr(qmpvcpu, name) is not None


def test_dir_shows_the_public_names():
    assert set(dir(qmpvcpu)) == set(qmpvcpu.__all__)


def test_what_is_not_public_is_no_attribute():
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = qmpvcpu.nothing


def test_exit_codes_are_designs():
    codes = {
        "queried": 0,
        "applied": 0,
        "requested": 0,
        "pending": 5,
        "refused": 3,
        "rejected": 4,
        "partial": 6,
    }
    codes |= {"connection": 7, "failed": 8, "usage": 2}
    assert {str(kind): kind.exit_code for kind in OutcomeKind} == codes


REFUSAL = Refusal("range", "vCPU 9 is not here", (9,), "look", "VIR_ERR_INVALID_ARG")

ERRORS = [
    qmpvcpu.VcpuUsageError("bad", hint="good"),
    qmpvcpu.VcpuRefused([REFUSAL], ids=(9,)),
    qmpvcpu.VcpuRejected("no", reasons={3: "eject disabled"}, ids=(3,)),
    qmpvcpu.VcpuFailed("x", qmp_class="GenericError", qmp_text="y", undone=(1,)),
    qmpvcpu.VcpuPartial("x", remaining=(1,), changed_ids=(1,)),
    qmpvcpu.VcpuConnectionError("gone", address="/a", reason="closed"),
]


each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


@each_error
def test_errors_are_one_tree(error):
    assert isinstance(error, qmpvcpu.VcpuError)


@each_error
def test_the_document_of_an_error_has_its_outcome(error):
    assert error.to_json()["outcome"] == error.outcome


@each_error
def test_the_document_of_an_error_says_what_it_is(error):
    assert {"type", "libvirt", "message", "hint"} <= set(error.to_json()["error"])


@each_error
def test_each_error_has_one_of_libvirts_codes(error):
    assert error.to_json()["error"]["libvirt"].startswith("VIR_ERR_")


@each_error
def test_the_document_of_an_error_is_json(error):
    assert json.loads(json.dumps(error.to_json()))


@each_error
def test_errors_keep_their_facts_when_they_are_pickled(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.__dict__, str(again)) == (type(error), error.__dict__, str(error))


@pytest.fixture
def outcome():
    vcpu = Vcpu(1, True, True, (1,), Props({"core-id": 1}))
    return Outcome(OutcomeKind.APPLIED, (1,), (vcpu,), changed_ids=(1,), mechanism="hotplug")


def test_results_compare_after_a_pickle(outcome):
    assert pickle.loads(pickle.dumps(outcome)) == outcome


def test_results_that_are_equal_have_one_hash(outcome):
    assert hash(pickle.loads(pickle.dumps(outcome))) == hash(outcome)


def test_results_show_themselves(outcome):
    assert "core-id" in repr(outcome)


def test_a_result_about_one_vcpu_has_that(outcome):
    assert outcome.vcpu == Vcpu(1, True, True, (1,), Props({"core-id": 1}))


def test_a_result_about_no_vcpu_has_none():
    with pytest.raises(ValueError, match="about 0"):
        _ = Outcome(OutcomeKind.APPLIED, ()).vcpu


def test_props_cannot_be_set(outcome):
    with pytest.raises(AttributeError):
        outcome.vcpu.props.x = 1


def test_flags_have_the_rfcs_values():
    values = {
        "CURRENT": 0,
        "LIVE": 1,
        "CONFIG": 2,
        "ENABLE": 4,
        "DISABLE": 8,
        "GUEST": 16,
        "NUMA_NODE": 32,
        "CORE": 64,
    }
    assert {name: int(flag) for name, flag in qmpvcpu.VcpuFlag.__members__.items()} == values
