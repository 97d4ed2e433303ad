"""The page needs nothing from anywhere, and says what the plan says."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from penstock.fleet.page import page
from penstock.fleet.plan import plan
from penstock.fleet.prices import Cloud
from penstock.fleet.record import record
from penstock.fleet.table import count, money, ms, render
from tests.fleet.asking import ask

DOLLAR = 10**9
_VOID = {"meta", "link", "br", "img"}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    question = ask(
        "qwen3-32b", "A100-80GB", rate=2, scheme="int8", cloud=Cloud(DOLLAR, 4 * DOLLAR, name="<big> cloud")
    )
    return record(plan([question]))


class _Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_is_whole_and_asks_nobody(made: dict[str, Any]) -> None:
    parser = _Balance()
    text = page(made)
    parser.feed(text)
    assert parser.open == []
    assert parser.links == []
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_each_chart_is_xml_with_a_name_and_marks_that_say_what_they_are(made: dict[str, Any]) -> None:
    charts = re.findall(r"<svg.*?</svg>", page(made), re.DOTALL)
    assert len(charts) == 3
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.get("aria-label")
        assert root.findall(".//title")


def test_names_are_escaped(made: dict[str, Any]) -> None:
    assert "<big>" not in page(made)
    assert "&lt;big&gt; cloud" in page(made)


def test_bars_are_as_long_as_what_they_stand_for(made: dict[str, Any]) -> None:
    chart = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", page(made), re.DOTALL)[0])
    memory = made["models"][0]["memory_per_device"]
    widths = {rect.get("class"): float(rect.get("width") or 0) for rect in chart.iter("rect")}
    assert widths["rest"] == 640
    assert widths["weights"] == pytest.approx(640 * memory["weights"] / memory["total"] - 2, abs=0.1)
    assert widths["kv"] == pytest.approx(640 * memory["kv_cache"] / memory["total"] - 2, abs=0.1)


def test_table_and_page_say_the_same(made: dict[str, Any]) -> None:
    shown, drawn = render(made), page(made)
    costs = made["models"][0]["costs"]
    for value in (money(costs["dollars_per_hour"]), money(costs["dollars_per_thousand_requests"])):
        assert value in shown
        assert value in drawn
    for name, value in made["models"][0]["flags"].items():
        assert f"{name} {value}" in shown
        assert f"{name} {value}" in drawn


@pytest.mark.parametrize(
    ("value", "text"), [("0.05", "$0.05"), ("3.99", "$3.99"), ("2504.5", "$2,504"), ("0", "$0.00")]
)
def test_money(value: str, text: str) -> None:
    assert money(value) == text


def test_numbers() -> None:
    assert count(6_738_415_616) == "6.74B"
    assert ms(0.0123) == "12.3 ms"
    assert ms(2.5) == "2.5 s"
