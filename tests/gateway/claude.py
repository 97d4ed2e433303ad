"""What a fake upstream answers that has what Penstock's engine has not: Anthropic's messages, whole and
streamed, and counted tokens; OpenAI's responses and embeddings."""

from __future__ import annotations

import json
from typing import Any

from .upstream import TOKENS, Wire

INPUT, OUTPUT = 10, len(TOKENS)


def _message(text: str) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "content": [{"type": "text", "text": text}] if text else [],
        "stop_reason": "end_turn" if text else None,
        "stop_sequence": None,
        "usage": {"input_tokens": INPUT, "output_tokens": OUTPUT if text else 1},
    }


def _event(payload: dict[str, Any]) -> bytes:
    return f"event: {payload['type']}\ndata: {json.dumps(payload)}\n\n".encode()


def _response() -> dict[str, Any]:
    text = {"type": "output_text", "text": "".join(TOKENS), "annotations": []}
    item = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [text]}
    usage = {"input_tokens": INPUT, "output_tokens": OUTPUT, "total_tokens": INPUT + OUTPUT}
    return {"id": "resp_1", "object": "response", "status": "completed", "output": [item], "usage": usage}


async def claude(wire: Wire) -> None:
    """As the clouds do; a prompt of `wait` is answered when the test says so."""
    if wire.asked.path.startswith("/v1/responses"):
        await wire.whole(200, _response())
        return
    if wire.asked.path == "/v1/embeddings":
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}]
        usage = {"prompt_tokens": INPUT, "total_tokens": INPUT}
        await wire.whole(200, {"object": "list", "data": data, "model": "cloud", "usage": usage})
        return
    if wire.asked.path == "/v1/messages/count_tokens":
        await wire.whole(200, {"input_tokens": INPUT})
        return
    if b"wait" in wire.asked.body:
        await wire.read_by_client()
    if not wire.asked.streams:
        await wire.whole(200, _message("".join(TOKENS)))
        return
    start = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    usage = {"output_tokens": OUTPUT}
    ended = {"stop_reason": "end_turn", "stop_sequence": None}
    stop = {"type": "message_delta", "delta": ended, "usage": usage}
    events = [
        {"type": "message_start", "message": _message("")},
        start,
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": token}}
            for token in TOKENS
        ),
        {"type": "content_block_stop", "index": 0},
        stop,
        {"type": "message_stop"},
    ]
    await wire.stream()
    for each in events:
        await wire.chunk(_event(each))
    await wire.send(b"0\r\n\r\n")


claude.__name__ = "behave"  # its connections carry more than one exchange
