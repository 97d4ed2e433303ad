"""Numbers and JSON in answers. Pure; sizes are bounded, and what takes long is ended by `worker`."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Literal

_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,4}(?!\d))?"
)
_LONGEST = 400
"""Characters of a number."""
_FENCE = re.compile(r"\s*```[\w-]*[ \t]*\n(.*)\n\s*```\s*", re.DOTALL)


def read_number(value: Any) -> Decimal | None:
    """A number as JSON or text has it, exactly; None if it is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, int) and value.bit_length() > 1024:
        return None
    text = str(value).strip()
    if len(text) > _LONGEST or not text.isascii():
        text = text.replace("−", "-")
        if len(text) > _LONGEST:
            return None
    if isinstance(value, str) and _NUMBER.fullmatch(text) is None:
        return None
    try:
        number = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() and abs(number.adjusted()) < 1000 else None


def pick_number(answer: str, pick: Literal["last", "first", "only"]) -> Decimal | None:
    """The number of an answer that counts: `1,234.5`, `-3`, `−3`, `6.02e23`. None if there is none."""
    if pick == "only":
        return read_number(answer)
    found = None
    for match in _NUMBER.finditer(answer):
        number = read_number(match[0])
        if number is not None:
            found = number
            if pick == "first":
                break
    return found


def is_near(number: Decimal, expected: Decimal, absolute: float, relative: float) -> bool:
    """|number - expected| <= max(absolute, relative * |expected|), without rounding."""
    distance = abs(Fraction(number) - Fraction(expected))
    return distance <= max(Fraction(str(absolute)), Fraction(str(relative)) * abs(Fraction(expected)))


def grade_numeric(
    answer: str,
    expected: tuple[Any, ...],
    absolute: float,
    relative: float,
    pick: Literal["last", "first", "only"],
) -> tuple[float, str]:
    """(score, why)."""
    number = pick_number(answer, pick)
    if number is None:
        return 0.0, "there is no number in it" if pick != "only" else "it is no number"
    wanted = [read for value in expected if (read := read_number(value)) is not None]
    if any(is_near(number, value, absolute, relative) for value in wanted):
        return 1.0, f"{number}"
    return 0.0, f"{number}, and {' or '.join(str(value) for value in wanted[:3])} was expected"


def check_schema(schema: dict[str, Any] | bool) -> None:
    """Raises ValueError for what is no JSON Schema."""
    import jsonschema

    kind = _dialect(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"the schema is none: {error.message[:200]}") from None
    except RecursionError:
        raise ValueError("the schema is nested too deeply") from None


def grade_json(
    answer: str, schema: dict[str, Any] | bool, expected: tuple[Any, ...], *, fenced: bool
) -> tuple[float, str]:
    """(score, why). References of a schema lead to its own parts only: nothing is fetched."""
    import jsonschema
    import referencing
    from referencing.exceptions import Unresolvable

    if fenced and (match := _FENCE.fullmatch(answer)):
        answer = match[1]
    try:
        value = json.loads(answer, parse_constant=_refuse)
    except RecursionError:
        return 0.0, "it is nested too deeply"
    except ValueError as error:
        return 0.0, f"it is not JSON: {error}"
    validator = _dialect(schema)(schema, registry=referencing.Registry())
    try:
        fault = next(iter(validator.iter_errors(value)), None)
    except RecursionError:
        return 0.0, "it is nested too deeply"
    except Unresolvable as unresolvable:
        raise ValueError(f"the schema refers to something outside of it: {unresolvable}") from None
    except jsonschema.exceptions.UnknownType as unknown:
        raise ValueError(f"the schema has a type that is none: {unknown.type}") from None
    if fault is not None:
        return 0.0, f"{fault.json_path}: {fault.message}"
    if expected and not any(same_json(value, each) for each in expected):
        return 0.0, "valid, and another value than expected"
    return 1.0, "valid"


def same_json(left: Any, right: Any) -> bool:
    """Equal as JSON: 1 and 1.0 are, 1 and true are not; members have no order."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(
            same_json(value, right[key]) for key, value in left.items()
        )
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    return bool(left == right)


def _dialect(schema: dict[str, Any] | bool) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for

    return validator_for(schema, default=Draft202012Validator)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
