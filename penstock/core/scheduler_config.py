"""What bounds a scheduler: plain numbers, decided before it is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of the scheduler. All counts are per engine."""

    max_num_seqs: int
    """Most requests in one step."""
    max_num_batched_tokens: int
    """Token budget of one step."""
    max_model_len: int
    """Longest sequence, prompt and output together."""
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = 0
    """Most tokens of one prompt in one step; 0 means no limit of its own."""
    max_num_mixed_prefill_tokens: int = 0
    """Most tokens of all prompts in a step that also decodes, besides PROMPT_TOKENS_PER_DECODE for each
    request that does; 0 means no limit of its own."""
    policy: str = "fcfs"
    max_num_queued_reqs: int | None = None
    """Most requests left waiting after a step was planned."""
    max_num_queued_tokens: int | None = None
    """Most prompt tokens left waiting after a step was planned."""
    whole_prompts: bool = False
    """Of encoders: a prompt is computed whole, in one step. One that is longer than the token budget has a
    step of its own."""
    slo_ttft: float | None = None
    """Seconds to a first token that background work is not to endanger; None: no limit by time."""
    slo_itl: float | None = None
    """The same between two tokens."""
    watermark: float = 0.01
    """Share of blocks that admission leaves to the requests that already run."""
