"""Tokens and log-probabilities: the hosts of sampling_kernels.

The specification's tokens come out wherever rounding cannot matter: where a draw, or the border of top_p or
min_p, does not fall within about a millionth of the mass between two tokens. Greedy choice, top_k and ranks
compare logits and are exact. A row's token depends on nothing but that row: parts are summed in their order.

Nothing here waits for the device, but `sample` and `logprobs`, whose answers are the host's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.operations import Draw, Likelihood
from penstock.kernels.torch_sampling import candidates, ranked
from penstock.kernels.transfer import on_device

from .launch import OPTIONS
from .registry import ACTIVATION_TYPES, Configuration
from .rotation import power

#: Logits of one program.
PART = 1024
_WARPS = 4
_SEARCH_WARPS = 8
#: Low bits that are equal in all float32 numbers of the same sign that come from the type.
_SHIFTS = {"bf16": 16, "fp16": 13, "fp32": 0}
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def choose(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """See Operations.choose. Raises ValueError for logits of another shape or dtype."""
    from . import sampling_kernels

    rows, name = _checked(logits, len(draws))
    count, vocabulary = rows.shape
    tokens = torch.empty(count, dtype=torch.int64, device=rows.device)
    checks = torch.empty(count, dtype=torch.float32, device=rows.device)
    if not count:
        return tokens, checks
    settings = on_device(
        np.array([(d.uniform, d.temperature, d.min_p, d.top_k, d.top_p) for d in draws], np.float64),
        rows.device,
    )
    parts = -(-vocabulary // PART)
    sizes = {"PART": PART, "PARTS": _parts(vocabulary)}
    maxima, places = _maxima(rows)
    masses = torch.empty_like(maxima)
    in_order = [draw.temperature > 0 and (draw.top_k > 0 or draw.top_p < 1) for draw in draws]
    if not all(in_order) and any(draw.temperature > 0 for draw in draws):
        sampling_kernels.part_masses[(count, parts)](
            rows, settings, maxima, tokens, masses, places, vocabulary, rows.stride(0), parts,
            **sizes, RANKS=False, num_warps=_WARPS, **OPTIONS,
        )  # fmt: skip
    sampling_kernels.choose_by_id[(count,)](
        rows, settings, maxima, places, masses, tokens, checks, vocabulary, rows.stride(0), parts,
        **sizes, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
    if any(in_order):
        sampling_kernels.choose_in_order[(count,)](
            rows, settings, maxima, tokens, vocabulary, rows.stride(0), parts,
            **sizes, SHIFT=_SHIFTS[name], num_warps=_SEARCH_WARPS, **OPTIONS,
        )  # fmt: skip
    return tokens, checks


def sample(logits: Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[float]]:
    """See Operations.sample. Raises ValueError for logits of another shape or dtype."""
    tokens, checks = choose(logits, draws)
    chosen, values = torch.stack([tokens.double(), checks.double()]).tolist()  # one copy from the device
    return [int(token) for token in chosen], values


def logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Likelihood]:
    """See Operations.logprobs; the order of alternatives is torch's (see torch_sampling).

    Raises ValueError for logits of another shape or dtype, and tokens that are not among them.
    """
    from . import sampling_kernels

    rows, _ = _checked(logits, len(tokens))
    count, vocabulary = rows.shape
    if not count:
        return []
    if len(counts) != count or min(tokens) < 0 or max(tokens) >= vocabulary:
        raise ValueError(f"tokens {list(tokens)} and {len(counts)} counts for logits {list(logits.shape)}")
    own = on_device(np.array(tokens, np.int64), rows.device)
    parts = -(-vocabulary // PART)
    maxima, _ = _maxima(rows)
    masses = torch.empty_like(maxima)
    ranks = torch.zeros(maxima.shape, dtype=torch.int32, device=rows.device)
    sampling_kernels.part_masses[(count, parts)](
        rows, maxima, maxima, own, masses, ranks, vocabulary, rows.stride(0), parts,
        PART=PART, PARTS=_parts(vocabulary), RANKS=True, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
    least = maxima.amax(1).double() + masses.sum(1, dtype=torch.float64).log()  # log Σ exp
    values = rows.gather(1, own[:, None])[:, 0].double() - least
    numbers = torch.stack([values, ranks.sum(1).double()]).tolist()
    best: list[tuple[list[int], list[float]]] = [([], [])] * count
    for size in {candidates(wanted, vocabulary) for wanted in counts if wanted}:
        at = [i for i, wanted in enumerate(counts) if wanted and candidates(wanted, vocabulary) == size]
        some, ids = ranked(rows[at].float(), size)
        some = some[:, : max(counts[i] for i in at)].double() - least[at, None]
        for i, row_ids, row_values in zip(at, ids.tolist(), some.tolist(), strict=True):
            best[i] = row_ids[: counts[i]], row_values[: counts[i]]
    return [Likelihood(value, int(rank), *others) for value, rank, others in zip(*numbers, best, strict=True)]


def _maxima(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit of every part [n, parts], and its lowest id."""
    from . import sampling_kernels

    count, vocabulary = rows.shape
    parts = -(-vocabulary // PART)
    maxima = torch.empty((count, parts), dtype=torch.float32, device=rows.device)
    places = torch.empty((count, parts), dtype=torch.int32, device=rows.device)
    sampling_kernels.part_maxima[(count, parts)](
        rows, maxima, places, vocabulary, rows.stride(0), parts, PART=PART, num_warps=_WARPS, **OPTIONS
    )
    return maxima, places


def _checked(logits: Tensor, rows: int) -> tuple[Tensor, str]:
    """(logits, elements of a row side by side; Triton's name of their type)"""
    if logits.ndim != 2 or len(logits) != rows or not logits.shape[1]:
        raise ValueError(f"need logits of shape [{rows}, V], got {list(logits.shape)}")
    if logits.dtype not in _NAMES:
        raise ValueError(f"logits of {logits.dtype}; these kernels take float32, bfloat16 and float16")
    return logits if logits.stride(1) == 1 else logits.contiguous(), _NAMES[logits.dtype]


def _parts(vocabulary: int) -> int:
    """Numbers of a program that looks at all parts."""
    parts = -(-vocabulary // PART)
    return next((size for size in _PARTS if size >= parts), power(parts))


#: Parts of published vocabularies: up to 32k, 128k and 512k tokens. (Of larger ones, a power of two.)
_PARTS = (32, 128, 512)


def _configurations(
    arguments: dict[str, str], constants: tuple[dict[str, object], ...], warps: int, *, parts: bool
) -> Iterator[Configuration]:
    for dtype in ACTIVATION_TYPES:
        for count in _PARTS if parts else (0,):
            for more in constants:
                chosen = {"PART": PART, **({"PARTS": count} if parts else {}), **more}
                if "SHIFT" in chosen:
                    chosen["SHIFT"] = _SHIFTS[dtype]
                names = [f"{name.lower()} {value}" for name, value in chosen.items() if name != "PART"]
                yield Configuration(
                    label=" · ".join([dtype, *names]),
                    signature={
                        "logits": f"*{dtype}",
                        **arguments,
                        **dict.fromkeys(("V", "stride", "parts"), "i32"),
                        **dict.fromkeys(chosen, "constexpr"),
                    },
                    constants=chosen,
                    num_warps=warps,
                    divisible=("V", "stride"),
                    traits={"dtype": dtype, "parts": count},
                )


def maxima_configurations() -> Iterator[Configuration]:
    """Every dtype."""
    return _configurations({"maxima": "*fp32", "places": "*i32"}, ({},), _WARPS, parts=False)


def masses_configurations() -> Iterator[Configuration]:
    """Every dtype and size of vocabularies, for draws; and for log-probabilities."""
    tail = {"maxima": "*fp32", "own": "*i64", "masses": "*fp32", "ranks": "*i32"}
    yield from _configurations({"draws": "*fp64", **tail}, ({"RANKS": False},), _WARPS, parts=True)
    yield from _configurations({"draws": "*fp32", **tail}, ({"RANKS": True},), _WARPS, parts=True)


def by_id_configurations() -> Iterator[Configuration]:
    """Every dtype and size of vocabularies."""
    arguments = {"draws": "*fp64", "maxima": "*fp32", "places": "*i32", "masses": "*fp32"}
    arguments |= {"tokens": "*i64", "checks": "*fp32"}
    return _configurations(arguments, ({},), _WARPS, parts=True)


def in_order_configurations() -> Iterator[Configuration]:
    """Every dtype and size of vocabularies."""
    arguments = {"draws": "*fp64", "maxima": "*fp32", "tokens": "*i64"}
    return _configurations(arguments, ({"SHIFT": 0},), _SEARCH_WARPS, parts=True)
