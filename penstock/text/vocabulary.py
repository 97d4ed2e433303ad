"""A tokenizer as grammars know it."""

from __future__ import annotations

from penstock.grammar.vocabulary import Vocabulary

from .tokenizer import Tokenizer


def vocabulary(tokenizer: Tokenizer, size: int, eos_ids: tuple[int, ...]) -> Vocabulary:
    """Of a model whose logits have `size` entries, and whose outputs end with `eos_ids`."""
    special = tuple((tokenizer.token_text(id), id) for id in sorted(tokenizer.special_ids))
    added = sorted(tokenizer.added_tokens.items())
    spoken = tuple((text, id) for id, text in added if id not in tokenizer.special_ids)
    return Vocabulary(tokenizer.to_json(), size, eos_ids, special, spoken)
