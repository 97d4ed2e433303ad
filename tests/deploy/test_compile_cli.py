"""`penstock compile`, as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cli.init import example
from penstock.cli.main import main

FORMATS = ["plain", "kustomize", "helm", "compose", "systemd"]


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "penstock.yaml"
    path.write_text(example())
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_what_init_writes_compiles_unchanged(
    spec: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = spec.parent / "out"
    assert main(["compile", str(spec), "-o", str(out), "--format", format]) == 0
    assert (out / "README.md").is_file()
    assert "files are new or changed" in capsys.readouterr().out
    assert main(["compile", str(spec), "-o", str(out), "--format", format]) == 0
    assert "nothing has changed" in capsys.readouterr().out


def test_another_format_in_the_same_folder_takes_the_place_of_the_first(spec: Path) -> None:
    out = spec.parent / "out"
    assert main(["compile", str(spec), "-o", str(out)]) == 0
    assert main(["compile", str(spec), "-o", str(out), "--format", "helm"]) == 0
    assert not (out / "20-engines.yaml").exists()
    assert (out / "templates" / "20-engines.yaml").is_file()


def test_what_cannot_be_compiled_writes_nothing(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec.write_text(
        "pools: {a: {hardware: A100-80GB, mig: 3g.21gb}}\n"
        "models: {m: {weights: Qwen/Qwen3-8B, engine: vllm, pool: a}}"
    )
    out = spec.parent / "out"
    assert main(["compile", str(spec), "-o", str(out)]) == 2
    assert "pools.a.mig" in capsys.readouterr().err
    assert not out.exists()
    assert sorted(path.name for path in spec.parent.iterdir()) == ["penstock.yaml"]


def test_files_of_somebody_else_are_not_touched(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = spec.parent / "out"
    out.mkdir()
    (out / "20-engines.yaml").write_text("mine")
    assert main(["compile", str(spec), "-o", str(out)]) == 2
    assert "20-engines.yaml" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["20-engines.yaml"]


def test_a_spec_that_is_none_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(tmp_path / "none.yaml"), "-o", str(tmp_path / "out")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_what_is_assumed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "penstock.yaml"
    path.write_text(
        "pools: {a: {hardware: A100-80GB}}\nmodels: {m: {weights: Qwen/Qwen3-8B, engine: vllm, pool: a}}"
    )
    assert main(["compile", str(path), "-o", str(tmp_path / "out")]) == 0
    assert "assumed: models.m: --max-model-len 2048" in capsys.readouterr().err


FLAGS = """
pools: {a: {hardware: A100-80GB}}
models: {m: {weights: Qwen/Qwen3-8B, engine: %s, pool: a, flags: {%s}%s}}
"""


@pytest.mark.parametrize(
    ("engine", "flag", "said"),
    [
        ("vllm", "gpu-memory-utilisation: 0.9", "Write --gpu-memory-utilization"),
        ("vllm", "num-scheduler-steps: 8", "has no --num-scheduler-steps"),
        ("vllm", "made-up-flag: true", "has no --made-up-flag"),
        ("vllm", "max-num-seqs: -4", "max-num-seqs is -4: it must be a positive integer"),
        ("vllm", "max-num-batched-tokens: 1", "is less than --max-num-seqs"),
        ("penstock", "made-up-flag: 1", "penstock serve has no --made-up-flag"),
    ],
)
def test_a_flag_with_which_the_engine_would_end_is_refused(
    spec: Path, engine: str, flag: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec.write_text(FLAGS % (engine, flag, ""))
    assert main(["compile", str(spec), "-o", str(spec.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert "models.m.flags" in error
    assert said in error
    assert not (spec.parent / "out").exists()


def test_flags_of_a_version_without_a_table_are_told(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec.write_text(FLAGS % ("vllm", "made-up-flag: true", ", image: 'vllm/vllm-openai:v0.99.0'"))
    assert main(["compile", str(spec), "-o", str(spec.parent / "out")]) == 0
    assert "Whether vllm/vllm-openai:v0.99.0 has it is not known" in capsys.readouterr().err


def test_a_model_that_is_taken_out_leaves_nothing_behind_unsaid(
    spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its Deployment keeps its GPUs until somebody deletes it, and a claim cannot be made smaller."""
    two = """
pools: {a: {hardware: A100-80GB, count: 4}}
models:
  one: {weights: Qwen/Qwen3-8B, engine: vllm, pool: a}
  two: {weights: Qwen/Qwen3-32B, engine: vllm, pool: a}
"""
    out = spec.parent / "out"

    def compiled(text: str, *flags: str) -> str:
        spec.write_text(text)
        assert main(["compile", str(spec), "-o", str(out), *flags]) == 0
        return capsys.readouterr().out

    def claim() -> str:
        text = (out / "10-weights.yaml").read_text()
        return text.partition("storage:")[2].split()[0]

    assert "kubectl" not in compiled(two)
    size = claim()
    said = compiled(two[: two.index("  two")])
    assert "kubectl -n llm-serving delete --ignore-not-found" in said
    assert "deployment/two" in said
    assert "service/two" in said
    assert "/one" not in said
    assert claim() == size
    compiled(two[: two.index("  two")])
    assert claim() == size, "the next time, too"
