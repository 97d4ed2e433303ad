"""What one step is to do, what it did, and what that means for each request: plain, frozen data.

    Scheduler.schedule(now) ──▶ Plan ──▶ Executor ──▶ StepResult ──▶ Scheduler.commit(…) ──▶ [Event]

A plan is a diff: an executor keeps the token ids, parameters and block table of every admitted request
(a *row*), and a plan tells it which rows to make, extend, compute and drop. Everything is ints, floats,
strings and tuples, and survives a JSON round trip: a log of plans is the replay format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .request import FinishReason
from .sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that joins the running set, for the first time or again after a preemption."""

    request: str
    tokens: tuple[int, ...]
    """All known token ids: the prompt, and what was generated before a preemption."""
    prompt_len: int
    params: SamplingParams
    eos_ids: tuple[int, ...] = ()
    """Ids that `min_tokens` holds back beside the stop ids."""


@dataclass(frozen=True, slots=True)
class PlanItem:
    """One request's part in a step: compute tokens [start, start + tokens) of it."""

    request: str
    start: int
    """First position to compute; keys and values of everything before it are in its blocks."""
    tokens: int
    """How many positions to compute."""
    blocks: tuple[int, ...]
    """Block ids to append to the request's block table before this step."""
    sample: bool
    """Whether the last position's logits are to be sampled."""

    @property
    def context(self) -> int:
        """Keys read by this item's queries together: Σ over its positions of (position + 1)."""
        return self.tokens * self.start + self.tokens * (self.tokens + 1) // 2


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. Items stand in the order in which their tokens lie in the flattened batch."""

    step: int
    admitted: tuple[Admission, ...] = ()
    items: tuple[PlanItem, ...] = ()
    released: tuple[str, ...] = ()
    """Rows to drop before anything else: finished, aborted or preempted requests."""

    @property
    def tokens(self) -> int:
        """Number of positions computed by this step."""
        return sum(item.tokens for item in self.items)

    def to_json(self) -> str:
        """One line of JSON, byte-identical for equal plans."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of to_json."""
        raw = json.loads(text)
        return cls(
            step=raw["step"],
            admitted=tuple(_admission(entry) for entry in raw["admitted"]),
            items=tuple(PlanItem(**{**entry, "blocks": tuple(entry["blocks"])}) for entry in raw["items"]),
            released=tuple(raw["released"]),
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one position: the token that stands there, and the most probable ones."""

    token: int
    logprob: float
    rank: int
    """1 for the most probable token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), most probable first."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an executor made of a plan."""

    step: int
    seconds: float
    """Device time of the step, on the executor's clock."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Sampled token id of each request whose item said `sample`."""
    logprobs: Mapping[str, TokenLogprob] = field(default_factory=dict)
    """For requests that ask for logprobs: of the sampled token."""
    prompt_logprobs: Mapping[str, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    """For requests that ask for them: of the prompt tokens at positions [start + 1, start + tokens], as far
    as they are prompt tokens. (Position 0 has none.)"""
    errors: Mapping[str, str] = field(default_factory=dict)
    """Requests that failed in this step, with the cause."""
    error_types: Mapping[str, str] = field(default_factory=dict)
    """Name of the class in core.errors, for those of `errors` that are not plain RequestFailed."""
    tainted: frozenset[str] = frozenset()
    """Those of `errors` whose keys and values are not to be trusted, earlier steps' included."""
    regular: bool = True
    """False when the step did not run as planned (it was repeated in parts): its duration teaches nothing."""


@dataclass(frozen=True, slots=True)
class Event:
    """What a commit means for one request."""

    request: str
    tokens: tuple[int, ...] = ()
    """Newly generated token ids."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `tokens`, where asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """All at once, with the first token, where asked for."""
    finish: FinishReason | None = None
    stop_reason: int | None = None
    """The stop token id, if one of the request's stop_token_ids ended it."""
    error: str | None = None
    """The cause, when finish is ERROR."""
    error_type: str = "RequestFailed"
    """Name of the exception class in core.errors to raise for it."""
    retry_after: int | None = None
    """Seconds, for errors that may pass."""
    at: float = 0.0
    """When, on the engine's clock (seconds)."""
    scheduled_at: float | None = None
    """When it was first put into a plan (None if never)."""
    cached: int = 0
    """Prompt tokens served from the prefix cache."""
    device_seconds: float = 0.0
    """Its share of the device's time so far, as attributed by core.cost."""
    preemptions: int = 0


def _admission(raw: dict[str, Any]) -> Admission:
    params = dict(raw["params"])
    # JSON has only string keys
    params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    for name in ("stop", "stop_token_ids", "allowed_token_ids"):
        params[name] = tuple(params[name]) if params[name] is not None else None
    return Admission(
        request=raw["request"],
        tokens=tuple(raw["tokens"]),
        prompt_len=raw["prompt_len"],
        params=SamplingParams(**params),
        eos_ids=tuple(raw["eos_ids"]),
    )
