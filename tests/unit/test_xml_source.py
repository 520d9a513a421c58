"""XML documents as bytes: read, edited, and nothing else changed."""

from __future__ import annotations

import codecs
import tracemalloc
import xml.parsers.expat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpvcpu import VcpuRefused
from tests.support.xml import Editor, Node, edited

SHAPE = b"""<?xml version='1.0'?>
<!-- <vcpu>9</vcpu> -->
<domain type="kvm" xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
\t<name >a &lt;b&gt; &#228;</name ><vcpu   placement = "static"
    current='2'  > 4 </vcpu><empty/>
  <![CDATA[<vcpu>7</vcpu>]]>
  <qemu:commandline><qemu:arg value='a>b "c"'/></qemu:commandline>
</domain>
<?after all?>
"""


@pytest.mark.parametrize(
    ("path", "node"),
    [
        ("vcpu", Node("vcpu", {"placement": "static", "current": "2"}, " 4 ", 4)),
        ("name", Node("name", {}, "a <b> ä", 4)),
        ("qemu:commandline/qemu:arg", Node("qemu:arg", {"value": 'a>b "c"'}, "", 7)),
        ("none/at/all", None),
    ],
)
def test_what_is_read(path, node):
    assert Editor(SHAPE).node(path) == node


def test_comments_and_character_data_have_no_elements():
    assert [node.name for node in Editor(SHAPE).nodes()] == [
        *("domain", "name", "vcpu", "empty", "qemu:commandline", "qemu:arg")
    ]


ROWS = ("<vcpus>", "  <vcpu id='0'/>", "</vcpus>")


@pytest.mark.parametrize(
    ("edit", "before", "after"),
    [
        (("set_attribute", "vcpu", "current", "2"), b"", b""),
        (("set_text", "vcpu", "4"), b"", b""),
        (("set_attribute", "vcpu", "current", "31"), b"'2'", b"'31'"),
        (("set_attribute", "vcpu", "placement", 'a"<'), b'"static"', b'"a&quot;&lt;"'),
        (("set_attribute", "vcpu", "current", None), b"\n    current='2'", b""),
        (("set_attribute", "empty", "x", "'&"), b"<empty/>", b"<empty x='&apos;&amp;'/>"),
        (("set_text", "vcpu", "16"), b"> 4 <", b"> 16 <"),
        (
            ("insert_after", "name", *ROWS),
            b"</name >",
            b"</name >\n\t<vcpus>\n\t  <vcpu id='0'/>\n\t</vcpus>",
        ),
        (("replace", "empty", "<full/>"), b"empty", b"full"),
    ],
    ids=lambda value: "-".join(map(str, value[:2])) if isinstance(value, tuple) else "",
)
def test_an_edit_changes_its_place_only(edit, before, after):
    assert edited(SHAPE, edit) == SHAPE.replace(before, after)


@pytest.mark.parametrize("data", [SHAPE, SHAPE.replace(b"\n", b"\r\n")], ids=["LF", "CRLF"])
def test_without_an_edit_no_byte_changes(data):
    assert edited(data) == data


def test_new_lines_end_as_the_document_has_them():
    data = SHAPE.replace(b"\n", b"\r\n")
    assert b"\r\n\t<x/>" in edited(data, ("insert_after", "name", "<x/>"))


encodings = pytest.mark.parametrize(
    ("encoding", "bom"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-16-le", b""),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", b""),
        ("iso-8859-1", b""),
        ("windows-1252", b""),
    ],
)


def encoded(encoding, bom, element="<x/>"):
    """A document of this element, and how it names its encoding."""
    name = "utf-16" if "16" in encoding else encoding
    text = f"<?xml version='1.0' encoding='{name}'?>\n<domain><name>ä</name>{element}</domain>\n"
    return bom + text.encode(encoding)


@encodings
def test_encodings_are_read(encoding, bom):
    assert Editor(encoded(encoding, bom)).node("name").text == "ä"


@encodings
def test_encodings_stay(encoding, bom):
    assert edited(encoded(encoding, bom)) == encoded(encoding, bom)


@encodings
def test_what_an_encoding_lacks_is_written_as_a_number(encoding, bom):
    want = "ü€" if encoding.startswith(("utf", "windows")) else "ü&#8364;"
    got = edited(encoded(encoding, bom), ("set_attribute", "x", "y", "ü€"))
    assert got == encoded(encoding, bom, f"<x y='{want}'/>")


LAUGHS = b"<!DOCTYPE d [<!ENTITY a 'ha'>" + b"".join(
    b"<!ENTITY %c '&%c;&%c;'>" % (98 + n, 97 + n, 97 + n) for n in range(20)
)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no element found"),
        (b"<a>", "no element found"),
        (b"<a><b></a></b>", "mismatched tag"),
        (b"<a/><b/>", "junk after document element"),
        (b"plain", "syntax error|not well-formed"),
        (b"<a>&none;</a>", "undefined entity"),
        (LAUGHS + b"]><domain>&u;</domain>", "DOCTYPE"),
        (b"<!DOCTYPE d SYSTEM 'file:///etc/passwd'><d/>", "DOCTYPE"),
        (b"<!DOCTYPE d [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><d>&e;</d>", "DOCTYPE"),
        (b"<a>" * 100_000, "levels of elements"),
        (b"<a>" + b"<b/>" * 300_000 + b"</a>", "more than 200000 elements"),
        (b"<a>\xff</a>", "it is not utf-8"),
        (b"<?xml version='1.0' encoding='klingon'?><a/>", "'klingon' is not known"),
        (b"<?xml version='1.0' encoding='utf-7'?><a>+ADw-</a>", "cannot be kept"),
        (b"<?xml version='1.0' encoding='us-ascii'?><a>\xe4</a>", "it is not us-ascii"),
        (b"<a>\0</a>", "not well-formed"),
        (b"<a>\n\n<b x='1' x='2'/></a>", "line 3: .*duplicate attribute"),
    ],
    # Some of the documents are megabytes.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_documents_that_are_none(data, text):
    with pytest.raises(VcpuRefused, match=text) as caught:
        Editor(data)
    assert (caught.value.libvirt, bool(caught.value.hint)) == ("VIR_ERR_XML_ERROR", True)


def test_100_megabytes_are_refused_unread():
    data = b"<a>" + b"x" * 100_000_000 + b"</a>"
    tracemalloc.start()
    try:
        with pytest.raises(VcpuRefused, match="has more than"):
            Editor(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


NAMES = st.sampled_from(["a", "vcpu", "x:y", "ä"])
TEXTS = st.text(
    # XML has no U+FFFE and no U+FFFF.
    st.characters(
        codec="utf-8", exclude_characters="<&>\r\ufffe\uffff", exclude_categories=["Cc", "Cs"]
    ),
    max_size=8,
)
SPACES = st.sampled_from([" ", "\n  ", "\t", "  "])


@st.composite
def elements(draw, depth=3):
    name = draw(NAMES)
    attributes = "".join(
        f"{draw(SPACES)}{key}{draw(st.sampled_from(['=', ' = ']))}{quote}{value.replace(quote, '')}{quote}"
        for key, value, quote in draw(
            st.lists(
                st.tuples(
                    st.sampled_from(["p", "q", "r:s", "current"]), TEXTS, st.sampled_from("'\"")
                ),
                max_size=3,
                unique_by=lambda item: item[0],
            )
        )
    )
    if draw(st.booleans()):
        return f"<{name}{attributes}{draw(st.sampled_from(['', ' ']))}/>"
    inside = draw(st.lists(elements(depth - 1) if depth else TEXTS, max_size=3))
    joint = draw(
        st.sampled_from(
            ["", "\n  ", "<!-- </vcpu> -->", "<![CDATA[<]]>", "<?pi <x> ?>", "&amp;", "&#65;"]
        )
    )
    return f"<{name}{attributes}>{joint}{joint.join(inside)}</{name}{draw(st.sampled_from(['', ' ']))}>"


def start_tags(source):
    """Where each start tag stands and what it says, by expat: first byte, the byte behind, name,
    attributes.
    """
    found = []

    def start(name, attributes):
        first = last = parser.CurrentByteIndex
        quote = b""
        while quote or source[last : last + 1] != b">":
            sign = source[last : last + 1]
            if sign in (b"'", b'"') and quote in (b"", sign):
                quote = b"" if quote else sign
            last += 1
        found.append((first, last + 1, name, attributes))

    parser = xml.parsers.expat.ParserCreate("utf-8")
    parser.StartElementHandler = start
    parser.Parse(source, True)
    return found


@settings(max_examples=100)
@given(elements())
def test_any_document_is_read_as_expat_does(text):
    got = [(node.name, node.attributes) for node in Editor(text.encode()).nodes()]
    assert got == [tuple(tag[2:]) for tag in start_tags(text.encode())]


@settings(max_examples=100)
@given(elements())
def test_any_document_stays_without_an_edit(text):
    assert edited(text.encode()) == text.encode()


@settings(max_examples=200)
@given(elements(), st.data())
def test_whatever_a_document_looks_like_only_what_was_asked_changes(text, data):
    source = text.encode()
    tags = start_tags(source)
    target = data.draw(st.integers(0, len(tags) - 1))
    name, value = data.draw(st.sampled_from(["p", "q", "new"])), data.draw(TEXTS)
    result = edited(source, ("set_attribute", target, name, value))
    wanted = [(node.name, node.attributes, node.text) for node in Editor(source).nodes()]
    # An attribute's value is normalised by XML: what stands for white space becomes blanks.
    wanted[target] = (wanted[target][0], {**wanted[target][1], name: value}, wanted[target][2])
    first, behind = tags[target][:2]
    assert [(node.name, node.attributes, node.text) for node in Editor(result).nodes()] == wanted
    assert (result[:first], result[len(result) - len(source) + behind :]) == (
        source[:first],
        source[behind:],
    )
