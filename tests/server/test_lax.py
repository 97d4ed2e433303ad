"""Values are converted as vLLM converts them: pydantic's lax mode, measured by pydantic itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from penstock.server.lax import convert

VALUES: list[Any] = [
    *(True, False, 0, 1, 2, -3, 2**70, 0.0, -0.0, 1.0, 5.0, 5.5, 1e18, -(2.0**62), 2.0**63, 1e300),
    *("5", " 5 ", "+5", "-5", "5.0", "5.00", "5.", "5.5", ".5", "1_000", "_1", "1__0", "1_", "1e3", "0x10"),
    *("1.5", " 1.5\n", "1_0.5", " 1_0", "5e-1", "inf", "-Infinity", "nan", "NaN", "٥", "0005", "-0", "- 5"),
    *("", " ", "true", "TRUE", "True", "false", "on", "Off", "yes", "NO", "t", "F", "y", "n", "1", "0", "2"),
    *(" true ", "tru", "null", "None", "9" * 30, "1,5", [], [1], {}, {"a": 1}, ["5"], ["true", 1, "x"]),
    *({"a": "5"}, {"a": []}, [[1.0, "2"], [3]], ["a", 1]),
]
KINDS: list[Any] = [
    int,
    float,
    bool,
    str,
    int | None,
    float | None,
    list[int],
    list[str],
    list[list[int]],
    dict[str, float],
    str | list[str],
]


def by_pydantic(value: Any, kind: Any) -> Any:
    """What vLLM's request would hold; the value itself where vLLM refuses it."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return value


def same(a: Any, b: Any) -> bool:
    """Equal, and of equal types all through."""
    return repr(a) == repr(b)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_table_of_values(kind: Any) -> None:
    for value in VALUES:
        wanted, got = by_pydantic(value, kind), convert(value, kind)
        try:
            TypeAdapter(kind).validate_python(got, strict=True)
        except ValidationError:  # refused by both: some entries may have been converted on the way
            assert same(wanted, value), value
        else:
            assert same(got, wanted), value


NUMERALS = st.text("0123456789_.+-eE \n\tinfaINFtrueyso٣", max_size=8)
#: pydantic-core drops leading zeros before it looks at what follows: "0-7" is -7
_QUIRK = re.compile(r"\s*[+-]?0+[-_]")


@given(NUMERALS.filter(lambda text: not _QUIRK.match(text)), st.sampled_from([int, float, bool]))
@example("1_0", int)
def test_any_text(text: str, kind: type) -> None:
    assert same(convert(text, kind), by_pydantic(text, kind))


@given(st.floats(allow_nan=False) | st.integers(-(2**62), 2**62), st.sampled_from([int, float, bool]))
def test_any_number(number: float, kind: type) -> None:
    assert same(convert(number, kind), by_pydantic(number, kind))


def test_long_texts_are_no_numbers() -> None:
    assert convert("9" * 401, int) == "9" * 401
    assert convert("9" * 100_000, float) == "9" * 100_000


def test_what_has_its_type_already_is_not_copied() -> None:
    messages: list[dict[str, Any]] = [{"role": "user"}]
    assert convert(messages, list[dict[str, Any]])[0] is messages[0]
    kwargs = {"a": ["5"]}
    assert convert(kwargs, dict[str, Any]) is kwargs
