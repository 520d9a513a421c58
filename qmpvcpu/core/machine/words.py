"""The words of QEMU's options: numbers, sizes, keys and values, read as QEMU reads them. Pure.

QEMU has two parsers. All -machine and -smp options are merged, and a key without `=` is refused
(util/keyval.c); each -numa, -object and -device is separate, and a key without `=` is "on"
(util/qemu-option.c). Numbers are C's, with base 0 (util/cutils.c, `qemu_strtoi64`, `parse_uint`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Final

from qmpvcpu.core.definition import Pairs
from qmpvcpu.core.rules import catalogue
from qmpvcpu.errors import VcpuUsageError

#: White space of C's isspace() and a sign may come before a number; nothing may follow it. `0b11`
#: is not accepted: whether QEMU reads it depends on the C library that it was built with (the 11.1
#: of Debian sid does).
_BEFORE: Final = r"[ \t\n\v\f\r]*"
_DIGITS: Final = r"(?:0[xX][0-9a-fA-F]{1,99}|0[0-7]{0,99}|[1-9][0-9]{0,99})"
_NUMBER: Final = re.compile(rf"{_BEFORE}([+-]?)({_DIGITS})")
_RANGE: Final = re.compile(rf"({_BEFORE}\+?{_DIGITS})(?:-({_BEFORE}\+?{_DIGITS}))?")
_SIZE: Final = re.compile(
    rf"{_BEFORE}\+?([0-9]{{0,99}})(\.[0-9]{{0,99}})?([bkmgtpe]?)", re.IGNORECASE
)
_HEX_SIZE: Final = re.compile(rf"{_BEFORE}\+?0x([0-9a-f]{{1,99}})([kmgtp]?)", re.IGNORECASE)
#: Bytes of a size's suffix.
_SUFFIXES: Final = {letter: 1024**power for power, letter in enumerate("bkmgtpe")}
_ON: Final = ("on", "yes", "true", "y")
_OFF: Final = ("off", "no", "false", "n")
_KEY: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,126}(?:\.[A-Za-z0-9_-]{1,127})*")


def parse_number(text: str) -> int | None:
    """A signed number of 64 bits: `010` is 8, `0x10` is 16, `08` is None."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    value = _digits(match[2]) * (-1 if match[1] == "-" else 1)
    return value if -(2**63) <= value < 2**63 else None


def parse_unsigned(text: str, bits: int = 64) -> int | None:
    """An unsigned number of so many bits; None if it is not one."""
    value = parse_range(text, bits)
    return value[0] if value is not None and "-" not in text else None


def parse_range(text: str, bits: int = 16) -> range | None:
    """`3`, `0-3`: the numbers as QEMU reads them; None if it refuses the text."""
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    first, last = (_digits(word.strip(" \t\n\v\f\r+")) for word in (match[1], match[2] or match[1]))
    return range(first, last + 1) if first <= last < 2**bits else None


def _digits(text: str) -> int:
    # C writes octal numbers without the "o" that Python needs.
    return int(text, 8) if text.startswith("0") and text[1:2] not in ("x", "X") else int(text, 0)


def parse_switch(text: str) -> bool | None:
    """A truth value; None if it is not one."""
    return text in _ON if text in (*_ON, *_OFF) else None


def parse_size(text: str | None, unit: int = 1, *, is_strict: bool = True) -> int | None:
    """Bytes of a size; None if it is not one.

    Args:
        text: `64M`, `1.5G`, `0x4000000`, `128`.
        unit: bytes of a number without a suffix.
        is_strict: as QEMU 8.1 and later read it; before, `0x10M` was a size and `.5M` was not.
    """
    if text is None:
        return None
    if match := _HEX_SIZE.fullmatch(text):
        if match[2] and is_strict:
            return None
        value, suffix = Fraction(int(match[1], 16)), match[2]
    elif match := _SIZE.fullmatch(text):
        whole, fraction, suffix = match.groups()
        if not whole and (fraction in (None, ".") or not is_strict):
            return None
        value = Fraction(int(whole or 0)) + (Fraction(f"0{fraction}0") if fraction else 0)
    else:
        return None
    factor = _SUFFIXES[suffix.lower()] if suffix else unit
    if factor == 1 and value.denominator != 1:
        return None
    size = int(value * factor + Fraction(1, 2))
    return size if size < 2**64 else None


def parse_keyval(option: str, text: str, implied: str) -> Pairs:
    """The argument of an option that QEMU merges: keys and values, in order.

    Args:
        option: its name, for the error.
        text: `q35,smm=off`; `,,` is a comma in a value.
        implied: the key that the first word may leave out.

    Raises:
        VcpuUsageError: QEMU would refuse to read it too.
    """
    found: list[tuple[str, str]] = []
    rest = text
    while rest:
        word = _word(rest)
        is_bare = rest[len(word) : len(word) + 1] != "="
        if word and is_bare:
            if word in ("help", "?"):
                raise _bad(
                    option,
                    text,
                    "it asks QEMU for help, and does not start a machine",
                    "leave it out",
                )
            if rest is not text:
                raise _bad(
                    option, text, f"expected '=' after parameter '{word[:40]}'", "write KEY=VALUE,…"
                )
            found.append((implied, word))
            rest = rest[len(word) + 1 :]
            continue
        if not _KEY.fullmatch(word):
            raise _bad(option, text, f"invalid parameter '{word[:40]}'", "write KEY=VALUE,…")
        value, rest = _value(rest[len(word) + 1 :])
        found.append((word, value))
    return tuple(found)


def _bad(option: str, text: str, why: str, hint: str) -> VcpuUsageError:
    return VcpuUsageError(f"-{option} '{text[:80]}': {why}", hint=hint)


def split_pairs(text: str, implied: str | None = None) -> Pairs:
    """`a,b=c,nod`: `,,` is a comma in a value, a bare word is "on", and the first word is the value
    of `implied`.
    """
    found: list[tuple[str, str]] = []
    rest, position = text, 0
    while rest:
        key = _word(rest)
        if rest[len(key) : len(key) + 1] == "=":
            value, rest = _value(rest[len(key) + 1 :])
            found.append((key, value))
        elif position == 0 and implied is not None:
            value, rest = _value(rest)
            found.append((implied, value))
        else:
            rest = rest[len(key) + 1 :]
            if key:
                found.append((key, "on"))
        position += 1
    return tuple(found)


def _word(text: str) -> str:
    """The text up to the first character that ends a key."""
    return re.split("[=,]", text, maxsplit=1)[0]


def _value(text: str) -> tuple[str, str]:
    """The value up to a single comma, and the rest after it; a double comma is one in the value."""
    match = re.match(r"(?:[^,]|,,)*", text)
    assert match is not None
    return match[0].replace(",,", ","), text[match.end() + 1 :]


def escaped(text: str) -> str:
    """The value with its commas doubled, as QEMU needs them."""
    return text.replace(",", ",,")


def join_pairs(pairs: Iterable[tuple[str, str]], implied: str | None = None) -> str:
    """The argument that `split_pairs` reads as these pairs.

    Args:
        pairs: keys and values.
        implied: the key that the first word may leave out.
    """
    return ",".join(
        escaped(value) if key == implied and not position else f"{key}={escaped(value)}"
        for position, (key, value) in enumerate(pairs)
    )


def refuse_smp(is_wrong: bool, what: str, hint: str) -> None:
    """Refuse a -smp or -numa that QEMU refuses.

    Args:
        is_wrong: whether QEMU refuses it.
        what: in QEMU's words, with the numbers.
        hint: what to write instead.

    Raises:
        VcpuRefused: `is_wrong` is true.
    """
    if is_wrong:
        raise catalogue.SMP.error(what=what, hint=hint)
