"""What one step is to do, what it did, and what that means for each request: plain, frozen data.

    Scheduler.schedule(now) ──▶ Plan ──▶ Executor ──▶ StepResult ──▶ Scheduler.commit(…) ──▶ [Event]

A plan is a diff: an executor keeps the tokens and the block table of every admitted request, and a plan tells
it whom to take in, extend, compute and let go. Everything is ints, floats, strings and tuples. A log of plans
is the replay format; it names specifications by id, as each is written once, when it arrives.

What is made for every request in every step is a named tuple: as frozen as a frozen dataclass, made in a
third of the time, and sent without its field names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from .pooling import Vectors
from .request_spec import FinishReason, Prompt, RequestSpec


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that joins the running set, for the first time or again after a preemption."""

    request: str
    epoch: int
    """Number of this admission, unique in a scheduler's life."""
    spec: RequestSpec
    index: int
    """Which of the specification's sequences it is."""
    generated: tuple[int, ...] = ()
    """What it had generated before a preemption."""

    @property
    def prompt(self) -> Prompt:
        """Its prompt."""
        return self.spec.prompt_of(self.index)

    def without_prompts(self) -> Admission:
        """For logs: keeping it keeps no prompt."""
        return replace(self, spec=RequestSpec(id=self.spec.id, prompts=()))


class PlanItem(NamedTuple):
    """One request's part in a step: compute positions [start, start + tokens) of it."""

    request: str
    epoch: int
    """Of its admission."""
    start: int
    """First position to compute; keys and values of everything before it are in its blocks."""
    tokens: int
    """How many positions to compute."""
    blocks: tuple[int, ...] = ()
    """Block ids to append to the request's block table before this step."""
    samples: int = 0
    """How many positions are sampled: the last ones. Over 1, each but the first verifies a draft."""
    drafts: tuple[int, ...] = ()
    """Guessed ids of the last `samples - 1` positions, which are not known yet."""
    pools: bool = False
    """Whether the prompt ends here, and its vector is wanted."""


Copy = tuple[int, int]
"""(from this block, to that one): of the device to the host's, or the other way round."""


class Load(NamedTuple):
    """How much a step computes."""

    tokens: int
    """Positions."""
    context: int
    """Keys read by all queries together."""
    samples: int


@dataclass(frozen=True)
class Plan:
    """One step. Items stand in the order in which their tokens lie in the flattened batch."""

    step: int
    admitted: tuple[Admission, ...] = ()
    items: tuple[PlanItem, ...] = ()
    released: tuple[str, ...] = ()
    """Requests to let go before anything else: finished, aborted or preempted ones."""
    swap_out: tuple[Copy, ...] = ()
    """(device block, host block): copied before anything is computed or copied back."""
    swap_in: tuple[Copy, ...] = ()
    """(host block, device block): copied before anything is computed."""

    @property
    def copies(self) -> int:
        """Blocks that are copied between device and host."""
        return len(self.swap_out) + len(self.swap_in)

    @cached_property
    def contexts(self) -> tuple[int, ...]:
        """Keys read by each item's queries together: Σ over its positions of (position + 1)."""
        return tuple(
            count * start + count * (count + 1) // 2 for _, _, start, count, _, _, _, _ in self.items
        )

    @cached_property
    def load(self) -> Load:
        """Sums over the items."""
        tokens = samples = 0
        for _, _, _, count, _, sampled, _, _ in self.items:
            tokens += count
            samples += sampled
        return Load(tokens, sum(self.contexts), samples)

    @property
    def tokens(self) -> int:
        """Number of positions computed by this step."""
        return self.load.tokens

    def record(self) -> dict[str, Any]:
        """As it is logged: specifications by their ids, and copies only where there are any."""
        copies = {"swap_out": self.swap_out, "swap_in": self.swap_in} if self.copies else {}
        return copies | {
            "step": self.step,
            "admitted": [
                {
                    "request": each.request,
                    "epoch": each.epoch,
                    "spec": each.spec.id,
                    "index": each.index,
                    "generated": each.generated,
                }
                for each in self.admitted
            ],
            "items": [item._asdict() for item in self.items],
            "released": self.released,
        }

    def to_json(self) -> str:
        """One line of JSON, byte-identical for equal plans."""
        return json.dumps(self.record(), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, specs: Mapping[str, RequestSpec]) -> Plan:
        """The inverse of to_json, given the specifications by their ids."""
        raw = json.loads(text)
        return cls(
            step=raw["step"],
            admitted=tuple(
                Admission(
                    request=entry["request"],
                    epoch=entry["epoch"],
                    spec=specs[entry["spec"]],
                    index=entry["index"],
                    generated=tuple(entry["generated"]),
                )
                for entry in raw["admitted"]
            ),
            items=tuple(
                PlanItem(**{**entry, "blocks": tuple(entry["blocks"]), "drafts": tuple(entry["drafts"])})
                for entry in raw["items"]
            ),
            released=tuple(raw["released"]),
            swap_out=tuple((source, target) for source, target in raw.get("swap_out", ())),
            swap_in=tuple((source, target) for source, target in raw.get("swap_in", ())),
        )


class TokenLogprob(NamedTuple):
    """Log-probability of one position: the token that stands there, and the most probable ones."""

    token: int
    logprob: float
    rank: int
    """1 for the most probable token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), most probable first."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request ended without an answer."""

    cause: str
    """What happened, and which value."""
    type: str = "RequestFailed"
    """Name of the exception class in core.errors to raise for it."""
    param: str | None = None
    """The field or setting at fault."""
    advice: str = ""
    retry_after: int | None = None
    """Seconds, for what may pass."""
    tainted: bool = False
    """Its keys and values are not to be trusted, those of earlier steps included."""


class Outcome(NamedTuple):
    """What a step made of one plan item."""

    tokens: tuple[int, ...] = ()
    """Sampled ids, in order: none where nothing was sampled; one; with drafts those that were right, and the
    one after them."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `tokens`, for requests that ask for them."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """For requests that ask for them: of the prompt tokens at positions [start + 1, start + tokens], as far
    as they are prompt tokens. (Position 0 has none.)"""
    pooled: Vectors | None = None
    """The prompt's vector, or those of its tokens, where the item pools."""
    failure: Failure | None = None
    """Then nothing else counts."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an executor made of a plan."""

    step: int
    seconds: float
    """Device time of the step, on the executor's clock."""
    outcomes: tuple[Outcome, ...]
    """In the order of the plan's items."""
    regular: bool = True
    """False when the step did not run as planned (it was repeated in parts): its duration teaches nothing."""


class Event(NamedTuple):
    """What a commit means for one request."""

    request: str
    tokens: tuple[int, ...] = ()
    """Newly generated token ids."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `tokens`, where asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """All at once, with the first token, where asked for."""
    pooled: Vectors | None = None
    """The prompt's vector, or those of its tokens, where asked for."""
    finish: FinishReason | None = None
    stop_reason: int | None = None
    """The stop token id, if one of the request's stop_token_ids ended it."""
    failure: Failure | None = None
    """Why, when finish is ERROR."""
    at: float = 0.0
    """When, on the engine's clock (seconds)."""
    scheduled_at: float | None = None
    """When it was first put into a plan (None if never)."""
    cached: int = 0
    """Prompt tokens served from the prefix cache."""
    device_seconds: float = 0.0
    """Its share of the device's time so far, as attributed by core.cost; final with `finish`."""
    preemptions: int = 0
