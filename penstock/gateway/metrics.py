"""The gateway's metrics for Prometheus: one table of names, and the objects behind it.

Labels are names of the spec, statuses and units: no client can make a new series. Names follow the engine's
(`penstock:…`), in seconds and totals.
"""

from __future__ import annotations

from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from penstock.observe.names import Buckets, Kind, Metric, boundaries

from .fleet import Replica
from .policy.amounts import NANO
from .records import Row

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_ROUTE = ("route", "upstream")

REQUESTS = Metric(
    "penstock:gateway_requests", Kind.COUNTER, "Requests that were let through, by how they ended.",
    (*_ROUTE, "code", "end"),
)  # fmt: skip
REFUSALS = Metric(
    "penstock:gateway_refusals", Kind.COUNTER, "Requests that were not let through, by the error's code.",
    ("code",),
)  # fmt: skip
IN_FLIGHT = Metric("penstock:gateway_requests_in_flight", Kind.GAUGE, "Requests under way.", ())
ATTEMPTS_FAILED = Metric(
    "penstock:gateway_attempts_failed", Kind.COUNTER, "Attempts at an upstream that failed, by fault.",
    ("upstream", "fault"),
)  # fmt: skip
STREAMS_RESUMED = Metric(
    "penstock:gateway_streams_resumed", Kind.COUNTER,
    "Streams that broke and went on at another replica, by how often.", ("upstream",),
)  # fmt: skip
BILLS = Metric(
    "penstock:gateway_bills", Kind.COUNTER,
    "Final bills of engines that did not come in time (overdue); and of these, or of workers that died: "
    "those that settled their rows (late), and those that never will (lost).", ("upstream", "outcome"),
)  # fmt: skip
VERDICTS = Metric(
    "penstock:gateway_verdicts", Kind.COUNTER,
    "Answers of attempts that were judged on routes that escalate, by what was found.",
    ("route", "verifier", "verdict"),
)  # fmt: skip
ESCALATIONS = Metric(
    "penstock:gateway_escalations", Kind.COUNTER,
    "Requests that were escalated, by the verifier that their attempt did not pass, and what came of it.",
    ("route", "verifier", "outcome"),
)  # fmt: skip
INPUT_TOKENS = Metric("penstock:gateway_input_tokens", Kind.COUNTER, "Tokens of prompts, as billed.", _ROUTE)
OUTPUT_TOKENS = Metric("penstock:gateway_output_tokens", Kind.COUNTER, "Tokens generated, as billed.", _ROUTE)
CACHED_TOKENS = Metric(
    "penstock:gateway_cached_tokens", Kind.COUNTER, "Tokens of prompts that an upstream had cached.", _ROUTE
)
DEVICE_SECONDS = Metric("penstock:gateway_device_seconds", Kind.COUNTER, "Device time, as billed.", _ROUTE)
DOLLARS = Metric("penstock:gateway_dollars", Kind.COUNTER, "US dollars, as billed.", _ROUTE)
TIME_TO_FIRST_BYTE = Metric(
    "penstock:gateway_time_to_first_byte_seconds", Kind.HISTOGRAM,
    "From the arrival of a request to the first byte of its answer.", _ROUTE, Buckets.TIME_TO_FIRST_TOKEN,
)  # fmt: skip
LATENCY = Metric(
    "penstock:gateway_request_seconds", Kind.HISTOGRAM, "From the arrival of a request to its end.", _ROUTE,
    Buckets.REQUEST_LATENCY,
)  # fmt: skip
WAITED = Metric(
    "penstock:gateway_wait_seconds", Kind.HISTOGRAM,
    "From the arrival of a request until an upstream was asked: keys, limits, models that start.", _ROUTE,
    Buckets.TIME_TO_FIRST_TOKEN,
)  # fmt: skip
STATION_IN_FLIGHT = Metric(
    "penstock:gateway_upstream_in_flight", Kind.GAUGE, "Requests under way at a replica.", ("replica",)
)
STATION_WEIGHT = Metric(
    "penstock:gateway_upstream_weight", Kind.GAUGE,
    "Share of a healthy replica's requests that it gets: 0 is out, 1 is well.", ("replica",),
)  # fmt: skip

OUTCOMES = Metric(
    "penstock:gateway_outcomes", Kind.COUNTER,
    "Outcomes that were told of requests, by what became of them: told, unchanged, unknown, late, too_many, "
    "lost (of a header, while the ledger did not answer).", ("verdict",),
)  # fmt: skip

ENGINE_READY = Metric(
    "penstock:gateway_engine_ready", Kind.GAUGE,
    "Whether an engine of this machine takes requests; one that sleeps does not.", ("replica",),
)  # fmt: skip
ENGINE_RESTARTS = Metric(
    "penstock:gateway_engine_restarts", Kind.COUNTER,
    "How often an engine of this machine was started again after its end.", ("replica",),
)  # fmt: skip

METRICS = (
    *(REQUESTS, REFUSALS, IN_FLIGHT, ATTEMPTS_FAILED, STREAMS_RESUMED, BILLS),
    *(VERDICTS, ESCALATIONS),
    *(INPUT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS, DEVICE_SECONDS, DOLLARS),
    *(TIME_TO_FIRST_BYTE, LATENCY, WAITED, STATION_IN_FLIGHT, STATION_WEIGHT),
    *(OUTCOMES, ENGINE_READY, ENGINE_RESTARTS),
)


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
