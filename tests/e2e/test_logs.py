"""What a real server writes: one format, also of the engine's process, of failures, and at the end."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from .server import Server, eventually, serving

SMALL = ("--kv-cache-memory-bytes", "16MiB", "--dtype", "float32")
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [A-Z]+ +(api|engine)\[\d+\] \S?.*")


def entries(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.splitlines()]


def post(server: Server, path: str, body: Any, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def test_everything_is_json_from_start_to_end_and_tells_no_secret(tmp_path: Path) -> None:
    flags = (*SMALL, "--log-format", "json", "--api-key", "xyzzy-key", "--enable-log-requests")
    with serving(*flags, log=tmp_path / "log") as server:
        key = {"Authorization": "Bearer xyzzy-key"}
        asked = {"prompt": "xyzzy", "max_tokens": 3}
        assert post(server, "/v1/completions?key=xyzzy", asked, {**key, "X-Request-Id": "r-1"}) == 200
        assert post(server, "/v1/completions?key=xyzzy", asked, {"Authorization": "Bearer xyzzy"}) == 401
        server.get("/metrics")
        pid = server.process.pid
        engine = server.engine_pid()
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_status() == 0
    found = entries(server)
    assert "xyzzy" not in server.log
    assert {(entry["process"], entry["pid"]) for entry in found} == {("api", pid), ("engine", engine)}
    assert all({"time", "level", "message", "logger"} <= set(entry) for entry in found)
    (memory,) = [entry for entry in found if entry["message"].startswith("Memory")]
    assert "KV cache" in memory["message"]
    assert [entry for entry in found if entry["message"].startswith("serving demo at http://127.0.0.1:")]
    access = [entry for entry in found if entry["logger"] == "penstock.access"]
    assert [(entry["method"], entry["path"], entry["status"]) for entry in access] == [
        ("POST", "/v1/completions", 200),
        ("POST", "/v1/completions", 401),
    ]
    assert access[0]["request_id"] == "r-1"
    assert access[0]["duration"] > 0
    assert access[0]["client"].startswith("127.0.0.1:")
    assert not [entry for entry in found if "exception" in entry]


def test_the_end_of_an_engine_is_json_too(tmp_path: Path) -> None:
    with serving(*SMALL, "--log-format", "json", log=tmp_path / "log") as server:
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.exit_status() == 1
    told = [entry["message"] for entry in entries(server) if entry["level"] in ("ERROR", "CRITICAL")]
    assert any("ended by SIGKILL" in message for message in told)


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_start_that_fails_says_why_once(tmp_path: Path, form: str) -> None:
    """Found in the engine's process, and told by the one that was started."""
    server = Server("--kv-cache-memory-bytes", "900GiB", "--log-format", form, log=tmp_path / "log")
    assert server.exit_status(90) == 2
    assert server.log.count("is more than fits") == 1
    assert re.search(r"Use --kv-cache-memory-bytes \d{7,}\.", server.log), "the largest that does"
    if form == "json":
        (why,) = [entry for entry in entries(server) if entry["level"] == "CRITICAL"]
        assert why["message"].startswith("penstock serve: ")
    else:
        assert all(LINE.fullmatch(line) for line in server.log.splitlines())
        assert re.search(r"CRITICAL api\[\d+\] penstock serve: .*is more than fits", server.log)


_BUG = """
import sys
if "penstock.engine.process" in sys.orig_argv:
    import penstock.engine.build as build
    def load_any(*_, **__):
        raise ZeroDivisionError("nobody foresaw this")
    build.load_any = load_any
"""


def test_a_bug_in_the_engine_leaves_its_traceback_in_one_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_BUG)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    server = Server(*SMALL, "--log-format", "json", log=tmp_path / "log")
    assert server.exit_status(90) == 2
    found = entries(server)
    (trace,) = [entry for entry in found if "exception" in entry]
    assert trace["exception"].startswith("Traceback (most recent call last):\n")
    assert trace["exception"].endswith("\nZeroDivisionError: nobody foresaw this")
    (why,) = [entry for entry in found if "nobody foresaw this" in entry["message"]]
    assert (why["level"], why["process"]) == ("CRITICAL", "api")


def test_every_line_of_a_text_log_has_time_level_and_process(tmp_path: Path) -> None:
    with serving(*SMALL, log=tmp_path / "log") as server:
        assert server.get("/no%0d%0a2026-01-01%2000:00:00.000%20INFO%20api[1]%20fake")[0] == 404
        assert server.get("/health")[0] == 200
        with socket.create_connection(("127.0.0.1", server.port)) as connection:  # no HTTP
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nx:\x1b[31m\r\n\r\n")
            assert b" 400 " in connection.recv(65536)
    lines = server.log.splitlines()
    assert all(LINE.fullmatch(line) for line in lines), [x for x in lines if not LINE.fullmatch(x)]
    assert {match[1] for line in lines if (match := LINE.fullmatch(line))} == {"api", "engine"}
    assert server.log.count("fake") == 1
    assert "/health" not in server.log
    assert "\x1b" not in server.log


def test_a_unix_socket_in_place_of_a_port(tmp_path: Path) -> None:
    path = tmp_path / "penstock.sock"
    server = Server(*SMALL, "--uds", str(path), log=tmp_path / "log")
    try:
        eventually(lambda: f"serving demo at unix:{path}" in server.log or server.process.poll(), 90)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(path))
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b" 200 OK" in connection.recv(65536)
        second = Server("--uds", str(path), log=tmp_path / "second")
        assert second.exit_status(60) == 2
        assert "another server has it" in second.log
        assert path.is_socket()
    finally:
        server.close()
    assert server.exit_status() == 0
    assert not path.exists()
    assert not Path(f"{path}.lock").exists()
