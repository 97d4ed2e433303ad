"""A report under the names of exports: dollars, shares and counts; what is not known is None, never zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

from penstock.gateway.policy.amounts import NANO

from .read import Found
from .report import Line, PoolUse, Report

_DIGITS = 12


def decimal(value: int | Fraction | None, scale: int = 1) -> Decimal | None:
    """A whole amount exactly; a ratio to twelve digits."""
    if value is None:
        return None
    if isinstance(value, int) and scale in (1, NANO):
        return Decimal(value) / scale
    exact = value if scale == 1 else Fraction(value) / scale
    return Decimal(f"{exact.numerator / exact.denominator:.{_DIGITS}g}")


def day(at: Any) -> Any:
    """A day as 2026-11-21."""
    return datetime.fromtimestamp(at // NANO, UTC).date().isoformat() if isinstance(at, int) else at


def _sum(name: str, scale: int = 1) -> Callable[[Line], Any]:
    return lambda line: decimal(line.sums[name], scale) if scale > 1 else line.sums[name]


def _known(name: str, of: str, scale: int = 1) -> Callable[[Line], Any]:
    """What is a figure only where there is something that it is of."""
    return lambda line: _sum(name, scale)(line) if line.sums[of] else None


FIGURES: dict[str, Callable[[Line], Any]] = {
    "requests": lambda line: line.requests,
    "failed": _sum("failed"),
    "input_tokens": _sum("input_tokens"),
    "output_tokens": _sum("output_tokens"),
    "cached_tokens": _sum("cached_tokens"),
    "gpu_seconds": _sum("device_seconds", NANO),
    "dollars": _sum("dollars", NANO),
    "lost_dollars": _sum("lost_dollars", NANO),
    "lost_estimated_dollars": _sum("lost_estimated_dollars", NANO),
    "idle_dollars": lambda line: decimal(line.idle, NANO),
    "cost_dollars": lambda line: decimal(line.cost, NANO),
    "idle_share": lambda line: decimal(Fraction(line.idle, line.cost)) if line.cost > 0 else None,
    "unpriced_requests": _sum("unpriced"),
    "unsettled_dollars": _sum("unsettled_dollars", NANO),
    "compared_requests": lambda line: line.own["compared"],
    "self_hosted_dollars": lambda line: decimal(line.compared_cost, NANO),
    "comparator_dollars": lambda line: decimal(line.comparator, NANO),
    "break_even_utilization": lambda line: decimal(line.break_even),
    "escalation_rate": lambda line: decimal(line.escalation_rate),
    "attempt_dollars": _known("attempt_dollars", "judged", NANO),
    "escalated_dollars": _known("escalated_dollars", "judged", NANO),
    "unverified_requests": _sum("unverified"),
    "outcomes": _sum("told"),
    "successes": lambda line: decimal(line.successes) if line.sums["told"] else None,
    "dollars_per_success": lambda line: decimal(line.cost_per_success, NANO),
    "dollars_of_all_per_success": lambda line: (
        decimal(line.cost / line.successes, NANO) if line.successes else None
    ),
}
"""Name in exports → figure of a line."""


def lines(report: Report) -> Iterator[dict[str, Any]]:
    """Each line, with what it is of."""
    for line in report.lines:
        yield {**group(report.by, line.group), **figures(line)}


def group(by: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """What a line is of, under the names of exports."""
    return {
        _NAMES.get(name, name): day(value) if name == "day" else value
        for name, value in zip(by, values, strict=True)
    }


def figures(line: Line) -> dict[str, Any]:
    """All figures of a line."""
    return {name: figure(line) for name, figure in FIGURES.items()}


def pool(use: PoolUse) -> dict[str, Any]:
    """What became of a pool."""
    return {
        "pool": use.pool,
        "paid_dollars": decimal(use.paid, NANO),
        "charged_dollars": decimal(use.charged, NANO),
        "idle_dollars": decimal(use.idle, NANO),
        "utilization": decimal(Fraction(use.charged, use.paid)) if use.paid else None,
        "gpu_seconds": decimal(use.device_seconds, NANO),
    }


def whole(found: Found, verdicts: Sequence[str], remarks: Sequence[str], findings: Any) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "days": round(found.days, 6),
        "by": [_NAMES.get(name, name) for name in found.report.by],
        "lines": list(lines(found.report)),
        "total": figures(found.report.total),
        "pools": [pool(use) for use in found.report.pools],
        "verdicts": list(verdicts),
        "remarks": list(remarks),
        "findings": [
            {
                "kind": each.kind,
                "subject": each.subject,
                "dollars": decimal(each.dollars, NANO),
                "text": each.text,
            }
            for each in findings
        ],
    }


_NAMES = {"key_name": "key", "upstream": "inference.backend"}
"""As `penstock ledger` has them."""
