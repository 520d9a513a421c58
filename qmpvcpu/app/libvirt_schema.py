"""What libvirt's own schema says of a document; it takes lxml to ask."""

from __future__ import annotations

from qmpvcpu.xml.schema import check_domain


def against_libvirts_schema(data: bytes) -> list[str] | None:
    """What libvirt's own schema has against a document, with lines; None where libvirt's is not installed."""
    return check_domain(data)
