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

_HEADERS = {
    unit: tuple(f"x-ratelimit-{what}-{name}".encode() for what in ("limit", "remaining", "reset"))
    for unit, name in _NAMES.items()
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
    retry = error.passes_later and error.code != "insufficient_quota"
    headers["x-should-retry"] = "true" if retry else "false"
    return headers


def _triple(unit: Unit, cap: int, remaining: int, resets_at: float, now: int) -> list[tuple[bytes, bytes]]:
    limit, rest, reset = _HEADERS[unit]
    headers = [(limit, _amount(unit, cap)), (rest, _amount(unit, max(0, remaining)))]
    if unit != "concurrent":  # it comes back when a request ends, and nobody knows when that is
        headers.append((reset, _span(max(0.0, resets_at - now / NANO))))
    return headers


def _amount(unit: Unit, amount: int) -> bytes:
    if unit in ("dollars", "device_seconds"):
        whole, rest = divmod(amount, NANO)
        return (b"%d.%09d" % (whole, rest)).rstrip(b"0").rstrip(b".")
    return b"%d" % amount


def _span(seconds: float) -> bytes:
    """As OpenAI writes it: 6m0s, 1.5s, 20ms."""
    if seconds < 1:
        return b"%dms" % round(seconds * 1000)
    if seconds < 60:
        return f"{seconds:.3g}s".encode()
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return b"%dm%ds" % (minutes, rest)
    return b"%dh%dm%ds" % (*divmod(minutes, 60), rest)
