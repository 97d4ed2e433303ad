"""`penstock doctor` over HTTP and on standard input: what it prints, and its exit status for CI."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from penstock.cli.main import main
from tests.tune.test_cli import served

from .pages import vllm


def engine(page: str, *, status: Mapping[str, int] | None = None, key: str | None = None) -> web.Application:
    """A vLLM that is asked."""

    async def answer(request: web.Request) -> web.Response:
        path = request.path
        code = (status or {}).get(path, 200)
        if path == "/metrics":
            return web.Response(text=page, status=code)
        if path == "/v1/models":
            if key is not None and request.headers.get("Authorization") != f"Bearer {key}":
                return web.json_response({"error": "Unauthorized"}, status=401)
            return web.json_response({"data": [{"id": "Qwen/Qwen3-8B", "max_model_len": 4096}]}, status=code)
        if path == "/version":
            return web.json_response({"version": "0.32.0"}, status=code)
        if path == "/server_info":
            config = {"scheduler_config": {"max_num_seqs": 128, "max_num_batched_tokens": 8192}}
            return web.json_response({"vllm_config": config}, status=code)
        return web.Response(status=code if path == "/health" else 404)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    return app


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_an_engine_that_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    with served(engine(vllm(), key="sk")) as url:
        assert main(["doctor", url, "--api-key", "sk", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert main(["doctor", f"{url}/v1/", "--api-key", "sk"]) == 0
    points = {point["id"]: point for point in found["points"]}
    assert (found["engine"], found["version"], found["model"]) == ("vllm", "0.32.0", "Qwen/Qwen3-8B")
    assert points["max-num-seqs"]["value"].startswith("--max-num-seqs 128; the cache of 200,000 tokens")
    assert points["max-model-len"]["value"].startswith("4,096; 99 of 100 requests take")
    out = capsys.readouterr().out
    assert "Memory checklist\n  ok    --gpu-memory-utilization" in out
    assert "Throughput checklist" in out


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with served(engine(vllm(config={"gpu_memory_utilization": "0.5"}))) as url:
        assert main(["doctor", url]) == 0
        assert main(["doctor", url, "--strict"]) == 1
    with served(engine(vllm(waiting=40))) as url:
        assert main(["doctor", url]) == 1
    with served(engine(vllm(), status={"/health": 503})) as url:
        assert main(["doctor", url]) == 1
    assert main(["doctor", "http://127.0.0.1:9"]) == 2
    assert main(["doctor", "nonsense"]) == 2
    assert main(["doctor", "--logs", "/nowhere/at/all"]) == 2
    assert "cannot read --logs /nowhere/at/all: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "page", ["", "\x00\xff", "vllm:num_requests_running{", "vllm:x NaN\n" * 1000, "{}", "# TYPE a b c\n"]
)
def test_a_page_that_is_none_is_said(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    with served(engine(page)) as url:
        assert main(["doctor", url, "--json"]) in (0, 1)
    points = {point["id"]: point for point in json.loads(capsys.readouterr().out)["points"]}
    assert points["health"]["verdict"] == "ok"
    assert points["queue"]["verdict"] == "unknown"


def test_a_server_that_answers_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    async def nonsense(request: web.Request) -> web.Response:
        bodies: dict[str, Any] = {
            "/v1/models": b'{"data": [{"id": "\x1b[31m", "max_model_len": true}]}',
            "/version": b"[" * 100_000,
            "/metrics": b'vllm:cache_config_info{gpu_memory_utilization="\x1b[2J"} 1\n',
        }
        return web.Response(body=bodies.get(request.path, b"{}"))

    app = web.Application()
    app.router.add_get("/{path:.*}", nonsense)
    with served(app) as url:
        main(["doctor", url])
    assert "\x1b" not in capsys.readouterr().out


def test_logs_of_a_file_and_of_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "engine.log"
    file.write_bytes(b"fine\n\x1b[31mCUDA out of memory\n")
    assert main(["doctor", "--logs", str(file), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["log"]["problems"]
    assert (problem["id"], problem["lines"], problem["excerpt"]) == ("cuda-oom", [2], "CUDA out of memory")
    assert problem["fixes"]
    file.write_text("fine\n")
    assert main(["doctor", "--logs", str(file)]) == 0
    assert capsys.readouterr().out == "Log: nothing that is known in 1 lines.\n"
    file.write_bytes(b"")
    assert main(["doctor", "--logs", str(file)]) == 2
    assert "the log is empty" in capsys.readouterr().err
    command = [sys.executable, "-m", "penstock", "doctor"]
    piped = subprocess.run(command, input=b"x\nConnection refused\n", capture_output=True, check=False)
    assert piped.returncode == 0  # a warning
    assert b"Connection refused (line 2)" in piped.stdout
    monkeypatch.setattr(sys, "stdin", _Terminal())
    assert main(["doctor"]) == 2
    assert "give the URL of an engine, or a log" in capsys.readouterr().err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True
