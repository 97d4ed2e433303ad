"""What answers say of limits: OpenAI's `x-ratelimit-*`, and why a refusal is one."""

from __future__ import annotations

from .meter import LimitReached, Reservation, Standing
from .policy.amounts import NANO, Unit

_NAMES: dict[Unit, str] = {
    "requests": "requests",
    "tokens": "tokens",
    "concurrent": "concurrent",
    "dollars": "dollars",
    "device_seconds": "device-seconds",
}


def standing(reservation: Reservation, now: int) -> list[tuple[bytes, bytes]]:
    """Headers for the tightest limit of each unit. `now`: Unix time in nanoseconds."""
    tightest: dict[Unit, Standing] = {}
    for each in reservation.standings:
        known = tightest.get(each.limit.unit)
        if known is None or each.remaining < known.remaining:
            tightest[each.limit.unit] = each
    headers: list[tuple[bytes, bytes]] = []
    for unit, each in tightest.items():
        headers += _triple(unit, each.limit.cap, each.remaining, each.resets_at, now)
    return headers


def refusal(error: LimitReached, now: int) -> dict[str, str]:
    """Headers of a 429."""
    limit = error.limit
    triple = _triple(limit.unit, limit.cap, error.remaining, error.resets_at, now)
    headers = {name.decode(): value.decode() for name, value in triple}
    headers["x-should-retry"] = "false" if error.code == "insufficient_quota" else "true"
    return headers


def _triple(unit: Unit, cap: int, remaining: int, resets_at: float, now: int) -> list[tuple[bytes, bytes]]:
    name = _NAMES[unit]
    seconds = max(0.0, resets_at - now / NANO)
    values = (("limit", _amount(unit, cap)), ("remaining", _amount(unit, max(0, remaining))))
    headers = [(f"x-ratelimit-{what}-{name}".encode(), value.encode()) for what, value in values]
    if unit != "concurrent":  # it comes back when a request ends, and nobody knows when that is
        headers.append((f"x-ratelimit-reset-{name}".encode(), _span(seconds).encode()))
    return headers


def _amount(unit: Unit, amount: int) -> str:
    if unit in ("dollars", "device_seconds"):
        whole, rest = divmod(amount, NANO)
        return f"{whole}.{rest:09d}".rstrip("0").rstrip(".")
    return str(amount)


def _span(seconds: float) -> str:
    """As OpenAI writes it: 6m0s, 1.5s, 20ms."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    if minutes < 1:
        return f"{rest:.3g}s"
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}h{minutes}m{int(rest)}s" if hours else f"{minutes}m{int(rest)}s"
