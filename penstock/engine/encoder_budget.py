"""What an encoder takes of memory: no KV cache, and prompts that are computed whole.

    weights                       exact, or reckoned before they are loaded
    a step                        activations, and the keys and values of one layer

A step has the token budget, or one prompt that is longer than it. Pure arithmetic: whoever starts several
engines asks before one of them is there.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.errors import MemoryBudgetError
from penstock.core.pooling import PoolingInfo
from penstock.model.memory import encoder_bytes, format_size
from penstock.model.model_config import ModelConfig

from .config import EngineConfig

BLOCK_SIZE = 128
"""Positions of a block of the one layer's cache: as many as attention looks at together."""

DEFAULT_LIMITS = {"cpu": (256, 2048), "cuda": (1024, 16384)}
"""device → (max_num_seqs, max_num_batched_tokens). Nobody decodes beside them, and short texts come by
thousands."""


def limits(config: EngineConfig, device: str) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens) of an encoder on this device."""
    seqs, tokens = DEFAULT_LIMITS.get(device, DEFAULT_LIMITS["cpu"])
    return config.max_num_seqs or seqs, config.max_num_batched_tokens or tokens


def longest_prompt(config: EngineConfig, model: ModelConfig, info: PoolingInfo) -> int:
    """Tokens: as the flag says, else sentence-transformers' max_seq_length, else as many as the model has
    positions for. Raises MemoryBudgetError for more than these."""
    most, wanted = model.context_length, config.max_model_len
    if wanted is None or wanted == -1:
        return min(most, info.max_length or most)
    if wanted > most:
        raise MemoryBudgetError(
            f"--max-model-len {wanted} is longer than the model's context of {most} tokens.",
            param="--max-model-len",
            advice=f"Use --max-model-len {most} or less.",
        )
    return wanted


def blocks_needed(max_tokens: int, max_seqs: int) -> int:
    """Of a step with at most so many tokens in at most so many prompts."""
    return max_tokens // BLOCK_SIZE + max_seqs


@dataclass(frozen=True, slots=True)
class EncoderBudget:
    """What an encoder takes. All sizes in bytes."""

    device: str
    available: int
    weights: int
    step: int
    """Activations, and one layer's keys and values."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int

    @property
    def block_size(self) -> int:
        """A place in a step is for a prompt of any length."""
        return self.max_model_len

    @property
    def num_blocks(self) -> int:
        """Places, of two steps."""
        return 2 * self.max_num_seqs

    def render(self) -> str:
        """The table, as aligned plain text."""
        rows = [
            ("weights", self.weights, ""),
            ("a step", self.step, f"at most, {self.tokens:,} tokens; nothing of it is kept"),
            (
                "free",
                self.available - self.weights - self.step,
                f"of {format_size(self.available)} available",
            ),
        ]
        lines = [f"Memory ({self.device}), no KV cache"]
        lines += [f"  {name:<12}{format_size(size):>12}  {note}".rstrip() for name, size, note in rows]
        return "\n".join(lines)

    @property
    def tokens(self) -> int:
        """Most of a step."""
        return max(self.max_num_batched_tokens, self.max_model_len)


def budget(
    config: EngineConfig,
    model: ModelConfig,
    info: PoolingInfo,
    *,
    weights: int,
    width: int,
    device: str,
    available: int,
) -> EncoderBudget:
    """The plan. Raises MemoryBudgetError for a model or a step that does not fit."""
    seqs, tokens = limits(config, device)
    length = longest_prompt(config, model, info)
    blocks = blocks_needed(max(tokens, length), seqs)
    step = encoder_bytes(model, tokens=max(tokens, length), width=width)
    step += 2 * blocks * BLOCK_SIZE * model.hidden_size * width
    plan = EncoderBudget(device, available, weights, step, length, seqs, tokens)
    if weights + step > available:
        raise MemoryBudgetError(
            f"The weights take {format_size(weights)}, a step of {plan.tokens} tokens up to "
            f"{format_size(step)}: more than the {format_size(available)} that are free.",
            param="--max-num-batched-tokens",
            advice="Lower --max-num-batched-tokens and --max-model-len, or use a smaller model or dtype.",
        )
    return plan
