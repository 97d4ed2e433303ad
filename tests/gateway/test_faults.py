"""The fault matrix: for each way in which an upstream can fail, what the client sees, what the row says, and
that nothing stays reserved."""

from __future__ import annotations

import json
import select
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

import pytest

from penstock.gateway import bills
from tests.http.live import PATIENCE

from .conftest import BODY, CHAT, KEY, SPEC, STREAM, Make
from .upstream import (
    TOKENS,
    Behaviour,
    answer,
    cut,
    cut_by_reset,
    end_early,
    endless,
    error_event,
    error_later,
    garbage,
    half_body,
    hang,
    hang_after_headers,
    hang_up,
    no_json,
    no_stream,
    reset,
    stall,
    status,
)


@dataclass(frozen=True)
class Fault:
    behaviour: Behaviour
    status: int
    """That the client gets."""
    code: str
    """Of the error."""
    streams: bool | None = None
    """Where it can happen; None: in both."""


BEFORE = {
    "reset": Fault(reset, 502, "upstream_reset"),
    "hangs up": Fault(hang_up, 502, "upstream_reset"),
    "hangs before headers": Fault(hang, 504, "upstream_slow"),
    "hangs after headers": Fault(hang_after_headers, 504, "upstream_stalled"),
    "garbage": Fault(garbage, 502, "upstream_invalid"),
    "no JSON": Fault(no_json, 502, "upstream_invalid"),
    "half a body": Fault(half_body, 502, "upstream_cut", streams=False),
    "error event": Fault(error_event, 502, "upstream_error", streams=True),
    "429": Fault(status(429, "Retry-After: 1"), 503, "upstream_status"),
    "500": Fault(status(500), 502, "upstream_status"),
    "502": Fault(status(502, body=b"<html>bad gateway</html>"), 502, "upstream_status"),
    "503": Fault(status(503), 503, "upstream_status"),
    "529": Fault(status(529), 503, "upstream_status"),
    "our key": Fault(status(401), 502, "upstream_status"),
    "redirect": Fault(status(307, "Location: http://127.0.0.1:9/admin"), 502, "upstream_invalid"),
}
"""Faults before the first byte."""

IN_STREAM = {
    "stalls": (stall, "upstream_stalled"),
    "cut in mid-chunk": (cut, "upstream_cut"),
    "reset": (cut_by_reset, "upstream_cut"),
    "ends early": (end_early, "upstream_cut"),
    "error event": (error_later, "upstream_error"),
}
"""Faults after two events."""


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("name", BEFORE)
def test_before_the_first_byte_the_client_gets_an_error(make: Make, name: str, streams: bool) -> None:
    fault = BEFORE[name]
    if fault.streams not in (None, streams):
        pytest.skip("cannot happen so")
    gateway = make(fault.behaviour)
    response = gateway.post(STREAM if streams else BODY)
    assert (response.status, response.reason) == (fault.status, fault.code), response.body
    assert ("retry-after" in response.headers) == (fault.status == 503)
    row = gateway.row()
    assert (row.status, row.end, row.settlement) == (fault.status, "upstream_failed", "settled")
    assert (row.attempts, row.input_tokens, row.output_tokens) == (1, 0, 0)
    assert not row.dollars
    assert not any(amount for limit, amount in gateway.meter.used.items() if limit.unit != "requests")


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("name", BEFORE)
def test_before_the_first_byte_somebody_else_is_asked(make: Make, name: str, streams: bool) -> None:
    fault = BEFORE[name]
    if fault.streams not in (None, streams):
        pytest.skip("cannot happen so")
    # whichever replica is asked first, its first answer is the fault
    broken = [fault.behaviour]
    gateway = make(answer, answer, scripts=[broken, broken], retries=2)
    gateway.stations.all()[1].in_flight = 1  # so that the first one is asked first
    response = gateway.post(STREAM if streams else BODY)
    gateway.stations.all()[1].in_flight -= 1
    assert response.status == 200, response.body
    row = gateway.row()
    assert (row.status, row.end, row.settlement, row.attempts) == (200, "done", "settled", 3)
    assert (row.input_tokens, row.output_tokens) == (7, len(TOKENS))
    assert row.note.count(";") == 1


@pytest.mark.parametrize("name", IN_STREAM)
def test_a_stream_that_breaks_ends_with_an_error_and_without_done(make: Make, name: str) -> None:
    behaviour, code = IN_STREAM[name]
    gateway = make(behaviour, retries=2)
    connection, response = gateway.open()
    assert response.status == 200
    body = response.read(1)
    gateway.upstream.go()
    *events, last, nothing = (body + response.read()).decode().split("\n\n")
    connection.close()
    assert nothing == ""
    assert [json.loads(each[6:])["choices"][0]["delta"]["content"] for each in events] == list(TOKENS[:2])
    assert json.loads(last[6:])["error"]["reason"] == code
    row = gateway.row()
    assert (row.status, row.end, row.attempts) == (200, "upstream_failed", 1)
    assert (row.settlement, row.output_tokens) == ("estimated", 2)
    assert row.input_tokens > 0
    assert len(gateway.upstream.asked) == 1


TRUSTS = {"pool: box\n": "pool: box\n    trusts_gateway: true\n    api_key_env: CLOUD_KEY\n"}


@pytest.mark.parametrize("wants_usage", [False, True], ids=["", "usage"])
@pytest.mark.parametrize("name", IN_STREAM)
def test_a_stream_that_breaks_goes_on_at_another_replica(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str, wants_usage: bool
) -> None:
    """Of a Penstock that trusts the gateway; and the bill of who broke is lost."""
    monkeypatch.setattr(bills, "PATIENCE", 0.01)
    behaviour, code = IN_STREAM[name]
    gateway = make(behaviour, answer, retries=2, replace=TRUSTS)
    gateway.stations.all()[1].in_flight = 1  # so that the first one is asked first
    connection, response = gateway.open(
        {**STREAM, "stream_options": {"include_usage": True}} if wants_usage else STREAM
    )
    body = response.read(1)
    gateway.upstreams[0].go()
    *events, done, nothing = (body + response.read()).decode().split("\n\n")
    connection.close()
    assert (done, nothing) == ("data: [DONE]", "")
    chunks = [json.loads(each[6:]) for each in events]
    if wants_usage:
        usage = chunks.pop()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, len(TOKENS))
    *told, last = [each["choices"][0] for each in chunks]
    assert [each["delta"]["content"] for each in told] == list(TOKENS)
    assert last["finish_reason"] == "stop"
    row = gateway.row()
    assert (row.status, row.end, row.attempts) == (200, "done", 2)
    assert (row.input_tokens, row.output_tokens, row.cached_tokens) == (7, len(TOKENS), 2)
    assert (row.settlement, row.device_seconds_estimated) == ("estimated", True)
    assert row.device_seconds
    assert row.device_seconds > 250_000_000  # the second one's, and a share of the first one
    fault = code.removeprefix("upstream_")
    assert row.note == f"ours/0: {fault}; resumed at ours/1 after 2 tokens"
    assert gateway.upstreams[1].asked[0].json["generated_token_ids"] == [0, 1]


REST = {
    "refused": (status(400), "upstream_status"),
    "overloaded": (status(503), "upstream_status"),
    "hangs": (hang, "upstream_slow"),
    "no stream": (no_stream, "upstream_invalid"),
    "garbage": (garbage, "upstream_invalid"),
    "another break": (cut, "upstream_cut"),
}
"""What becomes of the rest of a stream at another replica, the last one that is asked."""


@pytest.mark.parametrize("name", REST)
def test_a_rest_that_fails_as_well(make: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(bills, "PATIENCE", 0.01)
    behaviour, code = REST[name]
    gateway = make(cut, behaviour, retries=1, replace=TRUSTS)
    gateway.stations.all()[1].in_flight = 1  # so that the first one is asked first
    *events, last, nothing = gateway.post(STREAM).body.decode().split("\n\n")
    assert nothing == ""
    got = 4 if name == "another break" else 2
    assert [json.loads(each[6:])["choices"][0].get("delta") for each in events][:got] == [
        {"content": token} for token in TOKENS[:got]
    ]
    assert json.loads(last[6:])["error"]["reason"] == code
    row = gateway.row()
    assert (row.status, row.end, row.attempts) == (200, "upstream_failed", 2)
    assert (row.settlement, row.input_tokens, row.output_tokens) == ("estimated", 7, got)
    assert gateway.stations.all()[1].health.in_a_row == (name != "refused")


def test_a_rest_is_asked_for_until_somebody_has_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that fails before it has said a token is none that the answer came from."""
    monkeypatch.setattr(bills, "PATIENCE", 0.01)
    gateway = make(cut, status(500), answer, retries=2, replace=TRUSTS)
    for index, station in enumerate(gateway.stations.all()):
        station.in_flight = index
    body = gateway.post(STREAM).body
    assert body.endswith(b"data: [DONE]\n\n")
    row = gateway.row()
    assert (row.end, row.attempts, row.output_tokens) == ("done", 3, len(TOKENS))
    assert row.note == "ours/0: cut; ours/1: status 500; resumed at ours/2 after 2 tokens"


def test_an_upstream_that_refuses_connections(make: Make) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        spec = SPEC.replace("{url}", f"http://127.0.0.1:{taken.getsockname()[1]}")
        gateway = make(spec=spec)
        response = gateway.post()
        assert (response.status, response.reason) == (502, "upstream_connect")
        assert "127.0.0.1" not in response.error["message"]
        assert gateway.row().settlement == "settled"


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "stream"])
def test_what_is_wrong_with_the_request_is_said_by_the_upstream(make: Make, streams: bool) -> None:
    gateway = make(
        status(400, body={"error": {"message": "no such role", "type": "x", "param": None, "code": "r"}})
    )
    response = gateway.post(STREAM if streams else BODY)
    assert (response.status, response.reason) == (400, "r")
    row = gateway.row()
    assert (row.status, row.end, row.dollars, row.settlement) == (400, "done", None, "settled")
    assert len(gateway.upstream.asked) == 1


PATIENT = {"timeout_headers: 0.3": "timeout_headers: 30", "timeout_idle: 0.4": "timeout_idle: 30"}
"""Where it is not about time-outs: no machine is slow enough for one."""


@pytest.mark.parametrize("behaviour", ["endless", "hang"])
def test_an_upstream_that_is_killed(make: Make, behaviour: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gateway.upstream", behaviour], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        gateway = make(spec=SPEC.replace("{url}", f"http://127.0.0.1:{port}"), replace=PATIENT)
        if behaviour == "endless":
            connection, response = gateway.open()
            assert response.readline().startswith(b"data: ")
            process.send_signal(signal.SIGKILL)
            body = response.read()
            connection.close()
            last = body.decode().split("\n\n")[-2]
            assert json.loads(last[6:])["error"]["reason"] == "upstream_cut"
            row = gateway.row()
            assert (row.end, row.settlement) == ("upstream_failed", "estimated")
            assert row.output_tokens > 0
        else:
            sock = socket.create_connection(("127.0.0.1", gateway.live.port), timeout=PATIENCE)
            body_bytes = json.dumps(BODY).encode()
            sock.sendall(
                f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
                f"Content-Length: {len(body_bytes)}\r\n\r\n".encode()
                + body_bytes
            )
            gateway.wait_for(lambda: gateway.stations.all()[0].in_flight == 1)
            process.send_signal(signal.SIGKILL)
            assert b"502" in sock.recv(100)
            sock.close()
            assert gateway.row().settlement == "settled"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "stream"])
def test_a_client_that_leaves(make: Make, streams: bool) -> None:
    gateway = make(endless if streams else hang, replace=PATIENT)
    if streams:
        connection, response = gateway.open()
        assert response.readline().startswith(b"data: ")
        response.close()
        connection.close()
    else:
        sock = socket.create_connection(("127.0.0.1", gateway.live.port), timeout=PATIENCE)
        body = json.dumps(BODY).encode()
        sock.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        gateway.wait_for(lambda: bool(gateway.upstream.asked))
        sock.close()
    assert gateway.upstream.left.wait(PATIENCE)  # the upstream need not go on
    row = gateway.row()
    assert (row.status, row.end) == (499, "client_gone")
    if streams:
        assert row.settlement == "estimated"
        assert row.output_tokens > 0
    else:
        assert (row.settlement, row.dollars) == ("unsettled", row.reserved_dollars)
        assert row.dollars


def test_a_client_that_reads_slowly_is_no_upstream_that_writes_slowly(make: Make) -> None:
    """The upstream writes until all buffers are full, waits for longer than its own idle time-out allows, and
    the stream goes on."""
    gateway = make(endless, spec=SPEC.replace("timeout_idle: 0.4", "timeout_idle: 0.3"))
    connection, response = gateway.open()
    sock = response.fp.raw._sock
    assert response.readline().startswith(b"data: ")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    select.select([], [], [], 0.8)  # the client's own slowness
    assert gateway.door.load == 1
    assert response.readline() == b"\n"
    assert response.readline().startswith(b"data: ")
    response.close()
    connection.close()
    assert gateway.row().end == "client_gone"
