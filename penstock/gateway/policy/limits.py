"""Which limits a request meets: its key's, its team's and its tags', as the spec has them.

key   its own  >  its team's key_limits  >  the spec's limits
team  the team's limits, all keys together
tag   what the spec says of this value of the tag
"""

from __future__ import annotations

from collections.abc import Mapping

from penstock.spec.model import Limits, Spec

from .amounts import NANO, Limit, Unit, Window

_NOTHING = Limits()
_HOUR = 3600 * NANO
_KEYS = 10_000


def caps(scope: str, limits: Limits) -> tuple[Limit, ...]:
    """What a part of the spec says, as limits of one scope."""
    found: list[Limit] = []

    def cap(unit: Unit, window: Window, *amounts: int | None) -> None:
        given = [amount for amount in amounts if amount is not None]
        if given:
            found.append(Limit(scope, unit, window, min(given)))

    cap("requests", "minute", limits.requests_per_minute)
    cap("tokens", "minute", limits.tokens_per_minute)
    cap("concurrent", "now", limits.concurrent_requests)
    cap("dollars", "day", limits.dollars_per_day)
    cap("dollars", "month", limits.dollars_per_month)
    cap(
        "device_seconds",
        "day",
        _scaled(limits.device_seconds_per_day, NANO),
        _scaled(limits.gpu_hours_per_day, _HOUR),
    )
    cap("device_seconds", "month", _scaled(limits.gpu_hours_per_month, _HOUR))
    return tuple(found)


def _scaled(amount: float | None, unit: int) -> int | None:
    return None if amount is None else round(amount * unit)


class Entitlements:
    """The limits of everybody, made of the spec once."""

    def __init__(self, spec: Spec) -> None:
        self._default = spec.limits
        self._keys: dict[tuple[str, str], tuple[Limit, ...]] = {}
        """Of keys without limits of their own, made once."""
        self._key_limits = {
            name: team.key_limits for name, team in spec.teams.items() if team.key_limits != _NOTHING
        }
        self._teams = {name: caps(f"team:{name}", team.limits) for name, team in spec.teams.items()}
        self._tags = {
            name: {value: caps(f"tag:{name}={value}", tag.limits) for value, tag in values.items()}
            for name, values in spec.tags.items()
        }

    def of(
        self, key_id: str, team: str, tags: Mapping[str, str], own: Limits | None = None
    ) -> tuple[Limit, ...]:
        """All limits that a request counts against. `own`: the key's, where it has some."""
        if own is not None:
            found = caps(f"key:{key_id}", own)
        elif (known := self._keys.get((key_id, team))) is not None:
            found = known
        else:
            if len(self._keys) >= _KEYS:
                self._keys.clear()
            limits = self._key_limits.get(team, self._default)
            found = self._keys[key_id, team] = caps(f"key:{key_id}", limits)
        found += self._teams.get(team, ())
        for name, values in self._tags.items():
            if name in tags:
                found += values.get(tags[name], ())
        return found
