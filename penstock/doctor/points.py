"""The checklists of an engine: each point is a pure function of a snapshot.

A point that the engine does not tell enough for is `unknown`, and says where the answer is.
"""

from __future__ import annotations

import math

from penstock.fleet.hardware import GIB
from penstock.observe.page import Page

from .checklist import Checklist, Found, Verdict
from .snapshot import Snapshot

_FEW = 20
"""Requests below which what they were like says nothing."""

CHECKLIST: Checklist[Snapshot] = Checklist()
_point, examine = CHECKLIST.point, CHECKLIST.examine

_METRICS = "Its metrics do not tell; look at the command line that it was started with."


# ---- health ----


@_point("health", "health", "It answers its probes")
def _health(it: Snapshot) -> Found:
    said = ", ".join(f"{path} {status}" for path, status in it.health.items())
    if it.health.get("/health", 0) != 200:
        return said, Verdict.FAIL, "The engine has died or does not answer: its log says why (--logs)."
    if it.health.get("/livez", 404) == 503:
        return said, Verdict.FAIL, "It makes no progress: restart it, and keep its log."
    if it.health.get("/readyz", 404) == 503:
        return said, Verdict.WARN, "It takes no new requests: it drains, or has not finished loading."
    return said, Verdict.OK, ""


@_point("metrics", "health", "It tells its metrics")
def _metrics(it: Snapshot) -> Found:
    if it.engine == "gateway":
        advice = "Give the URL of an engine; under penstock up, the log has it: `… is ready …, at URL`."
        return "this is a gateway of Penstock", Verdict.FAIL, advice
    if it.page is None or it.engine == "unknown":
        advice = "Most points need /metrics of vLLM's names; start vLLM without --disable-log-stats."
        return it.page_problem or "no metrics of vLLM's names", Verdict.WARN, advice
    name = {"penstock": "Penstock", "vllm": "vLLM"}[it.engine]
    return f"{name} {it.version or 'of unknown version'}, model {it.model or 'unknown'}", Verdict.OK, ""


@_point("errors", "health", "Requests end well")
def _errors(it: Snapshot) -> Found:
    total = _total(it, "vllm:request_success_total")
    if it.page is None or not total:
        return "no request has ended yet", Verdict.UNKNOWN, ""
    failed = it.page.total("vllm:request_success_total", finished_reason="error") or 0.0
    aborted = it.page.total("vllm:request_success_total", finished_reason="abort") or 0.0
    said = f"of {total:,.0f} requests {failed:,.0f} failed, {aborted:,.0f} were given up by clients"
    if failed > 0.01 * total:
        return said, Verdict.FAIL, "Look into its log: penstock doctor --logs FILE."
    if aborted > 0.1 * total:
        return said, Verdict.WARN, "Clients give up: compare their timeouts with the latencies below."
    return said, Verdict.OK, ""


# ---- memory: the checklist's six ----


@_point(
    "gpu-memory-utilization", "memory", "--gpu-memory-utilization is 0.90, or 0.85 after out-of-memory errors"
)
def _utilization(it: Snapshot) -> Found:
    if it.config.get("device", "").startswith("cpu"):
        size = it.number("kv_cache_size_tokens")
        told = f"on a CPU; its KV cache holds {size:,.0f} tokens" if size is not None else "on a CPU"
        return told, Verdict.OK, ""
    share = it.number("gpu_memory_utilization")
    if share is None:
        return "not told", Verdict.UNKNOWN, _METRICS
    said = f"{share:g}"
    if share > 0.95:
        return (
            said,
            Verdict.WARN,
            "Over 0.95 little is left for activations: lower it to 0.90, or 0.85 after an OOM.",
        )
    if share < 0.8:
        return said, Verdict.WARN, "Memory that nothing else uses could hold more requests: raise it to 0.90."
    return said, Verdict.OK, ""


@_point("max-model-len", "memory", "--max-model-len is what requests need")
def _length(it: Snapshot) -> Found:
    length = it.max_model_len or it.number("max_model_len")
    if length is None:
        return (
            "not told",
            Verdict.UNKNOWN,
            "Neither /v1/models (does it want a key?) nor the metrics tell it.",
        )
    needed = _longest(it.page)
    if needed is None:
        return (
            f"{length:,.0f}; too few requests yet to compare",
            Verdict.UNKNOWN,
            "Ask again after some traffic.",
        )
    said = f"{length:,.0f}; 99 of 100 requests take {needed:,.0f} tokens or fewer"
    if math.isinf(needed):
        return f"{length:,.0f}; requests are as long as it allows", Verdict.OK, ""
    if length > 4 * needed and length > 2048:
        advice = (
            f"Cap it for this workload, as --max-model-len {_round_up(2 * needed)}: else a request may take "
        )
        return (
            said,
            Verdict.WARN,
            advice + f"{length / max(1, needed):,.0f} times the KV cache of the others.",
        )
    return said, Verdict.OK, ""


@_point("max-num-seqs", "memory", "--max-num-seqs fits the KV cache")
def _seqs_fit(it: Snapshot) -> Found:
    tokens, seqs = _cache_tokens(it), it.number("max_num_seqs")
    mean = _mean_tokens(it.page)
    preempted, ended = _total(it, "vllm:num_preemptions_total"), _total(it, "vllm:request_success_total")
    parts = [f"--max-num-seqs {seqs:g}" if seqs else "--max-num-seqs is not told"]
    fits = None
    if tokens is not None and mean:
        fits = tokens / mean
        parts.append(f"the cache of {tokens:,.0f} tokens holds {fits:,.0f} requests of {mean:,.0f}")
    if preempted is not None:
        parts.append(f"{preempted:,.0f} preemptions")
    said = "; ".join(parts)
    if preempted and ended and preempted > 0.01 * ended:
        verdict = Verdict.FAIL if preempted > 0.1 * ended else Verdict.WARN
        advice = "Requests are computed again because the cache runs full: lower --max-num-seqs"
        advice += f" to {max(1, int(fits))}" if fits is not None else ""
        return said, verdict, advice + ", or give the cache more memory."
    if fits is not None and seqs is not None and fits < seqs:
        advice = f"The cache is full before so many run; --max-num-seqs {max(1, int(fits))} is what fits."
        return said, Verdict.WARN, advice
    if fits is None and preempted is None:
        return said, Verdict.UNKNOWN, _METRICS
    return said, Verdict.OK, ""


@_point("quantization", "memory", "Weights are quantised where memory is short")
def _quantised(it: Snapshot) -> Found:
    scheme = it.config.get("quantization")
    used = it.page.most("vllm:kv_cache_usage_perc") if it.page is not None else None
    waiting = _total(it, "vllm:num_requests_waiting")
    short = used is not None and used > 0.9 and bool(waiting)
    told = f"quantization {scheme or 'none told'}"
    told += f", dtype {it.config['dtype']}" if "dtype" in it.config else ""
    told += f"; {used:.0%} of the KV cache is in use" if used is not None else ""
    if short and scheme in (None, "none"):
        advice = (
            "4-bit weights (AWQ, GPTQ; int4 here), or FP8 on H100 and L40S, leave more to the cache; compare "
        )
        return told, Verdict.WARN, advice + "the quality on your own evaluation set first."
    if scheme is None and used is None:
        return "not told", Verdict.UNKNOWN, _METRICS
    return told, Verdict.OK, ""


@_point("shared-memory", "memory", "/dev/shm has 8 GiB or more")
def _shm(it: Snapshot) -> Found:
    parallel = it.number("tensor_parallel_size")
    if it.engine == "penstock":
        return "not used: an engine of Penstock is one process per device", Verdict.OK, ""
    if it.machine is None or it.machine.shm is None:
        return (
            "not to be seen from here",
            Verdict.UNKNOWN,
            "Run penstock doctor in the pod: kubectl exec … df /dev/shm.",
        )
    said = f"{it.machine.shm / GIB:.1f} GiB, as seen from here"
    if it.machine.shm < 8 * GIB and parallel != 1:
        return (
            said,
            Verdict.WARN,
            "Mount an emptyDir with medium: Memory and 8Gi there; with docker, --shm-size=8g.",
        )
    return said, Verdict.OK, ""


@_point("main-memory", "memory", "The pod has memory to load the weights (20 GiB for 7B, 80 GiB for 70B)")
def _memory(it: Snapshot) -> Found:
    resident = _total(it, "process_resident_memory_bytes")
    own = f"; the API process has {resident / GIB:.1f} GiB" if resident else ""
    if it.machine is None or it.machine.memory is None:
        return (
            f"not to be seen from here{own}",
            Verdict.UNKNOWN,
            "Run penstock doctor in the pod: kubectl exec …",
        )
    machine = it.machine
    kind = "limit of the container" if machine.limited else "memory of the machine"
    used = f", {machine.used / GIB:.1f} in use" if machine.used is not None and machine.limited else ""
    said = f"{it.machine.memory / GIB:.1f} GiB {kind}{used}{own}"
    if machine.limited and machine.used is not None and machine.used > 0.95 * (machine.memory or 1):
        return (
            said,
            Verdict.WARN,
            "Close to its limit, where the kernel kills it: raise the pod's memory limit.",
        )
    return said, Verdict.OK, ""


# ---- throughput ----


@_point("max-num-batched-tokens", "throughput", "--max-num-batched-tokens suits the prompts")
def _batched(it: Snapshot) -> Found:
    budget = it.number("max_num_batched_tokens")
    prompts = it.page.histogram("vllm:request_prompt_tokens") if it.page is not None else None
    mean = prompts.mean if prompts is not None and prompts.count >= _FEW else None
    if budget is None or mean is None:
        said = f"{budget:,.0f}" if budget is not None else "not told"
        said += (
            f"; prompts have {mean:,.0f} tokens on average" if mean is not None else "; too few requests yet"
        )
        return said, Verdict.UNKNOWN, _METRICS if budget is None else "Ask again after some traffic."
    said = f"{budget:,.0f}; prompts have {mean:,.0f} tokens on average"
    if mean > budget and not it.config.get("device", "").startswith("cpu"):
        advice = (
            "Each prompt takes several steps: raise it for more throughput with long texts; tokens between "
        )
        return said, Verdict.WARN, advice + "those steps come later then."
    return said, Verdict.OK, ""


@_point("queue", "throughput", "--max-num-seqs lets in what the engine can compute")
def _queue(it: Snapshot) -> Found:
    running, waiting = _total(it, "vllm:num_requests_running"), _total(it, "vllm:num_requests_waiting")
    if running is None or waiting is None or it.page is None:
        return "not told", Verdict.UNKNOWN, _METRICS
    seqs, cache = it.number("max_num_seqs"), it.page.most("vllm:kv_cache_usage_perc") or 0.0
    waited = _mean(it.page, "vllm:request_queue_time_seconds")
    first = _mean(it.page, "vllm:time_to_first_token_seconds")
    said = f"{running:,.0f} running" + (f" of {seqs:g}" if seqs else "")
    said += f", {waiting:,.0f} waiting, KV cache {cache:.0%}"
    if waited is not None and first is not None:
        said += (
            f"; {waited * 1000:,.0f} of {first * 1000:,.0f} ms to the first token were queueing, on average"
        )
    queued = waited is not None and first is not None and waited > 0.5 * first and waited > 0.1
    if waiting > 20:
        verdict, more = Verdict.FAIL, "Scale out, or limit what is let in; "
    elif waiting > 0 or queued:
        verdict, more = Verdict.WARN, ""
    else:
        return said, Verdict.OK, ""
    if cache > 0.9:
        return (
            said,
            verdict,
            f"{more}requests wait for KV blocks: give the cache more memory, or cap --max-model-len.",
        )
    return (
        said,
        verdict,
        f"{more}raise --max-num-seqs until a latency target breaks: penstock tune --live {it.url}.",
    )


@_point("prefix-caching", "throughput", "Prefix caching is on, and hits")
def _prefix(it: Snapshot) -> Found:
    on = it.config.get("enable_prefix_caching")
    asked, hit = _total(it, "vllm:prefix_cache_queries_total"), _total(it, "vllm:prefix_cache_hits_total")
    if on is not None and on.lower() == "false":
        return (
            "off",
            Verdict.WARN,
            "--enable-prefix-caching: requests with the same system prompt share its cache.",
        )
    if not asked:
        return "on; nothing was looked up yet" if on else "not told", Verdict.UNKNOWN, "" if on else _METRICS
    share = (hit or 0.0) / asked
    said = f"on; {share:.0%} of {asked:,.0f} prompt tokens were found in it"
    if asked > 10_000 and share < 0.05:
        advice = (
            "If requests share instructions: dynamic text (a date, a name, retrieved passages) stands before "
        )
        return said, Verdict.WARN, advice + "the static part of the prompt; move the static part first."
    return said, Verdict.OK, ""


@_point("scheduler-steps", "throughput", "--num-scheduler-steps is 1 for latency, 10 or more for batches")
def _steps(it: Snapshot) -> Found:
    if it.engine == "penstock":
        return "there is no such flag: every step is scheduled", Verdict.OK, ""
    version = _version(it.version)
    if it.engine == "vllm" and version is not None and version >= (0, 9):
        return f"vLLM {it.version} has no such flag any more (V1 schedules every step)", Verdict.OK, ""
    steps = it.number("num_scheduler_steps")
    if steps is None:
        return "not told", Verdict.UNKNOWN, _METRICS
    return (
        f"{steps:g}",
        Verdict.OK,
        "" if steps == 1 else "Tokens come in bursts; 1 is right for interactive use.",
    )


@_point("latency", "throughput", "The first token comes soon")
def _latency(it: Snapshot) -> Found:
    first = it.page.histogram("vllm:time_to_first_token_seconds") if it.page is not None else None
    if first is None or first.count < _FEW or it.page is None:
        return "too few requests yet", Verdict.UNKNOWN, "Ask again after some traffic."
    bound = first.bound(0.95)
    parts = [f"TTFT within {bound:g} s for 95 of 100 requests" if bound is not None else "TTFT unknown"]
    per_token = _mean(it.page, "vllm:request_time_per_output_token_seconds")
    if per_token is not None:
        parts.append(f"{per_token * 1000:,.1f} ms per token on average")
    running, seqs = _total(it, "vllm:num_requests_running") or 0.0, it.number("max_num_seqs")
    said = "; ".join(parts)
    if bound is not None and bound > 2.5:
        low = seqs is not None and running < seqs
        advice = "Prompts take long to compute: prefix caching, shorter prompts, more or faster devices."
        waited = _mean(it.page, "vllm:request_queue_time_seconds") or 0.0
        if waited > 0.5 * (first.mean or 0.0):
            advice = (
                "Most of it is queueing: raise --max-num-seqs (penstock tune finds how far), or scale out."
            )
        return said, Verdict.WARN, advice + (" Places in the steps are free at this moment." if low else "")
    return said, Verdict.OK, ""


# ---- arithmetic ----


def _total(it: Snapshot, name: str) -> float | None:
    return it.page.total(name) if it.page is not None else None


def _mean(page: Page, name: str) -> float | None:
    found = page.histogram(name)
    return found.mean if found is not None and found.count >= _FEW else None


def _longest(page: Page | None) -> float | None:
    """Tokens, prompt and answer, that 99 of 100 requests stay within; an upper bound."""
    if page is None:
        return None
    prompts = page.histogram("vllm:request_prompt_tokens")
    answers = page.histogram("vllm:request_generation_tokens")
    if prompts is None or answers is None or min(prompts.count, answers.count) < _FEW:
        return None
    bounds = prompts.bound(0.99), answers.bound(0.99)
    return sum(bound for bound in bounds if bound is not None)


def _mean_tokens(page: Page | None) -> float | None:
    if page is None:
        return None
    means = [_mean(page, f"vllm:request_{kind}_tokens") for kind in ("prompt", "generation")]
    return sum(mean for mean in means if mean is not None) if None not in means else None


def _cache_tokens(it: Snapshot) -> float | None:
    if (size := it.number("kv_cache_size_tokens")) is not None:
        return size
    blocks, block = it.number("num_gpu_blocks"), it.number("block_size")
    return blocks * block if blocks is not None and block is not None else None


def _round_up(tokens: float) -> int:
    """The next power of two."""
    return 1 << max(0, math.ceil(math.log2(max(1.0, tokens))))


def _version(text: str | None) -> tuple[int, int] | None:
    try:
        major, minor = (text or "").split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        return None
