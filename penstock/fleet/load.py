"""What a replica does under load: how many requests are under way, how long each takes, where it ends.

An estimate of averages and tails, for sizing; `penstock simulate` runs the scheduler itself. Formulas:

    requests under way   b = rate x output x step(b) / (1 - rate x prefill)      (Little's law)
    wait for a prefill   P(W > t) = u exp(-2 (1 - u) t / s)                      (M/D/1, heavy traffic)
        s: the service of a prompt, which is its prefill and a step of those that decode; u = rate x s
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .roofline import Machine

BUSY = 0.85
"""Share of the capacity that is planned to be used at most: above it, requests queue (the documents' band is
70 to 85 %)."""
IDLE = 0.70
"""Share below which there is more than is needed."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one kind."""

    rate: float
    """Requests a second, on average."""
    prompt: int
    """Tokens."""
    output: int
    """Tokens."""
    peak: float
    """Requests a second, at the busiest."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds; None where there is no target. Names as in the spec's `slo`."""

    ttft_p95: float | None = None
    ttft_p99: float | None = None
    itl_p95: float | None = None
    itl_p99: float | None = None
    e2e_p95: float | None = None
    e2e_p99: float | None = None

    def given(self) -> dict[str, float]:
        """Those that there are."""
        names = self.__slots__
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class Point:
    """One replica at one rate; seconds."""

    rate: float
    sequences: float
    """Under way."""
    utilisation: float
    """Of what the replica can do at most."""
    ttft_p50: float
    ttft_p95: float
    ttft_p99: float
    tpot: float
    e2e_p50: float
    e2e_p95: float
    e2e_p99: float
    tokens_per_second: float
    """Output tokens, of all requests together."""

    def of(self, target: str) -> float:
        """What stands against a target."""
        return self.tpot if target.startswith("itl") else float(getattr(self, target))


@dataclass(frozen=True, slots=True)
class Replica:
    """A machine and how many requests it may have under way."""

    machine: Machine
    most: int
    """Sequences: what the KV cache holds, or --max-num-seqs."""
    prompt: int
    output: int
    stages: int = 1
    """Parts of the layers, one after the other on devices of their own (pipeline parallel): each computes
    another part of the requests at a time. A token takes all of them in turn, as one machine that had all
    layers would take, for that part of the requests."""

    @property
    def capacity(self) -> float:
        """Requests a second at most."""
        if self.most < 1:
            return 0.0
        if not self.output:
            return self.stages / self.machine.prefill(self.prompt)
        together = self.most / self.stages
        return self.stages * together / self.machine.round(together, self.prompt, self.output)

    def floor(self, target: str) -> float:
        """What no number of replicas goes below: a request alone."""
        first = self.machine.prefill(self.prompt)
        each = self.machine.decode(1, self.prompt + self.output / 2) if self.output else 0.0
        if target.startswith("ttft"):
            return first
        return each if target.startswith("itl") else first + self.output * each

    def at(self, rate: float) -> Point | None:
        """Under that rate; None where it is more than it can do."""
        machine, prompt, output = self.machine, self.prompt, self.output
        whole = machine.prefill(prompt) - machine.efficiency.step
        busy = rate * whole / self.stages
        if busy >= 1 or self.most < 1 or rate >= self.capacity:
            return None
        sequences = 1e-9
        for _ in range(200):
            together = max(1.0, sequences / self.stages)
            step = machine.decode(together, prompt + output / 2) if output else 0.0
            wanted = rate * output * step / (1 - busy)
            if wanted > self.most:
                return None
            if abs(wanted - sequences) <= 1e-6 * max(1.0, wanted):
                break
            sequences = wanted
        tpot = step / (1 - busy)
        service = whole + machine.efficiency.step + step
        each = service / self.stages  # what the next one waits for
        used = min(0.999, rate * each) if output else busy

        def wait(share: float) -> float:
            return max(0.0, each / (2 * (1 - used)) * math.log(used / (1 - share))) if used > 0 else 0.0

        waits = {share: wait(share) for share in (0.5, 0.95, 0.99)}
        first = {share: waits[share] + service for share in waits}
        return Point(
            rate=rate,
            sequences=max(sequences, rate * first[0.5]),
            utilisation=rate / self.capacity,
            ttft_p50=first[0.5],
            ttft_p95=first[0.95],
            ttft_p99=first[0.99],
            tpot=tpot,
            e2e_p50=first[0.5] + output * tpot,
            e2e_p95=first[0.95] + output * tpot,
            e2e_p99=first[0.99] + output * tpot,
            tokens_per_second=rate * output,
        )

    def holds(self, rate: float, targets: Targets) -> bool:
        """Whether it keeps every target at that rate, at BUSY or less of its capacity."""
        point = self.at(rate)
        if point is None or point.utilisation > BUSY:
            return False
        return all(point.of(name) <= value for name, value in targets.given().items())

    def usable(self, targets: Targets) -> float:
        """The most requests a second with every target kept; 0 for none."""
        low, high = 0.0, BUSY * self.capacity
        if self.holds(high * (1 - 1e-9), targets):
            return high
        for _ in range(24):
            middle = (low + high) / 2
            if self.holds(middle, targets):
                low = middle
            else:
                high = middle
        return low
