"""Start, drain, death: the server as a process."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import shutil
import signal
import socket
from pathlib import Path

import openai
import pytest

from penstock import assets
from penstock.cli.main import main
from tests.engine.build import checkpoint

from .server import Server, children, eventually, serving

DEMO = Path(assets.__file__).parent / "demo"

LONG = {"prompt": "A Pod is", "max_tokens": 1500, "temperature": 0, "stream": True, "ignore_eos": True}
SMALL = ("--kv-cache-memory-bytes", "16MiB", "--dtype", "float32")


def open_stream(
    server: Server, **fields: object
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A long streamed request whose first chunk has arrived."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps({**LONG, **fields}), {"Content-Type": "application/json"}
    )
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.readline().startswith(b"data: ")
    return connection, answer


def test_a_disconnect_in_mid_stream_frees_the_blocks(tmp_path: Path) -> None:
    with serving(*SMALL, log=tmp_path / "log") as server:
        connection, answer = open_stream(server)
        assert server.metric("vllm:num_requests_running") == 1
        assert server.metric("vllm:kv_cache_usage_perc") > 0
        answer.close()
        connection.close()
        eventually(lambda: server.metric("vllm:num_requests_running") == 0)
        assert server.metric("vllm:kv_cache_usage_perc") == 0
        eventually(lambda: json.loads(server.get("/load")[1])["server_load"] == 0)
        page = server.metrics()
        bills = page.total("penstock:request_device_seconds_sum")
        assert bills == pytest.approx(page.total("penstock:device_seconds_total", state="busy"), rel=1e-3)
        assert page.total("vllm:request_success_total", finished_reason="abort") == 1


def test_sigterm_drains(tmp_path: Path) -> None:
    # on a busy machine, 30 s are too few for the stream; /livez is not about the engine that stands still
    patience = ("--shutdown-timeout", "120", "--liveness-grace", "60")
    with serving(*SMALL, *patience, log=tmp_path / "log") as server:
        assert server.get("/readyz")[0] == 200
        connection, answer = open_stream(server, max_tokens=200)
        with server.held():
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: server.get("/readyz")[0] == 503)
            assert server.get("/livez")[0] == 200
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
                with pytest.raises(openai.InternalServerError) as caught:
                    client.completions.create(model="demo", prompt="x")
                assert caught.value.status_code == 503
                assert caught.value.body["reason"] == "draining"  # type: ignore[index]
        rest = answer.read()
        assert b'"finish_reason":"length"' in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        connection.close()
        assert server.exit_status() == 0


def test_a_recorded_run_replays_to_identical_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The golden log: a real model and real clients, with preemptions, prefix hits, siblings and an abort."""
    record = tmp_path / "steps.jsonl"
    tight = ("--dtype", "float32", "--kv-cache-memory-bytes", "450k", "--max-model-len", "200")
    with serving(*tight, "--record-steps", str(record), log=tmp_path / "log") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:

            def ask(number: int) -> str:
                prompt = "A shared beginning of some length. " * (1 + number % 4)
                made = client.completions.create(
                    model="demo", prompt=prompt, max_tokens=60, n=1 + number % 2, temperature=1, stop="Pods."
                )
                return made.choices[0].text

            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                assert all(isinstance(text, str) for text in pool.map(ask, range(16)))
        connection, answer = open_stream(server, max_tokens=150)
        answer.close()
        connection.close()
        eventually(lambda: server.metric("vllm:num_requests_running") == 0)
        assert server.metric("vllm:num_preemptions_total") > 0
        assert server.metric("vllm:prefix_cache_hits_total") > 0
    assert main(["replay", str(record)]) == 0
    assert "all identical" in capsys.readouterr().out


def test_a_second_sigterm_aborts(tmp_path: Path) -> None:
    with serving(*SMALL, "--max-num-batched-tokens", "16", log=tmp_path / "log") as server:
        connection, _ = open_stream(server)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.process.poll() is not None or server.get("/readyz")[0] == 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_status() == 1
        connection.close()


def test_a_dead_engine_is_a_503_with_its_cause_and_the_end_of_the_server(tmp_path: Path) -> None:
    with serving(*SMALL, log=tmp_path / "log") as server:
        connection, answer = open_stream(server)
        os.kill(server.engine_pid(), signal.SIGKILL)
        rest = answer.read().decode()
        assert "SIGKILL" in rest
        connection.close()
        status, body = server.get("/health")
        assert status == 503
        assert "SIGKILL" in body
        assert server.exit_status() == 1


def test_a_stuck_engine_fails_livez_but_not_health(tmp_path: Path) -> None:
    with serving(*SMALL, "--liveness-grace", "0.3", log=tmp_path / "log") as server:
        connection, _ = open_stream(server)
        engine = server.engine_pid()
        os.kill(engine, signal.SIGSTOP)
        try:
            eventually(lambda: server.get("/livez")[0] == 503)
            assert "requests wait" in server.get("/livez")[1]
        finally:
            os.kill(engine, signal.SIGCONT)
        eventually(lambda: server.get("/livez")[0] == 200)
        connection.close()


def refused(tmp_path: Path, *flags: str) -> str:
    """What a server that does not start prints; its exit status is 2."""
    server = Server(*flags, log=tmp_path / "log")
    try:
        assert server.exit_status(90) == 2, server.log
        return server.log
    finally:
        server.close()


def test_sigterm_while_loading_ends_the_start(tmp_path: Path) -> None:
    server = Server(*SMALL, log=tmp_path / "log")
    try:
        eventually(lambda: children(server.process.pid))
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_status() == 128 + signal.SIGTERM
        assert "Traceback" not in server.log
    finally:
        server.close()


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        log = refused(tmp_path, "--port", port)
    assert f"Port {port} is in use" in log
    assert "--port" in log
    assert "Traceback" not in log


def test_models_that_cannot_be_served(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint(), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copy(DEMO / "tokenizer.json", broken)  # what has none is refused for that, sooner
    log = refused(tmp_path, str(broken))
    assert log.count(str(weights)) == 1
    assert "Traceback" not in log
    log = refused(tmp_path, str(tmp_path / "nothing here"))
    assert log.count("does not exist") == 1


def test_a_context_that_does_not_fit_names_the_flag_that_would(tmp_path: Path) -> None:
    log = refused(tmp_path, "--kv-cache-memory-bytes", "100k", "--max-model-len", "2048")
    assert log.count("one request, but") == 1
    assert "--max-model-len" in log
    assert "Traceback" not in log


def test_whether_keys_are_required_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k,1")
    with serving(*SMALL, log=tmp_path / "log") as server:
        assert "an API key is required" in server.log
        assert server.get("/v1/models")[0] == 401
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k,1", max_retries=0) as client:
            assert client.models.list().data


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(DEMO, bare)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    for file in bare.glob("chat_template*"):
        file.unlink()
    with serving(str(bare), *SMALL, log=tmp_path / "log") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match="chat template"):
                client.chat.completions.create(model=str(bare), messages=[{"role": "user", "content": "hi"}])
            assert client.completions.create(model=str(bare), prompt="A Pod").choices[0].text
        assert "no chat template" in server.log
