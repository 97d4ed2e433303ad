"""What a step costs: predict its duration, learn from what it took, and divide it among its requests.

The model of a step's duration is linear in what the step makes the device do:

    seconds ≈ fixed                  weights read once, kernel launches
            + per_token   × tokens   matrix products of every position computed
            + per_context × context  keys and values read by attention, Σ over positions of (position + 1)
            + per_sample  × samples  logits and sampling of the positions that yield a token

It starts from a prior (the device's roofline, given by the executor) and is refitted on line by non-negative
least squares on relative errors, with exponential forgetting. Pure arithmetic: no clock, no randomness, so
the same log of steps gives the same predictions.

Attribution: each request pays for its own tokens, context and samples by the model's coefficients, and an
equal part of the fixed cost; the parts are scaled so that they add up to the measured seconds exactly. Copies
of a preempted request are paid by all who are in the step: it yields to them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .plan import Plan

Features = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Seconds per unit of each feature; all non-negative."""

    fixed: float = 1e-3
    per_token: float = 1e-4
    per_context: float = 1e-8
    per_sample: float = 1e-5
    per_copy: float = 0.0
    """Seconds to copy one block between device and host, either way: measured once, not learnt."""

    def as_tuple(self) -> Features:
        """In the order of the features."""
        return (self.fixed, self.per_token, self.per_context, self.per_sample)


def plan_features(plan: Plan) -> Features:
    """Of a whole step; the fixed cost counts once."""
    load = plan.load
    return (1.0, float(load.tokens), float(load.context), float(load.samples))


class StepCost:
    """The cost model of one device.

    Args:
        prior: where to start, usually from the roofline.
        forgetting: weight of the past at each step; 0.99 remembers about the last hundred steps.
        ridge: strength of the pull to the prior, in steps.
        every: refit after this many observations.
    """

    def __init__(
        self,
        prior: Coefficients | None = None,
        *,
        forgetting: float = 0.99,
        ridge: float = 0.05,
        every: int = 8,
    ) -> None:
        self.prior = prior or Coefficients()
        self.coefficients = self.prior
        self.observed = 0
        self._forgetting = forgetting
        self._ridge = ridge
        self._every = every
        # Normal equations in units of the prior: the unknowns are coefficient / prior, 1 to begin with.
        self._gram = [[0.0] * 4 for _ in range(4)]
        self._right = [0.0] * 4

    def predict(self, plan: Plan) -> float:
        """Expected duration of the step in seconds."""
        if not plan.items:
            return 0.0
        computing = sum(
            value * weight
            for value, weight in zip(plan_features(plan), self.coefficients.as_tuple(), strict=True)
        )
        return computing + self.copied(plan.copies)

    def copied(self, blocks: int) -> float:
        """Seconds of copying so many blocks to the host, or from it."""
        return blocks * self.coefficients.per_copy

    def recomputed(self, tokens: int) -> float:
        """Seconds of computing the first so many tokens of a request again, in steps that run anyway."""
        costs = self.coefficients
        return costs.per_token * tokens + costs.per_context * (tokens * (tokens + 1) // 2)

    def observe(self, plan: Plan, seconds: float) -> None:
        """Learn from a finished step. One that also copied says nothing of what computing takes."""
        if not plan.items or seconds <= 0.0 or plan.copies:
            return
        row = [
            value * weight / seconds
            for value, weight in zip(plan_features(plan), self.prior.as_tuple(), strict=True)
        ]
        for i in range(4):
            for j in range(4):
                self._gram[i][j] = self._gram[i][j] * self._forgetting + row[i] * row[j]
            self._right[i] = self._right[i] * self._forgetting + row[i]
        self.observed += 1
        if self.observed <= self._every or self.observed % self._every == 0:
            self._refit()

    def attribute(self, plan: Plan, seconds: float) -> list[float]:
        """Seconds of the step for each of its items; they add up to `seconds` (to rounding)."""
        if not plan.items:
            return []
        fixed, per_token, per_context, per_sample = self.coefficients.as_tuple()
        presence = fixed / len(plan.items)
        weights = [
            presence + per_token * count + per_context * context + per_sample * samples
            for (_, _, _, count, _, samples, _, _), context in zip(plan.items, plan.contexts, strict=True)
        ]
        total = sum(weights)
        if total <= 0.0:
            weights, total = [float(item.tokens) for item in plan.items], float(plan.tokens)
        scale = seconds / total
        return [scale * weight for weight in weights]

    def _refit(self) -> None:
        """Non-negative least squares by coordinate descent: four unknowns, so a few sweeps will do."""
        prior = self.prior.as_tuple()
        now = [
            value / base if base > 0 else 0.0
            for value, base in zip(self.coefficients.as_tuple(), prior, strict=True)
        ]
        for _ in range(30):
            for i in range(4):
                rest = sum(self._gram[i][j] * now[j] for j in range(4) if j != i)
                now[i] = max(0.0, (self._right[i] + self._ridge - rest) / (self._gram[i][i] + self._ridge))
        learnt = [value * base for value, base in zip(now, prior, strict=True)]
        self.coefficients = replace(Coefficients(*learnt), per_copy=self.prior.per_copy)


@dataclass(slots=True)
class DeviceMeter:
    """Where the device's time went since `started`: Σ requests + idle == wall × devices.

    `busy` is the sum of all steps' seconds, which the requests' bills add up to; `idle` is the rest of the
    wall time.
    """

    started: float
    devices: int = 1
    busy: float = 0.0

    def step(self, seconds: float) -> None:
        """Account for one finished step."""
        self.busy += seconds * self.devices

    def idle(self, now: float) -> float:
        """Device seconds without work, from the start to `now`."""
        return max(0.0, (now - self.started) * self.devices - self.busy)
