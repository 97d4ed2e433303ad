"""Intervals and time-outs of scrapes."""

from __future__ import annotations

import pytest

from penstock.check.scrapes import duration

from .bundle import Bundle, new_findings
from .finding import of, places, rules
from .test_mutations import on, put

ENDPOINT = ("spec", "endpoints", 0)


def test_a_time_out_above_the_interval_is_found() -> None:
    (finding,) = new_findings("hub", on("ServiceMonitor", None, put("30s", *ENDPOINT, "scrapeTimeout")))
    assert finding.rule.id == "scrape-timeout"
    assert finding.what == "scrapeTimeout is 30s, interval 15s."


@pytest.mark.parametrize("value", ["15s", "10s", "500ms", "0m15s"])
def test_a_time_out_of_at_most_the_interval_is_right(value: str) -> None:
    assert not list(new_findings("hub", on("ServiceMonitor", None, put(value, *ENDPOINT, "scrapeTimeout"))))


@pytest.mark.parametrize(
    ("kind", "spec", "found"),
    [
        ("PodMonitor", "podMetricsEndpoints: [{interval: 1m, scrapeTimeout: 61s}]", True),
        ("Prometheus", "{scrapeInterval: 30s, scrapeTimeout: 1m}", True),
        ("Probe", "{interval: 1m, scrapeTimeout: 59s}", False),
        ("ServiceMonitor", "endpoints: [{scrapeTimeout: 2m}]", False),
    ],
)
def test_other_objects_of_the_operator(kind: str, spec: str, found: bool) -> None:
    spec = spec if spec.startswith("{") else f"{{{spec}}}"
    text = f"apiVersion: monitoring.coreos.com/v1\nkind: {kind}\nmetadata: {{name: a}}\nspec: {spec}\n"
    assert ("scrape-timeout" in rules(text, "a.yaml")) is found


def test_a_job_has_the_interval_of_all_or_a_minute() -> None:
    text = (
        "global: {scrape_interval: 15s}\nscrape_configs:\n  - job_name: a\n    scrape_timeout: 20s\n"
        "  - job_name: b\n    scrape_interval: 30s\n    scrape_timeout: 20s\n"
    )
    assert places([each for each in of(text, "prometheus.yml") if each.rule.id == "scrape-timeout"]) == {
        ("scrape-timeout", 4)
    }
    plain = "scrape_configs:\n  - {job_name: a, scrape_timeout: 50s}\n"
    assert "scrape-timeout" not in rules(plain, "prometheus.yml")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1m30s", 90.0), ("1h", 3600.0), ("250ms", 0.25), ("30", None), ("", None), (30, None)],
)
def test_durations(text: object, seconds: float | None) -> None:
    assert duration(text) == seconds


def test_a_path_without_metrics_is_found() -> None:
    (finding,) = new_findings("hub", on("ServiceMonitor", None, put("/metric", *ENDPOINT, "path")))
    assert finding.rule.id == "monitor-path"


def test_https_of_an_engine_that_serves_http_is_found() -> None:
    mutate = on("ServiceMonitor", "engines", put("https", *ENDPOINT, "scheme"))
    (finding,) = new_findings("hub", mutate)
    assert (finding.rule.id, finding.what) == ("monitor-path", "Deployment chat serves HTTP.")


def test_https_of_a_gateway_is_not_known() -> None:
    assert not list(new_findings("hub", on("ServiceMonitor", "gateway", put("https", *ENDPOINT, "scheme"))))


def test_a_path_of_a_sidecar_is_left_alone() -> None:
    def change(bundle: Bundle) -> None:
        for name in ("chat", "chat-burst", "vision"):
            exporter = {"name": "exporter", "image": "exporter:1", "ports": [{"containerPort": 9000}]}
            bundle.pod(name)["containers"].append(exporter)
        bundle.get("ServiceMonitor")["spec"]["endpoints"][0]["path"] = "/probe"

    assert "monitor-path" not in {each.rule.id for each in new_findings("hub", change)}
