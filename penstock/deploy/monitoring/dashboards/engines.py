"""Engines: load, latency, KV cache, steps; of Penstock's and of vLLM's, by the same names."""

from __future__ import annotations

from penstock.deploy.monitoring.alerts import KV_HIGH, KV_SOFT, WAITING
from penstock.deploy.monitoring.panels import Dashboard, Panel, Variable
from penstock.deploy.monitoring.promql import select
from penstock.deploy.workloads import Bundle
from penstock.observe import names as engine
from penstock.observe.names import Metric

from .queries import CLEAR, GREEN, RED, YELLOW, namespace, percentiles, rate


def page(bundle: Bundle) -> Dashboard:
    """The page."""
    where = ('namespace="$namespace"', 'job=~"$job"')
    pod, job = "{{pod}}", "{{job}}"

    def gauge(metric: Metric, by: str) -> str:
        return f"sum by ({by}) ({select(metric, *where)})"

    kv = f"max by (pod) ({select(engine.KV_CACHE_USAGE_PERC, *where)})"
    hits = rate(engine.PREFIX_CACHE_HITS, *where, by="job")
    asked = rate(engine.PREFIX_CACHE_QUERIES, *where, by="job")
    thresholds = ((None, GREEN), (KV_SOFT, YELLOW), (KV_HIGH, RED))
    rows: list[tuple[str, list[Panel]]] = [
        (
            "Now",
            [
                Panel("Replicas", ((f"sum({select('up', *where)})", ""),), kind="stat", width=4),
                Panel(
                    "Running",
                    ((f"sum({select(engine.NUM_REQUESTS_RUNNING, *where)})", ""),),
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Waiting",
                    ((f"sum({select(engine.NUM_REQUESTS_WAITING, *where)})", ""),),
                    kind="stat",
                    width=4,
                    thresholds=((None, GREEN), (1, YELLOW), (WAITING, RED)),
                ),
                Panel(
                    "KV cache", ((f"max({kv})", ""),), "percentunit", "stat", width=4, thresholds=thresholds
                ),
                Panel("Tokens/s", ((rate(engine.GENERATION_TOKENS, *where), ""),), kind="stat", width=4),
                Panel("Requests/s", ((rate(engine.REQUEST_SUCCESS, *where), ""),), "reqps", "stat", width=4),
            ],
        ),
        (
            "Latency",
            [
                Panel(
                    "Time to first token",
                    percentiles(engine.TIME_TO_FIRST_TOKEN, *where, by="job", legend=job),
                    "s",
                ),
                Panel(
                    "Time between tokens",
                    percentiles(engine.INTER_TOKEN_LATENCY, *where, by="job", legend=job),
                    "s",
                ),
                Panel("Whole answer", percentiles(engine.E2E_LATENCY, *where, by="job", legend=job), "s"),
                Panel(
                    "In the queue",
                    percentiles(engine.QUEUE_TIME, *where, by="job", legend=job),
                    "s",
                    about="From its arrival until a request is first in a step.",
                ),
                Panel("Prefill", percentiles(engine.PREFILL_TIME, *where, by="job", legend=job), "s"),
                Panel("Decode", percentiles(engine.DECODE_TIME, *where, by="job", legend=job), "s"),
            ],
        ),
        (
            "Load",
            [
                Panel("Running requests", ((gauge(engine.NUM_REQUESTS_RUNNING, "pod"), pod),), stacked=True),
                Panel(
                    "Waiting requests",
                    ((gauge(engine.NUM_REQUESTS_WAITING, "pod"), pod),),
                    stacked=True,
                    thresholds=((None, CLEAR), (WAITING, RED)),
                    about=f"More than {WAITING} at one replica for two minutes is an alert.",
                ),
                Panel("KV cache in use", ((kv, pod),), "percentunit", thresholds=thresholds, most=1.0),
                Panel(
                    "Generated tokens",
                    ((rate(engine.GENERATION_TOKENS, *where, by="job"), job),),
                    "short",
                    about="A second.",
                ),
                Panel(
                    "Prompt tokens",
                    ((rate(engine.PROMPT_TOKENS_BY_SOURCE, *where, by="job, source"), "{{job}} {{source}}"),),
                    stacked=True,
                    about="A second: computed, or found in the cache.",
                ),
                Panel(
                    "Prefix cache hits",
                    ((f"{hits} / {asked}", job),),
                    "percentunit",
                    most=1.0,
                    about="Share of prompt tokens that were found.",
                ),
            ],
        ),
        (
            "Steps",
            [
                Panel(
                    "Steps a second", ((rate(engine.ITERATION_TOKENS, *where, by="pod", part="count"), pod),)
                ),
                Panel(
                    "Tokens of a step",
                    (
                        (
                            f"{rate(engine.ITERATION_TOKENS, *where, by='pod', part='sum')} / "
                            f"{rate(engine.ITERATION_TOKENS, *where, by='pod', part='count')}",
                            pod,
                        ),
                    ),
                ),
                Panel(
                    "Preemptions",
                    ((rate(engine.NUM_PREEMPTIONS, *where, by="pod"), pod),),
                    about="Requests that lost their KV blocks, a second: the cache is too small.",
                ),
                Panel(
                    "How requests end",
                    ((rate(engine.REQUEST_SUCCESS, *where, by="finished_reason"), "{{finished_reason}}"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Refused",
                    ((rate(engine.ADMISSION_REJECTIONS, *where, by="job, reason"), "{{job}} {{reason}}"),),
                    "reqps",
                ),
                *_own(bundle, where),
            ],
        ),
    ]
    return Dashboard(
        "engines",
        "Penstock: engines",
        "What the engines of a namespace do.",
        (
            namespace(engine.NUM_REQUESTS_RUNNING),
            Variable("job", f"label_values({select(engine.NUM_REQUESTS_RUNNING, where[0])}, job)", "Model"),
        ),
        rows,
    )


def _own(bundle: Bundle, where: tuple[str, ...]) -> list[Panel]:
    """What only Penstock's engine says."""
    if not any(each.engine == "penstock" for each in bundle.workloads):
        return []
    busy = rate(engine.DEVICE_SECONDS, *where, 'state="busy"', by="pod")
    predicted = rate(engine.PREDICTED_STEP_SECONDS, *where, by="pod", part="sum")
    taken = rate(engine.STEP_SECONDS, *where, by="pod", part="sum")
    return [
        Panel(
            "Device busy",
            ((f"{busy} / {rate(engine.DEVICE_SECONDS, *where, by='pod')}", "{{pod}}"),),
            "percentunit",
            most=1.0,
            about="Share of the device's time in which it computes.",
        ),
        Panel(
            "Steps: predicted against taken",
            ((f"{predicted} / {taken}", "{{pod}}"),),
            "percentunit",
            about="Time of steps that the cost model has predicted, over what they took. 100 % is right.",
        ),
    ]
