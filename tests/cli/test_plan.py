"""`penstock plan`, from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cli.init import example
from penstock.cli.main import main
from penstock.fleet import catalogue

HUB = """
version: 1
pools:
  gpu: {hardware: A100-80GB, count: 4, price_per_hour: 3.43, price_as_of: 2026-11-01, price_source: ours}
models:
  vision: {weights: Qwen/Qwen3-VL-8B-Instruct, pool: gpu, engine: vllm, slo: {ttft_p99: 5s}}
  text: {weights: RedHatAI/Qwen3-32B-quantized.w8a8, pool: gpu, engine: vllm, slo: {ttft_p99: 5s}}
upstreams:
  cloud:
    url: https://api.example.com/v1
    models: {large: {price: {input: 4.0, output: 12.0, as_of: 2026-11-01, source: a list}}}
"""


def test_the_line_of_the_issue(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "plan llama-3.1-8b --gpu A100-80GB --rate 5 --prompt 1000 --output 200 --ttft-p99 500ms".split()
    )
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for part in ("weights", "KV cache", "--max-num-seqs", "TTFT", "an hour", "Recommended", "GiB"):
        assert part in shown


def test_a_bare_model_says_what_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-3.1-8b"]) == 0
    shown = capsys.readouterr().out
    for flag in ("--rate", "--prompt", "--output", "--peak", "--ttft-p99", "--gpu"):
        assert f"({flag}" in shown


def test_a_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "penstock.yaml"
    spec.write_text(HUB)
    assert main(["plan", str(spec), "--rate", "0.2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    vision, text = found["models"]
    assert (vision["name"], text["name"]) == ("vision", "text")
    assert text["devices"]["quantization"] == "int8"
    assert text["workload"]["targets"] == {"ttft_p99": 5.0}
    assert text["price"]["dollars_per_device_hour"] == "3.43"
    assert text["against_cloud"]["cloud"] == "large"
    assert text["against_cloud"]["cloud_dollars_per_thousand_requests"] == "6.4"
    assert found["options"]["recommended"] == "B"


def test_the_spec_of_init_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "penstock.yaml"
    spec.write_text(example())
    assert main(["plan", str(spec)]) == 0
    shown = capsys.readouterr().out
    assert "demo (Qwen3ForCausalLM" in shown
    assert "with Penstock" in shown


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-3.1-8b", "--gpu", "L4", "--html", str(tmp_path / "plan.html")]) == 0
    assert (tmp_path / "plan.html").read_text().endswith("</html>\n")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]
    assert main(["plan", "llama-3.1-8b", "--html", str(tmp_path / "none" / "plan.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["plan", "llama-3-70b", "--gpu", "L4", "--tp", "1", "--html", str(tmp_path / "x.html")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nothing-like-it", "is neither a folder nor in the bundled catalogue"),
        ("qwen3-32", "Did you mean Qwen/Qwen3-32B"),
        ("llama-3.1-8b --gpu RTX", "is not in the catalogue of hardware"),
        ("llama-3.1-8b --quantization magic", "Quantization 'magic' is not known"),
        ("llama-3.1-8b --rate 0", "--rate 0.0 must be a positive number"),
        ("llama-3.1-8b --rate 1e12", "must be a positive number below 1e9"),
        ("llama-3.1-8b --rate nan", "--rate nan must be a positive number"),
        ("llama-3.1-8b --prompt -1", "--prompt -1 must be a positive number"),
        ("llama-3.1-8b --rate 2 --peak 1", "--peak 1 is less than --rate 2"),
        ("llama-3.1-8b --ttft-p99 soon", "--ttft-p99: 'soon' is no duration"),
        ("llama-3.1-8b --ttft-p99 0", "--ttft-p99 is 0; it must be above 0"),
        ("llama-3.1-8b --tp 0", "--tp 0 must be from 1 to 64"),
        ("llama-3.1-8b --price -1", "--price -1 must not be negative"),
        ("llama-3.1-8b --cloud-input 1", "--cloud-input and --cloud-output are given together"),
        ("llama-3.1-8b --gpu-memory-utilization 2", "must be from 0.1 to 1"),
        ("llama-3.1-8b --max-model-len 0", "--max-model-len 0 must be positive"),
        ("llama-3.1-8b --gpu A100 --mig 5g.50gb", "is no MIG profile of A100-80GB"),
        ("llama-3.1-8b --mig 3g.40gb", "--mig needs one --gpu"),
        ("missing.yaml", "missing.yaml"),
        ("", "penstock.yaml: cannot be read"),
    ],
)
def test_bad_input(
    arguments: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *arguments.split()]) == 2
    caught = capsys.readouterr()
    assert message in caught.err
    assert caught.out == ""


def test_a_spec_without_models_or_with_unknown_hardware(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "penstock.yaml"
    spec.write_text("version: 1\n")
    assert main(["plan", str(spec)]) == 2
    assert "nothing under models" in capsys.readouterr().err
    spec.write_text(HUB.replace("A100-80GB", "Z9000"))
    assert main(["plan", str(spec)]) == 2
    assert "'Z9000' is not in the catalogue" in capsys.readouterr().err


def test_flags_ask_what_if_a_spec_that_cannot_be_were_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FP8 of ours on an A100 is refused, as when it is compiled; on an H100, or otherwise, it is not."""
    path = tmp_path / "penstock.yaml"
    path.write_text(
        "pools: {gpu: {hardware: A100-80GB}}\n"
        "models: {m: {weights: Qwen/Qwen3-8B, pool: gpu, quantization: fp8}}"
    )
    assert main(["plan", str(path)]) == 2
    assert "models.m.quantization: fp8 over Qwen/Qwen3-8B" in capsys.readouterr().err
    for flags in (["--gpu", "H100"], ["--quantization", "int8"], ["--engine", "vllm"]):
        assert main(["plan", str(path), *flags]) == 0


def test_configs_that_nobody_has_compared_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """In the catalogue, and in each plan of such a model, by any of its names."""
    assert main(["plan", "--models"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:] if "/" in line[:40]}
    for id, entry in catalogue.models().items():
        assert lines[id].endswith("compared" if entry["checked"] else "written from memory")
    for name, said in (("phi-2", True), ("Qwen/Qwen2.5-32B-Instruct-AWQ", True), ("llama-3.1-8b", False)):
        assert main(["plan", name]) == 0
        assert ("was written from memory" in capsys.readouterr().out) == said


@pytest.mark.parametrize("name", ["--models", "--hardware", "--figures"])
def test_lists(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 10
    assert main(["plan", name, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) > 10


def test_a_model_that_the_hubs_cache_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    folder = tmp_path / "models--somebody--tuned" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(catalogue.models()["Qwen/Qwen3-0.6B"]["config"]))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["plan", "somebody/tuned", "--gpu", "L4"]) == 0
    assert "596M parameters" in capsys.readouterr().out


def test_a_cpu_is_what_flags_say(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "plan qwen3-0.6b --gpu cpu --rate 0.05 --ttft-p99 30s --memory 64GiB --bandwidth 200GB --flops 2e12"
    )
    assert main([*arguments.split(), "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["models"][0]["memory_per_device"]
    assert memory["total"] == 64 << 30


@pytest.mark.parametrize(
    ("command", "without"),
    [
        ("plan llama-3.1-8b", "pydantic yaml msgspec penstock.fleet.documents penstock.fleet.backtest"),
        ("plan penstock.yaml", "penstock.fleet.documents penstock.fleet.backtest"),
        ("compile penstock.yaml -o out", "penstock.check.run penstock.deploy.helm penstock.deploy.machine"),
    ],
)
def test_what_is_not_needed_is_not_imported(tmp_path: Path, command: str, without: str) -> None:
    """Answers in under a second are a matter of imports: none of these, and no validator of a part of a spec
    alone, where the whole tree has one."""
    (tmp_path / "penstock.yaml").write_text(example())
    heavy = [*without.split(), "torch", "numpy", "transformers", "aiohttp", "sqlalchemy", "starlette", "rich"]
    code = (
        f"import sys; from penstock.cli.main import main; assert main({command.split()}) == 0\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)\n"
        "model = sys.modules.get('penstock.spec.model')\n"
        "built = lambda part: getattr(part, '__pydantic_complete__')\n"
        "print(model and [built(model.Spec), built(model.Route)], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    *_, found, built = done.stderr.splitlines()
    assert found == "[]"
    assert built == str([True, False] if "penstock.yaml" in command else None)


def test_no_torch_and_no_network_are_needed() -> None:
    code = (
        "import sys; from penstock.cli.main import main; main(['plan', 'qwen3-32b', '--gpu', 'H200']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'aiohttp', 'sqlalchemy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == 0


def test_an_embedding_has_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """S16: the third kind of model in the documents' hub."""
    assert main("plan bge-m3 --gpu A10G --rate 20 --prompt 400 --json".split()) == 0
    model = json.loads(capsys.readouterr().out)["models"][0]
    assert model["workload"]["output_tokens"] == 0
    assert model["model"]["kv_bytes_per_token"] == 0
    assert model["engine"]["name"] == "vllm"
    assert model["expected"]["e2e_p50"] == model["expected"]["ttft_p50"]
