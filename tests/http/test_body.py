"""JSON from clients: nesting is bounded before anything recurses over it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import InvalidRequest
from penstock.http import body
from penstock.http.body import MAX_DEPTH, NotJson, parse_json, parse_object

#: brackets, quotes and escapes, where they open and close nothing
TEXT = st.text(alphabet='[]{}"\\é,:', max_size=4)
JSON = st.recursive(
    st.none() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=40,
)


def depth(value: Any) -> int:
    """Arrays and objects within one another, as anyone would count them."""
    if not isinstance(value, list | dict):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


@given(value=JSON, ascii=st.booleans(), indent=st.none() | st.just(1), most=st.integers(0, 6))
def test_depth_is_that_of_the_value(value: Any, ascii: bool, indent: int | None, most: int) -> None:
    data = json.dumps(value, ensure_ascii=ascii, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body, "MAX_DEPTH", most)
        if depth(value) > most:
            with pytest.raises(NotJson, match=f"nested too deeply, over {most} levels"):
                parse_json(data)
        else:
            assert parse_json(data) == value


@pytest.mark.parametrize(("opens", "closes"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"\\\\\\"[":', b"}]")])
def test_the_border(opens: bytes, closes: bytes) -> None:
    times = (MAX_DEPTH - 1) // len(closes)
    assert parse_object(b'{"a":%s1%s}' % (opens * times, closes * times))["a"]
    times += 1
    with pytest.raises(InvalidRequest, match="nested too deeply, over 64 levels") as caught:
        parse_object(b'{"a":%s1%s}' % (opens * times, closes * times))
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    "data", [b"[" * 5000, b'{"a":' * 5000, b'"\\"' + b"[" * 5000, b"]" * 5000, b'\\"[' * 90]
)
def test_brackets_that_nothing_closes(data: bytes) -> None:
    with pytest.raises(NotJson):
        parse_json(data)
