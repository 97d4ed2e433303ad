"""The roofline fitted to measurements of one's own: results of `penstock bench serve`, or of vLLM's.

    results at several concurrencies ─▶ rows ─▶ efficiencies of this model on this device, and their error bar

A result says how many tokens a second came at how many requests under way; one at a concurrency of 1 says the
time to the first token, too. Each row is predicted with what all others give (leave one out): the farthest of
them on either side is the error bar.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from penstock.core.errors import StartupError

from .backtest import descend
from .roofline import Efficiency, Fit, Machine, fitted

FEWEST = 3
"""Rows, as of two results one of which is at a concurrency of 1: with fewer there is no error to tell."""
_ALONE = 1.5
"""Requests under way, on average, up to which a first token waits for nobody."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number that was measured."""

    kind: Literal["throughput", "ttft"]
    batch: float
    """Requests under way."""
    prompt: int
    output: int
    value: float
    """Output tokens a second; seconds of a first token."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on a device, and what it makes of the roofline."""

    fit: Fit
    batch: float
    """The most requests under way."""
    tokens: int
    """The longest requests: prompt and answer."""


def read(paths: Sequence[Path]) -> tuple[Row, ...]:
    """Rows of result files. Raises StartupError, naming the file and the key, for what is no such result."""
    return tuple(row for path in paths for row in _rows(path))


def _rows(path: Path) -> list[Row]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _odd(path, f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise _odd(path, f"is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise _odd(path, "is no object")
    done = _number(path, found, "completed")
    prompt, output = (
        round(_number(path, found, key) / done) for key in ("total_input_tokens", "total_output_tokens")
    )
    # Little's law: requests under way are those of a second, times what each takes
    if "mean_e2el_ms" in found:
        whole = _number(path, found, "mean_e2el_ms")
    else:  # vLLM's tells it only where it is asked
        whole = _number(path, found, "mean_ttft_ms") + output * _number(path, found, "mean_tpot_ms")
    batch = _number(path, found, "request_throughput") * whole / 1000
    if prompt < 1 or output < 2:
        raise _odd(path, f"has requests of {prompt} + {output} tokens: speeds need longer ones")
    rows = [Row("throughput", max(1.0, batch), prompt, output, _number(path, found, "output_throughput"))]
    if batch <= _ALONE:
        rows.append(Row("ttft", 1.0, prompt, output, _number(path, found, "median_ttft_ms") / 1000))
    return rows


def _number(path: Path, found: Mapping[str, Any], key: str) -> float:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _odd(path, f"has {key}: {value!r}, where a positive number is wanted")
    return float(value)


def _odd(path: Path, what: str) -> StartupError:
    return StartupError(
        f"--measured {path} {what}.",
        param="--measured",
        advice="Name what `penstock bench serve --output-json FILE` or `vllm bench serve --save-result` "
        "wrote.",
    )


def calibrate(machine: Machine, rows: Sequence[Row]) -> Measured:
    """The roofline of a machine by its own measurements. What a step costs beside is fitted where there are
    more than FEWEST rows, what ranks take to meet stays as published: few rows do not tell them apart.

    Raises StartupError for fewer rows than FEWEST.
    """
    if len(rows) < FEWEST or not any(row.kind == "ttft" for row in rows):
        raise StartupError(
            f"--measured: {len(rows)} measurements, and {FEWEST} are wanted, a time to the first token among "
            "them.",
            param="--measured",
            advice="Run `penstock bench serve` with --max-concurrency 1, and with higher ones.",
        )
    names = ("memory", "compute", "step") if len(rows) > FEWEST else ("memory", "compute")

    def best(some: Sequence[Row]) -> Efficiency:
        return descend(
            lambda each: sum(abs(error(machine, row, each)) for row in some), fitted().efficiency, names
        )

    unseen = [
        error(machine, row, best([*rows[:index], *rows[index + 1 :]])) for index, row in enumerate(rows)
    ]
    ordered = sorted(abs(math.expm1(each)) for each in unseen)
    return Measured(
        Fit(
            **asdict(best(rows)),
            low=round(min(1.0, math.exp(min(unseen))), 3),
            high=round(max(1.0, math.exp(max(unseen))), 3),
            median_error=round(ordered[len(ordered) // 2], 3),
            count=len(rows),
        ),
        batch=max(row.batch for row in rows),
        tokens=max(row.prompt + row.output for row in rows),
    )


def predict(machine: Machine, row: Row, efficiency: Efficiency) -> float:
    """What the roofline says of a row."""
    tried = copy.copy(machine)
    object.__setattr__(tried, "efficiency", efficiency)
    if row.kind == "ttft":
        return tried.prefill(row.prompt) + tried.decode(1, row.prompt)
    return tried.throughput(row.batch, row.prompt, row.output)


def error(machine: Machine, row: Row, efficiency: Efficiency) -> float:
    """log(measured / predicted), in speed: below 0 is slower than predicted."""
    ratio = math.log(row.value / predict(machine, row, efficiency))
    return -ratio if row.kind == "ttft" else ratio
