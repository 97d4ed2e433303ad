"""`penstock tune` against a real `penstock up`, whose engine's speed is a known function of max-num-seqs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.up import Up, running
from tests.gateway.local.processes import alive, eventually

ENGINE = Path(__file__).with_name("engine.py")
SPEC = """
pools: {here: {}}
models:
  fake: {weights: demo, pool: here, engine: vllm, memory: 16MiB, flags: {max-num-seqs: 64}%s}
gateway: {port: 0}
"""
LOAD = ("--clients", "24", "--duration", "700ms", "--input-len", "4", "--output-len", "8")


@contextmanager
def up(folder: Path, more: str = "") -> Iterator[Up]:
    """`penstock up` in front of the engine, once that is ready."""
    tool = folder / "vllm"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} {ENGINE} "$@"\n')
    tool.chmod(0o755)
    (folder / "run").mkdir(mode=0o700, exist_ok=True)
    with running(
        folder,
        SPEC % more,
        PATH=f"{folder}:{os.environ['PATH']}",
        FAKE_ENGINE_FOLDER=str(folder),
        XDG_RUNTIME_DIR=str(folder / "run"),
    ) as made:
        eventually(lambda: "fake/0 is ready" in made.err, 60)
        yield made


def tune(made: Up, *arguments: str, key: str | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "penstock", "tune", "--live", made.url, *LOAD, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OPENAI_API_KEY": made.key if key is None else key,
            "XDG_RUNTIME_DIR": str(made.folder / "run"),
        },
    )


def settings(made: Up) -> list[int]:
    """max-num-seqs of each start of the engine."""
    return [int(line) for line in (made.folder / "starts").read_text().split()]


def told(process: subprocess.Popen[str]) -> tuple[int, Any, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, json.loads(out) if out.startswith("{") else out, err


def test_it_finds_what_keeps_the_target_and_restores_the_engine(tmp_path: Path) -> None:
    with up(tmp_path) as made:
        # a token takes 1 + n/2 ms with n at work: 7 ms are kept up to 12, and 24 clients make it 13
        status, result, err = told(tune(made, "--tpot-p95", "7ms", "--json", "--repeats", "2"))
        assert status == 0, err
        assert (result["before"], result["change"]) == (64, True)
        assert 4 <= result["flags"]["max-num-seqs"] <= 13
        assert len(result["steps"]) <= 10
        first = result["steps"][0]
        assert (first["value"], first["pressure"]) == (64, "computing")
        assert settings(made)[-1] == 64  # as it was
        assert made.post("/v1/models", {})[0] == 405  # the gateway is well
        assert "key" not in result


def test_kept_flags_stay_and_a_refused_setting_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "refuse-above").write_text("64")
    with up(tmp_path, ", slo: {itl_p95: 7ms}") as made:  # the target is the spec's
        status, result, err = told(tune(made, "--json", "--repeats", "1", "--keep", "--max-settings", "3"))
        assert status == 0, err
        assert result["slo_ms"] == {"tpot": 7.0}
        assert result["kept"] is True
        assert settings(made)[-1] == result["flags"]["max-num-seqs"] < 64
        assert "goes on with --max-num-seqs" in made.err


def test_stepwise_is_the_guides_loop(tmp_path: Path) -> None:
    with up(tmp_path) as made:
        status, text, err = told(tune(made, "--method", "stepwise", "--e2e-p95", "1ms"))
        assert status == 1, err  # 64, 32, and then none: what 20 clients see is the same engine
        assert settings(made) == [64, 32, 64]
        assert "no step of this loop meets the targets" in text


def test_ctrl_c_and_kill_leave_the_engine_as_the_spec_has_it(tmp_path: Path) -> None:
    with up(tmp_path) as made:
        for number in (signal.SIGINT, signal.SIGKILL):
            before = len(settings(made))
            process = tune(made, "--tpot-p95", "7ms")
            eventually(lambda: len(settings(made)) > before)  # noqa: B023
            process.send_signal(number)
            assert process.wait(30) == (130 if number is signal.SIGINT else -9)
            process.communicate()
            eventually(lambda: settings(made)[-1] == 64)
            eventually(lambda: "the spec's flags again" in made.err)
        eventually(lambda: made.err.count("fake/0 is ready") == len(settings(made)))
        assert all(map(alive, made.descendants()))


def test_two_do_not_tune_one_engine(tmp_path: Path) -> None:
    with up(tmp_path) as made:
        first = tune(made, "--tpot-p95", "7ms", "--duration", "30s")
        eventually(lambda: "penstock tune measures it" in made.err)
        status, _, err = told(tune(made, "--tpot-p95", "7ms"))
        assert status == 2
        assert "Somebody tunes fake/0 already" in err
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 130
        first.communicate()
