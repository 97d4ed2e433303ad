"""What a grammar must know of a model's tokens: plain data, which goes to whoever compiles."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a grammar must know of a model's tokens; plain data."""

    tokenizer: str
    """tokenizer.json's text, with what other files add to it."""
    size: int
    """Of the model's logits; tokens beyond the tokenizer's are never allowed."""
    eos_ids: tuple[int, ...]
    special: tuple[tuple[str, int], ...] = ()
    """Special tokens."""
    spoken: tuple[tuple[str, int], ...] = ()
    """Added tokens that are not special: readers see their text, such as "<tool_call>" and "<think>"."""
