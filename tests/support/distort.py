"""Answers of QEMU's or of a guest agent's, made false: what a server says that is broken, or means
harm.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

#: Raw JSON texts, of values that a program may not expect: beyond 64 bits, not finite, deep, odd.
NUMBERS = (
    *(
        "-1",
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "-Infinity",
        "0.5",
        "1e400",
        "18446744073709551616",
        "-0.0",
    ),
    *(
        "9223372036854775807",
        "9223372036854775808",
        "1" + "0" * 400,
        "-1" + "0" * 400,
        "9" * 4300,
        "9" * 5000,
    ),
    *("1" + "0" * 4000, "65536", "65537", "4294967296", "2147483648", "1e5", "007", "0x10"),
)
STRINGS = (
    *(
        '""',
        '"\\ud800"',
        '"\\udfff\\ud800"',
        '"\\u0000"',
        '"\\u001b[2J\\u001b]0;x\\u0007"',
        '"\\u202e\\u2028"',
    ),
    *(
        '"/machine/peripheral/vcpu1"',
        '"vcpu1"',
        '"../../etc/passwd"',
        '"%s%n{0}"',
        '"running"',
        '"\\n\\r\\t"',
    ),
    *(
        '"/machine/peripheral/vcpu1/thread[0]"',
        '"/machine/unattached/device[0]/lapic"',
        '"x"',
        '"0"',
        '"CPU"',
    ),
)
OTHERS = ("null", "true", "false", "[]", "{}", "[[]]", "[null]", '{"": null}', "[{}]", "[1, 2]")
EVENTS = (
    *(
        "DEVICE_DELETED",
        "ACPI_DEVICE_OST",
        "DEVICE_UNPLUG_GUEST_ERROR",
        "RESET",
        "SHUTDOWN",
        "STOP",
        "RESUME",
    ),
    *("MIGRATION", "POWERDOWN", "", "X" * 3000, "CPU\u001b[31m"),
)
CLASSES = (
    "GenericError",
    "CommandNotFound",
    "DeviceNotFound",
    "DeviceNotActive",
    "KVMMissingCap",
    "",
    "X",
)
KEYS = (
    *(
        "return",
        "error",
        "class",
        "desc",
        "id",
        "event",
        "data",
        "timestamp",
        "seconds",
        "microseconds",
        "QMP",
    ),
    *(
        "props",
        "socket-id",
        "core-id",
        "thread-id",
        "node-id",
        "qom-path",
        "vcpus-count",
        "type",
        "cpu-index",
    ),
    *(
        "logical-id",
        "online",
        "can-offline",
        "device",
        "path",
        "info",
        "slot",
        "slot-type",
        "source",
        "status",
        "",
    ),
    *("handle", "buf-b64", "count", "eof", "__proto__", "\ud800"),
)


class Raw(str):
    """JSON text that stays as it is."""


@dataclass(frozen=True)
class Close:
    """End the connection here."""


Piece = bytes | Close


class Distorter:
    """One connection's answers, some of them made false.

    Args:
        seed: of all that is drawn.
        rate: how likely an answer is made false.
        quiet: so many answers are true first.
    """

    def __init__(self, seed: str, rate: float, quiet: int) -> None:
        self.random = random.Random(seed)
        self.rate = rate
        self.quiet = quiet
        self.count = 0
        self._before: list[Any] = []
        self._ways = (
            *([self._value] * 6),
            *([self._key] * 3),
            *([self._identity, self._another, self._error] * 2),
            *([self._events] * 3),
            *([self._slots] * 4),
            *(
                self._twice,
                self._silence,
                self._cut,
                self._bytes,
                self._line,
                self._long,
                self._encoded,
                self._repeated,
            ),
        )

    def distort(self, data: bytes) -> tuple[str | None, list[Piece]]:
        """What is sent instead of these bytes, which are one answer; in what way it is distorted."""
        self.count += 1
        prefix, body = data[: len(data) - len(data.lstrip(b"\xff"))], data.lstrip(b"\xff")
        try:
            message = json.loads(body)
        except ValueError:
            return None, [data]
        self._before = [*self._before[-20:], message]
        if self.count <= self.quiet or self.random.random() >= self.rate:
            return None, [data]
        way = self.random.choice(self._ways)
        return way.__name__.removeprefix("_"), way(deepcopy(message), prefix)

    # -- the ways ----------------------------------------------------------------------------------

    def _value(self, message: Any, prefix: bytes) -> list[Piece]:
        """Another value at some place."""
        for _ in range(self.random.choice((1, 1, 1, 3))):
            places = list(_places(message))
            if not places:
                break
            holder, key = self.random.choice(places)
            holder[key] = self._junk(holder[key])
        return [prefix + _text(message)]

    def _key(self, message: Any, prefix: bytes) -> list[Piece]:
        """A key that is missing, one too many, or one twice."""
        objects = [message, *(holder[key] for holder, key in _places(message))]
        one = self.random.choice([found for found in objects if isinstance(found, dict)])
        how = self.random.randrange(3)
        if how == 0 and one:
            del one[self.random.choice(list(one))]
        elif how == 1:
            one[self.random.choice(KEYS)] = self._junk(None)
        text = _text(message)
        if how == 2:
            key = json.dumps(self.random.choice([*one, "id", "return"]))
            text = text.replace(
                b"{", b"{%s: %s, " % (key.encode(), _text(self._junk(None))[:-1]), 1
            )
        return [prefix + text]

    def _identity(self, message: Any, prefix: bytes) -> list[Piece]:
        """The id of another command, or what no command has."""
        earlier = [one.get("id") for one in self._before if isinstance(one, dict)]
        if self.random.random() < 0.3 and "id" in message:
            del message["id"]
        else:
            message["id"] = self.random.choice([*earlier, self._junk(message.get("id"))])
        return [prefix + _text(message)]

    def _another(self, message: Any, prefix: bytes) -> list[Piece]:
        """The answer to another command."""
        earlier = [
            one["return"] for one in self._before if isinstance(one, dict) and "return" in one
        ]
        if earlier and "return" in message:
            message["return"] = self.random.choice(earlier)
        return [prefix + _text(message)]

    def _error(self, message: Any, prefix: bytes) -> list[Piece]:
        """An error of any class, for or besides the answer."""
        if self.random.random() < 0.9:
            message.pop("return", None)
        texts = (
            "exists",
            "Duplicate device ID 'vcpu1'",
            "x\u001b[1mx",
            "core 1 already populated",
            "",
            "é" * 5000,
        )
        desc: Any = self.random.choice((*texts, self._junk("")))
        message["error"] = {"class": self.random.choice((*CLASSES, self._junk(""))), "desc": desc}
        return [prefix + _text(message)]

    def _events(self, message: Any, prefix: bytes) -> list[Piece]:
        """Events of any name and shape, before and after it."""
        count = self.random.choice((1, 1, 2, 5, 50, 2000))
        events = [_text(self._event()) for _ in range(min(count, 50))] * max(count // 50, 1)
        where = self.random.randint(0, len(events))
        return [b"".join([*events[:where], prefix + _text(message), *events[where:]])]

    def _slots(self, message: Any, prefix: bytes) -> list[Piece]:
        """A list of slots or CPUs that is not what it was."""
        rows = message.get("return")
        if not isinstance(rows, list) or not rows:
            return self._value(message, prefix)
        how = self.random.randrange(8)
        if how == 0:
            del rows[self.random.randrange(len(rows)) :]
        elif how == 1:
            del rows[self.random.randrange(len(rows))]
        elif how == 2:
            rows += deepcopy(rows)
        elif how == 3:
            rows[:] = [rows[0]] * self.random.choice((2, 100, 70000))
        elif how == 4:
            self.random.shuffle(rows)
        else:
            for row in rows:
                self._change_row(row, how)
        return [prefix + _text(message)]

    def _change_row(self, row: Any, how: int) -> None:
        if not isinstance(row, dict) or self.random.random() < 0.5:
            return
        if how == 5 and "qom-path" in row:
            if self.random.random() < 0.5:
                del row["qom-path"]
            else:
                row["qom-path"] = f"/machine/peripheral/vcpu{self.random.randrange(5)}"
        elif how == 6 and isinstance(row.get("props"), dict):
            row["props"][self.random.choice(("socket-id", "core-id", "die-id", "x"))] = (
                self.random.randrange(9)
            )
        elif how == 7:
            for key in ("vcpus-count", "cpu-index", "thread-id", "logical-id"):
                if key in row:
                    row[key] = self.random.choice((1, 2, 3, 8, 70000))
            if "online" in row:
                row["online"] = not row["online"]
            elif "props" in row and "vcpus-count" in row:
                row["qom-path"] = f"/machine/peripheral/vcpu{self.random.randrange(5)}"

    def _twice(self, message: Any, prefix: bytes) -> list[Piece]:
        """Two answers to one question, not the same."""
        other = deepcopy(message)
        if "return" in other:
            other["return"] = self._junk(other["return"])
        both = [prefix + _text(message), prefix + _text(other)]
        self.random.shuffle(both)
        return [b"".join(both)]

    def _silence(self, message: Any, prefix: bytes) -> list[Piece]:
        """No answer; more seldom than the others, because it costs a deadline."""
        return [] if self.random.random() < 0.3 else self._twice(message, prefix)

    def _cut(self, message: Any, prefix: bytes) -> list[Piece]:
        """Cut at some byte; then it ends, or goes on."""
        whole = prefix + _text(message)
        at = self.random.randint(0, len(whole))
        rest: list[Piece] = self.random.choice(
            ([Close()], [Close()], [b"\n"], [whole[at:], Close()])
        )
        return [whole[:at], *rest]

    def _bytes(self, message: Any, prefix: bytes) -> list[Piece]:
        """A few bytes that are not what they were."""
        whole = bytearray(prefix + _text(message))
        for _ in range(self.random.choice((1, 1, 4))):
            at = self.random.randrange(len(whole))
            whole[at : at + self.random.choice((0, 1, 3))] = self.random.choice(
                (
                    b"\xff",
                    b"\x00",
                    b"\xc3",
                    b"\x1b[2J",
                    b"\n",
                    b"\r",
                    b'"',
                    b"}",
                    b"\xed\xa0\x80",
                    b"\xff\xff\xff",
                )
            )
        return [bytes(whole)]

    def _line(self, message: Any, prefix: bytes) -> list[Piece]:
        """A line that is no answer, before or instead of it."""
        line = self.random.choice(
            (
                *(
                    b"",
                    b"null",
                    b"[]",
                    b"3",
                    b'""',
                    b"{}",
                    b"{",
                    b"}",
                    b"\xef\xbb\xbf{}",
                    b"[" * 5000,
                ),
                *(
                    b"[" * 900 + b"]" * 900,
                    b'{"return": ' + b"[" * 900 + b"]" * 900 + b"}",
                    b'{"a":' * 800,
                ),
                *(b"\xff" * 3000, b"HTTP/1.1 200"),
            )
        )
        text = prefix + _text(message)
        if self.random.random() < 0.5:
            deep = b"[" * 700 + b"]" * 700
            text = prefix + _text(message | {"return": Raw(deep.decode())})
        return [line + b"\n" + text]

    def _long(self, message: Any, prefix: bytes) -> list[Piece]:
        """Something large in it; mostly not very."""
        size = self.random.choice(
            (100, 10_000, 10_000, 100_000, 1_000_000 if self.random.random() < 0.2 else 1000)
        )
        places = list(_places(message))
        if places:
            holder, key = self.random.choice(places)
            holder[key] = self.random.choice(
                (
                    "y" * size,
                    "\ud83d\ude00" * (size // 8),
                    [0] * size,
                    [{}] * size,
                    Raw("[" + "[]," * size + "1]"),
                )
            )
        return [prefix + _text(message)]

    def _encoded(self, message: Any, prefix: bytes) -> list[Piece]:
        """In another encoding; with lone surrogates as bytes."""
        text = _text(message).decode()
        name = self.random.choice(("utf-16", "utf-16-le", "utf-32-be", "utf-8-sig", "latin-1"))
        return [prefix + text.encode(name, "replace") + b"\n"]

    def _repeated(self, message: Any, prefix: bytes) -> list[Piece]:
        """What was said before, once more."""
        return [prefix + _text(self.random.choice(self._before)) + prefix + _text(message)]

    # -- values ------------------------------------------------------------------------------------

    def _junk(self, was: Any) -> Any:
        """Another value, as often as not of the same type."""
        if isinstance(was, bool) and self.random.random() < 0.5:
            return not was
        if isinstance(was, int) and self.random.random() < 0.5:
            return self.random.choice(
                (was + 1, was - 1, 0, -was, 1 << 40, Raw(self.random.choice(NUMBERS)))
            )
        if isinstance(was, str) and self.random.random() < 0.5:
            change: list[Callable[[str], str]] = [
                str.upper,
                lambda x: x + "0",
                lambda x: x[:-1],
                lambda x: x * 50,
            ]
            return self.random.choice(change)(was)
        kind = self.random.choice((NUMBERS, STRINGS, OTHERS))
        if self.random.random() < 0.05:
            return "".join(self.random.choices(string.printable + "\0\ud800\u202e", k=40))
        return Raw(self.random.choice(kind))

    def _event(self) -> Any:
        slot = self.random.randrange(5)
        device = self.random.choice((f"vcpu{slot}", f"vcpu{slot}", self._junk("")))
        path = self.random.choice(
            (f"/machine/peripheral/{device}", f"/machine/peripheral/vcpu{slot}/lapic", device)
        )
        info = {
            "slot-type": "CPU",
            "slot": str(slot),
            "source": self.random.choice((3, 0x103, self._junk(3))),
        }
        info |= {"status": self.random.choice((0, 1, 128, 132, self._junk(0))), "device": device}
        data: Any = self.random.choice(
            ({"path": path, "device": device}, {"info": info}, {"path": path}, self._junk({}))
        )
        event = {"event": self.random.choice((*EVENTS[:7], *EVENTS[:4], *EVENTS)), "data": data}
        event["timestamp"] = {
            "seconds": self.random.choice((1, self._junk(1))),
            "microseconds": self._junk(5),
        }
        if self.random.random() < 0.1:
            event[self.random.choice(list(event))] = self._junk(None)
        return event


def _places(value: Any) -> Iterable[tuple[Any, Any]]:
    """Where something stands in it: (list or object, index or key)."""
    keys = (
        list(value)
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else ()
    )
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _text(value: Any) -> bytes:
    """A line of JSON; what is `Raw` stays as it is."""
    return _json(value).encode(errors="surrogatepass") + b"\n"


def _json(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{json.dumps(key)}: {_json(one)}" for key, one in value.items()) + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(_json(one) for one in value) + "]"
    return json.dumps(value)
