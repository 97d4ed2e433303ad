"""From logits to tokens: edits, draws, log-probabilities. The arithmetic is the device's; no scheduler."""

from .logprobs import prompt_logprobs
from .sampler import Sampled, Sampler
from .state import SamplingState

__all__ = ["Sampled", "Sampler", "SamplingState", "prompt_logprobs"]
