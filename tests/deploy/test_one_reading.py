"""`penstock plan penstock.yaml` and `penstock compile penstock.yaml` read a spec alike: what one plans, the
other writes down."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from penstock.cli.main import main
from penstock.core.errors import StartupError
from penstock.deploy.resolve import resolve
from penstock.fleet.asked import of_spec
from penstock.fleet.plan import plan
from penstock.fleet.record import record
from penstock.spec import loads

from .matrix import SPECS

GPUS = "pools: {gpu: {hardware: A100-80GB, count: 64}}"


def compiled(text: str) -> dict[str, dict[str, Any]]:
    """Model → flags and replicas of its floor."""
    found = {}
    for workload in resolve(loads(text)).workloads:
        if workload.tier != "burst":
            said = {flag.name: flag.values[0] for flag in workload.flags if len(flag.values) == 1}
            found[workload.model_name] = {**said, "replicas": str(workload.replicas)}
    return found


def same(model: dict[str, Any], written: dict[str, str]) -> None:
    """Every flag of a plan is the one that is written."""
    assert written["replicas"] == str(model["devices"]["replicas"])
    for flag, value in model["flags"].items():
        name = flag.removeprefix("--")
        if name == "max-num-batched-tokens" and name not in written:
            continue  # on a CPU the engine's own default
        assert written[name] == str(value), flag


@pytest.mark.parametrize("name", SPECS)
def test_the_matrix(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line, every model of every spec that bundles are tested with."""
    path = tmp_path / "penstock.yaml"
    path.write_text(SPECS[name])
    assert main(["plan", str(path), "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    written = compiled(SPECS[name])
    assert len(models) == len(written)
    for model in models:
        same(model, written[model["name"]])


LOADS = ("", "load: {rate: 3}", "load: {rate: 40, peak: 50, prompt: 600, output: 90}", "load: {prompt: 3000}")
SLOS = ("", "slo: {ttft_p99: 2s}", "slo: {e2e_p95: 30s, itl_p99: 60ms}")
ROUTES = (
    "",
    "routes: {r: {targets: [{model: m}], max_tokens: {ceiling: 3000, default: 64}}}",
    "routes: {r: {targets: [{model: m}], context: 6000}, "
    "s: {targets: [{model: m}], max_tokens: {ceiling: 90}}}",
)
MODELS = (
    "weights: meta-llama/Llama-3.1-8B, engine: vllm",
    "weights: Qwen/Qwen3-8B",
    "weights: RedHatAI/Qwen3-32B-quantized.w8a8, engine: vllm, quantization: int8",
    "weights: Qwen/Qwen3-32B, engine: vllm, quantization: int8",
    "weights: meta-llama/Llama-3.1-70B, engine: vllm, devices: 4",
    "weights: meta-llama/Llama-3.1-70B, engine: vllm, devices: 8, nodes: 2",
    "weights: meta-llama/Llama-3.1-8B, engine: vllm, devices: 4, flags: {pipeline-parallel-size: 2}",
    "weights: BAAI/bge-m3, engine: vllm",
    "weights: demo",
)
FIELDS = (
    "",
    "replicas: 2",
    "max_model_len: 2048",
    "memory: 12GiB",
    "flags: {max-num-seqs: 24, max-num-batched-tokens: 2048}",
    "flags: {gpu-memory-utilization: 0.8, kv-cache-dtype: fp8}",
    "scale: {max: 60}",
)
POOLS = ("hardware: A100-80GB", "hardware: H100", "hardware: cpu", "hardware: A100-80GB, mig: 3g.40gb")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    *(st.sampled_from(each) for each in (MODELS, POOLS, FIELDS, LOADS, SLOS, ROUTES)),
)
def test_any_spec(model: str, pool: str, field: str, load: str, slo: str, routes: str) -> None:
    """Where both answer they answer alike; and what cannot be planned is not compiled."""
    fields = ", ".join(each for each in (model, "pool: p", field, load, slo) if each)
    text = f"pools: {{p: {{{pool}, count: 64}}}}\nmodels: {{m: {{{fields}}}}}\n{routes}"
    try:
        spec = loads(text)
    except StartupError:  # as several devices of a slice: no spec
        assume(False)
    planned, written = answer(lambda: record(plan([of_spec(spec, "m")]))), answer(lambda: compiled(text)["m"])
    if isinstance(planned, str):
        assert isinstance(written, str)
        assert "--gpu" not in planned + written
    elif isinstance(written, str):  # what is only a cluster's matter
        assert re.search(r"image|slices|count", written), written
    else:
        same(planned["models"][0], written)


def answer(ask: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    """Or why there is none."""
    try:
        return ask()
    except StartupError as refused:
        return str(refused)


# --- what comes, and what may come


def asked(more: str = "", fields: str = "") -> Any:
    text = f"{GPUS}\nmodels: {{m: {{{MODELS[0]}, pool: gpu{fields}}}}}\n{more}"
    return of_spec(loads(text), "m")


def test_targets_are_judged_at_what_comes_and_the_longest_has_room() -> None:
    """A ceiling bounds a request; it is not how long answers are."""
    question = asked("routes: {r: {targets: [{model: m}], max_tokens: {ceiling: 4000, default: 300}}}")
    assert (question.workload.prompt, question.workload.output, question.longest) == (1000, 300, 5000)
    made = record(plan([question]))["models"][0]
    assert made["flags"]["--max-model-len"] == 8192
    assert made["workload"]["output_tokens"] == 300
    assert any("300 output tokens (routes.r.max_tokens.default" in note for note in made["notes"])
    bare = asked("routes: {r: {targets: [{model: m}], max_tokens: {ceiling: 4000}}}")
    assert (bare.workload.output, bare.longest) == (200, 5000)
    short = asked("routes: {r: {targets: [{model: m}], max_tokens: {ceiling: 50}}}")
    assert (short.workload.output, short.longest) == (50, 1050)
    whole = asked("routes: {r: {targets: [{model: m}], context: 7000}}")
    assert (whole.workload.prompt, whole.longest) == (1000, 7000)
    said = asked(fields=", load: {prompt: 2500, output: 800}")
    assert (said.workload.prompt, said.workload.output, said.longest) == (2500, 800, 3300)
    assert not {"prompt", "output"} & set(said.assumed)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ("weights: Qwen/Qwen3-32B, engine: vllm, quantization: int8", "does not quantise so at load"),
        ("weights: Qwen/Qwen3-32B-AWQ, engine: vllm, quantization: fp8", "come in awq"),
        ("weights: Qwen/Qwen3-32B-AWQ, engine: penstock", "reads no weights that come quantised"),
        ("weights: Qwen/Qwen3-8B, quantization: fp8", "from compute capability 8.9 on"),
        ("weights: Qwen/Qwen3-8B, quantization: int9", "does not have it"),
    ],
)
def test_weights_and_formats_that_do_not_go_together_have_one_verdict(fields: str, why: str) -> None:
    text = f"{GPUS}\nmodels: {{m: {{{fields}, pool: gpu}}}}"
    for ask in (lambda: of_spec(loads(text), "m"), lambda: compiled(text)):
        with pytest.raises(StartupError, match=why):
            plan([found]) if not isinstance(found := ask(), dict) else None


@pytest.mark.parametrize(("context", "verdict"), [(12000, "within its targets"), (40000, "misses ttft_p99")])
def test_documents_in_prompts_of_which_nobody_said_how_long_they_are(context: int, verdict: str) -> None:
    """A route of retrieved documents lets more through than the assumed thousand tokens: both commands
    say so, and whether the longest alone keeps the targets."""
    routes, fields = (
        f"routes: {{r: {{targets: [{{model: m}}], context: {context}}}}}",
        ", slo: {ttft_p99: 4s}",
    )
    told = f"one of {context - 200:,}, which is let through"
    made = plan([asked(routes, fields)])
    (note,) = [each for each in made.models[0].notes if told in each]
    assert verdict in note
    assert "models.m.load.prompt" in note
    bundle = resolve(loads(f"{GPUS}\nmodels: {{m: {{{MODELS[0]}, pool: gpu{fields}}}}}\n{routes}"))
    assert f"models.m: {note}" in bundle.assumed
    for said in (", load: {prompt: 6000}", ""):  # somebody says it; there is no target
        quiet = plan([asked(routes, said and fields + said)]).models[0].notes
        assert not any("let through" in each for each in quiet)


def test_an_answer_of_usual_length_keeps_a_target_that_the_ceiling_would_not() -> None:
    """4,000 tokens take longer than ten seconds, 200 do not."""
    routes = "routes: {r: {targets: [{model: m}], max_tokens: {ceiling: 4000}}}"
    made = plan([asked(routes, ", slo: {e2e_p99: 10s}")]).models[0]
    assert made.chosen.point is not None
    assert made.chosen.point.e2e_p99 < 10 < 4000 * made.chosen.point.tpot


def test_a_longest_request_that_does_not_fit_is_no_longer_than_the_context() -> None:
    assert asked(fields=", max_model_len: 900").workload.prompt == 700
    assert asked(fields=", max_model_len: 100").workload.prompt == 50
    with pytest.raises(StartupError, match=r"models\.m\.load: a prompt of 950 .*max_model_len is 900"):
        asked(fields=", max_model_len: 900, load: {prompt: 950}")


# --- replicas


def test_load_decides_the_replicas_and_says_what_drives_them() -> None:
    fields = ", slo: {ttft_p99: 400ms}, load: {rate: 60}"
    made = plan([asked(fields=fields)])
    chosen = made.models[0].chosen
    model = record(made)["models"][0]
    assert chosen.replicas == -(-60 // chosen.usable) > 1
    assert model["devices"]["replicas_driven_by"] == "ttft_p99"
    bundle = resolve(loads(f"{GPUS}\nmodels: {{m: {{{MODELS[0]}, pool: gpu{fields}}}}}"))
    assert bundle.workloads[0].replicas == chosen.replicas
    told = f"60 requests/s take {chosen.replicas} replicas on A100-80GB, driven by ttft-p99"
    assert any(told in each for each in bundle.assumed)


@pytest.mark.parametrize(
    ("slo", "driver"),
    [
        ("", "capacity"),
        ("slo: {ttft_p99: 10m}", "capacity"),
        ("slo: {ttft_p99: 10m, itl_p99: 20ms}", "itl_p99"),
        ("slo: {ttft_p99: 300ms, itl_p99: 10m}", "ttft_p99"),
    ],
)
def test_the_target_that_breaks_first_drives(slo: str, driver: str) -> None:
    made = plan([asked(fields=f", load: {{rate: 200}}, {slo or 'start: eager'}")])
    chosen, targets = made.models[0].chosen, made.models[0].question.targets
    assert record(made)["models"][0]["devices"]["replicas_driven_by"] == driver
    if driver != "capacity":  # a little more, and it is this one that is no longer kept
        point = chosen.replica.at(chosen.usable * 1.01)
        assert point is not None
        assert [name for name, value in targets.given().items() if point.of(name) > value] == [driver]


def test_the_output_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "penstock.yaml"
    path.write_text(
        f"{GPUS}\nmodels: {{m: {{{MODELS[0]}, pool: gpu, slo: {{ttft_p99: 400ms}}, load: {{rate: 60}}}}}}\n"
    )
    assert main(["plan", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "driven by ttft-p99: one carries" in shown
    assert main(["plan", str(path), "--rate", "0.1"]) == 0
    assert "replicas    1, which carries it" in capsys.readouterr().out


def test_the_flags_of_ranks_are_those_of_the_devices() -> None:
    """Else the engine would want more GPUs than its pod has."""
    text = (
        f"{GPUS}\nmodels: {{m: {{{MODELS[0]}, pool: gpu, devices: 4, flags: {{pipeline-parallel-size: 2}}}}}}"
    )
    written = compiled(text)["m"]
    assert (written["tensor-parallel-size"], written["pipeline-parallel-size"]) == ("2", "2")
    with pytest.raises(StartupError, match=r"models\.m\.devices: 4, and the flags .* take 3"):
        compiled(text.replace("size: 2", "size: 3"))


def test_named_replicas_are_the_least() -> None:
    some = ", replicas: 3, load: {rate: 0.1}"
    assert compiled(f"{GPUS}\nmodels: {{m: {{{MODELS[0]}, pool: gpu{some}}}}}")["m"]["replicas"] == "3"
    made = record(plan([asked(fields=some)]))["models"][0]
    assert made["devices"]["replicas_driven_by"] == "spec"


def test_without_a_load_a_plan_has_the_replicas_that_are_named() -> None:
    """And so much load as they carry: nothing is bought for a rate that nobody said."""
    made = record(plan([asked(fields=", slo: {itl_p99: 0.0112}")]))["models"][0]
    assert made["devices"]["replicas"] == 1
    assert made["workload"]["requests_per_second"] <= made["devices"]["requests_per_second_of_a_replica"] < 1
    assert any("the most that 1 replica carries (models.m.load.rate)" in note for note in made["notes"])


@pytest.mark.parametrize(
    ("fields", "pool", "message"),
    [
        (", scale: {max: 2}", "count: 64", r"models\.m\.scale\.max: 2, and 400 requests/s take \d+ replicas"),
        ("", "count: 2", r"pools\.gpu\.count: 2 devices, but the models on it take \d+.*400 requests/s take"),
    ],
)
def test_a_load_that_what_is_named_does_not_carry_is_not_compiled(
    fields: str, pool: str, message: str
) -> None:
    text = (
        f"pools: {{gpu: {{hardware: A100-80GB, {pool}}}}}\n"
        f"models: {{m: {{{MODELS[0]}, pool: gpu, load: {{rate: 400}}{fields}}}}}"
    )
    with pytest.raises(StartupError, match=message):
        resolve(loads(text))


# --- words


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        (
            "weights: meta-llama/Llama-3.1-70B, engine: vllm",
            ("nearest that does: 2 x", "models.m.devices: 2", "pools.gpu.hardware: A100-80GB"),
        ),
        (
            "weights: meta-llama/Llama-3.1-8B, engine: vllm, slo: {ttft_p99: 25ms}",
            ("ttft_p99 of 25 ms cannot be met", "pools.gpu.hardware: "),
        ),
        (
            "weights: meta-llama/Llama-3.1-8B, engine: vllm, slo: {ttft_p99: 1ms}",
            ("relax models.m.slo.ttft_p99",),
        ),
        (
            "weights: meta-llama/Llama-3.1-8B, engine: vllm, memory: 1GiB, max_model_len: 16000",
            ("models.m.max_model_len: 8192 would fit",),
        ),
    ],
)
@pytest.mark.parametrize("command", ["plan", "compile"])
def test_a_refusal_names_the_fields_of_the_spec(
    command: str, fields: str, names: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "penstock.yaml"
    path.write_text(f"{GPUS}\nmodels: {{m: {{{fields}, pool: gpu}}}}\n")
    out = ["-o", str(tmp_path / "out")] if command == "compile" else []
    assert main([command, str(path), *out]) == 2
    error = capsys.readouterr().err
    for name in names:
        assert name in error
    for flag in ("--gpu", "--tp", "--ttft-p99", "--quantization"):
        assert flag not in error
    assert not (tmp_path / "out").exists()


def test_a_flag_over_a_spec_is_named_as_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "penstock.yaml"
    path.write_text(f"{GPUS}\nmodels: {{m: {{{MODELS[0]}, pool: gpu}}}}\n")
    assert main(["plan", str(path), "--ttft-p99", "1ms"]) == 2
    assert "relax --ttft-p99" in capsys.readouterr().err
    assert main(["plan", str(path), "--tp", "3"]) == 2
    assert "--tp 3: 32 attention heads do not divide by 3" in capsys.readouterr().err
