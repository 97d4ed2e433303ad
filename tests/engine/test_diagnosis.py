"""Logits that are not finite: the request fails, the log says where in the model it began, others go on."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.core.cost import Coefficients
from penstock.core.plan import Event
from penstock.core.request_spec import FinishReason
from penstock.engine.executor.diagnosis import Diagnosis
from penstock.engine.executor.torch_executor import TorchExecutor
from penstock.engine.messages import Add
from penstock.engine.replay import replay
from penstock.kernels.attention import KVCache, Span
from penstock.kernels.create import create_operations
from penstock.model.causal_lm import CausalLM
from penstock.model.config import load_config
from penstock.model.loader import load_model
from tests.engine.build import checkpoint, torch_executor
from tests.engine.fake import add
from tests.engine.test_loop import cause, make_loop, run

CPU = torch.device("cpu")


def damaged(directory: Path, tensor: str, architecture: str = "qwen3", value: float = math.nan) -> CausalLM:
    """A model with one bad row (number 7) in the tensor whose name ends so."""
    shutil.copytree(checkpoint(architecture), directory)
    file = directory / "model.safetensors"
    weights = load_file(file)
    (name,) = [name for name in weights if name.endswith(tensor)]
    weights[name][7] = value
    save_file(weights, file, {"format": "pt"})
    return load_model(directory, load_config(directory), create_operations(CPU, torch.float32))


def executor_of(model: CausalLM, num_blocks: int = 64) -> TorchExecutor:
    spec = model.cache_spec(4)
    attention = model.operations.attention(spec)
    return TorchExecutor(model, KVCache(spec, num_blocks + 1, CPU), attention, CPU, Coefficients())


def ask(name: str, *prompt: int, **params: object) -> Add:
    return add(name, prompt, 3, temperature=0.0, **params)


def serve(executor: TorchExecutor, *adds: Add, **limits: object) -> list[Event]:
    loop = make_loop(executor, **limits)
    for message in adds:
        loop.handle(message)
    return run(loop)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name == "penstock.engine"]
    return [record.getMessage() for record in records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("layers.1.self_attn.q_proj.weight", "the attention of layer 1: NaN at position 0"),
        ("layers.0.self_attn.o_proj.weight", "the attention of layer 0: NaN at position 0"),
        ("layers.1.input_layernorm.weight", "the attention of layer 1: NaN at position 0"),
        ("layers.0.mlp.up_proj.weight", "the mlp of layer 0: NaN at position 0"),
        ("layers.1.mlp.down_proj.weight", "the mlp of layer 1: NaN at position 0"),
        ("model.norm.weight", "the final norm: NaN at position 0"),
        ("lm_head.weight", "the output layer: NaN at position 2"),
        ("embed_tokens.weight", "the embedding: NaN at position 1"),
    ],
)
def test_the_log_names_the_part_and_the_position(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tensor: str, part: str
) -> None:
    executor = executor_of(damaged(tmp_path / "model", tensor))
    (event,) = serve(executor, ask("r1", 3, 7, 5))
    assert event.finish is FinishReason.ERROR
    assert event.failure is not None
    assert event.failure.type == "RequestFailed"
    assert "logits contain NaN" in event.failure.cause
    assert warnings(caplog) == [
        f"request r1: logits at position 2 are not finite; first in the output of {part}"
    ]


@pytest.mark.parametrize(
    ("architecture", "attention", "mlp"),
    [
        ("llama", "layers.1.self_attn.o_proj.weight", "layers.1.mlp.down_proj.weight"),
        ("phi", "layers.1.self_attn.dense.weight", "layers.1.mlp.fc2.weight"),
        ("gpt-neox", "layers.1.attention.dense.weight", "layers.1.mlp.dense_4h_to_h.weight"),
        ("gpt-neox-serial", "layers.1.attention.dense.weight", "layers.1.mlp.dense_4h_to_h.weight"),
        ("falcon", "h.1.self_attention.dense.weight", "h.1.mlp.dense_4h_to_h.weight"),
        ("falcon-bias", "h.1.self_attention.dense.weight", "h.1.mlp.dense_4h_to_h.weight"),
    ],
)
def test_every_architecture_tells_its_halves_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, architecture: str, attention: str, mlp: str
) -> None:
    for half, tensor in (("attention", attention), ("mlp", mlp)):
        executor = executor_of(damaged(tmp_path / half, tensor, architecture))
        serve(executor, ask("r", 3, 4, 5))
        assert f"the {half} of layer 1: NaN at position 0" in warnings(caplog)[-1]


def test_an_overflow_of_the_sum_is_told_from_one_of_its_parts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each part is finite in float32, and their sum is not."""
    big = 1.7e38
    model = damaged(tmp_path / "model", "embed_tokens.weight", value=big)
    (layer, *_) = model._layers
    layer._mlp = lambda x: torch.full_like(x, 3e38)  # type: ignore[attr-defined]
    serve(executor_of(model), ask("r", 7))
    assert "first in the output of the sum of layer 0: inf at position 0" in warnings(caplog)[0]


def test_others_in_the_step_get_what_they_get_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Token 7 is bad; one request shares the block before it, one shares the bad one's own blocks."""
    model = damaged(tmp_path / "model", "embed_tokens.weight")
    healthy = ask("healthy", 1, 2, 3, 4, 5, 6)
    sharing = ask("sharing", 1, 2, 3, 4, 8, 9, 10)
    alone = {}
    for message in (healthy, sharing):
        alone |= {message.spec.id: [event.tokens for event in serve(executor_of(model), message)]}
    bad, follower = ask("bad", 1, 2, 3, 4, 5, 7, 6, 6, 6), ask("follower", 1, 2, 3, 4, 5, 7, 6, 6, 11)
    adds = (healthy, bad, sharing, follower)
    together = serve(executor_of(model), *adds, max_num_batched_tokens=64)
    for name, tokens in alone.items():
        assert [event.tokens for event in together if event.request == name] == tokens
    assert {event.request for event in together if event.finish is FinishReason.ERROR} == {"bad", "follower"}
    first, second = warnings(caplog)
    assert "request bad: logits at position 8 are not finite; first in the output of the embedding" in first
    assert "NaN at position 5" in first
    assert second == "request follower: logits at position 8 are not finite (not examined: one was 0 s ago)"


def test_a_prompt_in_chunks_names_what_an_earlier_step_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    executor = executor_of(damaged(tmp_path / "model", "embed_tokens.weight"))
    serve(executor, ask("r", 1, 2, 3, 4, 5, 7, 6, 6, 6, 6, 6), max_num_batched_tokens=8)
    (text,) = warnings(caplog)
    assert "first in the output of the attention of layer 0: NaN at position 8" in text
    assert text.endswith("an earlier step had left keys that are not finite, first in layer 0 at position 5")


def test_bad_blocks_of_earlier_steps_leave_the_prefix_cache(tmp_path: Path) -> None:
    """Else a passing fault of the hardware would live on in the cache."""
    model = damaged(tmp_path / "model", "lm_head.weight")
    path = tmp_path / "steps.jsonl"
    loop = make_loop(executor_of(model), log=path, max_num_batched_tokens=8)  # type: ignore[arg-type]
    prompt = range(20, 39)
    cached = []
    for name in ("first", "second"):
        loop.handle(ask(name, *prompt))
        events = run(loop)
        cached.append(events[-1].cached)
        assert events[-1].finish is FinishReason.ERROR
    assert cached == [0, 0]
    loop.scheduler.check()
    assert loop._log is not None
    loop._log.close()
    recorded, replayed = replay(path.read_text().splitlines())
    assert len(recorded) == 6
    assert recorded == replayed


def test_a_request_that_may_generate_nothing_is_not_the_models_fault(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = torch_executor()
    monkeypatch.setattr(CausalLM, "find_non_finite", None)  # calling it would be an error, and be logged
    params = {"allowed_token_ids": (5,), "stop_token_ids": (5,), "min_tokens": 2}
    loop = make_loop(executor, max_num_batched_tokens=8)  # type: ignore[arg-type]
    cached = []
    for name in ("a", "b"):
        loop.handle(ask(name, *range(10, 22), **params))
        events = run(loop)
        assert "no token may be generated" in cause(events[-1])
        cached.append(events[-1].cached)
    assert cached == [0, 8]  # the blocks of its first step are good
    assert warnings(caplog) == []


class Examined:
    """A diagnosis with a clock of its own, of a damaged model."""

    def __init__(self, model: CausalLM) -> None:
        spec = model.cache_spec(4)
        self.now = 0.0
        self.diagnosis = Diagnosis(
            model, KVCache(spec, 8, CPU), model.operations.attention(spec), lambda: self.now
        )

    def report(self, name: str) -> None:
        self.diagnosis.report(name, torch.tensor([3, 4, 5]), Span(0, 3, [2]))


def test_one_examination_a_minute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    examined = Examined(damaged(tmp_path / "model", "lm_head.weight"))
    for number, now in enumerate((0.0, 1.0, 59.0, 60.0, 61.0)):
        examined.now = now
        examined.report(f"r{number}")
    assert [("the output layer" in text) for text in warnings(caplog)] == [True, False, False, True, False]


def test_a_fault_that_does_not_come_back_is_called_that(caplog: pytest.LogCaptureFixture) -> None:
    path = checkpoint("qwen3")
    Examined(load_model(path, load_config(path), create_operations(CPU, torch.float32))).report("r")
    assert "computed again alone they are: suspect the hardware" in warnings(caplog)[0]


def test_an_examination_that_fails_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(CausalLM, "find_non_finite", fail)
    Examined(damaged(tmp_path / "model", "lm_head.weight")).report("r")
    assert "where could not be found out: RuntimeError: out of luck" in warnings(caplog)[0]


def test_watching_leaves_nothing_behind(tmp_path: Path) -> None:
    model = damaged(tmp_path / "model", "layers.1.mlp.down_proj.weight")
    before = [dict(vars(layer)) for layer in model._layers]
    Examined(model).report("r")
    assert [dict(vars(layer)) for layer in model._layers] == before
