"""Forms in any pieces, and what is no form: errors of ours, and nothing left on disk."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.core.errors import InvalidRequest
from penstock.http.form import Form, read_form

from .conftest import form

TRICKY = st.lists(
    st.sampled_from([b"--b", b"\r\n", b"\r\n--b", b"\r\n--b-", b"--", b"\r", b"\n", b"x", b"\x00", b"--c--"]),
    max_size=12,
).map(b"".join)


def read(body: bytes, cuts: list[int]) -> tuple[Form, bytes]:
    """A form that comes in pieces, and its file."""
    ends = sorted({min(cut, len(body)) for cut in cuts} | {len(body)})
    pieces = [body[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    scope: dict[str, Any] = {"headers": [(b"content-type", b'multipart/form-data; boundary="b"')]}
    left = iter(pieces)
    number = iter(range(1, len(pieces) + 1))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": next(left), "more_body": next(number) < len(pieces)}

    with tempfile.TemporaryDirectory() as folder:
        got = asyncio.run(read_form(scope, receive, 1000, Path(folder)))
        with got.file:
            content = got.file.read()
        assert list(Path(folder).iterdir()) == []
    return got, content


@settings(max_examples=100)
@given(content=TRICKY, cuts=st.lists(st.integers(0, 400), max_size=8))
@example(content=b"", cuts=[])
@example(content=b"x" * 300, cuts=list(range(400)))
def test_a_form_is_the_same_in_any_pieces(content: bytes, cuts: list[int]) -> None:
    if b"\r\n--b" in b"\r\n" + content:
        content = content.replace(b"--b", b"--x")
    got, read_back = read(form(content, purpose="batch", model="small"), cuts)
    assert read_back == content
    assert got.size == len(content)
    assert got.fields == {"purpose": "batch", "model": "small"}
    assert (got.filename, got.content_type) == ("in.jsonl", "text/html")


@settings(max_examples=150)
@given(
    at=st.integers(0, 250),
    removed=st.integers(0, 30),
    put=st.binary(max_size=12) | TRICKY,
    cuts=st.lists(st.integers(0, 300), max_size=3),
)
def test_a_form_that_is_broken_is_refused_or_read(at: int, removed: int, put: bytes, cuts: list[int]) -> None:
    body = form(b"content", purpose="batch")
    try:
        got, content = read(body[:at] + put + body[at + removed :], cuts)
    except InvalidRequest:
        return
    assert got.size == len(content) <= 1000
    assert got.filename.isprintable()
    assert set(got.fields) >= {"purpose"}
