"""Between texts and token ids, for endpoints: long ones in a thread, and ids checked against the vocabulary.

It knows the tokenizer; it does not know what the texts are for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from penstock.core.errors import InvalidRequest

from .state import State

IN_THREAD = 16_384
"""Texts of more characters, and lists of more entries, are converted in a thread: the event loop has everyone
else's tokens to serve."""


async def encode_texts(state: State, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text."""
    encode_batch = state.tokenizer.encode_batch
    if sum(map(len, texts)) <= IN_THREAD:
        return encode_batch(texts, add_special_tokens)
    return await asyncio.to_thread(encode_batch, texts, add_special_tokens)


async def decode_ids(state: State, ids: Sequence[int], skip_special_tokens: bool) -> str:
    """Text of token ids."""
    if len(ids) <= IN_THREAD:
        return state.tokenizer.decode(ids, skip_special_tokens)
    return await asyncio.to_thread(state.tokenizer.decode, ids, skip_special_tokens)


def check_ids(ids: Sequence[Any], vocab_size: int, where: str) -> None:
    """Raise InvalidRequest, naming the field `where`, for anything that is no token id of the vocabulary."""
    for token in ids:
        if type(token) is not int:  # bool is an int to isinstance
            raise InvalidRequest(
                f"{where} must hold token ids only, got {type(token).__name__}.", param=where
            )
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"{where} contains token id {token}, which is out of vocabulary: it has ids 0 to "
                f"{vocab_size - 1}.",
                param=where,
            )
