"""Filling a gap: how the families of models that can write down what stands before it and behind it.

    [BOS] PREFIX … SUFFIX … MIDDLE   Qwen2.5-Coder, StarCoder, CodeGemma, DeepSeek-Coder, CodeLlama, GLM
    [BOS] SUFFIX … PREFIX …          Codestral

It knows the marks of each family; which one a model is of is said by the tokens that its tokenizer has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_PSM = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
)
_SPM = (("[SUFFIX]", "[PREFIX]"),)
_ENDS = ("<|fim_pad|>", "<fim_pad>", "▁<EOT>", "<|file_sep|>", "<file_sep>")
"""What some models write behind a filled gap, beside their end of sequence."""


@dataclass(frozen=True, slots=True)
class Infill:
    """How one model is asked to fill a gap."""

    marks: tuple[int, ...]
    """Prefix, suffix and middle; or suffix and prefix."""
    ends: tuple[int, ...]
    """Tokens that can only follow what was to be written."""

    @classmethod
    def of(cls, token_id: Callable[[str], int | None]) -> Infill | None:
        """Of a tokenizer; None for a model that was not trained to fill gaps."""
        for names in (*_PSM, *_SPM):
            marks = [token_id(name) for name in names]
            if None not in marks:
                known = tuple(id for id in marks if id is not None)
                others = [token_id(name) for name in _ENDS]
                return cls(known, (*known, *(id for id in others if id is not None)))
        return None

    def prompt(self, prefix: list[int], suffix: list[int], begin: list[int]) -> list[int]:
        """The prompt's tokens. begin: what the tokenizer puts before every text."""
        if len(self.marks) == 2:
            return [*begin, self.marks[0], *suffix, self.marks[1], *prefix]
        before, behind, middle = self.marks
        return [*begin, before, *prefix, behind, *suffix, middle]
