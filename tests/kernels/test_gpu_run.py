"""The script for GPUs, on a CPU: it runs whole, and says what it is for."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoint import SHAPES
from benchmarks.gpu.run import main, measure, prefill_flops, prompt_of

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.run", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)


def test_the_whole_script_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    said = run("--device", "cpu", "--shape", "tiny", "--no-startup", "--no-peers", "--out", str(out))
    assert said.returncode == 0, said.stderr
    result = json.loads(out.read_text())
    assert result["machine"]["torch"] == torch.__version__
    assert all(row["ok"] for row in result["correctness"])
    entries = {row["entry"].split(" ")[0].rstrip(",") for row in result["correctness"]}
    assert entries >= {"rms_norm", "attention", "linear", "sampled", "logprobs", "silu", "norm"}
    (made,) = result["engine"]
    assert [row["batch"] for row in made["decode"]] == [1, 8]
    for row in made["decode"]:
        assert row["tokens_per_second"] > 0
        assert 0 <= row["host_ms"] <= row["step_ms"] + row["device_ms"]
        assert row["bandwidth_share"] > 0
        assert row["host_busy_ms"] > 0, "a processor that computes when it is called never waits"
    assert made["prefill"][0]["flop_share"] > 0
    assert result["left_out"] == []
    assert "share of the copy rate" in said.stdout


def test_what_does_not_fit_into_the_time_is_named() -> None:
    said: list[str] = []
    asked = argparse.Namespace(device="cpu", shape=["tiny"], seconds=0.0, no_startup=False, no_peers=False)
    left_out = measure(asked, said.append)["left_out"]
    assert {"products with quantised weights", "tiny none", "start-up", "transformers"} == set(left_out)
    assert said[-1].startswith("no time for: products")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().out
    assert "No GPU here" in said
    assert "--device cpu --shape tiny" in said


def test_prompts_share_nothing() -> None:
    first, second = (prompt_of(64, number, 8192).token_ids for number in (0, 1))
    assert not set(itertools.pairwise(first)) & set(itertools.pairwise(second))
    assert all(16 <= token < 8192 for token in first + second)


def test_flops_of_a_prompt() -> None:
    """2 per parameter and token, attention and one row of logits: Qwen3 8B has 6.9 billion in its layers."""
    flops = prefill_flops(SHAPES["qwen3-8b"], 4096)
    linear = 2 * 4096 * 6.946e9
    attention = 2 * 36 * 4096 * 4096 * 4096
    assert flops == pytest.approx(linear + attention + 2 * 151936 * 4096, rel=0.001)
