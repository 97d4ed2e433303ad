"""The page of a report: one file without network or scripts, with every line, and with no client's markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from penstock.gateway.costs import charts, patterns
from penstock.gateway.costs.charts import Bar
from penstock.gateway.costs.page import page
from penstock.gateway.costs.read import Found
from penstock.gateway.costs.report import PoolUse, build
from penstock.gateway.ledger.rollups import DAY
from penstock.gateway.ledger.schema import MEASURES

EVIL = '"><script src=https://evil.example/x.js></script>\x1b[31m\u202e'
VOID = {"meta", "rect", "br"}


class Reader(HTMLParser):
    """Tags that are open, and everything that would fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def report(*names: str | None, days: int = 2) -> Found:
    groups = {
        (number % days * DAY, name, "gpu"): {
            **dict.fromkeys(MEASURES, 1), "dollars": 10**9 * (number + 1), "device_seconds": 5, "requests": 3,
        }
        for number, name in enumerate(names)
    }  # fmt: skip
    pools = [
        PoolUse(pool="gpu", day=day * DAY, paid=9 * 10**9, charged=10**9, device_seconds=5 * len(names))
        for day in range(days)
    ]
    built = build(["day", "feature"], groups, pools, span=pools[:1], names=MEASURES)
    seen = patterns.Seen({}, {("k", EVIL): dict.fromkeys(MEASURES, 3)})
    return Found(built, seen, 2.0)


def read(found: Found, top: int = 50) -> tuple[Reader, str]:
    said = list(patterns.verdicts(found.report, found.days))
    findings = patterns.find(found.report, found.seen, found.days)
    text = page(found, said, ["a remark <b>"], findings, now=10**18, top=top)
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader, text


def test_it_is_one_file_that_asks_nobody() -> None:
    reader, text = read(report("a", "b", EVIL, None))
    assert reader.fetched == []
    assert not reader.seen & {"script", "link", "img", "iframe", "object", "b>"}
    assert not re.search(r"url\(|@import|javascript:", text)
    assert "default-src 'none'" in text
    assert text.count("unsafe-inline") == 1, "in the policy, and not as text of the page"
    assert any("2 days of the ledger" in each for each in reader.text)
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text
    assert "svg" in reader.seen


def test_what_clients_wrote_is_text() -> None:
    reader, text = read(report("a", EVIL))
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert any("script src=https://evil.example" in each for each in reader.text)


def test_lines_are_few_and_the_rest_is_one_more() -> None:
    found = report(*(f"f{number}" for number in range(30)))
    _, text = read(found, top=5)
    assert text.count("<tr") == 1 + 5 + 1 + 1  # heads, lines, others, total
    assert "(25 others)" in text
    assert "<b>$473.00</b>" in text  # 465 charged; of 16 idle half, as others have used the pool, too


def test_nothing_is_said_to_be_nothing() -> None:
    empty = Found(build(["feature"], {}, [], names=MEASURES), patterns.Seen(), 0.0)
    _, text = read(empty)
    assert "No request of the ledger fits." in text


def test_bars_fit_their_chart() -> None:
    drawn = charts.rows([Bar("a", (1.0, 2.0), "t", 5.0), Bar("b", (0.0, 0.0), "t")], ("x", "y"), "about")
    widths = re.findall(r'class="[xy]" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)
    assert widths == [("0.00", "200.00"), ("200.00", "400.00")]
    assert 'class="mark" x="996.00"' in drawn
    columns = charts.columns([Bar("a", (1.0, 3.0), "t"), Bar("b", (2.0, 0.0), "t")], ("x", "y"), "about")
    heights = re.findall(r'class="[xy]" .*?height="([\d.]+)"', columns)
    assert heights == ["25.00", "75.00", "50.00"]
    assert charts.rows([], ("x",), "about").endswith("</div>")
