"""Whatever is in the file: a spec, or an error with a line. Never a traceback, never for ever."""

from __future__ import annotations

import re
from typing import Any

import yaml
from hypothesis import example as also
from hypothesis import given
from hypothesis import strategies as st

from penstock.cli.init import example
from penstock.spec import Spec, SpecError, loads

KEYS = sorted(set(re.findall(r"[a-z_]+", example())) | {"here", "demo", "<<", "=", "~"})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.dates(),
    st.datetimes(),
    st.binary(max_size=8),
    st.text(max_size=20),
    st.sampled_from(KEYS),
    st.sampled_from("1e999999999 -1 10m 4GiB $5 .nan 1:30:00 0x_ 0b 1_000 http://x https://a@b".split()),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), SCALARS), inner, max_size=4),
    ),
    max_leaves=20,
)
PLACE = re.compile(r"penstock\.yaml:\d+: |penstock\.yaml: and \d+ more\.")


def check(text: str) -> None:
    try:
        assert isinstance(loads(text), Spec)
    except SpecError as error:
        for line in error.message.split("\n"):
            assert PLACE.match(line), line
            assert line.isprintable(), line
            assert len(line) < 1000


@given(st.text())
@also("\ud800")
@also("a: !!timestamp x")
@also("a: !!int ''")
@also("pools: {here: {price_per_hour: 1e999999999}}")
def test_any_text(text: str) -> None:
    check(text)


@given(TREES)
def test_any_tree(tree: Any) -> None:
    check(yaml.dump(tree, allow_unicode=True))


@given(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4), SCALARS, TREES)
def test_any_value_at_a_place_that_is_known(path: list[str], key: Any, tree: Any) -> None:
    for step in reversed(path):
        tree = {step: tree, **({key: tree} if isinstance(key, str) else {})}
    check(yaml.dump(tree, allow_unicode=True))


@given(st.data())
def test_the_example_with_something_else_in_it(data: st.DataObject) -> None:
    text = example()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 30)))
        piece = data.draw(
            st.one_of(
                st.text(max_size=10),
                st.sampled_from([*KEYS, ":", "- ", "{", "]", "\n  ", "*a", "&a ", "!!set "]),
            )
        )
        text = text[:start] + piece + text[end:]
    check(text)
