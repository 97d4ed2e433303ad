"""Penstock: self-hosted serving for open-weight language models. Predictable, provable, priced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.core.sampling_params import BeamSearchParams, SamplingParams
    from penstock.offline import LLM, CompletionOutput, Logprob, RequestOutput
    from penstock.offline_pooling import (
        ClassificationRequestOutput,
        EmbeddingRequestOutput,
        PoolingParams,
        PoolingRequestOutput,
        ScoringRequestOutput,
    )

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BeamSearchParams",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "Logprob",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "SamplingParams",
    "ScoringRequestOutput",
    "__version__",
]

_WHERE = {
    "LLM": "penstock.offline",
    "BeamSearchParams": "penstock.core.sampling_params",
    "CompletionOutput": "penstock.offline",
    "Logprob": "penstock.offline",
    "ClassificationRequestOutput": "penstock.offline_pooling",
    "EmbeddingRequestOutput": "penstock.offline_pooling",
    "PoolingParams": "penstock.offline_pooling",
    "PoolingRequestOutput": "penstock.offline_pooling",
    "RequestOutput": "penstock.offline",
    "ScoringRequestOutput": "penstock.offline_pooling",
    "SamplingParams": "penstock.core.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import penstock` needs no torch."""
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")
