"""An encoder's executor, and the cache that it works in."""

from __future__ import annotations

from collections.abc import Callable

import torch

from penstock.core.cost import Coefficients
from penstock.core.executor import Items
from penstock.kernels.attention import KVCache
from penstock.model.bert import Encoder
from penstock.model.pooler import Pooler

from .clock import Clock
from .encoder_budget import BLOCK_SIZE, EncoderBudget, blocks_needed
from .executor.create import stream_of
from .executor.encoder_executor import EncoderExecutor


def make_executor(
    model: Encoder,
    pooler: Pooler,
    plan: EncoderBudget,
    prior: Coefficients,
    clock: Clock,
    progress: Callable[[Items], None],
) -> EncoderExecutor:
    """The executor, and the cache that it works in."""
    spec = model.cache_spec(BLOCK_SIZE)
    device = torch.device(plan.device)
    cache = KVCache(spec, blocks_needed(plan.tokens, plan.max_num_seqs), device)
    return EncoderExecutor(
        model,
        pooler,
        cache,
        model.operations.attention(spec),
        seats=plan.max_num_seqs,
        max_model_len=plan.max_model_len,
        prior=prior,
        clock=clock,
        progress=progress,
        stream=stream_of(device),
    )
