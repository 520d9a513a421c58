"""The shipped schema of `<vcpus>`."""

from __future__ import annotations

import re

import pytest

from qmpvcpu.xml.schema import check_vcpus
from qmpvcpu.xml.source import parse_document
from tests.unit.test_domain_xml import LIBVIRT, PLAIN, RFC


@pytest.mark.parametrize("data", [LIBVIRT, RFC, PLAIN])
def test_both_dialects_pass(data):
    assert check_vcpus(parse_document(data)) == []


@pytest.mark.parametrize(
    ("rows", "is_valid"),
    [
        ("<vcpu id='0' enabled='yes'/>", True),
        ("<vcpu id='0' enabled='yes' x:y='1'/><x:z>any<b/></x:z>", True),
        ("<vcpu id='0' state='enabled' cell='1' pin='0-3,^1' scheduler='rr:99'/>", True),
        ("", False),
        ("<vcpu id='0'/>", False),
        ("<vcpu id='-1' enabled='yes'/>", False),
        ("<vcpu id='0' enabled='true'/>", False),
        ("<vcpu id='0' enabled='yes' order='0'/>", False),
        ("<vcpu id='0' enabled='yes' more='1'/>", False),
        ("<vcpu id='0' enabled='yes' state='enabled'/>", False),
        ("<vcpu id='0' enabled='yes'/><vcpu id='1' state='enabled'/>", False),
        ("<vcpu id='0' state='enabled' scheduler='fifo'/>", False),
        ("<vcpu id='0' state='enabled' pin='x'/>", False),
        ("<other/>", False),
    ],
)
def test_what_the_schema_takes(rows, is_valid):
    head = "<?xml version='1.0' encoding='iso-8859-1'?>\n<domain xmlns:x='urn:x'><name>\xe4</name>"
    data = f"{head}\n<vcpus>\n{rows}</vcpus></domain>"
    found = check_vcpus(parse_document(data.encode("latin-1")))
    assert (found == []) is is_valid
    assert all(re.match(r"line \d: <vcpus>: ", refusal.message) for refusal in found)
