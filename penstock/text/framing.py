"""Special tokens around one text or two, of a length that is given.

A text is cut before its special tokens are put around it, as tokenizers do it: the first of them may be the
one whose vector is wanted. Of a pair, the longer text gives way first.

    text   [CLS] a a a a … a [SEP]                    pair   [CLS] q q … q [SEP] d d d … d [SEP]
                 ├ what fits ┤                                              ▲ second: token type 1

It knows token ids and frames; where they come from is not its business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from penstock.core.errors import InvalidRequest

from .tokenizer import Frame

Side: TypeAlias = Literal["left", "right"]


def cut(ids: Sequence[int], keep: int | None, side: Side) -> list[int]:
    """At most `keep` tokens; what stands at `side` is cut off."""
    if keep is None or len(ids) <= keep:
        return list(ids)
    if keep <= 0:
        return []
    return list(ids[-keep:] if side == "left" else ids[:keep])


def framed(frame: Frame | None, ids: Sequence[int], keep: int | None, side: Side) -> list[int]:
    """A text with its special tokens, `keep` together. Raises InvalidRequest where they do not fit."""
    if frame is None:
        return cut(ids, keep, side)
    if keep is None:
        return frame.around(ids)
    special = sum(map(len, frame.single))
    if keep < special:
        raise _no_room(keep, special)
    return frame.around(cut(ids, keep - special, side))


def joined(
    frame: Frame, first: Sequence[int], second: Sequence[int], keep: int | None, side: Side
) -> tuple[list[int], int | None]:
    """Two texts with their special tokens, and where the second one begins, if it has a type of its own.

    The longer one is cut first, as tokenizers' `longest_first` does it. Raises InvalidRequest where the
    special tokens do not fit.
    """
    if keep is not None:
        special = sum(map(len, frame.pair))
        if keep < special:
            raise _no_room(keep, special)
        room = keep - special
        if len(first) + len(second) > room:
            small, large = sorted((len(first), len(second)))
            small = min(small, room // 2)
            large = room - small
            if len(first) > len(second):
                first, second = cut(first, large, side), cut(second, small, side)
            else:
                first, second = cut(first, small, side), cut(second, large, side)
    return frame.between(first, second)


def _no_room(keep: int, special: int) -> InvalidRequest:
    return InvalidRequest(
        f"truncate_prompt_tokens must be at least {special}, the number of special tokens, got {keep}.",
        param="truncate_prompt_tokens",
    )
