"""A budget for a model's thought, in the tokens of its vocabulary.

It knows families of reasoning models and a tokenizer; the end of a thought is forced by whoever samples
(`penstock.sampling.thought`).
"""

from __future__ import annotations

from penstock.core.errors import UnsupportedParameter
from penstock.core.sampling_params import ThoughtLimit

from .parsers.reasoning import ReasoningParser
from .tokenizer import Tokenizer


def thought_limit(
    tokenizer: Tokenizer,
    tokens: int,
    family: type[ReasoningParser],
    *,
    begun: bool = False,
    ending: str | None = None,
) -> ThoughtLimit:
    """What the engine is told.

    Args:
        tokenizer: of the model.
        tokens: the budget.
        family: how the model marks its thoughts.
        begun: whether the output begins inside of a thought.
        ending: what is generated when the budget is used up, the mark of the end in it; that mark alone
            without it.

    Raises UnsupportedParameter where marks are no tokens of the model: an end that it writes letter by
    letter cannot be told from a text that looks like it.
    """
    end = tokenizer.token_id(family.end)
    forced = tuple(tokenizer.encode(ending or family.end, add_special_tokens=False))
    if end is None or end not in forced:
        raise UnsupportedParameter(
            f"thinking_token_budget is not supported: {family.end} is no token of the model.",
            param="thinking_token_budget",
        )
    return ThoughtLimit(tokens, end, forced, tokenizer.token_id(family.start), begun)
