"""kill -9 in the middle of requests, and an engine that lives: rows with the engine's figures, once each."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from penstock.gateway.ledger.schema import accounts, ledger
from penstock.gateway.ledger.store import Store
from penstock.gateway.policy.amounts import NANO
from tests.http.live import PATIENCE
from tests.server.conftest import running
from tests.server.fake_engine import FakeEngine
from tests.server.tiny import make_tokenizer

from .conftest import CHAT
from .test_workers import children

SPEC = """
pools: {{box: {{hardware: L4, price_per_hour: 3.60}}}}
upstreams:
  ours:
    url: {url}/v1
    kind: penstock
    pool: box
    devices: 2
    trusts_gateway: true
    api_key_env: ENGINE_KEY
    models: {{tiny: {{name: tiny}}}}
routes: {{small: {{targets: [{{model: tiny, upstream: ours}}]}}}}
limits: {{dollars_per_day: 100, device_seconds_per_day: 100000}}
gateway: {{port: 0, workers: {workers}}}
"""
BODY = {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60, "stream": True}


class Process:
    """`penstock gateway` in a folder."""

    def __init__(self, folder: Path) -> None:
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock", "gateway"],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": os.getcwd(), "ENGINE_KEY": "sk-engine"},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        url = self.process.stdout.readline().split()[-1]
        self.port = int(url.removesuffix("/v1").rpartition(":")[2])

    def first_key(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()[-1]

    def end(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.communicate(timeout=PATIENCE)


@contextmanager
def gateway(folder: Path) -> Iterator[Process]:
    process = Process(folder)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.communicate()


def ask(port: int, key: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", CHAT, json.dumps(BODY), headers)
    return connection


def rows(folder: Path) -> list[sa.RowMapping]:
    store = Store(f"sqlite:///{folder / 'penstock.db'}")
    try:
        with store.reading() as connection:
            return list(connection.execute(sa.select(ledger)).mappings())
    finally:
        store.close()


def settled(folder: Path, count: int) -> list[sa.RowMapping]:
    """All rows, once none waits for a bill."""
    end = time.monotonic() + PATIENCE
    while True:
        found = rows(folder)
        if len(found) == count and all(each["owed"] is None for each in found):
            return found
        assert time.monotonic() < end, [dict(each) for each in found]
        time.sleep(0.05)


def check_books(folder: Path, found: list[sa.RowMapping]) -> None:
    """The accounts are the rows."""
    store = Store(f"sqlite:///{folder / 'penstock.db'}")
    with store.reading() as connection:
        used = dict(connection.execute(sa.select(accounts.c.unit, accounts.c.used)).all())
    store.close()
    assert used["dollars"] == sum(each["dollars"] for each in found)
    assert used["device_seconds"] == sum(each["device_seconds"] for each in found)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_requests_get_the_engines_figures(tmp_path: Path, workers: int) -> None:
    """With one worker the whole gateway is killed and another one takes over; with two, both of them."""
    engine = FakeEngine(lambda asked: [65] * 50, pause_at=7)
    with running(
        make_tokenizer(), engine.reply, engine=engine, gateway_key="sk-engine", served_model_name=("tiny",)
    ) as server:
        (tmp_path / "penstock.yaml").write_text(SPEC.format(url=server.url, workers=workers))
        with gateway(tmp_path) as first:
            key = first.first_key()
            asking = [ask(first.port, key) for _ in range(3)]
            engine.wait_until(lambda engine: len(engine.adds) == 3)
            if workers == 1:
                first.end()
                engine.wait_until(lambda engine: len(engine.gone) == 3)
                with gateway(tmp_path):
                    found = settled(tmp_path, 3)
            else:
                for pid in children(first.process.pid):
                    os.kill(pid, signal.SIGKILL)
                engine.wait_until(lambda engine: len(engine.gone) == 3)
                found = settled(tmp_path, 3)
            for connection in asking:
                connection.close()
        feed = server.request("GET", "/v1/bills", headers={"Authorization": "Bearer sk-engine"}).json["data"]
    bills = {bill["request_id"].rpartition(".")[0]: bill for bill in feed}
    for row in found:
        bill = bills[row["id"]]
        assert (row["settlement"], row["end"]) == ("settled", "killed")
        assert (row["upstream"], row["replica"], row["model"]) == ("ours", "ours", "tiny")
        assert (row["pool"], row["device"], row["attempts"]) == ("box", "L4", 1)
        assert (row["input_tokens"], row["output_tokens"]) == (
            bill["prompt_tokens"],
            bill["completion_tokens"],
        )
        assert row["device_seconds"] == round(bill["device_seconds"] * NANO) * 2 > 0
        assert row["dollars"] == row["device_seconds"] // 1000  # 3.60 an hour: a nanodollar a microsecond
    check_books(tmp_path, found)
