"""Token for token what transformers generates, whatever the batch, chunks, prefix hits and preemptions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch

from penstock.core.blocks import BlockPool
from penstock.core.request_spec import Pooling, Prompt, RequestSpec
from penstock.core.scheduler import Scheduler, SchedulerConfig
from tests.engine.build import checkpoint, torch_executor
from tests.engine.fake import spec
from tests.model.checkpoints import oracle

ARCHITECTURES = ["llama-rope3", "mistral", "qwen2", "qwen3", "phi", "gpt-neox", "falcon"]
COUNT = 64
SHARED = [(i * 37) % 120 + 1 for i in range(33)]
PROMPTS: list[list[int]] = [
    [5],
    [11, 12, 13, 14, 15, 16, 17],
    [*SHARED, 2, 3],
    [*SHARED, 4],
    [(i * 53) % 120 + 1 for i in range(90)],
]


@cache
def expected(architecture: str) -> list[list[int]]:
    """Greedy tokens of each prompt alone, by transformers in float32."""
    model = oracle(checkpoint(architecture))
    model.generation_config.eos_token_id = None
    outputs = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False
            )
            outputs.append(made[0, len(prompt) :].tolist())
    return outputs


def generate(
    architecture: str,
    prompts: Sequence[Sequence[int]],
    num_blocks: int = 200,
    rounds: int = 1,
    **limits: object,
) -> tuple[list[list[int]], Scheduler]:
    """All prompts at once, through the scheduler and the real executor; then once more for each round."""
    executor = torch_executor(num_blocks=num_blocks, block_size=8, architecture=architecture)
    settings = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "max_model_len": 256,
        "watermark": 0.0,
        **limits,
    }
    scheduler = Scheduler(SchedulerConfig(**settings), BlockPool(num_blocks, 8))  # type: ignore[arg-type]
    tokens: dict[str, list[int]] = {}
    for _ in range(rounds):
        for prompt in prompts:
            name = str(len(tokens))
            tokens[name] = []
            scheduler.add(spec(name, prompt, COUNT, temperature=0.0), 0.0)
        while scheduler.has_work:
            plan = scheduler.schedule(0.0)
            for event in scheduler.commit(plan, executor.collect(executor.submit(plan)), 0.0):
                assert event.failure is None, event.failure
                tokens[event.request] += event.tokens
            scheduler.check()
    executor.close()
    return list(tokens.values()), scheduler


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_chunks_and_company_change_nothing(architecture: str, chunk: int) -> None:
    """The second round of the same prompts finds them in the prefix cache."""
    tokens, scheduler = generate(architecture, PROMPTS, rounds=2, long_prefill_token_threshold=chunk)
    assert tokens == expected(architecture) * 2
    assert scheduler.totals.prefix_hits >= 32 + 32 + 88


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_preemption_changes_nothing(architecture: str) -> None:
    """The pool holds hardly more than the longest request: the others come and go."""
    tokens, scheduler = generate(architecture, PROMPTS, num_blocks=22, max_num_batched_tokens=64)
    assert tokens == expected(architecture)
    assert scheduler.totals.preemptions >= 2


def test_prefix_caching_changes_nothing() -> None:
    tokens, scheduler = generate("qwen3", PROMPTS, enable_prefix_caching=False)
    assert tokens == expected("qwen3")
    assert scheduler.totals.prefix_hits == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_pooled_vector_is_the_last_hidden_state(architecture: str) -> None:
    """In chunks, with the prefixes of the prompts before it in the cache."""
    executor = torch_executor(num_blocks=200, block_size=8, architecture=architecture)
    settings = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=24, max_model_len=256)
    scheduler = Scheduler(settings, BlockPool(200, 8), features=executor.capacity().features)
    for number, prompt in enumerate(PROMPTS):
        pooled = RequestSpec(id=str(number), prompts=(Prompt(tuple(prompt), 0),), pooling=Pooling())
        scheduler.add(pooled, 0.0)
    vectors: dict[str, list[float]] = {}
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        for event in scheduler.commit(plan, executor.collect(executor.submit(plan)), 0.0):
            assert event.failure is None, event.failure
            assert event.pooled is not None
            vectors[event.request] = event.pooled.row
    executor.close()
    model = oracle(checkpoint(architecture))
    for number, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1]
        expected_vector = torch.nn.functional.normalize(states[0, -1], dim=0)
        assert torch.tensor(vectors[str(number)]) == pytest.approx(expected_vector, abs=1e-4)


def test_the_oracle_is_decisive() -> None:
    """Guards the test: different prompts give different, varied tokens."""
    for architecture in ARCHITECTURES:
        outputs = expected(architecture)
        assert len({tuple(output) for output in outputs}) == len(outputs), architecture
        assert len(set(outputs[-1])) > 8, architecture
