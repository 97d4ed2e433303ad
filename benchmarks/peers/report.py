"""docs/performance.md and docs/images from the result file; everything between the markers is replaced.

<!-- peers:NAME -->      NAME: conditions, targets, images, throughput, ttft, tpot, single, startup,
                         overhead, context, quality
…
<!-- /peers:NAME -->
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from . import others, plots, summary
from .engines import CHECKOUT
from .results import Results

DOCUMENT = CHECKOUT / "docs" / "performance.md"
IMAGES = CHECKOUT / "docs" / "images"
CAPTIONS = {
    "peers-throughput.svg": "Output tokens per second against concurrency, per engine",
    "peers-ttft.svg": "Median time to first token against concurrency, per engine",
    "peers-startup.svg": "Seconds from exec to first token, per engine",
}


def write_report(results: Results, document: Path = DOCUMENT, images: Path = IMAGES) -> None:
    """Fill the document and draw the pictures; print the tables."""
    parts = {
        "conditions": summary.conditions(results),
        "targets": summary.target_table(results),
        "throughput": summary.speed_table(results),
        "ttft": summary.latency_table(results, "ttft"),
        "tpot": summary.latency_table(results, "tpot"),
        "single": summary.single_table(results),
        "startup": summary.startup_table(results),
        **others.tables(),
    }
    try:
        drawn = plots.draw(results, images)
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install -e '.[bench]')")
    else:
        lines = [f"![{CAPTIONS[path.name]}]({images.name}/{path.name})" for path in drawn]
        parts["images"] = "\n\n".join(lines)
    document.write_text(fill(document.read_text(), parts))
    print("\n\n".join(text for name, text in parts.items() if name != "images"))


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Replace what stands between the markers of each part; ValueError if a marker is missing."""
    for name, part in parts.items():
        begin, end = f"<!-- peers:{name} -->", f"<!-- /peers:{name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        filled = f"{begin}\n{part}\n{end}"
        text, count = pattern.subn(lambda _, filled=filled: filled, text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"the document has {count} places for {name}: it needs {begin} … {end} once")
    return text
