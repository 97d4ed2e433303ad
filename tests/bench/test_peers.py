"""The comparison with peers: prompts, the result file, what is derived from it, and the document."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.peers import engines, others, run, session, setup, summary
from benchmarks.peers.engines import ENGINES, Engine
from benchmarks.peers.loads import FIRST_TOKEN_ID, LOADS, QUICK, VOCABULARY, Load, LogNormal
from benchmarks.peers.report import DOCUMENT, fill
from benchmarks.peers.results import Results
from benchmarks.peers.workers import gguf_writer

HEAD = {"date": "today", "machine": {"cpu": "a CPU", "cores": 2}, "model": "qwen3-0.6b", "loads": {}}


def results(tmp_path: Path, *, resume: bool = False, loads: tuple[str, ...] = ("c1", "c8")) -> Results:
    described = {name: LOADS[name].describe() for name in loads}
    return Results(tmp_path / "peers.json", {**HEAD, "loads": described}, resume=resume)


def add(
    found: Results, engine: str, load: str, speed: float, ttft: float, tpot: float = 50.0, number: int = 0
) -> None:
    found.data["engines"][engine] = {
        **ENGINES[engine].describe(),
        "versions": {},
        "settings": {},
        "weight_bytes": 1_000_000_000,
    }
    report = {
        "output_throughput": speed,
        "median_ttft_ms": ttft,
        "median_tpot_ms": tpot,
        "configuration": {"base_url": "http://somewhere"},
        "requests": [
            {"ttft": ttft / 1e3, "latency": 1.0, "prompt_len": 128, "output_tokens": 64, "itl": [0.1]}
        ],
    }
    found.add(engine, number, load, report=report)


@pytest.fixture(autouse=True)
def raw_files_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.results.RAW", tmp_path / "raw")


@pytest.mark.parametrize("name", ["overhead", "context", "quality"])
def test_tables_of_what_needs_no_peer_are_made_from_the_published_results(name: str) -> None:
    lines = others.tables()[name].splitlines()
    assert lines[0].startswith("| ")
    assert sum(line.startswith("| ") for line in lines) >= 5


class TestLoads:
    @pytest.mark.parametrize("load", [*LOADS.values(), *QUICK.values()], ids=lambda load: load.title)
    def test_lengths_are_those_of_the_load_in_every_round(self, load: Load) -> None:
        first, second = load.prompts(0), load.prompts(1)
        assert len(first) == load.requests
        assert [(p.input_tokens, p.max_tokens) for p in first] == [
            (p.input_tokens, p.max_tokens) for p in second
        ]
        assert all(len(prompt.content) == prompt.input_tokens for prompt in first)
        assert load.prompts(0) == first

    def test_no_round_repeats_the_tokens_of_another(self) -> None:
        load = LOADS["shared-c8"]
        firsts = {tuple(prompt.content[:16]) for seed in range(3) for prompt in load.prompts(seed)}
        assert len(firsts) == 3  # one shared prefix per round

    def test_shared_prefix_is_shared_and_the_rest_is_not(self) -> None:
        prompts = LOADS["shared-c8"].prompts(0)
        assert len({tuple(prompt.content[:800]) for prompt in prompts}) == 1
        assert len({tuple(prompt.content[800:]) for prompt in prompts}) == len(prompts)

    def test_log_normal_lengths_spread_within_their_range(self) -> None:
        load = LOADS["mixed-c32"]
        assert isinstance(load.input_len, LogNormal)
        lengths = [prompt.input_tokens or 0 for prompt in load.prompts(0)]
        assert load.input_len.low <= min(lengths) < 64 < 256 < max(lengths) <= load.input_len.high

    def test_token_ids_are_in_every_vocabulary(self) -> None:
        ids = [token for load in LOADS.values() for prompt in load.prompts(0) for token in prompt.content]
        assert min(ids) >= FIRST_TOKEN_ID  # type: ignore[type-var]
        assert max(ids) < VOCABULARY  # type: ignore[type-var]


class TestEngines:
    @pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.id)
    def test_commands_have_no_path_until_they_are_filled_in(self, engine: Engine) -> None:
        assert "/work" not in json.dumps(engine.describe())
        argv = engine.argv(model=Path("some/model"), port=1234, python="python3")
        assert "some/model" in argv
        assert not any("{" in part for part in argv)

    def test_all_cores_are_named_to_vllm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
        assert ENGINES["vllm-bound"].environment()["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2})
        assert engines.cores() == "0,2"

    def test_settings_of_this_shell_do_not_reach_an_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("HOME", "/home/somebody")
        environment = ENGINES["vllm"].environment()
        assert "OMP_NUM_THREADS" not in environment
        assert environment["HOME"] == "/home/somebody"

    def test_llama_cpp_gets_loads_of_one_request_only(self) -> None:
        suited = [load.id for load in LOADS.values() if run._suits(ENGINES["llama-q8"], load)]
        assert suited == ["c1", "long-c1"]


class TestResults:
    def test_survives_an_interruption(self, tmp_path: Path) -> None:
        add(results(tmp_path), "penstock", "c1", 20.0, 300.0)
        again = results(tmp_path, resume=True)
        assert again.has("penstock", "c1", 0)
        assert not again.has("penstock", "c1", 1)
        assert results(tmp_path).runs == []

    def test_keeps_summary_and_request_times_but_neither_addresses_nor_gaps(self, tmp_path: Path) -> None:
        add(results(tmp_path), "penstock", "c1", 20.0, 300.0)
        text = (tmp_path / "peers.json").read_text()
        assert "somewhere" not in text
        [entry] = json.loads(text)["runs"]
        assert entry["report"]["ttfts_ms"] == [300.0]
        [raw] = (tmp_path / "raw").iterdir()
        assert json.loads(raw.read_text())["requests"][0]["itl"] == [0.1]

    def test_medians_are_over_rounds(self, tmp_path: Path) -> None:
        found = results(tmp_path)
        for number, speed in enumerate((10.0, 30.0, 20.0)):
            add(found, "penstock", "c1", speed, 300.0, number=number)
        assert found.median("penstock", "c1", "output_throughput") == 20.0
        assert found.median("penstock", "c64", "output_throughput") is None
        assert found.rounds() == 3

    def test_a_failure_is_forgotten_when_it_is_tried_again(self, tmp_path: Path) -> None:
        found = results(tmp_path)
        found.add("vllm", 0, "failed", reason="no")
        found.add("vllm", 1, "failed", reason="no")
        found.forget_failures("vllm", 1)
        assert found.failures("vllm") == ["no"]
        assert [entry["round"] for entry in found.runs] == [0]


class TestSummary:
    def test_ratio_is_to_the_better_setting_of_vllm(self, tmp_path: Path) -> None:
        found = results(tmp_path)
        add(found, "penstock", "c8", 90.0, 500.0)
        add(found, "vllm", "c8", 50.0, 400.0)
        add(found, "vllm-bound", "c8", 60.0, 600.0)
        assert summary.best_vllm(found, "c8") == "vllm-bound"
        assert summary.ratio_to_vllm(found, "penstock", "c8") == 1.5

    def target(self, found: Results, part: str) -> summary.Target:
        [row] = [row for row in summary.targets(found) if part in row.what]
        return row

    def test_throughput_target_needs_ttft_too(self, tmp_path: Path) -> None:
        found = results(tmp_path)
        add(found, "penstock", "c8", 90.0, 500.0)
        add(found, "vllm-bound", "c8", 60.0, 600.0)
        assert self.target(found, "concurrency 8").met is True
        add(found, "vllm-bound", "c8", 60.0, 100.0, number=1)
        assert self.target(found, "concurrency 8").met is False
        assert self.target(found, "concurrency 64").met is None

    def test_shares_of_the_limits(self, tmp_path: Path) -> None:
        found = results(tmp_path, loads=("c1", "long-c1"))
        add(found, "penstock", "c1", 20.0, 128.0, tpot=50.0)
        add(found, "penstock", "long-c1", 20.0, 2000.0)
        found.add("penstock", 0, "hardware", bandwidth=25e9, flops=1e12)
        one = summary.single_stream(found, "penstock")
        assert one.memory_share == pytest.approx(1e9 / 0.050 / 25e9)
        assert one.prefill_short == pytest.approx(1000.0)
        assert one.prefill_long == pytest.approx(500.0)
        parameters = 28 * (1024 * 128 * (2 * 16 + 2 * 8) + 3 * 1024 * 3072)
        assert one.matmul_share == pytest.approx(2 * parameters * 500 / 1e12)

    def test_the_limit_of_the_machine_is_the_slower_of_reading_and_computing(self, tmp_path: Path) -> None:
        found = results(tmp_path)
        assert summary.ceiling(found, "c1") is None
        add(found, "penstock", "c1", 20.0, 128.0)
        add(found, "penstock", "c8", 20.0, 128.0)
        linear, head = 28 * (1024 * 128 * (2 * 16 + 2 * 8) + 3 * 1024 * 3072), 1024 * 151936
        found.add("penstock", 0, "hardware", bandwidth=25e9, flops=1e15)
        assert summary.ceiling(found, "c1") == pytest.approx(25e9 / (2 * (linear + head)))
        assert summary.ceiling(found, "c8") == pytest.approx(8 * 25e9 / (2 * (linear + head)))
        found.data["runs"][-1] |= {"bandwidth": 1e15, "flops": 1e12}
        seconds = 2 * (linear * (128 + 63) + head * 64) / 1e12
        assert summary.ceiling(found, "c1") == pytest.approx(64 / seconds)

    def test_a_quantised_engine_that_does_not_tell_its_bytes_has_no_share(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(bytes(1000))
        assert run.weight_bytes(ENGINES["penstock"], tmp_path) == 1000
        assert run.weight_bytes(ENGINES["penstock-int8"], tmp_path) is None

    def test_tables_of_an_unfinished_run_say_what_is_missing(self, tmp_path: Path) -> None:
        found = results(tmp_path)
        add(found, "penstock", "c1", 20.0, 300.0)
        found.add("vllm", 0, "failed", reason="vllm: no such file")
        assert "| – |" in summary.target_table(found)
        assert "Not measured: vllm: no such file" in summary.conditions(found)
        assert "| Penstock | 20.0 | – |" in summary.speed_table(found)
        assert "| Penstock | 300 / – | – |" in summary.latency_table(found, "ttft")
        assert summary.startup_table(found).count("–") == 2


class TestDocument:
    def test_markers_are_filled_again_and_again(self) -> None:
        text = "a\n<!-- peers:loads -->\nold\n<!-- /peers:loads -->\nb\n"
        once = fill(text, {"loads": r"new \1"})
        assert once == "a\n<!-- peers:loads -->\nnew \\1\n<!-- /peers:loads -->\nb\n"
        assert fill(once, {"loads": r"new \1"}) == once

    def test_a_missing_marker_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="peers:single"):
            fill("nothing", {"single": "x"})

    def test_the_document_has_every_place(self) -> None:
        names = ["conditions", "targets", "images", "throughput", "ttft", "tpot", "single", "startup"]
        fill(DOCUMENT.read_text(), dict.fromkeys(names, "x"))


def test_requirements_of_vllm_leave_out_what_text_does_not_need() -> None:
    needs = ["numpy", "torch==2.13.0; x == y", "torchvision==1", "ray; extra == 'ray'", "fastapi<1"]
    metadata = "Name: vllm-cpu\n" + "".join(f"Requires-Dist: {need}\n" for need in needs)
    assert setup.vllm_requirements(metadata) == ["numpy", "fastapi<1"]


WORKER = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.peers.workers.protocol import Record, serve

def load(model, settings):
    print("noise on standard output")
    if model == "broken":
        raise RuntimeError("no such model")
    def run(requests, concurrency):
        return [Record(1.0, len(r.prompt), [2.0 + n for n in range(r.max_tokens)]) for r in requests]
    return run

serve(load)
"""


def worker(tmp_path: Path) -> Engine:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(engines.CHECKOUT)))
    return Engine("fake", "fake", "worker", (sys.executable, str(script), "{model}"), "fake", ready_s=60)


class TestGguf:
    def test_names_are_those_of_llama_cpp(self) -> None:
        assert gguf_writer.gguf_name("model.embed_tokens.weight") == "token_embd.weight"
        assert gguf_writer.gguf_name("model.layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
        assert gguf_writer.gguf_name("model.layers.11.self_attn.k_norm.weight") == "blk.11.attn_k_norm.weight"
        with pytest.raises(KeyError):
            gguf_writer.gguf_name("model.layers.0.self_attn.q_proj_lora.weight")

    def test_reads_what_safetensors_wrote(self, tmp_path: Path) -> None:
        wanted = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(4, dtype=torch.float32)}
        save_file(wanted, tmp_path / "model.safetensors", metadata={"format": "pt"})
        read = dict(gguf_writer.read_safetensors(tmp_path / "model.safetensors"))
        assert read.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(torch.from_numpy(gguf_writer.as_float32(read[name])), tensor.float())

    def test_another_dtype_is_refused(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(2, dtype=torch.float16)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="a is F16"):
            list(gguf_writer.read_safetensors(tmp_path / "model.safetensors"))


class TestWorkers:
    def test_times_become_the_report_of_the_load_generator(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("benchmarks.peers.session.PEERS", tmp_path)
        with session.start(worker(tmp_path), Path("model")) as running:
            report: dict[str, Any] = running.run(QUICK["c8"], seed=0)
        assert report["completed"] == QUICK["c8"].requests
        assert report["total_output_tokens"] == QUICK["c8"].requests * 8
        assert report["median_ttft_ms"] == pytest.approx(1000.0)
        assert report["median_itl_ms"] == pytest.approx(1000.0)
        assert running.process.returncode is not None

    def test_what_went_wrong_comes_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("benchmarks.peers.session.PEERS", tmp_path)
        with (
            pytest.raises(session.EngineFailed, match="RuntimeError: no such model"),
            session.start(worker(tmp_path), Path("broken")),
        ):
            pass
