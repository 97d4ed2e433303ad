"""Chunks and errors of the common servers, as a client reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.http.chunks import Chunk, describe_error, read_chunk


@pytest.mark.parametrize(
    ("payload", "chunk"),
    [
        ({"choices": [{"text": "a"}]}, Chunk(text="a", has_choice=True, is_token=True)),
        # half a character: a token without text
        ({"choices": [{"text": "", "finish_reason": None}]}, Chunk(has_choice=True, is_token=True)),
        ({"choices": [{"text": "", "finish_reason": "stop"}]}, Chunk(has_choice=True, finish_reason="stop")),
        (
            {"choices": [{"text": "z", "finish_reason": "length"}], "usage": {"prompt_tokens": 1}},
            Chunk("z", "", True, True, "length", {"prompt_tokens": 1}),
        ),
        ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, Chunk(has_choice=True)),
        (
            {"choices": [{"delta": {"role": "assistant", "content": "Hi"}}]},
            Chunk(text="Hi", has_choice=True, is_token=True),
        ),
        ({"choices": [{"delta": {"content": ""}}]}, Chunk(has_choice=True, is_token=True)),
        (
            {"choices": [{"delta": {"reasoning_content": "hm"}}]},
            Chunk(reasoning="hm", has_choice=True, is_token=True),
        ),
        ({"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}, Chunk(has_choice=True, is_token=True)),
        ({"choices": [{"delta": {}, "finish_reason": "stop"}]}, Chunk(has_choice=True, finish_reason="stop")),
        ({"choices": [], "usage": {"completion_tokens": 3}}, Chunk(usage={"completion_tokens": 3})),
        ({"choices": [{"text": "a"}], "error": None}, Chunk(text="a", has_choice=True, is_token=True)),
        ({"error": {"message": "boom", "code": 500}}, Chunk(error="boom")),
        ({"object": "error", "message": "old style"}, Chunk(error="old style")),
        (
            ["not", "an", "object"],
            Chunk(error="expected a JSON object in the stream, got \"['not', 'an', 'object']\""),
        ),
    ],
)
def test_what_a_chunk_says(payload: Any, chunk: Chunk) -> None:
    assert read_chunk(payload) == chunk


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ({"error": {"message": "too long", "type": "invalid_request_error"}}, "too long"),
        ({"error": "plain"}, "plain"),
        (
            {"detail": [{"loc": ["body"], "msg": "field required"}]},
            "[{'loc': ['body'], 'msg': 'field required'}]",
        ),
        (json.dumps({"message": "in JSON"}).encode(), "in JSON"),
        (b"<html>\n  Bad   gateway</html>", "<html> Bad gateway</html>"),
        (b"\xff\xfe", "��"),
        (b"", "(empty body)"),
        ("x" * 400, "x" * 299 + "…"),
    ],
)
def test_errors_become_one_line(body: object, line: str) -> None:
    assert describe_error(body) == line
