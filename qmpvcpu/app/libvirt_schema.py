"""Check a domain's XML against libvirt's own RELAX NG schema, if that is installed.

This is the only file that loads lxml.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from lxml import etree

from qmpvcpu.xml.source import Document, parse_document

#: Where libvirt installs its schema (libvirt-common, libvirt-clients).
_LIBVIRTS: Final = Path("/usr/share/libvirt/schemas/domain.rng")


def against_libvirts_schema(data: bytes) -> list[str] | None:
    """The errors that libvirt's schema finds in a domain's XML; None if the schema is not
    installed.
    """
    schema = domain_schema()
    if schema is None:
        return None
    try:
        tree = _tree(parse_document(data))
    except etree.XMLSyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    return [f"line {line}: {text}" for line, text in errors_against(schema, tree)]


def domain_schema() -> etree.RelaxNG | None:
    """libvirt's schema of a domain; None if it is not installed."""
    return _schema(_LIBVIRTS) if _LIBVIRTS.exists() else None


def errors_against(schema: etree.RelaxNG, tree: etree._Element) -> list[tuple[int, str]]:
    """The line and text of every error, without duplicates."""
    if schema.validate(tree):
        return []
    return list(dict.fromkeys((entry.line, entry.message) for entry in schema.error_log))


@cache
def _schema(path: Path) -> etree.RelaxNG:
    return etree.RelaxNG(etree.parse(str(path)))


def _tree(document: Document) -> etree._Element:
    # `parse_document` has checked the source: it has no DOCTYPE, and its size and depth are
    # limited. The source is UTF-8, whatever its declaration says.
    parser = etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=True,
    )
    return etree.fromstring(document.source, parser)
