"""The seam between models and devices: one table of operations, chosen once and given to the model.

    create_operations(device, dtype)                          kernels/create.py
        │
        ▼
    Operations ─┬─ embed · rms_norm · layer_norm · rotate     tensors in, a tensor out
                ├─ activation · gate · linear · attention     made once: for a function, a weight, a cache
                ├─ sample · logprobs                          logits in, Python's numbers out
                ├─ choose                                     optional: the same, but the numbers stay there
                └─ stack                                      optional: all layers of a step in one call

Behind it stand `reference`, which specifies every entry, `torch`, which runs everywhere, `cpu` and `triton`.
A table takes from another one what it does not do itself: that is decided when the table is made, so that no
call asks where it is.

All activations are [T, …], one row per token of the flattened batch, in the table's dtype. Casts follow
transformers, so that bfloat16 agrees with it: sums are float32, and every operation rounds its result once.

Knows tensors. Knows nothing of requests, architectures or scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .attention import AttentionBackend, AttentionStep, KVCacheSpec

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
"""x · sigmoid(x); x · Φ(x), exactly and in the approximation through tanh; max(x, 0)."""

Rotation: TypeAlias = tuple[Tensor, Tensor]
"""cos and sin of each token's angles, [T, 1, R], dense, R even. Both halves of the last dimension hold the
same angles; the first half of sin is negated."""

LayerCache: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values of one layer: a pair of [num_blocks, KVH, block_size, D]."""


class Matrix(Protocol):
    """The weight of a linear layer, as its device reads it fastest.

    Attributes:
        nbytes: that the weight takes, scales included.
        copied: whether the memory of the given weight is not needed any more.
    """

    nbytes: int
    copied: bool

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b: [T, in] → [T, out]; bias: [out]."""
        ...


class Draw(NamedTuple):
    """How one row of logits is sampled."""

    uniform: float
    """In [0, 1): which token of those that are kept."""
    temperature: float
    """0 takes the most probable token, the lowest id among equals."""
    min_p: float = 0.0
    """Drops tokens below this share of the most probable one's probability; 0 is off."""
    top_k: int = 0
    """Keeps the largest logits, and all that equal the last of them; 0 is off."""
    top_p: float = 1.0
    """Keeps the most probable tokens until their sum reaches this share of what is left; 1 is off."""


class Likelihood(NamedTuple):
    """What one row of logits says about a token, and about the most probable ones."""

    logprob: float
    rank: int
    """Number of tokens that are at least as probable."""
    best: list[int]
    """Ids, by (logit descending, id ascending)."""
    logprobs: list[float]
    """Of `best`."""


Product: TypeAlias = tuple[Matrix, Tensor | None]
"""A weight [out, in] and a bias [out]."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer of a stack: norm, attention, +, norm, down(silu(gate) · up), +. Norms are RMS norms."""

    attention_norm: Tensor
    """[hidden]"""
    qkv: Product
    """Output: [q heads | k heads | v heads]."""
    head_norm: Tensor | None
    """[q heads + k heads, head_dim], of an RMS norm before the rotation."""
    out: Product
    mlp_norm: Tensor
    gate_up: Product
    """Output: [gate | up]."""
    down: Product
    window: int | None
    """Of sliding attention."""


class Stack(Protocol):
    """The layers of one model, computed in one call. Steps run one after the other."""

    def run(
        self,
        x: Tensor,
        rotation: Rotation,
        step: AttentionStep,
        caches: Sequence[LayerCache],
        wanted: Sequence[int] | None = None,
    ) -> Tensor | None:
        """Take x [T, hidden] through all layers, in its memory: bit for bit what the single calls compute.

        wanted: rows, ascending; all by default. Returns theirs, [R, hidden]. Raises ValueError for others.

        None: nothing was done, for this step is not one that the stack takes; single calls must do it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Operations:
    """What a device computes. Shapes and meaning of every entry; `reference` says the same in code."""

    name: str
    """Of the table that most entries come from."""
    device: torch.device
    dtype: torch.dtype
    """Of activations, weights and KV cache."""

    embed: Callable[[Tensor, Tensor], Tensor]
    """(token ids, int64 [T]; table [V, hidden]) → [T, hidden]."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x [..., n], weight [n], eps) → x / rms(x) · weight; rounded before the product."""
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """(x [..., n], weight [n], bias [n], eps) → (x - mean) / std · weight + bias."""
    rotate: Callable[[Tensor, Rotation, Tensor | None, float], Tensor]
    """(x [T, heads, D], rotation, weight [heads, D] or None, eps): the RMS norm of every head, if there is a
    weight, then the rotation of its first R dimensions. The result may lie in the memory of x.

    x: heads side by side, of strides (any, D, 1); a ValueError may be raised for others."""

    activation: Callable[[Activation], Callable[[Tensor], Tensor]]
    """A function of each element, of a tensor of any shape."""
    gate: Callable[[Activation], Callable[[Tensor], Tensor]]
    """[gate | up] [T, 2n] → activation(gate) · up, [T, n]."""
    linear: Callable[[Tensor, str | None], Matrix]
    """(weight [out, in], one of `schemes` or None) → its product. Raises ValueError for another scheme."""
    attention: Callable[[KVCacheSpec], AttentionBackend]
    """Attention over a cache of this shape: planned once per step, then called once per layer."""

    sample: Callable[[Tensor, Sequence[Draw]], tuple[list[int], list[float]]]
    """(logits [n, V], n draws) → n tokens, and n checks, finite for the rows that have a distribution.

    A row gets the token at which its cumulative distribution exceeds the uniform number: by (logit
    descending, id ascending) where top_k or top_p are on, else by id. It depends on nothing but that row.
    Logits have the table's dtype or float32, and are not changed. With NaN or +inf in it, or -inf alone, a
    row has no distribution and its token means nothing. Tables may disagree where a draw falls within a
    millionth of the mass of the border between two tokens: sums are in another order."""
    logprobs: Callable[[Tensor, Sequence[int], Sequence[int]], list[Likelihood]]
    """(logits [n, V], n token ids, how many of the best tokens of each row, 0 to V) → n likelihoods.

    Ranks and order are those of the logits. Of a row that has no distribution, the numbers mean nothing."""

    stack: Callable[[Sequence[LayerWeights], float, float], Stack | None] | None = None
    """(layers, eps of all norms, scale of attention scores) → their stack, or None for weights that it does
    not take. Absent where a device has nothing better than single calls."""

    choose: Callable[[Tensor, Sequence[Draw]], tuple[Tensor, Tensor]] | None = None
    """`sample` whose answer stays on the device: (tokens int64 [n], checks float32 [n]), the same ones. The
    next step reads the tokens there, before the host has seen them. Absent where nothing computes by itself.
    """

    schemes: tuple[str, ...] = ()
    """Quantisations that `linear` can multiply with; see kernels/quantization.py."""
    multiplies_integers: bool = False
    """Whether the processor has instructions for their products."""
    copies_weights: bool = False
    """Whether `linear` lays every weight out anew; then it may be given borrowed memory."""
    batch_invariant: bool = False
    """Whether the bits of a row depend on it alone (in attention: on it and the keys and values before it),
    in every entry: not on the rows beside it, on how a prompt is cut into chunks, on blocks or threads, or
    on what an earlier request left behind. Then equal requests with equal seeds get equal bytes."""


def ascending(wanted: Sequence[int], rows: int) -> npt.NDArray[np.int32]:
    """These rows of so many. Raises ValueError unless they are ascending."""
    chosen = np.array(wanted, np.int32)
    if len(chosen) and (chosen[0] < 0 or chosen[-1] >= rows or (np.diff(chosen) <= 0).any()):
        raise ValueError(f"rows {list(wanted)} of {rows}; need ascending ones")
    return chosen
