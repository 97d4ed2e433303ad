"""Tokens and log-probabilities straight from the logits of a CPU model; csrc/sampling.h has the algorithms.

`penstock.sampling` asks `kernels(logits)` at each call, and does with torch's operators when there is
nothing: another device or dtype, or no library. Both choose the same tokens wherever rounding cannot matter.
It can where a draw, or the border of top_p or min_p, falls within about a millionth of the mass between two
tokens: weights are computed with another exponential, which may give 0 below 2⁻¹²⁶, and their sums in another
order. Greedy choice, top_k and ranks compare logits and are exact. Log-probabilities agree to about 1e-6 of
their size; ranks and order here are those of the logits, where torch's path compares log-probabilities, in
which neighbouring float32 logits may have become equal. All alternatives of a row are listed in the order
(logit descending, id ascending), also where more than 32 equal ones stand at the border, of which torch's
path takes any.

Knows logits and numbers; knows nothing of requests.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p

import torch

from .library import Library
from .scratch import Scratch
from .tensors import IS_BF16, dense, library_for


class _SampleArguments(ctypes.Structure):
    """struct Arguments of csrc/sampling.cpp, field by field."""

    _fields_ = [
        ("logits", c_void_p),
        ("stride", c_int64),
        *((name, c_void_p) for name in "uniforms top_ps temperatures min_ps top_ks".split()),
        *((name, c_void_p) for name in "tokens checks scratch".split()),
        *((name, c_int32) for name in "rows vocab is_bf16 threads".split()),
    ]


class _LogprobArguments(ctypes.Structure):
    """struct Logprobs of csrc/sampling.cpp, field by field."""

    _fields_ = [
        ("logits", c_void_p),
        ("stride", c_int64),
        *(
            (name, c_void_p)
            for name in "tokens counts logprobs ranks top_tokens top_logprobs scratch".split()
        ),
        *((name, c_int32) for name in "rows vocab most is_bf16 threads".split()),
    ]


_scratch = Scratch()


def kernels(logits: torch.Tensor) -> Sampling | None:
    """The kernels for logits like these, or None."""
    library = library_for(logits)
    return None if library is None else Sampling(library)


class Sampling:
    """The kernels. Logits are [n, V], float32 or bfloat16; they are not changed."""

    __slots__ = ("_library",)

    def __init__(self, library: Library) -> None:
        self._library = library

    def sample(
        self,
        logits: torch.Tensor,
        *,
        temperatures: Sequence[float],
        uniforms: Sequence[float],
        min_ps: Sequence[float],
        top_ks: Sequence[int],
        top_ps: Sequence[float],
    ) -> tuple[list[int], list[float]]:
        """(token, largest logit) of each row; see penstock.sampling.choose for what the numbers mean.

        Args:
            logits: [n, V].
            temperatures: n of them; 0 takes the most probable token, the lowest id among equals.
            uniforms: in [0, 1).
            min_ps, top_ks, top_ps: 0, 0 and 1 are off.

        A largest logit that is not finite (NaN if there is any in the row) says that the row has no
        distribution; its token is 0 and means nothing.
        """
        rows = len(temperatures)
        settings = (
            array("d", uniforms),
            array("d", top_ps),
            array("f", temperatures),
            array("f", min_ps),
            array("i", top_ks),
        )
        _check(logits, rows, *(len(setting) for setting in settings))
        logits = dense(logits)
        tokens, checks = array("q", bytes(8 * rows)), array("f", bytes(4 * rows))
        vocabulary, threads = logits.shape[1], torch.get_num_threads()
        self._library.sample(
            ctypes.byref(
                _SampleArguments(
                    logits.data_ptr(),
                    logits.stride(0),
                    *(setting.buffer_info()[0] for setting in settings),
                    tokens.buffer_info()[0],
                    checks.buffer_info()[0],
                    _scratch.address(self._library.sampling_scratch(vocabulary, threads)),
                    rows,
                    vocabulary,
                    IS_BF16[logits.dtype],
                    threads,
                )
            )
        )
        return tokens.tolist(), checks.tolist()

    def logprobs(
        self, logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]
    ) -> list[tuple[float, int, list[int], list[float]]] | None:
        """(logprob, rank, best tokens, their logprobs) of each row; see penstock.sampling.logprobs.

        Args:
            logits: [n, V].
            tokens: n of them.
            counts: how many of the best tokens of each row, 0 to V.

        None if a row has no distribution: NaN, infinite or only -inf logits.
        """
        rows, vocabulary = len(tokens), logits.shape[1]
        _check(logits, rows, len(counts))
        for values, least, most in ((tokens, 0, vocabulary - 1), (counts, 0, vocabulary)):
            if rows and not (least <= min(values) and max(values) <= most):
                raise ValueError(f"{list(values)}: each must be {least} to {most}.")
        logits = dense(logits)
        most, threads = max(counts, default=0), torch.get_num_threads()
        own, wanted = array("q", tokens), array("i", counts)
        logprobs, ranks = array("d", bytes(8 * rows)), array("q", bytes(8 * rows))
        top_tokens, top_logprobs = array("q", bytes(8 * rows * most)), array("d", bytes(8 * rows * most))
        self._library.logprobs(
            ctypes.byref(
                _LogprobArguments(
                    logits.data_ptr(),
                    logits.stride(0),
                    *(
                        values.buffer_info()[0]
                        for values in (own, wanted, logprobs, ranks, top_tokens, top_logprobs)
                    ),
                    _scratch.address(self._library.sampling_scratch(vocabulary, threads)),
                    rows,
                    vocabulary,
                    most,
                    IS_BF16[logits.dtype],
                    threads,
                )
            )
        )
        if 0 in ranks:
            return None
        starts = range(0, rows * most, most) if most else [0] * rows
        return [
            (
                logprobs[row],
                ranks[row],
                top_tokens[at : at + counts[row]].tolist(),
                top_logprobs[at : at + counts[row]].tolist(),
            )
            for row, at in enumerate(starts)
        ]


def _check(logits: torch.Tensor, rows: int, *lengths: int) -> None:
    if logits.ndim != 2 or logits.shape[0] != rows or any(length != rows for length in lengths):
        raise ValueError(
            f"need logits of shape [{rows}, V] and {rows} of everything else, got {list(logits.shape)} "
            f"and {list(lengths)}."
        )
