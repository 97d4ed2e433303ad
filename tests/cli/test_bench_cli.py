import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.bench.startup import free_port
from penstock.cli import bench
from tests.bench.fake_server import FakeServer, Reply
from tests.bench.test_startup import SERVER


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer().running() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "160")


def run(*words: str) -> int:
    """As the main program does: a subcommand `bench` under the parser of `penstock`."""
    parser = argparse.ArgumentParser(prog="penstock")
    commands = parser.add_subparsers(required=True)
    bench.add_arguments(commands.add_parser("bench"))
    return bench.run(parser.parse_args(["bench", *words]))


def serve(fake: FakeServer, tmp_path: Path, *words: str) -> dict[str, Any]:
    """Run `bench serve` against the fake server; its JSON, with the exit status as `status`."""
    path = tmp_path / "new folder" / "result.json"
    base = ("--base-url", fake.url, "--num-prompts", "6", "--output-json", str(path))
    status = run("serve", *base, *words)
    return {**json.loads(path.read_text(encoding="utf-8")), "status": status}


def test_a_closed_loop_run(
    server: FakeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.script = [Reply(usage={"prompt_tokens_details": {"cached_tokens": 2}, "device_seconds": 0.5})]
    lengths = ("--random-input-len", "9", "--random-prefix-len", "3", "--random-output-len", "5")
    words = (
        *lengths,
        "--max-concurrency",
        "2",
        "--goodput",
        "ttft:60000",
        "--num-warmups",
        "1",
        "--ignore-eos",
    )
    result = serve(server, tmp_path, *words)
    assert result["status"] == 0
    assert (result["completed"], result["failed"], result["load"]) == (6, 0, "closed loop")
    assert result["max_concurrent_requests"] <= 2
    assert result["total_input_tokens"] == 6 * 12
    assert result["total_output_tokens"] == 6 * 3
    assert (result["total_cached_tokens"], result["total_device_seconds"]) == (12, 3.0)
    assert result["goodput_share"] == 1.0
    assert result["request_rate"] == "inf"
    assert (result["model_id"], result["server_version"]) == ("fake-model", "9.9")
    assert result["configuration"]["num_prompts"] == 6
    assert {"request_throughput", "output_throughput", "total_token_throughput", "duration"} <= set(result)
    assert {"mean_ttft_ms", "median_tpot_ms", "p99_itl_ms", "p90_e2el_ms"} <= set(result)
    assert [row["index"] for row in result["requests"]] == list(range(6))
    assert len(server.requests) == 7
    assert server.requests[1]["prompt"][:3] == server.requests[2]["prompt"][:3]
    assert server.requests[0]["ignore_eos"] is True
    assert server.requests[0]["max_tokens"] == 5
    shown = capsys.readouterr().out
    assert "Time to first token" in shown
    assert "Result written to" in shown


def test_an_open_loop_run_of_chat(
    server: FakeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.tokens_per_word = 2.0
    load = ("--request-rate", "1000", "--burstiness", "0.5", "--random-input-len", "8", "--temperature", "0")
    extra = ("--header", "X-A=1", "--header", "X-B=2=3", "--extra-body", '{"top_k": 5}')
    result = serve(server, tmp_path, "--backend", "openai-chat", *load, *extra, "--api-key", "secret")
    assert (result["status"], result["completed"], result["load"]) == (0, 6, "open loop")
    assert (result["backend"], result["burstiness"]) == ("openai-chat", 0.5)
    assert result["requests"][-1]["intended_time"] == pytest.approx(0.006)
    assert "secret" not in json.dumps(result)
    request = server.requests[0]
    assert len(request["messages"][0]["content"].split()) == 4
    assert (request["temperature"], request["top_k"], request["max_completion_tokens"]) == (0, 5, 128)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert (server.headers[0]["X-A"], server.headers[0]["X-B"]) == ("1", "2=3")
    assert "TTFT from intended time" in capsys.readouterr().out


def test_prompts_from_a_file_and_a_chosen_table(
    server: FakeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = tmp_path / "prompts.jsonl"
    dataset.write_text('{"prompt": "one"}\n{"prompt": "two", "max_tokens": 3}\n', encoding="utf-8")
    words = ("--dataset-name", "jsonl", "--dataset-path", str(dataset), "--max-concurrency", "1")
    table = ("--percentile-metrics", "itl", "--metric-percentiles", "25,99.9")
    result = serve(server, tmp_path, *words, *table, "--result-dir", str(tmp_path / "results"))
    assert [request["prompt"] for request in server.requests] == ["one", "two"] * 3
    assert "p25_itl_ms" in result
    assert "p99.9_ttft_ms" in result
    shown = capsys.readouterr().out
    assert "p99.9" in shown
    assert "Time to first token" not in shown
    (saved,) = (tmp_path / "results").iterdir()
    assert saved.name.startswith("openai-infqps-concurrency1-fake-model-")


def test_some_failures_are_reported_and_all_failures_are_an_error(
    server: FakeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = Reply(status=503, body={"error": {"message": "queue is full"}})
    server.script = [Reply(), full, Reply()]
    result = serve(server, tmp_path, "--max-concurrency", "1")
    assert (result["status"], result["completed"]) == (0, 5)
    assert result["errors"] == [{"cause": "HTTP 503", "count": 1, "example": "queue is full"}]
    assert "1 failed: HTTP 503, for example: queue is full" in capsys.readouterr().out
    server.script = [full]
    assert serve(server, tmp_path)["status"] == 1
    assert "no request was completed" in capsys.readouterr().err


def test_ctrl_c_reports_what_was_measured_so_far(server: FakeServer, tmp_path: Path) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    server.script = [Reply(), Reply(), Reply(hold_at=1)]
    server.on_hold = lambda: os.kill(os.getpid(), signal.SIGINT)
    result = serve(server, tmp_path, "--max-concurrency", "1")
    assert (result["status"], result["ended_by"]) == (130, "interrupt")
    assert [result[key] for key in ("completed", "failed", "unfinished", "not_sent")] == [2, 0, 1, 3]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--endpoint", "/v1/embeddings"), "--endpoint is '/v1/embeddings'"),
        (("--dataset-name", "jsonl"), "jsonl needs a file"),
        (("--dataset-path", "x"), "random takes none"),
        (("--header", "novalue"), "--header 'novalue': write KEY=VALUE"),
        (("--extra-body", "{"), "--extra-body is not JSON"),
        (("--extra-body", "[]"), "must be a JSON object"),
        (("--metric-percentiles", "50,x"), "--metric-percentiles is '50,x'"),
        (("--percentile-metrics", "ttft,speed"), "--percentile-metrics speed: choose from ttft, tpot"),
        (("--goodput", "speed:1"), "--goodput 'speed:1'"),
        (("--backend", "openai-chat", "--prompt-format", "token-ids"), "chat takes text"),
        (("--base-url", "localhost:8000"), "--base-url is 'localhost:8000'"),
        (("--random-range-ratio", "1"), "--random-range-ratio is 1.0"),
        (
            ("--num-warmups", "1", "--model", "nobody"),
            "warm-up request 1 failed: HTTP 404: The model `nobody`",
        ),
    ],
)
def test_a_run_that_cannot_be_made_says_why_in_one_line(
    server: FakeServer,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    complaint: str,
) -> None:
    assert run("serve", "--base-url", server.url, "--num-prompts", "1", *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("penstock bench: ")
    assert complaint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [("--num-prompts", "0"), ("--request-rate", "0"), ("--max-concurrency", "0"), ("--num-warmups", "-1")],
)
def test_a_bad_number_is_refused_by_its_flag(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit):
        run("serve", *words)
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("model", [(), ("--model", "m")])
def test_no_server(capsys: pytest.CaptureFixture[str], model: tuple[str, ...]) -> None:
    port = str(free_port())
    assert run("serve", "--port", port, *model) == 1
    error = capsys.readouterr().err
    assert f"no server at http://127.0.0.1:{port}/" in error
    assert "Connection refused; start one (penstock serve MODEL) or correct --base-url" in error


def test_startup_of_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port, path = str(free_port()), tmp_path / "startup.json"
    options = ("--repeats", "1", "--output-json", str(path), "--base-url", f"http://127.0.0.1:{port}/v1")
    assert run("startup", *options, "--", sys.executable, "-S", "-E", SERVER, port) == 0
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["command"][-1] == port
    assert len(report["runs"]) == 1
    assert "first token" in capsys.readouterr().out


def test_startup_of_a_model_passes_the_other_flags_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fake(bench: Any) -> dict[str, Any]:
        seen.append(bench)
        raise KeyboardInterrupt

    monkeypatch.setattr("penstock.bench.startup.bench_startup", fake)
    status = run("startup", "--timeout", "9", "some/model", "--max-num-seqs", "4", "--repeats", "2", "--no-x")
    assert status == 130
    (started,) = seen
    assert started.command[1:5] == ("-m", "penstock", "serve", "some/model")
    assert started.command[-3:] == ("--max-num-seqs", "4", "--no-x")
    assert (started.repeats, started.timeout) == (2, 9.0)
    assert started.base_url.endswith(started.command[8])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "name a MODEL"),
        (("--",), "name a MODEL"),
        (("--base-url", "http://h:1", "model"), "goes with a COMMAND"),
        (("model", "--port=1"), "leave them out"),
    ],
)
def test_startup_needs_something_to_start(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], complaint: str
) -> None:
    assert run("startup", *words) == 1
    assert complaint in capsys.readouterr().err


def test_the_room_needs_no_engine() -> None:
    """Nothing of the engine is imported, and the flags alone do not even import the HTTP client."""
    code = """
import sys
import penstock.cli.bench, penstock.cli.chat
assert not {"aiohttp", "rich", "msgspec"} & set(sys.modules)
import penstock.bench.serve, penstock.bench.startup
assert not {"torch", "tokenizers", "transformers", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
