"""The shipped schema of `<vcpus>`."""

from __future__ import annotations

import re

import pytest

from tests.support.documents import LIBVIRT, PLAIN, RFC
from tests.support.xml import schema_errors


@pytest.mark.parametrize("data", [LIBVIRT, RFC, PLAIN])
def test_both_dialects_pass(data):
    assert schema_errors(data) == []


def document(rows):
    head = "<?xml version='1.0' encoding='iso-8859-1'?>\n<domain xmlns:x='urn:x'><name>\xe4</name>"
    return f"{head}\n<vcpus>\n{rows}</vcpus></domain>".encode("latin-1")


@pytest.mark.parametrize(
    "rows",
    [
        "<vcpu id='0' enabled='yes'/>",
        "<vcpu id='0' enabled='yes' x:y='1'/><x:z>any<b/></x:z>",
        "<vcpu id='0' state='enabled' cell='1' pin='0-3,^1' scheduler='rr:99'/>",
    ],
)
def test_what_the_schema_takes(rows):
    assert schema_errors(document(rows)) == []


@pytest.mark.parametrize(
    "rows",
    [
        "",
        "<vcpu id='0'/>",
        "<vcpu id='-1' enabled='yes'/>",
        "<vcpu id='0' enabled='true'/>",
        "<vcpu id='0' enabled='yes' order='-1'/>",
        "<vcpu id='0' enabled='yes' more='1'/>",
        "<vcpu id='0' enabled='yes' state='enabled'/>",
        "<vcpu id='0' enabled='yes'/><vcpu id='1' state='enabled'/>",
        "<vcpu id='0' state='enabled' scheduler='fifo'/>",
        "<vcpu id='0' state='enabled' pin='x'/>",
        "<other/>",
    ],
)
def test_what_the_schema_refuses_with_its_line(rows):
    found = schema_errors(document(rows))
    assert found
    assert all(re.match(r"line \d: <vcpus>: ", message) for message in found)
