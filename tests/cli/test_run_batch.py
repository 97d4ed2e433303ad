"""`penstock run-batch` from and to URLs: what is fetched, what is sent, and what a failure leaves."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from penstock.cli import run_batch
from penstock.core.errors import StartupError
from penstock.http import transfer

INPUT, OUTPUT = b'{"custom_id": "a"}\n' * 40_000, b'{"id": "1"}\n' * 50_000
"""Both are longer than a piece."""


class Bucket(ThreadingHTTPServer):
    """Has files, takes files, and is out of order as often as it is told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {"/in": INPUT}
        self.failures = 0
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Bucket

    def do_GET(self) -> None:
        found = self.server.files.get(self.path)
        self._answer(404 if found is None else 200, found or b"")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.failures:
            self.server.failures -= 1
            self._answer(503, b"")
            return
        self.server.files[self.path] = body
        self._answer(201, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.server.asked.append(self.command)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setattr(transfer, "_WAIT", 0.0)
    with Bucket() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(bucket: Bucket, folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The command, whose engine answers at once; what that was asked."""
    asked: list[bytes] = []

    def serve(args: argparse.Namespace, source: Path, output: Path) -> int:
        asked.append(source.read_bytes())
        output.write_bytes(OUTPUT)
        return 0

    monkeypatch.setattr(run_batch, "_serve", serve)
    parser = argparse.ArgumentParser()
    run_batch.add_arguments(parser)
    words = ["-i", source, "-o", f"{bucket.url}/out", "--output-tmp-dir", str(folder)]
    assert run_batch.run(parser.parse_args(words)) == 0
    return asked


def test_from_a_url_to_a_url(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(bucket, tmp_path, f"{bucket.url}/in", monkeypatch) == [INPUT]
    assert bucket.files["/out"] == OUTPUT
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_sent_is_sent_by_the_same_command(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.failures = 5
    with pytest.raises(StartupError, match=r"could not be sent to .*: HTTP 503\.") as lost:
        run(bucket, tmp_path, f"{bucket.url}/in", monkeypatch)
    (kept,) = tmp_path.iterdir()
    assert str(kept) in str(lost.value.advice)
    bucket.failures = 4
    assert run(bucket, tmp_path, f"{bucket.url}/in", monkeypatch) == []  # nothing is asked twice
    assert bucket.files["/out"] == OUTPUT
    assert not kept.exists()
    assert bucket.asked.count("PUT") == 10


def test_an_input_that_is_not_there(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match="answered HTTP 404"):
        run(bucket, tmp_path, f"{bucket.url}/none", monkeypatch)
    with pytest.raises(StartupError, match=r"http://127\.0\.0\.1:1/in cannot be fetched"):
        run(bucket, tmp_path, "http://127.0.0.1:1/in", monkeypatch)
