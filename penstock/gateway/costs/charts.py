"""Charts as inline SVG: colours are the page's CSS classes, so that they are right in light and in dark.

Every bar has a <title> with its figures, and every chart a line of text for who cannot see it.
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
    """Horizontal bars with labels above them: they are read on a phone, too.

    Args:
        classes: CSS class of each part.
        about: what the chart says, in a sentence.
        most: end of the scale; the longest bar if not given.
    """
    width, row, thick = 600, 44, 16
    scale = most or max((max(sum(bar.parts), bar.mark or 0) for bar in bars), default=0) or 1
    out = [_open(width, row * len(bars) + 4, about)]
    for place, bar in enumerate(bars):
        top = place * row
        out.append(f"<g><title>{escape(bar.title)}</title>")
        out.append(f'<text x="0" y="{top + 15}">{escape(bar.label)}</text>')
        out.append(f'<rect class="track" x="0" y="{top + 21}" width="{width}" height="{thick}" rx="3"/>')
        left = 0.0
        for part, name in zip(bar.parts, classes, strict=True):
            size = min(width - left, max(part, 0) / scale * width)
            if size > 0:
                out.append(_rect(name, left, top + 21, size, thick))
            left += size
        if bar.mark is not None:
            x = min(width - 1.5, bar.mark / scale * width)
            out.append(_rect("mark", max(0.0, x - 1.5), top + 17, 3, thick + 8))
        out.append("</g>")
    return "".join([*out, "</svg>"])


def columns(bars: Sequence[Bar], classes: Sequence[str], about: str) -> str:
    """Vertical bars, as for days; the first and the last have their labels."""
    width, height, foot = 600, 180, 24
    scale = max((sum(bar.parts) for bar in bars), default=0) or 1
    step = width / max(1, len(bars))
    thick = max(1.0, min(40.0, step * 0.8))
    out = [_open(width, height + foot, about)]
    for place, bar in enumerate(bars):
        x = place * step + (step - thick) / 2
        out.append(f"<g><title>{escape(bar.title)}</title>")
        out.append(f'<rect class="track" x="{x:.1f}" y="0" width="{thick:.1f}" height="{height}"/>')
        y = float(height)
        for part, name in zip(bar.parts, classes, strict=True):
            size = max(part, 0) / scale * height
            if size > 0:
                y -= size
                out.append(_rect(name, x, y, thick, size))
        out.append("</g>")
    if bars:
        out.append(f'<text x="0" y="{height + 18}">{escape(bars[0].label)}</text>')
    if len(bars) > 1:
        out.append(f'<text x="{width}" y="{height + 18}" text-anchor="end">{escape(bars[-1].label)}</text>')
    return "".join([*out, "</svg>"])


def _open(width: int, height: int, about: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(about)}">'


def _rect(name: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}"/>'
