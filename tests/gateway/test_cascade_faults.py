"""The fault matrix of routes that escalate: each way in which either upstream can fail, what the client sees,
what both rows say, and that the books add up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from penstock.gateway import bills

from .conftest import BODY, STREAM, Gateway, Make
from .escalating import CHEAP_DOLLARS, DEAR_DOLLARS, SPEC, says, texts
from .test_cascade import DEAR, UNSURE, attempt_and_final, check_books
from .upstream import (
    Behaviour,
    Wire,
    cut,
    end_early,
    error_event,
    error_later,
    garbage,
    half_body,
    hang,
    hang_after_headers,
    hang_up,
    no_json,
    reset,
    stall,
    status,
)


async def error_at_once(wire: Wire) -> None:
    """Two events and an error, without waiting for the client, who gets nothing of it. All three may arrive
    at once, so this is for attempts only, of which all is kept in any case."""
    wire.go.set()
    await error_later(wire)


@dataclass(frozen=True)
class Fault:
    behaviour: Behaviour
    reason: str
    streams: bool | None = None
    """Where it can happen; None: in both."""


FAULTS = {
    "resets": Fault(reset, "upstream_reset"),
    "hangs up": Fault(hang_up, "upstream_reset"),
    "hangs before headers": Fault(hang, "upstream_slow"),
    "hangs after headers": Fault(hang_after_headers, "upstream_stalled"),
    "garbage": Fault(garbage, "upstream_invalid"),
    "no JSON": Fault(no_json, "upstream_invalid"),
    "half a body": Fault(half_body, "upstream_cut", streams=False),
    "cut": Fault(cut, "upstream_cut", streams=True),
    "stalls": Fault(stall, "upstream_stalled", streams=True),
    "ends early": Fault(end_early, "upstream_cut", streams=True),
    "error event": Fault(error_event, "upstream_error", streams=True),
    "error later": Fault(error_at_once, "upstream_error", streams=True),
    "500": Fault(status(500), "upstream_status"),
    "429": Fault(status(429, "Retry-After: 1"), "upstream_status"),
    "our key": Fault(status(401), "upstream_status"),
}
CASES = [
    pytest.param(name, streams, id=f"{name}-{'stream' if streams else 'plain'}")
    for name, fault in FAULTS.items()
    for streams in (False, True)
    if fault.streams in (None, streams)
]


def said(gateway: Gateway, streams: bool, response: Any) -> str:
    if streams:
        return texts(response.body)
    return str(response.json["choices"][0]["message"]["content"])


@pytest.mark.parametrize(("name", "streams"), CASES)
def test_an_attempt_that_fails_is_escalated(make: Make, name: str, streams: bool) -> None:
    fault = FAULTS[name]
    gateway = make(fault.behaviour, DEAR, spec=SPEC)
    response = gateway.post(STREAM if streams else BODY)
    assert response.status == 200, response.body
    assert said(gateway, streams, response) == "a dear answer comes"
    assert response.headers["x-penstock-escalated"] == "attempt"
    if streams:
        assert response.body.endswith(b"data: [DONE]\n\n")
    attempt, final = attempt_and_final(gateway)
    assert (attempt.verifier, attempt.verdict, attempt.reason) == ("attempt", "failed", fault.reason)
    assert (attempt.dollars, attempt.output_tokens, attempt.settlement) == (None, 0, "settled")
    assert (final.end, final.dollars, final.settlement) == ("done", DEAR_DOLLARS, "settled")
    if name not in ("resets", "hangs up"):  # its engine's time is nobody's, and not lost
        assert attempt.lost_device_seconds > 0
    check_books(gateway)


@pytest.mark.parametrize(("name", "streams"), [case for case in CASES if case.values[0] != "error later"])
def test_where_nobody_dearer_answers_the_attempts_answer_is_given_marked(
    make: Make, name: str, streams: bool
) -> None:
    fault = FAULTS[name]
    begins = name in ("cut", "stalls", "ends early")  # then the client has a part of it
    gateway = make(UNSURE, fault.behaviour, spec=SPEC)
    response = gateway.post(STREAM if streams else BODY)
    assert response.status == 200, response.body
    attempt, final = attempt_and_final(gateway)
    if begins:
        last = response.body.decode().split("\n\n")[-2]
        assert json.loads(last[6:])["error"]["reason"] == fault.reason
        assert final.settlement == "estimated"
    else:
        assert said(gateway, streams, response) == "an unsure answer here"
        assert response.headers["x-penstock-unverified"] == "mean_logprob"
        assert "x-penstock-escalated" not in response.headers
        assert b'logprob"' not in response.body
        assert final.note.startswith("answered with the attempt (mean_logprob: failed)")
        assert (final.dollars, final.settlement) == (None, "settled")
    assert (attempt.unverified, final.unverified) == (False, not begins)
    assert (attempt.dollars, attempt.verdict) == (CHEAP_DOLLARS, "failed")
    assert (final.end, final.status) == ("upstream_failed", 200)
    check_books(gateway)


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "stream"])
def test_or_it_is_an_error(make: Make, streams: bool) -> None:
    replace = {"verifiers:": "on_unavailable: fail\n      verifiers:"}
    gateway = make(UNSURE, status(500), spec=SPEC, replace=replace)
    response = gateway.post(STREAM if streams else BODY)
    assert (response.status, response.reason) == (502, "upstream_status")
    attempt, final = attempt_and_final(gateway)
    assert (attempt.dollars, final.dollars) == (CHEAP_DOLLARS, None)
    assert (final.status, final.end) == (502, "upstream_failed")
    check_books(gateway)


@pytest.mark.parametrize("mode", ["answer", "fail"])
def test_a_refusal_where_it_was_escalated_to(make: Make, mode: str) -> None:
    """Of a request that the attempt's upstream had taken: its answer is better than a 400, unless the route
    says otherwise."""
    replace = {"verifiers:": f"on_unavailable: {mode}\n      verifiers:"}
    refuses = status(400, body={"error": {"message": "no", "type": "x", "param": None, "code": "c"}})
    gateway = make(UNSURE, refuses, spec=SPEC, replace=replace)
    response = gateway.post()
    assert response.status == (200 if mode == "answer" else 400)
    _, final = attempt_and_final(gateway)
    assert (final.status, final.dollars) == (response.status, None)
    check_books(gateway)


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "stream"])
def test_both_fail(make: Make, streams: bool) -> None:
    gateway = make(status(500), hang, spec=SPEC)
    response = gateway.post(STREAM if streams else BODY)
    assert (response.status, response.reason) == (504, "upstream_slow")
    attempt, final = attempt_and_final(gateway)
    assert (attempt.dollars, final.dollars) == (None, None)
    assert (attempt.status, final.status) == (502, 504)
    check_books(gateway)


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "stream"])
def test_an_attempt_may_take_so_long_only(make: Make, streams: bool) -> None:
    replace = {
        "timeout_headers: 0.4": "timeout_headers: 30",
        "verifiers:": "attempt_timeout: 0.1\n      verifiers:",
    }
    gateway = make(hang, DEAR, spec=SPEC, replace=replace)
    response = gateway.post(STREAM if streams else BODY)
    assert said(gateway, streams, response) == "a dear answer comes"
    attempt, _ = attempt_and_final(gateway)
    assert (attempt.reason, attempt.status, attempt.dollars) == ("attempt_timeout", 504, None)
    assert attempt.lost_device_seconds > 0
    check_books(gateway)


CLOUDS = SPEC.replace("    kind: penstock\n    pool: box\n", "").replace(
    "{{name: tiny-1, context: 4096}}",
    "{{name: tiny-1, price: {{input: 2, output: 4, as_of: 2026-11-01, source: x}}}}",
)
"""Both are clouds: the attempt's price is by tokens, too."""


@pytest.mark.parametrize(
    ("behaviour", "body", "tokens"),
    [
        pytest.param(cut, STREAM, 2, id="cut"),
        pytest.param(stall, STREAM, 2, id="stalls"),
        pytest.param(hang_after_headers, BODY, 0, id="hangs"),
        pytest.param(status(500), BODY, None, id="500"),
    ],
)
def test_what_a_cloud_takes_for_an_attempt_that_breaks_is_in_its_row(
    make: Make, behaviour: Behaviour, body: Any, tokens: int | None
) -> None:
    """Reckoned: the prompt by its bytes, the answer by its events. An answer that is an error costs
    nothing."""
    gateway = make(
        behaviour, DEAR, spec=CLOUDS, replace={"{mean_logprob: -0.5}": "{length: {min_tokens: 1}}"}
    )
    assert gateway.post(body).headers["x-penstock-escalated"] == "attempt"
    attempt, final = attempt_and_final(gateway)
    assert (attempt.dollars, attempt.output_tokens, attempt.lost_device_seconds) == (None, 0, 0)
    prompt = -(-len(json.dumps(body)) // 4)
    expected = 0 if tokens is None else prompt * 2_000 + tokens * 4_000
    assert attempt.lost_dollars == attempt.lost_estimated_dollars == expected
    assert (final.dollars, final.lost_dollars) == (DEAR_DOLLARS, 0)
    check_books(gateway)


def test_what_it_told_is_not_reckoned(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.gateway import cascade

    monkeypatch.setattr(cascade, "MOST_KEPT", 100)
    replace = {"{mean_logprob: -0.5}": "{length: {min_tokens: 1}}"}
    gateway = make(says("word " * 30), DEAR, spec=CLOUDS, replace=replace)
    gateway.post()
    attempt, _ = attempt_and_final(gateway)
    assert (attempt.lost_dollars, attempt.lost_estimated_dollars) == (7 * 2_000 + 4 * 4_000, 0)
    check_books(gateway)


def test_so_it_is_with_an_attempt_that_is_tried_again(make: Make) -> None:
    """No escalation is needed for that: whoever answers in the end, its row has what the first one took."""
    spec = CLOUDS.replace("retries: 0", "retries: 1")
    gateway = make(says(), DEAR, spec=spec, scripts=[[hang_after_headers], []],
                   replace={"{mean_logprob: -0.5}": "{length: {min_tokens: 1}}"})  # fmt: skip
    gateway.post()
    row = gateway.row()
    assert (row.attempts, row.settlement, row.dollars) == (2, "settled", 7 * 2_000 + 4 * 4_000)
    assert row.lost_dollars == row.lost_estimated_dollars == -(-len(json.dumps(BODY)) // 4) * 2_000
    check_books(gateway)


def test_a_route_may_fail_with_its_attempt(make: Make) -> None:
    gateway = make(status(500), DEAR, spec=SPEC, replace={"verifiers:": "on_error: fail\n      verifiers:"})
    assert gateway.post().status == 502
    assert not gateway.upstreams[1].asked
    row = gateway.row()
    assert (row.end, row.verifier, row.verdict) == ("upstream_failed", "attempt", "failed")
    gateway = make(cut, DEAR, spec=SPEC, replace={"verifiers:": "on_error: fail\n      verifiers:"})
    last = gateway.post(STREAM).body.decode().split("\n\n")[-2]
    assert json.loads(last[6:])["error"]["reason"] == "upstream_cut"
    assert gateway.row().end == "upstream_failed"


def test_an_answer_that_is_too_long_to_be_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.gateway import cascade

    monkeypatch.setattr(cascade, "MOST_KEPT", 100)
    gateway = make(says("word " * 30), DEAR, spec=SPEC)
    assert gateway.post().json["choices"][0]["message"]["content"] == "a dear answer comes"
    attempt, _ = attempt_and_final(gateway)
    assert attempt.reason == "upstream_invalid"
    check_books(gateway)


def test_the_attempts_retries_and_fallbacks_come_first(make: Make) -> None:
    """Only when none of them answers is somebody dearer asked."""
    gateway = make(says(), DEAR, spec=SPEC, scripts=[[status(500)], []], replace={"retries: 0": "retries: 1"})
    assert gateway.post().status == 200
    row = gateway.row()
    assert (row.attempts, row.verdict) == (2, "passed")


def test_an_attempt_whose_stream_two_engines_could_not_end(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they made of it is nobody's, like all of an attempt that fails."""
    monkeypatch.setattr(bills, "PATIENCE", 0.01)
    trusts = {"kind: penstock": "kind: penstock\n    trusts_gateway: true\n    api_key_env: CLOUD_KEY"}
    replace = {**trusts, "retries: 0": "retries: 1", "{mean_logprob: -0.5}": "{length: {min_tokens: 1}}"}
    gateway = make(cut, DEAR, spec=SPEC, replace=replace)
    assert texts(gateway.post(STREAM).body) == "a dear answer comes"
    attempt, final = attempt_and_final(gateway)
    assert (attempt.attempts, attempt.dollars, attempt.output_tokens) == (2, None, 0)
    assert len(attempt.owed) == 2
    assert all(each.lost for each in attempt.owed)
    assert final.dollars == DEAR_DOLLARS
    check_books(gateway)
