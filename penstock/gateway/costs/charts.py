"""Charts as inline SVG: colours are the page's CSS classes, so that they are right in light and in dark.

Bars are stretched to the width of the page, and their labels are text beside them: they stay readable on a
phone. Every bar has a <title> with its figures, and every chart a sentence for who cannot see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar, of parts that stand on one another."""

    label: str
    parts: tuple[float, ...]
    """In the chart's unit, not negative."""
    title: str
    """Its figures in words."""
    mark: float | None = None
    """A line across it: what it is compared with."""


def rows(bars: Sequence[Bar], classes: Sequence[str], about: str, *, most: float | None = None) -> str:
    """Horizontal bars, each below its label.

    Args:
        classes: CSS class of each part.
        about: what the chart says, in a sentence.
        most: end of the scale; the longest bar if not given.
    """
    scale = most or max((max(sum(bar.parts), bar.mark or 0) for bar in bars), default=0) or 1
    out = [f'<div class="chart" role="group" aria-label="{escape(about)}">']
    for bar in bars:
        out.append(f'<div class="label">{escape(bar.label)}</div>{_open(1000, 10, "row", bar.title)}')
        out.append('<rect class="track" x="0" y="2" width="1000" height="6"/>')
        left = 0.0
        for part, name in zip(bar.parts, classes, strict=True):
            size = min(1000 - left, max(part, 0) / scale * 1000)
            if size > 0:
                out.append(_rect(name, left, 2, size, 6))
            left += size
        if bar.mark is not None:
            out.append(_rect("mark", min(996.0, max(0.0, bar.mark / scale * 1000 - 2)), 0, 4, 10))
        out.append("</svg>")
    return "".join([*out, "</div>"])


def columns(bars: Sequence[Bar], classes: Sequence[str], about: str) -> str:
    """Vertical bars, as for days; the first and the last have their labels."""
    scale = max((sum(bar.parts) for bar in bars), default=0) or 1
    step = 1000 / max(1, len(bars))
    thick = max(0.5, min(60.0, step * 0.8))
    out = [f'<div class="chart">{_open(1000, 100, "columns", about)}']
    for place, bar in enumerate(bars):
        x, y = place * step + (step - thick) / 2, 100.0
        out.append(f"<g><title>{escape(bar.title)}</title>{_rect('track', x, 0, thick, 100)}")
        for part, name in zip(bar.parts, classes, strict=True):
            size = max(part, 0) / scale * 100
            if size > 0:
                y -= size
                out.append(_rect(name, x, y, thick, size))
        out.append("</g>")
    ends = [bars[0].label, bars[-1].label] if len(bars) > 1 else [bar.label for bar in bars]
    labels = "".join(f"<span>{escape(each)}</span>" for each in ends)
    return "".join([*out, f'</svg><div class="ends">{labels}</div></div>'])


def _open(width: int, height: int, kind: str, title: str) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>'
    )


def _rect(name: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{name}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"/>'
