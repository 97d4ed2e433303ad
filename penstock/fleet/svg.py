"""Three charts as inline SVG: bars of memory, cost against utilisation, capacity against context.

Colours are classes, which the page's style sheet gives for light and for dark. Each mark has a `title`, which
browsers show; each chart's numbers stand in a table beside it, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_WIDTH = 640
_FONT = 12


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float, str]], float]], unit: float = 1e9) -> str:
    """Stacked horizontal bars, one for each row, on one scale.

    Args:
        rows: (label, parts, whole); a part is (class, size, what it is), and what the parts leave of the
        whole
            is drawn as empty.
        unit: what a number of the labels stands for.
    """
    most = max((whole for _, _, whole in rows), default=1.0)
    top, height = 4, 52
    lines = []
    for index, (label, parts, whole) in enumerate(rows):
        y = top + index * height
        lines.append(_text(0, y + 12, label, "label"))
        x = 0.0
        lines.append(
            f'<rect x="0" y="{y + 18}" width="{_WIDTH * whole / most:.1f}" height="22" rx="3" class="rest">'
            f"<title>{escape(label)}: {whole / unit:.1f} GB</title></rect>"
        )
        for kind, size, what in parts:
            width = max(0.0, _WIDTH * size / most)
            if width < 0.5:
                continue
            lines.append(
                f'<rect x="{x:.1f}" y="{y + 18}" width="{max(0.5, width - 2):.1f}" height="22" rx="2" '
                f'class="{kind}"><title>{escape(what)}: {size / unit:.1f} GB</title></rect>'
            )
            if width > 64:
                lines.append(_text(x + 6, y + 33, f"{size / unit:.1f} GB", f"inside on-{kind}"))
            x += width
    return _svg(lines, top + len(rows) * height, "Memory of each device")


def lines(
    series: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]],
    mark: tuple[float, float, str] | None = None,
    y_format: str = "${:,.2f}",
) -> str:
    """Lines over a linear x and a y from 0.

    Args:
        series: (class, name, points).
        mark: a point with a label, as where two lines cross.
    """
    left, right, top, bottom, height = 64, 16, 30, 44, 310
    xs = [x for _, _, points in series for x, _ in points]
    ys = [y for _, _, points in series for _, y in points]
    x0, x1, y1 = min(xs), max(xs), _nice(max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (_WIDTH - left - right),
            height - bottom - min(y, y1) / y1 * (height - top - bottom),
        )

    drawn = []
    for part in range(5):
        value = y1 * part / 4
        _, y = at(x0, value)
        drawn.append(f'<line x1="{left}" x2="{_WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        drawn.append(_text(left - 8, y + 4, y_format.format(value), "tick", "end"))
    for value, label in x_ticks:
        x, _ = at(value, 0)
        drawn.append(_text(x, height - bottom + 18, label, "tick", "middle"))
    drawn.append(_text((left + _WIDTH - right) / 2, height - 6, x_label, "axis", "middle"))
    drawn.append(_text(0, 10, y_label, "axis"))
    for kind, name, points in series:
        path = " ".join(
            f"{'M' if index == 0 else 'L'}{x:.1f},{y:.1f}"
            for index, (x, y) in enumerate(at(*point) for point in points)
        )
        drawn.append(f'<path d="{path}" class="line {kind}"><title>{escape(name)}</title></path>')
        x, y = at(*points[-1])
        drawn.append(_text(x - 4, y - 8, name, f"name text-{kind}", "end"))
    if mark is not None:
        x, y = at(mark[0], mark[1])
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="mark"/>')
        end = "start" if x < _WIDTH / 2 else "end"
        drawn.append(_text(x + (9 if end == "start" else -9), y - 10, mark[2], "label", end))
    return _svg(drawn, height, title)


def columns(points: Sequence[tuple[str, float]], *, title: str, y_label: str, x_label: str) -> str:
    """Columns with their value on top, on a logarithmic y: each is a multiple of its neighbour."""
    top, bottom, height = 44, 44, 290
    most = max((value for _, value in points), default=1.0)
    scale = math.log10(max(10.0, most))
    step = _WIDTH / max(1, len(points))
    drawn = [_text(0, 12, y_label, "axis")]
    for index, (label, value) in enumerate(points):
        tall = (height - top - bottom) * (math.log10(value) / scale if value >= 1 else 0)
        tall = max(2.0, tall) if value >= 1 else 0
        x, y = index * step + step * 0.15, height - bottom - tall
        drawn.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{step * 0.7:.1f}" height="{tall:.1f}" rx="3" class="kv">'
            f"<title>{escape(label)}: {value:,.0f}</title></rect>"
        )
        drawn.append(_text(x + step * 0.35, y - 6, f"{value:,.0f}", "label", "middle"))
        drawn.append(_text(x + step * 0.35, height - bottom + 18, label, "tick", "middle"))
    drawn.append(f'<line x1="0" x2="{_WIDTH}" y1="{height - bottom}" y2="{height - bottom}" class="grid"/>')
    drawn.append(_text(_WIDTH / 2, height - 6, x_label, "axis", "middle"))
    return _svg(drawn, height, title)


def _nice(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 or 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value * 0.9999)


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{_FONT}" text-anchor="{anchor}" class="{kind}">'
        f"{escape(text)}</text>"
    )


def _svg(lines: Sequence[str], height: float, title: str) -> str:
    body = "\n".join(lines)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">\n'
        f"{body}\n</svg>"
    )
