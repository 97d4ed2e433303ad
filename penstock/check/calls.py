"""What a request to a model must say, wherever it is written: in code, in curl, in a batch's file.

A value that is not known (a variable, `**options`) is no finding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .finding import Rule, Severity

UNBOUNDED = Rule(
    "call-unbounded",
    Severity.ERROR,
    "a call without a bound on its answer",
    "The answer may go on to the end of the context: one bad prompt holds the device for minutes, and costs "
    "what thousands of answers cost.",
    "Give max_tokens (max_completion_tokens, max_output_tokens) as this feature needs it; and a ceiling at "
    "the gateway: routes.NAME.max_tokens.ceiling.",
)
UNTAGGED = Rule(
    "call-untagged",
    Severity.NOTE,
    "calls without a feature tag",
    "Costs, limits and budgets cannot be told apart by feature.",
    'Send the header once for the client: default_headers={"x-penstock-feature": "NAME"}.',
)
KEYLESS = Rule(
    "client-keyless",
    Severity.WARNING,
    "a client without a key of its own",
    "It works only while the server asks for none: then everybody on the network may use the GPU, and "
    "nobody's use can be told, limited or revoked.",
    "Make a key (`penstock keys create`), and read it from the environment.",
)
DYNAMIC = Rule(
    "prompt-dynamic-first",
    Severity.WARNING,
    "text that changes stands before text that stays",
    "Prefix caching ends at the first token that differs: with a date or a name at the beginning, the "
    "whole system prompt is computed again for every request.",
    "Put what stays first, and what changes last: at the end of the system prompt, or into the user's "
    "message.",
)
LOOP = Rule(
    "loop-unbounded",
    Severity.ERROR,
    "a loop around calls of a model that nothing ends but its answer",
    "An agent that never comes to its end calls for ever, each time with a longer context.",
    "Count the turns (`for turn in range(MAX_TURNS)`), or end the loop at a budget or a deadline.",
)
RULES = (UNBOUNDED, UNTAGGED, KEYLESS, DYNAMIC, LOOP)

TRAINING = frozenset(
    "learning_rate num_train_epochs num_epochs gradient_accumulation_steps per_device_train_batch_size "
    "micro_batch_size warmup_steps warmup_ratio optim lr_scheduler_type save_steps logging_steps".split()
)
"""Settings beside which max_steps is of a training, where -1 leaves it to the epochs."""
LIMITS = (
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "maxTokens",
    "maxOutputTokens",
    "max_new_tokens",
)
"""Names of the bound, in all APIs."""
HUGE = 100_000
"""Tokens of an answer from which a bound is none."""

_CHAT = re.compile(r"/(chat/completions|responses)/?([?#].*)?$")
_ANY = re.compile(r"/(chat/completions|completions|responses|messages|generate)/?([?#].*)?$")


def body_findings(body: Mapping[str, Any], url: str) -> Iterator[tuple[Rule, str, str]]:
    """Rule, what, fix of a request's body that is known whole.

    Completions without a bound get 16 tokens (OpenAI, vLLM), and messages are refused: only chats and
    responses run on.
    """
    given = [name for name in LIMITS if name in body]
    if not given and _CHAT.search(url):
        name = "max_output_tokens" if "responses" in url else "max_tokens"
        yield UNBOUNDED, f"The body has no {name}.", ""
    for name in given:
        if _ANY.search(url) and (problem := limit_problem(body[name])):
            yield UNBOUNDED, f"{name} is {problem}.", ""


def limit_problem(value: Any) -> str | None:
    """Why a bound is none; None if it is one, or is not known."""
    if value is None:
        return "null, which is no bound"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if value <= 0:
        return f"{value:g}, which is no bound"
    if value >= HUGE:
        return f"{value:,.0f}, which bounds nothing"
    return None
