"""The table of the gateway's metrics, its page, and the docs say the same."""

from __future__ import annotations

from pathlib import Path

from penstock.gateway.fleet import Replica
from penstock.gateway.metrics import METRICS, Metrics
from penstock.gateway.policy.amounts import NANO
from penstock.gateway.records import Row


def test_every_metric_is_on_the_page_and_in_the_docs() -> None:
    metrics = Metrics()
    row = Row(
        id="a", at=0, key_id="k", team="t", route="r", upstream="u", status=200, end="done", input_tokens=3,
        output_tokens=2, cached_tokens=1, device_seconds=NANO // 2, dollars=NANO // 4, waited=1, first_byte=2,
        total=3,
    )  # fmt: skip
    metrics.ended(row)
    metrics.ended(row)
    metrics.refused("invalid_api_key")
    metrics.attempt_failed("u", "reset")
    metrics.resumed("u")
    metrics.bill("u", "late")
    metrics.verdict("r", "mean_logprob", "failed")
    metrics.escalated("r", "mean_logprob", "answered")
    metrics.outcomes("told", 2)
    metrics.in_flight(2)
    metrics.station("u/0", 1, 0.5)
    asleep = Replica(
        model="m", index=0, url="x", state="asleep", since=0.0, device="cpu", devices=1, restarts=2
    )
    metrics.engine(asleep)
    page = metrics.page().decode()
    docs = (Path(__file__).parents[2] / "docs/gateway.md").read_text()
    for metric in METRICS:
        for series in metric.series():
            assert f"\n{series}" in page, series
        assert metric.name.removeprefix("penstock:gateway_") in docs, metric.name
    assert 'penstock:gateway_dollars_total{route="r",upstream="u"} 0.5' in page
    assert 'penstock:gateway_team_dollars_total{team="t"} 0.5' in page
    assert 'penstock:gateway_input_tokens_total{route="r",upstream="u"} 6.0' in page
    assert "_created" not in page


def test_what_is_zero_or_unknown_makes_no_series() -> None:
    metrics = Metrics()
    metrics.ended(Row(id="a", at=0, key_id="k", route="r", upstream="", status=503, end="upstream_failed"))
    page = metrics.page().decode()
    assert "gateway_dollars_total{" not in page
    assert 'code="503",end="upstream_failed"' in page
