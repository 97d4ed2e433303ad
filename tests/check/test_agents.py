"""Configurations of agents in YAML, JSON and TOML; batches; vLLM's --config."""

from __future__ import annotations

import json

import pytest

from .finding import in_code, of, places


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("llm:\n  model: qwen\n  temperature: 0\n", {("call-unbounded", 1)}),
        ("llm:\n  model: qwen\n  temperature: 0\n  max_tokens: 200\n", set()),
        ("llm:\n  model: qwen\n  max_tokens: null\n", {("call-unbounded", 3)}),
        ("llm:\n  model: qwen\n  max_tokens: 0\n", {("call-unbounded", 3)}),
        ("llm:\n  model: qwen\n  max_tokens: -1\n", {("call-unbounded", 3)}),
        ("llm:\n  model: qwen\n  max_tokens: 128000\n", {("call-unbounded", 3)}),
        ("llm:\n  model: qwen\n  max_tokens: ${MAX}\n  temperature: 1\n", set()),
        ("llm:\n  model: qwen\n", set()),
        ("search:\n  model: bge-embed\n  temperature: 0\n", set()),
        ("car:\n  model: T\n  seats: 4\n", set()),
        ("agent:\n  max_iterations: null\n", {("loop-unbounded", 2)}),
        ("agent:\n  max_turns: -1\n", {("loop-unbounded", 2)}),
        ("agent:\n  max_steps: 12\n", set()),
        ("agents:\n- model: q\n  tools: [a]\n", {("agent-unbounded", 2)}),
        ("agents:\n- model: q\n  tools: [a]\n  max_turns: 8\n", set()),
        ("ollama:\n  num_ctx: 131072\n", {("context-just-in-case", 2)}),
        ("ollama:\n  num_ctx: 8192\n", set()),
        ("key: sk-aB3dE5fG7hJ9kL1mN3pQ5rS7\n", {("key-in-text", 1)}),
    ],
)
def test_yaml(text: str, expected: set[tuple[str, int]]) -> None:
    assert places(of(text, "agent.yaml")) == expected


def test_json_and_toml_say_the_same() -> None:
    data = {"agent": {"llm": {"model": "q", "temperature": 0}, "max_iterations": None}}
    text = json.dumps(data, indent=1)
    assert places(of(text, "agent.json")) == {("call-unbounded", 3), ("loop-unbounded", 7)}
    toml = '# a\n[agent]\nmax_iterations = -1\n\n[agent.llm]\nmodel = "q"\ntemperature = 0\n'
    assert places(in_code(toml, "agent.toml")) == {("loop-unbounded", 3), ("call-unbounded", 5)}
    assert in_code("= broken", "agent.toml") == []


def test_answers_and_schemas_are_none() -> None:
    answer = {"object": "chat.completion", "model": "q", "choices": [], "usage": {}, "temperature": 0}
    assert of(json.dumps(answer), "answer.json") == []
    schema = {"$schema": "x", "properties": {"model": "string", "temperature": {}}}
    assert of(json.dumps(schema), "schema.json") == []


def test_requests_of_a_batch() -> None:
    def line(url: str, **body: object) -> str:
        return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body})

    rows = [
        line("/v1/chat/completions", messages=[]),
        line("/v1/chat/completions", messages=[], max_tokens=5),
        line("/v1/embeddings", input="a"),
        "{broken",
        line("/v1/responses", input="a"),
    ]
    assert places(in_code("\n".join(rows) + "\n", "batch.jsonl")) == {
        ("call-unbounded", 1),
        ("call-unbounded", 5),
    }


def test_a_file_of_vllms_flags() -> None:
    text = """\
model: Qwen/Qwen3-8B
max-model-len: 131072
gpu-memory-utilisation: 0.9
tensor_parallel_size: 3
trust-remote-code: true
enable-prefix-caching: false
swap-space: 4
served-model-name: [a, b]
"""
    assert places(of(text, "engine.yaml")) == {
        ("context-just-in-case", 2),
        ("flag-unknown", 3),
        ("tensor-parallel", 4),
        ("trust-remote-code", 5),
        ("prefix-caching-off", 6),
        ("flag-removed", 7),
    }
