"""What operators, probes, gateways and scrapers rely on: keys, health, models, metrics, disconnects, CORS."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.core.plan import Event
from penstock.core.stats import EngineStats, Totals
from penstock.server import answer
from penstock.server.completions import CompletionWriter
from penstock.text.tokenizer import Tokenizer

from .conftest import Call, LiveServer, running
from .fake_engine import PATIENCE, FakeEngine, Running
from .tiny import MODEL, REPLY

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI: list[Any] = [{"role": "user", "content": "Hi"}]


# ---- keys ----


@pytest.fixture(scope="module")
def locked(tokenizer: Tokenizer, says: Any) -> Any:
    with running(tokenizer, says(REPLY), api_key=("first", "zweitér")) as server:
        yield server


@pytest.mark.parametrize(
    "header",
    [None, "", "first", "Basic first", "Bearer", "Bearer ", "Bearer wrong", "Bearer first2", "Bearer firs"],
)
@pytest.mark.parametrize("path", ["/v1/models", "/version", "/load", "/tokenize", CHAT, "/nowhere"])
def test_without_a_key_nothing_is_served(locked: LiveServer, header: str | None, path: str) -> None:
    answer = locked.request("GET", path, headers={} if header is None else {"Authorization": header})
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.error["code"] == "invalid_api_key"
    assert "zweit" not in answer.error["message"]


@pytest.mark.parametrize("key", ["first", "zweitér"])
def test_every_key_opens(locked: LiveServer, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
    assert locked.request("GET", "/v1/models", headers=headers).status == 200
    assert locked.request("POST", CHAT, {"messages": HI}, headers).status == 200


@pytest.mark.parametrize(
    "path", ["/health", "/livez", "/readyz", "/ping", "/metrics", "/health/", "/metrics/"]
)
def test_health_and_metrics_need_no_key(locked: LiveServer, path: str) -> None:
    assert locked.get(path).status == 200


def test_a_slash_at_the_end_changes_nothing(locked: LiveServer) -> None:
    assert locked.get("/v1/models/").status == 401
    assert locked.get("//").status == 401


def test_a_root_path_does_not_open_doors(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says(REPLY), api_key=("k",), root_path="/llm") as server:
        assert server.get("/health").status == 200
        assert server.get("/v1/models").status == 401


# ---- health ----


def test_a_healthy_server(server: LiveServer) -> None:
    for path in ("/health", "/livez", "/readyz", "/ping"):
        answer = server.get(path)
        assert (answer.status, answer.json) == (200, {"status": "ok"})
    assert server.request("HEAD", "/health").status == 200
    assert server.post("/ping", {}).status == 200


def test_while_loading(server: LiveServer) -> None:
    server.engine.loaded = False
    ready = server.get("/readyz")
    assert ready.status == 503
    assert "loading" in ready.json["error"]["message"]
    assert (server.get("/health").status, server.get("/livez").status) == (200, 200)
    refused = server.post(CHAT, {"messages": HI})
    assert refused.status == 503
    assert refused.headers["retry-after"] == "5"


def test_while_draining(server: LiveServer) -> None:
    server.engine.draining = True
    ready = server.get("/readyz")
    assert (ready.status, ready.json["error"]["code"]) == (503, "draining")
    assert (server.get("/health").status, server.get("/livez").status) == (200, 200)
    refused = server.post(CHAT, {"messages": HI})
    assert (refused.status, refused.error["code"]) == (503, "draining")
    assert refused.headers["retry-after"] == "5"


def test_a_stuck_engine(server: LiveServer) -> None:
    server.engine.stuck = "no step for 12 s"
    alive = server.get("/livez")
    assert alive.status == 503
    assert "no step for 12 s" in alive.json["error"]["message"]
    assert server.get("/health").status == 200


def test_a_dead_engine_is_named_everywhere(server: LiveServer) -> None:
    server.engine.die("killed by signal 9")
    for path in ("/health", "/readyz", "/ping"):
        answer = server.get(path)
        assert answer.status == 503
        assert "killed by signal 9" in answer.json["error"]["message"]
    refused = server.post(TEXT, {"prompt": "a"})
    assert (refused.status, refused.error["code"]) == (503, "engine_dead")
    assert "killed by signal 9" in refused.error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_dies_under_a_waiting_request(server: LiveServer, stream: bool) -> None:
    server.engine.pause_at = 0
    with Call(server.port, {"messages": HI, "stream": stream}) as call:
        server.engine.wait_until(lambda engine: engine.load == 1)
        server.engine.die("out of memory")
        status, body = call.rest()
    assert status == 503
    assert json.loads(body)["error"]["code"] == "engine_dead"


def test_an_engine_that_dies_in_mid_stream(server: LiveServer) -> None:
    server.engine.pause_at = 2
    with Call(server.port, {"messages": HI, "stream": True}) as call:
        call.read_until(b'"content":"e"')
        server.engine.die("out of memory")
        _, body = call.rest()
    *_, error, rest = body.split(b"\n\n")
    assert rest == b""  # and no [DONE]
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "engine_dead"


# ---- clients that leave ----


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_in_mid_stream_aborts(server: LiveServer, n: int) -> None:
    server.engine.pause_at = 3
    call = Call(server.port, {"messages": HI, "stream": True, "n": n})
    call.read_until(b'"content":"l"')
    call.leave()
    server.engine.wait_until(lambda engine: len(engine.gone) == n and engine.load == 0)
    assert sorted(server.engine.gone) == sorted(add.id for add in server.engine.adds)


def test_leaving_before_the_answer_aborts(server: LiveServer) -> None:
    server.engine.pause_at = 0
    call = Call(server.port, {"messages": HI})
    server.engine.wait_until(lambda engine: engine.load == 1)
    call.leave()
    server.engine.wait_until(lambda engine: len(engine.gone) == 1 and engine.load == 0)


def test_leaving_in_the_middle_of_the_body(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
    assert server.get("/health").status == 200
    assert server.engine.adds == []


def test_requests_that_end_by_themselves_are_not_aborted(server: LiveServer) -> None:
    server.post(CHAT, {"messages": HI})
    server.events(CHAT, {"messages": HI})
    assert (server.engine.gone, server.engine.aborted) == ([], [])


def test_one_failing_choice_takes_the_others_with_it(server: LiveServer) -> None:
    server.engine.fail_at = 1
    assert server.post(CHAT, {"messages": HI, "n": 3}).status == 500
    server.engine.wait_until(lambda engine: engine.load == 0)


# ---- models, tokens, version, load ----


def test_models(server: LiveServer) -> None:
    listed = server.get("/v1/models").json
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == [MODEL, "alias/of-tiny"]
    card = server.get("/v1/models/alias/of-tiny").json
    assert card == listed["data"][1]
    assert card["object"] == "model"
    assert card["max_model_len"] == 256
    assert server.get("/v1/models/").json == listed
    missing = server.get("/v1/models/huge")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


def test_models_through_the_official_client(server: LiveServer) -> None:
    with server.client() as client:
        assert [model.id for model in client.models.list()] == [MODEL, "alias/of-tiny"]
        assert client.models.retrieve(MODEL).owned_by == "penstock"


def test_tokenize(server: LiveServer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a wörd")
    answer = server.post("/tokenize", {"model": MODEL, "prompt": "a wörd"}).json
    assert answer == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    strings = server.post("/tokenize", {"prompt": "a b", "return_token_strs": True}).json["token_strs"]
    assert strings == ["a", "Ġ", "b"]
    assert server.post("/tokenize", {"prompt": ""}).json["count"] == 0


def test_tokenize_messages(server: LiveServer, tokenizer: Tokenizer) -> None:
    tokens = server.post("/tokenize", {"messages": HI, "add_generation_prompt": False}).json["tokens"]
    assert tokenizer.decode(tokens, skip_special_tokens=False) == "<|start|>user\nHi<|end|>\n"


def test_detokenize(server: LiveServer, tokenizer: Tokenizer) -> None:
    tokens = [256, *tokenizer.encode("wörd")]
    assert server.post("/detokenize", {"tokens": tokens}).json == {"prompt": "<|start|>wörd"}
    assert server.post("/detokenize", {"tokens": []}).json == {"prompt": ""}


def test_version_and_load(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says(REPLY), version="1.2.3") as server:
        assert server.get("/version").json == {"version": "1.2.3"}
        server.engine.pause_at = 1
        with Call(server.port, {"messages": HI, "n": 2}):
            server.engine.wait_until(lambda engine: engine.load == 2)
            assert server.get("/load").json == {"server_load": 2}


# ---- metrics ----


def samples(server: LiveServer) -> dict[str, float]:
    """Samples by name and own labels, as `name{reason=capacity}`."""
    found = {}
    for family in text_string_to_metric_families(server.get("/metrics").body.decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            inner = ",".join(f"{key}={value}" for key, value in labels.items())
            found[f"{sample.name}{{{inner}}}" if inner else sample.name] = sample.value
    return found


def test_metrics_of_requests_and_steps(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says("abc")) as server:
        server.post(CHAT, {"messages": HI, "n": 2, "max_tokens": 3})
        server.post(TEXT, {"prompt": "x" * 20})
        server.engine.queue_limit = 0
        server.post(TEXT, {"prompt": "x"})
        server.engine.limit_at_fault = "max_num_queued_tokens"
        server.post(TEXT, {"prompt": "x"})
        server.engine.publish(
            EngineStats(Totals(prompt_tokens=7), running=2, waiting=5, deferred=2, kv_usage=0.5, busy=1.5)
        )
        page = samples(server)
    assert page["vllm:request_success_total{finished_reason=length}"] == 2
    assert page["vllm:request_success_total{finished_reason=stop}"] == 1
    assert page["vllm:request_success_total{finished_reason=error}"] == 0
    assert page["vllm:admission_rejections_total{reason=max_num_queued_reqs}"] == 1
    assert page["vllm:admission_rejections_total{reason=max_num_queued_tokens}"] == 1
    assert page["vllm:time_to_first_token_seconds_count"] == 3
    assert page["vllm:time_to_first_token_seconds_sum"] == pytest.approx(3 * 0.75)
    assert page["vllm:inter_token_latency_seconds_count"] == 2 + 2 + 3
    assert page["vllm:request_queue_time_seconds_sum"] == pytest.approx(3 * 0.5)
    assert page["vllm:request_prefill_time_seconds_sum"] == pytest.approx(3 * 0.25)
    assert page["vllm:request_generation_tokens_sum"] == 3 + 3 + 4
    assert page["vllm:request_max_num_generation_tokens_sum"] == 3 + 4
    assert page["vllm:request_params_n_sum"] == 2 + 1
    assert page["vllm:request_params_max_tokens_sum"] == 3 + 3 + 16  # the default counts as well
    assert page["vllm:request_prompt_tokens_count"] == 3  # refused requests are none
    assert page["penstock:request_device_seconds_sum"] == pytest.approx(0.010)
    assert page["vllm:num_requests_running"] == 2
    assert page["vllm:num_requests_waiting_by_reason{reason=capacity}"] == 3
    assert page["vllm:num_requests_waiting_by_reason{reason=deferred}"] == 2
    assert page["vllm:prompt_tokens_total"] == 7
    assert page["penstock:device_seconds_total{state=busy}"] == 1.5
    assert (
        "vllm:cache_config_info{block_size=16,cache_dtype=float32,enable_prefix_caching=True,"
        "kv_cache_max_concurrency=4.0,kv_cache_size_tokens=1024,num_gpu_blocks=64}" in page
    )


def test_a_client_that_leaves_counts_as_an_abort(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says(REPLY)) as server:
        server.engine.pause_at = 2
        call = Call(server.port, {"messages": HI, "stream": True})
        call.read_until(b'"content":"e"')
        call.leave()
        server.engine.wait_until(lambda engine: bool(engine.gone))
        page = samples(server)
        assert page["vllm:request_success_total{finished_reason=abort}"] == 1
        assert page["vllm:request_generation_tokens_sum"] == 2


class OneFails(FakeEngine):
    """The first of two siblings fails in the same batch in which the other ends, or before that."""

    fails_at = 2

    def _step(self, running: Running) -> Event:
        self.fail_at = self.fails_at if running.add.id.endswith(":0") else None
        return super()._step(running)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fails_at", "other", "tokens"), [(2, "stop", 3), (1, "abort", 2)])
def test_a_choice_that_fails_takes_no_bill_with_it(
    tokenizer: Tokenizer, says: Any, stream: bool, fails_at: int, other: str, tokens: int
) -> None:
    engine = OneFails(says("ab"))
    engine.fails_at = fails_at
    with running(tokenizer, says("ab"), engine=engine) as server:
        answer = server.post(CHAT, {"messages": HI, "n": 2, "stream": stream})
        assert b"device says no" in answer.body
        page = samples(server)
    assert page["vllm:request_success_total{finished_reason=error}"] == 1
    assert page[f"vllm:request_success_total{{finished_reason={other}}}"] == 1
    assert page["vllm:request_generation_tokens_sum"] == fails_at + tokens
    assert page["penstock:request_device_seconds_sum"] == pytest.approx(0.001 * (fails_at + tokens))
    assert page["vllm:request_params_n_sum"] == 2


def test_the_page_says_what_it_is(server: LiveServer) -> None:
    assert server.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


# ---- browsers ----


def test_no_origin_may_call_by_default(tokenizer: Tokenizer, says: Any) -> None:
    asks = {"Origin": "https://ui.example", "Access-Control-Request-Method": "POST"}
    with running(tokenizer, says(REPLY)) as server:
        assert server.request("OPTIONS", CHAT, headers=asks).status == 405
        answer = server.request("GET", "/v1/models", headers={"Origin": "https://ui.example"})
        assert answer.status == 200
        assert "access-control-allow-origin" not in answer.headers


def test_any_origin_may_call_where_that_is_asked_for(tokenizer: Tokenizer, says: Any) -> None:
    asks = {"Origin": "https://ui.example", "Access-Control-Request-Method": "POST"}
    with running(tokenizer, says(REPLY), api_key=("k",), allowed_origins=("*",)) as server:
        preflight = server.request("OPTIONS", CHAT, headers=asks)
        assert preflight.status == 200  # without a key: browsers send none
        assert preflight.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in preflight.headers
        assert server.request("GET", "/v1/models", headers=asks).status == 401


def test_cors_only_where_allowed(tokenizer: Tokenizer, says: Any) -> None:
    asks = {
        "Origin": "https://ui.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    with running(tokenizer, says(REPLY), allowed_origins=()) as closed_server:
        assert closed_server.request("OPTIONS", CHAT, headers=asks).status == 405
    with running(
        tokenizer, says(REPLY), allowed_origins=("https://ui.example",), api_key=("k",)
    ) as open_server:
        preflight = open_server.request("OPTIONS", CHAT, headers=asks)
        assert preflight.status == 200
        assert preflight.headers["access-control-allow-origin"] == "https://ui.example"
        refused = open_server.request("GET", "/v1/models", headers={"Origin": "https://ui.example"})
        assert refused.status == 401
        assert refused.headers["access-control-allow-origin"] == "https://ui.example"


def test_logging_of_requests_has_no_text(
    tokenizer: Tokenizer, says: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "penstock.requests")
    with running(tokenizer, says(REPLY), enable_log_requests=True) as server:
        server.post(CHAT, {"messages": [{"role": "user", "content": "private words"}], "request_id": "r1"})
        server.post(TEXT, {"prompt": "private words", "request_id": "r2", "stop": "private"})
    assert "chatcmpl-r1" in caplog.text
    assert "cmpl-r2" in caplog.text
    assert "private" not in caplog.text


# ---- answers as the operator wants them ----


def test_usage_can_be_forced(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says("ab"), enable_force_include_usage=True) as server:
        for body in ({"messages": HI}, {"messages": HI, "stream_options": {"include_usage": False}}):
            *chunks, last = server.events(CHAT, body)
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 3
            assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3]


def test_tokens_as_ids_by_default(tokenizer: Tokenizer, says: Any) -> None:
    def tokens(server: LiveServer, **more: Any) -> list[str]:
        logprobs = server.post(TEXT, {"prompt": "a", "logprobs": 0, "max_tokens": 1, **more}).json
        found: list[str] = logprobs["choices"][0]["logprobs"]["tokens"]
        return found

    with running(tokenizer, says("ab"), return_tokens_as_token_ids=True) as server:
        assert tokens(server) == [f"token_id:{tokenizer.encode('a')[0]}"]
        assert tokens(server, return_tokens_as_token_ids=False) == ["a"]
        chat = server.post(CHAT, {"messages": HI, "logprobs": True}).json["choices"][0]["logprobs"]
        assert chat["content"][0]["token"].startswith("token_id:")


def test_an_answer_with_many_logprobs_is_written_in_a_thread(
    tokenizer: Tokenizer, says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[str] = []
    choice = CompletionWriter._choice

    def noted(*arguments: Any) -> dict[str, Any]:
        writers.append(threading.current_thread().name)
        return choice(*arguments)

    monkeypatch.setattr(CompletionWriter, "_choice", noted)
    monkeypatch.setattr(answer, "IN_THREAD", 1000)
    with running(tokenizer, says("ab")) as server:
        for size in (10, 100):
            answered = server.post(TEXT, {"prompt": "x" * size, "prompt_logprobs": 20}).json
            assert len(answered["choices"][0]["prompt_logprobs"]) == size
    loop, thread = writers
    assert thread.startswith("work")
    assert not loop.startswith("work")
