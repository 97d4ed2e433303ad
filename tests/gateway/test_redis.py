"""A whole gateway of two workers whose limits are in Redis: a race on a cap, and Redis that goes."""

from __future__ import annotations

import concurrent.futures
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.server import eventually
from tests.http.live import Response

from .conftest import CHAT
from .process import Process, gateway
from .stores import redis_server
from .upstream import TOKENS, Upstream

SPEC = """
upstreams:
  ours:
    url: {url}
    kind: openai
    models: {{tiny: {{price: {{input: 1000, output: 1000, as_of: 2026-01-01, source: test}}}}}}
routes: {{small: {{targets: [{{model: tiny, upstream: ours}}]}}}}
gateway: {{port: 0, workers: 2}}
ledger: {{counters: "{counters}", counters_failure: {failure}, spool: ./spool}}
"""
BODY = {"model": "small", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi!"}]}
COST = (7 + len(TOKENS)) * 10**6
"""Nanodollars of a request."""


def spent(process: Process) -> int:
    return sum(row["dollars"] or 0 for row in process.rows())


@pytest.mark.parametrize("failure", ["closed", "open"])
def test_redis_comes_and_goes(tmp_path: Path, failure: str) -> None:
    upstream = Upstream().start()
    try:
        with redis_server() as server:
            spec = SPEC.format(url=upstream.url, counters=server.url, failure=failure)
            with gateway(tmp_path, spec) as process:
                cap = 60 * COST
                key = process.new_key({"dollars_per_day": cap / 10**9})[1]

                def ask(_: int = 0) -> Response:
                    return process.post(CHAT, BODY, key)

                with concurrent.futures.ThreadPoolExecutor(8) as pool:
                    first = Counter(answer.status for answer in pool.map(ask, range(24)))
                assert set(first) <= {200, 429}
                os.kill(next(iter(process.workers)), signal.SIGKILL)

                server.stop()
                eventually(lambda: len(process.workers) == 2)
                without = [ask() for _ in range(4)]
                if failure == "closed":
                    assert {(each.status, each.reason) for each in without} == {(503, "ledger_unavailable")}
                    assert all(int(each.headers["retry-after"]) >= 1 for each in without)
                else:
                    assert {each.status for each in without} == {200}
                let = first[200] + sum(each.status == 200 for each in without)
                # the ledger charges them all the same
                eventually(lambda: spent(process) >= let * COST)

                server.start()  # it has forgotten everything, and begins with what the ledger has charged
                eventually(lambda: ask().status == 200)

                def exhausted() -> bool:
                    status = ask().status
                    assert status in (200, 429) or (failure == "closed" and status == 503)  # it was slow
                    worst = max(row["reserved_dollars"] for row in process.rows())
                    return bool(status == 429 and cap - spent(process) < worst)

                eventually(exhausted)
                process.stop()
                assert spent(process) <= cap
                assert len(process.rows()) == len(upstream.asked)
                (charged,) = (used for id, used in process.charged().items() if "|dollars|day|" in id)
                assert charged == spent(process)
    finally:
        upstream.stop()
