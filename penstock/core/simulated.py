"""An executor without a device: it takes the time of a cost model and gives the tokens of a function.

It keeps requests exactly as a real executor does, so that a plan which makes no sense breaks here, too. This
is what runs a scheduler under virtual time; nothing outside the core is needed for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from .cost import StepCost
from .executor import Capacity, Failures, Items, Ticket
from .plan import Admission, Outcome, Plan, PlanItem, StepResult, TokenLogprob
from .pooling import Vectors

NextToken = Callable[[str, Sequence[int], int], int]
"""(request id, all known tokens, number generated so far) → next token id"""

FEATURES = frozenset({"pooling", "adapter", "grammar", "inputs"})


@dataclass(slots=True)
class _Kept:
    """One admitted request."""

    admission: Admission
    tokens: list[int]
    blocks: list[int]


class SimulatedExecutor:
    """Takes the time that a cost model says, and gives the tokens that a function says.

    Args:
        capacity: sizes to report.
        next_token: which token comes next; see `echo`.
        cost: says how long a step takes.
    """

    def __init__(self, capacity: Capacity, next_token: NextToken, cost: StepCost | None = None) -> None:
        self._capacity = capacity
        self._next_token = next_token
        self._cost = cost or StepCost(capacity.prior)
        self._kept: dict[str, _Kept] = {}
        self._failures = Failures()

    def capacity(self) -> Capacity:
        """As given."""
        return self._capacity

    def submit(self, plan: Plan) -> Ticket:
        """Compute the step: there is nothing to wait for."""
        self._apply(plan)
        outcomes, regular = self._failures.run(plan.items, partial(self._run, plan.step))
        return Ticket(plan.step, StepResult(plan.step, self._cost.predict(plan), outcomes, regular))

    def collect(self, ticket: Ticket) -> StepResult:
        """The step's tokens, and the seconds that the cost model predicts."""
        if not isinstance(ticket.payload, StepResult):
            raise TypeError(f"ticket {ticket} is not from this executor")
        return ticket.payload

    def close(self) -> None:
        """Forget all requests."""
        self._kept.clear()

    def _apply(self, plan: Plan) -> None:
        for request in plan.released:
            self._kept.pop(request, None)  # it may have been lost before it came here
            self._failures.forget(request)
        for admission in plan.admitted:
            tokens = [*admission.prompt.token_ids, *admission.generated]
            self._kept[admission.request] = _Kept(admission, tokens, [])
        size = self._capacity.block_size
        for item in plan.items:
            kept = self._kept[item.request]
            kept.blocks.extend(item.blocks)
            if kept.admission.epoch != item.epoch or len(kept.blocks) * size < item.start + item.tokens:
                raise ValueError(f"step {plan.step}: {item} has {len(kept.blocks)} blocks of {size} tokens")

    def _run(self, step: int, items: Items) -> tuple[Sequence[Outcome], bool]:
        """Outcomes, and whether the step ran as planned."""
        return self._compute(items), True

    def _compute(self, items: Items) -> Sequence[Outcome]:
        return [self._outcome(item) for item in items]

    def _outcome(self, item: PlanItem) -> Outcome:
        kept = self._kept[item.request]
        spec, prompt_len = kept.admission.spec, len(kept.admission.prompt.token_ids)
        end = item.start + item.tokens
        wanted = spec.prompt_logprobs_of(kept.admission.index)
        about_prompt: tuple[TokenLogprob, ...] = ()
        if wanted is not None and not kept.admission.generated and item.start < prompt_len:
            targets = kept.tokens[item.start + 1 : min(end + 1, prompt_len)]
            about_prompt = tuple(_certain(token, wanted) for token in targets)
        if item.pools:
            return Outcome(prompt_logprobs=about_prompt, pooled=Vectors.of((1.0,)))
        here = end - len(item.drafts)
        known = kept.tokens if here == len(kept.tokens) else kept.tokens[:here]
        if len(known) + len(item.drafts) < end:
            raise ValueError(f"{item} reads tokens that are not known")
        made: list[int] = []
        for place in range(item.samples):
            made.append(self._next_token(item.request, known, len(known) - prompt_len))
            if place == len(item.drafts) or item.drafts[place] != made[-1]:
                break
            known = [*known, made[-1]]
        if made:
            del kept.tokens[end - len(item.drafts) :]
            kept.tokens += made
        count = None if spec.sampling is None else spec.sampling.logprobs
        logprobs = () if count is None else tuple(_certain(token, count) for token in made)
        return Outcome(tuple(made), logprobs, about_prompt)


def echo(request: str, known: Sequence[int], generated: int) -> int:
    """The prompt again, from its start."""
    prompt = known[: len(known) - generated] if generated else known
    return prompt[generated % len(prompt)]


def _certain(token: int, count: int) -> TokenLogprob:
    return TokenLogprob(token, 0.0, 1, ((token, 0.0),) if count else ())
