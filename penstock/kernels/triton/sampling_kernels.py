"""Sampling without an order of the vocabulary: largest logits and masses of parts of a row, then a search.

A row of V logits is cut into parts of PART. What is drawn by id needs their masses alone. What is drawn in
the order of probability (top_k, top_p) needs no sorted row either: it asks for the key κ at which a sum
over all tokens of at least κ passes a bound (a count for top_k, a mass for top_p and for the draw itself).
Keys are logits as integers of the same order, so κ is found exactly, in passes over the row that each leave
an eighth of the interval; parts whose largest key is below it are not read any more. The first pass need not
begin at the bottom: the k-th largest maximum of a part is a bound for top_k, and tokens whose weights
together are less than what may be missing are one for masses. Equal logits have equal weights: which of them
is drawn is a division.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["parts"])
def part_maxima(
    logits,  # [n, V], of stride stride
    maxima,  # float32 [n, parts]: NaN if there is one in the part
    places,  # int32 [n, parts]: the lowest id of the largest
    V,
    stride,
    parts,
    PART: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = part * PART + tl.arange(0, PART)
    value = tl.load(logits + row * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
    is_nan = value != value
    largest = tl.max(tl.where(is_nan, float("-inf"), value), 0)
    place = tl.min(tl.where(value == largest, at, V), 0)
    largest = tl.where(tl.max(is_nan.to(tl.int32), 0) > 0, float("nan"), largest)
    tl.store(maxima + row * parts + part, largest)
    tl.store(places + row * parts + part, place)


@triton.jit
def _row_maximum(maxima, row, parts, PARTS: tl.constexpr):
    """(largest of every part, of the row; NaN or infinite where the row has no distribution)"""
    number = tl.arange(0, PARTS)
    own = tl.load(maxima + row * parts + number, mask=number < parts, other=float("-inf"))
    broken = tl.max((own != own).to(tl.int32), 0) > 0
    largest = tl.max(tl.where(own != own, float("-inf"), own), 0)
    return own, tl.where(broken, float("nan"), largest)


@triton.jit
def _is_finite(value):
    return (value == value) & (value < float("inf")) & (value > float("-inf"))


@triton.jit
def _weight(value, largest, temperature, min_p):
    weight = tl.exp((value - largest) / temperature)
    return tl.where(weight < min_p, 0.0, weight)


@triton.jit(do_not_specialize=["parts"])
def part_masses(
    logits,
    draws,  # float64 [n, 5]: uniform, temperature, min_p, top_k, top_p
    maxima,
    own,  # int64 [n] ids, if RANKS
    masses,  # float32 [n, parts]: sum of weights
    ranks,  # int32 [n, parts]: tokens at least as probable as the row's own, if RANKS
    V,
    stride,
    parts,
    PART: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two, at least parts
    RANKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    _, largest = _row_maximum(maxima, row, parts, PARTS)
    temperature = 1.0
    min_p = 0.0
    if not RANKS:
        temperature = tl.load(draws + row * 5 + 1).to(tl.float32)
        min_p = tl.load(draws + row * 5 + 2).to(tl.float32)
    if _is_finite(largest) & (temperature > 0):
        at = part * PART + tl.arange(0, PART)
        value = tl.load(logits + row * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
        mass = tl.sum(_weight(value, largest, temperature, min_p), 0)
        tl.store(masses + row * parts + part, mass)
        if RANKS:
            token = tl.load(own + row)
            mine = tl.load(logits + row * stride + token).to(tl.float32)
            tl.store(ranks + row * parts + part, tl.sum(((value >= mine) & (at < V)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["parts"])
def choose_by_id(
    logits,
    draws,
    maxima,
    places,
    masses,
    tokens,  # int64 [n]
    checks,  # float32 [n]: largest logits
    V,
    stride,
    parts,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Greedy rows, and rows without top_k and top_p; of others, the check."""
    row = tl.program_id(0).to(tl.int64)
    own, largest = _row_maximum(maxima, row, parts, PARTS)
    tl.store(checks + row, largest)
    uniform = tl.load(draws + row * 5)
    temperature = tl.load(draws + row * 5 + 1).to(tl.float32)
    min_p = tl.load(draws + row * 5 + 2).to(tl.float32)
    in_order = (tl.load(draws + row * 5 + 3) > 0) | (tl.load(draws + row * 5 + 4) < 1)
    number = tl.arange(0, PARTS)
    there = number < parts
    if _is_finite(largest):
        if temperature == 0:
            place = tl.load(places + row * parts + number, mask=there & (own == largest), other=V)
            tl.store(tokens + row, tl.min(place, 0).to(tl.int64))
        elif not in_order:
            mass = tl.load(masses + row * parts + number, mask=there, other=0.0).to(tl.float64)
            cumulative = tl.cumsum(mass, 0)
            target = uniform * tl.sum(mass, 0)
            filled = tl.max(tl.where(mass > 0, number, 0), 0)  # rounding must not lead behind it
            part = tl.minimum(tl.sum((there & (cumulative <= target)).to(tl.int32), 0), filled)
            before = tl.sum(tl.where(number < part, mass, 0.0), 0)
            at = part * PART + tl.arange(0, PART)
            value = tl.load(logits + row * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
            weight = _weight(value, largest, temperature, min_p)
            within = tl.cumsum(weight.to(tl.float64), 0)
            last = tl.max(tl.where(weight > 0, at, 0), 0)
            token = part * PART + tl.sum((within <= target - before).to(tl.int32), 0)
            tl.store(tokens + row, tl.minimum(token, last).to(tl.int64))
    else:
        tl.store(tokens + row, tl.zeros([], tl.int64))


@triton.jit
def _key(value, SHIFT: tl.constexpr):
    """int32 of the order of float32 values, both zeros alike. SHIFT: bits that no value of the type has."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(value == 0, 0, bits)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _part(logits, part, V, PART: tl.constexpr, SHIFT: tl.constexpr):
    at = part * PART + tl.arange(0, PART)
    value = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
    return at, value, _key(value, SHIFT)


@triton.jit
def _next_part(tops, part, least, PARTS: tl.constexpr):
    """The first part behind this one whose largest key is at least so large; PARTS if there is none."""
    number = tl.arange(0, PARTS)
    return tl.min(tl.where((number > part) & (tops >= least), number, PARTS), 0)


@triton.jit
def _search(
    logits,
    tops,
    V,
    low,
    high,
    bound,
    largest,
    temperature,
    min_p,
    COUNT: tl.constexpr,
    STRICT: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The largest κ in [low, high] whose sum over tokens of key ≥ κ passes a bound, or low.

    The sum is of weights, or with COUNT of ones. To pass is to be at least the bound, STRICT: more than it.
    """
    number = tl.arange(0, 8)
    while low < high:
        step = (high.to(tl.int64) - low) // 8 + 1
        pivot = (low + number * step).to(tl.int32)  # at most high + 7: finite numbers end long before
        total = tl.zeros([8], tl.float64)
        part = _next_part(tops, -1, low, PARTS)
        while part < PARTS:
            _, value, key = _part(logits, part, V, PART, SHIFT)
            part = _next_part(tops, part, low, PARTS)
            if COUNT:
                amount = tl.full([PART], 1.0, tl.float32)
            else:
                amount = _weight(value, largest, temperature, min_p)
            share = tl.where(key[:, None] >= pivot[None, :], amount[:, None], 0.0)
            total += tl.sum(share, 0).to(tl.float64)
        passes = total > bound if STRICT else total >= bound
        passes = (passes & (pivot <= high)) | (number == 0)
        found = tl.max(tl.where(passes, number, 0), 0)
        low = (low + found * step).to(tl.int32)
        high = tl.minimum(low + step - 1, high).to(tl.int32)
    return low


@triton.jit
def _largest_of_many(tops, wanted, low, high):
    """The largest key in [low, high] that so many parts' largest are not below; low if there is none."""
    while low < high:
        middle = low + ((high.to(tl.int64) - low + 1) // 2).to(tl.int32)
        if tl.sum((tops >= middle).to(tl.int32), 0) >= wanted:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _negligible(missing, least, largest, temperature, V, SHIFT: tl.constexpr):
    """A key, at least `least`: all tokens below it have together at most half of `missing`, a share of a mass
    of 1 or more (the largest weight). Where that is near what rounding leaves of the mass, `least`."""
    missing = missing.to(tl.float32)
    value = largest + temperature * tl.log(tl.maximum(missing, 1e-3) / (2.0 * V))
    return tl.where(missing < 1e-3, least, tl.maximum(_key(value, SHIFT), least))


@triton.jit
def _around(
    logits,
    tops,
    V,
    key_at,
    largest,
    temperature,
    min_p,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Around a key: (mass of tokens above it, number of tokens that have it, the weight of one of these)."""
    above = tl.full([], 0.0, tl.float64)
    equal = tl.full([], 0, tl.int32)
    weight_at = tl.full([], 0.0, tl.float32)
    part = _next_part(tops, -1, key_at, PARTS)
    while part < PARTS:
        at, value, key = _part(logits, part, V, PART, SHIFT)
        part = _next_part(tops, part, key_at, PARTS)
        weight = _weight(value, largest, temperature, min_p)
        above += tl.sum(tl.where(key > key_at, weight, 0.0), 0).to(tl.float64)
        same = (key == key_at) & (at < V)
        equal += tl.sum(same.to(tl.int32), 0)
        weight_at = tl.maximum(weight_at, tl.max(tl.where(same, weight, 0.0), 0))
    return above, equal, weight_at


@triton.jit(do_not_specialize=["parts"])
def choose_in_order(
    logits,
    draws,
    maxima,
    tokens,
    V,
    stride,
    parts,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Rows with top_k or top_p."""
    row = tl.program_id(0).to(tl.int64)
    own, largest = _row_maximum(maxima, row, parts, PARTS)
    draw = draws + row * 5
    uniform = tl.load(draw)
    temperature = tl.load(draw + 1).to(tl.float32)
    min_p = tl.load(draw + 2).to(tl.float32)
    top_k = tl.load(draw + 3)
    top_p = tl.load(draw + 4)
    if _is_finite(largest) & (temperature > 0) & ((top_k > 0) | (top_p < 1)):
        logits += row * stride
        tops = tl.where(tl.arange(0, PARTS) < parts, _key(own, SHIFT), -(1 << 31))  # below all keys
        high = _key(largest, SHIFT)
        lowest = _key(tl.full([], float("-inf"), tl.float32), SHIFT)
        least = lowest
        if (top_k > 0) & (top_k < V):
            least = _search(
                logits, tops, V, _largest_of_many(tops, top_k.to(tl.int32), lowest, high), high, top_k,
                largest, temperature, min_p, True, False, PART, PARTS, SHIFT,
            )  # fmt: skip
        above, equal, weight = _around(
            logits, tops, V, least, largest, temperature, min_p, PART, PARTS, SHIFT
        )
        kept = above + equal * weight.to(tl.float64)
        end = least
        last = equal
        if top_p < 1:
            bound = top_p * kept
            end = _search(
                logits, tops, V, _negligible(1.0 - top_p, least, largest, temperature, V, SHIFT), high, bound,
                largest, temperature, min_p, False, False, PART, PARTS, SHIFT,
            )  # fmt: skip
            above, equal, weight = _around(
                logits, tops, V, end, largest, temperature, min_p, PART, PARTS, SHIFT
            )
            # of equal ones, those before which there is less than the bound
            wide = tl.maximum(weight, 1e-38).to(tl.float64)
            last = tl.minimum(tl.ceil((bound - above) / wide), equal.to(tl.float64)).to(tl.int32)
            last = tl.maximum(last, 1)
            kept = above + last * weight.to(tl.float64)
        target = uniform * kept
        drawn = _search(
            logits, tops, V, _negligible(1.0 - uniform, end, largest, temperature, V, SHIFT), high, target,
            largest, temperature, min_p, False, True, PART, PARTS, SHIFT,
        )  # fmt: skip
        above, equal, weight = _around(
            logits, tops, V, drawn, largest, temperature, min_p, PART, PARTS, SHIFT
        )
        if drawn == end:
            equal = tl.minimum(equal, last)
        wide = tl.maximum(weight, 1e-38).to(tl.float64)
        wanted = tl.minimum(tl.floor((target - above) / wide), equal - 1.0)
        wanted = tl.maximum(wanted, 0.0).to(tl.int32)
        token = tl.full([], 0, tl.int32)
        seen = tl.full([], 0, tl.int32)
        part = _next_part(tops, -1, drawn, PARTS)
        while part < PARTS:
            at, _value, key = _part(logits, part, V, PART, SHIFT)
            same = ((key == drawn) & (at < V)).to(tl.int32)
            count = seen + tl.cumsum(same, 0)
            token = tl.maximum(token, tl.max(tl.where((same > 0) & (count == wanted + 1), at, 0), 0))
            seen += tl.sum(same, 0)
            part = tl.where(seen > wanted, PARTS, _next_part(tops, part, drawn, PARTS))
        tl.store(tokens + row, token.to(tl.int64))
