"""Malformed requests, known ones and random ones: no 5xx, no hang, no error of another shape."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.server.app import ROUTES
from penstock.server.batches.routes import FIELDS
from penstock.server.fields import IGNORED
from tests.e2e.server import Server, serving

from .fuzz import drive
from .fuzz.__main__ import FLAGS, aftermath, tiny_encoder
from .fuzz.cases import Case, make, make_pooling
from .fuzz.drive import Report, blocks, run
from .fuzz.oracle import Answer, wrong
from .fuzz.requests import BATCHES, CHAT, FILES, POOLING_SHAPES, SHAPES, TEXT, VALUES, BatchRequest
from .fuzz.values import Raw, write
from .harness import error_of, post

HI: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("malformed")
    flags = ("demo", *FLAGS, "--batch-dir", str(folder / "batches"))
    with serving(*flags, log=folder / "log") as server:
        yield server


# ---- known ones ----


def nested(levels: int) -> Raw:
    return Raw("[" * levels + "]" * levels)


def called(arguments: Any) -> list[Any]:
    return [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]


@pytest.mark.parametrize("levels", [70, 330, 490, 700, 990, 1010, 5000, 100_000])
def test_nesting(server: Server, levels: int) -> None:
    deep = nested(levels)
    bodies: list[tuple[str, dict[str, Any], str | None]] = [
        (CHAT, {"messages": called(deep)}, None),
        (CHAT, {"messages": called(str(deep))}, "messages[1].tool_calls[0].function.arguments"),
        (CHAT, {"messages": [{"role": "user", "content": "a", "x": deep}]}, None),
        (CHAT, {"messages": [{"role": deep, "content": "a"}]}, None),
        (CHAT, {"messages": HI, "chat_template_kwargs": {"a": deep}}, None),
        (CHAT, {"messages": HI, "metadata": deep}, None),
        (CHAT, {"messages": HI, "response_format": deep}, None),
        (CHAT, {"messages": HI, "n": deep}, None),
        (TEXT, {"prompt": deep}, None),
        (TEXT, {"prompt": "a", "stop_token_ids": deep}, None),
        (TEXT, {"prompt": "a", "unheard_of": deep}, None),
        ("/tokenize", {"messages": called(str(deep))}, "messages[1].tool_calls[0].function.arguments"),
        ("/detokenize", {"tokens": deep}, None),
    ]
    for path, body, param in bodies:
        status, answer = post(server, path, write(body).encode())
        error = error_of((status, answer))
        assert (status, error["param"]) == (400, param), (path, answer[:300])
        assert "nested too deeply, over 64 levels" in error["message"]


def test_nesting_up_to_the_bound_is_served(server: Server) -> None:
    deep, text = (Raw(f'{{"a": {nested(levels)}}}') for levels in (56, 63))
    for messages in (called(deep), called(str(text)), [{**HI[0], "x": nested(61)}]):
        body = write({"messages": messages, "max_tokens": 1, "chat_template_kwargs": {"a": nested(60)}})
        status, answer = post(server, CHAT, body.encode())
        assert status == 200, answer


@pytest.mark.parametrize("arguments", ["[" + "[]," * 100_000 + "0]", "[" + "0," * 200_000 + "0]"])
def test_what_arguments_hold_is_counted_before_it_is_read(server: Server, arguments: str) -> None:
    for messages in (called(arguments), called(arguments[:-2] + "]") * 3):
        for path in (CHAT, "/tokenize"):
            error = error_of(post(server, path, {"messages": messages}))
            assert "--max-body-values" in error["message"]


@pytest.mark.parametrize("name", ["x" * 5000, "\x00" * 5000, "🌊" * 5000])
def test_names_that_nobody_knows(server: Server, name: str) -> None:
    for fields in ({name: 1}, {"stream": True, "stream_options": {name: 1}}):
        status, answer = post(server, TEXT, {"prompt": "a", "max_tokens": 1, **fields})
        assert status == 200, answer
    for fields in ({"logit_bias": {name: 1}}, {"model": name}, {"truncation_side": name}):
        error = error_of(post(server, TEXT, {"prompt": "a", **fields}))
        assert len(error["message"]) < 300
        assert error["param"]
        assert len(error["param"]) < 100


@pytest.mark.parametrize("stream", [False, True])
def test_the_borders_of_every_range_are_served(server: Server, stream: bool) -> None:
    for name, values in VALUES.items():
        for value in values:
            # penalties work on tokens that were seen, and cuts only on draws
            body = {"prompt": "a b a b", "max_tokens": 3, "temperature": 1, "stream": stream, name: value}
            if stream and name == "prompt_logprobs":
                continue
            status, answer = post(server, TEXT, write(body).encode())
            assert status == 200, (name, value, answer)
            assert b'"error"' not in answer, (name, value, answer)


HUGE = (10**19, 10**400, -(10**400), 10**4000, 1e308, -1e308, Raw("1e22"), Raw("9223372036854775808.0"))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("logit_bias", [{"5": value} for value in (*HUGE, 100.001, -101, "a", None, [1])]),
        ("repetition_penalty", [*HUGE, 0, 5e-324, 1e-45, 1e-38, 0.00099, 1000.1, -1, False]),
        ("temperature", [*HUGE, -5e-324, 100.001]),
        ("top_p", [*HUGE, 0, -0.0, 1.0000001]),
        ("min_p", [*HUGE, -5e-324, 1.0000001]),
        ("presence_penalty", [*HUGE, 2.0001, -2.0001]),
        ("frequency_penalty", [*HUGE, 2.0001, -2.0001]),
        *((name, [*HUGE, 0.5, "1.5", [1]]) for name in ("seed", "top_k", "n", "max_tokens", "min_tokens")),
        ("stop_token_ids", [[value] for value in (*HUGE, -1, 2048, 0.5, "a", [1])]),
        ("allowed_token_ids", [[], *([value] for value in (*HUGE, -1, 2048, 0.5, "a", [1]))]),
        ("truncate_prompt_tokens", [*HUGE, 0, -2]),
        ("prompt", [[value] for value in HUGE[:4]]),
    ],
)
def test_beyond_every_range(server: Server, name: str, values: list[Any]) -> None:
    for value in values:
        status, answer = post(server, TEXT, write({"prompt": "a", name: value}).encode())
        error = error_of((status, answer))
        assert status == 400, (value, answer[:300])
        assert str(error["param"]).split("[")[0] == name, (value, error)
        assert len(error["message"]) < 300
    if name == "repetition_penalty":
        assert "must be in [0.001, 1000]" in error["message"]


# ---- random ones ----


def test_thousands_of_cases(server: Server) -> None:
    total = Report()
    for report in run(server.port, 1, blocks(0, 2400), sessions=8):
        total.merge(report)
    again = f"python -m tests.attack.fuzz --seed 1 --show N, for N in {total.findings}"
    assert total.findings == {}, again
    assert total.requests == 2400
    assert total.served >= 0.2 * total.requests
    assert total.left > 0
    assert aftermath(server) == {}


def test_hundreds_of_cases_for_a_model_that_pools(tmp_path: Path) -> None:
    total = Report()
    with serving(*tiny_encoder(tmp_path), log=tmp_path / "log") as server:
        for report in run(server.port, 1, blocks(0, 800), sessions=8, make=make_pooling):
            total.merge(report)
        again = f"python -m tests.attack.fuzz --pooling --seed 1 --show N, for N in {total.findings}"
        assert total.findings == {}, again
        assert total.served >= 0.1 * total.requests
        assert aftermath(server) == {}


def test_a_case_is_its_number_wherever_it_is_made() -> None:
    script = (
        "import hashlib; from tests.attack.fuzz.cases import make;"
        "print(hashlib.sha256(b''.join(make(7, n).wire() for n in range(400))).hexdigest())"
    )
    made = {
        subprocess.check_output([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    }
    assert len(made) == 1


def test_every_body_and_every_field_is_fuzzed() -> None:
    takes_none = {"/ping", "/v1/responses/{name}/cancel", f"{BATCHES}/{{name}}/cancel"}
    known = {path: (*SHAPES.get(path, ()), *POOLING_SHAPES.get(path, ())) for path in SHAPES | POOLING_SHAPES}
    assert {path for path, method, _ in ROUTES if method == "POST"} == {*known, *takes_none, FILES}
    assert set(BatchRequest.__struct_fields__) == FIELDS
    given: dict[str, set[str]] = {path: set() for path in known}
    uploads = 0
    for number in range(12_000):
        for case in (make(1, number), make_pooling(1, number)) if number < 4000 else (make(1, number),):
            uploads += case.path == FILES and case.must_serve
            if case.kind in ("valid", "mutated") and case.body is not None and case.path in known:
                with contextlib.suppress(ValueError, RecursionError):
                    given[case.path] |= set(json.loads(case.body))
    assert uploads > 100
    for shape in {shape for shapes in known.values() for shape in shapes}:
        asked = [given[path] for path, shapes in known.items() if shape in shapes]
        assert set().union(*asked) >= set(shape.__struct_fields__), shape
    assert given[CHAT] >= IGNORED


# ---- the fuzzer sees what it is there to see ----

ERROR = {"message": "no", "type": "invalid_request_error", "param": None, "code": 400}
FULL = {**ERROR, "code": 503, "reason": "queue_full"}
DONE = {
    "choices": [{"index": 0, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
}
CHUNK = {"choices": [{"index": 0, "finish_reason": "stop"}]}


def answer_of(status: int, body: Any, kind: str = "application/json", **headers: str) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer(status, {"content-type": kind, "x-request-id": "1", **headers}, data)


def events(*chunks: Any, end: bytes = b"data: [DONE]\n\n") -> Answer:
    data = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + end
    return answer_of(200, data, "text/event-stream; charset=utf-8")


def case_of(**changes: Any) -> Case:
    return Case(
        **{
            "number": 0,
            "kind": "valid",
            "method": "POST",
            "target": TEXT.encode(),
            "headers": (),
            "body": b"",
        }
        | changes
    )


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (answer_of(200, DONE), None),
        (events({"choices": [{"index": 0, "finish_reason": None}]}, CHUNK), None),
        (answer_of(400, {"error": ERROR}), None),
        (answer_of(400, {"error": {**ERROR, "code": "context_length_exceeded"}}), None),
        (answer_of(503, {"error": FULL}), None),
        (answer_of(500, {"error": {**ERROR, "code": 500}}), "500 500: no"),
        (answer_of(503, {"error": {**FULL, "reason": "engine_dead"}}), "503 engine_dead"),
        (answer_of(418, {"error": {**ERROR, "code": 418}}), "418"),
        (answer_of(400, {"error": FULL}), "code 503 of 400"),
        (answer_of(400, {"error": {**ERROR, "code": None}}), "code None of 400"),
        (answer_of(400, {"detail": "no"}), "shapeless 400"),
        (answer_of(400, b"no"), "shapeless 400"),
        (answer_of(400, {"error": {**ERROR, "message": " "}}), "no message"),
        (answer_of(400, {"error": {**ERROR, "message": "a" * 1025}}), "over 1024 bytes"),
        (answer_of(400, {"error": {**ERROR, "param": "a" * 1025}}), "over 1024 bytes"),
        (answer_of(400, {"error": {"message": "no"}}), "error keys"),
        (answer_of(400, {"error": ERROR}, "text/plain"), "not declared as JSON"),
        (answer_of(400, {"error": {**ERROR, "message": "<X object at 0x7f>"}}), "Python in a message"),
        (Answer(400, {"content-type": "application/json"}, b"{}"), "without a request id"),
        (answer_of(200, {**DONE, "choices": []}), "indices"),
        (
            answer_of(200, {**DONE, "choices": [{"index": 0, "finish_reason": "abort"}]}),
            "finish_reason abort",
        ),
        (answer_of(200, {**DONE, "usage": {**DONE["usage"], "total_tokens": 4}}), "does not add up"),
        (answer_of(200, b'{"choices": NaN}'), "shapeless 200"),
        (events(CHUNK, end=b""), "without its end"),
        (events({"choices": [{"index": 0, "finish_reason": None}]}), "choices end with"),
        (events(CHUNK, CHUNK), "after its end"),
        (events({"error": {**ERROR, "code": 500, "reason": "internal_error"}}), "ends with internal_error"),
    ],
)
def test_the_oracle(answer: Answer, fault: str | None) -> None:
    found = wrong(case_of(), answer)
    assert found is None if fault is None else found is not None and fault in found


def test_the_oracle_knows_what_was_sent() -> None:
    refusal = answer_of(400, {"error": ERROR})
    assert "refused" in str(wrong(case_of(must_serve=True), refusal))
    assert "no param" in str(wrong(case_of(field="n"), refusal))
    named = answer_of(400, {"error": {**ERROR, "param": "n"}})
    assert wrong(case_of(field="n"), named) is None


@pytest.mark.parametrize(
    ("reply", "problem"), [(None, "no answer in time"), (b"", "a connection that breaks")]
)
def test_servers_that_do_not_answer(
    reply: bytes | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is silent, and one that hangs up."""
    monkeypatch.setattr(drive, "PATIENCE", 0.05)
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    kept.append(listener.accept()[0])
                    if reply is not None:
                        kept.pop().close()

        thread = threading.Thread(target=accept)
        thread.start()
        (report,) = run(listener.getsockname()[1], 1, blocks(0, 4), sessions=1)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in kept:
        connection.close()
    assert any(problem in found for found in report.findings)
    assert (report.hangs > 0) == (reply is None)
