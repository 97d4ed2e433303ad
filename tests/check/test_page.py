"""The page of the rules is what the rules say."""

from __future__ import annotations

from pathlib import Path

from penstock.check import rules
from penstock.check.run import subjects
from penstock.cli.check_page import render


def test_the_page_has_all_rules() -> None:
    page = Path(__file__).parents[2] / "docs" / "check.md"
    assert page.read_text(encoding="utf-8") == render(), "python -m penstock.cli.check_page > docs/check.md"


def test_each_rule_is_under_one_title() -> None:
    listed = [rule.id for _, found in subjects() for rule in found]
    assert sorted(listed) == [rule.id for rule in rules()]
    assert len(set(listed)) == len(listed)
