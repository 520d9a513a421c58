"""The arguments of a public call, checked against its annotations before anything happens. Pure."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from enum import Flag, StrEnum
from functools import cache, wraps
from typing import (
    Any,
    Final,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from qmpvcpu.core.text import clean
from qmpvcpu.errors import VcpuUsageError

P = ParamSpec("P")
R = TypeVar("R")

_NOUNS: Final[dict[Any, str]] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    bytes: "bytes",
    type(None): "None",
}
#: Characters of a wrong value that an error shows.
_MOST: Final = 60
#: The most items of a list: no machine has that many vCPUs.
_MOST_ITEMS: Final = 65536


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A call with unknown or missing arguments, or with values of other types than `function` is
    annotated with, raises VcpuUsageError. True is not an integer, and NaN is not a number.
    """
    signature = inspect.signature(function)

    def check(given: tuple[Any, ...], named: dict[str, Any]) -> None:
        try:
            bound = signature.bind(*given, **named)
        except TypeError as error:
            raise _unbound(function, signature, named, str(error)) from None
        hints = _hints(function)
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                _check_options(function, hints.get(name), value)
            elif name in hints and not _fits(value, hints[name]):
                raise _wrong(name, value, hints[name])

    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def call_later(*given: P.args, **named: P.kwargs) -> Any:
            check(given, named)
            return await function(*given, **named)

        return cast("Callable[P, R]", call_later)

    @wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> R:
        check(given, named)
        return function(*given, **named)

    return call


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations by argument; a name that only a type checker knows is left out."""
    found: dict[str, Any] = {}
    for name, text in inspect.get_annotations(function).items():
        probe = types.SimpleNamespace(__annotations__={name: text})
        try:
            found |= get_type_hints(probe, getattr(function, "__globals__", {}))
        except NameError:
            continue
    return found


def _check_options(function: Callable[..., Any], hint: Any, options: Mapping[str, Any]) -> None:
    """The keywords of a TypedDict (`**options: Unpack[Options]`)."""
    kind = next(iter(get_args(hint)), None)
    if kind is None:
        return
    hints = get_type_hints(kind)
    for name, value in options.items():
        if name not in hints:
            raise _unknown(function, name, hints)
        if not _fits(value, hints[name]):
            raise _wrong(name, value, hints[name])


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and type(value) is not bool


def _is_text(value: Any) -> bool:
    """Whether it is a string that a file name, an XML document and a QMP message can hold."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


#: The check of a value, for annotations that are not classes.
_PLAIN: Final[Mapping[Any, Callable[[Any], bool]]] = {
    Any: lambda _: True,
    object: lambda _: True,
    None: lambda value: value is None,
    type(None): lambda value: value is None,
    bool: lambda value: type(value) is bool,
    str: _is_text,
    int: _is_integer,
    float: lambda value: _is_integer(value) or (isinstance(value, float) and value == value),
}


def _fits(value: Any, hint: Any) -> bool:
    plain = _PLAIN.get(hint)
    if plain is not None:
        return plain(value)
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is not None:
        return _is_collection(value, origin, inner)
    if not isinstance(hint, type) or getattr(hint, "_is_protocol", False):
        return True
    if issubclass(hint, StrEnum):
        return value in set(hint)
    return _is_integer(value) if issubclass(hint, Flag) else isinstance(value, hint)


def _is_collection(value: Any, origin: Any, inner: tuple[Any, ...]) -> bool:
    if not isinstance(origin, type) or isinstance(value, str | bytes):
        return not isinstance(origin, type)
    if not isinstance(value, origin):
        return False
    if (
        issubclass(origin, Mapping)
        or not issubclass(origin, Iterable)
        or not isinstance(value, Collection)
    ):
        # Reading an iterator would use it up.
        return True
    return not inner or (len(value) <= _MOST_ITEMS and all(_fits(item, inner[0]) for item in value))


def _wrong(name: str, value: Any, hint: Any) -> VcpuUsageError:
    text = clean(repr(value), _MOST)
    if isinstance(value, str) and str in (hint, *get_args(hint)):
        return VcpuUsageError(
            f"{name}={text} has a character that no path or name has", hint="leave it out"
        )
    return VcpuUsageError(f"{name}={text} is not {_noun(hint)}", hint=f"give {_noun(hint)}")


def _noun(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_noun(one) for one in inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is not None and inner and isinstance(origin, type) and issubclass(origin, Iterable):
        return f"a list ({_noun(inner[0])} each)"
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return " or ".join(map(repr, map(str, hint)))
    if getattr(origin, "__name__", "") == "PathLike":
        return "a path"
    return _NOUNS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def _unbound(
    function: Callable[..., Any], signature: inspect.Signature, named: Mapping[str, Any], text: str
) -> VcpuUsageError:
    known = [name for name in signature.parameters if name not in ("self", "cls")]
    unknown = next((name for name in named if name not in known), None)
    if unknown is not None:
        return _unknown(function, unknown, known)
    return VcpuUsageError(
        f"{_name(function)}(): {text}", hint=f"it takes {', '.join(known) or 'nothing'}"
    )


def _unknown(function: Callable[..., Any], name: str, known: Iterable[str]) -> VcpuUsageError:
    near = get_close_matches(name, list(known), 1)
    return VcpuUsageError(
        f"{_name(function)}() has no argument '{clean(name, _MOST)}'",
        hint=f"did you mean {near[0]}?" if near else f"it takes {', '.join(known) or 'nothing'}",
    )


def _name(function: Callable[..., Any]) -> str:
    """The name that a user calls."""
    return function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
