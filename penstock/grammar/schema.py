"""JSON schemas before they are compiled: which of their keywords are enforced, and what cannot be written.

    schema ─ examine ─▶ the same without what has no effect, and the names of what is skipped

The tables say what llguidance enforces (tests/grammar/test_schema.py compares them with it, and its outputs
with a validator). Nothing here recurses: a schema may be as deep as its text is long."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from penstock.core.errors import InvalidRequest, UnsupportedParameter, quote

ENFORCED = frozenset(
    {
        *("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "properties", "required"),
        *("additionalProperties", "patternProperties", "minProperties", "maxProperties"),
        *("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
        *("minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
)

ANNOTATIONS = frozenset(
    {
        *("$schema", "$id", "id", "$anchor", "$comment", "$defs", "definitions", "title", "description"),
        *("default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$vocabulary"),
        *("contentEncoding", "contentMediaType", "contentSchema"),
    }
)
"""Keywords that no validator enforces."""

NOT_ENFORCED = frozenset(
    {
        *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"),
        *("propertyNames", "unevaluatedProperties", "contains", "minContains", "maxContains"),
        *("unevaluatedItems", "uniqueItems", "$dynamicRef", "$dynamicAnchor", "$recursiveRef"),
        "$recursiveAnchor",
    }
)
"""Keywords of JSON Schema that a validator enforces, and the library does not."""

FORMATS = frozenset(
    "date-time time date duration email hostname ipv4 ipv6 uuid uri unknown".split(),
)
"""Those that are enforced."""

_LEAP = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DAYS = (
    r"\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    r"|02-(?:0[1-9]|1\d|2[0-8]))"
)
_DATE = (rf"^(?:{_DAYS}|{_LEAP}-02-29)", r"^(?:[1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])-")
_TIGHTER = {
    "date": _DATE,
    "date-time": (*_DATE, r"^.{10}[Tt]\d\d:\d\d:[0-5]\d"),
    "time": (r"^\d\d:\d\d:[0-5]\d",),
}
"""What the library's formats leave out: the 29th of February is in leap years only, no year is 0, and who
reads times (validators, Python) knows no leap seconds."""

MOST_SCHEMAS = 20_000
"""Schemas in a schema."""
MOST_DEPTH = 64
"""Of objects and lists in a schema: the library's own reader ends at 128, and a Python client's may
sooner."""

_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_LOWEST, _HIGHEST, _FARTHEST_FRACTION = 2**62, 2**63 - 1, 10**15
"""Bounds of integers, downwards and upwards, and of numbers that may have a fraction, that the library can
count to."""

_NO_EFFECT: Mapping[str, tuple[object, ...]] = {
    "uniqueItems": (False,),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "propertyNames": (True, {}),
}
_CONTROL = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f]")

_IN_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_IN_PLACE = (
    *("additionalProperties", "unevaluatedProperties", "propertyNames", "additionalItems"),
    *("unevaluatedItems", "not", "if", "then", "else", "contains", "items"),
)
_IN_LISTS = ("prefixItems", "allOf", "anyOf", "oneOf", "items")


def loads(text: str, field: str) -> Any:
    """JSON. Raises InvalidRequest, naming the field."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} is no JSON: {error}.", param=field) from None


def dumps(value: object, field: str) -> str:
    """JSON, its keys in their order: that of properties is the output's. Raises InvalidRequest."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"{field} is no JSON: {error}.", param=field) from None


def examine(schema: Any, strict: bool | None, field: str) -> tuple[Any, list[str]]:
    """(a copy of the schema without what has no effect or is skipped, the names of what was skipped).

    Args:
        strict: see StructuredOutputsParams.strict.
        field: what it came from, for errors and names.

    Raises UnsupportedParameter for a keyword that cannot be enforced, and InvalidRequest for what is no
    schema, or too large; both name the place.
    """
    check_depth(schema, field)
    copied = json.loads(dumps(schema, field))
    skipped: dict[str, None] = {}
    left: list[tuple[str, Any]] = [(field, copied)]
    count = 0
    while left:
        where, each = left.pop()
        count += 1
        if count > MOST_SCHEMAS:
            raise InvalidRequest(
                f"{field} is too large: it has more than {MOST_SCHEMAS} schemas in it.", param=field
            )
        if isinstance(each, bool):
            continue
        if not isinstance(each, dict):
            raise InvalidRequest(
                f"{where} must be a JSON schema, which is an object or a boolean, got {quote(each)}.",
                param=where,
            )
        _examine_one(each, strict, where, skipped)
        left.extend((f"{where}.{inner}", below) for inner, below in subschemas(each))
    return copied, list(skipped)


def check_depth(value: Any, field: str) -> None:
    """Raise InvalidRequest for what is nested more than MOST_DEPTH levels."""
    left = [(0, value)]
    while left:
        depth, each = left.pop()
        if depth > MOST_DEPTH:
            raise InvalidRequest(
                f"{field} is nested too deeply: more than {MOST_DEPTH} levels of objects and lists.",
                param=field,
                advice="Name inner schemas in $defs, and refer to them with $ref.",
            )
        if isinstance(each, dict):
            left.extend((depth + 1, inner) for inner in each.values())
        elif isinstance(each, list):
            left.extend((depth + 1, inner) for inner in each)


def subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(where, as a path from here; what is there) of the places of a schema where schemas stand."""
    for key in _IN_MAPS:
        if isinstance(inner := schema.get(key), dict):
            yield from ((f"{key}.{name}", each) for name, each in inner.items())
    for key in _IN_PLACE:
        if isinstance(inner := schema.get(key), dict):
            yield key, inner
    for key in _IN_LISTS:
        if isinstance(inner := schema.get(key), list):
            yield from ((f"{key}.{place}", each) for place, each in enumerate(inner))


def without_more_properties(schema: Any, field: str) -> Any:
    """A copy whose objects have no properties but those that are named, where it names some and says nothing
    of others: vLLM's disable_additional_properties."""
    copied = json.loads(dumps(schema, field))
    left = [copied]
    while left:
        each = left.pop()
        if not isinstance(each, dict):
            continue
        if ("properties" in each or "patternProperties" in each) and "additionalProperties" not in each:
            each["additionalProperties"] = False
        left.extend(inner for _, inner in subschemas(each))
    return copied


def _examine_one(schema: dict[str, Any], strict: bool | None, where: str, skipped: dict[str, None]) -> None:
    """One schema without those in it; what is skipped or has no effect is taken out."""
    schema.pop("x-guidance", None)  # the library's own options
    _narrow(schema)
    for name in list(schema):
        value = schema[name]
        if name in ("const", "enum", "properties", "required"):
            _check_writable(name, value, where)
        if name in ENFORCED or name in ANNOTATIONS:
            if name == "format" and isinstance(value, str) and value not in FORMATS:
                _skip(schema, name, strict is True, f"{where}.format", skipped, f"the format {quote(value)}")
            elif name == "format" and (patterns := _TIGHTER.get(str(value))):
                _also(schema, patterns)
            elif name == "minProperties" and not _by_required(schema):
                _skip(schema, name, strict is not False, f"{where}.{name}", skipped, name)
        elif _is_neutral(schema, name, value):
            del schema[name]
        else:
            refused = strict is True or (strict is None and name in NOT_ENFORCED)
            _skip(schema, name, refused, f"{where}.{name}", skipped, name)


def _narrow(schema: dict[str, Any]) -> None:
    """Bounds that are farther away than the library counts come nearer: what is within is still valid. Those
    that leave nothing within stay, and the library refuses them."""
    whole = schema.get("type") == "integer"
    for names, others, sign in ((_LOWER, _UPPER, -1), (_UPPER, _LOWER, 1)):
        far = (_LOWEST if sign < 0 else _HIGHEST) if whole else _FARTHEST_FRACTION
        opposite: list[Any] = [schema[name] * sign for name in others if _is_number(schema.get(name))]
        for name in names:
            value: Any = schema.get(name)
            if _is_number(value) and value * sign > far and all(each < far for each in opposite):
                schema[name] = far * sign


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _also(schema: dict[str, Any], patterns: Sequence[str]) -> None:
    """Let its texts match these, too."""
    others = schema.get("allOf", [])
    if isinstance(others, list):
        schema["allOf"] = [*others, *({"pattern": each} for each in patterns)]


def _is_neutral(schema: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether a keyword that is not enforced says nothing here."""
    if name in ("then", "else"):
        return "if" not in schema
    if name in ("minContains", "maxContains"):
        return "contains" not in schema
    return any(type(value) is type(known) and value == known for known in _NO_EFFECT.get(name, ()))


def _skip(
    schema: dict[str, Any], name: str, refused: bool, place: str, skipped: dict[str, None], what: str
) -> None:
    if refused:
        raise UnsupportedParameter(
            f"{place} cannot be enforced: {what} is not supported in schemas of structured outputs.",
            param=place,
            advice="Leave it out, or set strict to false, which skips what cannot be enforced.",
        )
    del schema[name]
    skipped[place] = None


def _by_required(schema: Mapping[str, Any]) -> bool:
    """Whether `required` alone gives an object its minProperties. Beyond that, the library counts a property
    that is written twice as two."""
    wanted, required = schema["minProperties"], schema.get("required")
    count = len(set(map(str, required))) if isinstance(required, list) else 0
    return not isinstance(wanted, int | float) or wanted <= max(count, 1)


def _check_writable(name: str, value: Any, where: str) -> None:
    """Texts that an output must have are made of characters that it can have: none is escaped by a number
    (a property could be written in two ways, and be no longer the one that the schema names)."""
    left = list(value) if isinstance(value, dict) and name == "properties" else [value]
    while left:
        each = left.pop()
        if isinstance(each, str) and (found := _CONTROL.search(each)):
            raise InvalidRequest(
                f"{where}.{name} has the control character U+{ord(found[0]):04X}, which no structured output "
                "can contain.",
                param=f"{where}.{name}",
            )
        if isinstance(each, dict):
            left.extend((*each, *each.values()))
        elif isinstance(each, list):
            left.extend(each)
