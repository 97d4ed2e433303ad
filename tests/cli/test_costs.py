"""`penstock costs` from the command line: forms, filters, refusals; and estimates with dated prices only."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from penstock.cli.main import main
from penstock.gateway.ledger.idle import claim
from penstock.gateway.ledger.outcomes import Telling, tell
from penstock.gateway.ledger.store import Entry, Position, Store
from penstock.gateway.policy.amounts import NANO
from penstock.gateway.policy.idle import Terms
from penstock.gateway.records import Row
from tests.gateway.costs.test_evaluations import report

NOON = 1_794_700_800 * NANO
"""2026-11-15, 00:00 UTC."""
HOUR = 3600 * NANO


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Ten requests of a day on a device, and two to a cloud."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    store = Store(url)
    store.open()
    store.register("w")
    rows = [
        Row(
            id=f"r{number}",
            at=NOON + number * HOUR,
            key_id="key_1",
            key_name="alice",
            team="search",
            tags={"feature": "=rag" if number else "\x1b[31mred"},
            route="answer",
            upstream="qwen",
            model="qwen-8b",
            pool="gpu",
            status=200,
            settlement="settled",
            input_tokens=100,
            device_seconds=NANO,
            dollars=200_000,
            comparator_dollars=1_000_000,
        )
        for number in range(10)
    ]
    rows += [
        Row(
            id=f"c{number}", at=NOON + HOUR, key_id="key_2", tags={"feature": "chat"}, route="answer",
            upstream="cloud", model="large", status=200, settlement="settled", dollars=5_000_000,
        )
        for number in range(2)
    ]  # fmt: skip
    store.apply("w", [Entry(n, row, {}) for n, row in enumerate(rows)], Position(), Position(0, 1))
    claim(store, "w", {"gpu": Terms(1, 720_000_000, 1, "L4")}, {"gpu": NOON}, NOON + 24 * HOUR)
    tell(store, [Telling("r1", "success"), Telling("r2", "failure")], now=NOON + HOUR, since=0)
    store.close()
    return url


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["costs", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["costs", *arguments]) == 2
    return capsys.readouterr().err


def test_the_table_says_it_plainly(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--ledger", url)
    head, first, *_ = text.splitlines()
    assert head.split()[:2] == ["feature", "requests"]
    assert first.split()[:2] == ["=rag", "9"]
    assert "Self-hosting loses: it cost $17.28 with its idle time, and the cloud takes $0.01" in text
    assert "idle_devices ($17.28)" in text
    assert "10 requests a day" in text
    assert "\x1b" not in text


def test_json_and_csv_have_every_dollar(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads(printed(capsys, "--ledger", url, "--by", "key,model", "--format", "json"))
    assert whole["by"] == ["key_id", "key", "model"]
    assert whole["total"]["cost_dollars"] == pytest.approx(17.28 + 0.01)
    assert sum(line["cost_dollars"] for line in whole["lines"]) == pytest.approx(17.29)
    assert whole["lines"][1]["comparator_dollars"] is None
    assert [each["pool"] for each in whole["pools"]] == ["gpu"]
    rows = list(csv.DictReader(io.StringIO(printed(capsys, "--ledger", url, "--format", "csv"))))
    assert [row["feature"] for row in rows] == ["'=rag", "\x1b[31mred", "chat"]
    assert sum(float(row["cost_dollars"]) for row in rows) == pytest.approx(17.29)
    assert [row["dollars_per_success"] for row in rows[1:]] == ["", ""]


def test_an_operator_tells_outcomes_too(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    def ledger(*arguments: str) -> tuple[int, str]:
        status = main(["ledger", *arguments, "--ledger", url])
        said = capsys.readouterr()
        return status, said.out + said.err

    assert ledger("outcome", "r3", "0.50") == (0, "r3: 0.5\n")
    assert ledger("outcome", "r3", "failure") == (0, "r3: failure (before: 0.5)\n")
    assert ledger("outcome", "nobody", "success")[0] == 1
    assert "is no outcome" in ledger("outcome", "r3", "nan")[1]
    status, shown = ledger("show", "r3")
    assert status == 0
    assert [line.split(": ")[1] for line in shown.splitlines() if "by an operator" in line] == [
        "0.5",
        "failure",
    ]


def test_filters(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    def requests(*flags: str) -> int:
        whole = json.loads(printed(capsys, "--ledger", url, "--format", "json", *flags))
        return int(whole["total"]["requests"])

    assert requests("--key", "alice") == requests("--key", "key_1") == requests("--team", "search") == 10
    assert requests("--tag", "feature=chat") == requests("--model", "large") == 2
    assert requests("--since", "2026-11-15T05:00") == 5
    assert requests("--until", "2026-11-15T05:30") == 8
    assert requests("--tag", "user=nobody") == 0
    assert requests("--pool", "gpu", "--by", "day,pool") == 10


def test_the_page_is_written_to_a_file(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    assert "requests" in printed(capsys, "--ledger", url, "--html", str(out)), "beside the table"
    assert out.read_text().startswith("<!doctype html>")
    assert "cannot be written" in refused(capsys, "--ledger", url, "--output", str(tmp_path))
    assert "cannot be written" in refused(capsys, "--ledger", url, "--html", str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--by", "user"], "there is no user"),
        (["--by", "key,key"], "one stands twice"),
        (["--since", "yesterday"], "is no time"),
        (["--since", "2026-11-16", "--until", "2026-11-15"], "is after"),
        (["--tag", "feature"], "is not TAG=VALUE"),
        (["--top", "0"], "1 or more"),
    ],
)
def test_refusals(url: str, flags: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert what in refused(capsys, "--ledger", url, *flags)


LOAD = ["--input-tokens", "500", "--output-tokens", "150", "--tokens-per-second", "2500"]
GPU = ["--gpu-price", "0.71", "--gpu-as-of", "2026-11-01", "--gpu-source", "a price list"]
API = [
    "--cloud-input",
    "0.5",
    "--cloud-output",
    "1.5",
    "--cloud-as-of",
    "2026-11-01",
    "--cloud-source",
    "theirs",
]
SPEC = """
pools:
  gpu: {hardware: L4, price_per_hour: 0.71, price_as_of: 2026-11-01, price_source: a price list}
  undated: {hardware: L4, price_per_hour: 0.71}
upstreams:
  cloud:
    url: https://api.example.com/v1
    models:
      large: {price: {input: 0.5, output: 1.5, as_of: 2026-11-01, source: theirs, batch: 0.5}}
      free: {}
routes: {r: {targets: [{model: large, upstream: cloud}]}}
"""


def test_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "estimate", *LOAD, *GPU, *API, "--requests-per-day", "50000")
    assert "$0.71 an hour (a price list, 2026-11-01)" in text
    assert "negative: depreciation exceeds the API bill" in text
    assert "much cheaper" in text
    assert "50,000/day *" in text
    assert "Break-even: a utilization of 10.8 %, 35,874 requests a day" in text
    whole = json.loads(printed(capsys, "estimate", *LOAD, *GPU, "--json"))
    assert whole["cloud_price"] is whole["break_even_utilization"] is None
    assert all(case["saving"] is None for case in whole["by_requests"])


def test_prices_of_a_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "penstock.yaml"
    spec.write_text(SPEC)
    given = ["estimate", *LOAD, "--spec", str(spec)]
    text = printed(capsys, *given, "--pool", "gpu", "--cloud", "cloud/large")
    assert "Break-even: a utilization of 10.8 %" in text
    assert "batches (50.0 % of the price): 21.6 %" in text
    assert "has no dated price" in refused(capsys, *given, "--pool", "undated")
    assert "There is no pool x" in refused(capsys, *given, "--pool", "x")
    assert "There are cloud/free, cloud/large." in refused(capsys, *given, "--pool", "gpu", "--cloud", "x")
    assert "has no price" in refused(capsys, *given, "--pool", "gpu", "--cloud", "cloud/free")
    assert "are two prices" in refused(capsys, *given, "--pool", "gpu", "--gpu-price", "1")


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ([], "--input-tokens is missing"),
        ([*LOAD], "--gpu-price is missing"),
        ([*LOAD, *GPU[:2]], "--gpu-as-of is missing. A price without a date and a source is none"),
        ([*LOAD, *GPU[:4]], "--gpu-source is missing"),
        ([*LOAD, *GPU, *API[:4]], "--cloud-as-of is missing"),
        ([*LOAD, *GPU, *API[:2]], "--cloud-output is missing"),
        ([*LOAD, *GPU[:2], "--gpu-as-of", "lately", "--gpu-source", "x"], "is no date"),
        ([*LOAD, "--gpu-price", "0", *GPU[2:]], "more than nothing"),
        ([*LOAD, "--gpu-price", "nan", *GPU[2:]], "--gpu-price"),
        ([*LOAD[:4], "--tokens-per-second", "0", *GPU], "no number over 0"),
        ([*LOAD[:4], "--tokens-per-second", "1e999999999", *GPU], "no number over 0"),
        ([*LOAD, *GPU, "--most-utilization", "1.1"], "is over 1"),
        (["--input-tokens", "-1", *LOAD[2:], *GPU], "one token at least"),
        ([*LOAD, *GPU, "--devices", "0"], "one at least"),
        (["--input-tokens", "1" + 320 * "0", *LOAD[2:], *GPU], "at most 1,000,000,000 tokens"),
    ],
)
def test_estimates_that_cannot_be(flags: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert what in refused(capsys, "estimate", *flags)


def test_a_cloud_that_takes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "penstock.yaml"
    file.write_text(
        "upstreams:\n  cloud:\n    url: http://127.0.0.1:9/v1\n    models:\n      gift:\n"
        "        price: {input: 0, output: 0, as_of: 2026-11-01, source: their word}\n"
    )
    said = refused(capsys, "estimate", *LOAD, *GPU, "--spec", str(file), "--cloud", "cloud/gift")
    assert "takes nothing for such a request" in said


def test_the_case_study(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "estimate", "--case-study")
    assert text.count("does not hold") == 8
    assert "$60,000" in text
    own = printed(capsys, "estimate", "--case-study", *GPU[:1], "2", *GPU[2:])
    assert "at $2.00: $11,680" in own
    assert "(a price list, 2026-11-01)" in own
    assert "has no date" not in own
    whole = json.loads(printed(capsys, "estimate", "--case-study", "--json"))
    assert [each["holds"] for each in whole["checks"]] == [False] * 8


def test_evaluations_say_what_a_smaller_model_would_save(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = report(tmp_path)
    told = json.loads(path.read_text())
    told["baseline"]["about"]["model"], told["candidates"][0]["about"]["model"] = "large", "qwen-8b"
    path.write_text(json.dumps(told))
    text = printed(capsys, "--ledger", url, "--evals", str(path))
    assert "large_model ($0.0075): Model large: 2 requests to large cost $0.01." in text
    found = json.loads(printed(capsys, "--ledger", url, "--evals", str(tmp_path), "--format", "json"))
    assert [each["dollars"] for each in found["findings"] if each["subject"] == "model large"] == [0.0075]
    assert "none.json cannot be read" in refused(
        capsys, "--ledger", url, "--evals", str(tmp_path / "none.json")
    )
