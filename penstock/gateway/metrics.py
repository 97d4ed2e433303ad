"""The gateway's metrics for Prometheus: the objects behind the names of `observe/gateway_names.py`."""

from __future__ import annotations

import contextlib
from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from penstock.observe.gateway_names import (
    ATTEMPTS_FAILED,
    BILLS,
    CACHED_TOKENS,
    DEVICE_SECONDS,
    DOLLARS,
    ENGINE_READY,
    ENGINE_RESTARTS,
    ESCALATIONS,
    IN_FLIGHT,
    INPUT_TOKENS,
    LATENCY,
    METRICS,
    OUTCOMES,
    OUTPUT_TOKENS,
    REFUSALS,
    REQUESTS,
    STATION_IN_FLIGHT,
    STATION_WEIGHT,
    STREAMS_RESUMED,
    TEAM_DEVICE_SECONDS,
    TEAM_DOLLARS,
    TIME_TO_FIRST_BYTE,
    VERDICTS,
    WAITED,
)
from penstock.observe.names import Kind, Metric, boundaries

from .fleet import Replica
from .policy.amounts import NANO
from .records import Row

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """All of them, in a registry of their own."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        prometheus_client.PlatformCollector(registry=self.registry)
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for metric in METRICS:
            self._declare(metric)
        self._restarts: dict[str, int] = {}
        self._bound: dict[tuple[str, ...], Counter | Histogram] = {}
        """Series that were looked up once; a look-up takes longer than counting."""

    def page(self) -> bytes:
        """In text format 0.0.4."""
        return generate_latest(self.registry)

    def refused(self, code: str) -> None:
        """A request was not let through."""
        self._count(REFUSALS, 1, code)

    def attempt_failed(self, upstream: str, fault: str) -> None:
        """An attempt came to nothing."""
        self._count(ATTEMPTS_FAILED, 1, upstream, fault)

    def resumed(self, upstream: str) -> None:
        """Another replica went on with a stream."""
        self._count(STREAMS_RESUMED, 1, upstream)

    def bill(self, upstream: str, outcome: Literal["overdue", "late", "lost"]) -> None:
        """A bill was not there with the end of its request."""
        self._count(BILLS, 1, upstream, outcome)

    def verdict(self, route: str, verifier: str, verdict: str) -> None:
        """An attempt was judged."""
        self._count(VERDICTS, 1, route, verifier, verdict)

    def escalated(self, route: str, verifier: str, outcome: Literal["answered", "failed"]) -> None:
        """A request was escalated."""
        self._count(ESCALATIONS, 1, route, verifier, outcome)

    def outcomes(self, verdict: str, count: int) -> None:
        """Outcomes were told."""
        self._count(OUTCOMES, count, verdict)

    def in_flight(self, count: int) -> None:
        """How many requests are under way."""
        self._gauges[IN_FLIGHT.name].set(count)

    def station(self, id: str, in_flight: int, weight: float) -> None:
        """How a replica stands."""
        self._gauges[STATION_IN_FLIGHT.name].labels(id).set(in_flight)
        self._gauges[STATION_WEIGHT.name].labels(id).set(weight)

    def forget(self, id: str) -> None:
        """A replica is gone for good."""
        for metric in (STATION_IN_FLIGHT, STATION_WEIGHT):
            with contextlib.suppress(KeyError):
                self._gauges[metric.name].remove(id)

    def engine(self, replica: Replica) -> None:
        """How an engine of this machine is."""
        self._gauges[ENGINE_READY.name].labels(replica.name).set(replica.state == "ready")
        new = replica.restarts - self._restarts.get(replica.name, 0)
        self._restarts[replica.name] = replica.restarts
        self._count(ENGINE_RESTARTS, new, replica.name)

    def ended(self, row: Row) -> None:
        """A request has its final row."""
        where = (row.route, row.upstream)
        self._count(REQUESTS, 1, *where, str(row.status), row.end)
        if not row.provisional:
            self.billed(row)
        for metric, span in (
            (TIME_TO_FIRST_BYTE, row.first_byte),
            (LATENCY, row.total),
            (WAITED, row.waited),
        ):
            if span is not None:
                self._observe(metric, span / NANO, *where)

    def billed(self, row: Row) -> None:
        """What a request has used is known: with its end, or where its bill or a batch comes later, then. So
        no counter has to go down."""
        where = (row.route, row.upstream)
        for metric, amount in (
            (INPUT_TOKENS, row.input_tokens),
            (OUTPUT_TOKENS, row.output_tokens),
            (CACHED_TOKENS, row.cached_tokens),
            (DEVICE_SECONDS, (row.device_seconds or 0) / NANO),
            (DOLLARS, (row.dollars or 0) / NANO),
        ):
            if amount:
                self._count(metric, amount, *where)
        if row.team:
            self._count(TEAM_DEVICE_SECONDS, (row.device_seconds or 0) / NANO, row.team)
            self._count(TEAM_DOLLARS, (row.dollars or 0) / NANO, row.team)

    def _count(self, metric: Metric, amount: float, *labels: str) -> None:
        series = self._bound.get((metric.name, *labels))
        if series is None:
            series = self._bound[(metric.name, *labels)] = self._counters[metric.name].labels(*labels)
        series.inc(amount)  # type: ignore[union-attr]

    def _observe(self, metric: Metric, value: float, *labels: str) -> None:
        series = self._bound.get((metric.name, *labels))
        if series is None:
            series = self._bound[(metric.name, *labels)] = self._histograms[metric.name].labels(*labels)
        series.observe(value)  # type: ignore[union-attr]

    def _declare(self, metric: Metric) -> None:
        given = (metric.name, metric.help, metric.labels)
        if metric.kind is Kind.COUNTER:
            self._counters[metric.name] = Counter(*given, registry=self.registry)
        elif metric.kind is Kind.GAUGE:
            self._gauges[metric.name] = Gauge(*given, registry=self.registry)
        else:
            assert metric.buckets is not None
            self._histograms[metric.name] = Histogram(
                *given, buckets=boundaries(metric.buckets, 0), registry=self.registry
            )
