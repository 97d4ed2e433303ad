"""Quantities as people write them in a spec: `30s`, `5m`, `1.5 h`; `4GiB`, `80 GB`; `$12.50`, `0.25`.

Durations are seconds (float), sizes bytes (int), money nanodollars (int): sums of prices are exact.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

NANO = 1_000_000_000
"""Nanodollars of a dollar, nanoseconds of a second."""

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
        match = _QUANTITY.fullmatch(value)
        if match is None or (match[2] or "s") not in _SECONDS:
            raise ValueError(f"{value!r} is no duration; write 500ms, 30s, 5m, 1h or 1d")
        return float(match[1]) * _SECONDS[match[2] or "s"]
    return float(value)


def size(value: Any) -> int:
    """`4096`, `4GiB`, `80 GB` → bytes; GB are decimal, GiB are binary. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("a size is a number of bytes, or a text such as 80GB or 40GiB")
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value)
        if match is None or match[2] not in _BYTES:
            raise ValueError(f"{value!r} is no size; write 4096, 512MiB, 80GB or 40GiB")
        return int(Decimal(match[1]) * _BYTES[match[2]])
    return value


def nanodollars(value: Any) -> int:
    """`12.5`, `"$12.50"` → nanodollars. Raises ValueError for what is finer than a nanodollar."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("an amount is a number of US dollars, such as 12.50")
    try:
        amount = Decimal(str(value).strip().removeprefix("$").strip()) * NANO
    except InvalidOperation:
        raise ValueError(f"{value!r} is no amount of US dollars; write 12.50") from None
    if not amount.is_finite() or amount != amount.to_integral_value():
        raise ValueError(f"{value!r} is no amount of US dollars of at most nine decimals")
    return int(amount)


Seconds = Annotated[float, BeforeValidator(seconds), Field(ge=0, allow_inf_nan=False)]
"""A duration."""
Bytes = Annotated[int, BeforeValidator(size), Field(ge=0)]
"""A size."""
Dollars = Annotated[int, BeforeValidator(nanodollars), Field(ge=0)]
"""An amount of money, in nanodollars; what is written is dollars."""
