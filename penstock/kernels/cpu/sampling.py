"""Tokens and log-probabilities straight from the logits of a CPU model; csrc/sampling.h has the algorithms.

They choose the specification's tokens wherever rounding cannot matter. It can where a draw, or the border of
top_p or min_p, falls within about a millionth of the mass between two tokens: weights are computed with
another exponential, which may give 0 below 2⁻¹²⁶, and their sums in another order. Greedy choice, top_k,
ranks and the order of alternatives compare logits and are exact. Log-probabilities agree to about 1e-6 of
their size.

Knows logits and numbers; knows nothing of requests.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p

import torch

from penstock.kernels.operations import Draw, Likelihood, Operations

from .binding import Library
from .scratch import Scratch
from .tensors import IS_BF16, dense


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


#: Columns of draws for which no rows are there.
_NONE: tuple[tuple[float, ...], ...] = ((),) * len(Draw._fields)


class Sampling:
    """The kernels. Logits are [n, V], float32 or bfloat16; they are not changed."""

    def __init__(self, library: Library, plain: Operations) -> None:
        """plain: lists large parts of the vocabulary, and what broken rows say."""
        self._library = library
        self._plain = plain

    def sample(self, logits: torch.Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[float]]:
        """See Operations.sample: (token, largest logit) of each row.

        Raises ValueError for logits of another shape or dtype.
        """
        rows = len(draws)
        _check(logits, rows)
        uniforms, temperatures, min_ps, top_ks, top_ps = zip(*draws, strict=True) if draws else _NONE
        vocabulary, threads = logits.shape[1], torch.get_num_threads()
        settings = (
            array("d", uniforms),
            array("d", top_ps),
            array("f", temperatures),
            array("f", min_ps),
            array("i", [min(top_k, vocabulary) for top_k in top_ks]),
        )
        logits = dense(logits)
        tokens, checks = array("q", bytes(8 * rows)), array("f", bytes(4 * rows))
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
    ) -> list[Likelihood]:
        """See Operations.logprobs. Raises ValueError for tokens and counts that are not in the logits."""
        rows = len(tokens)
        _check(logits, rows, len(counts))
        vocabulary = logits.shape[1]
        for values, least, most in ((tokens, 0, vocabulary - 1), (counts, 0, vocabulary)):
            if rows and not (least <= min(values) and max(values) <= most):
                raise ValueError(f"{list(values)}: each must be {least} to {most}.")
        logits = dense(logits)
        own, wanted = array("q", tokens), array("i", [0 if 8 * n > vocabulary else n for n in counts])
        most, threads = max(wanted, default=0), torch.get_num_threads()
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
        found = []
        for row, count in enumerate(counts):
            # rows without a distribution, and those that want a great part of it: each on its own
            if ranks[row] == 0 or count > wanted[row]:
                found += self._plain.logprobs(logits[row : row + 1], tokens[row : row + 1], [count])
                continue
            best = slice(row * most, row * most + count)
            found.append(
                Likelihood(logprobs[row], ranks[row], top_tokens[best].tolist(), top_logprobs[best].tolist())
            )
        return found


def _check(logits: torch.Tensor, rows: int, *lengths: int) -> None:
    if logits.ndim != 2 or logits.shape[0] != rows or any(length != rows for length in lengths):
        raise ValueError(
            f"need logits of shape [{rows}, V] and {rows} of everything else, got {list(logits.shape)} "
            f"and {list(lengths)}."
        )
    if logits.dtype not in IS_BF16:
        raise ValueError(f"logits of {logits.dtype}; these kernels take float32 and bfloat16")
