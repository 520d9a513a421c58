"""The same document and the same requests, given to a libvirtd and to us."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libvirt

from scripts.corpus_run.files import parse
from scripts.corpus_run.finding import Finding
from scripts.corpus_run.reduced import Reduced
from scripts.corpus_run.said import Said, said
from tests.support.cli import run_main


@dataclass(frozen=True)
class Request:
    """`words` are of our command line, all but the domain; `kind` is what a finding is called by."""

    words: tuple[str, ...]
    kind: str


def requests(was: Said) -> Iterator[Request]:
    """Counts, maxima and ids: those at the ends, in the middle, and out of range."""
    top = was.maximum
    for total in sorted({1, max(1, top // 2), top, top + 1, len(was.enabled)}):
        yield Request(("setvcpus", str(total)), "count")
    for total in sorted({top, max(1, top // 2)}):
        yield Request(("setvcpus", str(total), "--hotpluggable"), "count hotpluggable")
    for total in sorted({1, max(1, top - 1), top, top + 1, 2 * top}):
        yield Request(("setvcpus", str(total), "--maximum"), "maximum")
    middle = [number for number in was.rows if number not in was.enabled][:1] + was.enabled[-1:]
    for number in sorted({0, top // 2, top - 1, top, *middle}):
        for option, asked in (("--enable", True), ("--disable", False)):
            already = " (already so)" if (number in was.enabled) is asked else ""
            yield Request(("setvcpu", str(number), option), option.strip("-") + already)


class Theirs:
    """libvirt's side."""

    def __init__(self, uri: str) -> None:
        libvirt.registerErrorHandler(lambda *_: None, None)
        self._connection = libvirt.open(uri)

    def define(self, data: bytes) -> libvirt.virDomain | str:
        """The domain, or why not."""
        try:
            return self._connection.defineXML(data.decode())
        except libvirt.libvirtError as error:
            return str(error)

    def ask(self, domain: libvirt.virDomain, request: Request) -> str | None:
        """Why it is refused."""
        command, value, *options = request.words
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
        flags |= libvirt.VIR_DOMAIN_VCPU_MAXIMUM if "--maximum" in options else 0
        flags |= libvirt.VIR_DOMAIN_VCPU_HOTPLUGGABLE if "--hotpluggable" in options else 0
        try:
            if command == "setvcpus":
                domain.setVcpusFlags(int(value), flags)
            else:
                domain.setVcpu(value, "--enable" in options, flags)
        except libvirt.libvirtError as error:
            return str(error)
        return None

    def document(self, domain: libvirt.virDomain) -> bytes:
        return domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE).encode()


class Ours:
    """Our side; QMPVCPU_STATE must lead to a folder of this process's."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "reduced.xml"

    def define(self, data: bytes) -> str | None:
        self._file.write_bytes(data)
        return self._call("define", str(self._file))

    def ask(self, name: str, request: Request) -> str | None:
        return self._call(*request.words[:1], name, *request.words[1:], "--config")

    def document(self, name: str) -> bytes | None:
        """None where we do not read what we have written."""
        done = run_main(["dumpxml", name, "--inactive"])
        return done.stdout.encode() if done.code == 0 else None

    def undefine(self, name: str) -> None:
        self._call("undefine", name)

    def _call(self, *words: str) -> str | None:
        done = run_main(["--json", *words])
        assert done.code != 1, done.stderr
        return None if done.code == 0 else str(json.loads(done.stdout)["error"]["message"])


@dataclass
class Answer:
    """Of one document: whether each side takes it, and the differences."""

    ours: bool
    libvirts: bool
    findings: list[Finding]
    requests: int = 0


def compare(reduced: Reduced, theirs: Theirs, ours: Ours) -> Answer:
    """Define it on both sides, and ask both the same."""
    domain, refusal = theirs.define(reduced.data), ours.define(reduced.data)
    refused = domain if isinstance(domain, str) else None
    answer = Answer(refusal is None, refused is None, [])
    file = reduced.files[0]
    if refusal is None and refused is not None:
        answer.findings.append(Finding(file, "accepted by us alone", _generic(refused), refused))
    elif refusal is not None and refused is None:
        answer.findings.append(
            Finding(file, "accepted by libvirt alone", _generic(refusal), refusal)
        )
    elif refusal is None and not isinstance(domain, str):
        answer.requests, found = _requests(file, reduced.data, domain, theirs, ours)
        answer.findings += found
    if not isinstance(domain, str):
        domain.undefine()
    if refusal is None:
        ours.undefine((parse(reduced.data).findtext("name") or "").strip())
    return answer


def _requests(
    file: str, data: bytes, domain: libvirt.virDomain, theirs: Theirs, ours: Ours
) -> tuple[int, list[Finding]]:
    """How many requests both have answered, and what differs."""
    was = said(theirs.document(domain))
    found = []
    if words := said(data).differences(was):
        found.append(
            Finding(file, "define", f"other {' and '.join(words)}", f"{said(data)}, libvirt {was}")
        )
    asked = list(requests(was))
    for request in asked:
        assert not isinstance(theirs.define(data), str), "it was taken before"
        assert ours.define(data) is None
        if (one := _request(file, request, domain, theirs, ours)) is not None:
            found.append(one)
    return len(asked), found


def _request(
    file: str, request: Request, domain: libvirt.virDomain, theirs: Theirs, ours: Ours
) -> Finding | None:
    name, what = domain.name(), " ".join(request.words)
    refused, their_refusal = ours.ask(name, request), theirs.ask(domain, request)
    if refused is None and their_refusal is not None:
        kind = f"{request.kind}: done by us alone"
        return Finding(file, kind, _generic(their_refusal), f"{what}: {their_refusal}")
    if refused is not None and their_refusal is None:
        return Finding(
            file, f"{request.kind}: done by libvirt alone", _generic(refused), f"{what}: {refused}"
        )
    if refused is not None:
        return None
    document = ours.document(name)
    if document is None:
        return Finding(file, request.kind, "we refuse what we have written", what)
    mine, yours = said(document), said(theirs.document(domain))
    words = mine.differences(yours)
    if not words:
        return None
    return Finding(
        file, request.kind, f"other {' and '.join(words)}", f"{what}: {mine}, libvirt {yours}"
    )


def _generic(message: str) -> str:
    """A message without what only one document has."""
    text = re.sub(r"line \d+: ", "", message)
    return re.sub(r"'[^']*'|\d[\d,-]*", "…", text)[:150]
