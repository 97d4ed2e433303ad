"""A request through the gateway: what the client, the upstream and the ledger see of it."""

from __future__ import annotations

import json

from .conftest import BODY, CHAT, KEY, STREAM, Gateway, Make
from .upstream import TOKENS, USAGE


def test_a_plain_answer_is_relayed_and_billed(gateway: Gateway) -> None:
    response = gateway.post()
    assert response.status == 200
    assert response.json["choices"][0]["message"]["content"] == "".join(TOKENS)
    row = gateway.row()
    assert (row.status, row.end, row.settlement, row.attempts) == (200, "done", "settled", 1)
    assert (row.input_tokens, row.output_tokens, row.cached_tokens) == (7, 4, 2)
    assert row.device_seconds == 250_000_000
    assert row.dollars == 3_600_000_000 * 250_000_000 // 3_600_000_000_000  # $3.60 an hour, a quarter second
    assert (row.route, row.upstream, row.replica, row.model) == ("small", "ours", "ours", "tiny-1")
    assert (row.key_id, row.device) == ("k1", "L4")
    assert response.headers["x-request-id"] == row.id
    assert response.headers["x-penstock-upstream"] == "ours"
    assert response.headers["x-penstock-route"] == "small"
    assert response.headers["x-penstock-cost"] == "0.000250000"
    assert response.headers["x-penstock-device-seconds"] == "0.250000000"


def test_the_upstream_sees_its_own_model_and_the_salt_of_the_key(gateway: Gateway) -> None:
    gateway.post(
        {**BODY, "cache_salt": "somebody else's"}, traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    )
    (asked,) = gateway.upstream.asked
    assert asked.path == CHAT
    assert asked.json == {**BODY, "model": "tiny-1", "cache_salt": "key:k1"}
    assert asked.headers["traceparent"].startswith("00-aaa")
    assert "authorization" not in asked.headers
    assert asked.headers["x-request-id"] == gateway.row().id


def test_a_stream_is_relayed_byte_by_byte_without_the_usage_that_nobody_asked_for(gateway: Gateway) -> None:
    response = gateway.post(STREAM)
    assert response.headers["content-type"] == "text/event-stream"
    (asked,) = gateway.upstream.asked
    assert asked.json["stream_options"] == {"include_usage": True}
    chunk = 'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n'
    last = 'data: {"id":"chatcmpl-1","choices":[{"index":0,"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    assert response.body.decode() == "".join(chunk % token for token in TOKENS) + last
    row = gateway.row()
    assert (row.input_tokens, row.output_tokens, row.cached_tokens) == (7, 4, 2)
    assert (row.settlement, row.end, row.status) == ("settled", "done", 200)
    assert row.device_seconds == 250_000_000
    assert row.first_byte is not None


def test_a_client_that_asks_for_usage_gets_the_upstreams_very_bytes(gateway: Gateway) -> None:
    response = gateway.post({**STREAM, "stream_options": {"include_usage": True, "x": 1}})
    (asked,) = gateway.upstream.asked
    assert asked.json["stream_options"] == {"include_usage": True, "x": 1}
    assert response.body.count(b'"usage":null') == len(TOKENS) + 1
    usage = json.loads(response.body.split(b"data: ")[-2])["usage"]
    assert usage == USAGE
    assert gateway.row().output_tokens == 4


def test_no_key_and_a_wrong_key_are_401_without_a_hint(gateway: Gateway) -> None:
    for key in ("", "sk-ps-wrong"):
        response = gateway.post(key=key)
        assert (response.status, response.reason) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    assert not gateway.upstream.asked
    assert not gateway.meter.rows


def test_an_anthropic_client_sends_its_key_in_its_own_header(gateway: Gateway) -> None:
    assert gateway.post(key="", x_api_key=KEY).status == 200


def test_models_are_those_that_can_be_asked_for(make: Make) -> None:
    gateway = make()
    names = [each["id"] for each in gateway.get("/v1/models").json["data"]]
    assert names == ["small", "classify-intent"]
    assert gateway.get("/v1/models/small").json["root"] == "small"
    assert gateway.get("/v1/models/nothing").status == 404
    assert gateway.get("/v1/models", key="").status == 401


def test_an_unknown_path_is_refused(gateway: Gateway) -> None:
    for path in ("/v1/engines", "/v1/chat/completions/../../admin", "/v1//chat/completions", "/sleep"):
        assert gateway.post(path=path).status == 404
    assert not gateway.upstream.asked


def test_probes_and_metrics_need_no_key(gateway: Gateway) -> None:
    gateway.post()
    for path in ("/health", "/livez", "/readyz", "/ping"):
        assert gateway.get(path, key="").status == 200
    page = gateway.get("/metrics", key="").body.decode()
    assert 'penstock:gateway_requests_total{code="200",end="done",route="small",upstream="ours"} 1.0' in page
    assert 'penstock:gateway_upstream_in_flight{replica="ours"} 0.0' in page
