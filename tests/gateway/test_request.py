"""What routes, limits, fleets and shadows do to a request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.cli.main import main
from penstock.core.errors import InvalidRequest
from penstock.gateway.endpoints import ENDPOINTS
from penstock.gateway.envelope import BACKGROUND, Envelope
from penstock.gateway.fleet import ModelStarting, Replica
from penstock.gateway.records import Principal
from penstock.gateway.stations import Stations
from penstock.spec.load import loads
from tests.http.live import PATIENCE

from .conftest import BODY, CHAT, KEY, SPEC, STREAM, Gateway, Make
from .upstream import Upstream, Wire, answer, endless, event, hang, status, whole_answer


def only(gateway: Gateway, number: int = 0) -> Any:
    return gateway.upstreams[number].asked[-1].json


async def dear(wire: Wire) -> None:
    """An answer that took five seconds of the device."""
    body = whole_answer(wire.asked)
    await wire.whole(200, {**body, "usage": {**body["usage"], "device_seconds": 5.0}})


# ---- limits ----


@pytest.mark.parametrize(
    ("limit", "code", "retry", "name"),
    [
        ("requests_per_minute: 1", "rate_limit_exceeded", "true", "requests"),
        ("tokens_per_minute: 360", "rate_limit_exceeded", "true", "tokens"),
        ("dollars_per_day: 0.46", "insufficient_quota", "false", "dollars"),
        ("device_seconds_per_day: 19", "insufficient_quota", "false", "device-seconds"),
    ],
)
def test_a_limit_refuses_and_says_which(make: Make, limit: str, code: str, retry: str, name: str) -> None:
    field, _, cap = limit.partition(": ")
    spec = SPEC.replace("price_per_hour: 3.60", "price_per_hour: 90")
    for line in ("requests_per_minute: 1000", "tokens_per_minute: 1000000", "dollars_per_day: 100"):
        spec = spec.replace(line, limit if line.startswith(field) else "{{}}")
    spec = spec.replace("  {{}}\n", "").replace("  concurrent_requests: 100", f"  {limit}")
    spec = spec.replace(f"  {limit}\n  {limit}\n", f"  {limit}\n")
    gateway = make(dear, spec=spec)
    first = gateway.post()
    assert first.status == 200, first.body
    assert first.headers[f"x-ratelimit-limit-{name}"] == cap
    second = gateway.post()
    assert (second.status, second.reason) == (429, code)
    assert second.headers["x-should-retry"] == retry
    assert second.headers["retry-after"] == "60"
    assert second.headers[f"x-ratelimit-limit-{name}"] == cap
    assert second.headers[f"x-ratelimit-reset-{name}"] == "1m0s"
    assert len(gateway.upstream.asked) == 1
    assert len(gateway.rows(1)) == 1


def test_a_request_that_is_larger_than_its_limit_is_not_to_be_sent_again(make: Make) -> None:
    """As OpenAI's "Request too large": clients retry any other 429."""
    gateway = make(spec=SPEC.replace("tokens_per_minute: 1000000", "tokens_per_minute: 100"))
    answer = gateway.post({**BODY, "max_tokens": 200})
    assert (answer.status, answer.reason) == (429, "rate_limit_exceeded")
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers
    assert "100 tokens per minute of key:k1. It can never pass" in answer.error["message"]
    assert not gateway.upstream.asked


def test_what_has_no_row_counts_as_a_request_all_the_same(make: Make) -> None:
    """And as nothing else: no tokens, no dollars, whatever stands in it."""
    spec = SPEC.replace("requests_per_minute: 1000", "requests_per_minute: 3")
    gateway = make(spec=spec.replace("tokens_per_minute: 1000000", "tokens_per_minute: 1000"))
    body = {"model": "small", "prompt": "x" * 5000}
    assert [gateway.post(body, path="/tokenize").status for _ in range(2)] == [200, 200]
    assert gateway.post().status == 200
    for path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens", CHAT):
        refused = gateway.post({**BODY, **body}, path=path)
        assert refused.status == 429
        assert refused.headers["retry-after"] == "60"
        assert refused.headers["x-ratelimit-limit-requests"] == "3"
    assert len(gateway.upstream.asked) == 3
    assert len(gateway.rows(1)) == 1


CLASSES = SPEC.replace("kind: penstock", "kind: vllm\n    priorities: true") + textwrap.dedent(
    """
    teams:
      nights: {{service_class: background}}
      days: {{}}
    tags: {{feature: {{index: {{service_class: background}}}}}}
    """
)


@pytest.mark.parametrize(
    ("principal", "headers", "background"),
    [
        (Principal(key_id="k", team="days"), {}, False),
        (Principal(key_id="k", team="days"), {"x-penstock-class": "background", "priority": "9"}, True),
        (Principal(key_id="k", team="days"), {"x-penstock-class": "urgent"}, False),
        (Principal(key_id="k", team="nights"), {"x-penstock-class": "realtime"}, True),
        (Principal(key_id="k", service_class="background"), {}, True),
        (Principal(key_id="k", tags={"feature": "index"}), {"x-penstock-feature": "chat"}, True),
        (Principal(key_id="k"), {"x-penstock-feature": "index"}, True),
    ],
)
def test_what_nobody_waits_for_goes_behind_all_others(
    make: Make, principal: Principal, headers: dict[str, str], background: bool
) -> None:
    """By its key, its team, a tag or its own word; a vLLM that schedules by priority is told it as one.
    Nobody can say that somebody waits."""
    gateway = make(spec=CLASSES, keys={KEY: principal})
    for own in (None, 0, 7):
        body = BODY if own is None else {**BODY, "priority": own}
        assert gateway.post(body, **headers).status == 200
    wanted = [BACKGROUND, BACKGROUND, BACKGROUND + 7] if background else [None, 0, 7]
    assert [asked.json.get("priority") for asked in gateway.upstream.asked] == wanted
    assert all("x-penstock-class" not in asked.headers for asked in gateway.upstream.asked)


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("kind", ["vllm", "penstock"])
def test_a_batch_tells_engines_that_nobody_waits(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, said: bool
) -> None:
    """S35: as the Jobs of a compiled cluster, with a key of no class."""
    trusts = "kind: penstock\n    trusts_gateway: true\n    api_key_env: CLOUD_KEY"
    gateway = make(spec=CLASSES if kind == "vllm" else SPEC.replace("kind: penstock", trusts))
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": BODY}))
    monkeypatch.setenv("PENSTOCK_API_KEY", KEY)
    words = [
        "batch",
        str(source),
        "-o",
        str(tmp_path / "out"),
        "--url",
        f"http://127.0.0.1:{gateway.live.port}/v1",
    ]
    assert main([*words, "--background"] if said else words) == 0
    (asked,) = [each for each in gateway.upstream.asked if each.path == CHAT]
    if kind == "vllm":
        assert asked.json.get("priority") == (BACKGROUND if said else None)
    else:
        assert asked.headers["x-penstock-class"] == ("background" if said else "realtime")


def test_a_route_for_what_nobody_waits_for(make: Make) -> None:
    gateway = make(spec=CLASSES.replace("retries: 0", "retries: 0\n    service_class: background"))
    assert gateway.post().status == 200
    assert gateway.upstream.asked[0].json["priority"] == BACKGROUND


@pytest.mark.parametrize("priority", [-1, BACKGROUND, 1.5, "0", True])
def test_nobody_goes_before_others_by_saying_so(make: Make, priority: object) -> None:
    gateway = make(spec=CLASSES)
    answer = gateway.post({**BODY, "priority": priority})
    assert (answer.status, answer.error["param"]) == (400, "priority")
    assert not gateway.upstream.asked


def test_concurrent_requests_come_back(make: Make) -> None:
    gateway = make(spec=SPEC.replace("concurrent_requests: 100", "concurrent_requests: 1"))
    for number in range(3):
        assert gateway.post().status == 200
        gateway.rows(number + 1)
    assert "x-ratelimit-reset-concurrent" not in gateway.post().headers


def test_the_routes_ceiling_and_default_are_written_into_the_request(make: Make) -> None:
    caps = "retries: 0\n    max_tokens: {{ceiling: 100, default: 20}}"
    gateway = make(spec=SPEC.replace("retries: 0", caps))
    without = {name: value for name, value in BODY.items() if name != "max_tokens"}
    for body, sent in (
        (without, {"max_tokens": 20}),
        ({**without, "max_tokens": 99}, {"max_tokens": 99}),
        ({**without, "max_tokens": 101}, {"max_tokens": 100}),
        ({**without, "max_completion_tokens": 1e3}, {"max_completion_tokens": 100}),
        ({**without, "max_tokens": 105, "max_completion_tokens": 107}, {"max_completion_tokens": 100}),
        ({**without, "max_tokens": 105, "max_completion_tokens": 7}, {"max_completion_tokens": 7}),
    ):
        assert gateway.post(body).status == 200
        assert {name: value for name, value in only(gateway).items() if "tokens" in name} == sent


def test_the_worst_case_is_reserved(make: Make) -> None:
    gateway = make(hang, spec=SPEC.replace("timeout_headers: 0.3", "timeout_headers: 30"))
    thread = threading.Thread(target=gateway.post, args=({**BODY, "n": 3},), daemon=True)
    thread.start()
    gateway.wait_for(lambda: bool(gateway.upstream.asked))
    (granted,) = gateway.meter.open.values()
    size = len(json.dumps({**BODY, "n": 3}))
    assert granted.worst.tokens == size + 256 + 3 * 16
    assert granted.worst.dollars > 0
    assert granted.row.settlement == "open"
    gateway.upstream.stop()
    thread.join(PATIENCE)
    gateway.settled()


@pytest.mark.parametrize(
    ("path", "body", "context", "least"),
    [
        ("/v1/completions", {"prompt": ["a" * 100] * 9}, 50, 9 * 50),
        ("/v1/completions", {"prompt": [1] * 100}, 50, 50),
        ("/v1/embeddings", {"input": ["a" * 100] * 9}, 50, 9 * 50),
        ("/v1/embeddings", {"input": "a" * 100}, 50, 50),
        ("/pooling", {"input": ["a" * 100] * 9}, 50, 9 * 50),
        ("/classify", {"input": [[1, 2], [3]]}, 50, 2 * 50),
        ("/v1/embeddings", {"messages": [{"content": "a" * 100}] * 9}, 50, 50),
        ("/v1/embeddings", {"messages": [[{"content": "a" * 100}]] * 9}, 50, 9 * 50),
        ("/v2/embed", {"texts": ["a" * 100] * 9}, 50, 9 * 50),
        ("/v2/embed", {"inputs": [{"content": []}] * 9}, 50, 9 * 50),
        ("/v2/embed", {"texts": ["a"] * 9}, None, 9 * 256),
        ("/v1/chat/completions/batch", {"messages": [[{"content": "a"}]] * 9}, 50, 9 * 50),
        ("/v1/chat/completions/batch", {"messages": [[{"content": "a"}]] * 9}, None, 9 * 256),
        ("/v1/chat/completions/batch", {"messages": [[{"content": [{"type": "image"}]}]] * 2}, 5000, 10000),
        ("/score", {"queries": "q" * 100, "documents": ["a"] * 9}, None, 9 * 100 + 9),
        ("/v2/rerank", {"query": "q" * 100, "documents": ["a"] * 9}, 50, 9 * 50),
        ("/v1/score", {"text_1": "q" * 100, "text_2": ["a"] * 9}, None, 9 * 100 + 9),
        ("/v1/rerank", {"query": "q" * 100, "documents": ["a"] * 9}, 50, 9 * 50),
        ("/v1/rerank", {"query": "q", "documents": []}, 50, 50),
        ("/v1/responses", {"input": "and?", "previous_response_id": "resp_1"}, 5000, 5000),
        ("/v1/chat/completions", {"messages": [{"content": [{"type": "image_url"}]}]}, None, 32_768),
        ("/v1/messages", {"messages": [{"content": [{"type": "document"}]}]}, 5000, 5000),
        ("/v1/messages", {"messages": [{"content": [{"type": "image"}], "é": 1}]}, 5000, 5000),
        ("/v1/chat/completions", {"messages": [{"content": 'an "image"'}]}, 5000, 20),
    ],
)
def test_no_prompt_is_longer_than_what_is_reserved(
    path: str, body: dict[str, Any], context: int | None, least: int
) -> None:
    (endpoint,) = (each for each in ENDPOINTS if each.path == path)
    raw = json.dumps({"model": "small", **body}).encode()
    most = Envelope(raw, endpoint).worst(context).input
    assert least <= most <= (least if context == 50 or least % 5000 == 0 else 3 * least + len(raw) + 256)


def test_every_conversation_of_a_batch_may_be_as_long_as_its_cap() -> None:
    (endpoint,) = (each for each in ENDPOINTS if each.path == "/v1/chat/completions/batch")
    body = {"model": "small", "messages": [[{"content": "a"}]] * 9, "max_tokens": 20}
    assert Envelope(json.dumps(body).encode(), endpoint).worst(None).output == 9 * 20


def test_a_batch_of_chats_has_one_row_and_the_tokens_of_all(gateway: Gateway) -> None:
    path = f"{CHAT}/batch"
    body = {**BODY, "messages": [BODY["messages"]] * 3}
    assert gateway.post(body, path=path).status == 200
    assert (gateway.upstream.asked[-1].path, len(only(gateway)["messages"])) == (path, 3)
    row = gateway.row()
    assert (row.endpoint, row.input_tokens, row.settlement) == (path, 7, "settled")


def test_embeddings_in_coheres_shape_are_metered_by_what_they_bill(make: Make) -> None:
    async def embeds(wire: Wire) -> None:
        meta = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 6}}
        await wire.whole(200, {"id": "e", "embeddings": {"float": [[1.0]]}, "meta": meta})

    gateway = make(embeds)
    assert gateway.post({"model": "small", "texts": ["Hi!"]}, path="/v2/embed").status == 200
    row = gateway.row()
    assert (row.endpoint, row.input_tokens, row.output_tokens, row.settlement) == (
        "/v2/embed",
        6,
        0,
        "settled",
    )
    assert row.dollars


def test_a_stream_is_always_asked_for_its_usage(gateway: Gateway) -> None:
    for said in ("false", 0, None, False):
        gateway.post({**STREAM, "stream_options": {"include_usage": said}})
        assert only(gateway)["stream_options"]["include_usage"] is True


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/responses", '"input": [{"content": [{"type": "input_file", "file_id": "file-1"}]}]'),
        ("/v1/responses", '"input": [{"content": [{"type": "input_image", "file\\u005fid": "file-1"}]}]'),
        ("/v1/responses", '"input": "x", "tools": [{"container": {"file_ids" : ["file-1"]}}]'),
        (
            "/v1/chat/completions",
            '"messages": [{"content": [{"type": "file", "file": {"file_id": "file-1"}}]}]',
        ),
        ("/v1/messages", '"messages": [{"content": [{"source": {"type": "file", "file_id": "file_1"}}]}]'),
        ("/v1/messages", '"messages": ["file_id"' + ", 1" * 50_000 + "]"),  # too many to look at
    ],
)
def test_files_of_the_upstreams_account_are_nobodys_in_requests(path: str, more: str) -> None:
    (endpoint,) = (each for each in ENDPOINTS if each.path == path)
    with pytest.raises(InvalidRequest, match=r"file_id in \w+ is not supported"):
        Envelope(b'{"model": "small", %s}' % more.encode(), endpoint)


def test_ids_of_files_that_open_nothing_pass() -> None:
    contents = [
        {"text": 'the "file_id": of \u00e9', "annotations": [{"type": "file_citation", "file_id": "file-1"}]},
        {"type": "tool_use", "input": {"type": "file", "file_id": "x"}},
    ]
    tools = [{"type": "function", "parameters": {"properties": {"file_id": {"type": "string"}}}}]
    for endpoint in ENDPOINTS:
        body = {"model": "small", endpoint.prompt: [{"content": contents}], "tools": tools}
        assert Envelope(json.dumps(body).encode(), endpoint).model == "small"


@pytest.mark.parametrize("deep", ["1e999", "[" * 900 + "]" * 900, "[" * 9000 + "]" * 9000, '"\\ud800"'])
def test_what_is_looked_into_may_be_anything(deep: str) -> None:
    more = '"file_id": "\\u0066", "file": "file_id", "container": 5, "type": ["file"]'
    body = f'{{"model": "small", "messages": [{{{more}, "x": {deep}}}]}}'
    with contextlib.suppress(InvalidRequest):
        Envelope(body.encode(), ENDPOINTS[0]).worst(None)


@pytest.mark.parametrize("number", ["1e999", "9" * 5000])
@pytest.mark.parametrize("name", ["n", "max_tokens", "model", "stream"])
def test_a_number_out_of_range_is_a_400(name: str, number: str) -> None:
    body = json.dumps({name: 0, **{k: v for k, v in BODY.items() if k != name}})
    with pytest.raises(InvalidRequest, match=f"{name} must be"):
        Envelope(body.replace(": 0", f": {number}", 1).encode(), ENDPOINTS[0])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "model"),
        ({**BODY, "model": 5}, "model"),
        ({**BODY, "max_tokens": -1}, "max_tokens"),
        ({**BODY, "max_tokens": "9"}, "max_tokens"),
        ({**BODY, "max_completion_tokens": True}, "max_completion_tokens"),
        ({**BODY, "n": 0}, None),
        ({**BODY, "n": 10**6}, "n"),
        ({**BODY, "stream": 1}, "stream"),
        ({**STREAM, "stream_options": []}, "stream_options"),
    ],
)
def test_fields_that_the_gateway_reads_must_be_right(gateway: Gateway, body: Any, param: str | None) -> None:
    response = gateway.post(body)
    if param is None:  # null and zero are for the upstream to judge
        assert response.status == 200
        return
    assert (response.status, response.error["param"]) == (400, param)
    assert not gateway.meter.rows


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b'{"model": "small", "x": ' + b"[" * 10_000, b"\xff"]
)
def test_a_body_that_is_no_json_object_is_a_400(gateway: Gateway, body: bytes) -> None:
    response = gateway.post(body)
    assert (response.status, response.reason) == (400, "invalid_json")


def test_what_stands_twice_is_sent_once_and_all_else_as_it_came(gateway: Gateway) -> None:
    messages = b'[ {"role":"user","content":"\\u00e9 \xc3\xa9"} ]'
    raw = b'{"model":"evil","messages" : ' + messages + b',"x":1e400, "model":"small"}'
    assert gateway.post(raw).status == 200
    sent = gateway.upstream.asked[0].body
    assert sent.count(b'"model"') == 1
    assert messages in sent
    assert b"1e400" in sent


def test_a_body_over_the_limit_is_413(make: Make) -> None:
    gateway = make(spec=SPEC + "gateway: {{max_body_bytes: 1000}}\n")
    response = gateway.post({**BODY, "user": "x" * 2000})
    assert (response.status, response.reason) == (413, "payload_too_large")


# ---- who may go where ----


def test_keys_of_others_see_nothing_and_tags_of_the_key_win(make: Make) -> None:
    keys = {
        KEY: Principal(key_id="k1", tags={"feature": "search"}),
        "sk-ps-no": Principal(key_id="k2", routes=("other",)),
    }
    gateway = make(keys=keys)
    refused = gateway.post(key="sk-ps-no")
    assert (refused.status, refused.reason) == (403, "model_not_allowed")
    assert gateway.get("/v1/models", key="sk-ps-no").json["data"] == []
    gateway.post(x_penstock_feature="mine")
    assert gateway.row().tags == {"feature": "search"}


def test_a_tag_comes_from_its_header_if_it_can_be_one(gateway: Gateway) -> None:
    for value, tags in (("chat", {"feature": "chat"}), ("x" * 200, {}), ("", {})):
        gateway.post(x_penstock_feature=value)
        assert gateway.rows(len(gateway.upstream.asked))[-1].tags == tags


def test_the_clients_request_id_begins_the_rows(gateway: Gateway) -> None:
    ids = []
    for _ in range(2):
        response = gateway.post(x_request_id="mine")
        ids.append(response.headers["x-request-id"])
    assert [row.id for row in gateway.rows(2)] == ids
    assert ids[0] != ids[1]
    assert all(each.startswith("mine.") for each in ids)


# ---- replicas ----


def test_equal_prompts_go_to_one_replica_and_others_elsewhere(make: Make) -> None:
    gateway = make(answer, answer, answer)

    def home(text: str) -> str:
        gateway.post({**BODY, "messages": [{"role": "user", "content": text}]})
        return gateway.rows(sum(len(each.asked) for each in gateway.upstreams))[-1].replica

    first = home("a" * 600)
    assert [home("a" * 600 + str(number)) for number in range(5)] == [first] * 5


def test_a_sticky_session_stays(make: Make) -> None:
    gateway = make(answer, answer, answer, replace={"retries: 0": "retries: 0\n    sticky: X-Session"})
    seen: dict[str, set[str]] = {}
    for number in range(24):
        session = f"s{number % 8}"
        gateway.post(x_session=session)
        seen.setdefault(session, set()).add(gateway.rows(number + 1)[-1].replica)
    assert all(len(each) == 1 for each in seen.values())
    assert len(set.union(*seen.values())) > 1


def test_a_replica_that_fails_is_not_asked_until_it_is_back(make: Make) -> None:
    gateway = make(status(500), answer, retries=1)
    for number in range(12):
        assert gateway.post().status == 200
        gateway.rows(number + 1)
    assert len(gateway.upstreams[0].asked) <= 3
    broken = gateway.stations.all()[0]
    assert broken.health.weight(gateway.door.monotonic()) in (0.0, 1.0)
    # if nobody is well, somebody is asked all the same
    for station in gateway.stations.all():
        station.health.ready = False
    assert gateway.post().status in (200, 502)


def test_a_full_upstream_is_a_503_at_once(make: Make) -> None:
    gateway = make()
    (station,) = gateway.stations.all()
    station.most = 0
    response = gateway.post()
    assert (response.status, response.reason) == (503, "no_replica")
    assert response.headers["retry-after"] == "1"
    assert gateway.row().end == "upstream_failed"


FALLBACK = """
upstreams:
  first: {{url: {url}, models: {{a: {{}}}}}}
  second:
    {urls}
    url: "{second}"
    api_key_env: CLOUD_KEY
    models: {{b: {{price: {{input: 1, output: 2, as_of: 2026-11-01, source: x}}}}}}
routes:
  small:
    targets: [{{model: a, upstream: first}}]
    fallback: [{{model: b, upstream: second}}]
    comparator: {{model: b, upstream: second}}
    retries: 0
"""


def test_a_fallback_is_asked_when_no_target_can_answer(make: Make) -> None:
    other = Upstream().start()
    try:
        gateway = make(status(503), spec=FALLBACK.replace("{second}", other.url))
        response = gateway.post()
        assert response.status == 200
        assert response.headers["x-penstock-upstream"] == "second"
        row = gateway.row()
        assert (row.upstream, row.model, row.attempts) == ("second", "b", 2)
        assert row.dollars == 7 * 1000 + 4 * 2000 == row.comparator_dollars
        assert row.device_seconds is None  # of a cloud
        assert other.asked[0].headers["authorization"] == "Bearer sk-cloud"
        assert "cache_salt" not in other.asked[0].json
    finally:
        other.stop()


def test_a_shadow_gets_a_copy_that_nobody_waits_for_or_pays(make: Make) -> None:
    other = Upstream(default=hang).start()
    try:
        spec = FALLBACK.replace("fallback:", "shadow:").replace("{second}", other.url)
        gateway = make(spec=spec)
        assert gateway.post().status == 200
        gateway.wait_for(lambda: bool(other.asked))
        assert other.asked[0].json["model"] == "b"
        other.stop()
        rows = gateway.rows(2)
        assert {row.key_id for row in rows} == {"k1", ""}
        (shadow,) = (row for row in rows if not row.key_id)
        (real,) = (row for row in rows if row.key_id)
        assert shadow.note.startswith(f"shadow of {real.id}")
        assert real.upstream == "first"
    finally:
        other.stop()


# ---- models of ours ----

LOCAL = """
pools: {box: {hardware: cpu}}
models: {demo: {weights: demo, pool: box}}
routes: {small: {targets: [{model: demo}], wait: 5, max_waiting: 1}}
"""


class FakeFleet:
    """One model that is there or not."""

    key = "sk-of-the-engines"

    def __init__(self, url: str) -> None:
        self.url = url
        self.state: Any = "asleep"
        self.uses = 0
        self.most_uses = 0
        self.comes = True

    def models(self) -> Sequence[str]:
        return ["demo"]

    def replicas(self, model: str) -> Sequence[Replica]:
        assert model == "demo"
        return [
            Replica(model="demo", index=0, url=self.url, state=self.state, since=0.0, device="cpu", devices=1)
        ]

    async def ready(self, model: str, *, timeout: float, max_waiting: int | None = None) -> None:
        assert (timeout, max_waiting, self.uses > 0) == (5, 1, True)
        await asyncio.sleep(0)
        if not self.comes:
            raise ModelStarting("demo is still starting.", retry_after=7)
        self.state = "ready"

    @contextmanager
    def use(self, model: str) -> Iterator[None]:
        self.uses += 1
        self.most_uses = max(self.most_uses, self.uses)
        try:
            yield
        finally:
            self.uses -= 1

    def subscribe(self, callback: Callable[[Replica], None]) -> None:
        self.callback = callback


@pytest.mark.parametrize("comes", [True, False])
def test_a_request_waits_for_a_model_that_sleeps(make: Make, comes: bool) -> None:
    upstream = Upstream().start()
    gateway = make()
    fleet = FakeFleet(upstream.url)
    fleet.comes = comes
    spec = loads(textwrap.dedent(LOCAL))
    door = gateway.door
    try:
        stations = Stations(spec, fleet)
        door.__init__(spec, gateway.keys, gateway.meter, stations, fleet)  # type: ignore[misc]
        response = gateway.post()
        row = gateway.row()
        if comes:
            assert response.status == 200
            assert (row.upstream, row.replica, row.device) == ("demo", "demo/0", "cpu")
            assert upstream.asked[0].headers["authorization"] == "Bearer sk-of-the-engines"
            assert (row.device_seconds, row.dollars) == (250_000_000, None)  # a pool without a price
        else:
            assert (response.status, response.reason) == (503, "model_starting")
            assert response.headers["retry-after"] == "7"
            assert row.end == "upstream_failed"
        assert fleet.most_uses >= 1
        assert fleet.uses == 0
    finally:
        upstream.stop()


@pytest.mark.parametrize("leaves", [True, False])
def test_a_model_that_falls_asleep_just_then_is_woken_whatever_retries_there_are(
    make: Make, leaves: bool
) -> None:
    """An engine that ends takes no more; one that stays, and is busy, is another matter."""
    upstream = Upstream().start()
    gateway = make()
    fleet = FakeFleet(upstream.url)
    fleet.state = "ready"

    async def drains(wire: Wire) -> None:
        fleet.state = "asleep" if leaves else "ready"
        await wire.whole(503, {"error": {"message": "The server is shutting down.", "code": "draining"}})

    upstream.script = [drains]
    spec = loads(textwrap.dedent(LOCAL).replace("wait: 5", "wait: 5, retries: 0"))
    stations = Stations(spec, fleet)
    gateway.door.__init__(spec, gateway.keys, gateway.meter, stations, fleet)  # type: ignore[misc]
    try:
        assert gateway.post().status == (200 if leaves else 503)
        row = gateway.row()
        assert (row.attempts, row.settlement) == (2 if leaves else 1, "settled")
        assert row.end == ("done" if leaves else "upstream_failed")
        assert len([asked for asked in upstream.asked if asked.method == "POST"]) == row.attempts
        assert fleet.uses == 0
    finally:
        upstream.stop()


# ---- engines that do not tell device time; the end ----


def test_device_time_that_is_not_told_is_estimated_and_marked(make: Make) -> None:
    async def untold(wire: Wire) -> None:
        body = whole_answer(wire.asked)
        body["usage"] = {"prompt_tokens": 7, "completion_tokens": 4}
        await wire.whole(200, body)

    gateway = make(untold, replace={"kind: penstock": "kind: vllm"})
    assert gateway.post().status == 200
    row = gateway.row()
    assert row.device_seconds_estimated
    assert row.device_seconds is not None
    assert 0 < row.device_seconds <= (row.total or 0)
    assert row.settlement == "settled"


def test_draining_refuses_new_requests_and_readiness(gateway: Gateway) -> None:
    gateway.door._draining = True
    assert gateway.get("/readyz").status == 503
    assert gateway.get("/livez").status == 200
    response = gateway.post()
    assert (response.status, response.reason) == (503, "draining")


def test_who_is_still_there_when_the_time_is_over_is_told_and_billed(make: Make) -> None:
    gateway = make(endless)
    connection, response = gateway.open()
    body = response.read(1)
    gateway.live.do(gateway.door.drain(0.0))
    body += response.read()
    connection.close()
    last = body.decode().split("\n\n")[-2]
    assert json.loads(last[6:])["error"]["reason"] == "draining"
    row = gateway.row()
    assert (row.end, row.settlement) == ("killed", "estimated")
    assert gateway.door.load == 0


def test_headers_of_clients_do_not_reach_upstreams(gateway: Gateway) -> None:
    gateway.post(
        cookie="a=b", x_forwarded_for="1.2.3.4", x_penstock_tenant="evil", host="evil", accept="text/x",
        anthropic_version="2023-06-01",
    )  # fmt: skip
    headers = gateway.upstream.asked[0].headers
    assert not {"cookie", "x-forwarded-for", "x-penstock-tenant", "authorization"} & set(headers)
    assert (headers["accept"], headers["anthropic-version"]) == ("text/x", "2023-06-01")
    assert headers["host"].startswith("127.0.0.1")


def test_an_anthropic_client_gets_errors_in_its_words(make: Make) -> None:
    gateway = make(status(500))
    response = gateway.post({**BODY}, path="/v1/messages")
    assert response.status == 502
    assert response.json["type"] == "error"
    assert response.json["error"]["type"] == "api_error"
    assert gateway.upstream.asked[0].path == "/v1/messages"
    assert gateway.post({"model": "none"}, path="/v1/messages").json["error"]["type"] == "not_found_error"


async def tells_so_far(wire: Wire) -> None:
    """A stream whose first event has a usage already, as Anthropic's have."""
    first = {"type": "message_start", "message": {"usage": {"input_tokens": 25, "output_tokens": 1}}}
    last = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 15}}
    await wire.stream()
    for payload in (first, {"type": "content_block_delta"}, last, {"type": "message_stop"}):
        await wire.chunk(event(payload))
        await asyncio.sleep(0)
    await wire.send(b"0\r\n\r\n")


def test_a_usage_that_begins_a_stream_is_not_the_last_word(make: Make) -> None:
    gateway = make(tells_so_far)
    response = gateway.post(STREAM, path="/v1/messages")
    assert response.body.count(b"data: ") == 4
    assert "x-penstock-cost" not in response.headers
    row = gateway.row()
    assert (row.input_tokens, row.output_tokens, row.settlement) == (25, 15, "settled")


def test_counting_and_tokenizing_make_no_rows(gateway: Gateway) -> None:
    for path in ("/v1/messages/count_tokens", "/tokenize", "/detokenize"):
        assert gateway.post(BODY, path=path).status == 200
    assert not gateway.meter.rows
    assert [each.path for each in gateway.upstream.asked][-1] == "/detokenize"
    assert CHAT not in {each.path for each in gateway.upstream.asked}


def test_a_row_says_whether_its_answer_had_a_bound(make: Make) -> None:
    """By the request or by its route; and how long the context was."""
    free = {name: value for name, value in BODY.items() if name != "max_tokens"}
    gateway = make()
    for body in (BODY, free, {**free, "max_completion_tokens": 9}):
        assert gateway.post(body).status == 200
    assert gateway.post({"model": "small", "input": "Hi!"}, path="/v1/embeddings").status == 200
    assert [(row.uncapped, row.context) for row in gateway.rows(4)] == [
        (False, 4096),
        (True, 4096),
        (False, 4096),
        (False, 4096),
    ]
    bounded = make(replace={"retries: 0": "retries: 0\n    context: 1000\n    max_tokens: {ceiling: 50}"})
    assert bounded.post(free).status == 200
    assert (bounded.row().uncapped, bounded.row().context) == (False, 1000)
