"""A small simulated executor for tests, whose steps break on demand, and short ways to make messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from penstock.core.cost import Coefficients
from penstock.core.executor import Capacity, Items
from penstock.core.plan import Outcome
from penstock.core.request_spec import Prompt, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.core.simulated import FEATURES, NextToken, SimulatedExecutor, echo
from penstock.engine.executor.recovery import Recovery
from penstock.engine.messages import Add


class VirtualClock:
    """Time that passes only when a step says so."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        """Virtual seconds."""
        return self._now

    def spent(self, seconds: float) -> None:
        """Move on."""
        self._now += seconds


class FakeExecutor(SimulatedExecutor):
    """`failing` maps request ids to what breaks a step that they are in; `probe` tests the device."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        vocab_size: int = 256,
        next_token: NextToken | None = None,
        failing: Mapping[str, Exception] | None = None,
        probe: Callable[[], None] | None = None,
        host_blocks: int = 0,
    ) -> None:
        capacity = Capacity(num_blocks, block_size, vocab_size, Coefficients(), FEATURES, host_blocks)
        super().__init__(capacity, next_token or echo)
        self.failing = dict(failing or {})
        self.clock = VirtualClock(100.0)
        self.recovery = Recovery(self._compute, self.clock, probe)

    def _run(self, step: int, items: Items) -> tuple[Sequence[Outcome], bool]:
        return self.recovery.run(step, items)

    def _compute(self, items: Items) -> Sequence[Outcome]:
        for item in items:
            if item.request in self.failing:
                raise self.failing[item.request]
        return super()._compute(items)


def spec(
    name: str,
    prompt: Sequence[int] = (1, 2, 3),
    max_tokens: int = 3,
    *,
    n: int = 1,
    priority: int = 0,
    **sampling: object,
) -> RequestSpec:
    """A request; further arguments are Sampling's."""
    return RequestSpec(
        id=name,
        prompts=(Prompt(tuple(prompt), max_tokens),),
        sampling=Sampling(**sampling),  # type: ignore[arg-type]
        n=n,
        priority=priority,
    )


def add(name: str, prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 3, **fields: object) -> Add:
    """A message that brings such a request."""
    return Add(spec(name, prompt, max_tokens, **fields))  # type: ignore[arg-type]
