"""Three pictures of the result file, as SVG: throughput and TTFT against concurrency, and start-up.

White background, so that they read the same on light and dark pages; one meaning per axis; lines are labelled
at their ends. Needs matplotlib (the extra `bench`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loads import THROUGHPUT_CURVE
from .results import Results
from .summary import ceiling, measured_engines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"penstock": "#0b62a4", "vllm": "#e07b00", "transformers": "#3a923a", "llama.cpp": "#8c4fb5"}
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
"""Line styles within a family, in the order of the engines."""
INK, FAINT, LIMIT = "#222222", "#d8d8d8", "#777777"
_STARTS = ("startup", "cold-startup")
_FILES = ("peers-throughput.svg", "peers-ttft.svg", "peers-startup.svg")


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw all three; returns their files. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and the same results give the same bytes.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "penstock", "font.size": 10}
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in _FILES]
    curve = {load: results.data["loads"][load] for load in THROUGHPUT_CURVE if load in results.data["loads"]}
    _lines(results, curve, "output_throughput", "Output tokens per second", paths[0], log=False)
    _lines(results, curve, "median_ttft_ms", "Median time to first token (s)", paths[1], log=True)
    _startup(results, paths[2])
    return paths


def _lines(
    results: Results, loads: Mapping[str, Any], metric: str, title: str, path: Path, *, log: bool
) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    scale = 1e-3 if metric.endswith("_ms") else 1.0
    ends: list[tuple[float, float, str, str]] = []
    for id, style in _styles(results).items():
        points = [
            (entry["concurrency"], scale * value)
            for load, entry in loads.items()
            if (value := results.median(id, load, metric)) is not None
        ]
        if not points:
            continue
        engine = results.data["engines"][id]
        colour = COLOURS[engine["family"]]
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour, linestyle=style, marker="o", markersize=4.5, linewidth=1.8)
        ends.append((x[-1], y[-1], engine["title"], colour))
    if not log:
        ends += _draw_ceiling(results, loads, axes)
    concurrencies = [entry["concurrency"] for entry in loads.values()]
    axes.set_xscale("log", base=2)
    axes.set_xticks(concurrencies, [str(number) for number in concurrencies])
    axes.set_xlim(left=0.32)  # room for the names of the engines for one request
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.set_xlabel("Concurrent requests (128 tokens in, 64 out)")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    _clean(axes, "y")
    _label_ends(axes, ends)
    _save(figure, path)


def _draw_ceiling(
    results: Results, loads: Mapping[str, Any], axes: Axes
) -> list[tuple[float, float, str, str]]:
    """What the measured limits of the machine allow in bfloat16, as a dotted line; its end, to be named."""
    points = [(entry["concurrency"], ceiling(results, load)) for load, entry in loads.items()]
    known = [(x, y) for x, y in points if y is not None]
    if not known:
        return []
    x, y = zip(*known, strict=True)
    axes.plot(x, y, color=LIMIT, linewidth=1.2, linestyle=(0, (1, 2)))
    return [(x[-1], y[-1], "limit of the machine, bf16", LIMIT)]


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside the last points, moved apart where they would touch.

    To the right of a line; an engine for one request, which is a point, to its left.
    """
    figure = axes.figure
    figure.canvas.draw()
    height = 13.0 * figure.dpi / 72.0
    for at in sorted({x for x, *_ in ends}):
        group, side = [end for end in ends if end[0] == at], -1 if at == 1 else 1
        floor = float("-inf")
        for x, y, title, colour in sorted(group, key=lambda end: end[1]):
            _, pixel = axes.transData.transform((x, y))
            floor = max(pixel, floor + height)
            axes.annotate(
                title,
                (x, y),
                xytext=(9 * side, (floor - pixel) * 72.0 / figure.dpi),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                color=colour,
                fontsize=9,
                annotation_clip=False,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )


def _startup(results: Results, path: Path) -> None:
    from matplotlib import pyplot

    engines = [id for id in measured_engines(results) if results.seconds(id) is not None][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.42 * len(engines)), layout="constrained")
    for row, id in enumerate(engines):
        engine = results.data["engines"][id]
        warm, cold = results.seconds(id) or 0.0, results.seconds(id, "cold-startup")
        colour = COLOURS[engine["family"]]
        if cold is not None:
            axes.barh(row, max(cold, warm), height=0.62, color=colour, alpha=0.28, linewidth=0)
        axes.barh(row, warm, height=0.62, color=colour, linewidth=0)
        text = f"{warm:.1f} s" + (f", cold {cold:.1f} s" if cold is not None else "")
        axes.annotate(
            text,
            (max(warm, cold or 0.0), row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.set_yticks(range(len(engines)), [results.data["engines"][id]["title"] for id in engines])
    axes.tick_params(axis="y", length=0)
    longest = max((results.seconds(id, what) or 0.0 for id in engines for what in _STARTS), default=0.0)
    axes.set_xlim(0, 1.25 * longest or 1.0)
    axes.set_xlabel("Seconds")
    axes.set_title(
        "From exec to first token; light: without compiled code in its cache",
        loc="left",
        fontsize=11,
        color=INK,
    )
    _clean(axes, "x")
    _save(figure, path)


def _styles(results: Results) -> dict[str, Any]:
    """One line style per engine; engines of a family share a colour and differ in style."""
    used: dict[str, Any] = {}
    styles = {}
    for id in measured_engines(results):
        family = results.data["engines"][id]["family"]
        styles[id] = next(used.setdefault(family, itertools.cycle(STYLES)))
    return styles


def _clean(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right", "left" if grid == "y" else "bottom"]].set_visible(False)
    axes.grid(axis=grid, color=FAINT, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, facecolor="white", metadata={"Date": None})
    pyplot.close(figure)
