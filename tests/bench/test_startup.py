import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from penstock.bench.errors import BenchError
from penstock.bench.startup import (
    PHASES,
    StartupBench,
    StartupTimes,
    bench_startup,
    free_port,
    print_startup,
    serve_command,
)
from tests.bench.fake_server import FakeServer

SERVER = str(Path(__file__).with_name("startup_server.py"))


def bench(mode: str = "ok", **options: object) -> StartupBench:
    port = free_port()
    # -S and -E: this server needs nothing but the standard library, and starts faster.
    command = (sys.executable, "-S", "-E", SERVER, str(port), mode)
    return StartupBench(command, f"http://127.0.0.1:{port}", **options)  # type: ignore[arg-type]


def test_every_repeat_is_timed_in_order() -> None:
    seen: list[StartupTimes] = []
    report = bench_startup(bench(repeats=2), seen.append)
    assert len(seen) == report["repeats"] == len(report["runs"]) == 2
    for run in report["runs"]:
        assert 0 < run["port_open_s"] <= run["healthy_s"] <= run["first_token_s"]
    for phase in PHASES:
        low, mean, high = (report[f"{kind}_{phase}"] for kind in ("min", "mean", "max"))
        assert low <= report[f"median_{phase}"] <= high
        assert low <= mean <= high
    json.dumps(report, allow_nan=False)
    out = io.StringIO()
    print_startup(report, Console(file=out))
    assert f"{report['median_first_token_s']:.3f}" in out.getvalue()


def test_a_server_that_ends_is_reported_with_its_last_words() -> None:
    with pytest.raises(BenchError, match=r"ended with status 3 .*(?s:.)*out of memory"):
        bench_startup(bench("dies", repeats=1))


def test_a_server_that_never_listens_is_given_up() -> None:
    port = free_port()
    command = (sys.executable, "-c", "import signal; signal.pause()")
    waiting = StartupBench(command, f"http://127.0.0.1:{port}", repeats=1, timeout=0.01)
    with pytest.raises(
        BenchError, match=r"took longer than 0.01 s to listen \(--timeout\); it printed nothing"
    ):
        bench_startup(waiting)


def test_a_first_request_that_fails_is_an_error() -> None:
    with pytest.raises(BenchError, match=r"first request failed: HTTP 500: no weights"):
        bench_startup(bench("refuses", repeats=1))


def test_a_server_that_ignores_sigterm_is_killed() -> None:
    report = bench_startup(bench("deaf", repeats=1, stop_timeout=0.01))
    assert len(report["runs"]) == 1


def test_a_port_in_use_is_refused(server: FakeServer) -> None:
    with pytest.raises(BenchError, match="something already listens"):
        bench_startup(StartupBench((sys.executable, "-c", ""), server.url))


def test_a_command_that_does_not_exist_is_named() -> None:
    with pytest.raises(BenchError, match="cannot run '/nowhere/server'"):
        bench_startup(StartupBench(("/nowhere/server",), f"http://127.0.0.1:{free_port()}"))


def test_repeats_must_be_positive() -> None:
    with pytest.raises(BenchError, match="--repeats is 0"):
        bench_startup(bench(repeats=0))


def test_the_command_line_of_serve() -> None:
    command = serve_command("some/model", ["--max-num-seqs", "4"], 1234)
    assert command[0] == sys.executable
    assert " ".join(command[1:]) == (
        "-m penstock serve some/model --host 127.0.0.1 --port 1234 --max-num-seqs 4"
    )
