"""What a client reads of streams and errors, field by field."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.http.chunks import Chunk, describe_error, read_chunk


def choices(*several: dict[str, Any]) -> dict[str, Any]:
    return {"choices": list(several)}


@pytest.mark.parametrize(
    ("payload", "chunk"),
    [
        # several choices: their texts together, and any of their reasons
        (
            choices({"text": "a", "finish_reason": "stop"}, {"text": "b"}),
            Chunk(text="ab", has_choice=True, is_token=True, finish_reason="stop"),
        ),
        (
            choices({"delta": {"reasoning": "x"}}, {"delta": {"reasoning_content": "y"}}),
            Chunk(reasoning="xy", has_choice=True, is_token=True),
        ),
        (
            choices({"text": "", "finish_reason": "stop"}, {"text": "b"}),
            Chunk("b", has_choice=True, is_token=True, finish_reason="stop"),
        ),
        (
            choices({"text": "b"}, {"text": "", "finish_reason": "stop"}),
            Chunk("b", has_choice=True, is_token=True, finish_reason="stop"),
        ),
        # of both kinds of field the one that is filled, and neither from the other place
        (
            choices({"delta": {"reasoning_content": "", "reasoning": "r"}}),
            Chunk(reasoning="r", has_choice=True, is_token=True),
        ),
        (choices({"delta": {"text": "t"}, "text": "u", "content": "v"}), Chunk(has_choice=True)),
        (choices({"content": "v"}), Chunk(has_choice=True)),
        (choices({"delta": None, "text": "u"}), Chunk("u", has_choice=True, is_token=True)),
        (
            choices({"delta": {"role": "assistant", "content": "", "tool_calls": [1]}}),
            Chunk(has_choice=True, is_token=True),
        ),
        (choices({"delta": {"content": None}}), Chunk(has_choice=True)),
        # what is no choice, no usage, no error
        ({"choices": ["x", None]}, Chunk()),
        ({"choices": None, "usage": [1], "error": "", "object": "chat.completion.chunk"}, Chunk()),
        ({"error": {"detail": "deep"}}, Chunk(error="deep")),
        ({"error": {"error": {"message": "deeper"}}}, Chunk(error="deeper")),
        ("x" * 300, Chunk(error=f"expected a JSON object in the stream, got {'x' * 200!r}")),
    ],
)
def test_what_a_chunk_says(payload: object, chunk: Chunk) -> None:
    assert read_chunk(payload) == chunk


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("x" * 300, "x" * 300),
        ("x" * 301, "x" * 299 + "…"),
        (" \n ", "(empty body)"),
        ("[1, 2]", "[1, 2]"),
        ('"text"', "text"),
        ({"error": "", "message": "m", "detail": "d"}, "m"),
        ({"message": "", "detail": "d"}, "d"),
        ({"other": 1}, "{'other': 1}"),
        ({"error": {"code": 5}}, "{'code': 5}"),
    ],
)
def test_errors_become_one_line(body: object, line: str) -> None:
    assert describe_error(body) == line
