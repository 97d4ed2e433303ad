"""Distrust, for some milliseconds: a freshly loaded library against the specification, in milliseconds."""

from __future__ import annotations

import torch

from penstock.kernels.attention import KVCache, KVCacheSpec, Span, StepLayout
from penstock.kernels.reference import ReferenceAttention

from .attention import CpuAttention
from .binding import Library

_CPU = torch.device("cpu")


def check(library: Library) -> None:
    """Raises RuntimeError if attention over a tiny cache is not what the specification says."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        spec = KVCacheSpec(1, 2, 40, 4, dtype)
        layout = StepLayout([Span(9, 1, [3, 0, 5]), Span(2, 7, [1, 2, 4])], 4)
        generator = torch.Generator().manual_seed(0)
        fused = torch.randn(layout.num_tokens, 8, spec.head_dim, generator=generator).to(dtype)
        q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
        results = []
        for backend in (ReferenceAttention(spec), CpuAttention(library, spec)):
            cache = KVCache(spec, 6, _CPU)
            results.append(backend.prepare(layout)(q, k, v, *cache.layers[0], scale=0.2).float())
        error = (results[0] - results[1]).abs().max().item()
        if not error < tolerance:
            raise RuntimeError(f"self-test of {library.isa} {dtype} attention: error {error}")
