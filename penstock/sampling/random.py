"""Random numbers without state: a function of a request's seed and of how many tokens it has generated.

splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014) as a counter-based hash:
its output function over key + counter · gamma, where the key is the hashed seed. Neither the batch nor the
device nor a preemption can change what a request draws.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_BITS = 48  # so few that uniform · total, in float64, always stays below total


def uniform(seed: int, counter: int) -> float:
    """A number in [0, 1), in steps of 2⁻⁴⁸, for the `counter`-th token of the request with this seed."""
    key = _mix((seed + _GAMMA) & _MASK)
    return (_mix((key + (counter + 1) * _GAMMA) & _MASK) >> (64 - _BITS)) * 2.0**-_BITS


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
