"""Executors without a device: `FakeExecutor` for tests, `SimulatedExecutor` for virtual time and replay.

Both keep rows exactly as a real executor does, and check that the plans make sense; neither imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from penstock.core.cost import Coefficients, StepCost
from penstock.core.plan import Plan, PlanItem, StepResult, TokenLogprob

from .base import Capacity, Ticket

NextToken = Callable[[str, Sequence[int], int], int]
"""(request id, all known tokens, number generated so far) → next token id"""


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
        self._tokens: dict[str, list[int]] = {}
        self._prompt_len: dict[str, int] = {}
        self._wants: dict[str, tuple[int | None, int | None]] = {}
        self._applied = -1

    def capacity(self) -> Capacity:
        """As given."""
        return self._capacity

    def submit(self, plan: Plan) -> Ticket:
        """Bring rows up to date; the work itself is done by collect."""
        if plan.step != self._applied:
            self._apply(plan)
        return Ticket(plan.step, plan)

    def collect(self, ticket: Ticket) -> StepResult:
        """The step's tokens, and the seconds that the cost model predicts."""
        plan = ticket.payload
        if not isinstance(plan, Plan):
            raise TypeError(f"ticket {ticket} is not from this executor")
        tokens: dict[str, int] = {}
        logprobs: dict[str, TokenLogprob] = {}
        prompt_logprobs: dict[str, tuple[TokenLogprob, ...]] = {}
        for item in plan.items:
            row = self._tokens[item.request]
            end = item.start + item.tokens
            count, prompt_count = self._wants[item.request]
            if prompt_count is not None and item.start < self._prompt_len[item.request]:
                targets = row[item.start + 1 : min(end + 1, self._prompt_len[item.request])]
                prompt_logprobs[item.request] = tuple(_certain(token, prompt_count) for token in targets)
            if not item.sample:
                continue
            known = row[:end]
            token = self._next_token(item.request, known, end - self._prompt_len[item.request])
            tokens[item.request] = token
            if count is not None:
                logprobs[item.request] = _certain(token, count)
        for request, token in tokens.items():
            self._record(request, self._item(plan, request), token)
        return StepResult(
            step=plan.step,
            seconds=self._cost.predict(plan),
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def close(self) -> None:
        """Forget all rows."""
        self._tokens.clear()

    def _apply(self, plan: Plan) -> None:
        for request in plan.released:
            del self._tokens[request], self._prompt_len[request], self._wants[request]
        for admission in plan.admitted:
            self._tokens[admission.request] = list(admission.tokens)
            self._prompt_len[admission.request] = admission.prompt_len
            self._wants[admission.request] = (admission.params.logprobs, admission.params.prompt_logprobs)
        self._applied = plan.step

    def _record(self, request: str, item: PlanItem, token: int) -> None:
        row = self._tokens[request]
        del row[item.start + item.tokens :]  # a repeated step gives its token again
        row.append(token)

    @staticmethod
    def _item(plan: Plan, request: str) -> PlanItem:
        return next(item for item in plan.items if item.request == request)


class FakeExecutor(SimulatedExecutor):
    """A small simulated executor for tests; `failing` maps request ids to what breaks their step."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        vocab_size: int = 256,
        next_token: NextToken | None = None,
        failing: Mapping[str, Exception] | None = None,
    ) -> None:
        capacity = Capacity(num_blocks, block_size, vocab_size, Coefficients())
        super().__init__(capacity, next_token or echo)
        self.failing = dict(failing or {})

    def submit(self, plan: Plan) -> Ticket:
        """Raises what `failing` says if one of its requests is in the step."""
        ticket = super().submit(plan)
        for item in plan.items:
            if item.request in self.failing:
                raise self.failing[item.request]
        return ticket


def echo(request: str, known: Sequence[int], generated: int) -> int:
    """The prompt again, from its start."""
    prompt = known[: len(known) - generated] if generated else known
    return prompt[generated % len(prompt)]


def _certain(token: int, count: int) -> TokenLogprob:
    return TokenLogprob(token, 0.0, 1, ((token, 0.0),) if count else ())
