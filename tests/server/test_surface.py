"""What surrounds requests: the load in a header, HTTP metrics, old names, the log."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.core.errors import StartupError
from penstock.core.stats import EngineStats
from penstock.server.config import ServerConfig
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .tiny import REPLY

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HI}),
    (CHAT, {"messages": HI, "stream": True}),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 2}),
]


# ---- the engine's load in a header ----

LOAD = {"num_requests_waiting": 3.0, "kv_cache_usage_perc": 0.25}


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("asked", ["TEXT", "text", "JSON", " json "])
def test_the_load_in_a_header(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], asked: str
) -> None:
    stats = EngineStats(waiting=3, kv_usage=0.25)
    monkeypatch.setattr(type(server.engine), "stats", property(lambda self: stats, lambda self, _: None))
    answer = server.post(path, body, {"endpoint-load-metrics-format": asked})
    assert answer.status == 200
    form, _, report = answer.headers["endpoint-load-metrics"].partition(" ")
    assert form == asked.strip().upper()
    if form == "JSON":
        assert json.loads(report) == {"named_metrics": LOAD}
    else:
        pairs = [part.split("=") for part in report.split(", ")]
        assert {name: float(value) for name, value in pairs} == {
            f"named_metrics.{name}": value for name, value in LOAD.items()
        }


@pytest.mark.parametrize("asked", [None, "", "BIN", "xml\t"])
def test_no_load_where_it_is_not_asked_for(server: LiveServer, asked: str | None) -> None:
    headers = {} if asked is None else {"endpoint-load-metrics-format": asked}
    assert "endpoint-load-metrics" not in server.post(CHAT, {"messages": HI}, headers).headers


def test_no_load_in_a_refusal(server: LiveServer) -> None:
    refused = server.post(CHAT, {"messages": []}, {"endpoint-load-metrics-format": "TEXT"})
    assert refused.status == 400
    assert "endpoint-load-metrics" not in refused.headers


# ---- metrics ----


def counted(server: LiveServer) -> dict[tuple[str, str, str], float]:
    """(method, status, handler) → requests"""
    page = server.get("/metrics").body.decode()
    return {
        (sample.labels["method"], sample.labels["status"], sample.labels["handler"]): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "http_requests_total"
    }


def test_requests_are_counted_by_method_status_and_handler(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says(REPLY), root_path="/llm", api_key=("k",)) as server:
        key = {"Authorization": "Bearer k"}
        server.request("POST", CHAT, {"messages": HI}, key)
        server.request("POST", f"/llm{CHAT}/", {"messages": HI, "stream": True}, key)
        server.request("POST", CHAT, {"messages": []}, key)
        server.request("POST", CHAT, {"messages": HI})
        server.request("GET", "/v1/models/tiny", headers=key)
        server.request("GET", "/v1/models/alias/of-tiny", headers=key)
        server.request("PUT", CHAT, {}, key)
        for number in range(5):
            server.request("GET", f"/nowhere/{number}", headers=key)
        for path in ("/health", "/livez", "/readyz", "/ping", "/load", "/version", "/llm/health"):
            server.request("GET", path, headers=key)
        assert counted(server) == {
            ("POST", "2xx", CHAT): 2,
            ("POST", "4xx", CHAT): 2,
            ("GET", "2xx", "/v1/models/{name:path}"): 2,
            ("PUT", "4xx", CHAT): 1,
            ("GET", "4xx", "none"): 5,
        }


def test_a_duration_has_the_whole_answer_in_it(server: LiveServer) -> None:
    """The histogram's count goes up when a stream has ended, and not when it begins."""
    before = counted(server).get(("POST", "2xx", CHAT), 0.0)
    server.events(CHAT, {"messages": HI})
    assert counted(server)[("POST", "2xx", CHAT)] == before + 1


def test_old_names_of_metrics(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says(REPLY), show_hidden_metrics_for_version="0.10") as server:
        server.post(CHAT, {"messages": HI})
        page = server.get("/metrics").body.decode()
    assert 'vllm:gpu_cache_usage_perc{engine="0",model_name="tiny"}' in page
    assert "vllm:time_per_output_token_seconds_bucket" in page
    with pytest.raises(StartupError, match="--show-hidden-metrics-for-version must be a version"):
        ServerConfig(show_hidden_metrics_for_version="old")


# ---- the log ----


def test_neither_prompts_nor_keys_nor_queries_are_logged(
    tokenizer: Tokenizer, says: Any, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "xyzzy"
    with (
        running(tokenizer, says(REPLY), api_key=(f"{secret}-key",), enable_log_requests=True) as server,
        caplog.at_level(logging.DEBUG),
    ):
        headers = {"Authorization": f"Bearer {secret}-key", "Cookie": secret, "X-Api-Key": secret}
        chat = [{"role": "user", "content": secret}]
        for path, body in (
            (CHAT, {"messages": chat}),
            (CHAT, {"messages": chat, "stream": True, "stop": [secret]}),
            (COMPLETIONS, {"prompt": secret, "max_tokens": 2}),
            (COMPLETIONS, {"prompt": secret, "temperature": secret}),
            ("/tokenize", {"prompt": secret}),
        ):
            server.request("POST", f"{path}?q={secret}", body, headers)
            server.request("POST", f"{path}?q={secret}", body, {"Authorization": f"Bearer {secret}"})
    lines = [record.getMessage() for record in caplog.records]
    assert sum("POST" in line for line in lines) == 10
    assert sum("prompt tokens" in line for line in lines) == 3
    assert not [line for line in lines if secret in line]
    assert not [record for record in caplog.records if secret in str(record.__dict__.get("fields", ""))]
