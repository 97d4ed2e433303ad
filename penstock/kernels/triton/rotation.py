"""Norm and rotation of heads, and writes to the KV cache: the hosts of rotation_kernels."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from penstock.kernels.operations import LayerCache, Rotation

from .launch import OPTIONS
from .registry import ACTIVATION_TYPES, HEAD_DIMS, Configuration

_ELEMENTS = 1024
_WARPS = 4


def power(n: int) -> int:
    """The least power of two that is not less than n."""
    return 1 << max(0, n - 1).bit_length()


def _heads(dim: int) -> int:
    """Heads of one program."""
    return max(1, _ELEMENTS // power(dim))


def rotate(x: Tensor, rotation: Rotation, weight: Tensor | None, eps: float) -> Tensor:
    """See Operations.rotate: in place. Raises ValueError for other strides than it says."""
    _start(x, rotation, weight, eps, x, None, None)
    return x


def rotate_and_write(
    heads: Tensor,
    rotation: Rotation,
    weight: Tensor | None,
    eps: float,
    query_heads: int,
    cache: LayerCache,
    slots: Tensor,
) -> None:
    """Queries [T, :query_heads] are normed and rotated in place, keys and values go into the cache.

    heads: [T, query heads | key heads | value heads, D]; those of keys keep what they had.
    slots: int32 [T]; below 0 for tokens that are not written.
    """
    _start(heads, rotation, weight, eps, heads[:, :query_heads], cache, slots)


def _start(
    x: Tensor,
    rotation: Rotation,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
    cache: LayerCache | None,
    slots: Tensor | None,
) -> None:
    from . import rotation_kernels

    check_heads(x, "x")
    tokens, heads, dim = x.shape
    cos, sin = rotation
    width = cos.shape[-1]
    keys, values = (x, x) if cache is None else cache
    kv_heads, block_size = (heads - out.shape[1], 1) if cache is None else cache[0].shape[1:3]
    per_program = _heads(dim)
    if tokens:
        rotation_kernels.rotate[(tokens, -(-heads // per_program))](
            x,
            x if weight is None else weight,
            cos,
            sin,
            out,
            keys,
            values,
            x if slots is None else slots,
            heads,
            out.shape[1],
            kv_heads,
            block_size,
            x.stride(0),
            out.stride(0),
            eps,
            D=dim,
            R=width,
            HALF=power(width // 2),
            REST=power(dim - width) if dim > width else 0,
            HEADS=per_program,
            NORM=weight is not None,
            WRITE=cache is not None,
            num_warps=_WARPS,
            **OPTIONS,
        )


def write_kv(k: Tensor, v: Tensor, cache: LayerCache, slots: Tensor) -> None:
    """Keys and values [T, KVH, D] into the cache, at int32 slots [T]; below 0 they are not written."""
    from . import rotation_kernels

    check_heads(k, "k")
    check_heads(v, "v")
    tokens, kv_heads, dim = k.shape
    per_program = _heads(dim)
    if tokens:
        rotation_kernels.write_kv[(tokens, -(-kv_heads // per_program))](
            k,
            v,
            *cache,
            slots,
            kv_heads,
            cache[0].shape[2],
            k.stride(0),
            v.stride(0),
            D=dim,
            BLOCK_D=power(dim),
            HEADS=per_program,
            num_warps=_WARPS,
            **OPTIONS,
        )


def check_heads(x: Tensor, name: str) -> None:
    """Raises ValueError unless heads lie side by side."""
    dim = x.shape[-1]
    if x.ndim != 3 or (x.numel() and (x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != dim))):
        raise ValueError(
            f"{name} of shape {list(x.shape)} has strides {list(x.stride())}; need (any, {dim}, 1)"
        )


#: (elements of a head, of which so many are rotated) of the supported architectures' published models, which
#: have no norm. Norms have Qwen3's, with heads of 128. Any other works, compiled when it is met.
PARTLY_ROTATED = ((64, 16), (64, 32), (80, 20), (80, 32), (96, 24), (128, 32), (256, 64))
NORMED = (128,)


def rotate_configurations() -> Iterator[Configuration]:
    """Every dtype and size of heads, rotated whole or in part, with a norm or none; alone, and in a stack."""
    for dtype in ACTIVATION_TYPES:
        for dim in HEAD_DIMS:
            for norm in (False, True) if dim in NORMED else (False,):
                for write in (False, True):
                    yield _rotate_configuration(dtype, dim, dim, norm=norm, write=write)
        for dim, width in PARTLY_ROTATED:
            yield _rotate_configuration(dtype, dim, width, norm=False, write=False)


def _rotate_configuration(dtype: str, dim: int, width: int, *, norm: bool, write: bool) -> Configuration:
    return Configuration(
        label=f"{dtype} · head {dim}"
        + (f", {width} rotated" if width < dim else "")
        + (" · norm" if norm else "")
        + (" · cache" if write else ""),
        signature={
            **dict.fromkeys(("x", "weight", "cos", "sin", "out", "key_cache", "value_cache"), f"*{dtype}"),
            "slots": "*i32" if write else f"*{dtype}",
            **dict.fromkeys(("heads", "query_heads", "kv_heads", "block_size"), "i32"),
            **dict.fromkeys(("x_stride", "out_stride"), "i32"),
            "eps": "fp32",
            **dict.fromkeys(("D", "R", "HALF", "REST", "HEADS", "NORM", "WRITE"), "constexpr"),
        },
        constants={
            "D": dim,
            "R": width,
            "HALF": power(width // 2),
            "REST": power(dim - width) if dim > width else 0,
            "HEADS": _heads(dim),
            "NORM": norm,
            "WRITE": write,
        },
        num_warps=_WARPS,
        divisible=("x_stride", "out_stride"),
        traits={"dtype": dtype, "head_dim": dim, "norm": norm, "write": write},
    )


def write_kv_configurations() -> Iterator[Configuration]:
    """Every dtype and size of heads."""
    for dtype in ACTIVATION_TYPES:
        for dim in HEAD_DIMS:
            yield Configuration(
                label=f"{dtype} · head {dim}",
                signature={
                    **dict.fromkeys(("k", "v", "key_cache", "value_cache"), f"*{dtype}"),
                    "slots": "*i32",
                    **dict.fromkeys(("kv_heads", "block_size", "k_stride", "v_stride"), "i32"),
                    **dict.fromkeys(("D", "BLOCK_D", "HEADS"), "constexpr"),
                },
                constants={"D": dim, "BLOCK_D": power(dim), "HEADS": _heads(dim)},
                num_warps=_WARPS,
                divisible=("k_stride", "v_stride"),
                traits={"dtype": dtype, "head_dim": dim},
            )
