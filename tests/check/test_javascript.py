"""JavaScript and TypeScript that call models."""

from __future__ import annotations

import pytest

from .finding import in_code, places

CREATE = "client.chat.completions.create"


def found(text: str, path: str = "app.ts") -> set[tuple[str, int]]:
    return places(in_code(text, path))


@pytest.mark.parametrize("path", ["app.ts", "app.js", "app.mjs", "app.tsx", "app.jsx"])
@pytest.mark.parametrize(
    "call",
    [
        f"const r = await {CREATE}({{ model: 'm', messages }});",
        f"const r = await {CREATE}({{ model: 'm', messages, max_tokens: null }});",
        f"const r = await {CREATE}({{ messages, 'max_completion_tokens': -1 }});",
        "const r = await openai.responses.create({ model: 'm', input: 'hi' });",
        "const { text } = await generateText({ model: openai('m'), prompt: 'completions' });",
        "const r = await fetch(`${b}/v1/chat/completions`, { headers, body: JSON.stringify({ messages }) });",
        "const r = await axios.post(base + '/v1/chat/completions', { messages }, { headers });",
    ],
)
def test_calls_without_a_bound(call: str, path: str) -> None:
    assert found(f"// openai\n{call}\n", path) == {("call-unbounded", 2)}


@pytest.mark.parametrize(
    "call",
    [
        f"await {CREATE}({{ model: 'm', messages, max_tokens: 100 }});",
        f"await {CREATE}({{ model: 'm', messages, max_tokens }});",
        f"await {CREATE}({{ ...options, messages }});",
        f"await {CREATE}(request);",
        "await client.completions.create({ prompt: 'a' });",
        "await openai.responses.create({ input: 'hi', max_output_tokens: limit });",
        "await streamText({ model: openai('m'), maxOutputTokens: 100 });",
        "await fetch(`${base}/v1/chat/completions`, { method: 'POST', headers, body });",
        "await fetch(`${b}/v1/chat/completions`, { headers, body: JSON.stringify({ ...request }) });",
        "await fetch('/api/completions-of-tasks', { body: JSON.stringify({ a: 1 }) });",
    ],
)
def test_calls_that_are_right_or_not_known(call: str) -> None:
    assert found(call) == set()


def test_constants_are_followed() -> None:
    assert found(f"const body = {{ messages }};\nawait {CREATE}(body);\n") == {("call-unbounded", 2)}
    assert found(f"const body = {{ messages }};\nbody.max_tokens = 5;\nawait {CREATE}(body);\n") == set()
    assert found(f"let body = {{ messages }};\nawait {CREATE}(body);\n") == set()


def test_keys_and_tags() -> None:
    make = 'const c = new OpenAI({{ baseURL: "http://llm/v1", apiKey: {}{} }});'
    assert found(make.format('"vllm"', "")) == {("client-keyless", 1), ("call-untagged", 1)}
    assert found(make.format('"sk-aB3dE5fG7hJ9kL1mN3pQ5rS7"', "")) == {
        ("key-in-text", 1),
        ("call-untagged", 1),
    }
    assert (
        found(make.format("process.env.KEY", ', defaultHeaders: { "x-penstock-feature": "chat" }')) == set()
    )
    assert found("const c = new OpenAI();") == set()
    post = "await fetch('http://llm/v1/completions', {{ method: 'POST', headers: {}, body }});"
    assert found(post.format("{ 'content-type': 'application/json' }")) == {("client-keyless", 1)}
    assert found(post.format("{ Authorization: `Bearer ${key}` }")) == set()


STAYS = "You are a helpful assistant. Answer briefly, and name your sources."


def test_prompts() -> None:
    message = "const m = [{{ role: 'system', content: `{}` }}]; // openai completions"
    assert found(message.format("Today is ${new Date().toISOString()}. " + STAYS)) == {
        ("prompt-dynamic-first", 1)
    }
    assert found(message.format("${user.name}: " + STAYS)) == {("prompt-dynamic-first", 1)}
    assert found(message.format(STAYS + " Today is ${new Date()}.")) == set()
    assert found(message.format("${COMPANY}: " + STAYS)) == set()


@pytest.mark.parametrize(
    ("loop", "endless"),
    [
        ("while (true) {{ const r = await {}; if (r.done) break; }}", True),
        ("for (;;) {{ const r = await {}; if (!r.tools) return r; }}", True),
        ("do {{ r = await {}; }} while (r.choices[0].message.tool_calls);", True),
        ("for (let i = 0; i < 8; i++) {{ r = await {}; }}", False),
        ("while (turns < 8) {{ r = await {}; turns++; }}", False),
        ("while (true) {{ r = await {}; if (++turns >= maxTurns) break; }}", False),
        ("while (true) {{ const q = await rl.question('> '); r = await {}; }}", False),
        ("while (true) {{ register(() => {}); await sleep(1); }}", False),
    ],
)
def test_loops(loop: str, endless: bool) -> None:
    text = loop.format(f"{CREATE}({{ messages, max_tokens: 5 }})")
    assert found(text) == ({("loop-unbounded", 1)} if endless else set())


def test_the_second_document_is_typescript() -> None:
    text = """\
import OpenAI from "openai"; const client = new OpenAI({ baseURL: "http://llm/v1", apiKey: "vllm" });
const response = await client.chat.completions.create({ model: "m", messages: [], max_tokens: 64, });
"""
    assert found(text) == {("client-keyless", 1), ("call-untagged", 1)}


def test_tests_and_broken_texts() -> None:
    assert found(f"{CREATE}({{ messages }})", "app.test.ts") == set()
    assert found(f"{CREATE}({{ messages }})", "src/__tests__/app.ts") == set()
    for text in ("openai(" * 2000, "`${openai", "completions({{{{", "<openai completions"):
        in_code(text, "app.tsx")
