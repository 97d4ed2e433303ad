"""`penstock up` as a process: what it prints, what it starts, and that nothing stays behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.cli.init import example
from penstock.cli.main import main
from tests.gateway.local.processes import alive, eventually, kill
from tests.own_logging import kept_logging

from .up import Up, running, scripted_vllm

REAL = """
pools: {here: {price_per_hour: 3.6}}
models: {demo: {weights: demo, pool: here, memory: 16MiB, flags: {dtype: float32}}}
gateway: {port: 0}
"""
FAKE = """
pools: {here: {}}
models: {fake: {weights: demo, pool: here, engine: vllm, memory: 16MiB%s}}
gateway: {port: 0}
"""
ASK = {"model": "fake", "prompt": "?", "max_tokens": 5}


def rows(up: Up) -> list[dict[str, object]]:
    """The ledger."""
    with sqlite3.connect(up.folder / "penstock.db") as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("select * from ledger order by at")]


def starts(up: Up) -> list[int]:
    """Process ids of the scripted engine's starts."""
    file = up.folder / "engine" / "starts"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


@pytest.mark.slow
def test_a_governed_door_on_the_demo_model(tmp_path: Path) -> None:
    with running(tmp_path, REAL) as up:
        ask = {"model": "demo", "messages": [{"role": "user", "content": "What is a Pod?"}], "max_tokens": 8}
        status, answer = up.post("/v1/chat/completions", ask)  # waits until the engine is there
        assert status == 200, answer
        deadline = time.monotonic() + 1.0
        while not rows(up) and time.monotonic() < deadline:
            time.sleep(0.01)
        (row,) = rows(up)
        assert (row["route"], row["upstream"], row["status"]) == ("demo", "demo", 200)
        assert (row["output_tokens"], row["settlement"]) == (8, "settled")
        assert row["dollars"] == pytest.approx(row["device_seconds"] / 1000, abs=1)  # 3.60 an hour
        assert up.post("/v1/chat/completions", ask, key="sk-ps-wrong")[0] == 401

        (server,) = [
            pid for pid in up.descendants() if b"\0serve\0" in command(pid) and b"keeper" not in command(pid)
        ]
        kill(server)
        eventually(lambda: not alive(server))
        assert up.post("/v1/chat/completions", ask)[0] == 200  # by the next one
        assert "demo/0 has ended: signal 9" in up.err
        everybody = up.descendants()
        assert up.stop() == 0
        assert not any(map(alive, everybody))


@pytest.mark.slow
def test_nothing_is_left_of_real_engines_when_up_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, REAL) as up:
        eventually(lambda: "demo/0 is ready" in up.err or up.process.poll() is not None, 90)
        everybody = up.descendants()
        assert len(everybody) >= 3  # keeper, server, engine
        up.process.kill()
        up.process.wait(10)
        eventually(lambda: not any(map(alive, everybody)))


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_vllm_of_ones_own(tmp_path: Path) -> None:
    with running(tmp_path, FAKE % "", PATH=scripted_vllm(tmp_path)) as up:
        assert up.post("/v1/completions", ASK)[1]["usage"]["total_tokens"] == 4  # type: ignore[index]
        assert up.url in up.out
        assert up.out.count("sk-ps-") == 1
        assert up.key not in up.err
        assert "[fake/0] listening on " in up.err
        assert "Memory (cpu), all models together" in up.err
        assert up.stop() == 0
        assert "[fake/0] drained" in up.err


def test_the_first_key_is_shown_once_and_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scripted_vllm(tmp_path)
    with running(tmp_path, FAKE % "", PATH=path) as up:
        first = up.key
        assert up.stop() == 0
    (tmp_path / "up.out").unlink()
    with running(tmp_path, PATH=path) as up:
        assert up.post("/v1/completions", ASK, key=first)[0] == 200
        assert "sk-ps-" not in up.out
        monkeypatch.chdir(tmp_path)
        assert main(["keys", "create", "second"]) == 0
        (second,) = re.findall(r"sk-ps-\S+", capsys.readouterr().out)
        assert up.post("/v1/completions", ASK, key=second)[0] == 200
        eventually(lambda: len(rows(up)) == 2)
        assert [row["key_name"] for row in rows(up)] == ["first", "second"]


def test_nothing_is_left_when_up_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, FAKE % "", PATH=scripted_vllm(tmp_path, orphan="")) as up:
        assert up.post("/v1/completions", ASK)[0] == 200
        everybody = [*up.descendants(), int((tmp_path / "engine" / "orphan").read_text())]
        up.process.kill()
        up.process.wait(10)
        eventually(lambda: not any(map(alive, everybody)))


def test_a_lazy_model_comes_with_a_request_and_goes(tmp_path: Path) -> None:
    spec = FAKE % ", start: lazy, keep_alive: 200ms"
    with running(tmp_path, spec, PATH=scripted_vllm(tmp_path)) as up:
        assert up.url
        assert not starts(up)
        assert up.post("/v1/completions", ASK)[0] == 200
        eventually(lambda: not alive(starts(up)[0]))
        assert "no request for 0.2 s; it leaves memory" in up.err
        assert up.post("/v1/completions", ASK)[0] == 200
        assert len(starts(up)) == 2


def test_an_engine_that_dies_at_a_request_is_there_for_the_next(tmp_path: Path) -> None:
    with running(tmp_path, FAKE % "", PATH=scripted_vllm(tmp_path)) as up:
        assert up.post("/v1/completions", ASK)[0] == 200
        kill(starts(up)[0])
        assert up.post("/v1/completions", ASK)[0] == 200
        assert len(starts(up)) == 2
        with urllib.request.urlopen(f"{up.url}/metrics", timeout=30) as answer:
            page = answer.read().decode()
        assert 'penstock:gateway_engine_restarts_total{replica="fake/0"} 1.0' in page
        assert 'penstock:gateway_engine_ready{replica="fake/0"} 1.0' in page


def test_a_second_signal_kills_engines_that_do_not_end(tmp_path: Path) -> None:
    with running(tmp_path, FAKE % "", PATH=scripted_vllm(tmp_path, deaf="")) as up:
        assert up.post("/v1/completions", ASK)[0] == 200
        up.process.send_signal(signal.SIGTERM)
        eventually(lambda: "Draining" in up.err)
        assert alive(starts(up)[0])
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(30) == 1
        assert not alive(starts(up)[0])


def test_a_model_that_cannot_work_ends_up(tmp_path: Path) -> None:
    path = scripted_vllm(tmp_path, refuse="vllm: error: unknown architecture")
    told = "penstock up: fake/0 cannot be served: status 2, after saying: vllm: error: unknown architecture"
    with running(tmp_path, FAKE % "", PATH=path) as up:
        assert up.process.wait(60) == 2
        assert up.err.splitlines()[-1].endswith(told)
    with running(tmp_path, several(FAKE % ""), PATH=path) as up:
        assert up.process.wait(60) == 2
        assert up.err.count(told) == 2  # of both
        assert not traces(up)


def several(spec: str) -> str:
    """With two processes of the gateway."""
    return spec.replace("port: 0", "port: 0, workers: 2")


def test_several_workers_share_the_engines(tmp_path: Path) -> None:
    spec = several(FAKE % ", start: lazy, keep_alive: 200ms")
    with running(tmp_path, spec, PATH=scripted_vllm(tmp_path)) as up:
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(lambda _: up.post("/v1/completions", ASK)[0], range(16)))
        assert answers == [200] * 16  # all of them have waited for one start
        assert len(starts(up)) == 1
        assert up.out.count("sk-ps-") == 1
        eventually(lambda: not alive(starts(up)[0]))
        assert "no request for 0.2 s; it leaves memory" in up.err
        assert up.post("/v1/completions", ASK)[0] == 200
        assert len(starts(up)) == 2
        eventually(lambda: len(rows(up)) == 17)
        assert len(children(up.process.pid)) == 3
        assert up.stop() == 0
        assert not traces(up)


def traces(up: Up) -> list[str]:
    """Of processes of ours; the scripted engine has its own."""
    return [line for line in up.err.splitlines() if "Traceback" in line and "[fake/0]" not in line]


def test_a_worker_that_dies_is_replaced_and_engines_stay(tmp_path: Path) -> None:
    with running(tmp_path, several(FAKE % ""), PATH=scripted_vllm(tmp_path)) as up:
        assert up.post("/v1/completions", ASK)[0] == 200
        engines, *workers = children(up.process.pid)
        kill(workers[0])
        eventually(lambda: len(set(children(up.process.pid)) - {engines, *workers}) == 1)
        for _ in range(8):
            assert up.post("/v1/completions", ASK)[0] == 200
        assert len(starts(up)) == 1
        kill(starts(up)[0])  # an engine that dies is started again for all
        assert up.post("/v1/completions", ASK)[0] == 200
        kill(engines)
        assert up.process.wait(60) == 1
        assert "the process that has the engines has ended with -9" in up.err


@pytest.mark.parametrize("hurried", [False, True])
def test_nothing_is_left_of_several_when_up_is_killed_or_hurried(tmp_path: Path, hurried: bool) -> None:
    with running(tmp_path, several(FAKE % ""), PATH=scripted_vllm(tmp_path, deaf="")) as up:
        assert up.post("/v1/completions", ASK)[0] == 200
        everybody = up.descendants()
        if hurried:
            up.process.send_signal(signal.SIGTERM)
            eventually(lambda: len(children(up.process.pid)) == 1)  # the engine does not listen
            up.process.send_signal(signal.SIGTERM)
        else:
            up.process.kill()
        up.process.wait(30)
        eventually(lambda: not any(map(alive, everybody)))


def children(pid: int) -> list[int]:
    """In the order of their starts."""
    return sorted(int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        spec = (FAKE % "").replace("port: 0", f"port: {port}")
        with running(tmp_path, spec, PATH=scripted_vllm(tmp_path)) as up:
            assert up.process.wait(60) == 2
            assert f"Port {port} is in use" in up.err
            assert not starts(up)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            None,
            "penstock.yaml: cannot be read: No such file or directory. `penstock init` writes an example.",
        ),
        ("upstreams: {}", "there is nothing under models: that could be started here"),
        ("models: {m: {weights: demo, pool: her}}", "penstock.yaml:1: models.m.pool: there is no pool her"),
        (
            "pools: {here: {}}\nmodels: {m: {weights: demo, pool: here, memory: 9MiB}}\n"
            "ledger: {url: 'sqlite:////nonexistent/x.db'}",
            "The ledger's URL cannot be used: there is no folder /nonexistent.",
        ),
        (FAKE % "", "engine: vllm needs the command vllm, which is not on PATH"),
    ],
)
def test_what_is_wrong_is_one_clear_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spec: str | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    if spec is not None:
        Path("penstock.yaml").write_text(spec)
    with kept_logging():
        assert main(["up"]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ([] if spec is None else ["penstock.yaml"])  # nothing half-started


def test_the_example_is_what_up_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without starting it: test_a_governed_door_on_the_demo_model does."""
    from penstock.cli.local_models import plan
    from penstock.spec import loads

    assert list(plan(loads(example()), "key").parts) == ["demo"]
