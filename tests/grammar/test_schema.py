"""Which keywords of a schema are enforced, and what becomes of the others."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import InvalidRequest, UnsupportedParameter
from penstock.core.structured import StructuredOutputsParams
from penstock.grammar.compiler import Compiler
from penstock.grammar.prepare import prepare
from penstock.grammar.schema import (
    ANNOTATIONS,
    ENFORCED,
    FORMATS,
    MOST_DEPTH,
    NOT_ENFORCED,
    examine,
    without_more_properties,
)

from .conftest import Judge

Make = Callable[..., Judge]

#: Keyword → a schema of it, a value that meets it, and one that does not.
WITNESSES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "type": ({"type": "string"}, "a", 1),
    "enum": ({"enum": ["a", {"b": [1]}]}, {"b": [1]}, "c"),
    "const": ({"const": {"a": 1}}, {"a": 1}, {"a": 2}),
    "anyOf": ({"anyOf": [{"type": "string"}, {"type": "null"}]}, None, 1),
    "oneOf": ({"oneOf": [{"type": "string"}, {"type": "null"}]}, None, 1),
    "allOf": ({"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 4}]}, 3, 5),
    "$ref": ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}}, "x", 1),
    "properties": ({"properties": {"a": {"type": "null"}}, "type": "object"}, {"a": None}, {"a": 1}),
    "required": ({"required": ["a"], "type": "object"}, {"a": 1}, {}),
    "additionalProperties": ({"type": "object", "additionalProperties": False}, {}, {"a": 1}),
    "patternProperties": (
        {"patternProperties": {"^a": {"type": "null"}}, "type": "object"},
        {"ab": None},
        {"ab": 1},
    ),
    "minProperties": ({"minProperties": 1, "type": "object"}, {"a": 1}, {}),
    "maxProperties": ({"maxProperties": 1, "type": "object"}, {"a": 1}, {"a": 1, "b": 2}),
    "items": ({"type": "array", "items": {"type": "null"}}, [None], [1]),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "null"}]}, [None, 1], [1]),
    "additionalItems": ({"type": "array", "items": [{}], "additionalItems": False}, [1], [1, 2]),
    "minItems": ({"type": "array", "minItems": 2}, [1, 2], [1]),
    "maxItems": ({"type": "array", "maxItems": 1}, [1], [1, 2]),
    "minLength": ({"type": "string", "minLength": 2}, "ab", "a"),
    "maxLength": ({"type": "string", "maxLength": 1}, "é", "ab"),
    "pattern": ({"type": "string", "pattern": "^[À-ÿ]+$"}, "éü", "e"),
    "format": ({"type": "string", "format": "date"}, "2024-02-29", "2023-02-29"),
    "minimum": ({"type": "number", "minimum": -1.5}, -1.5, -1.75),
    "maximum": ({"type": "integer", "maximum": 10}, 10, 11),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 0}, 1, 0),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 1}, 0.5, 1),
    "multipleOf": ({"type": "integer", "multipleOf": 3}, 9, 10),
}


def test_there_is_a_witness_for_every_keyword() -> None:
    assert set(WITNESSES) == ENFORCED
    assert not ENFORCED & ANNOTATIONS
    assert not NOT_ENFORCED & (ENFORCED | ANNOTATIONS)


@pytest.mark.parametrize("keyword", sorted(ENFORCED))
def test_enforced_keywords_are(judge: Make, keyword: str) -> None:
    schema, right, wrong = WITNESSES[keyword]
    judged = judge(json=schema, strict=True)
    assert judged.takes(json.dumps(right, ensure_ascii=False))
    assert not judged.takes(json.dumps(wrong, ensure_ascii=False))


#: Values with which they would say something.
SAYING = {
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {"a": {"required": ["b"]}},
    "dependencies": {"a": ["b"]},
    "if": {"required": ["a"]},
    "$dynamicRef": "#a",
    "$recursiveRef": "#",
}


@pytest.mark.parametrize("keyword", sorted(NOT_ENFORCED))
def test_keywords_that_are_not_enforced_are_named(judge: Make, keyword: str) -> None:
    inner = {"type": "object", keyword: SAYING.get(keyword, {"type": "null"})}
    if keyword in ("then", "else"):
        inner["if"] = {}
    if keyword in ("minContains", "maxContains"):
        inner["contains"] = {}
    schema = {"properties": {"x": inner}}
    for strict in (True, None):
        with pytest.raises(
            UnsupportedParameter, match=r"json\.properties\.x\.\S+ cannot be enforced"
        ) as caught:
            judge(json=schema, strict=strict)
        named = (caught.value.param or "").rpartition(".")[2]
        assert named == keyword or {named, keyword} & {"if", "contains"}
    lenient = judge(json=schema, strict=False)
    assert f"structured_outputs.json.properties.x.{keyword}" in lenient.skipped
    assert lenient.takes('{"x": {}}')


@pytest.mark.parametrize(
    "schema",
    [
        {"uniqueItems": False},
        {"propertyNames": True},
        {"dependentRequired": {}},
        {"then": {}},
        {"unevaluatedProperties": {}},
        {"minContains": 0},
    ],
)
def test_what_says_nothing_is_nothing(schema: dict[str, Any]) -> None:
    assert examine(schema, True, "s") == ({}, [])


def test_unknown_keywords() -> None:
    schema = {"type": "string", "x-order": 3}
    with pytest.raises(UnsupportedParameter, match=r"s\.x-order"):
        examine(schema, True, "s")
    for strict in (None, False):
        assert examine(schema, strict, "s") == ({"type": "string"}, ["s.x-order"])
    # a property of that name is no keyword, and nor is one in an example
    fine = {"properties": {"not": {}}, "examples": [{"uniqueItems": True}], "enum": [{"not": 1}]}
    assert examine(fine, True, "s") == (fine, [])


def test_formats(judge: Make) -> None:
    for name in sorted(FORMATS):
        judge(json={"type": "string", "format": name}, strict=True)
    with pytest.raises(UnsupportedParameter, match=r"format 'banana'"):
        judge(json={"format": "banana"}, strict=True)
    assert judge(json={"format": "banana"}).skipped == ["structured_outputs.json.format"]
    times = judge(json={"type": "string", "format": "date-time"})
    assert times.takes('"2024-02-29T23:59:59.5+02:00"')
    assert not times.takes('"2024-02-29T23:59:60Z"')  # RFC 3339 has it, datetime.fromisoformat does not


@pytest.mark.parametrize("year", [1, 4, 100, 1900, 1999, 2000, 2023, 2024, 9999])
def test_dates_are_those_of_the_calendar(judge: Make, year: int) -> None:
    judged = judge(json={"type": "string", "format": "date"})
    for month in (1, 2, 4, 12):
        for day in (28, 29, 30, 31):
            try:
                exists = bool(date(year, month, day))
            except ValueError:
                exists = False
            assert judged.takes(f'"{year:04}-{month:02}-{day:02}"') == exists
    assert not judged.takes('"0000-01-01"')


def test_a_property_is_written_in_one_way(judge: Make) -> None:
    """Else it could be hidden from its schema: a reader takes the last of two."""
    judged = judge(json={"type": "object", "properties": {"a": {"type": "null"}, "x/y": {"type": "null"}}})
    assert judged.takes('{"a": null, "x/y": null, "more": 1}')
    for hidden in (r'{"\u0061": 1}', r'{"x\/y": 1}', '{"a": null, "a": 1}', '{"more": 1, "a": 1}'):
        assert not judged.takes(hidden)
    with pytest.raises(InvalidRequest, match=r"U\+0001"):
        judge(json={"properties": {"\x01": {}}})
    with pytest.raises(InvalidRequest, match=r"U\+0000"):
        judge(json={"enum": [["a", {"b": "\x00"}]]})
    with pytest.raises(UnsupportedParameter, match="minProperties"):  # {"a": 1, "a": 1} has one
        judge(json={"type": "object", "minProperties": 2})


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        (nested(MOST_DEPTH + 1), "nested too deeply"),
        ({"properties": {str(i): {} for i in range(20_001)}}, "too large"),
        ({"items": 3, "properties": {"a": 7}}, "must be a JSON schema"),
    ],
)
def test_what_is_no_schema_or_too_much_of_one(schema: Any, what: str) -> None:
    with pytest.raises(InvalidRequest, match=what):
        examine(schema, False, "s")


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"$ref": "#"}, "no output can match"),
        ({"$ref": "#/$defs/x"}, "does not exist"),
        ({"$ref": "https://example.com/x"}, "not present"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "strin"}, "strin"),
        ({"enum": []}, "empty"),
        ({"pattern": "(?=a)b"}, "look-around"),
        ({"pattern": "("}, "unclosed"),
        ({"properties": []}, "properties"),
        (False, "empty"),
        ({"enum": [f"{i}_{i}" for i in range(60_000)], "pattern": "1{50,900}.{90}"}, "large|big|limit|match"),
        ({"enum": [f"{i}" for i in range(200_000)]}, "characters"),
        (
            {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for i in range(12)]} for j in range(9)]},
            "large",
        ),
        ({"oneOf": [{"maxLength": 3}, {"minLength": 2}]}, "oneOf"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(judge: Make, schema: Any, what: str) -> None:
    with pytest.raises(InvalidRequest, match=what) as caught:
        judge(json=schema)
    assert "<" not in str(caught.value)  # nothing of the library's state


def test_what_the_field_gets_wrong(judge: Make) -> None:
    tree = judge(
        json={
            "$defs": {
                "t": {
                    "type": "object",
                    "properties": {"c": {"type": "array", "items": {"$ref": "#/$defs/t"}}},
                }
            },
            "$ref": "#/$defs/t",
        }
    )
    deep = '{"c": [' * 60 + "{}" + "]}" * 60
    assert tree.takes(deep)
    many = judge(json={"enum": [f"value {i}" for i in range(20_000)]})
    assert many.takes('"value 19999"')
    assert not many.takes('"value 20000"')
    for low, high in ((-(2**63), 2**63 - 1), (-(10**30), 10**40), (0, 2**64)):
        huge = judge(json={"type": "integer", "minimum": low, "maximum": high})
        assert huge.takes(str(max(low, -(2**62))))
        assert huge.takes(str(min(high, 2**63 - 1)))
        assert not huge.takes(str(low - 1))
        assert not huge.takes(str(high + 1))
    wide = judge(json={"type": "number", "minimum": -1e300, "exclusiveMaximum": 1e20})
    assert wide.takes("-123456789012345.5")
    with pytest.raises(InvalidRequest, match="range"):
        judge(json={"type": "integer", "minimum": 2**64})
    small = judge(json={"type": "number", "exclusiveMinimum": 0, "maximum": 1e-3})
    assert small.takes("0.001")
    assert not small.takes("0.0")
    assert not small.takes("0.0011")
    words = judge(json={"type": "string", "pattern": r"^\p{Lu}\p{Ll}+$"})
    assert words.takes('"Österreich"')
    assert not words.takes('"österreich"')
    both = judge(
        json={
            "type": "object",
            "properties": {"ab": {"type": "string"}},
            "patternProperties": {"^a": {"maxLength": 1}},
            "additionalProperties": {"type": "integer"},
        }
    )
    assert both.takes('{"ab": "x", "b": 1}')
    assert not both.takes('{"ab": "xy"}')
    assert not both.takes('{"ac": 1, "b": "x"}')


def test_no_more_properties() -> None:
    schema = {"type": "object", "properties": {"a": {"properties": {}}, "b": {"additionalProperties": True}}}
    done = without_more_properties(schema, "s")
    assert done["additionalProperties"] is False
    assert done["properties"]["a"] == {"properties": {}, "additionalProperties": False}
    assert done["properties"]["b"] == {"additionalProperties": True}
    assert "additionalProperties" not in schema


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
KEYWORDS = st.sampled_from(sorted(ENFORCED | NOT_ENFORCED | ANNOTATIONS))


@settings(max_examples=25)
@given(st.recursive(JSON, lambda inner: st.dictionaries(KEYWORDS, inner, max_size=3), max_leaves=12))
def test_anything_is_a_schema_or_an_invalid_request(compiler: Compiler, schema: Any) -> None:
    for strict in (True, None, False):
        with contextlib.suppress(InvalidRequest):
            compiler.compile(prepare(StructuredOutputsParams(json=schema, strict=strict))[0])
