"""The HorizontalPodAutoscaler's algorithm and KEDA's part before it, over replicas of an engine.

Kubernetes: pkg/controller/podautoscaler (replica_calculator.go: GetExternalPerPodMetricReplicas;
horizontal.go: stabilizeRecommendationWithBehaviors, convertDesiredReplicasWithBehaviorRate), sync period
15 s, tolerance 0.1.
KEDA: pkg/scaling/executor/scale_scaledobjects.go (0 to 1 when active; to 0 after cooldownPeriod) and
pkg/fallback/fallback.go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .evaluate import Samples, evaluate

SYNC = 15
TOLERANCE = 0.1


@dataclass
class Engines:
    """Replicas with slots for requests; users who always have one request under way."""

    slots: int
    """--max-num-seqs."""
    load_time: int
    floor: int = 1
    by_cache: int | None = None
    """Requests at which the KV cache of a replica is full, where that comes first."""
    burst: list[int] = field(default_factory=list)
    """When each replica of the burst was started."""

    def ready(self, now: int) -> int:
        return self.floor + sum(now - start >= self.load_time for start in self.burst)

    def samples(self, now: int, users: int) -> Samples:
        """What a scrape sees: running and waiting requests, evenly over replicas that are ready."""
        room = min(self.slots, self.by_cache or self.slots)
        ready = self.ready(now)
        found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for index in range(ready):
            mine = users // ready + (index < users % ready)
            labels = (("namespace", "llm-serving"), ("job", "chat"), ("pod", f"chat-{index}"))
            found["vllm:num_requests_running", labels] = min(mine, room)
            found["vllm:num_requests_waiting", labels] = max(0, mine - room)
            found["vllm:kv_cache_usage_perc", labels] = min(mine, room) / room if self.by_cache else 0.1
        where = (("namespace", "llm-serving"), ("deployment", "chat-burst"))
        found["kube_deployment_spec_replicas", where] = len(self.burst)
        return found


@dataclass
class Autoscaler:
    """An HPA with its behaviour, on external metrics with AverageValue; with KEDA around it, or alone."""

    metrics: list[tuple[str, float]]
    """(query, threshold)."""
    least: int
    most: int
    behavior: Mapping[str, Any]
    cooldown: int | None = None
    """KEDA's; None without KEDA."""
    fallback: bool = True
    recommendations: list[tuple[int, int]] = field(default_factory=list)
    events: list[tuple[int, int]] = field(default_factory=list)
    """(when, replicas added; taken away if negative)."""
    active_at: int | None = None

    def sync(self, now: int, current: int, samples: Samples | None) -> int:
        """Replicas from now on. samples: None where Prometheus does not answer."""
        values = [None if samples is None else evaluate(query, samples) for query, _ in self.metrics]
        if self.cooldown is not None:
            if any(value is not None and value > 0 for value in values):
                self.active_at = now
                if current == 0:
                    return self._done(now, 0, max(1, self.least))
            elif (
                current
                and self.least == 0
                and None not in values
                and self.active_at is not None
                and now - self.active_at > self.cooldown
            ):
                return self._done(now, current, 0)
        if current == 0:
            return 0  # an HPA is switched off at 0
        wanted = [
            self._replicas(value, threshold, current)
            for value, (_, threshold) in zip(values, self.metrics, strict=True)
        ]
        if any(each is None for each in wanted):
            # metrics that fail take part as "as many as there are"; those that answer may only add
            known = [each for each in wanted if each is not None and each > current]
            desired = max(known, default=current)
        else:
            desired = max(each for each in wanted if each is not None)
        desired = max(max(1, self.least), min(self.most, desired))
        return self._done(now, current, self._limited(now, current, self._stable(now, current, desired)))

    def _replicas(self, value: float | None, threshold: float, current: int) -> int | None:
        if value is None:
            return None
        if abs(value / (threshold * current) - 1) <= TOLERANCE:
            return current
        return math.ceil(round(value * 1000) / 1000 / threshold)

    def _stable(self, now: int, current: int, desired: int) -> int:
        up_window = self.behavior["scaleUp"]["stabilizationWindowSeconds"]
        down_window = self.behavior["scaleDown"]["stabilizationWindowSeconds"]
        up = down = desired
        for when, each in self.recommendations:
            if now - when < up_window:
                up = min(up, each)
            if now - when < down_window:
                down = max(down, each)
        self.recommendations.append((now, desired))
        result = current
        if result < up:
            result = up
        if result > down:
            result = down
        return result

    def _limited(self, now: int, current: int, desired: int) -> int:
        side = "scaleUp" if desired > current else "scaleDown"
        sign = 1 if desired > current else -1
        result = current
        for policy in self.behavior[side]["policies"]:
            assert policy["type"] == "Pods"
            period = policy["periodSeconds"]
            lately = sum(
                count for when, count in self.events if now - when < period and (count > 0) == (sign > 0)
            )
            result = current - lately + sign * policy["value"]
        # nobody is brought back because others have just gone, nor the other way round
        return min(desired, max(current, result)) if sign > 0 else max(desired, min(current, result))

    def _done(self, now: int, current: int, new: int) -> int:
        if new != current:
            self.events.append((now, new - current))
        return new


def run(
    scaler: Autoscaler,
    engines: Engines,
    users: Callable[[int], int],
    seconds: int,
    answers: Callable[[int], bool] = lambda now: True,
    scrape: int = 15,
) -> list[tuple[int, int]]:
    """(when, replicas of the burst that are asked for), at every change."""
    history = [(0, len(engines.burst))]
    seen: list[Samples] = []
    for now in range(0, seconds, SYNC):
        seen.append(engines.samples(now, users(now)))
        late = seen[max(0, len(seen) - 1 - scrape // SYNC)]  # the last scrape
        count = scaler.sync(now, len(engines.burst), late if answers(now) else None)
        while len(engines.burst) < count:
            engines.burst.append(now)
        del engines.burst[count:]
        if count != history[-1][1]:
            history.append((now, count))
    return history
