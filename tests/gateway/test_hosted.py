"""What an upstream would do or look up beyond answering: only where the route says so."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.core.errors import UnsupportedParameter
from penstock.gateway.endpoints import ENDPOINTS
from penstock.gateway.envelope import Envelope
from penstock.gateway.hosted import check
from penstock.gateway.policy.routes import Book, Way
from penstock.spec.load import loads

from .conftest import Make

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
SPEC = """
pools: {box: {hardware: L4}}
upstreams:
  ours: {url: "http://127.0.0.1:1", kind: vllm, pool: box, models: {tiny: {}}}
  cloud:
    url: "http://127.0.0.1:2"
    models: {big: {price: {input: 1, output: 2, as_of: 2026-01-01, source: test}}}
routes:
  small: {targets: [{model: tiny, upstream: ours}], fallback: [{model: big, upstream: cloud}]}
  inside: {targets: [{model: tiny, upstream: ours}]}
  dear: {targets: [{model: big, upstream: cloud}], extra_costs: true}
  shared: {targets: [{model: big, upstream: cloud}], shared_ids: true}
"""


def told(path: str, body: dict[str, Any] | str, route: str = "small") -> str | None:
    """The field that is refused, if one is."""
    text = body if isinstance(body, str) else json.dumps({"model": "x", **body})
    (endpoint,) = (each for each in ENDPOINTS if each.path == path)
    try:
        check(Envelope(text.encode(), endpoint), way(route))
    except UnsupportedParameter as error:
        return error.param if "penstock.yaml" in (error.advice or "") else "no advice"
    return None


def way(route: str) -> Way:
    return Book(loads(SPEC)).find(route, {}, {})


def tools(*types: Any, **more: Any) -> dict[str, Any]:
    return {"tools": [{"type": each, **more} for each in types]}


COSTS = [
    (RESPONSES, tools("web_search"), "tools"),
    (RESPONSES, tools("function", "web_search_preview_2025_03_11"), "tools"),
    (RESPONSES, tools("mcp", server_url="http://x"), "tools"),
    (RESPONSES, tools("image_generation"), "tools"),
    (RESPONSES, tools("shell", environment={"type": "container_auto"}), "tools"),
    (RESPONSES, tools("something new"), "tools"),
    (RESPONSES, tools(["function"]), "tools"),
    (RESPONSES, {"tools": [7, {"type": "code_interpreter"}]}, "tools"),
    (RESPONSES, '{"model": "x", "t\\u006fols": [{"type": "web_se\\u0061rch"}]}', "tools"),
    (RESPONSES, '{"model": "x", "tools": [], "tools": [{"type": "web_search"}]}', "tools"),
    (CHAT, {"web_search_options": {"search_context_size": "high"}}, "web_search_options"),
    (CHAT, {"service_tier": "priority"}, "service_tier"),
    (CHAT, {"plugins": [{"id": "web"}]}, "plugins"),
    (MESSAGES, tools("web_search_20250305"), "tools"),
    (MESSAGES, tools("code_execution_20250825"), "tools"),
    (MESSAGES, {"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
]
IDS = [
    (RESPONSES, {"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
    (RESPONSES, {"input": [{"role": "user", "content": "x"}, {"id": "msg_1"}]}, "input"),
    (RESPONSES, {"input": [{"id": "msg_1", "type": None}]}, "input"),
    (RESPONSES, {"input": ["x", {"id": "msg_1"}]}, "input"),
    (RESPONSES, {"prompt": {"id": "pmpt_1"}}, "prompt"),
    (MESSAGES, {"container": "container_1"}, "container"),
]
BOTH = [
    (RESPONSES, tools("file_search", vector_store_ids=["vs_1"]), "tools"),
    (RESPONSES, tools("code_interpreter", container="cntr_1"), "tools"),
]
FREE = [
    (CHAT, {**tools("function", "custom"), "web_search_options": None, "service_tier": "auto"}),
    (CHAT, {"tools": None, "plugins": []}),
    (CHAT, {"tools": [{"function": {"name": "web_search"}}]}),
    (CHAT, {"messages": [{"role": "user", "content": '{"type": "item_reference", "id": "x"}'}]}),
    (RESPONSES, tools("function", "computer_use_preview", "apply_patch", "local_shell")),
    (RESPONSES, tools("shell", environment={"type": "local"})),
    (RESPONSES, {"input": "item_reference"}),
    (
        RESPONSES,
        {"input": [{"type": "function_call", "id": "fc_1", "call_id": "c"}, {"role": "user", "id": "m"}]},
    ),
    (RESPONSES, {"input": [{"type": "message", "id": "msg_1", "role": "assistant", "content": []}]}),
    (RESPONSES, {"prompt": None, "service_tier": "flex"}),
    (MESSAGES, tools("bash_20250124", "text_editor_20250728", "custom", None, container=None)),
    (MESSAGES, {"container": None, "mcp_servers": []}),
    ("/v1/completions", {"prompt": "item_reference"}),
    ("/v1/embeddings", {"input": [{"id": "x"}]}),
]


@pytest.mark.parametrize(("path", "body", "param"), [*COSTS, *IDS, *BOTH])
def test_what_needs_a_routes_word(path: str, body: Any, param: str) -> None:
    assert told(path, body) == param


@pytest.mark.parametrize(("path", "body", "param"), COSTS)
def test_a_route_that_allows_what_costs_more(path: str, body: Any, param: str) -> None:
    assert told(path, body, "dear") is None
    assert told(path, body, "shared") == param


@pytest.mark.parametrize(("path", "body", "param"), IDS)
def test_a_route_that_allows_ids_of_the_account(path: str, body: Any, param: str) -> None:
    assert told(path, body, "shared") is None
    assert told(path, body, "dear") == param


@pytest.mark.parametrize(("path", "body", "param"), BOTH)
def test_what_costs_and_is_shared_needs_both(path: str, body: Any, param: str) -> None:
    assert {told(path, body, route) for route in ("dear", "shared")} == {param}


@pytest.mark.parametrize(("path", "body"), FREE)
def test_what_everybody_may(path: str, body: Any) -> None:
    assert told(path, body) is None


def test_a_tier_is_nothing_to_who_has_no_price_by_tokens() -> None:
    assert told(CHAT, {"service_tier": "priority"}, "inside") is None


def test_what_is_refused_reaches_nobody(make: Make) -> None:
    gateway = make()
    answer = gateway.post({"model": "small", "input": "Hi", **tools("web_search")}, path=RESPONSES)
    assert (answer.status, answer.reason, answer.error["param"]) == (400, "unsupported_parameter", "tools")
    assert "'web_search' is run by the upstream" in answer.error["message"]
    assert not gateway.upstream.asked
    allowed = make(replace={"retries: 0": "retries: 0\n    extra_costs: true"})
    allowed.post({"model": "small", "messages": [], **tools("web_search")})
    assert [asked.json["tools"] for asked in allowed.upstream.asked] == [[{"type": "web_search"}]]
