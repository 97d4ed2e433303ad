"""All parts are real: PostgreSQL, Redis, two workers of a gateway, an engine, and the official clients.

openai, anthropic ─▶ gateway: 2 workers ─┬─▶ penstock serve, the demo model
                       │          │      └─▶ a fake that speaks Anthropic's dialect
                 PostgreSQL     Redis
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.gateway.claude import INPUT, OUTPUT, claude
from tests.gateway.process import Process, gateway
from tests.gateway.stores import postgres, redis
from tests.gateway.upstream import TOKENS, Upstream
from tests.http.live import PATIENCE, exchange

from .server import Server, eventually, serving

SPEC = """
pools: {{box: {{hardware: cpu, price_per_hour: 3.60}}}}
upstreams:
  engine: {{url: "{engine}", kind: penstock, pool: box, models: {{demo: {{context: 512}}}}}}
  claude:
    url: "{claude}"
    kind: anthropic
    api_key_env: CLAUDE_KEY
    models: {{claude-x: {{price: {{input: 1000, output: 10000, as_of: 2026-01-01, source: test}}}}}}
  cloud: {{url: "{claude}", kind: openai, models: {{cloud: {{}}}}}}
routes:
  cloud: {{targets: [{{model: cloud, upstream: cloud}}]}}
  small: {{targets: [{{model: demo, upstream: engine}}]}}
  claude: {{targets: [{{model: claude-x, upstream: claude}}], retries: 0}}
gateway: {{port: 0, workers: 2}}
ledger: {{url: "{database}", spool: ./spool, counters: "{counters}"}}
"""
ASKED = [{"role": "user", "content": "What is a Pod?"}]
COST = INPUT * 10**6 + OUTPUT * 10**7
"""Nanodollars of one message of the fake: $1,000 and $10,000 for a million tokens."""


class Parts:
    """All of them, and what was asked for."""

    def __init__(self, process: Process, engine: Server, fake: Upstream) -> None:
        self.gateway, self.engine, self.fake = process, engine, fake
        self.expected: dict[str, str] = {}
        """Request ids that must have a row → why."""

    def openai(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self.gateway.url, api_key=key or self.gateway.key, max_retries=0, timeout=PATIENCE
        )

    def id(self, why: str) -> dict[str, str]:
        """Headers of a request that is let through."""
        name = f"r{len(self.expected)}-{why.replace(' ', '-')}"
        self.expected[name] = why
        return {"X-Request-Id": name}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    folder = tmp_path_factory.mktemp("parts")
    fake = Upstream(default=claude).start()
    flags = ("demo", "--dtype", "float32", "--kv-cache-memory-bytes", "32MiB", "--max-model-len", "512")
    try:
        with (
            postgres() as database,
            redis() as counters,
            serving(*flags, log=folder / "engine.log") as engine,
        ):
            spec = SPEC.format(engine=engine.url, claude=fake.url, database=database, counters=counters)
            with gateway(folder, spec, url=database, environment={"CLAUDE_KEY": "sk-ant"}) as process:
                yield Parts(process, engine, fake)
    finally:
        fake.stop()


def test_openais_client(parts: Parts) -> None:
    with parts.openai() as client:
        named = {"model": "small", "temperature": 0, "max_tokens": 12}
        whole = client.chat.completions.create(**named, messages=ASKED, extra_headers=parts.id("chat"))
        assert whole.usage.completion_tokens > 0
        chunks = list(
            client.chat.completions.create(
                **named,
                messages=ASKED,
                stream=True,
                stream_options={"include_usage": True},
                extra_headers=parts.id("stream"),
            )
        )
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        done = client.completions.create(**named, prompt="A Pod is", extra_headers=parts.id("completion"))
        assert done.choices[0].text
        # what the engine does not have
        first = client.responses.create(model="cloud", input="Hi!", extra_headers=parts.id("response"))
        assert (first.output_text, first.id != "resp_1") == ("".join(TOKENS), True)  # its owner's name for it
        assert client.responses.retrieve(first.id).output_text == first.output_text
        client.responses.create(
            model="cloud", input="And?", previous_response_id=first.id, extra_headers=parts.id("response")
        )
        assert parts.fake.asked[-1].json["previous_response_id"] == "resp_1"
        vectors = client.embeddings.create(
            model="cloud", input="Hi!", encoding_format="float", extra_headers=parts.id("embedding")
        )
        assert vectors.data[0].embedding == [0.5, -0.5]
        assert [model.id for model in client.models.list()] == ["cloud", "small", "claude"]
        assert client.models.retrieve("small").id == "small"


def test_errors_that_openais_client_knows(parts: Parts) -> None:
    only_small = parts.gateway.new_key(routes=["small"])[1]
    rated = parts.gateway.new_key({"requests_per_minute": 1})[1]
    poor = parts.gateway.new_key({"dollars_per_day": 0})[1]

    def ask(key: str | None, model: str, top_p: float = 1, **headers: str) -> Any:
        with parts.openai(key) as client:
            return client.chat.completions.create(
                model=model,
                messages=ASKED,  # type: ignore[arg-type]
                max_tokens=4,
                top_p=top_p,
                extra_headers=headers,
            )

    with pytest.raises(openai.AuthenticationError):
        ask("sk-ps-wrong", "small")
    with pytest.raises(openai.PermissionDeniedError):
        ask(only_small, "claude")
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(None, "gpt-4")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):  # the engine's own words
        ask(None, "small", top_p=2, **parts.id("refused by the engine"))
    ask(rated, "small", **parts.id("the only one of a minute"))
    with pytest.raises(openai.RateLimitError) as rate:
        ask(rated, "small")
    assert rate.value.code == "rate_limit_exceeded"
    assert 1 <= int(rate.value.response.headers["retry-after"]) <= 61
    with pytest.raises(openai.RateLimitError) as quota:
        ask(poor, "small")
    assert quota.value.code == "insufficient_quota"
    assert quota.value.response.headers["x-should-retry"] == "false"


def test_anthropics_client(parts: Parts) -> None:
    anthropic = pytest.importorskip("anthropic", reason="Anthropic's client is not installed")
    url = parts.gateway.url.removesuffix("/v1")
    named = {"model": "claude", "max_tokens": 16, "messages": [{"role": "user", "content": "Hi!"}]}
    with anthropic.Anthropic(base_url=url, api_key=parts.gateway.key, max_retries=0) as client:
        whole = client.messages.create(**named, extra_headers=parts.id("message"))
        assert (whole.content[0].text, whole.usage.output_tokens) == ("".join(TOKENS), OUTPUT)
        with client.messages.stream(**named, extra_headers=parts.id("message stream")) as stream:
            assert "".join(stream.text_stream) == "".join(TOKENS)
            assert stream.get_final_message().usage.output_tokens == OUTPUT
        asked = {name: value for name, value in named.items() if name != "max_tokens"}
        assert client.messages.count_tokens(**asked).input_tokens == INPUT
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**{**named, "model": "claude-0"})
    poor = parts.gateway.new_key({"dollars_per_day": 0})[1]
    with anthropic.Anthropic(base_url=url, api_key=poor, max_retries=2) as client:
        with pytest.raises(anthropic.RateLimitError) as quota:
            client.messages.create(**named)
        assert quota.value.response.headers["x-should-retry"] == "false"
    with (
        anthropic.Anthropic(base_url=url, api_key="sk-ps-wrong", max_retries=0) as client,
        pytest.raises(anthropic.AuthenticationError),
    ):
        client.messages.create(**named)
    keys = {each.headers["x-api-key"] for each in parts.fake.asked if each.path.startswith("/v1/messages")}
    assert keys == {"sk-ant"}


def named(row: dict[str, Any]) -> str:
    """The client's own id of a request, which the row's begins with."""
    return str(row["id"].rpartition(".")[0])


def message(parts: Parts, key: str, id: str, text: str = "Hi!") -> int:
    """One message to the fake; its status."""
    body = {"model": "claude", "max_tokens": 16, "messages": [{"role": "user", "content": text}]}
    headers = {"x-api-key": key, "X-Request-Id": id}
    return exchange(parts.gateway.port, "POST", "/v1/messages", body, headers).status


def test_the_books(parts: Parts) -> None:
    """A budget that many take of at once, while one of the two workers is killed; then all rows together."""
    gateway = parts.gateway
    cap = 25 * COST
    key_id, key = gateway.new_key({"dollars_per_day": cap / 10**9})
    statuses: dict[str, int] = {}

    def ask(id: str, text: str = "Hi!") -> None:
        try:
            statuses[id] = message(parts, key, id, text)
        except OSError:  # its worker was killed
            statuses[id] = 0

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        held = pool.submit(ask, "held", "wait")
        eventually(lambda: any(b"wait" in each.body for each in parts.fake.asked))
        before = set(gateway.workers)
        victim = gateway.who_has("held")
        asking = [pool.submit(ask, f"b{number}") for number in range(12)]
        os.kill(victim, signal.SIGKILL)
        for each in [held, *asking]:
            each.result(PATIENCE)
        eventually(lambda: len(set(gateway.workers) - {victim}) == 2)
        assert victim in before
        parts.fake.go()
        # once the dead one's journal is read, on until nothing is left
        eventually(lambda: any(named(row) == "held" for row in gateway.rows()))
        for each in [pool.submit(ask, f"c{number}") for number in range(16)]:
            each.result(PATIENCE)
    (worst,) = {row["reserved_dollars"] for row in gateway.rows() if named(row) == "held"}

    def exhausted() -> bool:
        ask(f"d{len(statuses)}")
        spent = sum(row["dollars"] or 0 for row in gateway.rows() if row["key_id"] == key_id)
        return bool(cap - spent < worst)

    eventually(exhausted)
    ask("last")
    assert statuses["last"] == 429
    gateway.stop()

    rows = {}
    for row in gateway.rows():
        assert named(row) not in rows, "a request has two rows"
        rows[named(row)] = row
    mine = {id: row for id, row in rows.items() if row["key_id"] == key_id}
    assert set(statuses.values()) <= {0, 200, 429}
    assert statuses["held"] == 0
    answered = {id for id, status in statuses.items() if status == 200}
    cut = {id for id, status in statuses.items() if status == 0}
    assert answered <= set(mine) <= answered | cut  # whoever was refused has no row
    assert (mine["held"]["settlement"], mine["held"]["dollars"]) == (
        "unsettled",
        mine["held"]["reserved_dollars"],
    )
    assert all(mine[id]["dollars"] == COST for id in answered)
    total = sum(row["dollars"] or 0 for row in mine.values())
    assert cap - worst < total <= cap
    charged = gateway.charged()
    assert [used for id, used in charged.items() if id.startswith(f"key:{key_id}|dollars|day")] == [total]
    # and everybody else's
    assert {id for id in rows if id not in mine} == set(parts.expected)
    assert all(row["settlement"] == "settled" for id, row in rows.items() if id not in mine)
    engine = [row for row in rows.values() if row["upstream"] == "engine" and row["status"] == 200]
    page = parts.engine.metrics()
    assert sum(row["output_tokens"] for row in engine) == page.total("vllm:generation_tokens_total")
    assert sum(row["input_tokens"] for row in engine) == page.total("vllm:prompt_tokens_total")
    assert all(row["device_seconds"] > 0 for row in engine)
    assert not re.search("Traceback|CRITICAL", gateway.log), gateway.log
