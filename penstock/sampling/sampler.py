"""One step's sampling: logits of the requests that want a token in, one token each out.

    logits [R, V] ─▶ raw copies where logprobs are asked for ─▶ edits ─▶ masks ─▶ forced ─▶ draws ─▶ logprobs

It knows what each request asks for, and has the device's table of operations draw and rank. It knows no
scheduler, no model and keeps nothing between steps. A row of broken logits fails alone, with its cause.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.core.plan import TokenLogprob
from penstock.kernels.operations import Operations

from .logits import edit
from .logprobs import gather_logprobs
from .masks import constrain
from .processors import Processors
from .state import SamplingState


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one request got."""

    token: int
    """-1 when there is an error."""
    logprob: TokenLogprob | None = None
    """Where the request asks for logprobs."""
    error: str | None = None
    """Why it could not be sampled."""


class Sampler:
    """Samples requests in a batch; what one gets does not depend on the others."""

    def __init__(self, operations: Operations, processors: Processors | None = None) -> None:
        """operations: of the device that the logits are on. processors: the user's own."""
        self._operations = operations
        self._processors = processors

    @property
    def waits(self) -> bool:
        """Whether it always needs to see the tokens before: users' processors do."""
        return self._processors is not None

    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
        """One token for each request.

        Args:
            logits: [R, V], of any floating type; float32 ones are edited in place, so not to be used
                afterwards.
            states: R of them, in the same order; their `tokens` do not contain the new token yet.

        Raises:
            ValueError: the shapes do not fit.
        """
        if logits.ndim != 2 or logits.shape[0] != len(states):
            raise ValueError(f"need logits of shape [{len(states)}, V], got {list(logits.shape)}.")
        if not states:
            return []
        asking = [i for i, state in enumerate(states) if state.params.logprobs is not None]
        editing = [i for i, state in enumerate(states) if state.edited]
        constrained = [i for i, state in enumerate(states) if state.grammar is not None]
        forced = {i: token for i, state in enumerate(states) if (token := state.forced) is not None}
        changed = bool(editing or constrained or forced or self._processors)
        raw = _raw(logits, asking, changed)
        failed: dict[int, str] = {}
        # a test of the device (no request has an empty name) is none of the user's processors' business
        processors = self._processors if states[0].request else None
        if editing or constrained or forced or processors is not None:
            logits = logits.float()
            edit(logits, states, editing)
        if processors is not None:
            logits = processors.apply(logits, states)
        if constrained:
            failed = constrain(logits, states, constrained)
        for i in forced.keys() - failed.keys():
            logits[i] = -math.inf
            logits[i, forced[i]] = 0.0
        tokens, checks = self._operations.sample(logits, [state.draw for state in states])
        broken = {
            i: failed.get(i) or _cause(logits[i], states[i])
            for i, check in enumerate(checks)
            if not math.isfinite(check)
        }
        asking_at = {i: at for at, i in enumerate(asking) if i not in broken}
        logprobs: dict[int, TokenLogprob] = {}
        if raw is not None and asking_at:
            chosen = raw if len(asking_at) == len(asking) else raw[list(asking_at.values())]
            counts = [states[i].params.logprobs or 0 for i in asking_at]
            named = [states[i].params.logprob_token_ids for i in asking_at]
            sampled = [tokens[i] for i in asking_at]
            gathered = gather_logprobs(self._operations, chosen, sampled, counts, named)
            logprobs = dict(zip(asking_at, gathered, strict=True))
        return [
            Sampled(-1, error=broken[i]) if i in broken else Sampled(token, logprobs.get(i))
            for i, token in enumerate(tokens)
        ]

    def draw(self, logits: Tensor, states: Sequence[SamplingState]) -> tuple[Tensor, Tensor]:
        """The same tokens without waiting for the device: (tokens int64 [R], checks float32 [R], finite where
        a row has a distribution), on the logits' device.

        Args:
            logits: as for `sample`.
            states: R of them, of requests whose answer needs nothing of the host (`SamplingState.waits`).
        """
        editing = [i for i, state in enumerate(states) if state.edited]
        if editing:
            logits = logits.float()
            edit(logits, states, editing)
        draws = [state.draw for state in states]
        choose = self._operations.choose
        if choose is not None:
            return choose(logits, draws)
        tokens, checks = self._operations.sample(logits, draws)
        device = logits.device
        return torch.tensor(tokens, device=device), torch.tensor(checks, device=device)


def _raw(logits: Tensor, asking: Sequence[int], changed: bool) -> Tensor | None:
    """The logits of the rows that ask for logprobs, safe from the edits; None if there are none."""
    if not asking:
        return None
    if len(asking) == len(logits) and (not changed or logits.dtype != torch.float32):
        return logits
    return logits[list(asking)]  # a copy


def _cause(logits: Tensor, state: SamplingState) -> str:
    """Why a row [V] has no distribution."""
    if bool(logits.isnan().any()):
        return (
            "logits contain NaN: the model's numbers overflowed or its weights are damaged; "
            "try --dtype float32 or bfloat16."
        )
    if bool(logits.isposinf().any()):
        return "logits contain +inf: the model's numbers overflowed; try --dtype float32 or bfloat16."
    if state.edited or state.grammar is not None:
        return (
            "no token may be generated: allowed_token_ids, min_tokens, stop tokens and structured_outputs "
            "exclude the whole vocabulary."
        )
    return "logits are -inf for the whole vocabulary: the model's weights are damaged."
