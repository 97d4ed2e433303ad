"""Penstock: self-hosted serving for open-weight language models. Predictable, provable, priced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.core.sampling_params import SamplingParams
    from penstock.offline import LLM, CompletionOutput, Logprob, RequestOutput

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams", "__version__"]

_WHERE = {
    "LLM": "penstock.offline",
    "CompletionOutput": "penstock.offline",
    "Logprob": "penstock.offline",
    "RequestOutput": "penstock.offline",
    "SamplingParams": "penstock.core.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import penstock` needs no torch."""
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")
