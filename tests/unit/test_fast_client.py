"""What our clients rest on: members of `qemu.qmp` that it does not promise, in the version that was
read.
"""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.plain_client import is_known_to_qemu_qmp, overridden

#: A name that is not here is overridden by mistake, or is new: read it in qemu.qmp, and add it.
OVERRIDDEN = {
    "_cb_inbound",
    "_cb_outbound",
    "_do_recv",
    "_do_send",
    "_establish_session",
    "_on_message",
    "_recv",
}


def test_the_members_that_are_overridden_exist_and_take_the_same():
    assert overridden() == dict.fromkeys(OVERRIDDEN, True)


@pytest.mark.parametrize("name", ["_raw", "_readline", "_writer"])
def test_a_private_member_that_is_used_exists(name):
    assert is_known_to_qemu_qmp(name)


def test_qemu_qmp_is_the_version_whose_members_were_read():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"qemu.qmp=={version('qemu.qmp')}" in project["dependencies"]
