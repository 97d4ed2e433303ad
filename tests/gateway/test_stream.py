"""What goes through a stream byte by byte, what is taken out of it, and what the gateway reads of answers."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.gateway.endpoints import ENDPOINTS, Endpoint
from penstock.gateway.stream import MOST, StreamFilter, TooLong
from penstock.gateway.usage import Tally, read_answer

BY_PATH = {each.path: each for each in ENDPOINTS}
CHAT = BY_PATH["/v1/chat/completions"]


def event(payload: Any, name: str = "", end: str = "\n") -> bytes:
    text = payload if isinstance(payload, str) else json.dumps(payload, separators=(",", ":"))
    head = f"event: {name}{end}" if name else ""
    return f"{head}data: {text}{end}{end}".encode()


def choice(text: str, **more: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "delta": {"content": text}}], **more}


USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}


def run(
    data: bytes, cuts: list[int], endpoint: Endpoint = CHAT, *, wanted: bool = False
) -> tuple[bytes, Tally, StreamFilter]:
    tally = Tally()
    filter = StreamFilter(endpoint, tally, usage_wanted=wanted)
    out = b""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in pairwise(edges):
        if start < end:
            out += filter.feed(data[start:end])
    return out, tally, filter


cuts = st.lists(st.integers(0, 600), max_size=12)
texts = st.lists(st.text(max_size=12), max_size=6)


@given(texts, cuts, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_whatever_the_pieces_the_bytes_are_those_without_the_usage(
    words: list[str], cuts: list[int], end: str, null: bool
) -> None:
    words = [*words, '","usage":null,"', "data: [DONE]", 'data: {"error"}']
    plain = [event(choice(word), end=end) for word in words]
    more = {"usage": None} if null else {}
    sent = [event(choice(word, **more), end=end) for word in words]
    last = event("[DONE]", end=end)
    data = b": comment\n\n" + b"".join(sent) + event({"choices": [], "usage": USAGE}, end=end) + last
    out, tally, filter = run(data, cuts)
    assert out == b": comment\n\n" + b"".join(plain) + last
    assert (tally.input, tally.output, tally.cached, tally.told, tally.final) == (5, 3, 2, True, True)
    assert filter.ended
    assert filter.failed is None
    assert tally.events == len(words)
    assert not run(data[: -len(last)], cuts)[2].ended


@given(st.binary(max_size=300), cuts)
def test_who_wants_usage_gets_every_whole_event_as_it_came(data: bytes, cuts: list[int]) -> None:
    out, _, filter = run(data, cuts, wanted=True)
    if filter.failed is None:
        assert data.startswith(out)
        assert b"\n\n" not in data[len(out) :]


@given(st.binary(max_size=300), cuts)
def test_nothing_in_a_stream_breaks_the_gateway(data: bytes, cuts: list[int]) -> None:
    for endpoint in ENDPOINTS:
        run(b'data: {"usage":' + data + b"}\n\ndata: " + data + b"\n\n", cuts, endpoint)


def test_usage_in_the_last_chunk_with_a_choice_stays_there() -> None:
    data = event(choice("a", usage=USAGE)) + event("[DONE]")
    out, tally, _ = run(data, [])
    assert out == data
    assert tally.output == 3


def test_half_an_event_never_goes_out() -> None:
    tally = Tally()
    filter = StreamFilter(CHAT, tally, usage_wanted=True)
    whole = event(choice("a"))
    assert filter.feed(whole + whole[:-1]) == whole
    assert filter.feed(whole[-1:]) == whole


def test_an_event_without_an_end_is_refused() -> None:
    filter = StreamFilter(CHAT, Tally(), usage_wanted=True)
    filter.feed(b"x" * MOST)
    with pytest.raises(TooLong):
        filter.feed(b"x")


def test_an_error_ends_it_and_nothing_after_it_counts() -> None:
    data = event(choice("a")) + event({"error": {"message": "no"}}) + event(choice("b")) + event("[DONE]")
    out, tally, filter = run(data, [])
    assert out == event(choice("a"))
    assert filter.failed == b'{"error":{"message":"no"}}'
    assert not filter.ended
    assert tally.events == 1


def test_responses_and_messages_have_ends_of_their_own() -> None:
    usage = {"input_tokens": 9, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 3}}
    for last in ("completed", "incomplete"):
        data = event({"type": "response.output_text.delta", "delta": "a"}, "response.output_text.delta")
        data += event(
            {"type": f"response.{last}", "response": {"id": "r", "usage": usage}}, f"response.{last}"
        )
        out, tally, filter = run(data, [50], BY_PATH["/v1/responses"])
        assert out == data
        assert (tally.input, tally.output, tally.cached, filter.ended) == (9, 4, 3, True)
    start = {"input_tokens": 10, "cache_read_input_tokens": 6, "cache_creation_input_tokens": 1}
    data = event(
        {"type": "message_start", "message": {"usage": {**start, "output_tokens": 1}}}, "message_start"
    )
    data += event({"type": "message_delta", "usage": {"output_tokens": 8}}, "message_delta")
    cut = data
    data += event({"type": "message_stop"}, "message_stop")
    out, tally, filter = run(data, [], BY_PATH["/v1/messages"])
    assert out == data
    assert (tally.input, tally.output, tally.cached, filter.ended) == (17, 8, 6, True)
    assert not run(cut, [], BY_PATH["/v1/messages"])[2].ended


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 4, "total_tokens": 4}, (4, 0, True)),  # embeddings
        ({"total_tokens": 6}, (6, 0, True)),  # reranking
        ({"prompt_tokens": 1, "completion_tokens": 2}, (1, 2, True)),
        ({"prompt_tokens": -1, "completion_tokens": 2}, (0, 2, True)),
        ({"prompt_tokens": True, "completion_tokens": "9"}, (0, 0, False)),
        ({"prompt_tokens": 10**30}, (0, 0, False)),
        ({"device_seconds": float("1e300")}, (0, 0, False)),
        ("none of it", (0, 0, False)),
        (None, (0, 0, False)),
        ([1], (0, 0, False)),
    ],
)
def test_usage_that_cannot_be_is_as_if_it_was_not_said(usage: Any, expected: tuple[int, int, bool]) -> None:
    tally = Tally()
    assert read_answer(json.dumps({"id": "x", "usage": usage}).encode(), tally)
    assert (tally.input, tally.output, tally.final) == expected
    assert tally.device_seconds is None


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"billed_units": {"input_tokens": 5}}, (5, True)),
        ({"billed_units": {"search_units": 1}}, (0, False)),
        ({"billed_units": {"input_tokens": -1}}, (0, True)),
        ({"billed_units": 5}, (0, False)),
        ([], (0, False)),
    ],
)
def test_what_cohere_bills_is_the_usage_where_there_is_no_other(
    meta: Any, expected: tuple[int, bool]
) -> None:
    tally = Tally()
    assert read_answer(json.dumps({"meta": meta}).encode(), tally)
    assert (tally.input, tally.final) == expected
    tally = Tally()
    assert read_answer(json.dumps({"meta": meta, "usage": {"total_tokens": 9}}).encode(), tally)
    assert (tally.input, tally.final) == (9, True)


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"a":', b"[]", b"null", b"[" * 100_000, b'{"a":1} x'])
def test_what_is_no_json_object_is_no_answer(body: bytes) -> None:
    assert not read_answer(body, Tally())
