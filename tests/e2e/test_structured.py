"""Structured outputs through the real server, asked by the official client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from .server import Server, serving

pytest.importorskip("llguidance", reason="structured outputs need llguidance")

QUESTION: Any = [{"role": "user", "content": "What is a Pod?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["pod", "job"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["kind", "count"],
    "additionalProperties": False,
}


class Answer(BaseModel):
    """What `parse` is given."""

    kind: Literal["pod", "job"]
    count: int = Field(ge=1, le=9)
    words: list[Literal["a", "b"]] = Field(max_length=3)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ("--kv-cache-memory-bytes", "64MiB", "--served-model-name", "demo")
    config = ("--structured-outputs-config.backend", "guidance")
    with serving(*flags, *config, log=log) as running:
        assert isinstance(running, Server)
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0, timeout=150) as made:
            yield made


def response_format(schema: Any, **more: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in ("structured_outputs", "guided_json") if name in fields}
    made = client.chat.completions.create(
        **{"model": "demo", "messages": QUESTION, "temperature": 1.5, "seed": 3, "max_tokens": 120, **fields},
        extra_body=extra,
    )
    return made


@pytest.mark.parametrize("strict", [True, False])
def test_json_schema(client: openai.OpenAI, strict: bool) -> None:
    answer = ask(client, response_format=response_format(SCHEMA, strict=strict), n=2, logprobs=True)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content)
        assert (value["kind"] in ("pod", "job"), 1 <= value["count"] <= 9, len(value)) == (True, True, 2)
        assert len(choice.logprobs.content) >= 3


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    asked = response_format(SCHEMA)
    whole = ask(client, response_format=asked).choices[0].message.content
    chunks = ask(client, response_format=asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_parse(client: openai.OpenAI) -> None:
    made = client.chat.completions.parse(
        model="demo", messages=QUESTION, response_format=Answer, max_tokens=160, temperature=1.0, seed=1
    )
    answer = made.choices[0].message.parsed
    assert isinstance(answer, Answer)


def test_json_object(client: openai.OpenAI) -> None:
    answer = ask(client, response_format={"type": "json_object"}, seed=1, max_tokens=200)
    text = answer.choices[0].message.content
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": r"[ab]{3}-\d{2}"}, r"[ab]{3}-\d{2}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'root ::= "x" [0-9] [0-9] "y"'}, r"x\d\dy"),
        ({"json": SCHEMA, "disable_any_whitespace": True}, r'\{"kind":"(pod|job)","count":\d\}'),
    ],
)
def test_structured_outputs(client: openai.OpenAI, outputs: dict[str, Any], pattern: str) -> None:
    for stop in (None, ["zzz"]):
        answer = ask(client, structured_outputs=outputs, stop=stop)
        assert re.fullmatch(pattern, answer.choices[0].message.content)
    made = client.completions.create(
        model="demo",
        prompt=["A Pod is", "A Job is"],
        max_tokens=60,
        extra_body={"structured_outputs": outputs},
    )
    for choice in made.choices:
        assert re.fullmatch(pattern, choice.text)


@pytest.mark.parametrize(
    ("fields", "param", "what"),
    [
        ({"guided_json": {}}, "guided_json", "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "object"),
        (
            {"response_format": response_format({"not": {}}, strict=True)},
            "response_format.json_schema.schema.not",
            "not is not supported",
        ),
        (
            {"response_format": response_format({"type": "integer", "minimum": 3, "maximum": 1})},
            "response_format.json_schema.schema",
            "minimum",
        ),
        (
            {"response_format": response_format({"$ref": "#"})},
            "response_format.json_schema.schema",
            "no output",
        ),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "exactly one"),
        ({"structured_outputs": {"regx": "a"}}, "structured_outputs.regx", "regex"),
        (
            {"structured_outputs": {"regex": "(((a{90}){90}){90}){90}"}},
            "structured_outputs",
            "takes|too many",
        ),
    ],
)
def test_what_cannot_be_met_is_refused_with_the_reason(
    client: openai.OpenAI, fields: dict[str, Any], param: str, what: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    body: Any = caught.value.body
    assert body["param"] == param
    assert re.search(what, body["message"])


def test_what_is_skipped_is_named(client: openai.OpenAI) -> None:
    schema = {**SCHEMA, "uniqueItems": True, "x-order": 1}
    raw = client.chat.completions.with_raw_response.create(
        model="demo", messages=QUESTION, max_tokens=60, response_format=response_format(schema)
    )
    where = "response_format.json_schema.schema"
    assert raw.headers["x-penstock-ignored"] == f"{where}.uniqueItems, {where}.x-order"


def test_bad_words_change_what_is_said(client: openai.OpenAI) -> None:
    said = ask(client, temperature=0).choices[0].message.content
    words = re.findall(r"[A-Za-z]{4,}", said)[:3]
    made = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, max_tokens=40, extra_body={"bad_words": words}
    )
    assert made.choices[0].message.content != said  # other tokens may still spell them, as in vLLM
