"""Text from outside (QEMU, libvirt, the guest, a file) made safe for a terminal. Pure."""

from __future__ import annotations

from typing import Final

#: Most characters of one message or hint.
MESSAGE_LENGTH: Final = 4000


def clean(text: str, most: int | None = None, *, tabs: bool = False) -> str:
    """The text as one printable line: white space becomes a space, and characters that are not
    printable (control characters, escape sequences, changes of the writing direction, lone
    surrogates) become Python escapes.

    Args:
        text: anything.
        most: the most characters of the result; None: all.
        tabs: whether tabs stay.
    """
    if most is not None and len(text) > most:
        text = text[: most - 3] + "..."
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or (tabs and char == "\t") else _escaped(char) for char in text
    )


def _escaped(char: str) -> str:
    return " " if char.isspace() else repr(char)[1:-1]
