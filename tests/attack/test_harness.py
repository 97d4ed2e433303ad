"""The harness sees what it is there to see."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tests.e2e.server import Server, serving

from .harness import MB, attacked, error_of, post, processes, withstands


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving("demo", log=tmp_path_factory.mktemp("harness") / "log") as server:
        yield server


def test_an_ordinary_request_costs_nobody_anything(server: Server) -> None:
    body = {"prompt": "What is a KV cache?", "max_tokens": 4}
    post(server, "/v1/completions", body)
    toll = withstands(server, lambda: post(server, "/v1/completions", body))
    assert toll.probes >= 1
    assert max(toll.grown.values()) <= 50 * MB


def test_a_stalled_server_is_seen(server: Server) -> None:
    api = processes(server)["api"]

    def stall() -> None:
        os.kill(api, signal.SIGSTOP)
        resume = threading.Timer(0.8, os.kill, (api, signal.SIGCONT))
        resume.start()
        resume.join()

    try:
        assert attacked(server, stall).worst_livez > 0.5
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(api, signal.SIGCONT)


def test_the_shape_of_errors_is_checked(server: Server) -> None:
    assert error_of(post(server, "/v1/completions", {"prompt": 1.5}))["param"] == "prompt"
    with pytest.raises(KeyError):
        error_of((500, b'{"detail": "no"}'))
