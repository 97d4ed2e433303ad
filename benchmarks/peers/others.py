"""What needs no peer: step overhead, long contexts and the quality of quantised weights, as Markdown.

Read from the result files of benchmarks.step_overhead, benchmarks.long_context and benchmarks.quality; a file
that is not there leaves a line that says how to make it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

from .summary import table


def tables(results: Path = RESULTS) -> dict[str, str]:
    """By the name of its marker in the document."""
    made = {}
    for name, (benchmark, make) in _TABLES.items():
        path = results / f"{benchmark}.json"
        made[name] = make(json.loads(path.read_text())) if path.exists() else _missing(benchmark)
    return made


def _overhead(data: Mapping[str, Any]) -> str:
    """Time of a turn of the engine loop outside the model, by load."""
    rows = []
    for name, case in data["cases"].items():
        requests, _, how = name.partition(" ")
        rows.append(
            [
                f"{requests} request{'s' if requests != '1' else ''}, {how}",
                f"{case['turn_ms']:.1f}",
                f"{case['overhead_ms']:.2f}",
                f"{case['overhead_share']:.1%}",
                f"{case['rows_ms']['sample']:.2f}",
            ]
        )
    head = ["a step of", "turn, ms", "outside the model, ms", "share", "of it sampling, ms"]
    return f"{table(head, rows)}\n\nMeasured {data['date']}."


def _context(data: Mapping[str, Any]) -> str:
    """Time of a token against the length of its context."""
    rounds = len(data["bandwidths"])
    rows = [
        [
            f"{row['context']:,}",
            f"{row['median_ms']:.1f}",
            f"{row['of_allowed']:.0%}",
            f"{row['rounds_within']} of {rounds}",
            f"{row['share_of_bandwidth']:.0%}",
        ]
        for row in data["contexts"]
    ]
    head = ["context, tokens", "ms per token", "of what is allowed", "rounds within it", "of the bandwidth"]
    low, high = (1e-9 * pick(data["bandwidths"]) for pick in (min, max))
    return f"{table(head, rows)}\n\nMeasured {data['date']}, at {low:.1f} to {high:.1f} GB/s."


def _quality(data: Mapping[str, Any]) -> str:
    """Perplexity and word-for-word answers of the demo model by scheme."""
    rows = []
    for scheme, groups in data["schemes"].items():
        cells = []
        for group in ("trained", "held out"):
            values = groups[group]
            change = "" if scheme == "none" else f" ({values['change']:+.2%})"
            cells += [f"{values['perplexity']:.4f}{change}", f"{values['exact']:.1%}"]
        rows.append(["bf16" if scheme == "none" else scheme, *cells])
    trained, unseen = "perplexity, trained questions", "perplexity, unseen paraphrases"
    return table(["weights", trained, "word for word", unseen, "word for word"], rows)


def _missing(benchmark: str) -> str:
    return f"Not measured yet: `python -m benchmarks.{benchmark}`."


_TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "overhead": ("step_overhead", _overhead),
    "context": ("long_context", _context),
    "quality": ("quality", _quality),
}
"""Marker → (result file, what makes the table of it)."""
