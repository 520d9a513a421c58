"""Text of others (QEMU, libvirt, the guest, a file) made fit for a terminal. Pure."""

from __future__ import annotations

from typing import Final

#: Most characters of one message or hint.
MESSAGE_LENGTH: Final = 4000


def clean(text: str, most: int | None = None, *, tabs: bool = False) -> str:
    """One line that only says what it shows: whitespace is a space, and what is not printable (control characters,
    escape sequences, changes of the writing direction, lone surrogates) is shown as Python escapes it.

    Args:
        text: anything.
        most: characters that stay; None is all.
        tabs: whether a tab stays one.
    """
    if most is not None and len(text) > most:
        text = text[: most - 3] + "..."
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or (tabs and char == "\t") else _shown(char) for char in text)


def _shown(char: str) -> str:
    return " " if char.isspace() else repr(char)[1:-1]
