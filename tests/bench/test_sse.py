import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bench.sse import Chunk, EventDecoder, describe_error, read_chunk


@given(
    payloads=st.lists(st.text(min_size=1).filter(lambda text: not set(text) & {"\r", "\n"})),
    cuts=st.lists(st.integers(min_value=0, max_value=400)),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_events_are_the_same_wherever_the_bytes_are_cut(
    payloads: list[str], cuts: list[int], newline: str
) -> None:
    body = "".join(f"data: {payload}{newline}{newline}" for payload in payloads).encode()
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    decoder = EventDecoder()
    pieces = [body[low:high] for low, high in itertools.pairwise(edges)]
    assert [event for piece in pieces for event in decoder.feed(piece)] == payloads


def test_comments_and_other_fields_are_dropped_and_data_lines_are_joined() -> None:
    body = b": ping\n\nevent: message\nid: 3\ndata:a\ndata: b\n\ndata: c"
    assert EventDecoder().feed(body) == ["a\nb"]


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
