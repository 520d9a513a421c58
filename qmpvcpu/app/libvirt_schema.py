"""The check of a document against libvirt's own schema, for which lxml is loaded."""

from __future__ import annotations

from qmpvcpu.xml.schema import check_domain


def against_libvirts_schema(data: bytes) -> list[str] | None:
    """The errors that libvirt's schema finds in a document, with lines; None where libvirt is not
    installed.
    """
    return check_domain(data)
