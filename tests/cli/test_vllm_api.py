"""docs/api.md: every endpoint and field of vLLM 0.32, and what happens with each."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cli.vllm_api import ALIKE, ELSEWHERE, FIELDS, SERVED, SHAPES, fate, section
from penstock.server.app import ROUTES, TOKENIZER_INFO

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
HERE = {path.replace("{name}", "{response_id}") for path, _, _ in (*ROUTES, TOKENIZER_INFO)}


def test_the_page_has_it() -> None:
    assert section() in PAGE.read_text(), "put what `python -m penstock.cli.vllm_api` prints into docs/api.md"


def test_what_is_here_is_here_and_nothing_else() -> None:
    assert {*FIELDS, *SERVED, *(path for paths in ALIKE.values() for path in paths)} <= HERE
    assert SHAPES.keys() == FIELDS.keys()
    assert not HERE & {path for _, paths in ELSEWHERE for path in paths.split()}


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_has_a_fate(path: str) -> None:
    names = FIELDS[path].split()
    assert len(set(names)) == len(names)
    assert [name for name in names if fate(path, name) == "unknown"] == []
