"""Prompts of requests that pool: texts, token ids or pairs of texts, cut where that is asked for.

It knows fields of requests; how special tokens are put around what is cut is the business of `text.framing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from penstock.core.errors import InvalidRequest
from penstock.text.framing import Side, cut, framed, joined

from .generation import Prompt
from .limits import check_choices
from .params import check_length
from .protocol import Request
from .state import State
from .tokens import Usable, encode_texts


class Pair(NamedTuple):
    """Two texts that a cross-encoder reads together."""

    first: str
    second: str
    most_first: int = 0
    """Tokens of the first text, at most; 0 is no limit of its own."""
    most_second: int = 0


class Written(str):
    """A text that the chat template has written: what special tokens it needs are in it, as in vLLM."""


Input: TypeAlias = str | list[int] | Pair


async def pooled_prompts(
    state: State,
    request: Request,
    inputs: Sequence[Input],
    field: str,
    empty: str,
    most: int | None = None,
) -> list[Prompt]:
    """The prompts as token ids. Raises InvalidRequest, or ContextLengthExceeded, for one that is too long.

    Args:
        field: name of the prompts' field.
        empty: what to say of a prompt without tokens.
        most: tokens of a prompt, by the request's max_tokens, beyond which it is refused.
    """
    check_choices(len(inputs), 1, None, state.config, prompt=field)
    longest = state.engine.info.max_model_len
    keep, side = _truncation(request, longest), _side(state, request)
    usable = Usable(longest, None, field) if keep is None else Usable(keep, side, field)
    texts = [text for given in inputs for text in _texts(given)]
    encoded = iter(await encode_texts(state, texts, False, usable))
    wanted: bool | None = request.add_special_tokens  # requests that pool leave it open
    frame = state.tokenizer.frame if wanted is not False else None
    prompts = []
    for given in inputs:
        second = None
        if isinstance(given, Pair):
            first, other = next(encoded), next(encoded)
            first = first[: given.most_first] if given.most_first else first
            other = other[: given.most_second] if given.most_second else other
            ids, second = joined(state.tokenizer.frame, first, other, keep, side)
        elif isinstance(given, str):
            whole = isinstance(given, Written) and not wanted
            ids = framed(None if whole else frame, next(encoded), keep, side)
        else:
            ids = cut(given, keep, side)
        if not ids:
            raise InvalidRequest(empty, param=field)
        check_length(len(ids), longest, prompt=field)
        if most is not None and len(ids) > most:
            raise InvalidRequest(
                f"A prompt has {len(ids)} tokens, which is more than max_tokens, {most}.",
                param=field,
                advice="Shorten it, or have it cut: truncate END or START.",
            )
        text = given if isinstance(given, str) else ""
        prompts.append(Prompt(ids=tuple(ids), text=text, max_tokens=0, second=second))
    return prompts


def _texts(given: Input) -> tuple[str, ...]:
    if isinstance(given, Pair):
        return given.first, given.second
    return (given,) if isinstance(given, str) else ()


def _truncation(request: Request, longest: int) -> int | None:
    """Tokens that a prompt is cut to; None where it is not cut."""
    keep = request.truncate_prompt_tokens
    if keep is None:
        return None
    if keep < -1 or keep == 0:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1 or at least 1, got {keep}.", param="truncate_prompt_tokens"
        )
    if keep > longest:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be at most {longest}, the model's context length, got {keep}.",
            param="truncate_prompt_tokens",
        )
    return longest if keep == -1 else keep


def _side(state: State, request: Request) -> Side:
    """Where a prompt is cut off: as the request says, else as the tokenizer does."""
    given: Side | None = request.truncation_side  # requests that pool leave it open
    if given is not None:
        return given
    return "left" if state.tokenizer.config.get("truncation_side") == "left" else "right"
