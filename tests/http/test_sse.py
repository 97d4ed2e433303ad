"""Events as they are written, and as they are read from whatever pieces arrive."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from penstock.http.sse import DONE, END, EventDecoder, event


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


def test_what_is_written_can_be_read() -> None:
    assert EventDecoder().feed(event('{"a":"ö"}'.encode()) + END) == ['{"a":"ö"}', DONE]
