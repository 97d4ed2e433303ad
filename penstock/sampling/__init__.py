"""From logits to tokens: edits, greedy and random choice, log-probabilities. Torch only, no scheduler."""

from .logprobs import prompt_logprobs
from .rows import Row
from .sampler import Sampled, Sampler

__all__ = ["Row", "Sampled", "Sampler", "prompt_logprobs"]
