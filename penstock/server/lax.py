"""Values of another type than the field's, converted where vLLM converts them: pydantic's lax mode.

    for      taken, beside its own type
    int      5.0   "5"   " 5 "   "+5"   "1_000"   "5.00"   true → 1
    float    5     "1.5" "1e3"   "inf"  true → 1.0
    bool     0, 1, 0.0, 1.0      "true" "t" "yes" "y" "on" "1", "false" "f" "no" "n" "off" "0", in any case
    list, object   of entries that are converted alike; nothing else becomes one

Nothing becomes a string. What cannot be converted stays as it is: the typed decoding names it. Rules:
https://docs.pydantic.dev/latest/concepts/conversion_table/ (Python input, lax), and pydantic-core's
src/input/shared.rs; the tests compare with pydantic itself.

It knows JSON values and annotations; it does not know fields.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

_INTEGER = re.compile(r"[+-]?[0-9]+(?:_[0-9]+)*(?:\.0+)?", re.ASCII)
_FLOAT = re.compile(r"[0-9.eE+-]+|[+-]?(?:inf|infinity|nan)", re.ASCII | re.IGNORECASE)
_SPACES = " \t\n\v\f\r"
_LONGEST_NUMBER = 400
"""Characters of a text that is read as a number: no number that any field takes has more, and reading costs
more than linear time."""
_TRUTH = {
    **dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True),
    **dict.fromkeys(("0", "false", "f", "no", "n", "off"), False),
}


def integer(value: Any) -> Any:
    """The int that `value` stands for, or `value` itself."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and value.is_integer() and -(2.0**63) < value < 2.0**63:
        return int(value)
    if isinstance(value, str) and len(value) <= _LONGEST_NUMBER:
        text = value.strip(_SPACES)
        if _INTEGER.fullmatch(text):
            return int(text.partition(".")[0])
    return value


def number(value: Any) -> Any:
    """The float that `value` stands for, or `value` itself."""
    if isinstance(value, int):
        try:
            return float(value)
        except OverflowError:
            return value
    if isinstance(value, str) and len(value) <= _LONGEST_NUMBER:
        text = value.strip(_SPACES)
        if "_" in value:  # between any two characters, but not beside spaces
            text = "" if value[0] == "_" or value[-1] == "_" or "__" in value else value.replace("_", "")
        if _FLOAT.fullmatch(text):
            try:
                return float(text)
            except ValueError:
                pass
    return value


def truth(value: Any) -> Any:
    """The bool that `value` stands for, or `value` itself."""
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and len(value) <= len("false"):
        return _TRUTH.get(value.lower(), value)
    return value


_SCALARS: dict[Any, Callable[[Any], Any]] = {int: integer, float: number, bool: truth}


def convert(value: Any, kind: Any) -> Any:
    """`value` as the annotation `kind` wants it, as far as it can be converted; a copy where it is."""
    if kind in _SCALARS:
        return value if type(value) is kind else _SCALARS[kind](value)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _of_union(value, get_args(kind))
    if origin is list and isinstance(value, list):
        (entry,) = get_args(kind)
        return value if entry is Any else [convert(each, entry) for each in value]
    if origin is dict and isinstance(value, dict):
        _, entry = get_args(kind)
        return value if entry is Any else {key: convert(each, entry) for key, each in value.items()}
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict):
        hints = get_type_hints(kind)
        return {key: convert(each, hints.get(key, Any)) for key, each in value.items()}
    return value


def _of_union(value: Any, kinds: tuple[Any, ...]) -> Any:
    """As the first alternative that it can become; as it is, where it is one of them already."""
    if any(type(value) is (get_origin(kind) or kind) for kind in kinds if get_origin(kind) is None):
        return value
    for kind in kinds:
        converted = convert(value, kind)
        if converted is not value:
            return converted
    return value
