"""A gateway whose route escalates, before an engine of ours and a cloud; and upstreams that say something."""

from __future__ import annotations

import json
from typing import Any

from .upstream import Asked, Behaviour, Wire, event

SPEC = """
pools:
  box: {{hardware: L4, price_per_hour: 3.60}}
upstreams:
  ours:
    url: {url}/v1
    kind: penstock
    pool: box
    timeout_connect: 0.3
    timeout_headers: 0.4
    timeout_idle: 0.4
    models: {{tiny: {{name: tiny-1, context: 4096}}}}
  cloud:
    url: {url1}/v1
    timeout_connect: 0.3
    timeout_headers: 0.4
    timeout_idle: 0.4
    models:
      large: {{name: large-1, price: {{input: 10, output: 30, as_of: 2026-11-01, source: x}}}}
routes:
  small:
    targets: [{{model: tiny, upstream: ours}}]
    retries: 0
    escalate:
      to: [{{model: large, upstream: cloud}}]
      verifiers: [{{mean_logprob: -0.5}}]
limits:
  requests_per_minute: 1000
  tokens_per_minute: 1000000
  dollars_per_day: 100
  concurrent_requests: 100
"""
CHEAP_NANO = 250_000_000
"""Dollars of the attempt's 0.25 device-seconds at 3.60 an hour, in nanodollars: 0.00025 dollars."""
CHEAP_DOLLARS = 250_000
DEAR_DOLLARS = 7 * 10_000 + 4 * 30_000
"""Of 7 tokens in and 4 out, at 10 and 30 dollars a million."""


def says(text: str = "one two three four", logprob: float | None = -0.1, **more: Any) -> Behaviour:
    """An upstream that answers chat, completions, responses and messages, whole or streamed, with four
    tokens.

    `finish`: its reason; `message`: more of the message; `device`: its device-seconds.
    """

    async def behave(wire: Wire) -> None:
        asked = wire.asked
        if asked.streams:
            await wire.stream()
            for each in streamed(asked, text, logprob, **more):
                await wire.chunk(each)
            await wire.send(b"0\r\n\r\n")
        else:
            await wire.whole(200, whole(asked, text, logprob, **more))

    return behave


def pieces(text: str) -> list[str]:
    """Four tokens."""
    words = text.split(" ")
    return [word if not index else " " + word for index, word in enumerate(words)]


def whole(
    asked: Asked,
    text: str,
    logprob: float | None,
    *,
    finish: str = "stop",
    message: dict[str, Any] | None = None,
    device: float | None = 0.25,
) -> dict[str, Any]:
    if asked.path == "/v1/messages":
        content = [{"type": "text", "text": text}]
        usage = {"input_tokens": 7, "output_tokens": 4}
        return {"id": "m", "type": "message", "content": content, "stop_reason": finish, "usage": usage}
    usage = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
    usage |= {} if device is None else {"device_seconds": device}
    choices = []
    for index in range(asked.json.get("n") or 1):
        choice: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None}
        told = asked.json.get("logprobs") not in (None, False) and logprob is not None
        if asked.path == "/v1/chat/completions":
            choice["message"] = {"role": "assistant", "content": text, **(message or {})}
            if told:
                entries = [{"token": each, "logprob": logprob, "top_logprobs": []} for each in pieces(text)]
                choice["logprobs"] = {"content": entries}
        else:
            choice["text"] = text
            if told:
                choice["logprobs"] = {"tokens": pieces(text), "token_logprobs": [logprob] * len(pieces(text))}
        choices.append(choice)
    return {"id": "c", "model": asked.json["model"], "choices": choices, "usage": usage}


def streamed(asked: Asked, text: str, logprob: float | None, **more: Any) -> list[bytes]:
    last = whole(asked, text, logprob, **more)
    found = []
    for index, piece in enumerate(pieces(text)):
        choice = {**last["choices"][0], "finish_reason": None, "delta": {"content": piece}}
        choice.pop("message")
        if choice["logprobs"]:
            choice["logprobs"] = {"content": choice["logprobs"]["content"][index : index + 1]}
        found.append(event({"id": "c", "choices": [choice], "usage": None}))
    end = {"index": 0, "delta": {}, "finish_reason": last["choices"][0]["finish_reason"], "logprobs": None}
    found.append(event({"id": "c", "choices": [end], "usage": None}))
    found.append(event({"id": "c", "choices": [], "usage": last["usage"]}))
    return [*found, b"data: [DONE]\n\n"]


def texts(body: bytes) -> str:
    """The text of a stream of chat."""
    found = []
    for line in body.decode().split("\n"):
        if line.startswith("data: {"):
            for choice in json.loads(line[6:]).get("choices", ()):
                found.append(choice["delta"].get("content") or "")
    return "".join(found)
