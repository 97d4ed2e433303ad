"""Texts that an output must not contain, as token ids."""

from __future__ import annotations

from collections.abc import Iterable

from .tokenizer import Tokenizer


def bad_words_ids(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as it is, and as it stands behind a blank where it is one token more or less the same: vLLM's
    rule. Other spellings of it (in other tokens, in capitals) are other words."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        plain = tuple(tokenizer.encode(bare, add_special_tokens=False))
        spaced = tuple(tokenizer.encode(f" {bare}", add_special_tokens=False))
        if plain:
            found[plain] = None
            if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
                found[spaced] = None
    return tuple(found)
