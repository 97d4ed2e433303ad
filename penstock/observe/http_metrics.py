"""What HTTP requests there were: the metrics that vLLM has from prometheus-fastapi-instrumentator.

    http_requests_total{method,status,handler}                      status is 2xx, 4xx, …
    http_request_size_bytes{handler}                                sum and count of Content-Length
    http_response_size_bytes{handler}                               the same of answers; 0 for streams
    http_request_duration_highr_seconds                             many buckets, no labels
    http_request_duration_seconds{method,handler}                   few buckets

Names, labels and buckets are those of its version 8; probes and scrapes are left out, as in vLLM. Clients
cannot make label values: a path that nobody serves is `none`, and a method that is not one of HTTP's is
`other`.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary

_HIGH = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0),
    *(7.5, 10.0, 30.0, 60.0),
)
_LOW = (0.1, 0.5, 1.0)

NO_ROUTE = "none"
EXCLUDED = ("/metrics", "/health", "/load", "/ping", "/version", "/server_info", "/livez", "/readyz")
"""Handlers that are not counted: vLLM's, and our probes."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})


class HttpMetrics:
    """The five, in a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "http_requests_total",
            "Total number of requests by method, status and handler.",
            ("method", "status", "handler"),
            registry=registry,
        )
        self._request_bytes = Summary(
            "http_request_size_bytes",
            "Content length of incoming requests by handler, as their header says; else 0.",
            ("handler",),
            registry=registry,
        )
        self._response_bytes = Summary(
            "http_response_size_bytes",
            "Content length of outgoing responses by handler, as their header says; else 0.",
            ("handler",),
            registry=registry,
        )
        self._duration = Histogram(
            "http_request_duration_highr_seconds",
            "Latency with many buckets, of all handlers together.",
            buckets=_HIGH,
            registry=registry,
        )
        self._duration_by_handler = Histogram(
            "http_request_duration_seconds",
            "Latency with few buckets, by method and handler.",
            ("method", "handler"),
            buckets=_LOW,
            registry=registry,
        )
        self._series: dict[tuple[str, str, int], tuple[Counter, Summary, Summary, Histogram]] = {}
        """Of (handler, method, hundreds of the status); looking up labels takes as long as all the rest."""

    def observe(
        self,
        handler: str | None,
        method: str,
        status: int,
        seconds: float,
        request_bytes: int = 0,
        response_bytes: int = 0,
    ) -> None:
        """One request has been answered. handler: its route, None where nothing is served."""
        handler = handler or NO_ROUTE
        if handler in EXCLUDED:
            return
        key = (handler, method if method in _METHODS else "other", status // 100)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = self._of(*key)
        requests, taken, given, duration = series
        requests.inc()
        taken.observe(request_bytes)
        given.observe(response_bytes)
        duration.observe(seconds)
        self._duration.observe(seconds)

    def _of(self, handler: str, method: str, hundreds: int) -> tuple[Counter, Summary, Summary, Histogram]:
        return (
            self._requests.labels(method, f"{hundreds}xx", handler),
            self._request_bytes.labels(handler),
            self._response_bytes.labels(handler),
            self._duration_by_handler.labels(method, handler),
        )
