"""The one table of metric names that the gateway exports, for the gateway and for whatever reads its metrics.

Labels are names of the spec, statuses and units: no client can make a new series. Names follow the engine's
(`penstock:…`), in seconds and totals.
"""

from __future__ import annotations

from .names import Buckets, Kind, Metric

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
TEAM_DEVICE_SECONDS = Metric(
    "penstock:gateway_team_device_seconds", Kind.COUNTER, "Device time of a team's requests, as billed.",
    ("team",),
)  # fmt: skip
TEAM_DOLLARS = Metric(
    "penstock:gateway_team_dollars", Kind.COUNTER, "US dollars of a team's requests, as billed.", ("team",)
)
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

METRICS: tuple[Metric, ...] = (
    *(REQUESTS, REFUSALS, IN_FLIGHT, ATTEMPTS_FAILED, STREAMS_RESUMED, BILLS),
    *(VERDICTS, ESCALATIONS),
    *(INPUT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS, DEVICE_SECONDS, DOLLARS),
    *(TEAM_DEVICE_SECONDS, TEAM_DOLLARS),
    *(TIME_TO_FIRST_BYTE, LATENCY, WAITED, STATION_IN_FLIGHT, STATION_WEIGHT),
    *(OUTCOMES, ENGINE_READY, ENGINE_RESTARTS),
)
