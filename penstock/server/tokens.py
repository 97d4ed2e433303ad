"""Between texts and token ids, for endpoints: long ones in a thread, and ids checked against the vocabulary.

It knows the tokenizer; it does not know what the texts are for.

A text that is much longer than what is wanted of it is not tokenised as a whole. Its beginning is (its end,
where the last tokens are wanted), of a size that doubles until it has twice the tokens that can be used:

    text     ├──────── part ────────┼ … 10 MB … ┤
    tokens   ├── most ──┼── most ───┤              tokens next to the cut may differ from those of the whole
                                                   text; they are not among those that are used
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from penstock.core.errors import ContextLengthExceeded, InvalidRequest, quote

from .limits import too_much
from .state import State
from .work import IN_THREAD

_BATCH = 131_072
"""Characters of several texts that one piece of work converts."""
_CHARS_PER_TOKEN = 16
"""Texts with more characters per usable token than this are looked at in parts. Prose has four."""
_MARGIN = 64
"""Tokens beside a cut that are never used."""


@dataclass(frozen=True, slots=True)
class Usable:
    """How much of a text can be used."""

    most: int
    """Tokens."""
    side: str | None
    """Where it is cut off: left or right. None: a text with more is refused."""
    field: str
    """The text's, for the refusal."""


async def count_tokens(state: State, text: str, add_special_tokens: bool, field: str) -> int:
    """How many a prompt has. Raises InvalidRequest for one over --max-tokenize-length, naming its field."""
    if len(text) > state.config.max_tokenize_length:
        what = "The number of characters to count the tokens of"
        raise too_much(what, len(text), state.config, "max_tokenize_length", field)
    (ids,) = await state.work.do(len(text), state.tokenizer.encode_batch, [text], add_special_tokens)
    return len(ids)


async def encode_texts(
    state: State, texts: Sequence[str], add_special_tokens: bool, usable: Usable | None = None
) -> list[list[int]]:
    """Token ids of each text; where it has many more than are usable, of its beginning or end.

    Raises ContextLengthExceeded where that is certain before the text is read to its end.
    """
    encode_batch = state.tokenizer.encode_batch
    total = sum(map(len, texts))
    if total <= IN_THREAD:
        return encode_batch(texts, add_special_tokens)
    state.work.spent(total)
    encoded: list[list[int]] = []
    for batch in _batches(texts):
        size = sum(map(len, batch))
        if usable is not None and size > _first_part(usable):
            for text in batch:
                encoded.append(await _encode_part(state, text, add_special_tokens, usable))
        else:
            encoded += await state.work.run(size, encode_batch, batch, add_special_tokens)
    return encoded


def _first_part(usable: Usable) -> int:
    return max(_CHARS_PER_TOKEN * usable.most, IN_THREAD)


async def _encode_part(state: State, text: str, add_special_tokens: bool, usable: Usable) -> list[int]:
    size = _first_part(usable)
    while True:
        part = text[-size:] if usable.side == "left" else text[:size]
        (ids,) = await state.work.run(len(part), state.tokenizer.encode_batch, [part], add_special_tokens)
        if len(part) == len(text):
            return ids
        if len(ids) > 2 * usable.most + _MARGIN:
            if usable.side is not None:
                return ids
            raise ContextLengthExceeded(
                f"This model's maximum context length is {usable.most} tokens. However, your request has "
                f"{len(text)} characters in the {usable.field}, of which the first {size} are {len(ids)} "
                "tokens.",
                param=usable.field,
                advice=f"Shorten the {usable.field}.",
            )
        size *= 2


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Neighbours together, up to a size."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


async def decode_ids(state: State, ids: Sequence[int], skip_special_tokens: bool) -> str:
    """Text of token ids."""
    return await state.work.do(len(ids), state.tokenizer.decode, ids, skip_special_tokens)


def check_ids(ids: Sequence[Any], vocab_size: int, where: str) -> None:
    """Raise InvalidRequest, naming the field `where`, for anything that is no token id of the vocabulary."""
    with suppress(TypeError):  # something that cannot be in a set: the loop finds it
        distinct = set(ids)  # far fewer than a million ids are
        if set(map(type, ids)) <= {int} and all(0 <= token < vocab_size for token in distinct):
            return
    for token in ids:  # only where one is at fault
        if type(token) is not int:  # bool is an int to isinstance
            raise InvalidRequest(
                f"{where} must hold token ids only, got {type(token).__name__}.", param=where
            )
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"{where} contains token id {quote(token)}, which is out of vocabulary: it has ids 0 to "
                f"{vocab_size - 1}.",
                param=where,
            )
