"""Dividing whole amounts so that nothing is lost: the parts add up to the amount, to the nanodollar."""

from __future__ import annotations

from collections.abc import Sequence


def divide(amount: int, weights: Sequence[int]) -> list[int]:
    """An amount in proportion to weights, by largest remainders; ties go to the first.

    Args:
        amount: may be negative.
        weights: not negative, and not all zero.
    """
    if amount < 0:
        return [-each for each in divide(-amount, weights)]
    whole = sum(weights)
    parts = [amount * weight // whole for weight in weights]
    left = amount - sum(parts)
    by_remainder = sorted(range(len(weights)), key=lambda place: -(amount * weights[place] % whole))
    for place in by_remainder[:left]:
        parts[place] += 1
    return parts
