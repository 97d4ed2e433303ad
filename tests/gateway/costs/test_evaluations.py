"""Evaluations say where a smaller model would do, with what the ledger's own requests would have cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import StartupError
from penstock.evaluate.answer import Answer
from penstock.evaluate.result import Comparison, Result, SideResult, spent
from penstock.evaluate.sides import Price
from penstock.evaluate.statistics import Pair, compare
from penstock.gateway.costs.evaluations import Evaluation, read
from penstock.gateway.costs.findings import Finding

from .test_patterns import DOLLAR, feature, only
from .test_patterns import found as found_in

BIG, SMALL = "Qwen/Qwen3-32B", "Qwen/Qwen3-8B"


def side(name: str, model: str, price: int | None, *flags: str) -> SideResult:
    answers = [
        Answer(
            text="x", finish_reason="stop", latency=10**9, prompt_tokens=100, completion_tokens=20,
            device_time=10**9, asked_at=1_795_000_000.0, concurrency=1,
        )
        for _ in range(400)
    ]  # fmt: skip
    about = {"model": model, **({"flags": list(flags)} if flags else {})}
    took = spent(answers, Price() if price is None else Price(device_hour=price * 3600))
    return SideResult(name=name, about=about, price="", score=0.9, asked=400, cached=0, spent=took, down=None)


def report(
    tmp_path: Path,
    right: int = 390,
    prices: tuple[int | None, int | None] = (40_000, 10_000),
    *,
    of: str = "set.jsonl",
    stopped: str | None = None,
    flags: tuple[str, ...] = (),
) -> Path:
    """As `penstock eval --output-json` writes it: of 400 examples the baseline has 390 right, and the
    candidate `right` of the same."""
    pairs = [Pair(float(number < 390), float(number < right)) for number in range(400)]
    finding = compare(pairs, margin=0.02)
    result = Result(
        set=of, sha256="0", examples=400, skipped=(), margin=0.02, confidence=0.95,
        baseline=side("baseline", BIG, prices[0]),
        candidates=[side("candidate", BIG if flags else SMALL, prices[1], *flags)],
        comparisons=[Comparison("candidate", finding, {}, (), ())], stopped=stopped,
    )  # fmt: skip
    path = tmp_path / "report.json"
    path.write_text(json.dumps(result.as_json()))
    return path


def found(evaluations: list[Evaluation], *features: Any) -> list[Finding]:
    return [each for each in found_in(*features, evaluations=evaluations) if each.kind == "large_model"]


TRAFFIC = (
    feature("chat", "r", "u", BIG, requests=600, dollars=30 * DOLLAR, input_tokens=500_000),
    feature(
        "support", "r", "u", "/weights/Qwen3-32B", requests=400, dollars=10 * DOLLAR, input_tokens=100_000
    ),
)


def test_a_smaller_model_that_passes_saves_its_share_of_what_the_ledger_says(tmp_path: Path) -> None:
    evaluations = read(report(tmp_path))
    one = only(found(evaluations, *TRAFFIC), "large_model")
    assert (one.subject, one.dollars) == (f"model {BIG}", 30 * DOLLAR)  # three quarters of 40
    assert f"1,000 requests to {BIG} cost $40.00" in one.text
    assert f"On set.jsonl of 2026-11-18, {SMALL} is not worse (400 examples" in one.text


def test_a_set_that_is_named_after_a_feature_is_of_that_feature(tmp_path: Path) -> None:
    one = only(found(read(report(tmp_path, of="support.jsonl")), *TRAFFIC), "large_model")
    assert (one.subject, one.dollars) == ("feature support", 7_500_000_000)


def test_without_prices_in_the_evaluation_the_ledgers_count(tmp_path: Path) -> None:
    small = feature("other", "r", "v", SMALL, requests=10, dollars=DOLLAR, input_tokens=50_000, told=1)
    evaluations = read(report(tmp_path, prices=(None, None)))
    one = only(found(evaluations, *TRAFFIC, small), "large_model")
    assert one.dollars == 40 * DOLLAR - 12 * DOLLAR  # 600,000 tokens at $20 a million
    [unknown] = found(evaluations, *TRAFFIC)
    assert unknown.dollars is None
    assert "What it would save is not known" in unknown.text


@pytest.mark.parametrize(("right", "said"), [(300, 0), (387, 1)])
def test_one_that_does_not_pass_saves_nothing(tmp_path: Path, right: int, said: int) -> None:
    """Where the set is too small to tell, that is what is found."""
    some = found(read(report(tmp_path, right=right)), *TRAFFIC)
    assert all(each.dollars is None for each in some)
    assert ["too small to tell" in each.text for each in some] == [True] * said


def test_one_that_costs_more_is_no_finding(tmp_path: Path) -> None:
    assert not found(read(report(tmp_path, prices=(10, 20))), *TRAFFIC)


def test_the_same_model_quantised(tmp_path: Path) -> None:
    [one] = found(read(report(tmp_path, flags=("--quantization", "int8"))), *TRAFFIC)
    assert f"{BIG} --quantization int8 is not worse" in one.text


def test_where_requests_were_escalated_it_says_nothing(tmp_path: Path) -> None:
    hard = feature("chat", "r", "u", BIG, requests=600, dollars=30 * DOLLAR, escalated=600)
    assert not found(read(report(tmp_path)), hard)


def test_it_is_known_then_whether_a_smaller_one_would_do(tmp_path: Path) -> None:
    assert "whether a smaller model" in found([], *TRAFFIC)[0].text
    assert not any("whether a smaller model" in each.text for each in found(read(report(tmp_path)), *TRAFFIC))


def test_a_folder_of_reports(tmp_path: Path) -> None:
    path = report(tmp_path)
    path.rename(tmp_path / "a.json")
    report(tmp_path, right=390, prices=(40_000, 20_000))
    [one] = found(read(tmp_path), *TRAFFIC)
    assert one.dollars == 30 * DOLLAR  # of two evaluations of the same, the one that saves most


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"baseline": 3}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(StartupError, match=r"x\.json is no report of penstock eval"):
        read(path)


def test_one_that_is_missing_or_not_complete(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be read: No such file"):
        read(tmp_path / "none.json")
    with pytest.raises(StartupError, match="no report in that folder"):
        read(tmp_path)
    with pytest.raises(StartupError, match=r"not complete\. The server is down\."):
        read(report(tmp_path, stopped="The server is down."))
