"""What a model is, whatever its architecture calls things: made from config.json by penstock.model.config.

Imports no torch: the API process knows it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

DTYPES = ("float32", "float16", "bfloat16")

Head: TypeAlias = Literal["generate", "embed", "classify", "token_classify"]
"""generate: the vocabulary. embed: nothing, hidden states are what is wanted."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding."""

    theta: float = 10000.0
    """Base of the wavelengths."""
    type: str = "default"
    """One of ROPE_TYPES."""
    scaling: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the type, as config.json has them."""
    partial_factor: float = 1.0
    """Share of each head that is rotated."""


@dataclass(frozen=True, slots=True)
class StoredFp8:
    """The checkpoint's linear layers are in float8_e4m3fn, with scales; see penstock.model.stored_fp8."""

    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale; None where all of a layer do, or those of one output."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only language model or an encoder, whatever its architecture calls things."""

    path: Path
    """The config.json it was read from."""
    architecture: str
    """One of supported_architectures(), or an encoder's of pooling_architectures()."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    """As config.json has it; see context_length."""
    rope: RopeConfig
    norm_eps: float
    activation: str
    windows: tuple[int | None, ...]
    """Sliding window of each layer; None where attention is full."""
    tie_word_embeddings: bool
    attention_bias: bool
    """Bias on the query, key and value projections."""
    output_bias: bool
    """Bias on attention's output projection."""
    mlp_bias: bool
    dtype: str
    """Of the checkpoint: one of DTYPES."""
    eos_ids: tuple[int, ...]
    bos_id: int | None
    raw: Mapping[str, Any] = field(repr=False)
    """config.json itself, for what only one architecture knows."""
    head: Head = "generate"
    """What stands on the last layer."""
    causal: bool = True
    """Whether a position sees only those before it; an encoder's sees all, and keeps no keys and values."""
    position_offset: int = 0
    """Of learnt positions, the row of the first one."""
    fp8: StoredFp8 | None = None
    """How weights are stored where they are not in one of DTYPES."""

    @property
    def context_length(self) -> int:
        """Longest sequence that the positions were made for: scaled types stretch the trained length."""
        scaling = self.rope.scaling
        if not self.causal:
            return self.max_position_embeddings - self.position_offset
        if self.rope.type == "linear":
            return int(self.max_position_embeddings * scaling["factor"])
        if self.rope.type == "yarn":
            original = scaling.get("original_max_position_embeddings") or self.max_position_embeddings
            return max(self.max_position_embeddings, int(original * scaling["factor"]))
        return self.max_position_embeddings

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that are rotated."""
        return int(self.head_dim * self.rope.partial_factor)
