"""Reading what other dialects nest in a request: objects, lists and texts, each with its place for errors.

It knows types; what the names mean is the dialect's business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from penstock.core.errors import InvalidRequest, quote

T = TypeVar("T")

_WORDS = {str: "a string", dict: "an object", list: "a list", bool: "true or false", int: "a whole number"}


def typed(value: Any, kind: type[T], where: str) -> T:
    """`value`, which must be of this type. Raises InvalidRequest, naming the place."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong_type(where, _WORDS[kind], value)
    return value


def wrong_type(where: str, wanted: str, got: Any) -> InvalidRequest:
    """The refusal of a value of another type."""
    shown = "null" if got is None else type(got).__name__
    error = InvalidRequest(f"{where} must be {wanted}, got {shown}.", param=where)
    error.code = "invalid_type"
    return error


def field(given: Mapping[str, Any], name: str, kind: type[T], where: str) -> T:
    """A field that must be there."""
    if given.get(name) is None:
        raise InvalidRequest(f"Missing required parameter: {where}.{name}.", param=f"{where}.{name}")
    return typed(given[name], kind, f"{where}.{name}")


def named(given: Mapping[str, Any], name: str, where: str) -> str:
    """A text that must be there, and not be empty."""
    text = field(given, name, str, where)
    if not text:
        raise InvalidRequest(f"{where}.{name} must not be empty.", param=f"{where}.{name}")
    return text


def objects(given: list[Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each entry of a list."""
    for index, each in enumerate(given):
        place = f"{where}[{index}]"
        yield place, typed(each, dict, place)


def chosen(value: Any, choices: Collection[str], where: str) -> str:
    """A text that must be one of these."""
    if isinstance(value, str) and value in choices:
        return value
    raise InvalidRequest(f"{where} must be one of {', '.join(choices)}, got {quote(value)}.", param=where)
