"""The list of deliberate differences, and which findings it explains."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lxml import etree

from scripts.corpus_run.files import parse
from scripts.corpus_run.finding import Finding

LIST = Path(__file__).parent / "differences.toml"
#: A list that nobody reads explains nothing.
MOST = 20


@dataclass(frozen=True)
class Where:
    """The findings that a reason is for: patterns of check and text, and an XPath that is true of
    the document.
    """

    check: re.Pattern[str]
    text: re.Pattern[str]
    document: etree.XPath | None

    def fits(self, finding: Finding, document: bytes) -> bool:
        if not (self.check.fullmatch(finding.check) and self.text.fullmatch(finding.text)):
            return False
        return self.document is None or bool(self.document(parse(document)))


@dataclass(frozen=True)
class Reason:
    """One deliberate difference, and the sentence that says why."""

    id: str
    why: str
    where: tuple[Where, ...]


def read_reasons(path: Path = LIST) -> list[Reason]:
    """The list. Raises ValueError where it is not one."""
    found = []
    for row in tomllib.loads(path.read_text())["difference"]:
        where = [
            Where(
                re.compile(one["check"]),
                re.compile(one.get("text", ".*"), re.DOTALL),
                etree.XPath(one["document"]) if "document" in one else None,
            )
            for one in row["where"]
        ]
        if not row["why"].endswith("."):
            raise ValueError(f"{row['id']}: 'why' is a sentence")
        found.append(Reason(row["id"], row["why"], tuple(where)))
    if len(found) > MOST or len({reason.id for reason in found}) != len(found):
        raise ValueError(f"at most {MOST} reasons, each once")
    return found


def explain(reasons: Sequence[Reason], finding: Finding, document: bytes) -> Reason | None:
    """The first reason that is for this finding."""
    for reason in reasons:
        if any(where.fits(finding, document) for where in reason.where):
            return reason
    return None
