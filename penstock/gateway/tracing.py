"""OpenTelemetry spans: one for each request, one below it for each attempt. An extra, and off by default.

    client's span ─▶ POST /v1/chat/completions (server) ─┬▶ chat tiny-1 (client): attempt 1, failed
       traceparent                                       └▶ chat tiny-1 (client): attempt 2 ─▶ upstream's
                                                              traceparent

Their attributes are those of the request's row, under the ledger's names (`feature`, `inference.backend`,
`model`, `gpu_seconds`, `input_tokens`, `output_tokens`) and OpenTelemetry's (`gen_ai.*`, `http.*`). Of
prompts, answers and secrets there is nothing. Where spans go, and which, say the standard variables `OTEL_*`;
they are sent behind, by a thread of the SDK's, and dropped where nobody takes them.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from starlette.types import Message, Scope, Send
from yarl import URL

from penstock.core.errors import PenstockError, StartupError
from penstock.http.exchange import header

from .policy.amounts import NANO
from .policy.retries import Attempt
from .policy.routes import Place
from .records import Row
from .stations import Station

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

SPAN = "penstock.span"
"""Key of a scope: the request's span."""
_SERVICE = "penstock-gateway"
_FAREWELL = 3.0
"""Seconds that the last spans get at the end."""
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/chat/completions/batch": "chat",
    "/v1/embeddings": "embeddings",
    "/v2/embed": "embeddings",
}
"""OpenTelemetry's names; others are called after their paths."""


class Tracing:
    """Makes the spans of a gateway."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self.tracer = provider.get_tracer("penstock.gateway")
        self.context = TraceContextTextMapPropagator()
        self.api = trace

    async def around(
        self, path: str, scope: Scope, send: Send, serve: Callable[[Send], Awaitable[None]]
    ) -> None:
        """Serve a request within a span, which the request finds in its scope."""
        span = RequestSpan(self, path, scope)
        scope[SPAN] = span

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.status = message["status"]
            await send(message)

        try:
            await serve(watched)
        except PenstockError as error:
            span.status, span.fault = error.status, error.code or str(error.status)
            raise
        except Exception as error:
            span.fault = type(error).__name__
            raise
        finally:
            span.answered()

    async def close(self) -> None:
        """Send what is left, for a moment."""
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def shut() -> None:
            self._provider.shutdown()
            try:
                loop.call_soon_threadsafe(done.set)
            except RuntimeError:  # nobody has waited so long
                pass

        threading.Thread(target=shut, name="penstock-otel", daemon=True).start()
        try:
            await asyncio.wait_for(done.wait(), _FAREWELL)
        except TimeoutError:
            pass


class RequestSpan:
    """The span of one request: until it is answered, with what its row says in the end."""

    def __init__(self, tracing: Tracing, path: str, scope: Scope) -> None:
        self.status = 0
        """Of the answer."""
        self.fault = ""
        self.operation = _OPERATIONS.get(path, path.rpartition("/")[2])
        self._tracing = tracing
        self._owed = False
        self._answered_at = 0
        given = {}
        for name in ("traceparent", "tracestate"):
            if (value := header(scope, name.encode())) is not None:
                given[name] = value
        parent = tracing.context.extract(given)
        attributes = {
            "http.request.method": "POST",
            "http.route": path,
            "gen_ai.operation.name": self.operation,
        }
        self._span = tracing.tracer.start_span(
            f"POST {path}", parent, kind=tracing.api.SpanKind.SERVER, attributes=attributes
        )
        self._context = tracing.api.set_span_in_context(self._span, parent)

    def attempt(self, place: Place, station: Station, number: int) -> AttemptSpan:
        """A span below it, for a request to a station."""
        url = URL(station.url)
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": self.operation,
            "gen_ai.provider.name": place.kind,
            "gen_ai.request.model": place.model,
            "http.request.method": "POST",
            "inference.backend": place.name,
            "model": place.model,
            "penstock.replica": station.id,
            "server.address": url.host or "",
            "server.port": url.port or 0,
        }
        if number > 1:
            attributes["http.request.resend_count"] = number - 1
        span = self._tracing.tracer.start_span(
            f"{self.operation} {place.model}",
            self._context,
            kind=self._tracing.api.SpanKind.CLIENT,
            attributes=attributes,
        )
        return AttemptSpan(self._tracing, span)

    def expect_row(self) -> None:
        """From now on, the request has a row, which `row` tells."""
        self._owed = True

    def row(self, row: Row) -> None:
        """The row is final."""
        self._owed = False
        self._span.set_attributes({name: value for name, value in _told(row) if value not in (None, "")})
        self.status = self.status or row.status
        if row.end not in ("done", ""):
            self.fault = self.fault or row.end
        if self._answered_at:
            self._end()

    def answered(self) -> None:
        """The answer has ended."""
        self._answered_at = time.time_ns()
        if not self._owed:
            self._end()

    def _end(self) -> None:
        span, api = self._span, self._tracing.api
        if self.status:
            span.set_attribute("http.response.status_code", self.status)
        fault = self.fault or (str(self.status) if self.status >= 400 else "")
        if fault:
            span.set_attribute("error.type", fault)
        if self.status >= 500 or (fault and not self.status):
            span.set_status(api.Status(api.StatusCode.ERROR))
        span.end(self._answered_at)


class AttemptSpan:
    """The span of one attempt."""

    def __init__(self, tracing: Tracing, span: Any) -> None:
        self._tracing = tracing
        self._span = span

    def inject(self, headers: dict[str, str]) -> None:
        """Have the upstream's spans below this one. Where there is no trace, the client's headers stay."""
        api = self._tracing.api
        if self._span.get_span_context().is_valid:
            headers.pop("tracestate", None)
            self._tracing.context.inject(headers, api.set_span_in_context(self._span))

    def failed(self, attempt: Attempt) -> None:
        """It came to nothing, or broke."""
        api = self._tracing.api
        self._span.set_attribute("error.type", attempt.fault)
        self._span.set_status(api.Status(api.StatusCode.ERROR))

    def end(self, status: int) -> None:
        """It is over; `status`: the upstream's, 0 for none."""
        if status:
            self._span.set_attribute("http.response.status_code", status)
        self._span.end()


def _told(row: Row) -> list[tuple[str, Any]]:
    return [
        ("penstock.request_id", row.id),
        ("penstock.key_id", row.key_id),
        ("penstock.team", row.team),
        ("penstock.route", row.route),
        ("penstock.end", row.end),
        ("penstock.settlement", row.settlement),
        ("penstock.attempts", row.attempts),
        ("penstock.escalated_from", row.escalated_from),
        ("penstock.verifier", row.verifier),
        ("penstock.verdict", row.verdict),
        ("feature", row.tags.get("feature")),
        ("inference.backend", row.upstream),
        ("model", row.model),
        ("input_tokens", row.input_tokens),
        ("output_tokens", row.output_tokens),
        ("cached_tokens", row.cached_tokens),
        ("gpu_seconds", _decimal(row.device_seconds)),
        ("gpu_seconds_estimated", row.device_seconds_estimated),
        ("dollars", _decimal(row.dollars)),
        ("gen_ai.request.model", row.route),
        ("gen_ai.response.model", row.model),
        ("gen_ai.usage.input_tokens", row.input_tokens),
        ("gen_ai.usage.output_tokens", row.output_tokens),
        ("gen_ai.usage.cache_read.input_tokens", row.cached_tokens),
    ]


def _decimal(nano: int | None) -> float | None:
    return None if nano is None else nano / NANO


def open_tracing(environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Spans as the variables `OTEL_*` have them; None where they want none. Raises StartupError."""
    kind = environment.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    if kind == "none" or environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter(kind, environment)
    except ModuleNotFoundError:
        raise StartupError(
            "gateway.tracing: OpenTelemetry is not installed.",
            param="gateway.tracing",
            advice='pip install "penstock[otel]", or take gateway.tracing out of the spec.',
        ) from None
    named = environment.get("OTEL_SERVICE_NAME") or "service.name=" in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    resource = Resource.create({} if named else {"service.name": _SERVICE})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


def _exporter(kind: str, environment: Mapping[str, str]) -> SpanExporter:
    if kind == "otlp":
        protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get(
            "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
        )
        if protocol != "http/protobuf":
            raise StartupError(
                f"gateway.tracing: OTLP is sent by http/protobuf here, not by {protocol}.",
                param="OTEL_EXPORTER_OTLP_PROTOCOL",
                advice="Set it to http/protobuf, or name another exporter in OTEL_TRACES_EXPORTER.",
            )
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    installed = {each.name: each for each in entry_points(group="opentelemetry_traces_exporter")}
    if kind not in installed:
        raise StartupError(
            f"gateway.tracing: there is no exporter {kind}.",
            param="OTEL_TRACES_EXPORTER",
            advice=f"It is one of {', '.join(sorted({'none', 'otlp', *installed}))}.",
        )
    exporter: SpanExporter = installed[kind].load()()
    return exporter
