"""An XML document as bytes, with the position of each element, so that an edit changes nothing
else.

This does not use lxml's tree, which knows lines but not bytes; writing it back would give another
document with the same meaning. expat (standard library) reports the position of every tag, and
everything else is copied from the source.

Documents are not trusted: there must be no DOCTYPE, and so no entity definitions, and size, depth
and number of elements are limited.
"""

from __future__ import annotations

import codecs
import re
import xml.parsers.expat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final
from xml.sax.saxutils import escape

from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import VcpuRefused

#: A domain with 4096 vCPUs, each of them pinned and listed, is smaller than 1 MB.
MOST_BYTES: Final = 8 * 1024 * 1024
_MOST_DEPTH: Final = 200
_MOST_ELEMENTS: Final = 200_000

_ATTRIBUTE: Final = re.compile(rb"""\s+([^\s=/<>'"]+)\s*=\s*("[^"]*"|'[^']*')""")
_NAME: Final = re.compile(rb"<[^\s/>]+")
_DECLARED: Final = re.compile(r"""\A<\?xml\s[^>]*?encoding\s*=\s*["']([A-Za-z0-9._-]+)["']""")
#: The first bytes of a document with a byte order mark. UTF-32 comes first, since its mark begins
#: like UTF-16's.
_BOMS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
#: The first bytes of a document without a byte order mark, which begins with `<`.
_FIRST: Final = (
    (b"<\0\0\0", "utf-32-le"),
    (b"\0\0\0<", "utf-32-be"),
    (b"<\0", "utf-16-le"),
    (b"\0<", "utf-16-be"),
)
#: Python's names of the encodings that a document can have. Others may take hours to decode, or may
#: not encode to the same bytes.
_KNOWN: Final = re.compile(
    r"utf-(?:8|8-sig|16|16-[lb]e|32|32-[lb]e)|ascii|iso8859-[0-9]+|cp125[0-8]"
)


@dataclass(slots=True)
class Element:
    """One element: its `name` with the prefix, and its positions in the document's UTF-8 bytes.

    The start tag is from `start` to `opened`, the content from `opened` to `closing`, and the end
    tag from `closing` to `end`.
    """

    name: str
    attributes: dict[str, str]
    line: int
    start: int
    opened: int = 0
    closing: int = 0
    end: int = 0
    parent: Element | None = field(default=None, repr=False)
    children: list[Element] = field(default_factory=list, repr=False)
    #: The character data of the element itself, joined.
    text: str = ""

    def all(self, path: str) -> Iterator[Element]:
        """All elements at the path `a/b/c`: every c in the first b in the first a."""
        above, _, name = path.rpartition("/")
        parent = self.find(above) if above else self
        return (
            child for child in (parent.children if parent is not None else ()) if child.name == name
        )

    def find(self, path: str) -> Element | None:
        """The first element at the path `a/b/c`; None if there is none."""
        return next(self.all(path), None)

    def text_at(self, path: str) -> str:
        """The text of the element at the path, without surrounding white space; empty if there is
        none.
        """
        found = self.find(path)
        return found.text.strip() if found is not None else ""

    def value(self, path: str, name: str) -> str | None:
        """An attribute of the element at the path; None if there is none."""
        found = self.find(path)
        return found.attributes.get(name) if found is not None else None


def namesake(root: Element, element: Element, name: str, space: str) -> str | None:
    """The prefix, with its colon, of an element that has this name and XML namespace; else None."""
    prefix, colon, own = element.name.rpartition(":")
    key = f"xmlns{colon}{prefix}"
    is_it = own == name and element.attributes.get(key, root.attributes.get(key)) == space
    return prefix + colon if is_it else None


class Document:
    """A parsed document with the element `root`. Edits are collected, and `to_bytes()` applies
    them.
    """

    def __init__(self, source: bytes, encoding: str, bom: bytes, root: Element) -> None:
        #: The text in UTF-8, whatever the encoding of the file.
        self.source = source
        self.root = root
        self._encoding = encoding
        self._bom = bom
        self._edits: list[tuple[int, int, bytes]] = []
        self.newline = b"\r\n" if b"\r\n" in source[:4096] else b"\n"

    def set_attribute(self, element: Element, name: str, value: str | None) -> None:
        """Set an attribute, and keep its position and quotes. None removes it."""
        if element.attributes.get(name) == value:
            return
        head = _NAME.match(self.source, element.start)
        assert head is not None
        last = head.end()
        while match := _ATTRIBUTE.match(self.source, last):
            last = match.end()
            if match[1].decode() == name:
                if value is None:
                    self._replace(match.start(), match.end(), b"")
                else:
                    quote = match[2][:1].decode()
                    self._replace(match.start(2) + 1, match.end(2) - 1, _quoted(value, quote))
                return
        if value is not None:
            self._replace(last, last, b" " + name.encode() + b"='" + _quoted(value, "'") + b"'")

    def set_text(self, element: Element, text: str) -> None:
        """Set the text of an element without children. White space around the old text stays."""
        if element.text.strip() == text:
            return
        if element.opened == element.end:
            # The element has no end tag: `<a/>`.
            slash = self.source.rfind(b"/>", element.start, element.opened)
            end = f">{escape(text)}</{element.name}>"
            self._replace(slash, element.opened, end.encode())
            return
        content = self.source[element.opened : element.closing]
        lead = len(content) - len(content.lstrip())
        trail = len(content.rstrip())
        self._replace(
            element.opened + lead, element.opened + max(trail, lead), escape(text).encode()
        )

    def insert_after(self, element: Element, lines: Sequence[str]) -> None:
        """Insert these lines after an element, with the same indentation."""
        indent = self.indent(element)
        self._replace(
            element.end,
            element.end,
            b"".join(self.newline + indent + line.encode() for line in lines),
        )

    def insert_first(self, element: Element, lines: Sequence[str]) -> None:
        """Insert these lines at the beginning of an element, indented by two more spaces."""
        outer = self.newline + self.indent(element)
        text = b"".join(outer + b"  " + line.encode() for line in lines)
        if element.opened == element.end:
            # The element has no end tag: `<a/>`.
            slash = self.source.rfind(b"/>", element.start, element.opened)
            self._replace(
                slash, element.opened, b">" + text + outer + f"</{element.name}>".encode()
            )
            return
        is_empty = not self.source[element.opened : element.closing].strip()
        tail = (
            outer
            if is_empty and b"\n" not in self.source[element.opened : element.closing]
            else b""
        )
        self._replace(element.opened, element.opened, text + tail)

    def remove(self, element: Element) -> None:
        """Remove an element, and the white space before it."""
        start = element.start
        while start and self.source[start - 1 : start].isspace():
            start -= 1
        self._replace(start, element.end, b"")

    def replace(self, element: Element, lines: Sequence[str]) -> None:
        """Replace an element by these lines."""
        joint = self.newline + self.indent(element)
        self._replace(element.start, element.end, joint.join(line.encode() for line in lines))

    def indent(self, element: Element) -> bytes:
        """The white space before an element on its line; empty if other text is there."""
        begin = self.source.rfind(b"\n", 0, element.start) + 1
        space = self.source[begin : element.start]
        return space if not space.strip() else b""

    def to_bytes(self) -> bytes:
        """The document with every edit, in its original encoding."""
        parts, last = [], 0
        for start, end, text in sorted(self._edits, key=lambda edit: edit[:2]):
            assert start >= last, "two edits of one place"
            parts += [self.source[last:start], text]
            last = end
        text = b"".join([*parts, self.source[last:]])
        if self._encoding == "utf-8":
            return self._bom + text
        return self._bom + text.decode().encode(self._encoding, "xmlcharrefreplace")

    def _replace(self, start: int, end: int, text: bytes) -> None:
        self._edits.append((start, end, text))


def parse_document(data: bytes) -> Document:
    """Read an XML document.

    Raises:
        VcpuRefused: it is too large or too deep, has a DOCTYPE, is not well-formed, or is not in
            the encoding that it declares.
    """
    if len(data) > MOST_BYTES:
        raise _refused(f"it has more than {MOST_BYTES} bytes", None)
    text, encoding, bom = _decoded(data)
    source = text.encode()
    return Document(source, encoding, bom, _Reader(source).root())


def _decoded(data: bytes) -> tuple[str, str, bytes]:
    bom, encoding = next(((bom, name) for bom, name in _BOMS if data.startswith(bom)), (b"", ""))
    if not encoding:
        encoding = next((name for first, name in _FIRST if data.startswith(first)), "")
    if not encoding:
        declared = _DECLARED.match(data[:200].decode("latin-1"))
        encoding = declared[1].lower() if declared else "utf-8"
    body = data[len(bom) :]
    try:
        codec = codecs.lookup(encoding).name
    except LookupError:
        raise _refused(f"its encoding '{encoding}' is not known", 1) from None
    if _KNOWN.fullmatch(codec) is None:
        raise _refused(f"its encoding '{encoding}' cannot be kept: save it as UTF-8", 1)
    try:
        text = body.decode(codec)
        same = text.encode(codec) == body
    except (UnicodeError, ValueError) as error:
        raise _refused(f"it is not {encoding}: {error}", None) from error
    if not same:
        raise _refused(f"its encoding '{encoding}' cannot be kept: save it as UTF-8", 1)
    if "\0" in text:
        # expat would read it as UTF-16.
        raise _refused(
            "not well-formed: it has a NUL character", text.count("\n", 0, text.index("\0")) + 1
        )
    return text, codec, bom


class _Reader:
    def __init__(self, source: bytes) -> None:
        self._source = source
        self._root: Element | None = None
        self._open: list[Element] = []
        self._count = 0
        self._text: dict[int, list[str]] = {}
        parser = self._parser = xml.parsers.expat.ParserCreate("utf-8")
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._data
        parser.StartDoctypeDeclHandler = self._doctype

    def root(self) -> Element:
        try:
            self._parser.Parse(self._source, True)
        except xml.parsers.expat.ExpatError as error:
            raise _refused(
                f"not well-formed: {xml.parsers.expat.ErrorString(error.code)}", error.lineno
            ) from error
        assert self._root is not None
        return self._root

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._count += 1
        parent = self._open[-1] if self._open else None
        line, start = self._parser.CurrentLineNumber, self._parser.CurrentByteIndex
        if len(self._open) >= _MOST_DEPTH:
            raise _refused(f"more than {_MOST_DEPTH} levels of elements", line)
        if self._count > _MOST_ELEMENTS:
            raise _refused(f"more than {_MOST_ELEMENTS} elements", line)
        element = Element(name, attributes, line, start, parent=parent)
        element.opened = self._tag_end(start)
        if parent is None:
            self._root = element
        else:
            parent.children.append(element)
        self._open.append(element)
        self._text[id(element)] = []

    def _end(self, _: str) -> None:
        element = self._open.pop()
        element.text = "".join(self._text.pop(id(element)))
        if self._source.endswith(b"/>", element.start, element.opened):
            element.closing = element.end = element.opened
        else:
            element.closing = self._parser.CurrentByteIndex
            element.end = self._source.index(b">", element.closing) + 1

    def _data(self, text: str) -> None:
        self._text[id(self._open[-1])].append(text)

    def _doctype(self, *_: object) -> None:
        raise _refused(
            "it has a DOCTYPE: entities are not read, and domain XML has none",
            self._parser.CurrentLineNumber,
        )

    def _tag_end(self, start: int) -> int:
        head = _NAME.match(self._source, start)
        assert head is not None
        last = head.end()
        while match := _ATTRIBUTE.match(self._source, last):
            last = match.end()
        return self._source.index(b">", last) + 1


def _quoted(value: str, quote: str) -> bytes:
    return escape(value, {quote: "&quot;" if quote == '"' else "&apos;"}).encode()


def _refused(what: str, line: int | None) -> VcpuRefused:
    where = f"line {line}: " if line is not None else ""
    return catalogue.NOT_XML.error(where=where, what=what)
