"""Numbers derived from the result file, and their Markdown: nothing is typed in, nothing is measured here.

decode    ms per token of one request (load c1): the median TPOT
prefill   tokens/s of one request: input / median TTFT (for a server that includes HTTP)
share of the memory limit   bytes of weights / ms per token, over the bandwidth measured beside the engine
share of the matmul limit   2 · (parameters - embedding) · input / TTFT, over the measured matmul rate
ratio     output tok/s over those of the better of vLLM's two settings
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.checkpoint import SHAPES

from .engines import ENGINES, FAMILIES
from .loads import THROUGHPUT_CURVE
from .results import Results

VLLM = ("vllm-bound", "vllm")
NONE = "–"


@dataclass(frozen=True, slots=True)
class SingleStream:
    """One engine with one request; None where it was not measured."""

    decode_ms: float | None
    memory_share: float | None
    prefill_short: float | None
    """Tokens/s of the prompt of load c1."""
    prefill_long: float | None
    """Tokens/s of the prompt of load long-c1."""
    matmul_share: float | None
    """At the long prompt."""


@dataclass(frozen=True, slots=True)
class Target:
    """One line of the list of targets."""

    what: str
    wanted: str
    measured: str
    met: bool | None
    """None if something that it needs was not measured."""


def measured_engines(results: Results) -> list[str]:
    """Ids of the engines with at least one load: family by family, ours first, bfloat16 before the others."""
    measured = {run["engine"] for run in results.runs if "report" in run}
    known = [engine for engine in ENGINES.values() if engine.id in measured]
    known.sort(key=lambda engine: (FAMILIES.index(engine.family), engine.weights != "bf16"))
    return [engine.id for engine in known]


def best_vllm(results: Results, load: str) -> str | None:
    """The setting of vLLM with more output tokens/s under this load."""
    found = [id for id in VLLM if results.median(id, load, "output_throughput") is not None]
    return max(found, key=lambda id: results.median(id, load, "output_throughput") or 0.0, default=None)


def ratio_to_vllm(results: Results, engine: str, load: str) -> float | None:
    """Output tok/s over vLLM's better setting."""
    peer = best_vllm(results, load)
    if peer is None:
        return None
    return _ratio(*(results.median(id, load, "output_throughput") for id in (engine, peer)))


def single_stream(results: Results, engine: str) -> SingleStream:
    """What one request gets, and how near that is to the machine's limits."""
    decode = results.median(engine, "c1", "median_tpot_ms")
    bandwidth, flops = (results.limit(engine, name) for name in ("bandwidth", "flops"))
    weights: int | None = results.data["engines"][engine]["weight_bytes"]
    shape = SHAPES[results.data["model"]]
    long = _prefill(results, engine, "long-c1")
    return SingleStream(
        decode_ms=decode,
        memory_share=weights / (1e-3 * decode) / bandwidth if weights and decode and bandwidth else None,
        prefill_short=_prefill(results, engine, "c1"),
        prefill_long=long,
        matmul_share=2.0 * linear_parameters(shape) * long / flops if long and flops else None,
    )


def ceiling(results: Results, load: str) -> float | None:
    """Output tok/s that the limits measured at their best allow this load in bfloat16, whatever the engine.

    Each of the steps that the answers need at least (all tokens over the concurrency) reads the weights once,
    and every token passes the linear layers, every output token the output matrix, at the measured matmul
    rate; whichever takes longer. The prompts' shared part is computed once. Attention is left out.
    """
    entry = results.data["loads"][load]
    report = next((run["report"] for run in results.runs if run["what"] == load), None)
    bandwidth, flops = (results.best_limit(name) for name in ("bandwidth", "flops"))
    if report is None or bandwidth is None or flops is None:
        return None
    shape = SHAPES[results.data["model"]]
    outputs, requests = sum(report["output_lens"]), len(report["output_lens"])
    prompts = sum(report["prompt_lens"]) - (requests - 1) * entry["shared_len"]
    linear, head = linear_parameters(shape), shape["hidden_size"] * shape["vocab_size"]
    # A request's last token is never fed back.
    compute = 2.0 * (linear * (prompts + outputs - requests) + head * outputs) / flops
    reading = 2.0 * (linear + head) * outputs / entry["concurrency"] / bandwidth
    return float(outputs / max(compute, reading))


def linear_parameters(shape: dict[str, int]) -> int:
    """Parameters of the matrices that every prompt token passes: all but the embedding and the output."""
    hidden, head = shape["hidden_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    attention = hidden * head * (2 * heads + 2 * kv_heads)
    return shape["num_hidden_layers"] * (attention + 3 * hidden * shape["intermediate_size"])


def _prefill(results: Results, engine: str, load: str) -> float | None:
    ttft = results.median(engine, load, "median_ttft_ms")
    length = results.data["loads"].get(load, {}).get("input_len")
    return 1e3 * length / ttft if ttft and isinstance(length, int) else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def targets(results: Results) -> list[Target]:
    """The targets of the engine on CPUs, each against what was measured."""
    rows = [_throughput(results, load, 1.2 if load == "c1" else 1.5) for load in THROUGHPUT_CURVE]
    ours = _single(results, "penstock")
    int8, w8a8, int4, q8 = (
        _single(results, id) for id in ("penstock-int8", "penstock-w8a8", "penstock-int4", "llama-q8")
    )
    for what, wanted, value, show in (
        ("Single-stream decode, share of the measured memory bandwidth", 0.85, ours.memory_share, percent),
        ("Prefill of 1,000 tokens, share of the measured matmul rate", 0.70, ours.matmul_share, percent),
        ("int8 against bf16, single-stream decode", 1.7, _ratio(ours.decode_ms, int8.decode_ms), times),
        ("int4 against bf16, single-stream decode", 2.4, _ratio(ours.decode_ms, int4.decode_ms), times),
        ("int8 against llama.cpp Q8_0, decode", 1.0, _ratio(q8.decode_ms, int8.decode_ms), times),
        ("int8 against llama.cpp Q8_0, prefill", 2.0, _ratio(int8.prefill_long, q8.prefill_long), times),
        (
            "w8a8 against llama.cpp Q8_0, prefill (both round activations to 8 bits)",
            2.0,
            _ratio(w8a8.prefill_long, q8.prefill_long),
            times,
        ),
    ):
        rows.append(_at_least(what, wanted, value, show))
    start = results.seconds("penstock")
    met = start <= 8.0 if start is not None else None
    rows.append(Target("From exec to first token, warm page cache", "≤ 8 s", _cell(start, seconds), met))
    return rows


def _single(results: Results, engine: str) -> SingleStream:
    if engine not in results.data["engines"]:
        return SingleStream(None, None, None, None, None)
    return single_stream(results, engine)


def _throughput(results: Results, load: str, wanted: float) -> Target:
    ratio, peer = ratio_to_vllm(results, "penstock", load), best_vllm(results, load)
    concurrency = results.data["loads"].get(load, {}).get("concurrency", load.removeprefix("c"))
    what = f"Throughput against vLLM's better setting, concurrency {concurrency}, 128 in / 64 out"
    aim = f"≥ {times(wanted)}" + ("" if load == "c1" else ", median TTFT no worse")
    if ratio is None or peer is None:
        return Target(what, aim, NONE, None)
    ours, theirs = (results.median(id, load, "median_ttft_ms") for id in ("penstock", peer))
    in_time = load == "c1" or (ours is not None and theirs is not None and ours <= theirs)
    measured = f"{times(ratio)}, TTFT {_cell(ours, whole)} ms against {_cell(theirs, whole)}"
    return Target(what, aim, measured, ratio >= wanted and in_time)


def _at_least(what: str, wanted: float, value: float | None, show: Callable[[float], str]) -> Target:
    met = value >= wanted if value is not None else None
    return Target(what, f"≥ {show(wanted)}", _cell(value, show), met)


# ── Markdown ───────────────────────────────────────────────────────────────────────────────────────


def whole(value: float) -> str:
    """Three digits at least: 1,234, 12.3."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def times(value: float) -> str:
    """A ratio: 1.52×."""
    return f"{value:.2f}×"


def percent(value: float) -> str:
    """A share: 85 %."""
    return f"{100 * value:.0f} %"


def seconds(value: float) -> str:
    """A duration: 2.7 s."""
    return f"{value:.1f} s"


def _cell(value: float | None, show: Callable[[float], str] = whole) -> str:
    return NONE if value is None else show(value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, with numbers aligned to the right in all columns but the first."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed_table(results: Results) -> str:
    """Engines × loads: output tok/s, and the ratio to vLLM's better setting."""

    def cell(engine: str, load: str) -> str:
        speed, ratio = results.median(engine, load, "output_throughput"), ratio_to_vllm(results, engine, load)
        return _cell(speed) + (f" ({times(ratio)})" if ratio is not None else "")

    limits = [_cell(ceiling(results, load)) for load in results.data["loads"]]
    return "\n".join([_by_load(results, cell), f"| *limit of the machine in bf16* | {' | '.join(limits)} |"])


def latency_table(results: Results, metric: str) -> str:
    """Engines × loads: median and 99th percentile of `metric` (ttft, tpot, itl), in ms."""

    def cell(engine: str, load: str) -> str:
        middle, worst = (results.median(engine, load, f"{name}_{metric}_ms") for name in ("median", "p99"))
        return NONE if middle is None else f"{whole(middle)} / {_cell(worst)}"

    return _by_load(results, cell)


def _by_load(results: Results, cell: Callable[[str, str], str]) -> str:
    loads = results.data["loads"]
    rows = [
        [results.data["engines"][id]["title"], *(cell(id, load) for load in loads)]
        for id in measured_engines(results)
    ]
    return table(["", *(entry["title"] for entry in loads.values())], rows)


def single_table(results: Results) -> str:
    """Engines × what one request gets."""
    head = [
        *("", "decode, ms/token", "of the memory limit", "prefill of 128, tok/s"),
        *("prefill of 1,000, tok/s", "of the matmul limit"),
    ]
    rows = []
    for id in measured_engines(results):
        one = single_stream(results, id)
        numbers = (_cell(one.decode_ms), _cell(one.memory_share, percent), _cell(one.prefill_short))
        more = (_cell(one.prefill_long), _cell(one.matmul_share, percent))
        rows.append([results.data["engines"][id]["title"], *numbers, *more])
    return table(head, rows)


def startup_table(results: Results) -> str:
    """Engines × seconds from exec to first token."""
    rows = [
        [
            results.data["engines"][id]["title"],
            _cell(results.seconds(id), seconds),
            _cell(results.seconds(id, "cold-startup"), seconds),
        ]
        for id in measured_engines(results)
    ]
    return table(["", "warm", "without its compiled code"], rows)


def target_table(results: Results) -> str:
    """The targets and whether they are met."""
    marks = {True: "yes", False: "**no**", None: NONE}
    rows = [[row.what, row.wanted, row.measured, marks[row.met]] for row in targets(results)]
    return table(["target", "wanted", "measured", "met"], rows)


def conditions(results: Results) -> str:
    """Machine, versions and what could not be measured, as a list."""
    machine, engines = results.data["machine"], results.data["engines"]
    bandwidth, flops = (results.limit("penstock", name) for name in ("bandwidth", "flops"))
    limits = (
        f"; measured {bandwidth / 1e9:.1f} GB/s, {flops / 1e9:,.0f} GFLOP/s" if bandwidth and flops else ""
    )
    versions: dict[str, str] = {}
    for entry in engines.values():
        versions |= entry["versions"]
    lines = [
        f"- Machine: {machine['cpu']}, {machine['cores']} cores{limits}",
        f"- Model: random weights in the shape of {results.data['model']}",
        f"- Rounds: {results.rounds()}, medians of them; begun {results.data['date']}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}",
    ]
    for id, entry in engines.items():
        if entry["settings"]:
            chosen = ", ".join(f"{name}={value}" for name, value in entry["settings"].items())
            lines.append(
                f"- {entry['title']}: {chosen} was the fastest of {len(results.data['tuning'][id])} settings"
            )
    missing = {run["engine"]: run["reason"] for run in results.runs if run["what"] == "failed"}
    lines += [f"- Not measured: {reason}" for id, reason in missing.items()]
    return "\n".join(lines)
