"""Escalation with real processes: OpenAI's client, `penstock gateway` and its ledger, two upstreams; and kill
-9 in the middle of it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa

from penstock.cli.main import main
from penstock.gateway.ledger.schema import accounts
from penstock.gateway.ledger.store import Store
from penstock.gateway.policy.amounts import NANO
from tests.http.live import PATIENCE
from tests.server.conftest import running
from tests.server.fake_engine import FakeEngine
from tests.server.tiny import make_tokenizer

from .escalating import CHEAP_DOLLARS, DEAR_DOLLARS, SPEC, says
from .process import gateway
from .test_killed import ask as ask_stream
from .test_killed import gateway as killable
from .test_killed import settled
from .upstream import Upstream, Wire, hang

GATEWAY = "gateway: {{port: 0}}\n"


async def small(wire: Wire) -> None:
    """Sure of what is easy."""
    easy = "easy" in wire.asked.json["messages"][0]["content"]
    await says("it is easy really" if easy else "well it may be", -0.1 if easy else -3.0)(wire)


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "stream"])
def test_openais_client_an_escalation_and_an_answer_that_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], streams: bool
) -> None:
    ours, cloud = (
        Upstream(default=small).start(),
        Upstream(default=says("a dear answer comes", device=None)).start(),
    )
    try:
        with gateway(tmp_path, (SPEC + GATEWAY).format(url=ours.url, url1=cloud.url)) as process:
            with openai.OpenAI(
                base_url=process.url, api_key=process.key, max_retries=0, timeout=PATIENCE
            ) as client:
                said = [_ask(client, prompt, streams) for prompt in ("an easy one", "a hard one")]
            process.stop()
            assert said == ["it is easy really", "a dear answer comes"]
            passed, *both = process.rows()
            attempt, final = sorted(both, key=lambda row: row["number"])
            assert (passed["verdict"], passed["verifier"], passed["score"]) == (
                "passed",
                "mean_logprob",
                -0.1,
            )
            assert (passed["end"], passed["upstream"], passed["dollars"]) == ("done", "ours", CHEAP_DOLLARS)
            assert (attempt["verdict"], attempt["score"]) == ("failed", -3.0)
            assert (attempt["end"], attempt["upstream"], attempt["dollars"]) == (
                "escalated",
                "ours",
                CHEAP_DOLLARS,
            )
            assert (attempt["device_seconds"], attempt["output_tokens"]) == (NANO // 4, 4)
            assert (final["end"], final["upstream"], final["dollars"]) == ("done", "cloud", DEAR_DOLLARS)
            assert final["escalated_from"] == attempt["id"] == f"{final['id']}.attempt"
            day = {id: used for id, used in process.charged().items() if "|dollars|day|" in id}
            assert list(day.values()) == [2 * CHEAP_DOLLARS + DEAR_DOLLARS]
            where = ("--ledger", process.database)
            assert main(["ledger", "show", final["id"], *where]) == 0
            out = capsys.readouterr().out
            assert "a mean of -3.000 is below -0.5" in out
            assert main(["ledger", "export", "--format", "json", "--verdict", "failed", *where]) == 0
            assert json.loads(capsys.readouterr().out)["id"] == attempt["id"]
            assert main(["ledger", "list", "--json", "--limit", "3", *where]) == 0
            listed = {row["id"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
            delta = listed[final["id"]]["delta_dollars"]
            assert round(delta * NANO) == DEAR_DOLLARS - CHEAP_DOLLARS
            assert listed[passed["id"]]["delta_dollars"] is None
    finally:
        ours.stop()
        cloud.stop()


def _ask(client: openai.OpenAI, prompt: str, streams: bool) -> str:
    messages: Any = [{"role": "user", "content": prompt}]
    if not streams:
        answer = client.chat.completions.create(model="small", messages=messages, max_tokens=16)
        return answer.choices[0].message.content or ""
    with client.chat.completions.create(
        model="small", messages=messages, max_tokens=16, stream=True
    ) as stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


KILLED = """
pools: {{box: {{hardware: L4, price_per_hour: 3.60}}}}
upstreams:
  ours:
    url: {url}/v1
    kind: penstock
    pool: box
    trusts_gateway: true
    api_key_env: ENGINE_KEY
    models: {{tiny: {{name: tiny, context: 200}}}}
  cloud:
    url: {url1}/v1
    models: {{large: {{price: {{input: 10, output: 30, as_of: 2026-11-01, source: x}}}}}}
routes:
  small:
    targets: [{{model: tiny, upstream: ours}}]
    escalate: {{to: [{{model: large, upstream: cloud}}], verifiers: [{{length: {{min_characters: 100000}}}}]}}
limits: {{dollars_per_day: 100, device_seconds_per_day: 100000}}
gateway: {{port: 0}}
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("when", ["attempt", "escalation"])
def test_killed_in_the_middle_every_dollar_has_its_row(tmp_path: Path, when: str) -> None:
    """In the attempt: one row, with the engine's figures. Afterwards: the attempt's row as it was, and
    another one that is charged at the rest of the reservation."""
    engine = FakeEngine(lambda asked: [65] * 50, pause_at=7 if when == "attempt" else None)
    cloud = Upstream(default=hang).start()
    try:
        with running(
            make_tokenizer(),
            engine.reply,
            engine=engine,
            gateway_key="sk-engine",
            served_model_name=("tiny",),
        ) as server:
            (tmp_path / "penstock.yaml").write_text(KILLED.format(url=server.url, url1=cloud.url))
            with killable(tmp_path) as first:
                connection = ask_stream(first.port, first.first_key())
                engine.wait_until(lambda engine: len(engine.adds) == 1)
                if when == "escalation":
                    wait_for(lambda: bool(cloud.asked))
                first.end(signal.SIGKILL)
                if when == "attempt":
                    engine.wait_until(lambda engine: len(engine.gone) == 1)
                connection.close()
                with killable(tmp_path):
                    found = settled(tmp_path, 1 if when == "attempt" else 2)
            feed = server.request("GET", "/v1/bills", headers={"Authorization": "Bearer sk-engine"}).json[
                "data"
            ]
    finally:
        cloud.stop()
    attempt, *rest = sorted(found, key=lambda row: row["number"])
    (bill,) = feed
    assert (attempt["settlement"], attempt["output_tokens"]) == ("settled", bill["completion_tokens"])
    assert attempt["device_seconds"] == round(bill["device_seconds"] * NANO) > 0
    assert attempt["dollars"] == attempt["device_seconds"] // 1000
    if when == "attempt":
        assert (attempt["end"], attempt["verdict"]) == ("killed", "")
    else:
        (final,) = rest
        assert (attempt["end"], attempt["verdict"], attempt["reason"]) == (
            "escalated",
            "failed",
            "50 characters are fewer than 100000",
        )
        assert (final["end"], final["settlement"], final["upstream"]) == ("killed", "unsettled", "")
        assert final["escalated_from"] == attempt["id"]
        assert final["dollars"] == final["reserved_dollars"] > 0
    assert sum(row["dollars"] for row in found) == charged(tmp_path)


def charged(folder: Path) -> int:
    store = Store(f"sqlite:///{folder / 'penstock.db'}")
    try:
        with store.reading() as connection:
            query = sa.select(accounts.c.used).where(accounts.c.unit == "dollars")
            return int(connection.execute(query).scalar_one())
    finally:
        store.close()


def wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
