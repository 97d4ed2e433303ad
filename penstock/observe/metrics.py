"""The metrics of one engine as Prometheus objects, in a registry of their own.

It knows the table in `names` and takes plain values; it does not know the engine, the server or the clock.
Where several processes serve (`shared`), each counts its requests, one of them the engine's steps, and a
page of any has it all. All methods are called from one thread. `_created` series are switched off, as in
vLLM: they double the page and no dashboard reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from penstock.core.stats import EngineStats, Totals

from . import names, shared
from .http_metrics import HttpMetrics
from .names import LABEL_VALUES, METRICS, Kind, Metric
from .old_names import OldNames

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


@dataclass(frozen=True, slots=True)
class RequestFigures:
    """What one finished sequence reports. Times are seconds; None for a part that it never reached."""

    finished_reason: str
    """stop, length, abort or error."""
    prompt_tokens: int
    generation_tokens: int
    cached_tokens: int
    max_tokens: int | None
    """As asked for; None if the request left it open."""
    preemptions: int
    device_seconds: float
    e2e: float | None = None
    queue: float | None = None
    prefill: float | None = None
    decode: float | None = None


class Metrics:
    """All metrics of one engine, and their page."""

    def __init__(
        self,
        model_name: str,
        max_model_len: int,
        engine: str = "0",
        *,
        old_names_of: tuple[int, int] | None = None,
    ) -> None:
        """`model_name` and `engine` become labels; `max_model_len` (tokens) caps the token-count buckets.
        `old_names_of`: a version of vLLM whose names of metrics are shown, too."""
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": engine}
        self._max_model_len = max_model_len
        self._pages = shared.merged() if shared.shared() else self.registry
        """What pages are made of: where other processes count as well, theirs included."""
        if not shared.shared():  # else it would be another process's memory with each scrape
            prometheus_client.ProcessCollector(registry=self.registry)
        prometheus_client.PlatformCollector(registry=self._pages)
        self._infos: dict[str, Gauge] = {}
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._families: dict[str, Gauge | Counter | Histogram] = {}
        for metric in METRICS:
            self._declare(metric, max_model_len)
        if old_names_of is not None:
            of = [shared.merged()] if shared.shared() else self._families.values()
            self._pages.register(OldNames(old_names_of, of))
        self.http = HttpMetrics(self.registry)
        self._totals = Totals()
        """Of the last report."""
        self._observed = {"busy": 0.0, "idle": 0.0}
        self._block_bytes = 0
        self._idle = 0.0
        """Idle seconds at the last report."""
        self._idle_since: float | None = None
        """When it was made, if there was nothing to do then."""

    def page(self, now: float) -> bytes:
        """The page in text format 0.0.4 (`CONTENT_TYPE`); `now` is on the engine's clock, in seconds."""
        self.count_idle(now)
        return generate_latest(self._pages)

    def count_idle(self, now: float) -> None:
        """An idle engine reports nothing: its idle time goes on all the same. For who hears of its steps."""
        if self._idle_since is not None:
            self._count_device("idle", self._idle + max(0.0, now - self._idle_since))

    def describe_cache(
        self, *, block_size: int, num_blocks: int, dtype: str, prefix_caching: bool, block_bytes: int = 0
    ) -> None:
        """Set the labels of cache_config_info. `block_size` in tokens; max_concurrency is the number of
        requests of the longest length that the cache holds at once; block_bytes of one block's keys and
        values, for what is copied."""
        self._block_bytes = block_bytes
        tokens = num_blocks * block_size
        self._infos[names.CACHE_CONFIG_INFO.name].labels(
            engine=self._labels["engine"],
            block_size=str(block_size),
            num_gpu_blocks=str(num_blocks),
            cache_dtype=dtype,
            enable_prefix_caching=str(prefix_caching),
            kv_cache_size_tokens=str(tokens),
            kv_cache_max_concurrency=str(tokens / self._max_model_len),
        ).set(1)

    def describe_engine(self, **limits: str | int) -> None:
        """Set the labels of engine_config_info, but for model_name and engine; in requests or tokens."""
        labels = {name: str(value) for name, value in limits.items()}
        self._infos[names.ENGINE_CONFIG_INFO.name].labels(**self._labels, **labels).set(1)

    def observe_step(self, stats: EngineStats) -> None:
        """Take in how things stand after a step, and what was done since the last report."""
        gauges, counters, histograms = self._gauges, self._counters, self._histograms
        gauges[names.NUM_REQUESTS_RUNNING.name].set(stats.running)
        gauges[names.NUM_REQUESTS_WAITING.name].set(stats.waiting)
        gauges[f"{names.NUM_REQUESTS_WAITING_BY_REASON.name}/capacity"].set(stats.waiting - stats.deferred)
        gauges[f"{names.NUM_REQUESTS_WAITING_BY_REASON.name}/deferred"].set(stats.deferred)
        gauges[names.KV_CACHE_USAGE_PERC.name].set(stats.kv_usage)
        gauges[names.KV_OFFLOAD_CPU_CACHE_USAGE_PERC.name].set(stats.host_usage)
        new, old = stats.totals, self._totals
        self._totals = new
        computed = new.prompt_tokens - old.prompt_tokens
        cached = new.cached_tokens - old.cached_tokens
        generated = new.generation_tokens - old.generation_tokens
        recomputed = new.recomputed_tokens - old.recomputed_tokens
        for name, amount in (
            (names.PROMPT_TOKENS.name, computed + cached),
            (f"{names.PROMPT_TOKENS_BY_SOURCE.name}/local_compute", computed),
            (f"{names.PROMPT_TOKENS_BY_SOURCE.name}/local_cache_hit", cached),
            (names.PROMPT_TOKENS_CACHED.name, cached),
            (f"{names.PROMPT_TOKENS_CACHED_BY_SOURCE.name}/device", cached),
            (names.GENERATION_TOKENS.name, generated),
            (names.NUM_PREEMPTIONS.name, new.preemptions - old.preemptions),
            (names.PREFIX_CACHE_QUERIES.name, new.prefix_queries - old.prefix_queries),
            (names.PREFIX_CACHE_HITS.name, new.prefix_hits - old.prefix_hits),
            (names.RECOMPUTED_TOKENS.name, recomputed),
            (names.KV_OFFLOAD_STORE_BYTES.name, self._block_bytes * (new.stored_blocks - old.stored_blocks)),
            (names.KV_OFFLOAD_LOAD_BYTES.name, self._block_bytes * (new.loaded_blocks - old.loaded_blocks)),
        ):
            if amount:
                counters[name].inc(amount)
        self._count_device("busy", stats.busy)
        self._count_device("idle", stats.idle)
        self._idle, self._idle_since = stats.idle, None if stats.running or stats.waiting else stats.at
        if tokens := computed + recomputed + generated:
            histograms[names.ITERATION_TOKENS.name].observe(tokens)
            histograms[names.STEP_SECONDS.name].observe(stats.seconds)
            histograms[names.PREDICTED_STEP_SECONDS.name].observe(stats.predicted)

    def _count_device(self, state: str, total: float) -> None:
        """The engine reports totals; a counter only goes up."""
        if total > self._observed[state]:
            self._counters[f"{names.DEVICE_SECONDS.name}/{state}"].inc(total - self._observed[state])
            self._observed[state] = total

    def observe_first_token(self, seconds: float) -> None:
        """A sequence got its first token this long after its arrival."""
        self._ttft.observe(seconds)

    def observe_gap(self, seconds: float) -> None:
        """A sequence got its next tokens this long after the last ones."""
        self._itl.observe(seconds)

    def observe_sequence(self, figures: RequestFigures) -> None:
        """One engine request (one of the n of a prompt) has ended."""
        success = f"{names.REQUEST_SUCCESS.name}/{figures.finished_reason}"
        self._counters[success].inc()
        histograms = self._histograms
        per_token = None
        if figures.decode is not None and figures.generation_tokens > 1:
            per_token = figures.decode / (figures.generation_tokens - 1)
        inference = None
        if figures.e2e is not None and figures.queue is not None:
            inference = figures.e2e - figures.queue
        values: Mapping[Metric, float | None] = {
            names.E2E_LATENCY: figures.e2e,
            names.QUEUE_TIME: figures.queue,
            names.INFERENCE_TIME: inference,
            names.PREFILL_TIME: figures.prefill,
            names.DECODE_TIME: figures.decode,
            names.TIME_PER_OUTPUT_TOKEN: per_token,
            names.REQUEST_PROMPT_TOKENS: figures.prompt_tokens,
            names.REQUEST_GENERATION_TOKENS: figures.generation_tokens,
            names.REQUEST_PARAMS_MAX_TOKENS: figures.max_tokens,
            names.PREFILL_KV_COMPUTED_TOKENS: figures.prompt_tokens - figures.cached_tokens,
            names.REQUEST_NUM_PREEMPTIONS: figures.preemptions,
            names.REQUEST_DEVICE_SECONDS: figures.device_seconds,
        }
        for metric, value in values.items():
            if value is not None:
                histograms[metric.name].observe(value)

    def observe_prompt(self, n: int, longest: int) -> None:
        """All n sequences of a prompt have ended; the longest has this many tokens."""
        self._histograms[names.REQUEST_PARAMS_N.name].observe(n)
        self._histograms[names.MAX_NUM_GENERATION_TOKENS.name].observe(longest)

    def observe_rejection(self, reason: str) -> None:
        """A request was refused because the queue is full; reason is the name of the limit."""
        self._counters[f"{names.ADMISSION_REJECTIONS.name}/{reason}"].inc()

    def _declare(self, metric: Metric, max_model_len: int) -> None:
        if metric in names.INFO:
            self._infos[metric.name] = Gauge(
                metric.name, metric.help, metric.labels, registry=self.registry, multiprocess_mode="max"
            )
            return
        if metric.buckets is not None:
            histogram = Histogram(
                metric.name,
                metric.help,
                metric.labels,
                registry=self.registry,
                buckets=names.boundaries(metric.buckets, max_model_len),
            )
            self._families[metric.name] = histogram
            self._histograms[metric.name] = histogram.labels(**self._labels)
            if metric is names.TIME_TO_FIRST_TOKEN:
                self._ttft = self._histograms[metric.name]
            elif metric is names.INTER_TOKEN_LATENCY:
                self._itl = self._histograms[metric.name]
            return
        parent: Gauge | Counter
        if metric.kind is Kind.GAUGE:  # one process sets it; the others' zeros add nothing
            parent = Gauge(
                metric.name, metric.help, metric.labels, registry=self.registry, multiprocess_mode="sum"
            )
        else:
            parent = Counter(metric.name, metric.help, metric.labels, registry=self.registry)
        self._families[metric.name] = parent
        own = metric.labels[2:]
        children = (
            {metric.name: {}}
            if not own
            else {f"{metric.name}/{value}": {own[0]: value} for value in LABEL_VALUES[metric.name]}
        )
        for key, extra in children.items():
            child = parent.labels(**self._labels, **extra)
            if isinstance(child, Gauge):
                self._gauges[key] = child
            else:
                self._counters[key] = child
