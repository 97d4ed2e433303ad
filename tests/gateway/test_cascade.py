"""Routes that escalate: who answers, what the client sees, and which row has which dollar."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from penstock.gateway import curtain
from penstock.gateway.ledger.journal import SpoolFull
from penstock.gateway.policy.amounts import NANO
from penstock.gateway.records import Principal, Row

from .conftest import BODY, KEY, STREAM, Gateway, Make
from .escalating import CHEAP_DOLLARS, DEAR_DOLLARS, SPEC, says, texts
from .upstream import Behaviour, Upstream, Wire, hang, status

SURE = says("a sure answer here", -0.1)
UNSURE = says("an unsure answer here", -2.0)
DEAR = says("a dear answer comes", device=None)


def verified_by(*verifiers: str) -> dict[str, str]:
    return {"verifiers: [{mean_logprob: -0.5}]": f"verifiers: [{', '.join(verifiers)}]"}


def two(make: Make, cheap: Behaviour = SURE, dear: Behaviour = DEAR, **more: Any) -> Gateway:
    return make(cheap, dear, spec=SPEC, **more)


def attempt_and_final(gateway: Gateway) -> tuple[Row, Row]:
    attempt, final = gateway.rows(2)
    assert final.escalated_from == attempt.id == f"{final.id}.attempt"
    assert attempt.end == "escalated"
    return attempt, final


def check_books(gateway: Gateway) -> None:
    """What limits have counted is what the rows say."""
    used = {limit.unit: amount for limit, amount in gateway.meter.used.items()}
    assert used["dollars"] == sum(row.dollars or 0 for row in gateway.meter.rows)
    tokens = sum(row.input_tokens + row.output_tokens for row in gateway.meter.rows)
    assert used["tokens"] == tokens
    assert used["requests"] == sum(row.end != "escalated" for row in gateway.meter.rows)


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])
def test_an_answer_that_passes_is_the_attempts_and_has_one_row(make: Make, body: Any) -> None:
    gateway = two(make)
    response = gateway.post(body)
    assert response.status == 200
    assert b"sure" in response.body.replace(b" ", b"")
    assert "x-penstock-escalated" not in response.headers
    assert "x-penstock-unverified" not in response.headers
    assert response.headers["x-penstock-upstream"] == "ours"
    row = gateway.row()
    assert (row.end, row.status, row.settlement, row.escalated_from) == ("done", 200, "settled", None)
    assert (row.verifier, row.verdict, row.score, row.reason) == ("mean_logprob", "passed", -0.1, "")
    assert (row.dollars, row.output_tokens) == (CHEAP_DOLLARS, 4)
    assert not gateway.upstreams[1].asked
    assert row.first_byte is not None
    check_books(gateway)


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])
def test_an_answer_that_does_not_pass_is_asked_for_again(make: Make, body: Any) -> None:
    gateway = two(make, UNSURE)
    response = gateway.post(body)
    assert response.status == 200
    said = texts(response.body) if body is STREAM else response.json["choices"][0]["message"]["content"]
    assert said == "a dear answer comes"
    assert response.headers["x-penstock-escalated"] == "mean_logprob"
    assert response.headers["x-penstock-upstream"] == "cloud"
    attempt, final = attempt_and_final(gateway)
    assert (attempt.verifier, attempt.verdict, attempt.score) == ("mean_logprob", "failed", -2.0)
    assert attempt.reason == "a mean of -2.000 is below -0.5"
    assert (attempt.dollars, attempt.device_seconds, attempt.output_tokens) == (CHEAP_DOLLARS, NANO // 4, 4)
    assert (attempt.upstream, attempt.status, attempt.settlement) == ("ours", 200, "settled")
    assert (final.dollars, final.device_seconds, final.upstream) == (DEAR_DOLLARS, None, "cloud")
    assert (final.verifier, final.verdict, final.end, final.status) == ("", "", "done", 200)
    assert (attempt.route, final.route) == ("small", "small")
    if body is BODY:
        both = (CHEAP_DOLLARS + DEAR_DOLLARS) / NANO
        assert float(response.headers["x-penstock-cost"]) == both
        assert response.headers["x-request-id"] == final.id
    assert "logprobs" not in gateway.upstreams[1].asked[0].json
    check_books(gateway)
    page = gateway.get("/metrics").body.decode()
    assert 'gateway_verdicts_total{route="small",verdict="failed",verifier="mean_logprob"} 1.0' in page
    assert 'gateway_escalations_total{outcome="answered",route="small",verifier="mean_logprob"} 1.0' in page


@pytest.mark.parametrize("wanted", [False, True], ids=["hidden", "asked for"])
@pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])
def test_log_probabilities_are_the_clients_only_if_it_asked(make: Make, body: Any, wanted: bool) -> None:
    gateway = two(make)
    body = {**body, "logprobs": True} if wanted else body
    response = gateway.post(body)
    assert gateway.upstreams[0].asked[0].json["logprobs"] is True
    assert (b'"logprob":-0.1' in response.body.replace(b" ", b"")) == wanted
    if not body.get("stream"):
        assert (response.json["choices"][0]["logprobs"] is None) == (not wanted)
        assert int(response.headers["content-length"]) == len(response.body)
    gateway.row()


def test_both_attempts_are_reserved_for(make: Make) -> None:
    """A budget that holds one of them only refuses the request, and nothing stays reserved."""
    gateway = two(make, UNSURE)
    gateway.post()
    attempt, final = attempt_and_final(gateway)
    both = attempt.reserved_dollars
    assert final.reserved_dollars
    assert both > final.reserved_dollars
    tight = two(make, UNSURE, replace={"dollars_per_day: 100": f"dollars_per_day: {(both - 1) / NANO:.9f}"})
    assert tight.post().status == 429
    assert not tight.upstreams[0].asked
    tight.settled()


EITHER = [
    ("{json_schema: {type: object, required: [a]}}", '{"a": 1}', '{"b": 1}', "does not fit required"),
    ("{regex: '^yes'}", "yes it is so", "no it is not", "not found"),
    ("{not_regex: '(?i)i cannot'}", "I can do it", "I cannot do it", "found"),
    ("{length: {min_characters: 5}}", "long enough it is", "no", "2 characters are fewer than 5"),
    ("{length: {max_characters: 5}}", "a b c", "far too long it is", "18 characters are more than 5"),
]


@pytest.mark.parametrize(("verifier", "good", "bad", "reason"), EITHER)
def test_verifiers_of_texts(make: Make, verifier: str, good: str, bad: str, reason: str) -> None:
    for text, passes in ((good, True), (bad, False)):
        gateway = two(make, says(text), replace=verified_by(verifier))
        gateway.post()
        first = gateway.rows(1 if passes else 2)[0]
        assert (first.verdict, first.reason) == ("passed", "") if passes else ("failed", reason)
        assert "logprobs" not in gateway.upstreams[0].asked[0].json


@pytest.mark.parametrize(("finish", "passes"), [("stop", True), ("length", False), ("content_filter", False)])
def test_how_an_answer_ended(make: Make, finish: str, passes: bool) -> None:
    gateway = two(make, says(finish=finish), replace=verified_by("{finish_reason: [stop, tool_calls]}"))
    gateway.post()
    assert gateway.rows(1 if passes else 2)[0].verdict == ("passed" if passes else "failed")


def test_every_choice_must_pass_and_tool_calls_have_no_text(make: Make) -> None:
    gateway = two(make, says("three"), replace=verified_by("{length: {max_tokens: 3}}"))
    gateway.post({**BODY, "n": 2})
    assert gateway.rows(2)[0].reason == "4 tokens are more than 3"
    calls = {"content": None, "tool_calls": [{"id": "t", "function": {"name": "f", "arguments": "{}"}}]}
    gateway = two(make, says(message=calls, finish="tool_calls"), replace=verified_by("{regex: nothing}"))
    gateway.post()
    assert gateway.row().verdict == "passed"


def test_the_first_that_fails_decides_and_the_others_are_not_asked(make: Make) -> None:
    gateway = two(
        make,
        says("maybe", finish="length"),
        replace=verified_by(
            "{finish_reason: [stop]}", "{name: opinion, python: 'tests.gateway.test_cascade:counts'}"
        ),
    )
    ASKED.clear()
    gateway.post()
    assert gateway.rows(2)[0].verifier == "finish_reason"
    assert not ASKED


ASKED: list[Any] = []
STUCK = threading.Event()


def counts(about: Any) -> Any:
    ASKED.append(about)
    return {"pass": "sure" in about["choices"][0]["text"], "score": 0.25, "reason": "not sure enough"}


async def passes(about: Any) -> Any:
    return {"pass": True}


def passes_in_a_thread(about: Any) -> Any:
    return {"pass": True}


def raises(about: Any) -> Any:
    raise ValueError("the answer was a secret")


def hangs(about: Any) -> Any:
    STUCK.wait(20)


def babbles(about: Any) -> Any:
    return {"approve": True}


def python(name: str, **more: Any) -> str:
    rest = "".join(f", {key}: {json.dumps(value)}" for key, value in more.items())
    return f"{{name: opinion, python: 'tests.gateway.test_cascade:{name}'{rest}}}"


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])
def test_a_hook_judges(make: Make, body: Any) -> None:
    ASKED.clear()
    gateway = two(make, says("who knows"), replace=verified_by(python("counts")))
    gateway.post(body)
    attempt, final = attempt_and_final(gateway)
    assert (attempt.verifier, attempt.score, attempt.reason) == ("opinion", 0.25, "not sure enough")
    (about,) = ASKED
    assert (about["id"], about["route"], about["key_id"]) == (final.id, "small", "k1")
    assert about["choices"] == [{"text": "who knows", "finish_reason": "stop", "calls_tools": False}]
    assert about["body"]["messages"] == BODY["messages"]
    gateway = two(make, replace=verified_by(python("passes")))
    gateway.post(body)
    assert gateway.row().verdict == "passed"


@pytest.mark.parametrize("name", ["raises", "hangs", "babbles"])
@pytest.mark.parametrize("mode", ["open", "closed"])
def test_a_verifier_that_fails_is_open_or_closed_and_in_the_ledger(make: Make, name: str, mode: str) -> None:
    STUCK.clear()
    gateway = two(
        make, replace=verified_by(python(name, on_failure=mode, timeout=0.2 if name == "hangs" else 20))
    )
    response = gateway.post()
    STUCK.set()
    assert response.status == 200
    rows = gateway.rows(1 if mode == "open" else 2)
    why = {"raises": "ValueError", "hangs": "no answer within 0.2 s", "babbles": "ValueError"}[name]
    assert (rows[0].verifier, rows[0].verdict, rows[0].reason) == ("opinion", mode, why)
    if mode == "open":
        assert response.headers["x-penstock-unverified"] == "opinion"
        assert (rows[0].end, rows[0].unverified) == ("done", True)
    else:
        assert response.headers["x-penstock-escalated"] == "opinion"
    check_books(gateway)


def test_one_that_hangs_takes_no_thread_of_the_others_and_is_asked_no_more(make: Make) -> None:
    STUCK.clear()
    other = """  other:
    targets: [{{model: tiny, upstream: ours}}]
    escalate:
      to: [{{model: large, upstream: cloud}}]
      verifiers: [VERIFIERS]
limits:"""
    both = "{{regex: sure}}, " + python("passes_in_a_thread").replace("{", "{{").replace("}", "}}")
    gateway = make(
        SURE,
        DEAR,
        spec=SPEC.replace("limits:", other.replace("VERIFIERS", both)),
        replace={"verifiers: [{mean_logprob": f"verifiers: [{python('hangs', timeout=0.05)}, {{mean_logprob"},
    )
    try:
        for _ in range(8):
            gateway.post()
        assert {row.reason for row in gateway.rows(16) if row.verdict} == {"no answer within 0.05 s"}
        gateway.post()
        attempt = gateway.rows(18)[-2]
        assert (attempt.verdict, attempt.reason) == ("closed", "8 calls still hang")
        gateway.post({**BODY, "model": "other"})
        row = gateway.rows(19)[-1]
        assert (row.verifier, row.verdict, row.reason) == ("opinion", "passed", "")
    finally:
        STUCK.set()


def test_a_verifier_behind_http_that_is_down(make: Make) -> None:
    gateway = two(make, replace=verified_by("{url: 'http://127.0.0.1:9/judge', on_failure: closed}"))
    assert gateway.post().status == 200
    attempt, _ = attempt_and_final(gateway)
    assert (attempt.verifier, attempt.verdict) == ("url", "closed")
    assert attempt.reason == "ClientConnectorError"


def test_an_upstream_without_log_probabilities_is_a_verifier_that_fails(make: Make) -> None:
    gateway = two(make, says(logprob=None))
    gateway.post()
    attempt, _ = attempt_and_final(gateway)
    assert (attempt.verdict, attempt.reason) == ("closed", "no log-probabilities in the answer")


CATASTROPHE = says("a" * 60 + "b")


def test_a_pattern_that_would_take_for_ever(make: Make) -> None:
    gateway = two(make, CATASTROPHE, replace=verified_by("{regex: '^(a|a?)+$', timeout: 5}"))
    gateway.post()
    assert gateway.rows(2)[0].verdict in ("closed", "failed")


# ---- streams ----


def test_a_client_is_kept_company_until_the_verdict(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments come while the attempt hangs, and headers with the first one; then what the verdict is for."""
    monkeypatch.setattr(curtain, "KEEP_ALIVE", 0.02)
    go = threading.Event()

    async def waits(wire: Wire) -> None:
        await wire.read_by_client()
        await UNSURE(wire)

    gateway = two(make, waits)
    del go
    connection, response = gateway.open(STREAM)
    assert response.status == 200
    assert response.getheader("content-type").startswith("text/event-stream")
    assert response.readline() == b": penstock checks the answer\n"
    gateway.upstreams[0].go()
    body = response.read()
    connection.close()
    assert texts(body) == "a dear answer comes"
    assert b"x-penstock-escalated=mean_logprob" in body
    assert body.endswith(b"data: [DONE]\n\n")
    assert b"unsure" not in body
    attempt_and_final(gateway)


def test_an_error_after_the_first_comment_is_an_event(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curtain, "KEEP_ALIVE", 0.02)

    async def waits(wire: Wire) -> None:
        await wire.read_by_client()
        await status(500)(wire)

    gateway = two(make, waits, status(503))
    connection, response = gateway.open(STREAM)
    assert response.readline() == b": penstock checks the answer\n"
    gateway.upstreams[0].go()
    body = response.read()
    connection.close()
    last = body.decode().split("\n\n")[-2]
    assert json.loads(last[6:])["error"]["reason"] == "upstream_status"
    attempt, final = attempt_and_final(gateway)
    assert (attempt.verifier, attempt.reason, attempt.dollars) == ("attempt", "upstream_status", None)
    assert (final.end, final.status, final.dollars) == ("upstream_failed", 200, None)


def test_a_refusal_after_the_first_comment_is_an_event(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curtain, "KEEP_ALIVE", 0.02)

    async def waits(wire: Wire) -> None:
        await wire.read_by_client()
        await status(400, body={"error": {"message": "too long", "code": "long"}})(wire)

    gateway = two(make, waits)
    connection, response = gateway.open(STREAM)
    assert response.readline() == b": penstock checks the answer\n"
    gateway.upstreams[0].go()
    last = response.read().decode().split("\n\n")[-2]
    connection.close()
    assert json.loads(last[6:])["error"]["code"] == "long"
    assert gateway.row().reason == "refused with 400"


class _Full:
    """A spool without room."""

    def hand_over(self, *args: Any) -> Any:
        raise SpoolFull("The spool is full.")


@pytest.mark.parametrize("mode", ["answer", "fail"])
def test_what_cannot_be_accounted_for_is_not_asked(
    make: Make, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = two(make, UNSURE, replace={"verifiers:": f"on_unavailable: {mode}\n      verifiers:"})
    monkeypatch.setattr(gateway.meter, "hand_over", _Full().hand_over)
    response = gateway.post()
    assert response.status == (200 if mode == "answer" else 503)
    assert not gateway.upstreams[1].asked
    row = gateway.row()
    assert (row.dollars, row.escalated_from, row.id) == (
        CHEAP_DOLLARS,
        None,
        response.headers["x-request-id"],
    )
    assert row.note == "not escalated: the spool cannot be written"
    check_books(gateway)


def test_hooks_look_at_the_answer_that_the_client_gets(make: Make) -> None:
    ASKED.clear()
    hooks = "gateway: {{hooks: [{{when: after, python: 'tests.gateway.test_cascade:looks'}}]}}\n"
    for body in (BODY, STREAM):
        for cheap, expected in ((SURE, "a sure answer here"), (UNSURE, "a dear answer comes")):
            ASKED.clear()
            gateway = make(cheap, DEAR, spec=SPEC + hooks)
            gateway.post(body)
            rows = gateway.rows(1 if cheap is SURE else 2)
            (about,) = ASKED
            assert expected.split()[-1] in json.dumps(about.get("answer") or about["events"])
            assert 'logprob"' not in json.dumps(about).replace("\\", "")
            assert [row.tags.get("looked") for row in rows] == [None] * (len(rows) - 1) + ["yes"]


def looks(about: Any) -> Any:
    ASKED.append(about)
    return {"tags": {"looked": "yes"}}


def test_a_stream_is_the_bytes_that_it_would_have_been(make: Make) -> None:
    plain = make(SURE, DEAR, spec=SPEC, replace=verified_by("{length: {min_characters: 1}}"))
    judged = plain.post(STREAM).body
    free = make(
        SURE,
        spec=SPEC.partition("    escalate:")[0].replace("{url1}", "{url}") + SPEC[SPEC.index("limits:") :],
    )
    assert free.post(STREAM).body == judged


# ---- who leaves ----


@pytest.mark.parametrize("phase", ["attempt", "verifier", "escalation"])
def test_a_client_that_leaves_pays_what_was_used(make: Make, phase: str) -> None:
    """In the middle of the attempt, of the verdict, and of the dearer answer."""
    STUCK.clear()
    replace = {"timeout_headers: 0.4": "timeout_headers: 30"}
    if phase == "verifier":
        replace |= verified_by(python("hangs", timeout=30))
    gateway = two(
        make, hang if phase == "attempt" else UNSURE, hang if phase == "escalation" else DEAR, replace=replace
    )
    connection, sock = _send(gateway)
    station = gateway.upstreams[1 if phase == "escalation" else 0]
    gateway.wait_for(lambda: bool(station.asked) and (phase != "verifier" or _verifying(gateway)))
    sock.close()
    connection.close()
    if phase == "escalation":
        attempt, last = attempt_and_final(gateway)
        assert (attempt.dollars, attempt.settlement) == (CHEAP_DOLLARS, "settled")
        assert (last.settlement, last.dollars) == ("unsettled", last.reserved_dollars)
    else:
        last = gateway.row()
        assert last.settlement == ("settled" if phase == "verifier" else "unsettled")
    assert (last.status, last.end) == (499, "client_gone")
    if phase == "verifier":
        assert last.dollars == CHEAP_DOLLARS
    STUCK.set()
    assert gateway.meter.used
    dollars = sum(amount for limit, amount in gateway.meter.used.items() if limit.unit == "dollars")
    assert dollars == sum(row.dollars or 0 for row in gateway.meter.rows)


def _send(gateway: Gateway) -> tuple[Any, Any]:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", gateway.live.port, timeout=20)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(BODY), headers)
    return connection, connection.sock


def _verifying(gateway: Gateway) -> bool:
    stations = gateway.stations.all()
    return bool(gateway.upstreams[0].asked) and all(each.in_flight == 0 for each in stations)


# ---- local only ----

LOCAL_KEY = {KEY: Principal(key_id="k1", key_name="test", local_only=True)}


@pytest.mark.parametrize("how", ["key", "header"])
@pytest.mark.parametrize("mode", ["answer", "fail"])
def test_what_must_not_leave_is_not_escalated_to_a_cloud(make: Make, how: str, mode: str) -> None:
    replace = {"verifiers:": f"on_unavailable: {mode}\n      verifiers:"}
    gateway = two(make, UNSURE, keys=LOCAL_KEY if how == "key" else None, replace=replace)
    response = gateway.post(**({"x_penstock_local_only": "true"} if how == "header" else {}))
    assert not gateway.upstreams[1].asked
    row = gateway.row()
    assert (row.verdict, row.dollars, row.escalated_from) == ("failed", CHEAP_DOLLARS, None)
    assert "local_only" in row.note
    if mode == "answer":
        assert response.status == 200
        assert response.headers["x-penstock-unverified"] == "mean_logprob"
        assert row.end == "done"
    else:
        assert (response.status, response.reason) == (403, "local_only")
        assert "outside of the house" in response.error["message"]


def test_a_row_says_that_its_answer_did_not_pass_however_much_else_it_says(make: Make) -> None:
    hook = '    - {{when: before, python: "tests.gateway.test_cascade:raises", on_failure: open}}\n'
    gateway = make(UNSURE, DEAR, spec=SPEC + "gateway:\n  hooks:\n" + 10 * hook, keys=LOCAL_KEY)
    assert gateway.post().headers["x-penstock-unverified"] == "mean_logprob"
    row = gateway.row()
    assert len(row.note) == 300
    assert (row.verdict, row.note.partition(";")[0]) == ("failed", "not escalated: local_only")


@pytest.mark.parametrize("how", ["key", "header"])
@pytest.mark.parametrize("mode", ["open", "closed"])
def test_a_verifier_outside_of_the_house_is_not_told_of_what_must_not_leave(
    make: Make, how: str, mode: str
) -> None:
    async def judge(wire: Wire) -> None:
        await wire.whole(200, {"pass": True})

    server = Upstream(default=judge).start()
    try:
        said = f"name: judge, url: '{server.url}/judge', on_failure: {mode}"
        keys = LOCAL_KEY if how == "key" else None
        headers = {"x_penstock_local_only": "true"} if how == "header" else {}
        gateway = two(make, keys=keys, replace=verified_by(f"{{{said}}}"))
        response = gateway.post(**headers)
        assert (response.status, response.headers["x-penstock-unverified"]) == (200, "judge")
        row = gateway.row()
        assert (row.verifier, row.verdict, row.reason) == ("judge", mode, "it is outside of the house")
        assert not server.asked
        gateway = two(make, keys=keys, replace=verified_by(f"{{{said}, local: true}}"))
        gateway.post(**headers)
        assert gateway.row().verdict == "passed"
        assert len(server.asked) == 1
    finally:
        server.stop()


def test_a_header_that_says_neither_is_refused(make: Make) -> None:
    gateway = two(make)
    assert gateway.post(x_penstock_local_only="maybe").status == 400
    assert gateway.post(x_penstock_local_only="false").status == 200


def test_the_rows_of_an_attempt_that_was_refused(make: Make) -> None:
    """A 4xx is the client's own, unless the route says that a larger model may know better."""
    refuses = status(400, body={"error": {"message": "too long", "type": "x", "param": None, "code": "long"}})
    gateway = two(make, refuses)
    response = gateway.post()
    assert (response.status, response.reason) == (400, "long")
    row = gateway.row()
    assert (row.verifier, row.verdict, row.reason) == ("attempt", "failed", "refused with 400")
    assert (row.end, row.dollars) == ("done", None)
    gateway = two(make, refuses, replace={"verifiers:": "on_refusal: escalate\n      verifiers:"})
    assert gateway.post().json["choices"][0]["message"]["content"] == "a dear answer comes"
    attempt, final = attempt_and_final(gateway)
    assert (attempt.status, attempt.dollars, final.dollars) == (400, None, DEAR_DOLLARS)


def test_embeddings_go_the_plain_way(make: Make) -> None:
    gateway = two(make)
    assert gateway.post({"model": "small", "input": "x"}, path="/v1/embeddings").status == 200
    assert gateway.row().verdict == ""


def test_what_costs_more_at_the_cloud_is_refused_before_the_attempt(make: Make) -> None:
    """A dearer tier costs nothing at an engine of ours, which is not the only one that may be asked."""
    gateway = two(make)
    response = gateway.post({**BODY, "service_tier": "priority"})
    assert (response.status, response.error["param"]) == (400, "service_tier")
    assert not gateway.upstreams[0].asked
