"""Values of flags: from text to what a configuration wants, or an error that says what would be right."""

from __future__ import annotations

import json
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeVar

from penstock.core.errors import InvalidRequest

T = TypeVar("T")

_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)\s*([a-zA-Z]*)")
#: vLLM's suffixes: lower case is decimal, upper case binary. With an i they are binary in either case.
_UNITS = {"": 1} | {
    unit: factor
    for power, letter in enumerate("kmgt", start=1)
    for unit, factor in (
        (letter, 10 ** (3 * power)),
        (letter.upper(), 2 ** (10 * power)),
        (f"{letter}i", 2 ** (10 * power)),
        (f"{letter}ib", 2 ** (10 * power)),
    )
}


def parse_size(text: str) -> int:
    """An integer with an optional unit, as vLLM reads it: 8192, 8k (8,000), 8K (8,192); and 8Ki, 1.5GiB, -1.

    K, M, G and T take whole numbers only, as in vLLM. KB, MB and GB are refused: people mean either by them.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ArgumentTypeError(f"{text!r} is not a number such as 8192, 8k (8,000), 8K (8,192) or 4GiB")
    number, unit = match.groups()
    factor = _UNITS.get(unit if len(unit) == 1 else unit.lower())
    if factor is None:
        letter = unit[:1].lower()
        if unit.lower() == f"{letter}b" and letter in "kmgt":
            raise ArgumentTypeError(
                f"{text!r} may mean powers of 1000 or of 1024: "
                f"write {number}{letter} or {number}{letter.upper()}iB"
            )
        raise ArgumentTypeError(f"{text!r} has no unit that is known: k, m, g, t, K, M, G, T, KiB … TiB")
    if "." in number and unit in ("K", "M", "G", "T"):
        raise ArgumentTypeError(
            f"{text!r}: {unit} is binary and takes whole numbers; "
            f"write {number}{unit.lower()} or {number}{unit}iB"
        )
    value = Fraction(number) * factor
    if value.denominator != 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def parse_json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f'{text!r} is not a JSON object such as {{"key": 1}}')
    return value


def parse_list(text: str) -> list[str]:
    """The items of a value that may be vLLM's JSON list; any other text is one item."""
    if not text.lstrip().startswith("["):
        return [text]
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a JSON list: {error}") from error
    if not all(isinstance(item, str) for item in value):
        raise ArgumentTypeError(f"{text!r} is not a list of texts")
    return list(value)


def parse_sizes(text: str) -> list[int]:
    """The numbers of a JSON list; any other text is one number, with a unit maybe."""
    if not text.lstrip().startswith("["):
        return [parse_size(text)]
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a JSON list: {error}") from error
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise ArgumentTypeError(f"{text!r} is not a list of whole numbers")
    return list(value)


def parse_origins(text: str) -> list[str]:
    """Origins as browsers send them; anything else would allow nothing, in silence."""
    origins = parse_list(text)
    for origin in filter(None, origins):
        if origin not in ("*", "null") and not re.fullmatch(r"[a-zA-Z][\w+.-]*://[^/,\s]+", origin):
            raise ArgumentTypeError(
                f"{origin!r} is no origin: write scheme://host, with :port where it is not the scheme's own, "
                "and no path; several are separated by spaces, or are a JSON list"
            )
    return origins


def or_word(parse: Callable[[str], T], words: dict[str, T | None]) -> Callable[[str], T | None]:
    """A parser that takes these words, too; `None` is vLLM's word for a value that is not given."""

    def parsed(text: str) -> T | None:
        word = text.lower()
        known = word if word in words else text
        return words[known] if known in words else parse(text)

    parsed.__name__ = getattr(parse, "__name__", "value")
    return parsed


def duration(text: str, flag: str, *, above_zero: bool = False) -> float:
    """Seconds of `500ms`, `30s`, `5m`. Raises InvalidRequest that names the flag."""
    from penstock.spec.units import seconds

    try:
        found = seconds(text)
    except ValueError as error:
        raise InvalidRequest(f"{flag}: {error}.", param=flag) from None
    if above_zero and found <= 0:
        raise InvalidRequest(f"{flag} is {text}; it must be above 0.", param=flag)
    return found
