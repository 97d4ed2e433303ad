"""Quantities as people write them in a spec: `30s`, `5m`, `1.5 h`; `4GiB`, `80 GB`; `$12.50`, `0.25`.

Durations are seconds (float), sizes bytes (int), money nanodollars (int): sums of prices are exact.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from penstock.core.errors import quote

NANO = 1_000_000_000
"""Nanodollars of a dollar, nanoseconds of a second."""

_MOST = 1 << 63
"""What a quantity stays below, in its smallest unit: databases count in 64 bits."""
_FINEST = Decimal("1e-9")
"""US dollars."""
_LONGEST = 40
"""Characters of a quantity."""

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_BYTES = {
    "": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def seconds(value: Any) -> float:
    """`90`, `90s`, `1.5m`, `2 h` → seconds. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a duration is a number of seconds, or a text such as 500ms, 30s, 5m or 1h")
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value) if len(value) <= _LONGEST else None
        if match is None or (match[2] or "s") not in _SECONDS:
            raise ValueError(f"{quote(value)} is no duration; write 500ms, 30s, 5m, 1h or 1d")
        value = float(match[1]) * _SECONDS[match[2] or "s"]
    if not value * NANO < _MOST:  # nor NaN
        raise ValueError(f"{quote(value)} is no duration of less than 292 years")
    return float(value)


def size(value: Any) -> int:
    """`4096`, `4GiB`, `80 GB` → bytes; GB are decimal, GiB are binary. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("a size is a number of bytes, or a text such as 80GB or 40GiB")
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value) if len(value) <= _LONGEST else None
        if match is None or match[2] not in _BYTES:
            raise ValueError(f"{quote(value)} is no size; write 4096, 512MiB, 80GB or 40GiB")
        value = int(Decimal(match[1]) * _BYTES[match[2]])
    if value >= _MOST:
        raise ValueError(f"{quote(value)} is no size of less than 8 EiB")
    return int(value)


def nanodollars(value: Any) -> int:
    """`12.5`, `"$12.50"` → nanodollars. Raises ValueError for what is finer than a nanodollar."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("an amount is a number of US dollars, such as 12.50")
    if isinstance(value, int) and abs(value) >= _MOST:  # too long to be written out
        raise ValueError(f"{quote(value)} is no amount of less than nine billion US dollars")
    text = str(value).strip().removeprefix("$").strip()
    try:
        amount = Decimal(text if len(text) <= _LONGEST else "?")
    except InvalidOperation:
        raise ValueError(f"{quote(value)} is no amount of US dollars; write 12.50") from None
    # digits first: 1e999999 is short, and has a million of them
    if not amount.is_finite() or amount.adjusted() > 9 or not abs(amount) < _MOST // NANO:
        raise ValueError(f"{quote(value)} is no amount of less than nine billion US dollars")
    if amount != amount.quantize(_FINEST):
        raise ValueError(f"{quote(value)} is no amount of US dollars of at most nine decimals")
    return int(amount * NANO)


def _written(number: str, pattern: str, example: str) -> WithJsonSchema:
    """What editors are told of a quantity."""
    return WithJsonSchema(
        {
            "anyOf": [{"type": number, "minimum": 0}, {"type": "string", "pattern": pattern}],
            "examples": [example],
        },
        mode="validation",
    )


Seconds = Annotated[
    float,
    BeforeValidator(seconds),
    Field(ge=0, allow_inf_nan=False),
    _written("number", rf"^\s*[0-9.]+\s*({'|'.join(_SECONDS)})?\s*$", "30s"),
]
"""A duration."""
Bytes = Annotated[
    int,
    BeforeValidator(size),
    Field(ge=0),
    _written("integer", rf"^\s*[0-9.]+\s*({'|'.join(filter(None, _BYTES))})?\s*$", "40GiB"),
]
"""A size."""
Dollars = Annotated[
    int,
    BeforeValidator(nanodollars),
    Field(ge=0),
    _written("number", r"^\s*\$?\s*[0-9.]+\s*$", "12.50"),
]
"""An amount of money, in nanodollars; what is written is dollars."""
