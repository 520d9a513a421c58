"""XML documents as bytes: read, edited, and nothing else changed."""

from __future__ import annotations

import codecs
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpvcpu.errors import VcpuRefused
from qmpvcpu.xml.source import MOST_BYTES, parse_document

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


def edited(data, *edits):
    document = parse_document(data)
    for edit in edits:
        edit(document)
    return document.to_bytes()


def test_what_is_read():
    root = parse_document(SHAPE).root
    assert (root.name, [child.name for child in root.children]) == (
        "domain",
        ["name", "vcpu", "empty", "qemu:commandline"],
    )
    vcpu = root.child("vcpu")
    assert (vcpu.attributes, vcpu.text.strip(), vcpu.line) == ({"placement": "static", "current": "2"}, "4", 4)
    assert root.child("name").text == "a <b> ä"
    assert root.find("qemu:commandline/qemu:arg").attributes == {"value": 'a>b "c"'}
    assert root.find("none/at/all") is None


def test_an_edit_changes_its_place_only():
    def vcpu(document):
        return document.root.child("vcpu")

    assert edited(SHAPE) == SHAPE
    assert edited(SHAPE, lambda d: d.set_attribute(vcpu(d), "current", "2")) == SHAPE
    assert edited(SHAPE, lambda d: d.set_text(vcpu(d), "4")) == SHAPE
    assert edited(SHAPE, lambda d: d.set_attribute(vcpu(d), "current", "31")) == SHAPE.replace(b"'2'", b"'31'")
    assert edited(SHAPE, lambda d: d.set_attribute(vcpu(d), "placement", 'a"<')) == SHAPE.replace(
        b'"static"', b'"a&quot;&lt;"'
    )
    assert edited(SHAPE, lambda d: d.set_attribute(vcpu(d), "current", None)) == SHAPE.replace(
        b"\n    current='2'", b""
    )
    assert edited(SHAPE, lambda d: d.set_attribute(d.root.child("empty"), "x", "'&")) == SHAPE.replace(
        b"<empty/>", b"<empty x='&apos;&amp;'/>"
    )
    assert edited(SHAPE, lambda d: d.set_text(vcpu(d), "16")) == SHAPE.replace(b"> 4 <", b"> 16 <")
    lines = ["<vcpus>", "  <vcpu id='0'/>", "</vcpus>"]
    assert edited(SHAPE, lambda d: d.insert_after(d.root.child("name"), lines)) == SHAPE.replace(
        b"</name >", b"</name >\n\t<vcpus>\n\t  <vcpu id='0'/>\n\t</vcpus>"
    )
    assert edited(SHAPE, lambda d: d.replace(d.root.child("empty"), ["<full/>"])) == SHAPE.replace(
        b"empty", b"full"
    )


def test_lines_end_as_the_document_has_them():
    data = SHAPE.replace(b"\n", b"\r\n")
    assert edited(data) == data
    assert b"\r\n\t<x/>" in edited(data, lambda d: d.insert_after(d.root.child("name"), ["<x/>"]))


@pytest.mark.parametrize(
    ("encoding", "bom"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-16-le", b""),
        ("iso-8859-1", b""),
        ("windows-1252", b""),
    ],
)
def test_encodings_stay(encoding, bom):
    name = "utf-16" if "16" in encoding else encoding
    text = f"<?xml version='1.0' encoding='{name}'?>\n<domain><name>ä</name><x/></domain>\n"
    data = bom + text.encode(encoding)
    document = parse_document(data)
    assert (document.root.child("name").text, document.to_bytes()) == ("ä", data)
    document.set_attribute(document.root.child("x"), "y", "ü€")
    want = "ü€" if encoding.startswith(("utf", "windows")) else "ü&#8364;"
    assert document.to_bytes() == bom + text.replace("<x/>", f"<x y='{want}'/>").encode(encoding)


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
        (b"<a>" * 100_000, "inside each other"),
        (b"<a>" + b"<b/>" * 300_000 + b"</a>", "more than 200000 elements"),
        (b"<a>\xff</a>", "it is not utf-8"),
        (b"<?xml version='1.0' encoding='klingon'?><a/>", "'klingon' is not known"),
        (b"<?xml version='1.0' encoding='utf-7'?><a>+ADw-</a>", "cannot be kept"),
        (b"<?xml version='1.0' encoding='us-ascii'?><a>\xe4</a>", "it is not us-ascii"),
        (b"<a>\0</a>", "not well-formed"),
        (b"<a>\n\n<b x='1' x='2'/></a>", "line 3: .*duplicate attribute"),
    ],
)
def test_documents_that_are_none(data, text):
    with pytest.raises(VcpuRefused, match=text) as caught:
        parse_document(data)
    assert (caught.value.libvirt, bool(caught.value.hint)) == ("VIR_ERR_XML_ERROR", True)


def test_100_megabytes_are_refused_unread():
    data = b"<a>" + b"x" * 100_000_000 + b"</a>"
    tracemalloc.start()
    with pytest.raises(VcpuRefused, match="has more than"):
        parse_document(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert len(data) > MOST_BYTES


NAMES = st.sampled_from(["a", "vcpu", "x:y", "ä"])
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="<&>\r", exclude_categories=["Cc", "Cs"]), max_size=8
)
SPACES = st.sampled_from([" ", "\n  ", "\t", "  "])


@st.composite
def elements(draw, depth=3):
    name = draw(NAMES)
    attributes = "".join(
        f"{draw(SPACES)}{key}{draw(st.sampled_from(['=', ' = ']))}{quote}{value.replace(quote, '')}{quote}"
        for key, value, quote in draw(
            st.lists(
                st.tuples(st.sampled_from(["p", "q", "r:s", "current"]), TEXTS, st.sampled_from("'\"")),
                max_size=3,
                unique_by=lambda item: item[0],
            )
        )
    )
    if draw(st.booleans()):
        return f"<{name}{attributes}{draw(st.sampled_from(['', ' ']))}/>"
    inside = draw(st.lists(elements(depth - 1) if depth else TEXTS, max_size=3))
    joint = draw(
        st.sampled_from(["", "\n  ", "<!-- </vcpu> -->", "<![CDATA[<]]>", "<?pi <x> ?>", "&amp;", "&#65;"])
    )
    return f"<{name}{attributes}>{joint}{joint.join(inside)}</{name}{draw(st.sampled_from(['', ' ']))}>"


@settings(max_examples=200)
@given(elements(), st.data())
def test_whatever_a_document_looks_like_only_what_was_asked_changes(text, data):
    source = text.encode()
    document = parse_document(source)
    assert document.to_bytes() == source
    every = [document.root]
    for element in every:
        every += element.children
    target = data.draw(st.integers(0, len(every) - 1))
    element = every[target]
    value = data.draw(TEXTS)
    name = data.draw(st.sampled_from(["p", "q", "new"]))
    document.set_attribute(element, name, value)
    result = document.to_bytes()
    again = [parse_document(result).root]
    for other in again:
        again += other.children
    wanted = [(e.name, e.attributes, e.text) for e in every]
    # An attribute's value is normalised by XML: what stands for white space becomes blanks.
    wanted[target] = (element.name, element.attributes | {name: value}, element.text)
    assert [(e.name, e.attributes, e.text) for e in again] == wanted
    before, after = source[: element.start], source[element.opened :]
    assert result.startswith(before)
    assert result.endswith(after)
