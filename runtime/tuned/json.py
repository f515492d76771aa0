"""Converts frozen dataclasses to readable JSON and back; every value is checked when read.

Flags and enums are written by name, and pairs of a name and a value as one object. Files are not
trusted: a value is refused if it does not fit its annotation or exceeds the annotation's limits
(`codegen.limits`). The error message names the value's place in the file.
"""

from __future__ import annotations

import json
import math
import reprlib
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum, Flag
from functools import lru_cache
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
T = TypeVar("T")
_WIDTH = 100
_LONGEST = 10_000  # characters of a text


def to_plain(value: object) -> Plain:
    """`value` in JSON's own types.

    Raises:
        TypeError: it holds something other than dataclasses, enums, tuples and scalars.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _field_to_plain(value, f.name) for f in fields(value)}
    if isinstance(value, Flag):
        return [str(m.name) for m in _members(type(value)) if m in value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, tuple):
        return [to_plain(x) for x in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} has no place in JSON")


def from_plain(kind: type[T], value: Plain, at: str = "") -> T:
    """The instance of `kind` that `value` describes; `at` is its place, for error messages.

    Raises:
        ValueError: `value` does not fit; the message names the place, the value, and the type or
            the limits expected.
    """
    return cast(T, _read(kind, value, at))


def parse(text: str) -> Plain:
    """The JSON in `text`.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has contents that readers of JSON
            interpret differently: a name twice in an object, NaN, numbers of very many digits.
    """
    try:
        return cast(
            Plain,
            json.loads(
                text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer
            ),
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Plain]]) -> dict[str, Plain]:
    made: dict[str, Plain] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"it says {_short(name)} twice")
        made[name] = value
    return made


def _constant(name: str) -> Plain:
    raise ValueError(f"{name} is not a finite number")


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def render(value: Plain) -> str:
    """`value` as JSON; a list or object that fits on a line has one, which keeps diffs short."""
    return "\n".join(_lines(value, "")) + "\n"


def _lines(value: Plain, before: str) -> Iterator[str]:
    flat = before + json.dumps(value, ensure_ascii=False, allow_nan=False)
    indent = before[: len(before) - len(before.lstrip())]
    if not isinstance(value, (dict, list)) or (len(flat) < _WIDTH and indent):
        yield flat
        return
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    yield before + opening
    inner = indent + " "
    if isinstance(value, dict):
        parts = [(f"{inner}{json.dumps(k, ensure_ascii=False)}: ", x) for k, x in value.items()]
    else:
        parts = [(inner, x) for x in value]
    for n, (start, part) in enumerate(parts):
        *body, last = _lines(part, start)
        yield from body
        yield last + ("," if n + 1 < len(parts) else "")
    yield indent + closing


def _field_to_plain(owner: object, name: str) -> Plain:
    value, kind = getattr(owner, name), cast(Any, type(owner))
    if _is_named(_hints(kind)[name]):
        return {key: to_plain(x) for key, x in value}
    return to_plain(value)


@lru_cache(maxsize=256)
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _members(kind: type[Flag]) -> list[Flag]:
    """The single bits of a flag (aliases and combinations are members too before Python 3.11)."""
    return [m for m in kind if m.value and m.value & (m.value - 1) == 0]


def _is_named(hint: object) -> bool:
    """Whether `hint` is `tuple[tuple[str, X], ...]`: pairs of a name and a value."""
    arguments = get_args(hint)
    if get_origin(hint) is not tuple or len(arguments) != 2 or arguments[1] is not Ellipsis:
        return False
    pair = get_args(arguments[0])
    return get_origin(arguments[0]) is tuple and len(pair) == 2 and pair[0] is str


def _read(hint: Any, value: Plain, at: str) -> object:
    if get_origin(hint) is Annotated:
        kind, *limits = get_args(hint)
        read = _read(kind, value, at)
        for limit in limits:
            if not limit.admits(read):
                raise ValueError(f"{_place(at)} is {_short(value)}, expected {limit}")
        return read
    if get_origin(hint) in (Union, types.UnionType):
        return _read_union(get_args(hint), value, at)
    if _is_named(hint):
        (_, kind) = get_args(get_args(hint)[0])
        pairs = _expect(dict, value, at)
        return tuple((name, _read(kind, x, f"{at}.{name}")) for name, x in pairs.items())
    if get_origin(hint) is tuple:
        return _read_tuple(get_args(hint), value, at)
    if is_dataclass(hint):
        return _read_dataclass(hint, value, at)
    if issubclass(hint, Flag):
        members = {str(m.name): m for m in _members(hint)}
        chosen = hint(0)
        for name in _expect(list, value, at):
            chosen |= _named(members, name, at)
        return chosen
    if issubclass(hint, Enum):
        return _named({m.name: m for m in hint}, value, at)
    if hint is float:
        number = float(value) if type(value) is int else _expect(float, value, at)
        if not math.isfinite(number):
            raise ValueError(f"{_place(at)} is not a finite number")
        return number
    if hint is str and isinstance(value, str) and len(value) > _LONGEST:
        raise ValueError(f"{_place(at)} has {len(value)} characters, expected at most {_LONGEST}")
    return _expect(hint, value, at)


def _read_union(hints: tuple[Any, ...], value: Plain, at: str) -> object:
    """`X | None`, or dataclasses that differ in their fields."""
    if value is None and type(None) in hints:
        return None
    kinds = [h for h in hints if h is not type(None)]
    given = value.keys() if isinstance(value, dict) else set()
    for kind in kinds:
        if is_dataclass(kind):
            required = {f.name for f in fields(kind) if f.default is MISSING}
            if required <= given <= {f.name for f in fields(kind)}:
                return _read(kind, value, at)
    return _read(kinds[0], value, at)


def _read_tuple(hints: tuple[Any, ...], value: Plain, at: str) -> tuple[object, ...]:
    items = _expect(list, value, at)
    kinds = [hints[0]] * len(items) if hints[-1] is Ellipsis else list(hints)
    if len(items) != len(kinds):
        raise ValueError(f"{_place(at)} has {len(items)} entries, expected {len(kinds)}")
    return tuple(
        _read(k, x, f"{at}[{n}]") for n, (k, x) in enumerate(zip(kinds, items, strict=True))
    )


def _read_dataclass(kind: Any, value: Plain, at: str) -> object:
    given: Mapping[str, Plain] = _expect(dict, value, at)
    known = {f.name: f for f in fields(kind)}
    for name in given:
        if name not in known:
            what = f"has {_short(name)}, expected only {', '.join(known)}"
            raise ValueError(f"{_place(at)} {what}")
    for name, field in known.items():
        if name not in given and field.default is MISSING:
            raise ValueError(f"{_place(at)} lacks {name!r}")
    hints = _hints(kind)
    return kind(**{n: _read(hints[n], x, f"{at}.{n}" if at else n) for n, x in given.items()})


def _named(members: Mapping[str, T], name: Plain, at: str) -> T:
    if not isinstance(name, str) or name not in members:
        raise ValueError(f"{_place(at)} is {_short(name)}, expected one of {', '.join(members)}")
    return members[name]


def _expect(kind: type[T], value: Plain, at: str) -> T:
    # a bool is an int to isinstance, and is not one here
    if type(value) is not kind:
        what = _SAYS.get(kind, kind.__name__)
        raise ValueError(f"{_place(at)} is {_short(value)}, expected {what}")
    return value


def _short(value: Plain) -> str:
    """`value` for a message, however long or deep it is."""
    return reprlib.repr(value)


def _place(at: str) -> str:
    return at or "the file"


_SAYS = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number"}
