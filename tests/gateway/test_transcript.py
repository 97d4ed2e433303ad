"""What is remembered of a stream, and how the bytes of a second engine go on with it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.gateway import transcript
from penstock.gateway.transcript import Transcript, is_final

from .test_stream import event


def chunk(text: str, ids: list[int], *, id: str = "a", prompt: str = "", **more: Any) -> bytes:
    """An event, as Penstock's server writes it."""
    comment = f": prompt {prompt}\n" if prompt else ""
    comment += f": tokens {','.join(map(str, ids))}\n" if ids else ""
    choice = {"index": 0, "text": text, "finish_reason": None, **more}
    payload = {"id": id, "system_fingerprint": f"fp_{id}", "choices": [choice]}
    return comment.encode() + event(payload)


def of(out: bytes) -> list[dict[str, Any]]:
    return [json.loads(each[6:]) for each in out.decode().split("\n\n")[:-1]]


def test_comments_are_taken_out_and_remembered() -> None:
    seen = Transcript()
    out = seen.take(chunk("Hi", [5, 9], prompt="30 16") + chunk(" : tokens 1\n", [7]))
    assert out == chunk("Hi", []) + chunk(" : tokens 1\n", [])
    assert (seen.ids, seen.count, seen.prompt, seen.can_go_on) == (b"[5,9,7]", 3, (30, 16), True)


def test_a_stream_without_comments_cannot_go_on() -> None:
    seen = Transcript()
    assert seen.take(chunk("Hi", [])) == chunk("Hi", [])
    assert not seen.can_go_on


def test_ids_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "_MOST", 10)
    seen = Transcript()
    seen.take(chunk("Hi", [5, 9], prompt="30 16"))
    assert seen.can_go_on
    for _ in range(100):
        seen.take(chunk("x", [1, 2, 3]))
    assert not seen.can_go_on
    assert len(seen.ids) < 20
    assert seen.count == 302  # for the row


@pytest.mark.parametrize("other", ["a", "b"])
def test_another_build_is_noticed(other: str) -> None:
    seen = Transcript()
    seen.take(chunk("Hi", [5], prompt="30 16"))
    seen.next()
    (out,) = of(seen.take(chunk("!", [6], id=other, prompt="30 0")))
    assert (out["id"], out["system_fingerprint"]) == ("a", "fp_a")
    assert seen.differs == (other == "b")
    assert seen.prompt == (30, 16)


def test_an_opening_comes_once() -> None:
    seen = Transcript()
    opening = chunk("role", [], prompt="30 16")
    assert len(of(seen.take(opening + chunk("Hi", [5])))) == 2
    for _ in range(2):
        seen.next()
        assert seen.take(opening) == b""
        assert len(of(seen.take(chunk("!", [6])))) == 1
    assert (seen.count, seen.gained) == (3, 1)


def test_what_an_engine_says_at_its_end_is_kept_back() -> None:
    """Its last event holds half a character, and says that the answer has ended."""
    seen = Transcript()
    out = seen.take(
        chunk("Hi", [5], prompt="30 16") + chunk("\ufffd", [6], finish_reason="abort") + b"data: [DONE]\n\n"
    )
    assert (out, seen.aborted, seen.finished, seen.ids) == (chunk("Hi", []), True, False, b"[5]")
    assert seen.take(b"data: [DONE]\n\n") == b""


def test_an_end_that_is_missing() -> None:
    seen = Transcript()
    seen.take(chunk("Hi", [5, 6], prompt="30 16", finish_reason="stop"))
    assert seen.finished
    assert seen.ending(usage_wanted=False) == b"data: [DONE]\n\n"
    usage, done = seen.ending(usage_wanted=True).split(b"\n\n", 1)
    assert (done, json.loads(usage[6:])["id"]) == (b"data: [DONE]\n\n", "a")
    assert json.loads(usage[6:])["usage"] == {
        "prompt_tokens": 30,
        "completion_tokens": 2,
        "total_tokens": 32,
        "prompt_tokens_details": {"cached_tokens": 16},
    }
    seen.take(event({"id": "a", "choices": [], "usage": {"prompt_tokens": 30}}))
    assert seen.ending(usage_wanted=True) == b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("error", "final"),
    [
        ({"code": 400, "message": "no"}, True),
        ({"code": 404}, True),
        ({"code": 429}, False),
        ({"code": 500}, False),
        ({"code": 503, "reason": "draining"}, False),
        ({"code": "server_error"}, False),
        ({"message": "out of memory"}, False),
        ("out of memory", False),
    ],
    ids=str,
)
def test_which_errors_are_the_requests_fault(error: Any, final: bool) -> None:
    assert is_final(json.dumps({"error": error}).encode()) is final
    assert not is_final(b"no JSON")
