"""Spans: whose they are, what they say, where they go; and that they are an extra."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.core.errors import StartupError
from penstock.gateway.opening import open_door
from penstock.gateway.tracing import open_tracing
from penstock.spec.load import loads

from .conftest import BODY, STREAM, Gateway, Make
from .upstream import cut, endless, reset, status

sdk = pytest.importorskip("opentelemetry.sdk.trace")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Spans:
    """A gateway that is traced, and its spans."""

    def __init__(self, gateway: Gateway) -> None:
        from penstock.gateway.tracing import Tracing

        self.gateway = gateway
        self.exporter = memory.InMemorySpanExporter()
        provider = sdk.TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(export.SimpleSpanProcessor(self.exporter))
        gateway.door.tracing = Tracing(provider)

    def finished(self, count: int) -> list:
        """So many, servers' spans last."""
        self.gateway.wait_for(lambda: len(self.exporter.get_finished_spans()) >= count)
        found = list(self.exporter.get_finished_spans())
        assert len(found) == count
        return sorted(found, key=lambda span: (span.kind.name == "SERVER", span.start_time))


def test_a_request_and_its_attempt(make: Make) -> None:
    gateway = make()
    spans = Spans(gateway)
    said = {"traceparent": TRACEPARENT, "tracestate": "vendor=1", "x_penstock_feature": "search"}
    assert gateway.post(**said).status == 200
    attempt, server = spans.finished(2)
    row = gateway.row()

    assert (server.name, server.kind.name) == ("POST /v1/chat/completions", "SERVER")
    assert format(server.context.trace_id, "032x") == TRACE
    assert format(server.parent.span_id, "016x") == PARENT
    told = dict(server.attributes)
    assert told["feature"] == "search"
    assert told["inference.backend"] == row.upstream == "ours"
    assert told["model"] == told["gen_ai.response.model"] == "tiny-1"
    assert told["gpu_seconds"] == 0.25
    assert told["dollars"] == pytest.approx(0.00025)
    assert told["input_tokens"] == told["gen_ai.usage.input_tokens"] == row.input_tokens == 7
    assert told["output_tokens"] == told["gen_ai.usage.output_tokens"] == row.output_tokens > 0
    assert told["gen_ai.usage.cache_read.input_tokens"] == 2
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.request.model"] == told["penstock.route"] == "small"
    assert told["http.response.status_code"] == 200
    assert told["penstock.request_id"] == row.id
    assert "error.type" not in told
    assert server.status.status_code.name == "UNSET"

    assert (attempt.name, attempt.kind.name) == ("chat tiny-1", "CLIENT")
    assert attempt.parent.span_id == server.context.span_id
    about = dict(attempt.attributes)
    assert about["gen_ai.provider.name"] == "penstock"
    assert about["server.port"] == gateway.upstream.port
    assert about["http.response.status_code"] == 200

    (asked,) = gateway.upstream.asked
    assert asked.headers["traceparent"] == f"00-{TRACE}-{attempt.context.span_id:016x}-01"
    assert asked.headers["tracestate"] == "vendor=1"
    everything = "".join(span.to_json() for span in (attempt, server))
    assert "Hi!" not in everything
    assert "sk-ps-test" not in everything


def test_each_attempt_has_a_span(make: Make) -> None:
    gateway = make(retries=2, scripts=[[reset, status(500)]])
    spans = Spans(gateway)
    assert gateway.post().status == 200
    first, second, third, server = spans.finished(4)
    assert [dict(each.attributes).get("error.type") for each in (first, second, third)] == [
        "reset",
        "status",
        None,
    ]
    assert [each.status.status_code.name for each in (first, second, third)] == ["ERROR", "ERROR", "UNSET"]
    assert dict(second.attributes)["http.response.status_code"] == 500
    assert dict(third.attributes)["http.request.resend_count"] == 2
    assert {each.parent.span_id for each in (first, second, third)} == {server.context.span_id}
    assert server.parent is None
    assert dict(server.attributes)["penstock.attempts"] == 3
    parents = [asked.headers["traceparent"].split("-")[2] for asked in gateway.upstream.asked]
    assert parents == [format(each.context.span_id, "016x") for each in (first, second, third)]


def test_a_stream_that_breaks(make: Make) -> None:
    gateway = make(cut)
    spans = Spans(gateway)
    assert gateway.post(STREAM).status == 200
    attempt, server = spans.finished(2)
    assert dict(attempt.attributes)["error.type"] == "cut"
    assert dict(server.attributes)["error.type"] == "upstream_failed"
    assert dict(server.attributes)["penstock.settlement"] == "estimated"


def test_a_client_that_leaves(make: Make) -> None:
    gateway = make(endless)
    spans = Spans(gateway)
    connection, response = gateway.open()
    response.read(1)
    connection.close()
    response.close()
    _, server = spans.finished(2)
    assert dict(server.attributes)["error.type"] == "client_gone"


def test_what_is_refused_has_a_span_too(make: Make) -> None:
    gateway = make(replace={"requests_per_minute: 1000": "requests_per_minute: 1"})
    spans = Spans(gateway)
    refused = [
        gateway.post(key="x"),
        gateway.post({**BODY, "model": "nobody"}),
        gateway.post(),
        gateway.post(),
    ]
    assert [each.status for each in refused] == [401, 404, 200, 429]
    *_, wrong, unknown, good, limited = spans.finished(5)
    told = [dict(each.attributes) for each in (wrong, unknown, good, limited)]
    assert [each["http.response.status_code"] for each in told] == [401, 404, 200, 429]
    assert [each.get("error.type") for each in told] == ["invalid_api_key", "model_not_found", None, "429"]


def test_what_is_not_sampled_is_passed_on(make: Make) -> None:
    gateway = make()
    spans = Spans(gateway)
    assert gateway.post(traceparent=TRACEPARENT[:-1] + "0").status == 200
    (asked,) = gateway.upstream.asked
    version, trace, _, flags = asked.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "00")
    assert not spans.finished(0)


def test_a_traceparent_that_is_none_begins_a_trace(make: Make) -> None:
    gateway = make()
    spans = Spans(gateway)
    assert gateway.post(traceparent="00-0-0-01", tracestate="vendor=1").status == 200
    _, server = spans.finished(2)
    assert server.parent is None
    (asked,) = gateway.upstream.asked
    assert asked.headers["traceparent"].split("-")[1] == format(server.context.trace_id, "032x")
    assert "tracestate" not in asked.headers


def test_without_it_the_clients_trace_is_passed_on(make: Make) -> None:
    gateway = make()
    assert gateway.post(traceparent=TRACEPARENT, tracestate="vendor=1").status == 200
    (asked,) = gateway.upstream.asked
    assert (asked.headers["traceparent"], asked.headers["tracestate"]) == (TRACEPARENT, "vendor=1")


def test_nothing_of_it_is_loaded_where_it_is_off() -> None:
    code = "import sys, penstock.gateway.app, penstock.gateway.opening; print('opentelemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes]] = []
        self.heard = threading.Event()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.taken.append((self.path, body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()
                collector.heard.set()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.stop()


def test_spans_go_where_the_environment_says(
    make: Make, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    for name, value in {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
        "OTEL_BSP_SCHEDULE_DELAY": "60000",
    }.items():
        monkeypatch.setenv(name, value)
    gateway = make()
    gateway.door.tracing = open_tracing()
    assert gateway.post().status == 200
    assert gateway.post(STREAM).status == 200
    gateway.rows(2)
    gateway.live.do(gateway.door.tracing.close())  # type: ignore[union-attr]
    spans, resources = [], []
    for path, body in collector.taken:
        assert path == "/v1/traces"
        for each in service.ExportTraceServiceRequest.FromString(body).resource_spans:
            resources.append({one.key: one.value.string_value for one in each.resource.attributes})
            spans += [span.name for scope in each.scope_spans for span in scope.spans]
    assert sorted(spans) == ["POST /v1/chat/completions"] * 2 + ["chat tiny-1"] * 2
    assert resources[0]["service.name"] == "penstock-gateway"
    assert resources[0]["deployment.environment"] == "test"


def test_nobody_waits_long_for_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.gateway.tracing._FAREWELL", 0.05)
    monkeypatch.setattr(
        "opentelemetry.sdk.trace.TracerProvider.shutdown", lambda _: threading.Event().wait(1)
    )
    tracing = open_tracing({"OTEL_TRACES_EXPORTER": "console"})
    assert tracing is not None
    asyncio.run(tracing.close())


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin-of-old"}, "there is no exporter zipkin-of-old"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "not by grpc"),
    ],
)
def test_what_cannot_be_had(environment: dict[str, str], words: str) -> None:
    with pytest.raises(StartupError, match=words):
        open_tracing(environment)


def test_the_spec_switches_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    text = f"""
gateway: {{tracing: true}}
ledger: {{url: "sqlite:///{tmp_path}/ledger.db", spool: "{tmp_path}/spool"}}
"""

    async def traced(text: str) -> bool:
        door, _ = await open_door(loads(text), None)
        try:
            return door.tracing is not None
        finally:
            await door.close()

    assert asyncio.run(traced(text))
    assert not asyncio.run(traced(text.replace("true", "false")))


def test_switched_off_by_the_environment() -> None:
    assert open_tracing({"OTEL_TRACES_EXPORTER": "none"}) is None
    assert open_tracing({"OTEL_SDK_DISABLED": "true"}) is None


def test_the_extra_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError, match="OpenTelemetry is not installed") as caught:
        open_tracing({})
    assert 'pip install "penstock[otel]"' in str(caught.value)
