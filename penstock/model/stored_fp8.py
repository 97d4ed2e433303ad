"""Checkpoints whose linear layers are stored in fp8: what config.json says of them, and what is served.

    X.weight             float8_e4m3fn [N, K]
    X.weight_scale_inv   [ceil(N / 128), ceil(K / 128)]   of a block    "fp8": Qwen3-…-FP8, DeepSeek
    X.weight_scale       [], [1], [N] or [N, 1]           of all, row   "fp8", "compressed-tensors"
                         or as weight_scale_inv                         "compressed-tensors", strategy block

A weight is its fp8 number times the scale (scale_inv, too, is multiplied with). It is restored to the type
that the engine computes in while it is read: activations are not rounded to fp8, so scales of activations,
keys and values have no use here, and are left alone. `--quantization` then rounds as for any checkpoint.

Imports no torch: the API process reads config.json, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from penstock.files import shown

from .model_config import StoredFp8

SCALES = ("weight_scale_inv", "weight_scale")
"""What a scale is called beside "weight"."""
UNUSED = re.compile(r"\.(?:input|output|q|k|v|prob_output)_scale$")
"""Of activations, keys and values."""
_FORMATS = ("float-quantized", "naive-quantized")
_STRATEGIES = ("tensor", "channel", "block")
_MOST_BLOCK = 1 << 20


def stored_fp8(given: object) -> StoredFp8:
    """What `quantization_config` describes. Raises ValueError, with the reason, for what is not served."""
    if not isinstance(given, Mapping):
        raise ValueError(f"quantised checkpoints (here {shown(given)}) are not supported")
    method = given.get("quant_method")
    if method == "fp8":
        if given.get("fmt", "e4m3") != "e4m3":
            raise ValueError(f"fmt={shown(given['fmt'])}: of fp8, e4m3 is supported")
        return StoredFp8(_block(given.get("weight_block_size"), "weight_block_size"))
    if method == "compressed-tensors":
        return _compressed_tensors(given)
    raise ValueError(f"quantised checkpoints (here {shown(method)}) are not supported, but for fp8")


def _compressed_tensors(given: Mapping[str, Any]) -> StoredFp8:
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError("config_groups is missing")
    sparsity = given.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise ValueError(f"sparsity_config.format={shown(sparsity['format'])} is not supported")
    if given.get("transform_config"):
        raise ValueError("transform_config: rotated weights are not supported")
    blocks = set()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise ValueError(f"config_groups.{shown(name)}.weights is missing")
        form = group.get("format") or given.get("format")
        kind = weights.get("type"), weights.get("num_bits"), weights.get("symmetric", True)
        if kind != ("float", 8, True) or form not in _FORMATS:
            raise ValueError(
                f"config_groups.{shown(name)}: compressed-tensors of type {shown(kind[0])} with "
                f"{shown(kind[1])} bits, format {shown(form)}; supported are symmetric floats of 8 bits, "
                f"{' or '.join(_FORMATS)}"
            )
        strategy = weights.get("strategy")
        if strategy not in _STRATEGIES:
            raise ValueError(
                f"config_groups.{shown(name)}: strategy {shown(strategy)}; "
                f"supported: {', '.join(_STRATEGIES)}"
            )
        blocks.add(_block(weights.get("block_structure"), "block_structure") if strategy == "block" else None)
    if len(blocks - {None}) > 1:
        raise ValueError("config_groups have blocks of several sizes")
    return StoredFp8(next(iter(blocks - {None}), None))


def _block(given: object, key: str) -> tuple[int, int] | None:
    if given is None:
        return None
    sizes = given if isinstance(given, list) else []
    if len(sizes) != 2 or any(type(size) is not int or not 1 <= size <= _MOST_BLOCK for size in sizes):
        raise ValueError(f"{key}={shown(given)}: must be two positive integers")
    return sizes[0], sizes[1]
