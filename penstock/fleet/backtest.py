"""The roofline against what others have measured and published; its efficiencies and its error bar.

python -m penstock.fleet.backtest            # the table of docs/planning.md
python -m penstock.fleet.backtest --fit      # fits again and prints catalogue/efficiency.json

Four numbers are fitted, by coordinate descent on the sum of absolute errors of logarithms: absolute, so
that no outlier draws them. The error bar is what is left where a source has not been seen: each source is
predicted with the numbers that all others give (leave one source out).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import catalogue
from .facts import SCHEMES
from .roofline import Efficiency, Fit, Machine, fitted
from .sizing import room

_START = Efficiency(memory=0.7, compute=0.5, step=0.001, all_reduce=1e-5)
_BOUNDS = {"memory": (0.2, 1.0), "compute": (0.1, 1.0), "step": (1e-5, 0.02), "all_reduce": (1e-6, 1e-4)}


@functools.cache
def _machine(model: str, gpu: str, tp: int, scheme: str, kv_width: int) -> Machine:
    facts, device = catalogue.find_model(model), catalogue.find_device(gpu)
    machine = Machine(facts, device, tp, SCHEMES[scheme], 2, kv_width, _START)
    machine.prefill(1)  # copies take over what it has reckoned of itself by then
    return machine


def predict(row: Mapping[str, Any], efficiency: Efficiency) -> float:
    """What the roofline says of a row: output tokens a second; of kind `ttft`, seconds."""
    key = (row["model"], row["gpu"], row["tp"], row["quantization"], 1 if row["kv"] == "fp8" else 2)
    known = _machine(*key)
    machine = copy.copy(known)
    object.__setattr__(machine, "efficiency", efficiency)
    prompt, output = row["input"], row["output"]
    if row["kind"] == "ttft":
        return machine.prefill(prompt)
    batch: float = row["batch"] or min(_fitting(key, prompt + output), row.get("most", math.inf))
    if row["kind"] == "decode":
        return batch / machine.decode(batch, prompt + output / 2)
    return machine.throughput(batch, prompt, output)


@functools.cache
def _fitting(key: tuple[str, str, int, str, int], tokens: int) -> float:
    """Sequences that fit where a row does not say how many: with 0.95 of the memory and steps of 8,192
    tokens, at most 2,048."""
    machine = _machine(*key)
    left = room(
        machine,
        utilization=0.95,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        max_model_len=tokens,
    )
    each = machine.facts.sequence_bytes(tokens, machine.kv_width, machine.tp)
    return max(1.0, min(2048.0, left.kv_cache / each))


def errors(rows: Sequence[Mapping[str, Any]], efficiency: Efficiency) -> list[float]:
    """log(measured / predicted) of each, in time: below 0 is faster than predicted for throughput."""
    result = []
    for row in rows:
        ratio = math.log(row["value"] / predict(row, efficiency))
        result.append(-ratio if row["kind"] == "ttft" else ratio)
    return result


def fit(rows: Sequence[Mapping[str, Any]]) -> Efficiency:
    """The four numbers that fit best; deterministic."""
    weights = _weights(rows)

    def loss(candidate: Efficiency) -> float:
        return sum(
            weight * abs(error) for weight, error in zip(weights, errors(rows, candidate), strict=True)
        )

    return descend(loss, _START, tuple(_BOUNDS))


def descend(loss: Callable[[Efficiency], float], start: Efficiency, names: Sequence[str]) -> Efficiency:
    """Where the loss is least, one number after the other, in steps that become smaller; deterministic."""
    best, step, least = start, 0.4, loss(start)
    while step > 0.004:
        improved = False
        for name in names:
            low, high = _BOUNDS[name]
            for factor in (1 + step, 1 / (1 + step)):
                value = min(high, max(low, getattr(best, name) * factor))
                candidate = dataclasses.replace(best, **{name: value})
                if (now := loss(candidate)) < least - 1e-9:
                    best, least, improved = candidate, now, True
        if not improved:
            step /= 2
    return Efficiency(*(float(f"{value:.3g}") for value in dataclasses.astuple(best)))


def _weights(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Each group of like rows counts as the square root of its size: sixty rows of one table are not sixty
    witnesses."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[_group(row)] = sizes.get(_group(row), 0) + 1
    return [1 / math.sqrt(sizes[_group(row)]) for row in rows]


def _group(row: Mapping[str, Any]) -> str:
    return f"{row['engine']} {row['model']} {row['gpu']} {row['kind']}"


def source(row: Mapping[str, Any]) -> str:
    """Who measured: engine and version."""
    return str(row["engine"])


def unseen(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """log(measured / predicted) of each row, predicted from the other sources' rows alone."""
    result: dict[int, float] = {}
    for name in dict.fromkeys(map(source, rows)):
        known = [row for row in rows if source(row) != name]
        efficiency = fit(known)
        for index, row in enumerate(rows):
            if source(row) == name:
                result[index] = errors([row], efficiency)[0]
    return [result[index] for index in range(len(rows))]


def backtest(rows: Sequence[Mapping[str, Any]]) -> Fit:
    """Fit, and error bar."""
    efficiency = fit(rows)
    left = sorted(unseen(rows))
    return Fit(
        **dataclasses.asdict(efficiency),
        low=round(math.exp(_percentile(left, 0.1)), 3),
        high=round(math.exp(_percentile(left, 0.9)), 3),
        median_error=round(_percentile(sorted(abs(math.expm1(error)) for error in left), 0.5), 3),
        count=len(rows),
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Linear between neighbours."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def table(rows: Sequence[Mapping[str, Any]], efficiency: Efficiency) -> str:
    """Markdown."""
    lines = [
        "| by | date | model | device | format | sequences | in / out | measured | predicted | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        predicted = predict(row, efficiency)
        facts, device = catalogue.find_model(row["model"]), catalogue.find_device(row["gpu"])
        machine = f"{row['tp']} x {device.name}"
        batch = row["batch"] or "what fits"
        lines.append(
            f"| {row['engine']} | {row['date']} | {facts.name.rpartition('/')[2]} | {machine} | "
            f"{row['quantization']} | {batch} | {row['input']} / {row['output']} | "
            f"{_unit(row, row['value'])} | {_unit(row, predicted)} | {row['value'] / predicted:.2f} |"
        )
    return "\n".join(lines)


def _unit(row: Mapping[str, Any], value: float) -> str:
    return f"{value * 1000:.0f} ms" if row["kind"] == "ttft" else f"{value:,.0f} tok/s"


def main() -> None:
    """See the module."""
    rows = catalogue.measurements()
    if "--fit" in sys.argv:
        print(json.dumps(dataclasses.asdict(backtest(rows)), indent=1))
    else:
        print(table(rows, fitted().efficiency))


if __name__ == "__main__":
    main()
