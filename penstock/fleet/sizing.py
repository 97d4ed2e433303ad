"""What stays for the KV cache, and how many requests that holds.

memory x utilization ┌───────────────┐
                     │ weights       │  of this rank, exact
                     │ a step        │  activations at most (model/memory.py, the engine's own arithmetic)
                     │ runtime       │  CUDA context, graphs, NCCL: an assumption, and named; graphs of
                     │               │  our engine as its own memory table has them
                     │ KV cache      │  the rest
                     └───────────────┘
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from penstock.model.graph_sizes import decode_sizes
from penstock.model.memory import activation_bytes, graphs_bytes
from penstock.model.weighing import loaded_bytes

from . import schemes
from .facts import ModelFacts
from .hardware import Device
from .roofline import Machine

CUDA_CONTEXT = 700 << 20
"""Of the device, for context and libraries: an assumption, as in engine/preview.py."""
CUDA_GRAPHS = 512 << 20
"""Of vLLM's CUDA graphs; an assumption."""
NCCL = {1: 0, 2: 342 << 20}
MORE_NCCL = 392 << 20
"""Ranks → what NCCL takes on each, and with more ranks: of NCCL 2.27, as NVIDIA's planner has it
(ai-dynamo/aiconfigurator 095f58a, systems/*.yaml)."""
UTILIZATION = 0.92
"""Default of --gpu-memory-utilization, of vLLM and of our engine on CUDA."""
BLOCK = 16
"""Tokens of a block of the KV cache."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Sizes of one rank, by ModelConfig's names, for activation_bytes."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @classmethod
    def of(cls, facts: ModelFacts, tp: int) -> Shard:
        return cls(
            hidden_size=facts.hidden_size,
            num_heads=max(1, facts.num_heads // tp),
            num_kv_heads=max(1, facts.num_kv_heads // tp),
            head_dim=facts.head_dim,
            intermediate_size=max(1, facts.intermediate_size * facts.experts_used // tp),
            vocab_size=facts.vocab_size,
        )


@dataclass(frozen=True, slots=True)
class Room:
    """One rank's memory; bytes."""

    device: Device
    tp: int
    limit: int
    weights: int
    step: int
    runtime: int
    kv_cache: int
    """Whole blocks; negative where not even the rest fits."""
    kv_bytes_per_token: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    utilization: float
    usual_step: int | None = None
    """What a step takes as a rule, where that has been measured: our engine's on a CPU."""

    @property
    def peak(self) -> int | None:
        """What a process with this cache takes at its peak above an empty one; None where nobody has measured
        what a step takes."""
        return None if self.usual_step is None else self.weights + max(0, self.kv_cache) + self.usual_step

    @property
    def fits(self) -> bool:
        """Whether one request of max_model_len can be served."""
        return (self.kv_bytes_per_token == 0 and self.kv_cache >= 0) or self.tokens >= self.max_model_len

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds, where every layer keeps all of them."""
        if self.kv_bytes_per_token == 0:
            return 0
        return max(0, self.kv_cache) // (self.kv_bytes_per_token * BLOCK) * BLOCK

    @property
    def missing(self) -> int:
        """Bytes that are missing for one request of max_model_len; 0 if it fits."""
        wanted = math.ceil(self.max_model_len / BLOCK) * BLOCK * self.kv_bytes_per_token
        return max(0, wanted - self.kv_cache)


def room(
    machine: Machine,
    *,
    utilization: float = UTILIZATION,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    engine: str = "vllm",
) -> Room:
    """The memory of one rank. Pure arithmetic; nothing is refused here."""
    facts, tp, device = machine.facts, machine.tp, machine.device
    cpu = device.vendor == "cpu"
    runtime = 0
    if not cpu:
        runtime = CUDA_CONTEXT + (CUDA_GRAPHS if engine == "vllm" else 0) + NCCL.get(tp, MORE_NCCL)
    weights = facts.weight_bytes(machine.scheme, tp=tp, width=machine.width)
    if engine == "penstock" and machine.scheme.name in schemes.PENSTOCK:
        weights = loaded(machine)
    step = activation_bytes(
        Shard.of(facts, tp),
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        dtype_bytes=machine.width,
        device="cpu" if cpu else "cuda",
    )
    if engine == "penstock" and not cpu:
        runtime += graphs_bytes(
            Shard.of(facts, tp),
            decode_sizes(max_num_seqs),
            machine.width,
            max_model_len=max_model_len,
            block_size=BLOCK,
        )
    limit = int(device.memory * utilization)
    per_token = facts.kv_bytes_per_token(machine.kv_width, tp)
    return Room(
        device=device,
        tp=tp,
        limit=limit,
        weights=weights,
        step=step,
        runtime=runtime,
        kv_cache=limit - weights - step - runtime,
        kv_bytes_per_token=per_token,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        utilization=utilization,
        usual_step=usual_step(Shard.of(facts, tp), max_num_batched_tokens, max_num_seqs, machine.width)
        if cpu and engine == "penstock"
        else None,
    )


_SAMPLED = 16
"""Requests that are sampled in a step as a rule, where there may be more."""


def usual_step(shard: Shard, tokens: int, sequences: int, width: int) -> int:
    """Bytes of the tensors of our engine on a CPU that live at one time of a step: of each token the residual
    stream, what comes out of a norm and what goes back, queries, keys, values and the attention's output,
    gate and up; and of each sampled request its logits, once more in 32 bits. `Room.step` is the upper bound
    of the same, with prompt logits of 128 rows and every copy that sampling may make.

    benchmarks/plan_memory.py has measured it: the peak is within 3 % of weights, cache and this.
    """
    q, kv = shard.num_heads * shard.head_dim, shard.num_kv_heads * shard.head_dim
    each = 3 * shard.hidden_size + 2 * q + 2 * kv + 2 * shard.intermediate_size
    return tokens * each * width + min(sequences, _SAMPLED) * shard.vocab_size * (width + 4)


def loaded(machine: Machine) -> int:
    """Bytes of the weights as our engine loads them: padded and packed, the head with 8 bits where layers are
    quantised."""
    facts = machine.facts
    return loaded_bytes(
        (
            (
                "embed" if weight.name == "embedding" else weight.name,
                (weight.rows, weight.columns) if weight.columns > 1 else (weight.rows,),
                weight.copies,
            )
            for weight in facts.weights
        ),
        vocab_size=facts.vocab_size,
        hidden_size=facts.hidden_size,
        tied=not any(weight.name == "head" for weight in facts.weights),
        scheme=schemes.flag("penstock", machine.scheme.name) or "none",
        width=machine.width,
        device="cpu" if machine.device.vendor == "cpu" else "cuda",
    )


def sequences_of(machine: Machine, kv_cache: int, tokens: int) -> int:
    """How many sequences of so many tokens a cache holds; windows are honoured."""
    each = machine.facts.sequence_bytes(math.ceil(tokens / BLOCK) * BLOCK, machine.kv_width, machine.tp)
    return max(0, kv_cache) // each if each else 0
