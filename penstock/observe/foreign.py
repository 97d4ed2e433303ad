"""Names of metrics, ours and other programs': what a query may ask for, and what was removed or renamed.

    find("vllm:e2e_request_latency_seconds_bucket")  →  Known(…, Kind.HISTOGRAM, part="_bucket", labels, who)
    gone("vllm:gpu_cache_usage_perc")                →  Gone(use="vllm:kv_cache_usage_perc", …)

Ours come from the tables that are exported (`names.py`, `gateway_names.py`). Others' come from
`tables/*.tsv`, one file for each program, whose first line says version and source;
`tools/foreign_metrics.py` writes them. A label `*` in a table stands for labels that hang on the
configuration.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.core.near import nearest

from .gateway_names import METRICS as GATEWAY
from .names import METRICS, OLD_NAMES, Kind, Metric

_TABLES = Path(__file__).parent / "tables"
_PARTS = {Kind.COUNTER: ("_total",), Kind.HISTOGRAM: ("_bucket", "_count", "_sum"), Kind.GAUGE: ("",)}

_RAY = "ray_vllm_"
"""How Ray Serve exports what vLLM calls `vllm:…`, with labels of its own."""
TARGET_LABELS = frozenset(
    "job instance namespace pod container service endpoint node cluster prometheus __name__ "
    "metrics_path exported_job exported_instance exported_namespace exported_pod exported_container "
    "exported_service prometheus_replica".split()
)
"""Labels that scraping gives to every series (the Prometheus operator's, where one is used)."""


@dataclass(frozen=True, slots=True)
class Known:
    """A name as queries spell it."""

    name: str
    metric: str
    """Without `_bucket`, `_count`, `_sum` and `_total`."""
    kind: Kind
    part: str
    """Of a histogram (`_bucket`) or counter (`_total`); empty for gauges."""
    labels: frozenset[str]
    """Its own, beside TARGET_LABELS."""
    who: tuple[str, ...]
    """Programs that export it, with their versions."""

    def may_have(self, label: str) -> bool:
        """Whether its series can have such a label."""
        if label in TARGET_LABELS or label in self.labels or "*" in self.labels:
            return True
        return label == "le" and self.part == "_bucket"

    @property
    def grows(self) -> bool:
        """Whether it only ever goes up, so that rate() says something: counters, and parts of histograms."""
        return self.kind is not Kind.GAUGE


@dataclass(frozen=True, slots=True)
class Gone:
    """A name that is not exported any more."""

    name: str
    use: str
    """What to write instead; empty if there is nothing."""
    why: str = ""
    """What became of it."""


_HIT_RATE = (
    "rate(vllm:prefix_cache_hits_total[5m]) / rate(vllm:prefix_cache_queries_total[5m])",
    "hits and queries are counters",
)
_NO_SWAP = "vLLM's V1 engine does not swap to the CPU; requests that lose their blocks are computed again"
_GONE: dict[str, tuple[str, str]] = {
    "vllm:num_requests_swapped": ("vllm:num_preemptions_total", _NO_SWAP),
    "vllm:cpu_cache_usage_perc": ("vllm:kv_cache_usage_perc", _NO_SWAP),
    "cpu_cache_usage": ("vllm:kv_cache_usage_perc", _NO_SWAP),
    "vllm:cpu_prefix_cache_hit_rate": _HIT_RATE,
    "vllm:gpu_prefix_cache_hit_rate": _HIT_RATE,
    "vllm:avg_prompt_throughput_toks_per_s": (
        "rate(vllm:prompt_tokens_total[5m])",
        "take the rate of the counter",
    ),
    "vllm:avg_prompt_throughput_toks_per_sec": (
        "rate(vllm:prompt_tokens_total[5m])",
        "take the rate of the counter",
    ),
    "vllm:avg_generation_throughput_toks_per_s": (
        "rate(vllm:generation_tokens_total[5m])",
        "take the rate of the counter",
    ),
    "vllm:avg_generation_throughput_toks_per_sec": (
        "rate(vllm:generation_tokens_total[5m])",
        "it was never spelt so; take the rate of the counter",
    ),
    "vllm:tokens_total": ("vllm:prompt_tokens_total + vllm:generation_tokens_total", ""),
    "vllm:request_params_best_of": ("vllm:request_params_n", "best_of was removed"),
    "vllm:max_num_generation_tokens": ("vllm:request_max_num_generation_tokens", ""),
    "vllm:model_forward_time_milliseconds": ("penstock:step_seconds", "vLLM has none any more"),
    "vllm:model_execute_time_milliseconds": ("penstock:step_seconds", "vLLM has none any more"),
    "vllm:spec_decode_draft_acceptance_rate": (
        "rate(vllm:spec_decode_num_accepted_tokens_total[5m]) / "
        "rate(vllm:spec_decode_num_draft_tokens_total[5m])",
        "take it from the counters",
    ),
    "vllm:spec_decode_efficiency": (
        "vllm:spec_decode_num_accepted_tokens_total",
        "take it from the counters",
    ),
    "vllm:spec_decode_num_emitted_tokens": ("vllm:spec_decode_num_accepted_tokens_total", ""),
    "keda_metrics_adapter_scaler_metrics_value": ("keda_scaler_metrics_value", ""),
    "keda_metrics_adapter_scaler_errors_total": ("keda_scaler_detail_errors_total", ""),
    "keda_metrics_adapter_scaled_object_errors": ("keda_scaled_object_errors_total", ""),
    "keda_internal_scale_loop_latency": ("keda_internal_scale_loop_latency_seconds", "in seconds now"),
    "keda_resource_totals": ("keda_resource_registered_total", ""),
    "keda_scaled_object_errors": ("keda_scaled_object_errors_total", ""),
    "keda_scaler_errors": ("keda_scaler_detail_errors_total", ""),
    "keda_scaler_errors_total": ("keda_scaler_detail_errors_total", ""),
    "keda_scaler_metrics_latency": ("keda_scaler_metrics_latency_seconds", "in seconds now"),
    "keda_trigger_totals": ("keda_trigger_registered_total", ""),
}
"""What vLLM (V0 → V1) and KEDA have dropped, beside `names.OLD_NAMES`."""

_PROMETHEUS_CLIENT = "prometheus_client (Python processes)"
_SMALL: tuple[tuple[str, Kind, str, str], ...] = (
    # Prometheus makes these itself for each target (prometheus.io/docs/concepts/jobs_instances), whatever
    # labels somebody has given to it
    *(
        (name, Kind.GAUGE, "*", "Prometheus")
        for name in ("up", "scrape_duration_seconds", "scrape_samples_scraped")
    ),
    *(
        (f"scrape_{name}", Kind.GAUGE, "*", "Prometheus")
        for name in ("samples_post_metric_relabeling", "series_added", "timeout_seconds", "sample_limit")
    ),
    ("ALERTS", Kind.GAUGE, "*", "Prometheus"),
    ("ALERTS_FOR_STATE", Kind.GAUGE, "*", "Prometheus"),
    ("process_cpu_seconds", Kind.COUNTER, "*", _PROMETHEUS_CLIENT),
    *(
        (f"process_{name}", Kind.GAUGE, "*", _PROMETHEUS_CLIENT)
        for name in (
            *("resident_memory_bytes", "virtual_memory_bytes", "start_time_seconds", "open_fds", "max_fds"),
        )
    ),
    ("python_info", Kind.GAUGE, "implementation major minor patchlevel version", _PROMETHEUS_CLIENT),
    *(
        (f"python_gc_{name}", Kind.COUNTER, "generation", _PROMETHEUS_CLIENT)
        for name in ("collections", "objects_collected", "objects_uncollectable")
    ),
    # observe/http_metrics.py; vLLM has them from prometheus-fastapi-instrumentator
    ("http_requests", Kind.COUNTER, "method status handler", "Penstock and vLLM"),
    ("http_request_size_bytes", Kind.HISTOGRAM, "handler", "Penstock and vLLM"),
    ("http_response_size_bytes", Kind.HISTOGRAM, "handler", "Penstock and vLLM"),
    ("http_request_duration_highr_seconds", Kind.HISTOGRAM, "", "Penstock and vLLM"),
    ("http_request_duration_seconds", Kind.HISTOGRAM, "method handler", "Penstock and vLLM"),
    # kubernetes.io/docs/reference/instrumentation/metrics
    *(
        (f"kubelet_volume_stats_{name}", Kind.GAUGE, "persistentvolumeclaim", "the kubelet")
        for name in (
            "available_bytes",
            "capacity_bytes",
            "used_bytes",
            "inodes",
            "inodes_free",
            "inodes_used",
        )
    ),
)


@functools.cache
def sources() -> dict[str, str]:
    """The first line of each table: program, version and source."""
    return {path.stem: _first(path) for path in sorted(_TABLES.glob("*.tsv"))}


def find(name: str) -> Known | None:
    """What a query means by a name; None for a name that no table has. Ray Serve's are vLLM's."""
    if name.startswith(_RAY):
        served = _known().get(f"vllm:{name.removeprefix(_RAY)}")
        return served and replace(served, name=name, labels=served.labels | {"*"}, who=("Ray Serve",))
    return _known().get(name)


def gone(name: str) -> Gone | None:
    """Whether a name was exported once, in any of its parts (`_bucket`, `_total`)."""
    if name in _known():
        return None
    if name.startswith(_RAY):
        return gone(f"vllm:{name.removeprefix(_RAY)}")
    if name in _GONE:
        return Gone(name, *_GONE[name])
    for part in ("_bucket", "_count", "_sum", "_total"):
        if name.endswith(part) and (plain := name.removesuffix(part)) in _GONE:
            use, why = _GONE[plain]
            return Gone(name, use if "(" in use or use.endswith("_total") else use + part, why)
    for old in OLD_NAMES:
        if name == old.old or name.startswith(f"{old.old}_"):
            rest = name.removeprefix(old.old)
            if rest in ("", "_bucket", "_count", "_sum", "_total"):
                last = f"{old.last[0]}.{old.last[1]}"
                use = old.now + (rest or ("_total" if old.now.startswith("vllm:prefix_cache") else ""))
                return Gone(name, use, f"vLLM {last} was the last to show it")
    return None


def near(name: str) -> str | None:
    """The name that was probably meant."""
    if ":" not in name and (spelt := name.replace("_", ":", 1)) in _known():
        return spelt
    if belongs(name) or ":" in name:
        found = nearest(name, _known(), 0.8)
        # gpustack:… is another program's, and no slip in vllm:…
        return found if found and nearest(name.partition(":")[0], [found.partition(":")[0]], 0.6) else None
    # tables know one version of a program: what differs by more than a slip is another's, or of another one
    slip = nearest(name, _bare(), 0.95)
    return _bare()[slip] if slip else None


def belongs(name: str) -> bool:
    """Whether it begins as the names of a program do whose names are all known: then one that is not in the
    table does not exist."""
    return name.startswith(_FAMILIES) and not name.startswith("kube_state_metrics_")


def kind_of(name: str) -> Kind | None:
    """Its kind, where it is known."""
    known = find(name)
    return known.kind if known else None


_FAMILIES = ("vllm:", "vllm_", "penstock:", "penstock_", "DCGM_FI_", "kube_", "keda_")
"""node_exporter's, cAdvisor's and Prometheus' own have more names than one version's table can know."""


def _first(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


@functools.cache
def _bare() -> dict[str, str]:
    """Names without their programs' prefix → names."""
    return {each.partition(":")[2] or each: each for each in _known()}


@functools.cache
def _known() -> dict[str, Known]:
    found: dict[str, Known] = {}

    def add(metric: Metric, who: str) -> None:
        for part in _PARTS[metric.kind]:
            name = (
                metric.name.removesuffix(part) + part if metric.kind is Kind.COUNTER else metric.name + part
            )
            before = found.get(name)
            labels = frozenset(metric.labels) | (before.labels if before else frozenset())
            programs = (*(before.who if before else ()), who)
            found[name] = Known(name, metric.name, metric.kind, part, labels, programs)

    for metric in METRICS:
        add(metric, "Penstock's engine")
    for metric in GATEWAY:
        add(metric, "Penstock's gateway")
    for name, kind, labels, who in _SMALL:
        add(Metric(name, kind, "", tuple(labels.split())), who)
    for program, source in sources().items():
        who = source.partition(" (")[0]
        for line in (_TABLES / f"{program}.tsv").read_text("utf-8").splitlines()[1:]:
            name, kind_text, labels = [*line.split("\t"), "", ""][:3]
            kind = {"counter": Kind.COUNTER, "histogram": Kind.HISTOGRAM, "summary": Kind.HISTOGRAM}.get(
                kind_text, Kind.GAUGE
            )
            if kind is Kind.COUNTER and program in ("dcgm", "container", "kube", "aibrix"):
                # Go's clients export counters under the names that they are given
                found[name] = Known(name, name, kind, "", frozenset(labels.split()), (who,))
            else:
                add(Metric(name, kind, "", tuple(labels.split())), who)
                if kind_text == "summary":
                    found[name] = Known(
                        name, name, Kind.GAUGE, "", frozenset((*labels.split(), "quantile")), (who,)
                    )
    return found
