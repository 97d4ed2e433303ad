"""Where a JSON value ends, compared with the decoder."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.text.parsers.json_value import JsonScanner

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def scan(text: str, step: int) -> JsonScanner:
    scanner = JsonScanner()
    for end in [*range(step, len(text), step), len(text)]:
        scanner.run(text[:end])
    return scanner


@given(
    value=VALUES,
    indent=st.sampled_from([None, 0, 2]),
    ascii=st.booleans(),
    step=st.integers(1, 7),
    rest=st.text(),
)
@settings(derandomize=True, max_examples=300, deadline=None, database=None)
def test_the_end_of_a_value(value: Any, indent: int | None, ascii: bool, step: int, rest: str) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii)
    scanner = scan(f"{text} {rest}", step)
    assert (scanner.done, scanner.broken, scanner.at) == (True, False, len(text))


@given(
    value=VALUES,
    place=st.integers(0, 500),
    put=st.sampled_from('{}[]",:\\0-.eEtx \n'),
    step=st.integers(1, 5),
)
@settings(derandomize=True, max_examples=500, deadline=None, database=None)
def test_what_is_no_json(value: Any, place: int, put: str, step: int) -> None:
    """One character exchanged: whatever the decoder takes, the scanner takes to the same end, and the
    reverse."""
    text = json.dumps(value)
    place %= len(text)
    text = text[:place] + put + text[place + 1 :]
    try:
        _, end = json.JSONDecoder(strict=False, parse_constant=_refuse).raw_decode(text.lstrip(" \n\r\t"))
        end += len(text) - len(text.lstrip(" \n\r\t"))
    except ValueError:
        end = None
    scanner = scan(text + "\n", step)
    if end is None:
        assert not scanner.done or not _decodes(text[: scanner.at])
    elif scanner.done:
        assert scanner.at == end or text[end : scanner.at].strip("+-.0123456789eEtrufalsn") == ""
    else:  # "1x" begins with a number to the decoder; to a stream it is none
        assert scanner.broken
        assert text[end : end + 1] in set("+-.eEtx0123456789truefalsn")


def _decodes(text: str) -> bool:
    """Escapes are the one thing that a scanner leaves to the decoder."""
    try:
        json.loads(text, strict=False)
    except ValueError as error:
        return "escape" not in str(error)
    return True


def _refuse(name: str) -> Any:
    raise ValueError(name)


@pytest.mark.parametrize("text", ["[" * 64 + "]" * 64, '{"a":' * 64 + "1" + "}" * 64])
def test_depth_is_bounded(text: str) -> None:
    assert scan(text, 3).done
    assert scan(f"[{text}]", 3).broken
