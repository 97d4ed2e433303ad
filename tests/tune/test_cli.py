"""`penstock tune` on a server of somebody else's: measured, advised, and left as it is."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from penstock.cli.main import main
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


@contextmanager
def served(app: web.Application) -> Iterator[str]:
    """The application on a free port, in a thread; its URL."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    ready = threading.Event()
    urls: list[str] = []

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ready.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait()
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.fixture(autouse=True)
def _nobody_elses_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_it_is_measured_and_nothing_is_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    with served(application(64)) as url:
        arguments = ["tune", "--live", url, *LOAD, "--tpot-p95", "4ms", "--output-json", str(file)]
        status = main(arguments)
    out = capsys.readouterr().out
    assert status == 0, out
    assert "nothing of it is changed" in out
    assert "Nothing was changed" in out
    result = json.loads(file.read_text())
    assert result["restarts"] is False
    assert result["steps"][0]["value"] == 8
    assert result["slo_ms"] == {"tpot": 4.0}
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
    with served(app) as url:
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
        (
            ["--ttft-p95", "1s", "--model", "other", "--dataset-path", "/nowhere"],
            "cannot read --dataset-path",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(application(4)) as url:
        assert main(["tune", "--live", url, *LOAD, *arguments]) == 1
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--live", "http://127.0.0.1:9", *LOAD, "--ttft-p95", "1s"]) == 1
    assert "no server at http://127.0.0.1:9" in capsys.readouterr().err
    assert main(["tune", "--live", "nonsense", *LOAD, "--ttft-p95", "1s"]) == 1
