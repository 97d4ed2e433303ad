"""`penstock tune` on a server of somebody else's: measured, advised, and left as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from penstock.cli import tune as cli
from penstock.cli.main import main
from penstock.core.errors import StartupError
from penstock.engine.config import EngineConfig, step_limits
from penstock.tune.diagnosis import Pressure
from penstock.tune.engines import SEQS, TOKENS, known
from tests.in_thread import served
from tests.tune.engine import application

LOAD = [
    "--clients",
    "8",
    "--duration",
    "400ms",
    "--output-len",
    "4",
    "--input-len",
    "4",
    "--max-settings",
    "3",
]


@pytest.fixture(autouse=True)
def _nobody_elses_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_it_is_measured_and_nothing_is_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    with served(application(64), shutdown_timeout=0.1) as url:
        # targets that nobody misses and that nobody keeps, however busy this machine is
        status = main(["tune", "--live", url, *LOAD, "--tpot-p95", "60s", "--output-json", str(file)])
        out = capsys.readouterr().out
        assert status == 0, out
        assert main(["tune", "--live", url, *LOAD, "--tpot-p95", "0.01ms"]) == 1
    assert "No number of clients that was tried" in capsys.readouterr().out
    assert "nothing of it is changed" in out
    assert "Nothing was changed" in out
    result = json.loads(file.read_text())
    assert result["restarts"] is False
    assert result["steps"][0]["value"] == 8
    assert result["slo_ms"] == {"tpot": 60_000.0}
    assert "--max-num-seqs" in out


def test_prompts_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[dict[str, Any]] = []

    @web.middleware
    async def listen(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.method == "POST":
            asked.append(await request.json())
        answer: web.StreamResponse = await handler(request)
        return answer

    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one", "max_tokens": 2}\n{"prompt": "two", "max_tokens": 3}\n')
    app = application(64)
    app.middlewares.append(listen)
    with served(app, shutdown_timeout=0.1) as url:
        status = main(
            ["tune", "--live", url, *LOAD, "--e2e-p95", "1s", "--dataset-path", str(file), "--json"]
        )
    assert status == 0
    assert json.loads(capsys.readouterr().out)["load"]["dataset"] == str(file)
    assert {(body["prompt"], body["max_tokens"]) for body in asked} == {("one", 2), ("two", 3)}
    assert not any("ignore_eos" in body for body in asked)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "there is no target to tune for"),
        (["--ttft-p95", "soon"], "--ttft-p95: 'soon' is no duration"),
        (["--ttft-p95", "0s"], "must be above 0"),
        (["--ttft-p95", "1s", "--method", "stepwise"], "is not run by a penstock up"),
        (["--ttft-p95", "1s", "--request-rate", "5"], "needs an engine that can be restarted"),
        (["--ttft-p95", "1s", "--flag", "max-num-batched-tokens"], "needs --method bisect and an engine"),
        (
            ["--ttft-p95", "1s", "--model", "other", "--dataset-path", "/nowhere"],
            "cannot read --dataset-path",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(application(4), shutdown_timeout=0.1) as url:
        assert main(["tune", "--live", url, *LOAD, *arguments]) == 1
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1


@given(
    given_seqs=st.none() | st.integers(1, 600),
    given_tokens=st.none() | st.integers(1, 20_000),
    flag=st.sampled_from([SEQS, TOKENS]),
    clients=st.integers(1, 500),
    scores=st.lists(st.floats(0, 10), min_size=1, max_size=12),
    pressures=st.lists(st.sampled_from(Pressure), min_size=1, max_size=12),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_no_setting_is_tried_that_the_engine_refuses(
    given_seqs: int | None,
    given_tokens: int | None,
    flag: str,
    clients: int,
    scores: list[float],
    pressures: list[Pressure],
    device: str,
) -> None:
    config = EngineConfig(max_num_seqs=given_seqs, max_num_batched_tokens=given_tokens)
    try:
        real = step_limits(config, device)
    except StartupError:
        return  # it would not have started
    words = [f"--{SEQS}={given_seqs}"] * (given_seqs is not None)
    words += [f"--{TOKENS}={given_tokens}"] * (given_tokens is not None)
    found = known(words, "penstock", cpu=device == "cpu")
    assert (found.seqs, found.tokens) == real  # what is read is what the engine does
    engine = SimpleNamespace(known=found)
    args = SimpleNamespace(flag=flag, method="bisect", clients=clients, request_rate=None, max_settings=10)
    search = cli._search(args, engine, found.seqs if flag == SEQS else found.tokens)  # type: ignore[arg-type]
    tried = 0
    while (value := search.propose()) is not None:
        name = "max_num_seqs" if flag == SEQS else "max_num_batched_tokens"
        step_limits(replace(config, **{name: value}), device)  # raises for what it refuses
        search.record(value, scores[tried % len(scores)], pressures[tried % len(pressures)])
        tried += 1
    assert 1 <= tried <= 10


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--live", "http://127.0.0.1:9", *LOAD, "--ttft-p95", "1s"]) == 1
    assert "no server at http://127.0.0.1:9" in capsys.readouterr().err
    assert main(["tune", "--live", "nonsense", *LOAD, "--ttft-p95", "1s"]) == 1
