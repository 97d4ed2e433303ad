"""What an executor keeps of an admitted request, and which hidden states of a step it needs for whom."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from penstock.core.executor import Items
from penstock.core.plan import Admission, Outcome
from penstock.core.request_spec import RequestSpec
from penstock.kernels.attention import StepLayout
from penstock.sampling.state import SamplingState


@dataclass(slots=True, eq=False)
class Kept:
    """One admitted request."""

    spec: RequestSpec
    tokens: list[int]
    """Those whose ids the host knows; `state.pending` more are on the device."""
    prompt_len: int
    blocks: array[int]
    state: SamplingState | None
    """None where nothing is sampled."""
    prompt_logprobs: int | None
    """How many are wanted of each prompt position."""
    slot: int | None = None
    """Where on the device its last token is, since one was sampled there."""
    failure: Outcome | None = None
    """It has failed: this is its outcome in every step that still has it."""
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    """By first position, the hidden states of the chunks of a prompt that is pooled as a whole."""

    @property
    def pools_all(self) -> bool:
        """Whether its vectors are of more than its last position."""
        return self.spec.pooling is not None and self.spec.pooling.needs_all

    @property
    def pending(self) -> int:
        """Tokens whose ids only the device knows."""
        return self.state.pending if self.state is not None else 0


@dataclass(slots=True)
class Wanted:
    """Which hidden states a step needs, and for what; items by their place in the step."""

    rows: list[int] = field(default_factory=list)
    """Flat rows, ascending."""
    sampled: list[tuple[int, int]] = field(default_factory=list)
    """(item, index in `rows` of its first sampled position)"""
    prompts: list[tuple[int, int]] = field(default_factory=list)
    """(item that wants logprobs of its prompt, index of its first position)"""
    pooled: list[tuple[int, int]] = field(default_factory=list)
    """(item, index of its first position that is pooled)"""

    @classmethod
    def of(cls, items: Items, kept: Sequence[Kept], layout: StepLayout) -> Wanted:
        """Of a step."""
        wanted = cls()
        rows = wanted.rows
        starts, lasts = layout.query_starts, layout.last_rows
        for place, (item, each) in enumerate(zip(items, kept, strict=True)):
            if each.prompt_logprobs is not None and item.start < each.prompt_len:
                wanted.prompts.append((place, len(rows)))
                rows.extend(range(starts[place], lasts[place] + 1))
            elif item.samples > 1:
                rows.extend(range(lasts[place] + 1 - item.samples, lasts[place] + 1))
            elif each.pools_all:
                rows.extend(range(starts[place], lasts[place] + 1))
            elif item.samples or item.pools:
                rows.append(lasts[place])
            if item.samples:
                wanted.sampled.append((place, len(rows) - item.samples))
            if each.pools_all:
                wanted.pooled.append((place, len(rows) - item.tokens))
            elif item.pools:
                wanted.pooled.append((place, len(rows) - 1))
        return wanted


def keep(admission: Admission, sibling: SamplingState | None = None) -> Kept:
    """sibling: of the same request; what its parameters became is shared."""
    spec, ids = admission.spec, admission.prompt.token_ids
    tokens = [*ids, *admission.generated]
    state = None
    if spec.sampling is not None:
        state = SamplingState(
            request=admission.request,
            params=spec.sampling,
            prompt_len=len(ids),
            tokens=tokens,
            eos_ids=spec.eos_ids,
            seed=spec.seed_of(admission.index) or 0,
            sharing=sibling,
        )
    # after a preemption, the prompt's logprobs were delivered before it
    about_prompt = None if admission.generated else spec.prompt_logprobs_of(admission.index)
    return Kept(spec, tokens, len(ids), array("q"), state, about_prompt)
